"""The recorded runs and their tables.

    python results/run.py               # run what is missing (resumes what was cut off), then tables
    python results/run.py --tables      # tables from the logs alone
    python results/run.py --only gp virl
    python results/run.py --tune        # the search that chose the defaults, evaluated on the split val alone

For each task: SFT alone, RL alone, AMFT, three seeds, the same number of optimiser steps (50; in virl and virl-vl 40),
the same number of responses (but for SFT) and, but for gp, the task's default settings; in virl also AMFT without
warm-up. Logs go to results/TASK/NAME-SEED/, tables to results/TASK.md and results/summary.md (for the search:
results/tune/ and results/tune.md). Runs go two at a time with one thread each; every run is `python amft.py --task
TASK` with the flags that `flags` gives it. The recorded logs of SFT are of commits before --method: there it is --mu 1,
the same steps. The comparison of all methods, on General Points, is results/compare.py.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
TASKS = ("gp", "virl", "math", "gp-vl", "virl-vl")
SEEDS = (0, 1, 2)
RUNS = {"SFT": ["--method", "sft"], "RL": ["--method", "rl"], "AMFT": ["--method", "amft"],
        "AMFT-without-warm-up": ["--method", "amft", "--warmup", "0"]}
COLD = ("virl",)  # tasks of the last row


def flags(task, name, seed):
    """The flags of a run."""
    own = [*RUNS[name], "--steps", 40 if task.startswith("virl") else 50]
    light = ["--prompts", 8, "--meta-prompts", 8, "--eval-n", 300] if task == "gp" else []
    once = (name, seed) == ("AMFT", 0)  # the base is the same for every run
    return list(map(str, ["--task", task, "--seed", seed, *light, *own, "--evals", "all" if once else "last"]))


FIXED = ["--no-meta", "--no-entropy", "--mu"]
TUNING = ["--steps", "120", "--advantage", "group"]  # what the defaults were when the search was made
TUNE = {  # one seed that no recorded run uses; what is best on val at the end becomes the default
    "lr=1e-4": [*TUNING, *FIXED, "0.5", "--warmup", "40", "--lr", "1e-4"],
    "lr=3e-4": [*TUNING, *FIXED, "0.5", "--warmup", "40", "--lr", "3e-4"],
    "lr=1e-3": [*TUNING, *FIXED, "0.5", "--warmup", "40", "--lr", "1e-3"],
    "gae": [*TUNING, *FIXED, "0.5", "--warmup", "40", "--lr", "3e-4", "--advantage", "gae"],
    "warmup=10": [*TUNING, "--lr", "1e-4", "--eta-h", "0.5", "--warmup", "10"],
    "warmup=40": [*TUNING, "--lr", "1e-4", "--eta-h", "0.5", "--warmup", "40"],
}
TUNE_SEED = 100
VAL_ONLY = "import sys, amft, tasks; tasks.GeneralPoints.splits = {'val': ''}; amft.main(sys.argv[1:])"
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided 95%, by number of seeds
MEASURES = {"success": "Greedy success", "first_try": "Success without a failed attempt",
            "step_accuracy": "Accuracy of single responses (a failed route ends early: what would follow is not counted)",
            "recognition": "Responses that read their picture (in virl: their observation) right"}


def folder(task, name, seed):
    return HERE / ("tune" if task == "tune" else task) / f"{name}-{seed}"


def rows(task, name, seed, kind):
    log = folder(task, name, seed) / "metrics.jsonl"
    return [row for row in map(json.loads, log.read_text().splitlines()) if row["kind"] == kind] if log.exists() else []


def run(job):
    """One run in its own process; its output goes to a file beside the log."""
    task, name, seed = job
    out = folder(*job)
    place = str(out.relative_to(HERE.parent))
    own = ["--task", "gp", "--seed", str(seed), *TUNE[name]] if task == "tune" else flags(*job)
    where = ["--resume", place] if (out / "metrics.jsonl").exists() else [*own, "--out", place]
    program = ["-c", VAL_ONLY] if task == "tune" else ["amft.py"]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "output.txt", "a") as output:
        code = subprocess.run([sys.executable, *program, *where], stdout=output, stderr=output, cwd=HERE.parent,
                              env=dict(os.environ, OMP_NUM_THREADS="1")).returncode
    if code:
        tqdm.write(f"{task}, {name}, seed {seed}: exit code {code}, see {out / 'output.txt'}")


def interval(values, form=".1f"):
    """Mean and half-width of the 95% t-interval over seeds."""
    mean = format(statistics.mean(values), form)
    if len(values) < 2:
        return mean
    return f"{mean} ± {format(T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)), form)}"


def table(task):
    done = {name: [seed for seed in SEEDS if rows(task, name, seed, "final")] for name in RUNS}
    done = {name: seeds for name, seeds in done.items() if seeds}
    if 0 not in done.get("AMFT", ()):
        return print(f"{task}: no finished run of AMFT with seed 0, which has the base's row\n")
    evals = {(name, seed): rows(task, name, seed, "eval") for name, seeds in done.items() for seed in seeds}
    first = ("AMFT", 0)
    config, finals = rows(task, *first, "config")[0], {key: rows(task, *key, "final")[0] for key in evals}
    splits = list(dict.fromkeys(row["split"] for row in evals[first]))
    commits = sorted({rows(task, *key, "config")[0]["commit"][:12] for key in evals})
    lines = [f"# {task}: recorded runs", "", f"Made by `python results/run.py --only {task}` from the logs beside it; "
             f"commit {', '.join(f'`{c}`' for c in commits)}, torch {config['torch']}, transformers "
             f"{config['transformers']}.", "",
             f"Percent, n = {config['eval_n']} greedy episodes for each split and run, the same for every run. Base: "
             "95% interval of the one policy over its episodes. Other rows: mean over seeds and half-width of its 95% "
             "t-interval. Each row's flags are in `results/run.py`."]

    def value(key, step, split, measure):
        row = next(r for r in evals[key] if r["step"] == step and r["split"] == split)
        share = (row["success"], row["low"], row["high"]) if measure == "success" else row[measure]
        return [100 * x for x in share]
    for measure, title in MEASURES.items():
        if measure != "success" and measure not in evals[first][0]:
            continue
        lines += ["", f"{title}:", "", "| run | seeds | " + " | ".join(splits) + " |",
                  "|---|" + "---|" * (len(splits) + 1)]
        base = ["{:.1f} [{:.1f}, {:.1f}]".format(*value(first, 0, split, measure)) for split in splits]
        lines.append(f"| base | - | {' | '.join(base)} |")
        for name, seeds in done.items():
            last = finals[name, seeds[0]]["step"]
            means = [interval([value((name, seed), last, split, measure)[0] for seed in seeds]) for split in splits]
            lines.append(f"| {name.replace('-', ' ')} | {len(seeds)} | {' | '.join(means)} |")
    lines += ["", "| run | mu at the end | conversations sampled | minutes (one thread) |", "|---|---|---|---|"]
    for name, seeds in done.items():
        own = [finals[name, seed] for seed in seeds]
        mus = [rows(task, name, seed, "step")[-1]["mu"] for seed in seeds]
        lines.append(f"| {name.replace('-', ' ')} | {interval(mus, '.2f')} | {own[0]['rollouts']} | "
                     f"{statistics.mean(f['seconds'] for f in own) / 60:.1f} |")
    for name in (name for name in done if name.startswith("AMFT")):
        steps = [row for seed in done[name] for row in rows(task, name, seed, "step")]
        z = [row["meta_grad"] / row["meta_se"] for row in steps if row["meta_se"]]
        own = [row["meta_own"] for row in steps if row["meta_own"]]
        if z:
            lines += ["", f"{name.replace('-', ' ')}, meta-gradients: on val, each over its standard error (z), {len(z)} "
                          f"with a signal, {sum(x < 0 for x in z)} negative, mean {statistics.mean(z):+.2f}, abs(z) > 2 "
                          f"in {sum(abs(x) > 2 for x in z)}; by the steps' own RL gradients {len(own)}, "
                          f"{sum(x < 0 for x in own)} negative."]
    (HERE / f"{task}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines) + "\n")


def summary():
    """Success of every task and split in one table, results/summary.md."""
    lines = ["# Success on every task and split", "", "Made by `python results/run.py` from the logs; percent, mean over "
             "the seeds and half-width of its 95% t-interval; more in the tables of each task.", "",
             "| task | split | base | " + " | ".join(name.replace("-", " ") for name in RUNS) + " |",
             "|---|---|---|" + "---|" * len(RUNS)]
    for task in TASKS:
        base = [row for row in rows(task, "AMFT", 0, "eval") if row["step"] == 0]
        for i, row in enumerate(base):
            cells = []
            for name in RUNS:
                last = [[r for r in rows(task, name, seed, "eval") if r["split"] == row["split"]][-1] for seed in SEEDS
                        if rows(task, name, seed, "final")]
                cells.append(interval([100 * r["success"] for r in last]) if last else "-")
            lines.append(f"| {'' if i else task} | {row['split']} | {100 * row['success']:.1f} | {' | '.join(cells)} |")
    (HERE / "summary.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def tune_table():
    lines = ["# The search that chose the defaults", "", "Made by `python results/run.py --tune`: seed "
             f"{TUNE_SEED}, greedy success on `val` in percent (n = 1000); no other split was evaluated.", "",
             "| run | flags beside the defaults of that commit | base | after warm-up | final | mu at the end | commit |",
             "|---|---|---|---|---|---|---|"]
    for name in TUNE:
        if rows("tune", name, TUNE_SEED, "final"):
            success = [f"{100 * row['success']:.1f}" for row in rows("tune", name, TUNE_SEED, "eval")]
            lines.append(f"| {name} | `{' '.join(TUNE[name])}` | {' | '.join(success)} | "
                         f"{rows('tune', name, TUNE_SEED, 'final')[0]['mu']:.2f} | "
                         f"`{rows('tune', name, TUNE_SEED, 'config')[0]['commit'][:12]}` |")
    (HERE / "tune.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="no runs, only the tables")
    parser.add_argument("--tune", action="store_true", help="the search on val instead of the recorded runs")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=TASKS, help="these tasks alone")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    jobs = [("tune", name, TUNE_SEED) for name in TUNE] if args.tune else [
        (task, name, seed) for seed in SEEDS for task in args.only for name in reversed(RUNS)
        if task in COLD or name != "AMFT-without-warm-up"]
    jobs = [job for job in jobs if not rows(*job, "final")]
    if not args.tables:
        start = time.time()
        with ThreadPoolExecutor(args.processes) as pool:
            list(tqdm(pool.map(run, jobs), total=len(jobs), desc="runs"))
        print(f"{len(jobs)} runs in {(time.time() - start) / 60:.0f} minutes")
    if args.tune:
        return tune_table()
    for task in args.only:
        table(task)
    summary()


if __name__ == "__main__":
    main()
