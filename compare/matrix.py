"""A matrix of runs: some methods, each with its flags, times some seeds.

    python compare/matrix.py STUDY.json            # what is missing, into runs/compare/STUDY/
    python compare/matrix.py STUDY.json --jobs 4 --only 'amft*' --list
    python compare/logs.py pack runs/compare/STUDY && python compare/tables.py STUDY && python compare/plot.py STUDY

STUDY.json is a spec (a recorded table, whose first line is one, does as well):

    {"common": "--task gp --steps 300 --val-every 25",
     "seeds": [0, 1, 2, 3, 4],
     "search": {"seed": 100, "flags": "--eval-n 300"},
     "runs": {"rl": "--method rl",
              "fixed": ["--method fixed --mu 0.3", "--method fixed --mu 0.7"],
              "amft": ["--method amft --eta-mu 0.02", "--method amft --eta-mu 0.05"],
              "amft-without-warm-up": "@amft --warmup 0"}}

@NAME stands for the flags of another run; a later flag overrides an earlier one. A list is searched
first: each of its entries runs with the search's seed and flags, and the one that is best at the end, on
val or on the mean of the search's "splits", the first of equals, runs with every seed. amft.py refuses a
flag that a method does not use, so "common" holds what all use. A name has no spaces; its part before a
slash is its group, with tables of its own: gp/rl, virl/rl. "+sft +rl" stands for what soup.py merges of
those two; flags with --heat are race.py's. "more" gives runs seeds of their own ({"amft": [0, 1, 2],
"*/few": [0]}: the first pattern that fits). For tables.py: "reference" (the run that others are compared
with; amft), "pooled" ({"ood": ["ood_rule", "ood_small"]}: means of splits), "reach" ([0.5]: rates on val
to be reached), "clock" and "costs" ("rl", {"rl": 0.7, "amft": 1.0}: seconds a step, for a table at equal
seconds).

Each run is `python compare/rivals.py` with the common flags, its own, --seed and --out, in a process and
with a thread of its own; what it prints goes to NAME-SEED.txt beside its folder. Finished runs are
skipped, a run that was cut off goes on from its last state. Of a finished run the log stays; its state
and policy go, unless --keep.
"""

import argparse
import fnmatch
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare.logs import (  # noqa: E402
    ROOT, RUNS, collect, finished, first, flags_of, quiet_pipe, read, words)

PROGRAM = [sys.executable, "compare/rivals.py"]
RACE = [sys.executable, "compare/race.py"]


def program(flags):
    """What runs them."""
    return RACE if "--heat" in flags else PROGRAM


def source(spec, run):
    """The run whose flags, or search, this one's come from: itself, or the last of a chain of @NAME."""
    while str(spec["runs"][run]).startswith("@"):
        run = spec["runs"][run][1:].partition(" ")[0]
    return run


def trials(spec, only="*"):
    """[(name, seed, flags)] of the searches that the matching runs need."""
    jobs = []
    for run in dict.fromkeys(source(spec, name) for name in fnmatch.filter(spec["runs"], only)):
        own = spec["runs"][run]
        if isinstance(own, list):
            names = [f"search/{run}.{i}" for i in range(len(own))]
            jobs += [(name, spec["search"]["seed"], flags_of([spec], name)) for name in names]
    return jobs


def cells(spec, folder, only="*"):
    """[(name, seed, flags)] of the matrix, seed by seed, once the search is done."""
    table = collect(folder)
    names = [name for name in fnmatch.filter(spec["runs"], only)
             if not str(spec["runs"][name]).startswith("+")]  # made of others: soup.py
    seeds = {name: seeds_of(spec, name) for name in names}
    return [(name, seed, flags_of(table, name))
            for seed in sorted(set().union(*seeds.values())) for name in names if seed in seeds[name]]


def seeds_of(spec, name):
    """A run's seeds: those of the first pattern of "more" that it matches, or the spec's."""
    return next((own for pattern, own in spec.get("more", {}).items() if fnmatch.fnmatch(name, pattern)), spec["seeds"])


def screen_of(out):
    """Where what a run prints goes; its first line is what the run was started with."""
    return Path(f"{out}.txt")


def run(out, flags, args):
    """One run in a process of its own; its exit code."""
    if (out / "state.pt").exists():
        command = ["--resume", str(out)]
    else:
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        screen_of(out).write_text(shlex.join(flags) + "\n")
        command = [*flags, "--out", str(out)]
    environment = dict(os.environ, OMP_NUM_THREADS=str(args.threads))
    with open(screen_of(out), "a") as file:
        done = subprocess.run(
            [*program(flags), *command], stdout=file, stderr=file, cwd=ROOT, env=environment)
    if finished(read(out)) and not args.keep:
        for name in ("final", "heats"):
            shutil.rmtree(out / name, ignore_errors=True)
        (out / "state.pt").unlink(missing_ok=True)
    return done.returncode


