"""Every method of amft.py on General Points, compared fairly: a search on val, the matrix of runs, tables and figures.

    python results/compare.py              # what is missing: the search, then the matrix; then tables and figures
    python results/compare.py --tables     # tables and figures from the logs alone (figures need matplotlib)
    python results/compare.py --seeds 2    # fewer seeds; more can be added later
    python results/compare.py --long       # also some of the rows for three times as many steps, three seeds

All runs have the same optimiser steps and, but for SFT, the same number of sampled responses (SETTINGS; amft.py shares
the budget out). SEARCH gives each method four settings, tried on one seed that no other run has and judged by success
on val; the best is what the matrix runs. Nothing else is chosen by hand. Seeds are paired: a seed is the same training
problems for every method. Finished runs are skipped, runs that were cut off are resumed, `--processes` run at a time
with a thread each. Logs go to results/compare/NAME-SEED/ (long runs: results/long/) and results/search/METHOD-NUMBER/,
tables to results/compare.md, figures beside it.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
STEPS, VAL_EVERY = 50, 10
SETTINGS = ["--task", "gp", "--model", "base/early", "--steps", str(STEPS), "--prompts", "8", "--samples", "8",
            "--meta-prompts", "8", "--sft-batch", "32", "--meta-every", "5", "--advantage", "group", "--lr", "1e-4",
            "--eval-n", "250", "--evals", "last", "--save-every", "50", "--sample-every", "1000"]
SEARCH_SEED = 100
HIGH, LOW = ["--lr", "1e-4"], ["--lr", "3e-5"]
RATES = [["--lr", lr] for lr in ("1e-5", "3e-5", "1e-4", "3e-4")]  # for methods with nothing else to set


def with_rates(flag, *values):
    return [[*rate, flag, value] for rate in (HIGH, LOW) for value in values]


SEARCH = {
    "sft": RATES, "dft": RATES, "rl": RATES, "superrl": RATES, "dyme": RATES, "srft": RATES,
    "sft-rl": with_rates("--switch", "0.25", "0.5"),
    "fixed": with_rates("--mu", "0.3", "0.7"),
    "cosine": with_rates("--mu-max", "0.9", "0.5"),
    "chord": with_rates("--mu", "0.1", "0.5"),
    "sasr": with_rates("--sasr", "0.3", "1"),
    "gac": with_rates("--eta-mu", "0.01", "0.05"),
    "hpt": with_rates("--gate", "0.125", "0.25"),  # 0 is superrl
    "relift": with_rates("--sft-batch", "8", "16"),
    "luffy": with_rates("--shape", "0.1", "0.3"),
    "amft": with_rates("--eta-mu", "0.02", "0.05"),
}
ABLATIONS = {"without meta-gradient": ["--no-meta"], "without entropy": ["--no-entropy"],
             "without warm-up": ["--warmup", "0"],
             "entropy sign of the text": ["--entropy-sign", "text"],
             "one step ahead on val": ["--trace", "0", "--meta-on", "val"],
             "controller of the paper": ["--controller", "paper", "--trace", "0", "--meta-on", "val"]}
COLD = "-without-warm-up"
MUS = ("0.1", "0.3", "0.5", "0.7", "0.9")
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student's t
POOLED = {"unseen": ("val", "heldout"), "ood": ("ood_rule", "ood_small")}  # means of splits, steadier than each
LONG = ("rl", "amft", "amft without warm-up")  # for LONG_STEPS, with LONG_SEEDS seeds
LONG_STEPS, LONG_SEEDS = 150, 3
REACH = (0.1, 0.15)  # success rates on val of table (c)


def log_of(folder):
    log = folder / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.exists() else []


def finished(folder):
    return any(row["kind"] == "final" for row in log_of(folder))


def trial(method, number):
    return HERE / "search" / f"{method}-{number}"


def cell(name, seed, part="compare"):
    return HERE / part / f"{name.replace(' ', '-')}-{seed}"


def final_val(folder):
    return [row for row in log_of(folder) if row["kind"] == "eval" and row["split"] == "val"][-1]["success"]


def chosen(method):
    """The flags that were best on val in the search; the first of equals."""
    return SEARCH[method][max(range(4), key=lambda number: final_val(trial(method, number)))]


def rows_of_the_matrix():
    """{name: flags beside SETTINGS}."""
    rows = {method: ["--method", method, *chosen(method)] for method in SEARCH}
    rows["sft"] += ["--keep-best"]
    rows |= {f"amft {name}": [*rows["amft"], *flags] for name, flags in ABLATIONS.items()}
    fixed = rows["fixed"]
    rows |= {f"fixed {mu}": [*fixed[:-1], mu] for mu in MUS if [*fixed[:-1], mu] != fixed}
    rows |= {f"fixed {mu} without warm-up": [*fixed[:-1], mu, "--warmup", "0"] for mu in MUS}
    return rows | {"gac without warm-up": [*rows["gac"], "--warmup", "0"]}


def clocked():
    """SFT with as many steps as fit into the time of AMFT's run, by the seconds that the first seed's logs have."""
    def seconds(name):  # of a step; without those that follow an evaluation, whose clock holds it
        rows = [row for row in log_of(cell(name, 0)) if row["kind"] == "step"]
        return statistics.mean(b["seconds"] - a["seconds"] for a, b in zip(rows, rows[1:]) if a["step"] % VAL_EVERY)
    steps = round(STEPS * seconds("amft") / seconds("sft"))
    return ["--method", "sft", *chosen("sft"), "--keep-best", "--steps", str(steps)]


def initialise():
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    torch.set_num_threads(1)


def run(folder, flags):
    """One run, in a worker; what it prints goes to a file beside its log."""
    import amft
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(HERE.parent)
    out = str(folder.relative_to(HERE.parent))
    where = ["--resume", out] if (folder / "metrics.jsonl").exists() else [*flags, "--out", out]
    screen = sys.stdout, sys.stderr
    with open(folder / "output.txt", "a") as file:
        sys.stdout = sys.stderr = file
        try:
            amft.main(where)
        except SystemExit as stop:
            return f"{out}: exit code {stop.code}, see output.txt"
        finally:
            sys.stdout, sys.stderr = screen
    shutil.rmtree(folder / "final")
    (folder / "state.pt").unlink()


def run_all(jobs, processes, what):
    jobs = [(folder, flags) for folder, flags in jobs if not finished(folder)]
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initialise) as pool:
        futures = [pool.submit(run, *job) for job in jobs]
        for future in tqdm(as_completed(futures), total=len(futures), desc=what):
            if future.result():
                tqdm.write(future.result())


def mean_and_half(values):
    """Mean over seeds and half-width of its 95% t-interval; no number where there is one seed."""
    half = T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), half


def interval(values):
    return "{:.1f} ± {:.1f}".format(*mean_and_half(values)).removesuffix(" ± nan")


class Logs:
    """All finished runs of the matrix, or of another part: {(name, seed): rows}."""

    def __init__(self, part="compare"):
        self.runs = {}
        for folder in sorted((HERE / part).glob("*-*")):
            name, seed = folder.name.rsplit("-", 1)
            if finished(folder):
                self.runs[name, int(seed)] = log_of(folder)
        self.names = list(dict.fromkeys(name for name, _ in self.runs))
        # The search may have picked a mu of the sweep, which then is not run twice.
        fixed = self.of("fixed", "config")[0]["mu"] if "fixed" in self.names else None
        self.sweep = {mu: "fixed" if float(mu) == fixed else f"fixed-{mu}" for mu in MUS}
        self.splits = [*dict.fromkeys(row["split"] for name, seed in self.runs for row in self.of(name, "eval", seed)),
                       *POOLED]

    def seeds(self, name):
        return [seed for other, seed in self.runs if other == name]

    def of(self, name, kind, seed=None):
        seed = self.seeds(name)[0] if seed is None else seed
        return [row for row in self.runs[name, seed] if row["kind"] == kind]

    def success(self, name, seed, split, best=False):
        if split in POOLED:
            return statistics.mean(self.success(name, seed, part, best) for part in POOLED[split])
        return 100 * [row["success"] for row in self.of(name, "eval", seed)
                      if row["whole"] and row["best"] == best and row["split"] == split][-1]


def markdown(header, lines):
    return ["", *("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))]


def tables(logs):
    """All tables, as text."""
    main = [name for name in SEARCH if name in logs.names]
    columns = {name: (name, False) for name in main}
    columns |= {"sft, early stopped": ("sft", True)}
    if "sft-clocked" in logs.names:
        columns |= {"sft, same time": ("sft-clocked", False), "sft, same time, early stopped": ("sft-clocked", True)}
    columns |= {f"fixed, mu = {mu}": (name, False) for mu, name in logs.sweep.items()
                if name in logs.names and name != "fixed"}
    columns |= {name.removesuffix(COLD).replace("-", ", mu = ") + ", no warm-up": (name, False) for name in logs.names
                if name.endswith(COLD) and not name.startswith("amft")}
    config = logs.of("amft", "config")[0]
    commits = sorted({logs.of(name, "config", seed)[0]["commit"][:12] for name, seed in logs.runs})
    base = {row["split"]: row for row in logs.of("amft", "eval", 0) if row["step"] == 0}
    text = ["# Every method on General Points", "", "Made by `python results/compare.py` from the logs in `compare/` "
            f"and `search/`; commit {', '.join(f'`{c}`' for c in commits)}, torch {config['torch']}. Every run: "
            f"`{' '.join(SETTINGS)}`, that is {config['steps']} optimiser steps and "
            f"{config['steps'] * config['prompts'] * config['samples']} responses, and what the search chose (below). "
            f"Greedy success in percent, n = {config['eval_n']} a split; mean over seeds and half-width of its 95% "
            "t-interval. Base: 95% interval of the one policy over its deals, which counts multisets: that a split "
            "holds about 110 of them, solved or missed as a whole, is a second uncertainty of every row, which seeds do "
            "not show. unseen: mean of val and heldout; ood: mean of ood_rule and ood_small.", "", "## (a) Success"]

    def of_base(split):
        if split in POOLED:
            return f"{100 * statistics.mean(base[part]['success'] for part in POOLED[split]):.1f}"
        return "{:.1f} [{:.0f}, {:.0f}]".format(*(100 * base[split][key] for key in ("success", "low", "high")))
    lines = [["base", "-", *map(of_base, logs.splits)]]
    for title, (name, best) in columns.items():
        seeds = logs.seeds(name)
        lines.append([title, str(len(seeds)), *(interval([logs.success(name, seed, split, best) for seed in seeds])
                                                for split in logs.splits)])
    text += markdown(["method", "seeds", *logs.splits], lines)
    text += ["", "Paired difference from AMFT, points; bold where the interval does not hold 0 (one in twenty would by "
             "chance):"]

    def differences(name, best=False, against="amft"):
        seeds = sorted(set(logs.seeds(name)) & set(logs.seeds(against)))
        cells = []
        for split in logs.splits:
            values = [logs.success(name, seed, split, best) - logs.success(against, seed, split) for seed in seeds]
            mean, half = mean_and_half(values)
            cells.append(f"**{interval(values)}**" if abs(mean) > half else interval(values))
        return cells
    text += markdown(["method", *logs.splits], [[title, *differences(*column)] for title, column in columns.items()
                                                if column != ("amft", False)])
    text += ["", "## (b) The ablations of the paper's Table 4", "", "Success, and the paired difference from the full "
             "AMFT. The paper's own, in distribution: full 61.3, without meta-gradient 57.0, without warm-up 56.2, "
             "without entropy 55.0."]
    names = ["amft", *(f"amft-{name.replace(' ', '-')}" for name in ABLATIONS)]
    names = [name for name in names if name in logs.names]
    text += markdown(["run", "mu at the end", *logs.splits], [
        [name.replace("-", " "), interval2([logs.of(name, "final", seed)[0]["mu"] for seed in logs.seeds(name)]),
         *(interval([logs.success(name, seed, split) for seed in logs.seeds(name)]) for split in logs.splits)]
        for name in names])
    text += markdown(["less the full AMFT", *logs.splits], [[name.replace("-", " "), *differences(name)]
                                                            for name in names[1:]])
    bare = [name for name in logs.names if name.endswith(COLD) and not name.startswith("amft")]
    text += ["", "Paired difference from AMFT without warm-up of what has none either:"]
    text += markdown(["method", *logs.splits], [[name.replace("-", " "), *differences(name, against=f"amft{COLD}")]
                                                for name in ("rl", "chord", "cosine", "sft", *bare)])
    text += ["", "## (c) Steps and responses to reach a success rate on val", "", "First evaluation (every "
             f"{config['val_every']} steps) at or above it: median over the seeds that got there, and how many did."]
    lines = []
    for name in main:
        line = [name]
        for goal in REACH:
            hits = []
            for seed in logs.seeds(name):
                first = next((row["step"] for row in logs.of(name, "eval", seed)
                              if row["split"] == "val" and row["success"] >= goal and row["step"]), None)
                if first:
                    hits.append((first, logs.of(name, "step", seed)[first - 1]["rollouts"]))
            many = f"{len(hits)} of {len(logs.seeds(name))}"
            line += [f"{statistics.median(h[0] for h in hits):.0f} ({many})",
                     f"{statistics.median(h[1] for h in hits):.0f}"] if hits else ["-", "-"]
        lines.append(line)
    text += markdown(["method", *(x for goal in REACH for x in (f"steps to {100 * goal:.0f}%", "responses"))], lines)
    long = Logs("long")
    if long.runs:
        text += ["", "## (d) Three times as long", "", f"The same settings, chosen for {STEPS} steps, with {LONG_STEPS}: "
                 f"{LONG_STEPS * config['prompts'] * config['samples']} responses."]
        text += markdown(["method", "seeds", "mu at the end", *logs.splits], [
            [name, str(len(seeds)), interval2([long.of(own, "final", seed)[0]["mu"] for seed in seeds]),
             *(interval([long.success(own, seed, split) for seed in seeds]) for split in logs.splits)]
            for name, own in ((name, name.replace(" ", "-")) for name in LONG) for seeds in [long.seeds(own)] if seeds])
    text += ["", "## What the runs did"]
    lines = []
    for name in logs.names:
        seeds = logs.seeds(name)
        steps = [row for seed in seeds for row in logs.of(name, "step", seed)]
        finals = [logs.of(name, "final", seed)[0] for seed in seeds]
        solved = [100 * statistics.mean(own) for own in ([row["success"] for row in logs.of(name, "step", seed)[-10:]
                                                          if row["success"] is not None] for seed in seeds) if own]
        entropy = [row["entropy"] for seed in seeds for row in logs.of(name, "step", seed)[-10:] if row["entropy"]]
        lines.append([name.replace("-", " "), f"{statistics.mean(row['mu'] for row in steps):.2f}",
                      f"{statistics.mean(row['demos'] for row in steps):.1f}",
                      f"{statistics.mean(f['rollouts'] for f in finals):.0f}",
                      interval(solved) if solved else "-",
                      f"{statistics.mean(entropy):.3f}" if entropy else "-",
                      f"{statistics.mean(f['seconds'] for f in finals):.0f}"])
    text += markdown(["run", "mean mu", "demonstrations a step", "responses", "rollouts correct, last 10 steps, %",
                      "entropy, last 10 steps",
                      "seconds, evaluations included"], lines)
    text += ["", "Signs of the meta-gradients, from conversations on val (with z, their size over their standard error) "
             "and from the steps' own RL gradients; those that are 0, no group having had a signal, are left out. Sign "
             "test: probability of so uneven a split of signs by chance, were they independent (with a trace, neighbours "
             "share their d theta/d mu: they are not)."]
    lines = []
    for name in names:
        steps = [row for seed in logs.seeds(name) for row in logs.of(name, "step", seed)]
        z = [row["meta_grad"] / row["meta_se"] for row in steps if row["meta_se"]]
        own = [row["meta_own"] for row in steps if row["meta_own"]]
        if z:
            lines.append([name.replace("-", " "), f"{sum(x < 0 for x in z)} of {len(z)}", f"{sign_test(z):.2g}",
                          f"{statistics.mean(z):+.2f}", str(sum(abs(x) > 2 for x in z)),
                          f"{sum(x < 0 for x in own)} of {len(own)}", f"{sign_test(own):.2g}"])
    text += markdown(["run", "val: negative", "sign test p", "mean z", "abs(z) > 2", "own: negative", "sign test p"],
                     lines)
    text += ["", "## The search", "", f"Seed {SEARCH_SEED}, success on val in percent after the run; nothing else was "
             "evaluated. Chosen: the best, the first of equals."]
    lines = []
    for method, trials in SEARCH.items():
        values = [(flags, 100 * final_val(trial(method, i))) for i, flags in enumerate(trials)]
        pick = chosen(method)
        lines.append([method, *(f"{'**' * (flags == pick)}{' '.join(flags)}: {value:.1f}{'**' * (flags == pick)}"
                                for flags, value in values)])
    text += markdown(["method", "", "", "", ""], lines)
    return "\n".join(text) + "\n"


def interval2(values):
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def sign_test(values):
    """Two-sided; 1 of no values."""
    n, k = len(values), min(sum(x < 0 for x in values), sum(x >= 0 for x in values))
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n)


def figures(logs):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    main = [name for name in SEARCH if name in logs.names]
    cold = f"amft{COLD}"
    colours = dict(zip(main, plt.get_cmap("tab20").colors)) | {"amft": "black", cold: "black"}
    markers = dict(zip(main, "osD^vPDX<>phd8Hs")) | {cold: "*"}

    def mean_curve(name, key, width=5):
        """Over seeds and `width` steps at a time."""
        windows = {}
        for row in (row for seed in logs.seeds(name) for row in logs.of(name, "step", seed)):
            if row[key] is not None:
                windows.setdefault((row["step"] - 1) // width, []).append(row[key])
        return [width * (i + 0.5) for i in sorted(windows)], [statistics.mean(windows[i]) for i in sorted(windows)]

    base = {row["split"]: 100 * row["success"] for row in logs.of("amft", "eval", 0) if row["step"] == 0}
    figure, axes = plt.subplots(1, 2, figsize=(15, 6.5), layout="constrained")
    for axis, across in zip(axes, ("ood", "unseen")):
        means = {}
        for name in [*main, *[cold] * (cold in logs.names)]:
            points = [(logs.success(name, seed, "id"), logs.success(name, seed, across)) for seed in logs.seeds(name)]
            means[name] = tuple(map(statistics.mean, zip(*points)))
            axis.scatter(*zip(*points), s=18, alpha=0.45, color=colours[name], marker=markers[name])
            axis.scatter(*means[name], s=90, color=colours[name], marker=markers[name], edgecolor="black",
                         label=name.replace("-without-", ", no "))
        axis.scatter(base["id"], statistics.mean(base[part] for part in POOLED[across]), s=150, color="black",
                     marker="+", label="base")
        front = sorted(p for p in means.values()
                       if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in means.values()))
        axis.plot(*zip(*front), color="grey", linestyle="--", linewidth=1, label="Pareto front of the means", zorder=0)
        axis.set(xlabel="id: training multisets, greedy success, %",
                 ylabel=f"{across}: mean of {' and '.join(POOLED[across])}, %")
    axes[0].set_title("In against out of distribution: a small mark a seed, a large one the mean")
    axes[1].set_title("Training multisets against others of the same rule")
    axes[1].legend(fontsize=8, ncols=2)
    figure.savefig(HERE / "compare-pareto.png", dpi=110)

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    for name in main:
        for axis, key in zip(axes, ("entropy", "success")):
            x, y = mean_curve(name, key)
            if x:
                axis.plot(x, y, color=colours[name], label=name, linewidth=1.2 + (name == "amft"))
        curve = {}
        for seed in logs.seeds(name):
            for row in logs.of(name, "eval", seed):
                if row["split"] == "val" and not row["best"]:
                    curve.setdefault(row["step"], []).append(100 * row["success"])
        curve = {step: v for step, v in curve.items() if len(v) >= len(logs.seeds(name))}
        axes[2].plot(list(curve), [statistics.mean(v) for v in curve.values()], color=colours[name], marker=".",
                     label=name, linewidth=1.2 + (name == "amft"))
    titles = "entropy of the rollouts (nats a token)", "share of rollouts correct", "greedy success on val, %"
    for axis, title in zip(axes, titles):
        axis.set(xlabel="step", title=title)
    axes[2].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(HERE / "compare-curves.png", dpi=110)

    adaptive = [name for name in ("amft", cold, "gac", "sasr", "superrl", "hpt") if name in logs.names]
    figure, axes = plt.subplots(2, len(adaptive), figsize=(4 * len(adaptive), 6), layout="constrained", squeeze=False)
    for column, name in zip(axes.T, adaptive):
        for seed in logs.seeds(name):
            rows = logs.of(name, "step", seed)
            column[0].plot([r["step"] for r in rows], [r["mu"] for r in rows], linewidth=1)
            if name.startswith("amft"):
                for key, style in (("meta_force", "-"), ("entropy_force", ":")):
                    sums, total = [], 0.0
                    for row in rows:
                        total += row[key] or 0.0
                        sums.append(total)
                    column[1].plot([r["step"] for r in rows], sums, style, linewidth=1, color=f"C{seed}",
                                   label=None if seed else key.replace("_", " "))
                column[1].legend(fontsize=8)
                column[1].set_title("running sums of its two forces", fontsize=9)
            else:
                norms = [(r["step"], r["grad_norm_sft"]) for r in rows if r["demos"]]
                column[1].plot(*zip(*norms), linewidth=1)
                column[1].set_title("norm of the SFT gradient", fontsize=9)
        column[0].set(title=f"{name.replace('-', ' ')}: mu, a line a seed", ylim=(-0.03, 1.03))
        column[1].set_xlabel("step")
    figure.savefig(HERE / "compare-mu.png", dpi=110)

    warm = {float(mu): name for mu, name in logs.sweep.items() if name in logs.names}
    bare = {float(mu): f"fixed-{mu}{COLD}" for mu in MUS if f"fixed-{mu}{COLD}" in logs.names} | {0.0: "rl", 1.0: "sft"}
    figure, axes = plt.subplots(1, 5, figsize=(20, 4.2), layout="constrained")
    for axis, split in zip(axes, ("val", "heldout", "unseen", "id", "ood")):
        for colour, what, sweep, amft in (("C0", "ten steps of warm-up", warm, "amft"),
                                          ("C1", "none", bare, cold)):
            groups = {mu: [logs.success(name, seed, split) for seed in logs.seeds(name)]
                      for mu, name in sorted(sweep.items())}
            axis.errorbar(list(groups), *zip(*map(mean_and_half, groups.values())), fmt="o-", capsize=3, color=colour,
                          label=f"fixed mu, {what}")
            mean, half = mean_and_half([logs.success(amft, seed, split) for seed in logs.seeds(amft)])
            axis.axhspan(mean - half, mean + half, alpha=0.15, color=colour, label=f"AMFT, {what}, 95%")
            axis.axhline(mean, color=colour, linestyle="--", linewidth=1)
        axis.axhline(statistics.mean(base[part] for part in POOLED.get(split, [split])), color="grey", linestyle=":",
                     label="base")
        axis.set(title=split, xlabel="mu (0: rl, 1: sft)")
    axes[0].set_ylabel("greedy success, %")
    axes[0].legend(fontsize=8)
    figure.savefig(HERE / "compare-sweep.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="no runs, only tables and figures")
    parser.add_argument("--search", action="store_true", help="the search alone")
    parser.add_argument("--long", action="store_true", help="the long runs too")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of every row")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time, each with one thread")
    args = parser.parse_args()
    if not args.tables:
        common = [*SETTINGS, "--seed", str(SEARCH_SEED), "--evals", "val"]
        jobs = [(trial(method, i), [*common, "--method", method, *flags])
                for method, trials in SEARCH.items() for i, flags in enumerate(trials)]
        run_all(jobs, args.processes, "search")
        if args.search:
            return
        common = [*SETTINGS, "--val-every", str(VAL_EVERY)]
        jobs = [(cell(name, seed), [*common, *flags, "--seed", str(seed),
                                    *(["--evals", "all"] if (name, seed) == ("amft", 0) else [])])
                      for seed in range(args.seeds) for name, flags in rows_of_the_matrix().items()]
        run_all(jobs, args.processes, "matrix")
        clock = clocked()
        run_all([(cell("sft clocked", seed), [*common, *clock, "--seed", str(seed)]) for seed in range(args.seeds)],
                args.processes, "sft, same time")
        if args.long:
            run_all([(cell(name, seed, "long"), [*common, *rows_of_the_matrix()[name], "--steps", str(LONG_STEPS),
                                                 "--seed", str(seed)])
                     for seed in range(LONG_SEEDS) for name in LONG], args.processes, "long runs")
    logs = Logs()
    (HERE / "compare.md").write_text(tables(logs))
    print(tables(logs))
    try:
        figures(logs)
    except ImportError:
        print("\nno figures: pip install matplotlib")


if __name__ == "__main__":
    main()
