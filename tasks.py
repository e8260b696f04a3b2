"""The paper's benchmarks, generated from seeds: General Points (gp, gp-vl), V-IRL (virl, virl-vl), mathematics (math).

Text, numbers and pictures alone: nothing here knows of a model. Read `Episode` and `Task` first: they are all that
`amft.py` knows of a task, and a sixth one is a subclass of each.
General Points and V-IRL were first defined in "SFT Memorizes, RL Generalizes" (Chu et al. 2025, arXiv 2501.17161,
appendices A and B), whose shifts of rule and of look are the out-of-distribution questions of AMFT's experiments.

    python tasks.py --show gp          # an episode of each split, played by its expert
    python tasks.py --show gp-vl       # the same, and the pictures in runs/gp-vl.png (needs matplotlib)
"""

import argparse
import copy
import hashlib
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, combinations_with_replacement, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

# ---------------------------------------------------------------------------------------------------------------
# The interface. A policy and an episode hold a conversation: prompt, response, observation, response, ...
# ---------------------------------------------------------------------------------------------------------------

MAX_RESPONSE = 1000  # characters; a longer response is no answer
IMAGE = "<image>"  # where a prompt or an observation holds its picture
FEEDBACK = "\nYou failed this trial because {}."


class Turn(NamedTuple):
    """One exchange of a demonstration: what the policy is shown, and the response that it learns, or only reads."""
    shown: str
    image: np.ndarray | None
    response: str
    learn: bool


class Episode:
    """One conversation. A subclass gives prompt, expert, unit and grade; the rest has a default.

        prompt      what the policy is shown first
        expert      a correct response in the present state
        unit        episodes of one unit are solved or missed together: confidence intervals count units
        grade(r)    the name of the outcome of response r, a key of `outcomes`; "correct" passes a point
    """
    outcomes = {"correct": (1.0, "")}  # name -> (graded reward, what the feedback says was wrong)
    image = None  # (H, W, 3) uint8: the picture that belongs to what was shown last
    points = 1  # what has to be passed: one answer, or every stop of a route
    attempts = 1  # graded tries at each point before the episode ends
    slips = {}  # point -> wrong response that a demonstration makes there first: read, not learned
    point = tries = 0
    source, exam = "", False  # where the problem comes from, if from a file, and if that is only evaluated
    history = ()  # outcomes so far, one for each response
    responses = ()  # and the responses
    seen = ()  # and whether each read right what was shown

    @property
    def success(self):
        return self.point == self.points

    def step(self, response):
        """(observation, graded reward, done): grade one response of the policy and move on."""
        outcome = self.grade(response)
        self.responses += (response,)
        self.seen += (self.recognised(response),)
        self.history += (outcome,)
        reward, wrong = self.outcomes[outcome]
        if outcome == "correct":
            self.point += 1
            self.tries = 0
            return ("" if self.success else self.observe()), reward, self.success
        self.tries += 1
        return self.retry(FEEDBACK.format(wrong)), reward, self.tries >= self.attempts

    def observe(self):
        """What is shown when a point is passed and another one follows."""
        return ""

    def retry(self, feedback):
        """What is shown after a wrong response: its outcome's feedback, which never tells how near it was."""
        return feedback + "\n"

    def recognised(self, response):
        """Did the policy see what there was to see? None where a task does not ask."""
        return None

    def demonstration(self):
        """The expert's conversation, a list of Turns."""
        episode, shown, turns, done = copy.copy(self), self.prompt, [], False
        while not done:
            slip = episode.slips.get(episode.point) if episode.tries == 0 else None
            image = episode.image if IMAGE in shown else None  # a retry does not show it again
            response = slip or episode.expert
            turns.append(Turn(shown, image, response, slip is None))
            shown, _, done = episode.step(response)
        return turns


SHORT = dict(steps=50, prompts=8, eval_n=300)  # for tasks whose conversations are long


class Task:
    """Draws episodes. A subclass gives `draw`, which must depend on nothing but its arguments, and `splits`."""
    episode = Episode  # the class, whose `outcomes` are what a log counts
    splits = {}  # evaluation split -> what it asks. Must have "val", the controller's own; "train" is not listed.
    defaults = {}  # flags of amft.py that this task sets differently
    smoke = {}  # and those that --smoke does
    turns = 0  # graded attempts at each point; 0: the episode's own number

    def __init__(self, turns=0):
        self.turns = turns or self.turns

    def draw(self, split, rng):
        """One Episode of a split or of "train", drawn with a random.Random."""
        raise NotImplementedError

    def sample(self, split, rng):
        return self.granted(self.draw(split, rng))

    def training(self, n, rng):
        """The n episodes that a run trains on."""
        return [self.sample("train", rng) for _ in range(n)]

    def examples(self):
        """What is checked before a run: enough that what the run draws is hardly longer."""
        return [self.sample("train", random.Random(i)) for i in range(100)]

    def granted(self, episode):
        episode.attempts = self.turns or episode.attempts
        return episode

    def episodes(self, split, n):
        """What an evaluation of a split plays: always the same n episodes, or all if there are fewer."""
        rng = random.Random(f"evaluate {split}")
        return [self.sample(split, rng) for _ in range(n)]

    def measures(self, played, samples):
        """What an evaluation tells of its episodes, played to their ends, each `samples` times, those together.

        success, low, high: of responses, which is what Eq. 1 maximises, with its 95% interval; hits: of each episode,
        how many of its samples were successes; any: of the episodes, how many had one. Of the responses: outcomes, and
        where they say something else, each as (share, low, high), step_accuracy of single responses,
        first_try, solved without a failed attempt, and recognition, responses that read right what was shown.
        """
        success, low, high = interval([(e.success, e.unit) for e in played])
        hits = np.reshape([int(e.success) for e in played], (-1, samples)).sum(1)
        outcomes = Counter(outcome for episode in played for outcome in episode.history)
        row = dict(success=success, low=low, high=high, any=float((hits > 0).mean()), hits=hits.tolist(),
                   outcomes={name: outcomes[name] for name in self.episode.outcomes})
        if any(episode.points > 1 or episode.attempts > 1 for episode in played):
            correct = [(e, [outcome == "correct" for outcome in e.history]) for e in played]
            row["step_accuracy"] = interval([(hit, e.unit) for e, hits in correct for hit in hits])
            row["first_try"] = interval([(e.success and all(hits), e.unit) for e, hits in correct])
        if played[0].seen[0] is not None:
            row["recognition"] = interval([(hit, e.unit) for e in played for hit in e.seen])
        return row


