"""A reader's own problems: --data and --data-test, a .jsonl file or a small program.

A .jsonl file has {"prompt", "solution", "answer"} a line, and recipes/answers.py grades. A program,
a .py file, grades itself: where the form of an answer matters, or many are right.

    def problems():
        \"\"\"The same list each time: dicts of "prompt", "solution" and whatever grade wants.\"\"\"

    def grade(problem, response):
        \"\"\"Is a response right? problem: one of those dicts.\"\"\"
"""

import importlib.util
import json
import random
import re
import unicodedata
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from recipes.answers import (
    ALGEBRA, MAX_TEXT, behind_hashes, in_box, measured, plain, same, stated, tell, value_of)
from tasks import IMAGE, REQUEST, Mathematics, Problem, no_constant, role_of

@dataclass
class OwnProblem(Problem):
    """A problem of a .jsonl file. also: other texts that say its answer, each good enough."""
    also: tuple = ()

    outcomes = {**Problem.outcomes, "no_answer": (0.0, "there is no answer in a box")}

    def grade(self, response):
        answer = stated(response)
        if answer is None:
            return "no_answer"
        if any(same(reference, answer) for reference in (self.answer, *self.also)):
            return "correct"
        no_number = value_of(self.answer) is not None and value_of(answer) is None
        return "no_answer" if no_number else "wrong_answer"

FAILING = set()  # programs of which that is known

@dataclass
class JudgedProblem(Problem):
    """A problem of a program, which grades it."""
    program: str = ""  # its path: the module itself could not be sent to another process
    row: dict = field(default_factory=dict)

    outcomes = OwnProblem.outcomes

    def grade(self, response):
        try:
            right = module_of(self.program).grade(self.row, response)
        except Exception as error:  # of a response that its author did not think of
            if self.program not in FAILING:
                tell(f"{self.program}: grade fails, which counts as wrong ({named(error)})")
                FAILING.add(self.program)
            return "wrong_answer"
        return "correct" if right else "wrong_answer"


class OwnProblems(Mathematics):
    """The mathematics task on files.

    data: trained on, but for a share `heldout` for each of val and heldout; data_test: a split of
    its own. What it asks is not trained on, should data ask it, too."""

    def __init__(self, turns=0, data="", data_test="", heldout=0.2):
        super().__init__(turns)
        self.problems = {}
        if data:
            self.splits = {
                "val": "of the file, the controller's utility",
                "id": "of the file, trained on",
                "heldout": "of the file, never trained on"}
        if data_test:
            read = read_problems(data_test)
            if not read:
                raise ValueError(f"{data_test}: holds no problem")
            self.problems["test"] = [replace(problem, exam=True) for problem in read]
            self.splits = {**self.splits, "test": "of a file of its own"}
        if data:
            self.share_out(data, data_test, heldout)

    def share_out(self, data, data_test, heldout):
        tested = {problem.unit for problem in self.problems.get("test", ())}
        problems = read_problems(data)
        shares = (("val", heldout), ("heldout", heldout), ("train", 1.0))
        for problem in problems:
            if problem.unit not in tested:
                self.problems.setdefault(role_of(problem.unit, shares), []).append(problem)
        left_out = sum(problem.unit in tested for problem in problems)
        missing = {"train", "val", "heldout"} - set(self.problems)
        if missing:
            why = f", {left_out} of its {len(problems)} are in {data_test}, too" if left_out else ""
            names = ", ".join(sorted(missing))
            raise ValueError(f"{data}: too few problems{why}: none fell to {names}")
        if left_out:
            tell(f"{left_out} of {len(problems)} problems of {data} are in {data_test}, too: "
                 "left out")

    def training(self, n, rng):
        """A file is gone through in epochs, each in its own order."""
        own, drawn = self.problems.get("train"), []
        while own and len(drawn) < n:
            drawn += rng.sample(own, len(own))
        return [self.granted(replace(problem)) for problem in drawn[:n]] or super().training(n, rng)

    def examples(self):
        own = [problem for problems in self.problems.values() for problem in problems]
        return own or super().examples()

    def episodes(self, split, n):
        own = self.problems.get("train" if split == "id" else split)
        if not own:
            return super().episodes(split, n)
        few = random.Random(f"evaluate {split}").sample(own, min(n, len(own)))
        return [self.granted(replace(problem)) for problem in few]

    def draw(self, split, rng):
        role = "train" if split == "id" else split
        if role not in self.problems:
            return super().draw(split, rng)
        return replace(rng.choice(self.problems[role]))


# --- Reading ---
SHOWN = 5  # bad lines that a refusal names
OTHER_NAMES = dict(
    prompt="question problem query instruction input".split(),
    solution="response completion output rationale reasoning".split(),
    answer="final_answer ground_truth target label".split())

