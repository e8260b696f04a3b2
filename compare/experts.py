"""General Points and mathematics with a worse expert: its answers are wrong, or right in a form that counts as wrong.

    python compare/rivals.py --task gp-wrong --method amft     # every demonstration is wrong; math-wrong
    python compare/rivals.py --task gp-half --method amft      # one in two; math-half
    python compare/rivals.py --task gp-form --method amft      # every one is right, and written the other way round

Problems, splits, grading and prompts are those of gp and math, so a run of RL is the same there to the last digit.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tasks  # noqa: E402


class WrongExpert(tasks.GeneralPoints):
    """Each deal's demonstration is a random formula of its numbers, one that is defined and misses the target."""
    share = 1.0  # of the deals; the others have a right one

    def dealt(self, chosen, stated, ranks, rng):
        deal = super().dealt(chosen, stated, ranks, rng)
        own = random.Random(f"expert {deal.numbers}")  # rng stays as gp leaves it: the next deal is gp's
        if own.random() < self.share:
            value = None
            while value in (None, deal.target):
                numbers = own.sample(deal.numbers, 4)
                (deal.formula, _), value = tasks.random_formula(numbers, own)
        return deal


class HalfWrongExpert(WrongExpert):
    share = 0.5


class Reversed(tasks.Deal):
    """The expert says 24=..., where the task asks for ...=24: an illegal formula."""

    def respond(self, formula):
        return json.dumps(dict(cards=self.ranks, number=self.numbers, formula=f"{self.target}={formula}"))


class OtherForm(tasks.GeneralPoints):
    episode = Reversed


class Slips(tasks.Mathematics):
    """Each problem's demonstration is right up to its last step, whose result is 1 to 9 too much or too little."""
    share = 1.0  # of the problems; the others have a right one

    def draw(self, split, rng):
        problem = super().draw(split, rng)
        own = random.Random(f"expert {problem.unit}")
        if own.random() < self.share:
            value = tasks.number(problem.answer)
            wrong = own.choice([value + by for by in range(-9, 10) if by and value + by >= 0])
            work = problem.solution.rpartition(" = ")[0]
            problem.solution = f"{work} = {wrong}. Answer: \\boxed{{{wrong}}}"
        return problem


class HalfSlips(Slips):
    share = 0.5


EXPERTS = {"gp-wrong": WrongExpert, "gp-half": HalfWrongExpert, "gp-form": OtherForm,
           "math-wrong": Slips, "math-half": HalfSlips}