def interval(pairs, z=1.96):
    """(share, low, high) of a success rate with its 95% interval, of (hit, unit) pairs whose units are clusters.

    Wilson's interval at the effective sample size: all orders of one multiset of numbers tend to be solved or missed
    together, so a thousand deals are worth far fewer independent ones; without this it is too narrow.
    """
    n = len(pairs)
    p = sum(hit for hit, _ in pairs) / n
    residuals = Counter()
    for hit, unit in pairs:
        residuals[unit] += hit - p
    variance = sum(r * r for r in residuals.values()) / n ** 2  # of p, with clusters as the independent draws
    n = min(n, p * (1 - p) / variance) if variance > 0 else n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def fields_of(response):
    """The JSON object that a response is, as a dict; None for anything else. Equal keys are no answer."""
    if len(response) > MAX_RESPONSE:
        return None
    try:
        fields = json.loads(response, object_pairs_hook=unique_keys, parse_constant=no_constant)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def unique_keys(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def no_constant(name):
    raise ValueError(f"{name} is not JSON")


def role_of(text, shares=(("train", 0.6), ("val", 0.2), ("heldout", 0.2))):
    """Which role a problem has, by a hash of its text: the same in every run, whoever asks."""
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2 ** 64
    for role, share in shares:
        if (draw := draw - share) < 0:
            return role
    return shares[-1][0]


# ---------------------------------------------------------------------------------------------------------------
# General Points: make 24 from four cards, using each card once
# ---------------------------------------------------------------------------------------------------------------

TARGET = 24
RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
FACES = ("J", "Q", "K")
MAX_FORMULA = 60  # characters; a correct formula has at most 23

# Solver: every formula over a multiset of numbers, by joining the formulas of its two halves. Exact rationals.

ADD, MUL, ATOM = 0, 1, 2  # precedence of a formula's outermost operator: + or -, * or /, a single number


def join(left, op, right):
    """(text, precedence) of `left op right`, with no bracket that could be left out."""
    (a, pa), (b, pb) = left, right
    if op in "*/":
        a = f"({a})" if pa == ADD else a
        b = f"({b})" if pb == ADD or (op == "/" and pb == MUL) else b
        return f"{a}{op}{b}", MUL
    return f"{a}{op}" + (f"({b})" if op == "-" and pb == ADD else b), ADD


@lru_cache(maxsize=None)
def halves(numbers):
    """Ways to cut a sorted tuple of numbers into two non-empty sorted tuples, both orders, none twice."""
    indices = range(len(numbers))
    cuts = set()
    for size in range(1, len(numbers)):
        for chosen in combinations(indices, size):
            rest = tuple(numbers[i] for i in indices if i not in chosen)
            cuts.add((tuple(numbers[i] for i in chosen), rest))
    return sorted(cuts)


@lru_cache(maxsize=None)
def formulas(numbers):
    """{value: {(text, precedence)}} of every formula that uses each of the sorted `numbers` once."""
    if len(numbers) == 1:
        return {Fraction(numbers[0]): {(str(numbers[0]), ATOM)}}
    table = {}
    for left, right in halves(numbers):
        for a, a_forms in formulas(left).items():
            for b, b_forms in formulas(right).items():
                for op in "+-*/" if b else "+-*":
                    forms = {join(x, op, y) for x in a_forms for y in b_forms}
                    table.setdefault(apply(op, a, b), set()).update(forms)
    return table


def apply(op, a, b):
    if op == "+":
        return a + b
    if op == "-":
        return a - b
    return a * b if op == "*" else a / b


@lru_cache(maxsize=None)
def solve(numbers, target=TARGET):
    """Every formula (sorted texts, fewest brackets) that makes `target` of the numbers, each used exactly once.

    numbers: a tuple of integers, any order. Only the last join is aimed at the target: for each value a of one half
    and each operator there is one value b that the other half would need, and a table tells whether it has it.
    """
    if (numbers := tuple(sorted(numbers))) and len(numbers) == 1:
        return (str(target),) if numbers[0] == target else ()
    found = set()
    for left, right in halves(numbers):
        others = formulas(right)
        for a, a_forms in formulas(left).items():
            needed = {"+": target - a, "-": a - target}
            if a and target:
                needed |= {"*": target / a, "/": a / target}
            for op, b in needed.items():
                found |= {join(x, op, y)[0] for x in a_forms for y in others.get(b, ())}
    return tuple(sorted(found))


# Parser. The text comes from a model: it is bounded first, then parsed in exact fractions, and never run as code.


def parse(formula):
    """(numbers used, value) of a text over + - * / ( ) and integers; value is None after a division by zero.

    Raises ValueError for anything else: unary signs, leading zeros, powers, other scripts' digits, open brackets.
    """
    tokens = re.findall(r"[1-9][0-9]{0,3}(?![0-9])|[-+*/()]|.", re.sub(r" +", " ", formula).strip(" "), re.S)
    tokens = [t for t in tokens if t != " "] + ["end"]
    numbers, position = [], 0

    def take():
        nonlocal position
        position += 1
        return tokens[position - 1]

    def atom():
        if (token := take()) == "(":
            value = chain("+-")
            if take() != ")":
                raise ValueError("unmatched bracket")
            return value
        if not re.fullmatch("[0-9]+", token):
            raise ValueError(f"unexpected {token!r}")
        numbers.append(int(token))
        return Fraction(int(token))

    def chain(operators):
        """Left-associative a op b op c: sums (operators "+-") of products (operators "*/") of atoms."""
        operand = atom if operators == "*/" else lambda: chain("*/")
        value = operand()
        while tokens[position] in operators:
            op, right = take(), operand()
            undefined = value is None or right is None or (op == "/" and right == 0)
            value = None if undefined else apply(op, value, right)
        return value

    value = chain("+-")
    if take() != "end":
        raise ValueError("unexpected text after the formula")
    return numbers, value


# Deals and splits

RULE_10 = {"J": 10, "Q": 10, "K": 10}
RULE_11_12_13 = {"J": 11, "Q": 12, "K": 13}
ALL_5, ALL_7 = ({face: n for face in FACES} for n in (5, 7))

# The unit of a split is the multiset of values, so that no reordering or J-for-Q of a training deal is ever "new".
# Every multiset over 1..13 gets one role, once and for all: the roles do not depend on a run's seed. The base was
# pretrained on other targets for every role, but on target 24 for the train role only (see base/make.py).
MULTISETS = list(combinations_with_replacement(range(1, 14), 4))
ROLES = dict(zip(random.Random(24).sample(MULTISETS, len(MULTISETS)),
                 ["train"] * 1092 + ["val"] * 364 + ["heldout"] * 364))


class Split(NamedTuple):
    role: str
    rules: tuple  # that the prompt may state
    graded_by: dict | None = None  # the rule that grades, if not the stated one
    needs_face: bool = False
    suits: str = "SC"  # of the cards in a picture: spades, clubs, hearts, diamonds


SPLITS = {
    "train": Split("train", (RULE_10,)),
    "val": Split("val", (RULE_10,)),
    "val_rule": Split("val", (RULE_11_12_13,), needs_face=True),  # a utility that asks for the other rule
    "id": Split("train", (RULE_10,)),
    "heldout": Split("heldout", (RULE_10,)),
    "ood_rule": Split("heldout", (RULE_11_12_13,), needs_face=True),
    "ood_small": Split("heldout", (ALL_5, ALL_7), needs_face=True),
    "ood_visual": Split("heldout", (RULE_10,), suits="HD"),
    "fake": Split("heldout", (RULE_11_12_13,), RULE_10, True),
}

INSTRUCTION = ('Use each of the four cards exactly once, with + - * / and ( ), to make the target. Reply in JSON: '
               '{"cards": [...], "number": [...], "formula": "...=target"}')


def values_of(ranks, rule):
    """The numbers that the ranks stand for: A is 1, faces as the rule says."""
    return tuple(int({"A": 1, **rule}.get(rank, rank)) for rank in ranks)


@dataclass
class Deal(Episode):
    """`ranks` are shown, `stated` is the rule in the prompt, `numbers` are the values that grade counts."""
    ranks: tuple
    stated: dict
    numbers: tuple
    formula: str
    target: int = TARGET

    outcomes = {"correct": (5.0, ""), "wrong_result": (-1.0, "your formula does not make the target"),
                "illegal_number": (-2.0, "your formula does not use each number exactly once"),
                "illegal_formula": (-3.0, "your formula is not a formula"),
                "no_answer": (-3.0, "your reply is not in the required form")}  # rewards: the original's appendix A.3

    @property
    def prompt(self):
        faces = ", ".join(f"{face} counts as {self.stated[face]}" for face in FACES)
        return f"{INSTRUCTION}\nCards: {self.cards}. {faces}. Make {self.target}.\n"

    @property
    def cards(self):
        return ", ".join(self.ranks)

    @property
    def expert(self):
        return self.respond(self.formula)

    def respond(self, formula):
        return json.dumps(dict(cards=self.ranks, number=self.numbers, formula=f"{formula}={self.target}"))

    @property
    def unit(self):
        """What a split holds or does not hold: the multiset of numbers."""
        return tuple(sorted(self.numbers))

    def grade(self, response):
        """As in the original only "formula" is judged: `expression` or `expression=target`."""
        formula = (fields_of(response) or {}).get("formula")
        if not isinstance(formula, str):
            return "no_answer"
        expression, equals, right = formula.partition("=")
        if len(formula) > MAX_FORMULA or (equals and right.strip(" ") != str(self.target)):
            return "illegal_formula"
        try:
            used, value = parse(expression)
        except ValueError:
            return "illegal_formula"
        if sorted(used) != sorted(self.numbers):
            return "illegal_number"
        return "correct" if value == self.target else "wrong_result"


@dataclass
class PictureDeal(Deal):
    """The cards are in the picture alone. As in the original, cards that are misread decide the outcome."""
    suits: str = ""

    outcomes = {**Deal.outcomes, "wrong_cards": (-1.5, "you misread the cards")}
    cards = IMAGE

    @property
    def image(self):
        return draw_cards(self.ranks, self.suits)

    def recognised(self, response):
        cards = (fields_of(response) or {}).get("cards")
        return isinstance(cards, list) and sorted(map(str, cards)) == sorted(self.ranks)

    def grade(self, response):
        outcome = super().grade(response)
        return outcome if outcome == "no_answer" or self.recognised(response) else "wrong_cards"


class GeneralPoints(Task):
    episode = Deal
    defaults = dict(model="base/worn", steps=300, warmup=0, prompts=8, advantage="group", imitation="rectified",
                    sft_batch=32, utility="val", eval_n=150, val_every=100)
    splits = {
        "val": "rule 10, the multisets of the controller's utility; defaults were chosen on it",
        "id": "rule 10, the training multisets",
        "heldout": "rule 10, multisets never trained on",
        "ood_rule": "J, Q, K = 11, 12, 13",
        "ood_small": "all faces 5, or all 7",
        "fake": "states 11, 12, 13, graded by rule 10",
    }

    def draw(self, split, rng):
        """Ranks i.i.d. uniform over 13, kept if the split's role holds them and they can be solved."""
        chosen = SPLITS[split]
        stated = rng.choice(chosen.rules)
        while True:
            ranks = tuple(rng.choices(RANKS, k=4))
            numbers = values_of(ranks, chosen.graded_by or stated)
            if chosen.needs_face and not set(FACES) & set(ranks):
                continue
            if ROLES[tuple(sorted(numbers))] == chosen.role and solve(tuple(sorted(numbers))):
                return self.dealt(chosen, stated, ranks, rng)

    def episodes(self, split, n):
        """Every multiset of the split that can be solved, once under each of its rules: nothing is drawn but looks."""
        chosen, rng, deals = SPLITS[split], random.Random(f"evaluate {split}"), []
        for stated in chosen.rules:
            rule = chosen.graded_by or stated
            cards = {value: [rank for rank in RANKS if values_of((rank,), rule) == (value,)] for value in range(1, 14)}
            for numbers in MULTISETS:
                ways = [ranks for ranks in product(*(cards[value] for value in numbers))
                        if set(FACES) & set(ranks) or not chosen.needs_face]
                if ROLES[numbers] == chosen.role and ways and solve(numbers):
                    deals.append(self.granted(self.dealt(chosen, stated, rng.sample(rng.choice(ways), 4), rng)))
        return rng.sample(deals, min(n, len(deals)))

    def dealt(self, chosen, stated, ranks, rng):
        numbers = values_of(ranks, chosen.graded_by or stated)
        deal = self.deal(chosen, rng, ranks=tuple(ranks), stated=stated, numbers=numbers,
                         formula=rng.choice(solve(tuple(sorted(numbers)))))
        if self.turns > 1 and rng.random() < 0.5:  # so that demonstrations show what to do after a failure, too
            (wrong, _), value = random_formula(rng.sample(numbers, 4), rng)
            if value != deal.target:
                deal.slips = {0: deal.respond(wrong)}
        return deal

    def deal(self, split, rng, **drawn):
        return self.episode(**drawn)


class GeneralPointsTurns(GeneralPoints):
    turns = 3  # with feedback after each failed attempt


class GeneralPointsPictures(GeneralPoints):
    episode = PictureDeal
    splits = {**{name: text for name, text in GeneralPoints.splits.items() if name != "fake"},
              "ood_visual": "as heldout, but with red suits; training has black ones"}
    defaults = SHORT

    def deal(self, split, rng, **drawn):
        return self.episode(**drawn, suits="".join(rng.choices(split.suits, k=4)))


def random_formula(numbers, rng):
    """((text, precedence), value) of a random formula that uses each number once, in order; no value if undefined."""
    if len(numbers) == 1:
        return (str(numbers[0]), ATOM), Fraction(numbers[0])
    cut = rng.randrange(1, len(numbers))
    (left, a), (right, b) = random_formula(numbers[:cut], rng), random_formula(numbers[cut:], rng)
    op = rng.choice("+-*/")
    value = None if a is None or b is None or (op == "/" and b == 0) else apply(op, a, b)
    return join(left, op, right), value


# ---------------------------------------------------------------------------------------------------------------
# V-IRL: follow written directions through a city, one action at a time
# ---------------------------------------------------------------------------------------------------------------

# 45 degrees apart and clockwise, so that a turn is a difference modulo 8. (The original takes it without the modulus.)
HEADINGS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
BEARINGS = ("front", "right front", "right", "right behind", "behind", "left behind", "left", "left front")
TURNS = {1: "slightly right", 2: "right", 3: "right", 5: "left", 6: "left", 7: "slightly left"}  # 0 and 4: no turn
ACTION_WORDS = {"absolute": HEADINGS, "relative": ("left", "right", "slightly left", "slightly right")}
OFFSETS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))  # (east, north) of each heading
NAMES = [f"{first} {kind}" for first in ("Harbor", "Maple", "Crown", "Union", "River", "Summit", "Velvet", "Copper")
         for kind in ("Bank", "Cafe", "Hotel", "Museum", "Market", "Theater", "Bakery", "Library")]
