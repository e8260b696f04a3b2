"""The figure of the project: SFT, RL, SFT then RL, and AMFT, at one budget of responses. Nine minutes a seed on two cores.

    python compare/four.py                      # the runs (resumable), compare/figure/four.jsonl, and four.png
    python compare/four.py --seeds 1 2 3 4 5    # what is recorded: the figure shows means, and each seed's mu
    python compare/four.py --draw               # the figure and the table from the recorded rows alone

Every run: 450 steps, 28,800 responses in all (AMFT's samples on validation prompts included), 64 demonstrations a step
where there are any. Learning rates are the best of those tried for each method (README.md says which).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from compare.tables import mean_and_half  # noqa: E402

STEPS = 450
COMMON = f"--task gp --steps {STEPS} --val-every 90 --splits id,val,heldout,ood_rule"
SAMPLES = "--advantage group --prompts 8 --responses 28800"
METHODS = {"SFT": "--method sft --lr 3e-4 --imitation rectified",
           "RL": f"--method rl --lr 1e-4 {SAMPLES}",
           "SFT then RL": f"--method sft-rl --warmup 225 --lr 3e-4 --imitation rectified {SAMPLES}",
           "AMFT": f"--method amft --warmup 0 --lr 2e-4 --imitation rectified --utility val --eta-h 0.05 {SAMPLES}"}
SPLITS = "id", "val", "heldout", "ood_rule"
RECORDED = HERE / "figure" / "four.jsonl"


def run(name, seed, folder):
    out = folder / f"{name.replace(' ', '-')}-{seed}"
    if (out / "final" / "config.json").exists():
        return out
    what = ["--resume", out] if (out / "metrics.jsonl").exists() else [*f"{COMMON} {METHODS[name]} --seed {seed}".split(), "--out", out]
    subprocess.run([sys.executable, HERE / "rivals.py", *map(str, what)], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(f"done: {name}, seed {seed}", flush=True)
    return out


def record(runs):
    """One line an evaluation, and one line every fifth step with its mu."""
    with open(RECORDED, "w") as file:
        for (name, seed), out in runs.items():
            for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
                keys = dict(config=("lr", "advantage", "imitation", "utility", "eta_h", "warmup", "steps"),
                            step=("step", "mu", "rollouts", "seconds"),
                            eval=("step", "split", "n", "success", "low", "high", "any", "greedy")).get(row["kind"], ())
                if keys and (row["kind"] != "step" or row["step"] % 5 == 0):
                    file.write(json.dumps(dict(method=name, seed=seed, kind=row["kind"],
                                               **{key: row[key] for key in keys if key in row})) + "\n")


def table(rows):
    """Sampled success in percent at the end: with its interval over deals for one seed, with the seeds' range for more."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [f"| success of samples at the end, %, seeds: {', '.join(map(str, seeds))} | " + " | ".join(SPLITS) + " |",
             "|---" * (len(SPLITS) + 1) + "|"]
    for name in ("base", *METHODS):
        cells = []
        for split in SPLITS:
            found = [row for row in rows if row["kind"] == "eval" and row["split"] == split and name in ("base", row["method"])
                     and row["step"] == (0 if name == "base" else STEPS)]
            values = [100 * row["success"] for row in found]
            low, high = (100 * found[0]["low"], 100 * found[0]["high"]) if len(seeds) == 1 or name == "base" else (
                min(values), max(values))
            cells.append(f"{statistics.mean(values):.1f} [{low:.0f}, {high:.0f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(rows):
    """AMFT less each other method, seed by seed, in points: mean and half-width of its 95% t-interval."""
    end = {(row["method"], row["seed"], row["split"]): 100 * row["success"] for row in rows
           if row["kind"] == "eval" and row["step"] == STEPS}
    seeds = sorted({row["seed"] for row in rows})
    lines = ["| AMFT less | " + " | ".join(SPLITS) + " |", "|---" * (len(SPLITS) + 1) + "|"]
    for other in list(METHODS)[:-1]:
        cells = (mean_and_half([end["AMFT", seed, split] - end[other, seed, split] for seed in seeds]) for split in SPLITS)
        lines.append(f"| {other} | " + " | ".join(f"{mean:+.1f} ± {half:.1f}" for mean, half in cells) + " |")
    return "\n".join(lines)


def draw(rows):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    titles = {"id": "training deals", "heldout": "unseen deals", "ood_rule": "unseen deals, another rule"}
    for name, colour in zip(METHODS, ("tab:blue", "tab:orange", "tab:green", "black")):
        for axis, split in zip(axes, titles):
            at = {}
            for row in rows:
                if row["kind"] == "eval" and row["method"] == name and row["split"] == split:
                    at.setdefault(row["step"], []).append(100 * row["success"])
            axis.plot(sorted(at), [statistics.mean(at[t]) for t in sorted(at)], "o-", color=colour, label=name)
        mu = {}
        for row in rows:
            if row["kind"] == "step" and row["method"] == name:
                mu.setdefault(row["step"], []).append(row["mu"])
        for path in zip(*(mu[t] for t in sorted(mu))):  # every seed's: their mean would hide that they part
            axes[3].plot(sorted(mu), path, color=colour, linewidth=0.8)
    for axis, title in zip(axes, (*titles.values(), "mu: 1 is SFT, 0 is RL")):
        axis.set(title=title, xlabel="step")
    axes[0].set_ylabel("sampled success, %")
    axes[0].legend()
    figure.savefig(RECORDED.with_suffix(".png"), dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/four"))
    parser.add_argument("--draw", action="store_true", help="from the recorded rows alone")
    args = parser.parse_args()
    if not args.draw:
        tasks = [(name, seed) for seed in args.seeds for name in reversed(METHODS)]
        with ThreadPoolExecutor(args.jobs) as pool:
            outs = list(pool.map(lambda task: run(*task, args.folder), tasks))
        record(dict(zip(tasks, outs)))
    rows = [json.loads(line) for line in RECORDED.read_text().splitlines()]
    print(table(rows), paired(rows), sep="\n\n")
    draw(rows)


if __name__ == "__main__":
    main()
