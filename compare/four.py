"""The figure of the project: SFT, RL, SFT then RL, and AMFT, at one budget of responses, and mu.

    python compare/four.py              # one seed of the four into runs/four-SEED (resumable), its table and figure there
    python compare/four.py --recorded   # of the recorded seeds: compare/recorded/gp-four.png, and the README's tables

The four are rows of the study gp (compare/gp.json), with the flags that its search chose.
"""

import argparse
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from compare.logs import RECORDED, Study, collect, flags_of, recorded  # noqa: E402
from compare.matrix import ROOT, run_all  # noqa: E402
from compare.tables import interval, markdown, mean_and_half  # noqa: E402

METHODS = {"sft": "SFT", "rl": "RL", "sft-rl-half": "SFT then RL", "amft": "AMFT"}
TABLE = {"sft": "SFT", "rl": "RL", "fixed-0.5": "mu fixed at 0.5", "sft-rl-half": "SFT then RL", "amft": "AMFT"}
SPLITS = {"id": "training deals", "val": "the controller's deals", "heldout": "unseen deals", "ood_rule": "another rule"}


def table(study, names=TABLE):
    """Sampled success in percent at the end: mean and 95% t-interval over seeds; of the base and one seed, over deals."""
    lines = [["base", *("{:.1f} [{:.0f}, {:.0f}]".format(*(100 * study.base[split][key] for key in ("success", "low", "high")))
                        for split in SPLITS)]]
    lines += [[title, *(interval(study.ends(name, split)) for split in SPLITS)] for name, title in names.items()]
    seeds = ", ".join(map(str, study.seeds("amft")))
    return "\n".join(markdown([f"success of samples at the end, %; seeds {seeds}", *SPLITS], lines)[1:])


def draw(study, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for aside, (name, title), colour in zip((-6, -2, 2, 6), METHODS.items(), ("tab:blue", "tab:orange", "tab:green", "black")):
        for axis, split in zip(axes, ("id", "heldout", "ood_rule")):
            at = {}
            for row in study.of(name, "eval"):
                if row["split"] == split:
                    at.setdefault(row["step"], []).append(100 * row["success"])
            halves = [0 if len(at[t]) < 2 else mean_and_half(at[t])[1] for t in sorted(at)]
            steps = [t + aside * (t > 0) for t in sorted(at)]  # so that no interval hides another
            axis.errorbar(steps, [statistics.mean(at[t]) for t in sorted(at)], halves, fmt="o-", color=colour,
                          label=title, capsize=2, linewidth=1.2, markersize=4)
        for seed in study.seeds(name):  # every seed's: their mean would hide that they part
            rows = study.of(name, "step", seed)
            axes[3].plot([row["step"] for row in rows], [row["mu"] for row in rows], color=colour, linewidth=0.8)
    for axis, heading in zip(axes, (*(SPLITS[split] for split in ("id", "heldout", "ood_rule")), "mu: 1 is SFT, 0 is RL")):
        axis.set(title=heading, xlabel="step")
    axes[0].set_ylabel("sampled success, %")
    axes[0].legend()
    figure.savefig(path, dpi=110)
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--recorded", action="store_true", help="draw the recorded runs and run nothing")
    args = parser.parse_args()
    rows = recorded("gp")
    if args.recorded:
        study, path = Study(rows), RECORDED / "gp-four.png"
    else:
        folder = ROOT / "runs" / f"four-{args.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spec.json").write_text("{\"runs\": {}}")
        jobs = [(name, args.seed, flags_of(rows, name)) for name in METHODS]
        if not run_all(jobs, folder, rows[0], SimpleNamespace(jobs=args.jobs, threads=1, keep=False, list=False)):
            sys.exit("not all runs are done")
        study, path = Study(collect(folder)), folder / "four.png"
    print(table(study, TABLE if args.recorded else METHODS))
    draw(study, path)


if __name__ == "__main__":
    main()