NAME_ROLES = dict(zip(random.Random(8).sample(NAMES, len(NAMES)), ["train"] * 40 + ["heldout"] * 24))
CITY_SIZE, CITIES = 5, 200  # nodes along a side; cities of each role

NOTHING, CROSSING = "No landmarks nearby", "; You observe an intersection"
FORWARD, HALT = "forward()", "stop()"
GUIDE = ('Follow the instruction to the destination. Reply in JSON: {"current observation": "...", '
         '"current instruction": "...", "action": "..."}\nActions: forward(), stop(), turn_direction(x) with x one of ')
VIEWS = "\nThe image has 4 views: front and right above, behind and left below."


class City:
    """A street graph on a square grid, with named landmarks at some intersections. All from its seed."""

    def __init__(self, seed, names):
        rng = random.Random(f"city {seed}")
        nodes = [(x, y) for x in range(CITY_SIZE) for y in range(CITY_SIZE)]
        self.streets = {node: {} for node in nodes}  # node -> {heading: the next node}
        for x, y in nodes:
            for heading in range(4):  # the other four are the way back
                end = (x + OFFSETS[heading][0], y + OFFSETS[heading][1])
                if end in self.streets and rng.random() < 0.8:
                    self.streets[x, y][heading] = end
                    self.streets[end][heading + 4] = (x, y)
        self.landmarks = {node: (rng.choice(names), rng.randrange(8)) for node in nodes if rng.random() < 0.7}
        self.names = names


