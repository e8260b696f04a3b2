"""A race: mu held at 0.1, 0.5 and 0.9, each for some steps from one start; whose samples are right most often goes on.

    python compare/race.py --task gp --steps 200 --out runs/race    # 3 x 50 steps, then 150: as many as one run of 300
    python compare/race.py --help                                   # its own flags; all others are those of rivals.py

No gradient of success is estimated: what mu does is seen, 50 steps on, in samples that training takes anyway. All heats have
one seed, hence the same problems and noise; --steps and --responses are the winner's. Heats lie in OUT/heats; OUT/metrics.jsonl
is the winner's log, with all responses. The same command goes on where it was stopped.
"""

import argparse
import itertools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import amft  # noqa: E402
from compare import rivals  # noqa: E402
from compare.logs import finished, read, write  # noqa: E402
from harness.arguments import parse  # noqa: E402

MUS = (0.1, 0.5, 0.9)
JUDGED = 20  # the last steps of a heat, whose samples are its result


class Heat(rivals.Run):
    """A run that ends after `heat` steps, saved, to be gone on with; nothing is evaluated."""
    heat = 0

    def steps(self, n):
        return itertools.islice(super().steps(n), self.heat - self.t)

    def due(self):
        return super().due() or self.t == self.heat

    def evaluate(self, evaluate, splits, whole=True):
        pass

    def finish(self, model, tokenizer):
        pass


def go(words, run_class):
    amft.main(words, rivals.METHODS, rivals.Config, rivals.METHOD_FLAGS, rivals.TASKS, run_class)


def result(folder, steps):
    """Share of right samples in the last JUDGED of a heat's steps that sample; None where its steps are not all done."""
    done = [row["success"] for row in read(folder) if row["kind"] == "step"][:steps]
    sampled = [share for share in done if share is not None]  # a warm-up does not
    return statistics.mean(sampled[-JUDGED:]) if len(done) == steps else None


def race(words, out, heat):
    """The winner's log is in `out` then. ValueError where a heat samples nothing, or leaves nothing to go on with."""
    config = parse([*words, "--method", "fixed", "--out", str(out / "new")], rivals.Config, rivals.TASKS, rivals.METHOD_FLAGS).config
    if not config.warmup < heat < config.steps:
        raise ValueError(f"--heat {heat}: must be more than the {config.warmup} steps of the warm-up, "
                         f"and less than --steps, {config.steps}")
    results = {}
    for mu in MUS:
        folder = out / "heats" / f"mu-{mu}"
        if result(folder, heat) is None:
            print(f"{folder}: {heat} steps", flush=True)
            start = [*words, "--method", "fixed", "--mu", str(mu), "--out", str(folder)]
            going = ["--resume", str(folder)] if (folder / "metrics.jsonl").exists() else start
            go(going, type("Heat", (Heat,), dict(heat=heat)))
        results[mu] = result(folder, heat)
    best = max(MUS, key=results.get)  # of equals the lowest
    print(", ".join(f"mu = {mu}: {100 * share:.1f}%" for mu, share in results.items()) + f" right; {best} goes on", flush=True)
    winner = out / "heats" / f"mu-{best}"
    if not finished(read(winner)):
        go(["--resume", str(winner)], rivals.Run)
    losers = [read(out / "heats" / f"mu-{mu}")[-1] for mu in MUS if mu != best]
    write(out / "metrics.jsonl", joined(read(winner), losers, results))


def joined(rows, losers, results):
    """The winner's rows, with what the losers' last rows say that they took, and one of the heats' results."""
    for row in rows:
        if row["kind"] in ("step", "final"):
            for key in ("rollouts", "seconds"):
                row[key] += sum(loser[key] for loser in losers)
        if row["kind"] == "final":
            row["heats"] = list(results.values())
    return [dict(rows[0], method="race"), *rows[1:]]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heat", type=int, default=50, help="steps of each of the three (default: 50)")
    parser.add_argument("--out", type=Path, default=Path("runs/race"), help="folder of the race (default: runs/race)")
    own, words = parser.parse_known_args(argv)
    named = {word.split("=")[0] for word in words} & {"--method", "--mu", "--resume", "--eval-only"}
    if named:
        parser.error(f"{', '.join(sorted(named))}: a race sets it itself")
    try:
        race(words, own.out, own.heat)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
