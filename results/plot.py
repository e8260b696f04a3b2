"""Curves of one run, drawn from its log into DIR/curves.png: python amft.py --plot DIR"""

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def plot_run(run):
    """Success; imitation; mu with the running sums of its two forces; entropy and its target."""
    steps, evals = run.rows("step"), run.rows("eval")
    figure, axes = plt.subplots(1, 4, figsize=(18, 4), layout="constrained")

    def curve(axis, key, label=None, total=False, **style):
        points = [(row["step"], row[key]) for row in steps if row[key] is not None]
        if points:
            x, y = map(np.array, zip(*points))
            axis.plot(x, y.cumsum() if total else y, label=label or key, **style)
    curve(axes[0], "success", "training deals, sampled", color="lightgrey")
    for split in dict.fromkeys(row["split"] for row in evals):
        points = [(row["step"], row["success"]) for row in evals if row["split"] == split]
        axes[0].plot(*zip(*points), "o--", label=split, linewidth=0.8, markersize=4)
    curve(axes[1], "sft_loss")
    curve(axes[1], "implicit_reward")
    curve(axes[2], "mu", color="black")
    curve(axes[2], "meta_force", "sum of meta-gradient forces", total=True)
    curve(axes[2], "entropy_force", "sum of entropy forces", total=True)
    curve(axes[3], "entropy")
    curve(axes[3], "target_entropy", "target H*", linestyle=":")
    for axis, title in zip(axes, ("success", "imitation", "mu and its two forces", "entropy (nats a token)")):
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(run.folder / "curves.png", dpi=120)
    print(run.folder / "curves.png")