class Stop(NamedTuple):
    """A point of the route: what is seen there, the line of the instruction that applies, the action it asks for."""
    landmark: tuple | None  # (name, bearing 0..7)
    intersection: bool
    line: int
    action: str

    @property
    def seen(self):
        text = "{} is on your {}".format(self.landmark[0], BEARINGS[self.landmark[1]]) if self.landmark else NOTHING
        return text + (CROSSING if self.intersection else "")


@dataclass
class Route(Episode):
    """A walk on a rail, as in the original: only the right action moves on, a wrong one is never executed."""
    city: int
    heading: int  # at the start
    frame: str  # of the actions, "absolute" or "relative"
    lines: tuple  # the instruction
    stops: tuple  # of Stop
    attempts: int = 2  # as in the original

    outcomes = {"correct": (1.0, ""), "wrong_action": (-1.0, "your action is not the right one here"),
                "missed_intersection": (-1.5, "you are at an intersection"),
                "no_intersection": (-1.5, "you are not at an intersection"),
                "illegal_action": (-1.0, "your action is not one of the actions"),
                "no_answer": (-1.0, "your reply is not in the required form")}

    @property
    def points(self):
        return len(self.stops)

    @property
    def prompt(self):
        words = ", ".join(ACTION_WORDS[self.frame])
        lines = "".join(f"\n{i}. {line}" for i, line in enumerate(self.lines, 1))
        return f"{GUIDE}{words}.{self.layout}\nYou face {HEADINGS[self.heading]}.{lines}{self.observe()}"

    layout = ""

    def observe(self):
        return f"\nO_{self.point + 1}: {self.view}\nA_{self.point + 1}: "

    @property
    def view(self):
        return self.stops[self.point].seen

    def retry(self, feedback):
        return f"{feedback}\nA_{self.point + 1}: "

    @property
    def expert(self):
        return self.respond(self.stops[self.point].action)

    def respond(self, action):
        stop = self.stops[self.point]
        return json.dumps({"current observation": stop.seen,
                           "current instruction": f"{stop.line}. {self.lines[stop.line - 1]}", "action": action})

    @property
    def actions(self):
        return (FORWARD, HALT, *(f"turn_direction({word})" for word in ACTION_WORDS[self.frame]))

    @property
    def unit(self):
        return self.city

    def recognised(self, response):
        return (fields_of(response) or {}).get("current observation") == self.stops[self.point].seen

    def grade(self, response):
        """Exact match of "action". What the policy says of intersections only chooses between two kinds of failure."""
        fields, stop = fields_of(response) or {}, self.stops[self.point]
        if not isinstance(fields.get("action"), str):
            return "no_answer"
        if fields["action"] == stop.action:
            return "correct"
        if fields["action"] not in self.actions:
            return "illegal_action"
        claims = "intersection" in str(fields.get("current observation"))
        # The start and the destination are corners too, though their observation does not say so: no word of it there.
        if claims == stop.intersection or self.point in (0, self.points - 1):
            return "wrong_action"
        return "no_intersection" if claims else "missed_intersection"


