"""What training changed besides sharpness: each policy is measured at the temperature that is best for it on val.

A policy's success at temperature 1 also rises when it merely gets more certain, which lowering the temperature of the
untrained policy buys without any training. So the headline is success at a policy's own best temperature."""

from typing import Any, Callable, Iterator

TEMPERATURES = (0.0, 0.1, 0.3, 0.6, 1.0)  # 0 is greedy
SHORT = 4  # samples of an episode where a run only looks how it goes


def evaluation(look: Callable, splits: Any, training_temperature: float, samples: int) -> Iterator[dict]:
    """A row of each split, val first; look(split, temperature, samples) gives the measures of one temperature.

    A row is the measures at the temperature of training, and
        temperature     of TEMPERATURES and the training's the best for this policy on val (of the first of equals)
        best            [success, low, high] there
        greedy          success at temperature 0
        hits            {temperature: of each episode, how many samples were right}; on val of every temperature
    On val the best of several temperatures flatters a little, every policy alike; on the others nothing was chosen.
    Where val is not among the splits, the first one stands in for it."""
    grid = sorted({*TEMPERATURES, training_temperature})
    best = None
    for split in sorted(splits, key=lambda split: split != "val"):
        needed = grid if best is None else sorted({0.0, best, training_temperature})
        found = {t: look(split, t, samples if t else 1) for t in needed}
        if best is None:
            best = max(grid, key=lambda t: found[t]["success"])
        at_best = found[best]
        yield dict(
            found[training_temperature], temperature=best,
            best=[at_best["success"], at_best["low"], at_best["high"]],
            greedy=found[0.0]["success"], hits={f"{t:g}": row["hits"] for t, row in found.items()})


def short_evaluation(look: Callable, splits: Any, training_temperature: float) -> Iterator[dict]:
    """A row of each split, of a few samples at the temperature of training."""
    for split in splits:
        yield {key: value for key, value in look(split, training_temperature, SHORT).items() if key != "hits"}
