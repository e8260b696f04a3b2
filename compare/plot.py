"""Figures (needs matplotlib): of recorded studies, from compare/recorded/STUDY.jsonl alone, or the curves of one run.

    python compare/plot.py gp             # compare/recorded/gp-{pareto,curves,mu}.png
    python compare/plot.py tasks virl     # of its group virl: tasks-virl-{curves,mu}.png
    python compare/plot.py runs/gp        # runs/gp/curves.png
"""

import argparse
import statistics
import sys
from itertools import accumulate, cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tasks  # noqa: E402
from compare.logs import RECORDED, read, study_of  # noqa: E402
from compare.tables import searched  # noqa: E402

ADAPTIVE = ("amft", "gac", "sasr", "superrl", "hpt")


def styles(study, names):
    return (dict(zip(names, cycle(plt.get_cmap("tab20").colors))) | {"amft": "black"},
            dict(zip(names, cycle("osD^vPX<>phd8H*"))))


def methods(study):
    """What is drawn: the runs that were searched and those that the spec names, or all."""
    return searched(study) + [name for name in study.spec.get("drawn", ()) if name in study.names] or study.names


def base(study, split):
    return statistics.mean(100 * study.base[part]["success"] for part in study.pooled.get(split, [split]))


def pareto(study):
    """In against out of distribution."""
    names = methods(study)
    colours, markers = styles(study, names)
    figure, axes = plt.subplots(1, 2, figsize=(15, 6.5), layout="constrained")
    for axis, across in zip(axes, ("ood" if "ood" in study.pooled else "ood_rule", "unseen")):
        means = {}
        for name in names:
            points = list(zip(study.ends(name, "id"), study.ends(name, across)))
            means[name] = tuple(map(statistics.mean, zip(*points)))
            axis.scatter(*zip(*points), s=18, alpha=0.45, color=colours[name], marker=markers[name])
            axis.scatter(*means[name], s=90, color=colours[name], marker=markers[name], edgecolor="black",
                         label=name)
        axis.scatter(base(study, "id"), base(study, across), s=150, color="black", marker="+", label="base")
        front = sorted(p for p in means.values()
                       if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in means.values()))
        axis.plot(*zip(*front), color="grey", linestyle="--", linewidth=1, label="Pareto front of the means", zorder=0)
        axis.set(xlabel="id: training multisets, success, %",
                 ylabel=f"{across}: {' and '.join(study.pooled.get(across, ['another rule']))}, %")
    axes[0].set_title("In against out of distribution: a small mark a seed, a large one the mean")
    axes[1].set_title("Training multisets against others of the same rule")
    axes[1].legend(fontsize=8, ncols=2)
    return figure


def curves(study, width=5):
    """Entropy and success of the rollouts, over seeds and `width` steps at a time; success on val."""
    names = methods(study)
    colours, _ = styles(study, names)
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    for name in names:
        style = dict(color=colours[name], label=name, linewidth=1.2 + (name == "amft"))
        for axis, key in zip(axes, ("entropy", "success")):
            windows = {}
            for row in study.of(name, "step"):
                if row[key] is not None:
                    windows.setdefault((row["step"] - 1) // width, []).append(row[key])
            if windows:
                axis.plot([width * (i + 0.5) for i in sorted(windows)],
                          [statistics.mean(windows[i]) for i in sorted(windows)], **style)
        val = {}
        for row in study.of(name, "eval"):
            if row["split"] == "val":
                val.setdefault(row["step"], []).append(100 * row["success"])
        val = {step: values for step, values in val.items() if len(values) >= len(study.seeds(name))}
        axes[2].plot(list(val), [statistics.mean(values) for values in val.values()], marker=".", **style)
    for axis, title in zip(axes, ("entropy of the rollouts (nats a token)", "share of rollouts correct",
                                  "success on val, %")):
        axis.set(xlabel="step", title=title)
    axes[2].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def controllers(study):
    """mu of the adaptive rules; below, AMFT's two forces, or the norm of the SFT gradient."""
    names = [name for name in ADAPTIVE if name in study.names]
    figure, axes = plt.subplots(2, len(names), figsize=(4 * len(names), 6), layout="constrained", squeeze=False)
    for column, name in zip(axes.T, names):
        for seed in study.seeds(name):
            rows = study.of(name, "step", seed)
            column[0].plot([row["step"] for row in rows], [row["mu"] for row in rows], linewidth=1)
            if name.startswith("amft"):
                steps = [0, *(row["step"] for row in rows)]
                for key, style in (("meta_force", "-"), ("entropy_force", ":")):
                    # All that the estimates moved is recorded; of the entropy's force, which is of every step, a sample.
                    forces = [(row[key] or 0.0) * (step - last if key == "entropy_force" else 1)
                              for row, step, last in zip(rows, steps[1:], steps)]
                    column[1].plot(steps[1:], list(accumulate(forces)), style, linewidth=1, color=f"C{seed}",
                                   label=key.replace("_", " ") if seed == study.seeds(name)[0] else None)
                column[1].legend(fontsize=8)
                column[1].set_title("running sums of its two forces", fontsize=9)
            else:
                norms = [(row["step"], row["grad_norm_sft"]) for row in rows if row["grad_norm_sft"] is not None]
                column[1].plot(*zip(*norms), linewidth=1)
                column[1].set_title("norm of the SFT gradient", fontsize=9)
        column[0].set(title=f"{name.replace('-', ' ')}: mu, a line a seed", ylim=(-0.03, 1.03))
        column[1].set_xlabel("step")
    return figure


def figures(study):
    """{name: figure} of every figure that its runs allow."""
    drawn = {"curves": curves(study)}
    if set(ADAPTIVE) & set(study.names):
        drawn["mu"] = controllers(study)
    if "unseen" in study.pooled and study.base:
        drawn["pareto"] = pareto(study)
    return drawn


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="a recorded study, or a run's folder")
    parser.add_argument("group", nargs="?", default="", help="of the study's runs; without it those of no group")
    args = parser.parse_args()
    if (Path(args.what) / "metrics.jsonl").exists():
        tasks.curves(read(args.what), Path(args.what) / "curves.png")
        return print(Path(args.what) / "curves.png")
    try:
        study = study_of(args.what, args.group)
    except ValueError as error:
        parser.error(str(error))
    for name, figure in figures(study).items():
        path = RECORDED / f"{'-'.join(filter(None, (args.what, *args.group.split('/'), name)))}.png"
        figure.savefig(path, dpi=110)
        print(path)


if __name__ == "__main__":
    main()