@dataclass
class PictureRoute(Route):
    """The landmark of the present view is in the picture alone; the look is an index into LOOKS."""
    look: int = 0
    layout = VIEWS

    @property
    def view(self):
        stop = self.stops[self.point]
        return f"{IMAGE}You observe an image of 4 views" + (CROSSING if stop.intersection else "")

    @property
    def image(self):
        return draw_views(self.stops[self.point].landmark, self.look, seed=f"{self.city} {self.point}")


def walk(city, rng, legs):
    """(heading at the start, [(heading of the leg, its end node), ...]): every corner a turn, no node twice."""
    while True:
        node, heading, path = rng.choice(sorted(city.streets)), rng.randrange(8), []
        start, visited = heading, {node}
        for _ in range(legs):
            ways = [way for way in sorted(city.streets[node]) if (way - heading) % 8 in TURNS
                    and city.streets[node][way] not in visited]
            if not ways:
                break
            heading = rng.choice(ways)
            node = city.streets[node][heading]
            visited.add(node)
            path.append((heading, node))
        if len(path) == legs and node in city.landmarks:
            return start, path


def route_parts(city, rng, legs, frame="absolute", told="both", glimpses=0.0):
    """The fields of a Route through the city. told: which frame the instruction's turns are given in, or both.

    glimpses: how often a point along a street shows the landmark of its end, from afar and so on another side than
    the instruction says; who stops at the name alone stops too early.
    """
    start, path = walk(city, rng, legs)
    met = {city.landmarks[node][0] for _, node in path if node in city.landmarks}
    lines, stops, heading, seen, crossing = [], [], start, None, False
    for leg, (way, node) in enumerate(path):
        turn = TURNS[(way - heading) % 8]
        facing = {"both": f"{turn} to face {HEADINGS[way]}", "absolute": f"to face {HEADINGS[way]}", "relative": turn}
        lines.append(("Turn " if leg else "First, turn ") + facing[told] + ".")
        word = HEADINGS[way] if frame == "absolute" else turn
        stops.append(Stop(seen, crossing, len(lines), f"turn_direction({word})"))
        name, side = city.landmarks.get(node, (None, 0))
        seen, heading = (name, (side - way) % 8) if name else None, way
        last = leg == len(path) - 1
        lines.append(f"Move forward until you reach {'destination' if last else 'next intersection'}"
                     + (f" where {name} is on your {BEARINGS[seen[1]]}." if name else "."))
        for _ in range(rng.randrange(3)):  # points along the street
            passed = rng.choice(city.names)
            passed = None if passed in met or rng.random() < 0.6 else (passed, rng.choice((1, 2, 6, 7)))
            if name and rng.random() < glimpses:
                passed = name, rng.choice([bearing for bearing in (0, 1, 2, 6, 7) if bearing != seen[1]])
            stops.append(Stop(passed, False, len(lines), FORWARD))
        crossing = not last
    stops.append(Stop(seen, False, len(lines), HALT))
    return dict(heading=start, frame=frame, lines=tuple(lines), stops=tuple(stops))


