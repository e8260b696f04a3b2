"""The recorded runs and their tables.

    python results/run.py               # run what is missing (skips what is done, resumes what was cut off), then tables
    python results/run.py --tables      # tables from the logs alone
    python results/run.py --only AMFT
    python results/run.py --tune        # the search that chose the defaults, evaluated on the split val alone

Logs go to results/gp/NAME-SEED/metrics.jsonl, tables to results/gp.md (results/tune/ and results/tune.md for the
search). Runs go two at a time with one thread each; every run is `python amft.py --task gp` with the flags of its row.
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
SEEDS = (0, 1, 2)
FIXED = ["--no-meta", "--no-entropy", "--mu"]
TUNING = ["--steps", "120", "--advantage", "group"]  # what the defaults were when the search was made
RUNS = {  # name: flags beside the defaults
    "AMFT": [],
    "mu=0": [*FIXED, "0"],  # RL after the warm-up: SFT, then RL
    "mu=0.5": [*FIXED, "0.5"],
    "mu=1": [*FIXED, "1"],  # SFT throughout
}
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


def folder(name, seed):
    return HERE / ("tune" if seed == TUNE_SEED else "gp") / f"{name}-{seed}"


def rows(name, seed, kind):
    log = folder(name, seed) / "metrics.jsonl"
    return [row for row in map(json.loads, log.read_text().splitlines()) if row["kind"] == kind] if log.exists() else []


def run(job):
    """One run in its own process; its output goes to a file beside the log."""
    name, seed = job
    out = folder(name, seed)
    if rows(name, seed, "final"):
        return
    place = str(out.relative_to(HERE.parent))
    where = ["--resume", place] if (out / "metrics.jsonl").exists() else [
        "--task", "gp", "--seed", str(seed), "--out", place, *(TUNE if seed == TUNE_SEED else RUNS)[name]]
    program = ["-c", VAL_ONLY] if seed == TUNE_SEED else ["amft.py"]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "output.txt", "a") as output:
        code = subprocess.run([sys.executable, *program, *where], stdout=output, stderr=output, cwd=HERE.parent,
                              env=dict(os.environ, OMP_NUM_THREADS="1")).returncode
    if code:
        tqdm.write(f"{name}, seed {seed}: exit code {code}, see {out / 'output.txt'}")


def interval(values, form=".1f"):
    """Mean and half-width of the 95% t-interval over seeds."""
    mean = format(statistics.mean(values), form)
    if len(values) < 2 or min(values) == max(values):
        return mean
    return f"{mean} ± {format(T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)), form)}"


def tables():
    done = {name: [seed for seed in SEEDS if rows(name, seed, "final")] for name in RUNS}
    done = {name: seeds for name, seeds in done.items() if seeds}
    first = next(iter(done))
    evals = {(name, seed): rows(name, seed, "eval") for name, seeds in done.items() for seed in seeds}
    splits = list(dict.fromkeys(row["split"] for row in evals[first, done[first][0]]))
    config = rows(first, done[first][0], "config")[0]
    lines = ["# General Points: recorded runs", "", "Made by `python results/run.py` from the logs beside it, "
             f"commit `{config['commit'][:12]}`, torch {config['torch']}, transformers {config['transformers']}.", "",
             f"Greedy success in percent, mean over seeds and half-width of its 95% t-interval; n = {config['eval_n']} "
             "deals for each split and seed, the same deals for every run.", "",
             "| run | seeds | " + " | ".join(splits) + " | mu at the end | rollouts | minutes |",
             "|---|" + "---|" * (len(splits) + 4)]

    def success(name, seed, step, split):
        return next(100 * r["success"] for r in evals[name, seed] if r["step"] == step and r["split"] == split)

    def line(label, name, step, tail):
        values = [interval([success(name, seed, step, split) for seed in done[name]]) for split in splits]
        if step == 0:  # the base is the same for every seed
            values = [f"{success(name, done[name][0], 0, split):.1f}" for split in splits]
        lines.append(f"| {label} | {len(done[name]) if step else '-'} | " + " | ".join(values + tail) + " |")
    line("base", first, 0, ["-", "-", "-"])
    line("after warm-up", first, config["warmup"], ["-", "-", "-"])
    for name, seeds in done.items():
        finals = [rows(name, seed, "final")[0] for seed in seeds]
        line(name, name, finals[0]["step"], [interval([f["mu"] for f in finals], ".2f"),
                                             str(finals[0]["rollouts"]),
                                             f"{statistics.mean(f['seconds'] for f in finals) / 60:.1f}"])
    if "AMFT" in done:
        lines += ["", "The meta-gradient of the AMFT runs: each estimate over its standard error (z).", "",
                  "| seed | estimates | mean z | share with z > 0 | share with abs(z) > 2 | mean abs(estimate) |",
                  "|---|---|---|---|---|---|"]
        for seed in done["AMFT"]:
            metas = [(r["meta_grad"], r["meta_se"]) for r in rows("AMFT", seed, "step") if r["meta_se"]]
            z = [g / se for g, se in metas]
            lines.append(f"| {seed} | {len(z)} | {statistics.mean(z):+.2f} ± {statistics.stdev(z) / len(z) ** 0.5:.2f} | "
                         f"{sum(x > 0 for x in z) / len(z):.2f} | {sum(abs(x) > 2 for x in z) / len(z):.2f} | "
                         f"{statistics.mean(abs(g) for g, _ in metas):.1e} |")
    (HERE / "gp.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def tune_table():
    lines = ["# The search that chose the defaults", "", "Made by `python results/run.py --tune`: seed "
             f"{TUNE_SEED}, greedy success on `val` in percent (n = 1000); no other split was evaluated.", "",
             "| run | flags beside the defaults of that commit | base | after warm-up | final | mu at the end | commit |",
             "|---|---|---|---|---|---|---|"]
    for name in TUNE:
        if rows(name, TUNE_SEED, "final"):
            success = [f"{100 * row['success']:.1f}" for row in rows(name, TUNE_SEED, "eval")]
            lines.append(f"| {name} | `{' '.join(TUNE[name])}` | {' | '.join(success)} | "
                         f"{rows(name, TUNE_SEED, 'final')[0]['mu']:.2f} | "
                         f"`{rows(name, TUNE_SEED, 'config')[0]['commit'][:12]}` |")
    (HERE / "tune.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="no runs, only the tables")
    parser.add_argument("--tune", action="store_true", help="the search on val instead of the recorded runs")
    parser.add_argument("--only", nargs="*", help="these rows alone")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    names, seeds = (list(TUNE), [TUNE_SEED]) if args.tune else (list(RUNS), SEEDS)
    if unknown := set(args.only or ()) - set(names):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; rows are {', '.join(names)}")
    if not args.tables:
        jobs = [(name, seed) for seed in seeds for name in args.only or names if not rows(name, seed, "final")]
        start = time.time()
        with ThreadPoolExecutor(args.processes) as pool:
            list(tqdm(pool.map(run, jobs), total=len(jobs), desc="runs"))
        print(f"{len(jobs)} runs in {(time.time() - start) / 60:.0f} minutes")
    tune_table() if args.tune else tables()


if __name__ == "__main__":
    main()