def read_problems(path):
    """Problems of a .jsonl file or of a program. ValueError names bad lines and their faults.

    A prompt that asks for no form of answer gets the request for a box. Problems that differ in
    case, spaces or composed characters alone are one unit: they fall to one role."""
    if str(path).endswith(".py"):
        return problems_of_program(str(path))
    try:  # JSON may hold other characters that end a line for Python
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})")
    rows = [(f"line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    problems = read_all(path, rows, lambda line, source: problem_of(row_of(line), source))
    remark(path, problems)
    return problems

def read_all(path, rows, make):
    """make(row, source) of each (place, row); ValueError with places and faults of bad ones."""
    problems = []
    faults = []
    first = {}  # prompt -> where it stood first, and its problem
    for place, row in rows:
        try:
            problem = make(row, f"{path}, {place}")
            asked = " ".join(problem.prompt.split())
            before, twin = first.setdefault(asked, (place, problem))
            check_twin(problem, before, twin)
            problems.append(problem)
        except ValueError as error:
            faults.append(f"{place}: {error}")
    if faults:
        more = f"; bad are {len(faults)} of {len(rows)}" if len(faults) > 1 else ""
        raise ValueError(f"{path}, {'; '.join(faults[:SHOWN])}{more}")
    return problems

def check_twin(problem, before, twin):
    """ValueError where one prompt has two answers."""
    if isinstance(problem, OwnProblem) and not same(twin.answer, problem.answer):
        raise ValueError(f"asks what {before} asks, but its answer is {quoted(problem.answer)}, "
                         f"there {quoted(twin.answer)}: a prompt has one answer")

def remark(path, problems):
    """Say how answers that are no numbers are compared, if there are any."""
    others = [problem for problem in problems if value_of(problem.answer) is None]
    if not others:
        return
    how = "as they are spelled: math-verify is not installed (pip install math-verify)"
    if ALGEBRA.here():
        how = "with math-verify, for short expressions, else as they are spelled"
    line = others[0].source.rpartition(", ")[2]
    tell(f"{path}: {len(others)} of {len(problems)} answers are no numbers (first {line}: "
         f"{quoted(others[0].answer)}); they are compared {how}")

def row_of(line):
    try:
        return json.loads(line, parse_constant=no_constant)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON")

def problem_of(row, source):
    """The OwnProblem of one line; ValueError says what is wrong with it."""
    check_row(row, ("prompt", "solution", "answer"))
    prompt, solution, answer = row["prompt"], row["solution"], row["answer"].strip()
    if in_box(f"\\boxed{{{answer}}}") != answer:
        raise ValueError(f'"answer" cannot stand in a box: {quoted(answer)} has {len(answer)} '
                         "characters, or braces that do not fit")
    unit = unit_of(prompt)
    form = form_asked_for(prompt)
    if not form:
        prompt = f"{prompt.rstrip()} {REQUEST}"
    problem = OwnProblem(prompt, solution, answer, unit, source, also=also_right(row))
    if stated(solution) is not None and problem.grade(solution) != "correct":
        raise ValueError(f'"solution" ends in another answer than "answer", {shortened(answer)}: '
                         f"it states {quoted(stated(solution))}")
    if in_box(solution) is None and (form != "####" or behind_hashes(solution) is None):
        problem.solution += f"\nAnswer: \\boxed{{{answer}}}"  # what the prompt asks for
    return problem

def unit_of(prompt):
    return " ".join(
        unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).casefold()).split())

def also_right(row):
    """What else says the answer 5: 5 apples, where the prompt asks how many apples, or where the
    solution itself ends in it. And 5 says 5 apples where the prompt asks how many apples."""
    answer = row["answer"].strip()
    value = value_of(answer)
    asked = re.findall(r"\bhow (?:many|much) (\w+)", row["prompt"], re.IGNORECASE)
    if value is None:
        amount, unit = measured(plain(answer) or "") or (None, None)
        return (str(amount),) if unit in asked else ()
    also = [f"{answer} {unit}" for unit in asked]
    own = stated(row["solution"])
    if own is not None and amount_of(own) == value:
        also.append(own)
    return tuple(also)

def amount_of(text):
    """The number in front of a unit: of 5\\text{ m}, 5 cm, 5apples and 5%, not of 5x or 5 - 3."""
    least = 3  # letters of a unit; fewer where the spelling tells one from a variable
    if re.search(r"\\(?:text|mathrm)\b", text):
        least = 1
    elif re.search("[0-9] ", text):
        least = 2
    amount, unit = measured(plain(text) or "") or (None, "")
    right = re.fullmatch(rf"%|\u00b0|[^\W\d_]{{{least},}}[\w ^{{}}/]*", unit)
    return amount if right else None