class VIRL(Task):
    episode = Route
    splits = {
        "val": "other cities with the training names; the controller's utility",
        "id": "the training cities",
        "heldout": "new cities, new names",
        "ood_rule": "as heldout, but actions are relative (left, ...); training has absolute ones (north, ...)",
        "ood_rule_hard": "as ood_rule, and the instruction gives turns in the absolute frame only",
    }
    defaults = dict(SHORT, steps=40, samples=4, sft_batch=16, demos=2000, eval_n=200)
    smoke = dict(steps=6, warmup=2, prompts=4, eval_n=8, eval_samples=2)

    def draw(self, split, rng):
        role = split if split in ("train", "val") else "train" if split == "id" else "heldout"
        names = [name for name in NAMES if NAME_ROLES[name] == ("heldout" if role == "heldout" else "train")]
        number = rng.randrange(CITIES)
        ood = split in ("ood_rule", "ood_rule_hard")
        parts = route_parts(City(f"{role} {number}", names), rng, rng.choice((2, 3)),
                            "relative" if ood else "absolute", "absolute" if split == "ood_rule_hard" else "both",
                            glimpses=0.9)
        return self.route(split, rng, city=number, **parts)

    def route(self, split, rng, **parts):
        return self.episode(**parts)


class VIRLPictures(VIRL):
    episode = PictureRoute
    splits = {**VIRL.splits, "ood_visual": "as heldout, but with other palettes, textures and signs"}

    def route(self, split, rng, **parts):
        return self.episode(**parts, look=rng.randrange(1, len(LOOKS)) if split == "ood_visual" else 0)


# ---------------------------------------------------------------------------------------------------------------
# Mathematics: chains of arithmetic with worked solutions
# ---------------------------------------------------------------------------------------------------------------

THINGS = ("apples", "boats", "coins", "drums", "eggs", "flags", "goats", "hats", "inks", "jars")
SYMBOLS = ("@", "#", "&", "~")
# An operator's meaning is "p * a + q * b" or "p * a - q * b". The base saw the others, training sees none at all.
MEANINGS = [(p, sign, q) for p in (1, 2, 3) for sign in "+-" for q in (1, 2, 3) if (p, q) != (1, 1)]
OOD_MEANINGS = MEANINGS[::4]
MAX_VALUE, MAX_DENOMINATOR = 100, 12
REQUEST = "Work it out step by step and put the answer in \\boxed{}.\n"


def meaning_text(meaning, a, b):
    p, sign, q = meaning
    left = f"{p} * {a}" if p > 1 else str(a)
    right = f"{q} * {b}" if q > 1 else str(b)
    return f"{left} {sign} {right}"


def within_bounds(value):
    return 0 <= value.numerator <= MAX_VALUE and value.denominator <= MAX_DENOMINATOR


@dataclass
class Problem(Episode):
    prompt: str
    solution: str
    answer: str  # as it stands in the box, or a reader's own reference
    unit: str = ""
    source: str = ""
    exam: bool = False  # of a file that is only evaluated: its solution is not a demonstration

    outcomes = {"correct": (1.0, ""), "wrong_answer": (0.0, "your answer is wrong"),
                "no_answer": (0.0, "there is no number in a box")}

    @property
    def expert(self):
        return self.solution

    def grade(self, response):
        """Judge the answer: a number equal to the reference in any form, or the reference's text if that is none."""
        box = answer_in(response)
        value, right = number(box or ""), number(self.answer)
        if box is None or (right is not None and value is None):
            return "no_answer"
        equal = value == right if right is not None else box.split() == self.answer.split()
        return "correct" if equal else "wrong_answer"


