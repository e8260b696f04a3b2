"""A reader's own problems: --data and --data-test, a .jsonl file of {"prompt", "solution", "answer"} a line."""

import json
import random
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

from tasks import IMAGE, REQUEST, Mathematics, Problem, answer_in, last_box, no_constant, role_of


class OwnProblems(Mathematics):
    """The mathematics task on files. data: trained on, but for a share `heldout` for each of val and heldout; data_test: a
    split of its own. What it asks is not trained on, should data ask it, too."""

    def __init__(self, turns=0, data="", data_test="", heldout=0.2):
        super().__init__(turns)
        self.problems = {}
        if data:
            self.splits = {"val": "of the file, the controller's utility", "id": "of the file, trained on",
                           "heldout": "of the file, never trained on"}
        if data_test:
            self.problems["test"] = [replace(problem, exam=True) for problem in read_problems(data_test)]
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
            raise ValueError(f"{data}: too few problems{why}: none fell to {', '.join(sorted(missing))}")
        if left_out:
            print(f"{left_out} of {len(problems)} problems of {data} are in {data_test}, too: left out", file=sys.stderr)

    def training(self, n, rng):
        """A file is gone through in epochs, each in its own order."""
        own, drawn = self.problems.get("train"), []
        while own and len(drawn) < n:
            drawn += rng.sample(own, len(own))
        return [self.granted(replace(problem)) for problem in drawn[:n]] or super().training(n, rng)

    def examples(self):
        return [problem for problems in self.problems.values() for problem in problems] or super().examples()

    def episodes(self, split, n):
        own = self.problems.get("train" if split == "id" else split)
        if not own:
            return super().episodes(split, n)
        few = random.Random(f"evaluate {split}").sample(own, min(n, len(own)))
        return [self.granted(replace(problem)) for problem in few]

    def draw(self, split, rng):
        role = "train" if split == "id" else split
        return replace(rng.choice(self.problems[role])) if role in self.problems else super().draw(split, rng)


def read_problems(path):
    """Problems of a .jsonl file. ValueError names a bad line and its fault.

    A prompt that names no form of answer gets the request for a box. Problems that differ in case, spaces or composed
    characters alone are one unit: they fall to one role."""
    problems = []
    try:  # JSON may hold other characters that end a line for Python
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})")
    for i, line in enumerate(lines, 1):
        if line.strip():
            try:
                problems.append(problem_of(line, f"{path}, line {i}"))
            except ValueError as error:
                raise ValueError(f"{path}, line {i}: {error}")
    return problems


def problem_of(line, source):
    """The Problem of one line; ValueError says what is wrong with it."""
    try:
        fields = json.loads(line, parse_constant=no_constant)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON")
    for key in ("prompt", "solution", "answer"):
        if not isinstance(fields, dict) or not isinstance(fields.get(key), str) or not fields[key].strip():
            raise ValueError(f'"{key}" must be a text that is not empty')
        try:
            fields[key].encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f'"{key}" holds half a character, a lone surrogate')
    prompt, solution, answer = fields["prompt"], fields["solution"], fields["answer"].strip()
    if IMAGE in prompt + solution:
        raise ValueError(f"{IMAGE} stands for a picture, and there is none")
    unit = " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).casefold()).split())
    if not any(form in prompt for form in ("\\boxed", "####")):
        prompt = f"{prompt.rstrip()} {REQUEST}"
    problem = Problem(prompt, solution, answer, unit, source)
    if problem.grade(solution) != "correct" and answer_in(solution) is not None:
        raise ValueError(f'"solution" ends in another answer than "answer", {answer}')
    if last_box(solution) is None and ("####" not in prompt or answer_in(solution) is None):
        problem.solution += f"\nAnswer: \\boxed{{{answer}}}"  # what the prompt asks for
    if problem.grade(problem.solution) != "correct":
        raise ValueError('"answer" cannot stand in a box')
    return problem
