"""The figure of the project: SFT, RL, SFT then RL, a fixed mixture, AMFT and its null at one budget of responses, and mu.

    python compare/four.py      # one seed of the six into runs/compare/four-SEED (resumable), table and figure
    python compare/four.py --recorded   # of the recorded seeds: compare/recorded/four.png, compare/README.md's first table

They are rows of the study worn (compare/worn.json), with the flags that its search chose.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare.logs import RECORDED, RUNS, Study, collect, flags_of, recorded  # noqa: E402
from compare.matrix import run_all  # noqa: E402
from compare.plot import NO_MATPLOTLIB, Figure  # noqa: E402
from compare.tables import interval, markdown, mean_and_half  # noqa: E402

METHODS = {"sft": "SFT", "rl": "RL", "sft-rl": "SFT then RL", "fixed-0.5": "mu fixed at 0.5",
           "amft": "AMFT", "amft-null": "AMFT told noise"}
COLOURS = {"sft": "tab:blue", "rl": "tab:orange", "sft-rl": "tab:green", "fixed-0.5": "tab:red",
           "amft": "black", "amft-null": "tab:purple"}
SPLITS = {"id": "training deals", "val": "the controller's deals", "heldout": "unseen deals",
          "ood_rule": "changed rule"}
DRAWN = ("id", "heldout", "ood_rule")


def base_cell(row):
    shares = [100 * share for share in row["best"]]
    return "{:.1f} [{:.0f}, {:.0f}]".format(*shares)


def table(study, names=METHODS):
    """Success at the best temperature in percent at the end: mean and 95% t-interval over seeds; the base's over deals.

    Of one seed no interval."""
    lines = [["base", *(base_cell(study.base[split]) for split in SPLITS)]]
    for name, title in names.items():
        lines.append([title, *(interval(study.ends(name, split)) for split in SPLITS)])
    seeds = ", ".join(map(str, study.seeds("amft")))
    header = [f"right at its best temperature, at the end, %; seeds {seeds}", *SPLITS]
    return "\n".join(markdown(header, lines)[1:])


def by_step(study, name, split):
    """(steps, means, halves of their intervals) of success in percent, at the temperature of training."""
    values = {0: [100 * study.base[split]["success"]]}  # for all: it was evaluated in one of the rows
    for row in study.of(name, "eval"):
        if row["split"] == split and row["step"]:
            values.setdefault(row["step"], []).append(100 * row["success"])
    steps = sorted(values)
    halves = [mean_and_half(values[t])[1] if len(values[t]) > 1 else 0 for t in steps]
    return steps, [statistics.mean(values[t]) for t in steps], halves


def draw(study, path):
    figure = Figure((15, 3.6), layout="constrained")
    *axes, balance = figure.subplots(1, 4)
    for aside, name in zip((-10, -6, -2, 2, 6, 10), METHODS):
        style = dict(fmt="o-", color=COLOURS[name], label=METHODS[name], capsize=2, linewidth=1.2,
                     markersize=4)
        for axis, split in zip(axes, DRAWN):
            steps, means, halves = by_step(study, name, split)
            beside = [t + aside * (t > 0) for t in steps]  # so that no interval hides another
            axis.errorbar(beside, means, halves, **style)
            best, half = mean_and_half(study.ends(name, split, "best"))
            axis.errorbar(steps[-1] + 12 + aside, best, half if half == half else 0,
                          **dict(style, fmt="*", markersize=9, label=None))
        for seed in study.seeds(name):  # every seed's: their mean would hide that they part
            rows = study.of(name, "step", seed)
            balance.plot([row["step"] for row in rows], [row["mu"] for row in rows],
                         color=COLOURS[name], linewidth=0.8)
    for axis, split in zip(axes, DRAWN):
        axis.axhline(100 * study.base[split]["best"][0], color="grey", linestyle=":", linewidth=0.8)
        axis.set(title=SPLITS[split], xlabel="step", ylim=(0, None))
    balance.set(title="mu: 1 is SFT, 0 is RL", xlabel="step")
    axes[0].set_ylabel("right answers, %; lines: T = 1,\nstars: each policy's best T")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    print(path)


def one_seed(seed, jobs):
    """(the study of one seed of them, its folder), which is run first."""
    rows = recorded("worn")
    folder = RUNS / f"four-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(dict(runs={}, measure=rows[0].get("measure", "success"))))
    runs = [(name, seed, flags_of(rows, name)) for name in METHODS]
    how = SimpleNamespace(jobs=jobs, threads=1, keep=False, list=False)
    if not run_all(runs, folder, rows[0], how):
        sys.exit("not all runs are done")
    return Study(collect(folder)), folder


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--recorded", action="store_true",
                        help="draw the recorded runs and run nothing")
    args = parser.parse_args()
    if Figure is None:  # not after minutes of runs
        sys.exit(f"four.py: {NO_MATPLOTLIB}")
    if args.recorded:
        study = Study(recorded("worn"))
        print(table(study))
        draw(study, RECORDED / "four.png")
    else:
        study, folder = one_seed(args.seed, args.jobs)
        print(table(study, METHODS))
        draw(study, folder / "four.png")


if __name__ == "__main__":
    main()
