"""Figures (needs matplotlib): of recorded studies, from compare/recorded/STUDY.jsonl alone, or of one run.

    python compare/plot.py gp             # runs/compare/gp-{pareto,curves}.png
    python compare/plot.py tasks virl     # of its group virl: tasks-virl-curves.png
    python compare/plot.py runs/gp        # runs/gp/curves.png
"""

import argparse
import statistics
import sys
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare.logs import RUNS, read, study_of  # noqa: E402
from compare.tables import searched  # noqa: E402
from harness import screen  # noqa: E402

try:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
except ImportError:  # main says so
    Figure = None

NO_MATPLOTLIB = "draws with matplotlib, which is not here: pip install matplotlib"
MARKERS = "osD^vPX<>phd8H*"


def styles(names):
    """({name: colour}, {name: marker})."""
    colours = dict(zip(names, cycle(colormaps["tab20"].colors)))
    colours["amft"] = "black"
    return colours, dict(zip(names, cycle(MARKERS)))


def drawn_names(study):
    """What is drawn: the runs that were searched and those that the spec names, or all."""
    named = [name for name in study.spec.get("drawn", ()) if name in study.names]
    return searched(study) + named or study.names


def base(study, split):
    parts = study.pooled.get(split, [split])
    return statistics.mean(100 * study.base[part]["success"] for part in parts)


def front(points):
    """Of points (x, y) those that no other is above in both, by x."""
    return sorted(p for p in points
                  if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points))


# --- In against out of distribution ---------------------------------------------------------------


def scatter(axis, study, across):
    """Success on `id` against a split: each run's, each method's mean, the base, the Pareto front."""
    names = drawn_names(study)
    colours, markers = styles(names)
    means = {}
    for name in names:
        points = list(zip(study.ends(name, "id"), study.ends(name, across)))
        means[name] = tuple(map(statistics.mean, zip(*points)))
        style = dict(color=colours[name], marker=markers[name])
        axis.scatter(*zip(*points), s=18, alpha=0.45, **style)
        axis.scatter(*means[name], s=90, edgecolor="black", label=name, **style)
    axis.scatter(base(study, "id"), base(study, across), s=150, color="black", marker="+",
                 label="base")
    axis.plot(*zip(*front(means.values())), color="grey", linestyle="--", linewidth=1,
              label="Pareto front of the means", zorder=0)
    parts = " and ".join(study.pooled.get(across, ["another rule"]))
    axis.set(xlabel="id: training multisets, success, %", ylabel=f"{across}: {parts}, %")


def pareto(study):
    figure = Figure((15, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    scatter(left, study, "ood" if "ood" in study.pooled else "ood_rule")
    scatter(right, study, "unseen")
    left.set_title("In against out of distribution: a small mark a seed, a large one the mean")
    right.set_title("Training multisets against others of the same rule")
    right.legend(fontsize=8, ncols=2)
    return figure


# --- Curves ---------------------------------------------------------------------------------------


def windows(rows, key, width):
    """(middles, means) of a key over `width` steps at a time."""
    values = {}
    for row in rows:
        if row[key] is not None:
            values.setdefault((row["step"] - 1) // width, []).append(row[key])
    order = sorted(values)
    return [width * (i + 0.5) for i in order], [statistics.mean(values[i]) for i in order]


def on_val(study, name):
    """(steps, mean success in percent) of the evaluations on val that all seeds have."""
    values = {}
    for row in study.of(name, "eval"):
        if row["split"] == "val":
            values.setdefault(row["step"], []).append(100 * row["success"])
    steps = [step for step, own in values.items() if len(own) >= len(study.seeds(name))]
    return steps, [statistics.mean(values[step]) for step in steps]


def curves(study, width=5):
    """Entropy and success of the rollouts, over seeds and `width` steps at a time; success on val."""
    names = drawn_names(study)
    colours, _ = styles(names)
    figure = Figure((16, 4.5), layout="constrained")
    entropy, success, val = figure.subplots(1, 3)
    for name in names:
        style = dict(color=colours[name], label=name, linewidth=1.2 + (name == "amft"))
        rows = study.of(name, "step")
        for axis, key in ((entropy, "entropy"), (success, "success")):
            steps, means = windows(rows, key, width)
            if steps:
                axis.plot(steps, means, **style)
        val.plot(*on_val(study, name), marker=".", **style)
    entropy.set(xlabel="step", title="entropy of the rollouts (nats a token)")
    success.set(xlabel="step", title="share of rollouts correct")
    val.set(xlabel="step", title="success on val, %")
    val.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# --- Command line ---------------------------------------------------------------------------------


def figures(study):
    """{name: figure} of every figure that its runs allow."""
    drawn = {"curves": curves(study)}
    if "unseen" in study.pooled and study.base and {"ood", "ood_rule"} & set(study.splits):
        drawn["pareto"] = pareto(study)
    return drawn


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="a recorded study, or a run's folder")
    parser.add_argument("group", nargs="?", default="",
                        help="of the study's runs; without it those of no group")
    args = parser.parse_args()
    if Figure is None:
        sys.exit(f"plot.py: {NO_MATPLOTLIB}")
    if (Path(args.what) / "metrics.jsonl").exists():
        return print(screen.curves(read(args.what), Path(args.what) / "curves.png"))
    try:
        study = study_of(args.what, args.group)
    except ValueError as error:
        parser.error(str(error))
    RUNS.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(study).items():
        parts = [args.what, *args.group.split("/"), name]
        path = RUNS / f"{'-'.join(filter(None, parts))}.png"
        figure.savefig(path, dpi=110)
        print(path)


if __name__ == "__main__":
    main()