def check_row(row, keys):
    """ValueError with all faults of a row's texts: what was found, and what would be right."""
    if not isinstance(row, dict):
        raise ValueError(f'"{keys[0]}" must be a text: the line is {kind_of(row)}, no object')
    faults = [fault for fault in (fault_of(row, key) for key in keys) if fault]
    if faults:
        raise ValueError("; ".join(faults))

def fault_of(row, key):
    """What is wrong with one text of a row; "" if nothing is."""
    text = row.get(key)
    must = f'"{key}" must be a text that is not empty'
    if key not in row:
        return f"{must}: {missing(row, key)}"
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return f'{must}: it is the number {text}, write "{text}"'
    if not isinstance(text, str) or not text.strip():
        return f"{must}: it is {kind_of(text)}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return f'"{key}" holds half a character, a lone surrogate'
    if IMAGE in text and key != "answer":
        return f"{IMAGE} stands for a picture, and there is none"
    if len(text) > MAX_TEXT:
        return f'"{key}" has {len(text)} characters, at most {MAX_TEXT} are read'
    return ""

def missing(row, key):
    """What a row has in place of a key, and what to make of it."""
    given = row.get("answer")
    if key == "solution" and isinstance(given, str) and "####" in given:
        return ('it is not there. As in GSM8K, "answer" holds the whole solution: call that '
                '"solution", and "answer" what stands behind ####')
    for other in OTHER_NAMES[key]:
        if other in row:
            return f'it is not there, but "{other}" is: call it "{key}"'
    return f"it is not there, of {', '.join(map(quoted, list(row)[:8])) or 'an empty object'}"

def kind_of(value):
    names = {dict: "an object", list: "a list", str: "a text of spaces", bool: "true or false"}
    names.update({int: "a number", float: "a number", type(None): "null"})
    return '""' if value == "" else names.get(type(value), type(value).__name__)

def quoted(text):
    return f'"{shortened(text)}"'

def shortened(text, most=60):
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}..."

# --- Does a prompt ask for a form? ---
ASKING = re.compile(
    r"\b(?:answers?|put|give|write|ends?|finish|enclosed?|place|wrap|report|return|output|state|"
    r"present|provide|express|use|conclude|boxed)\b", re.IGNORECASE)
PLACEHOLDER = re.compile(
    r"\s*[<\[{(]?(?:(?:the|your|final) )*(?:answer|number|result|value)\b", re.IGNORECASE)

def form_asked_for(prompt):
    """\\boxed or ####, whichever a prompt asks for; "" if it only uses them.

    In doubt "": then a box is asked for, twice at the worst."""
    for sentence in re.split(r"[.?!;](?=\s)|\n", prompt):
        for form in ("\\boxed", "####"):
            before, found, after = sentence.partition(form)
            before = before.rstrip(" `'\"$*(")
            if not found or not ASKING.search(f"{before} {after}"):
                continue
            if form == "####" and not before and not PLACEHOLDER.match(after):
                continue  # a heading
            if not before or before[-1].isalpha() or before[-1] == ":":
                return form
    return ""

# --- Programs ---
def problems_of_program(path):
    """JudgedProblems of a .py file; ValueError names what is wrong with it."""
    module = module_of(path)
    try:
        rows, again = list(module.problems()), list(module.problems())
        alike = rows == again
    except Exception as error:
        raise ValueError(f"{path}: problems() fails ({named(error)})")
    if not alike:
        raise ValueError(f"{path}: problems() must give the same each time: --resume asks it again")
    places = [(f"problem {i}", row) for i, row in enumerate(rows, 1)]
    return read_all(path, places, lambda row, source: judged(row, source, path))

def judged(row, source, path):
    """The JudgedProblem of one row; ValueError says what is wrong with it."""
    check_row(row, ("prompt", "solution"))
    prompt, solution = row["prompt"], row["solution"]
    problem = JudgedProblem(prompt, solution, str(row.get("answer", "")), unit_of(prompt), source,
                            program=path, row=row)
    try:
        right = module_of(path).grade(row, solution)
    except Exception as error:
        raise ValueError(f'grade fails on its "solution" ({named(error)})')
    if not right:
        raise ValueError('grade finds its "solution" wrong')
    return problem

@lru_cache(maxsize=None)
def module_of(path):
    """The module of a reader's program, which is run for it."""
    spec = importlib.util.spec_from_file_location(f"own_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: cannot be read ({error})")
    except Exception as error:
        raise ValueError(f"{path}: does not run ({named(error)})")
    for name in ("problems", "grade"):
        if not callable(getattr(module, name, None)):
            raise ValueError(f"{path}: has no function {name}")
    return module

def named(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