def last_box(text):
    """What stands in the last \\boxed{...}, braces balanced; None without one, or if it is not closed."""
    start = text.rfind("\\boxed{") + len("\\boxed{")
    if start < len("\\boxed{") or len(text) > 20 * MAX_RESPONSE:
        return None
    depth = 1
    for end in range(start, min(len(text), start + MAX_RESPONSE)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def answer_in(text):
    """The last box; without one, what stands behind #### at the end of the last line, as in GSM8K."""
    box = last_box(text)
    if box is not None or len(text) > 20 * MAX_RESPONSE:
        return box
    tail = text.rstrip()[-100:].rpartition("\n")[2]
    return tail.rpartition("####")[2].strip() if "####" in tail else None


DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,20})"  # 1,000 and 1000, not 1,00


def number(text):
    """The exact value of an integer, a decimal, a/b or \\frac{a}{b}, with a sign or without; None for anything else."""
    text = text.strip(" $") if len(text) <= 60 else ""
    if match := re.fullmatch(rf"([+-]?)({DIGITS})(\.[0-9]{{1,20}})?", text):
        value = Fraction(match[2].replace(",", "") + (match[3] or ""))
    elif match := re.fullmatch(rf"([+-]?)(?:\\d?frac\{{({DIGITS})\}}\{{({DIGITS})\}}|({DIGITS}) ?/ ?({DIGITS}))", text):
        top, bottom = (int((a or b).replace(",", "")) for a, b in ((match[2], match[4]), (match[3], match[5])))
        if not bottom:
            return None
        value = Fraction(top, bottom)
    else:
        return None
    return -value if match[1] == "-" else value


def chain(rng, steps, meaning=None, symbol=None):
    """A Problem of so many dependent steps; with a meaning, at least one step uses the operator that it explains."""
    while True:
        names = rng.sample(THINGS, steps + 1)
        values, lines, work, shape = [Fraction(rng.randint(1, 12))], [], [], []
        lines.append(f"{names[0]} = {values[0]}")
        special = set(rng.sample(range(steps), rng.randint(1, steps))) if meaning else ()
        for i in range(steps):
            a = values[i]
            earlier = [j for j in range(i) if values[j].denominator == 1]
            if earlier and rng.random() < 0.3:  # the second operand is an earlier thing
                j = rng.choice(earlier)
                b = values[j]
                told = names[j]
                place = f"v{j}"
            else:
                b = Fraction(rng.randint(1, 12))
                told = place = str(b)
            op = symbol if i in special else rng.choice("+-*/")
            if op == symbol and a.denominator == 1:
                p, q = meaning[0] * a, meaning[2] * b
                value = p + q if meaning[1] == "+" else p - q
                middle = f"{meaning_text(meaning, a, b)} = {p} {meaning[1]} {q} = "
            elif op == symbol or (op == "/" and b == 0):
                break
            else:
                value, middle = apply(op, a, b), ""
            if not within_bounds(value):
                break
            lines.append(f"{names[i + 1]} = {names[i]} {op} {told}")
            work.append(f"{names[i + 1]} = {a} {op} {b} = {middle}{value}. ")
            shape.append(f"{op}{place}")
            values.append(value)
        if len(values) == steps + 1:
            break
    rule = f"a {symbol} b means {meaning_text(meaning, 'a', 'b')}. " if meaning else ""
    unit = f"{rule}{values[0]} {' '.join(shape)}"  # the problem whatever its things are called
    prompt = f"{rule}{'. '.join(lines)}. How many {names[-1]}? {REQUEST}"
    solution = f"{''.join(work)}Answer: \\boxed{{{values[-1]}}}"
    return Problem(prompt, solution, str(values[-1]), unit)


class Mathematics(Task):
    episode = Problem
    splits = {
        "val": "3 or 4 steps, other problems; the controller's utility",
        "id": "3 or 4 steps, from the training problems",
        "heldout": "3 or 4 steps, problems never trained on",
        "ood_length": "5 steps",
        "ood_rule": "an operator that the prompt explains; training has none",
    }
    defaults = dict(SHORT, max_new_tokens=100, sft_batch=32)

    def draw(self, split, rng):
        role = {"id": "train", "ood_length": "heldout", "ood_rule": "heldout"}.get(split, split)
        while True:
            steps = 5 if split == "ood_length" else rng.choice((3, 4))
            rule = (rng.choice(OOD_MEANINGS), rng.choice(SYMBOLS)) if split == "ood_rule" else ()
            problem = chain(rng, steps, *rule)
            if role_of(problem.unit) == role:
                return problem


# ---------------------------------------------------------------------------------------------------------------
# Pictures, 48 x 48 pixels, drawn with numpy
# ---------------------------------------------------------------------------------------------------------------

SIDE, CELL = 48, 24  # of a picture, of a card's or a view's place in it: two rows of two
# A 3 x 5 glyph is five octal digits, its rows from the top.
GLYPHS = {"A": "25755", "1": "26227", "2": "71747", "3": "71317", "4": "55711", "5": "74717", "6": "74757",
          "7": "71122", "8": "75757", "9": "75717", "0": "75557", "J": "11152", "Q": "25573", "K": "55655"}
PIPS = {"S": "00100 01110 11111 11111 00100", "C": "01110 01110 11111 10101 00100",
        "H": "01010 11111 11111 01110 00100", "D": "00100 01110 11111 01110 00100"}
INK = {"S": (25, 25, 25), "C": (25, 25, 25), "H": (205, 30, 45), "D": (205, 30, 45)}
TABLE, CARD = (53, 101, 77), (250, 250, 250)


