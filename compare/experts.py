"""General Points with a worse expert: its demonstrations are of the same form, and do not make the target.

    python compare/rivals.py --task gp-wrong --method amft     # every demonstration is wrong
    python compare/rivals.py --task gp-half --method amft      # one in two

Deals, splits, grading and prompts are those of gp, so a run of RL is the same there to the last digit.
"""

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


EXPERTS = {"gp-wrong": WrongExpert, "gp-half": HalfWrongExpert}
