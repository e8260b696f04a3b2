"""General Points: make 24 from four cards, using each card once. Deals, solver, demonstrations, grader.

First defined in "SFT Memorizes, RL Generalizes" (Chu et al. 2025, arXiv 2501.17161, appendix A), whose rule shift
(J = Q = K = 10 in training; 11, 12, 13 when tested) is the out-of-distribution question of AMFT's experiments.

A task has these members, and `amft.py` knows nothing else about it:
    splits                       name of each evaluation split -> what it asks
    sample(split, rng)           one Episode, drawn with a random.Random
    Episode.prompt, .expert      the text shown to the policy; one correct response to it
    Episode.grade(response)      the name of the outcome, one of OUTCOMES
    Episode.unit                 episodes of one unit are solved or missed together: intervals count units

Run `python tasks.py` to see one episode of each split.
"""

import json
import random
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, combinations_with_replacement

TARGET = 24
RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
FACES = ("J", "Q", "K")

# ---------------------------------------------------------------------------------------------------------------
# Solver: every formula over a multiset of numbers, by joining the formulas of its two halves. Exact rationals.
# ---------------------------------------------------------------------------------------------------------------

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
    return a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b


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


# ---------------------------------------------------------------------------------------------------------------
# Grader. The text comes from a model: it is bounded first, then parsed, and never evaluated as code.
# ---------------------------------------------------------------------------------------------------------------

# Outcome -> the original's graded reward (appendix A.3). Eq. 1's reward is 1 for "correct", 0 for the rest.
OUTCOMES = {"correct": 5.0, "wrong_result": -1.0, "illegal_number": -2.0, "illegal_formula": -3.0, "no_answer": -3.0}
MAX_RESPONSE, MAX_FORMULA = 1000, 60  # characters; a correct formula has at most 23


def unique_keys(pairs):
    """json.loads keeps the last of two equal keys; two formulas are no answer."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


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


def grade(response, numbers, target=TARGET):
    """The outcome (a key of OUTCOMES) of a response text for the dealt numbers.

    The response is a JSON object with a string "formula", `expression` or `expression=target`. Only the formula is
    judged, as in the original; cards and number are the policy's own working. Never raises, never runs the text.
    """
    if len(response) > MAX_RESPONSE:
        return "no_answer"
    try:
        formula = json.loads(response, object_pairs_hook=unique_keys)["formula"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return "no_answer"
    if not isinstance(formula, str):
        return "no_answer"
    expression, equals, right = formula.partition("=")
    if len(formula) > MAX_FORMULA or (equals and right.strip(" ") != str(target)):
        return "illegal_formula"
    try:
        used, value = parse(expression)
    except ValueError:
        return "illegal_formula"
    if sorted(used) != sorted(numbers):
        return "illegal_number"
    return "correct" if value == target else "wrong_result"


# ---------------------------------------------------------------------------------------------------------------
# Deals and splits
# ---------------------------------------------------------------------------------------------------------------

RULE_10 = {"J": 10, "Q": 10, "K": 10}
RULE_11_12_13 = {"J": 11, "Q": 12, "K": 13}
ALL_5, ALL_7 = ({face: n for face in FACES} for n in (5, 7))

# The unit of a split is the multiset of values, so that no reordering or J-for-Q of a training deal is ever "new".
# Every multiset over 1..13 gets one role, once and for all: the roles do not depend on a run's seed. The base was
# pretrained on other targets for every role, but on target 24 for the train role only (see base/make.py).
MULTISETS = list(combinations_with_replacement(range(1, 14), 4))
ROLES = dict(zip(random.Random(24).sample(MULTISETS, len(MULTISETS)),
                 ["train"] * 1092 + ["val"] * 364 + ["heldout"] * 364))

# split: (role, rules that the prompt may state, rule that grades or None for the stated one, needs a face card)
SPLITS = {
    "train": ("train", [RULE_10], None, False),
    "val": ("val", [RULE_10], None, False),
    "id": ("train", [RULE_10], None, False),
    "heldout": ("heldout", [RULE_10], None, False),
    "ood_rule": ("heldout", [RULE_11_12_13], None, True),
    "ood_small": ("heldout", [ALL_5, ALL_7], None, True),
    "fake": ("heldout", [RULE_11_12_13], RULE_10, True),
}

INSTRUCTION = ('Use each of the four cards exactly once, with + - * / and ( ), to make the target. Reply in JSON: '
               '{"cards": [...], "number": [...], "formula": "...=target"}')


def values_of(ranks, rule):
    """The numbers that the ranks stand for: A is 1, faces as the rule says."""
    return tuple(int({"A": 1, **rule}.get(rank, rank)) for rank in ranks)


def write_prompt(ranks, rule, target=TARGET):
    faces = ", ".join(f"{face} counts as {rule[face]}" for face in FACES)
    return f"{INSTRUCTION}\nCards: {', '.join(ranks)}. {faces}. Make {target}.\n"


def write_response(ranks, numbers, formula, target=TARGET):
    return json.dumps({"cards": list(ranks), "number": list(numbers), "formula": f"{formula}={target}"})


@dataclass(frozen=True)
class Episode:
    """One deal. `ranks` are shown, `stated` is the rule in the prompt, `numbers` the values that grade counts."""
    ranks: tuple
    stated: dict
    numbers: tuple
    formula: str

    @property
    def prompt(self):
        return write_prompt(self.ranks, self.stated)

    @property
    def expert(self):
        return write_response(self.ranks, self.numbers, self.formula)

    @property
    def unit(self):
        """What a split holds or does not hold: the multiset of numbers. Deals of one unit are not independent."""
        return tuple(sorted(self.numbers))

    def grade(self, response):
        return grade(response, self.numbers)


class GeneralPoints:
    splits = {
        "val": "rule 10, the multisets of the controller's utility; defaults were chosen on it",
        "id": "rule 10, the training multisets",
        "heldout": "rule 10, multisets never trained on",
        "ood_rule": "J, Q, K = 11, 12, 13",
        "ood_small": "all faces 5, or all 7",
        "fake": "states 11, 12, 13, graded by rule 10",
    }

    def sample(self, split, rng):
        """One Episode: ranks i.i.d. uniform over 13, kept if the split's role holds them and they can be solved."""
        role, rules, graded_by, needs_face = SPLITS[split]
        stated = rng.choice(rules)
        while True:
            ranks = tuple(rng.choices(RANKS, k=4))
            numbers = values_of(ranks, graded_by or stated)
            if needs_face and not set(FACES) & set(ranks):
                continue
            if ROLES[tuple(sorted(numbers))] == role and solve(tuple(sorted(numbers))):
                return Episode(ranks, stated, numbers, rng.choice(solve(tuple(sorted(numbers)))))


TASKS = {"gp": GeneralPoints}

if __name__ == "__main__":
    for split in SPLITS:
        episode = GeneralPoints().sample(split, random.Random(0))
        print(f"--- {split}\n{episode.prompt}{episode.expert}\n{episode.grade(episode.expert)}")