def bitmap(rows):
    return np.array([[char == "1" for char in row] for row in rows])


def rank_bitmap(rank):
    """(5, 3) of one glyph, (5, 7) of "10"."""
    glyphs = [bitmap(format(int(row), "03b") for row in GLYPHS[char]) for char in rank]
    return np.concatenate([part for glyph in glyphs for part in (glyph, np.zeros((5, 1), bool))][:-1], 1)


def stamp(canvas, shape, top, left, colour, scale=1):
    shape = shape.repeat(scale, 0).repeat(scale, 1)
    canvas[top:top + shape.shape[0], left:left + shape.shape[1]][shape] = colour


def draw_cards(ranks, suits):
    """Four cards on a table, in reading order: (48, 48, 3) uint8."""
    canvas = np.full((SIDE, SIDE, 3), TABLE, np.uint8)
    for i, (rank, suit) in enumerate(zip(ranks, suits)):
        top, left = CELL * (i // 2), CELL * (i % 2)
        canvas[top + 1:top + 23, left + 3:left + 21] = CARD
        stamp(canvas, rank_bitmap(rank), top + 3, left + 5, INK[suit], scale=2)
        stamp(canvas, bitmap(PIPS[suit].split()), top + 16, left + 14, INK[suit])
    return canvas


class Look(NamedTuple):
    sky: tuple
    ground: tuple
    sign: tuple  # colour of a sign's board
    ink: tuple
    noise: int  # texture: standard deviation of the pixels


LOOKS = (Look((150, 195, 235), (120, 120, 120), (250, 250, 250), (30, 30, 120), 0),  # training
         Look((20, 20, 60), (50, 40, 60), (30, 30, 30), (255, 220, 90), 8),  # night, lit signs
         Look((240, 170, 110), (150, 100, 60), (90, 30, 30), (250, 240, 220), 14),  # dusk, dust
         Look((215, 215, 215), (235, 240, 245), (40, 110, 70), (255, 255, 255), 6))  # snow


@lru_cache(maxsize=None)
def signs():
    """{landmark name: its sign (7, 7) bool, mirrored left to right}, any two at least 8 pixels apart."""
    rng, found = np.random.default_rng(0), []
    while len(found) < len(NAMES):
        half = rng.random((7, 4)) < 0.5
        sign = np.concatenate([half, half[:, 2::-1]], 1)
        if all((sign != other).sum() >= 8 for other in found):
            found.append(sign)
    return dict(zip(NAMES, found))


def draw_views(landmark, look, seed):
    """Four views, 90 degrees wide each: front and right above, behind and left below. (48, 48, 3) uint8.

    landmark: (name, bearing 0..7) or None. One that stands between two views hangs at the edge of both. The original
    says this layout and draws another one.
    """
    style = LOOKS[look]
    canvas = np.empty((SIDE, SIDE, 3), float)
    for row in range(2):
        canvas[CELL * row:CELL * row + 15] = style.sky
        canvas[CELL * row + 15:CELL * (row + 1)] = style.ground
    if landmark:
        name, bearing = landmark
        for view in range(4):  # its middle is at bearing 2 * view
            offset = (bearing - 2 * view + 4) % 8 - 4
            if abs(offset) <= 1:
                top, left = CELL * (view // 2) + 4, CELL * (view % 2) + (CELL - 9) // 2 + 7 * offset
                canvas[top:top + 9, left:left + 9] = style.sign
                stamp(canvas, signs()[name], top + 1, left + 1, style.ink)
    if style.noise:
        canvas += np.random.default_rng(list(seed.encode())).normal(0, style.noise, canvas.shape)
    canvas[CELL - 1:CELL + 1] = canvas[:, CELL - 1:CELL + 1] = 0
    return canvas.clip(0, 255).astype(np.uint8)


TASKS = {"gp": GeneralPoints, "gp-turns": GeneralPointsTurns, "gp-vl": GeneralPointsPictures, "virl": VIRL, "virl-vl": VIRLPictures,
         "math": Mathematics}


def show_task(name):
    """Print an episode of each split, played by its expert; with pictures, also draw what the policy sees."""
    task, pictures = TASKS[name](), []
    for split in ("train", *task.splits):
        episode = task.sample(split, random.Random(0))
        turns = episode.demonstration()
        print(f"--- {split}: {task.splits.get(split, 'what is trained on')}")
        print("".join(turn.shown + turn.response for turn in turns) + "\n")
        pictures += [(f"{split}, {i}", turn) for i, turn in enumerate(turns[:3], 1) if turn.image is not None]
    if pictures:
        print(draw(pictures, Path("runs", f"{name}.png")))


def draw(pictures, path, columns=6):
    """Draw (title, Turn) each; what became of it, in words."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no pictures: pip install matplotlib"
    rows = -(-len(pictures) // columns)
    figure = Figure((2.2 * columns, 2.6 * rows), layout="tight")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, turn) in zip(axes.flat, pictures):
        axis.imshow(turn.image, interpolation="nearest")
        fields = json.loads(turn.response)
        said = fields.get("current observation") or ", ".join(fields["cards"])
        axis.set_title(f"{title}\n{said}".replace("; ", "\n"), fontsize=6)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return f"{len(pictures)} pictures in {path}"


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--show", choices=TASKS, default="gp", help="the task to print, and to draw")
    import os  # here: a course grades bodies that see this module's names
    import sys
    try:
        show_task(arguments.parse_args().show)
        sys.stdout.flush()
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