def refuse_other_flags(jobs):
    """End the program where a run was started with other flags than the spec's: {out: flags}."""
    for out, flags in jobs.items():
        screen, wanted = screen_of(out), shlex.join(flags)
        began = screen.read_text().split("\n")[0] if screen.exists() else wanted
        if began != wanted:
            sys.exit(f"{out} was run with other flags than the spec's: {began}\n"
                     "remove it, or name the new run otherwise")


def run_missing(missing, folder, measure, args):
    """Run {out: flags}, `args.jobs` at a time, and say how it goes."""
    start = time.time()
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(run, out, flags, args): out for out, flags in missing.items()}
        for i, future in enumerate(as_completed(futures), 1):
            minutes = (time.time() - start) / 60
            out = futures[future]
            what = outcome(out, future.result(), measure)
            print(f"{i}/{len(missing)}  {minutes:.1f} of about {minutes / i * len(missing):.1f} min  "
                  f"{out.relative_to(folder)}  {what}", flush=True)


def outcome(out, code, measure):
    if code:
        return f"failed, see {screen_of(out)}"
    evaluations = [row for row in read(out) if row["kind"] == "eval" and row["split"] == "val"]
    return f"val {first(evaluations[-1][measure]):.3f}" if evaluations else "done"


def run_all(jobs, folder, spec, args):
    """What is missing of the jobs [(name, seed, flags)]. True if all are finished."""
    jobs = {folder / f"{name}-{seed}": words(spec, flags, seed) for name, seed, flags in jobs}
    refuse_other_flags(jobs)
    missing = {out: flags for out, flags in jobs.items() if not finished(read(out))}
    print(f"{len(jobs)} runs, {len(missing)} to do", flush=True)
    if args.list:
        for out, flags in missing.items():
            command = [*program(flags)[1:], *flags, "--out", str(out.relative_to(ROOT))]
            print(shlex.join(command))
        return not missing
    run_missing(missing, folder, spec.get("measure", "success"), args)
    return all(finished(read(out)) for out in jobs)


def spec_of(path):
    """The spec in a file. ValueError or OSError where it is none."""
    text = path.read_text()
    spec = json.loads(text.split("\n")[0] if path.suffix == ".jsonl" else text)
    if not isinstance(spec, dict) or not {"common", "seeds", "runs"} <= set(spec):
        raise ValueError('it needs "common", "seeds" and "runs"')
    return spec


def commits(folder, adds):
    """Those that ran a part of the study, with today's if this run adds to it."""
    path = folder / "spec.json"
    before = json.loads(path.read_text()).get("commits", []) if path.exists() else []
    if not adds:
        return sorted(before)
    describe = "describe --always --dirty --abbrev=12 --exclude *".split()
    git = subprocess.run(["git", "-C", str(ROOT), *describe], capture_output=True, text=True)
    today = git.stdout.strip() if git.returncode == 0 else "unknown"
    return sorted({*before, today})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--only", default="*", help="the runs whose name matches")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the spec's, these alone")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--keep", action="store_true", help="keep finished states and policies")
    args = parser.parse_args()
    try:
        spec = spec_of(args.spec)
    except (OSError, ValueError) as error:
        parser.error(f"{args.spec}: is not a spec ({error})")
    if not fnmatch.filter(spec["runs"], args.only):
        known = ", ".join(spec["runs"])
        parser.error(f"--only {args.only}: no run has such a name; they are {known}")
    all_seeds = set(spec["seeds"]).union(*spec.get("more", {}).values())
    seeds = set(args.seeds or all_seeds)
    if not seeds <= all_seeds:
        known = " ".join(map(str, sorted(all_seeds)))
        parser.error(f"--seeds: must be among the spec's, {known}")
    folder = RUNS / args.spec.stem
    folder.mkdir(parents=True, exist_ok=True)
    spec["commits"] = commits(folder, adds=not args.list)
    (folder / "spec.json").write_text(json.dumps(spec))
    with quiet_pipe():
        if not run_all(trials(spec, args.only), folder, spec, args):
            sys.exit(None if args.list else "the search is not done")
        jobs = [job for job in cells(spec, folder, args.only) if job[1] in seeds]
        if not run_all(jobs, folder, spec, args) and not args.list:
            sys.exit("not all runs are done")


if __name__ == "__main__":
    main()
