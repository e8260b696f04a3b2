"""Logs: the rows of a run, and a study of many runs in one table.

    python compare/logs.py pack runs/compare/STUDY    # its finished runs into compare/recorded/STUDY.jsonl
    python compare/logs.py unpack compare/recorded/STUDY.jsonl   # and back: matrix.py does what is missing

A run is a folder with metrics.jsonl, as amft.py writes it. A study is a folder of runs named NAME-SEED,
with spec.json (see matrix.py) beside them; a NAME may have a part before a slash, its group:
search/amft.0, gp/rl. A table has one JSON object a line: first the spec, then every row of every run,
with the run's name and seed. Kept is what tables and figures read, and mu's forces (KEEP); nulls are left out, and
floats have six digits. A spec with "every": N keeps each Nth step, and those with a meta-gradient.
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "compare"
RECORDED = ROOT / "compare" / "recorded"
KEEP = {
    "step": ("step", "mu", "meta_grad", "meta_se", "meta_own", "meta_force", "entropy_force",
             "entropy", "success", "rollouts"),
    "eval": ("step", "split", "n", "success", "low", "high", "any", "greedy", "temperature", "best", "hits",
             "first_try", "step_accuracy", "recognition"),
}  # of the other kinds, all


# --- Rows and files -------------------------------------------------------------------------------


class Row(dict):
    """A row of a log. What it lacks is None: a table stores no nulls, and old logs had other keys."""

    def __missing__(self, key):
        return None


def read(folder):
    """The rows of a run; a last line that was cut off is not one."""
    log = Path(folder) / "metrics.jsonl"
    if not log.exists():
        return []
    return [Row(json.loads(line)) for line in log.read_text().split("\n")[:-1]]


def finished(rows):
    return any(row["kind"] == "final" for row in rows)


def write(path, table):
    lines = [json.dumps(row, separators=(",", ":")) + "\n" for row in table]
    path.write_text("".join(lines))


def recorded(study):
    """The rows of a recorded study; ValueError says which there are."""
    path = RECORDED / f"{study}.jsonl"
    if not path.exists():
        known = ", ".join(sorted(other.stem for other in RECORDED.glob("*.jsonl")))
        raise ValueError(f"{study}: is not a recorded study; those are {known}")
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def quiet_pipe():
    """For `| head`: ends without a word when nobody reads on."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the interpreter's last flush must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- A study's folder and its table ---------------------------------------------------------------


def slim(value):
    if isinstance(value, list):
        return [slim(x) for x in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def name_and_seed(folder, study):
    """Of a run's folder in a study's."""
    name, _, seed = str(folder.relative_to(study)).rpartition("-")
    return name, int(seed)


def is_kept(run, row, every, evaluated=()):
    """Does this row of the run belong in the table? evaluated: after which steps there is an evaluation."""
    if row["kind"] != "step":
        return True
    if run.startswith("search/"):  # a trial is judged by its evaluation alone
        return False
    has_meta_gradient = row["meta_grad"] is not None or row["meta_own"] is not None
    return row["step"] % every == 0 or row["step"] in evaluated or has_meta_gradient


def collect(folder):
    """The rows of a study's table, from its folder."""
    folder = Path(folder)
    spec = json.loads((folder / "spec.json").read_text())
    table = [{"kind": "spec", **spec}]
    for log in sorted(folder.rglob("metrics.jsonl")):
        if "heats" in log.relative_to(folder).parts:  # of a race, whose own log holds the winner's
            continue
        rows = read(log.parent)
        run, seed = name_and_seed(log.parent, folder)
        if not finished(rows):
            continue
        evaluated = {row["step"] for row in rows if row["kind"] == "eval"}
        for row in rows:
            if is_kept(run, row, spec.get("every", 1), evaluated):
                keys = [key for key in KEEP.get(row["kind"], row) if row[key] is not None]
                kept = {key: slim(row[key]) for key in keys}
                table.append({"run": run, "seed": seed, "kind": row["kind"], **kept})
    return table


def unpack(table, folder):
    """The folder of a study from its table, but for runs that are there already."""
    spec = dict(table[0])
    del spec["kind"]
    runs = {}
    for row in table[1:]:
        own = dict(row)
        run, seed = own.pop("run"), own.pop("seed")
        if row["kind"] == "config":
            own["seed"] = seed
        runs.setdefault((run, seed), []).append(own)
    for (run, seed), rows in runs.items():
        out = folder / f"{run}-{seed}"
        if out.exists():
            continue
        out.mkdir(parents=True)
        write(out / "metrics.jsonl", rows)
        with contextlib.suppress(LookupError):  # a run that the spec has no more
            started = shlex.join(words(spec, flags_of(table, run), seed))
            Path(f"{out}.txt").write_text(started + "\n")
    write(folder / "spec.json", [spec])


def words(spec, flags, seed):
    """What a run is started with, but for --out; the first line of what it prints."""
    return [*shlex.split(f"{spec['common']} {flags}"), "--seed", str(seed)]


# --- What a table says ----------------------------------------------------------------------------


def group_of(run):
    return run.rpartition("/")[0]


class Study:
    """The runs of one group of a table: {(name, seed): rows}."""

    def __init__(self, table, group=""):
        self.spec = table[0]
        self.group = group
        self.runs = {}
        for row in table[1:]:
            of, _, name = row["run"].rpartition("/")
            if of == group:
                self.runs.setdefault((name, row["seed"]), []).append(Row(row))
        searched = "search/"
        others = [run for run in dict.fromkeys(row["run"] for row in table[1:]) if not run.startswith(searched)]
        self.groups = list(dict.fromkeys(map(group_of, others)))
        order = {run: i for i, run in enumerate(self.spec["runs"])}  # trials have none
        names = dict.fromkeys(name for name, _ in self.runs)
        self.names = sorted(names, key=lambda name: order.get(self.full(name), 0))
        evals = [row for rows in self.runs.values() for row in rows if row["kind"] == "eval"]
        splits = list(dict.fromkeys(row["split"] for row in evals))
        self.measure = self.spec.get("measure", "success")  # the study's headline
        pooled = self.spec.get("pooled", {})
        self.pooled = {name: parts for name, parts in pooled.items() if set(parts) <= set(splits)}
        self.splits = [*splits, *self.pooled]
        before = [row for row in evals if row["step"] == 0]
        self.base = {row["split"]: row for row in reversed(before)}  # of the first run that has it

    def full(self, name):
        return f"{self.group}/{name}" if self.group else name

    def seeds(self, name):
        return [seed for other, seed in self.runs if other == name]

    def of(self, name, kind, seed=None):
        """The rows of one kind, of one seed or of all."""
        seeds = self.seeds(name) if seed is None else [seed]
        return [row for own in seeds for row in self.runs[name, own] if row["kind"] == kind]

    def has(self, name, seed, split):
        """Was a split evaluated?"""
        return all(self.evaluations(name, seed, part) for part in self.pooled.get(split, [split]))

    def evaluations(self, name, seed, split):
        return [row for row in self.of(name, "eval", seed) if row["split"] == split]

    def at_end(self, name, seed, split, measure=None):
        """The last evaluation of a split, in percent; of the study's own measure, if none is named."""
        measure = measure or self.measure
        if split in self.pooled:
            parts = self.pooled[split]
            return statistics.mean(self.at_end(name, seed, part, measure) for part in parts)
        return 100 * first(self.evaluations(name, seed, split)[-1][measure])

    def at_step(self, name, seed, split, step):
        """Success in percent after some step, on the line between the evaluations around it."""
        if split in self.pooled:
            parts = self.pooled[split]
            return statistics.mean(self.at_step(name, seed, part, step) for part in parts)
        rows = self.evaluations(name, seed, split)
        pairs = [pair for pair in zip(rows, rows[1:]) if step <= pair[1]["step"]]
        if not pairs:
            raise ValueError(f"{self.full(name)}, seed {seed}: has no evaluations of {split} around step {step:.0f}")
        before, after = pairs[0]
        low, high = 100 * before["success"], 100 * after["success"]
        share = (step - before["step"]) / (after["step"] - before["step"])
        return low + (high - low) * share

    def ends(self, name, split, measure=None):
        return [self.at_end(name, seed, split, measure) for seed in self.seeds(name) if self.has(name, seed, split)]


def study_of(name, group=""):
    """A group of a recorded study; ValueError says which there are."""
    table = recorded(name)
    groups = Study(table).groups if "runs" in table[0] else []
    if group not in groups:
        known = ", ".join(map(repr, groups)) or "none"
        raise ValueError(f"{name} has no runs of the group '{group}'; its groups: {known}")
    return Study(table, group)


def first(value):
    """Of a share that was stored with its interval, the share."""
    return value[0] if isinstance(value, list) else value


def trial_values(table, name):
    """The spec's measure of a run's trials in percent: the mean over the search's splits; val, if none is named."""
    *group, last = name.split("/")
    search = table[0]["search"]
    splits = search.get("splits", ["val"])
    measure = table[0].get("measure", "success")
    study = Study(table, "/".join(["search", *group]))
    values = []
    for i in range(len(table[0]["runs"][name])):
        ends = [study.at_end(f"{last}.{i}", search["seed"], split, measure) for split in splits]
        values.append(statistics.mean(ends))
    return values


def flags_of(table, name):
    """A run's own flags. Of a list those of the best trial, the first of equals; of @NAME that run's.

    Of a trial, search/NAME.i, those of the list's entry and the search's."""
    spec = table[0]
    if name.startswith("search/"):
        run, _, i = name.removeprefix("search/").rpartition(".")
        return f"{spec['runs'][run][int(i)]} {spec['search'].get('flags', '')}"
    own = spec["runs"][name]
    if isinstance(own, list):
        values = trial_values(table, name)
        return own[values.index(max(values))]
    if own.startswith("@"):
        other, _, more = own[1:].partition(" ")
        return f"{flags_of(table, other)} {more}"
    return own


# --- Command line ---------------------------------------------------------------------------------


def pack(folder, name):
    """(the table, where it was written)."""
    table = collect(folder)
    write(RECORDED / f"{name}.jsonl", table)
    return table, RECORDED / f"{name}.jsonl"


def unpack_file(path, name):
    """(the table, the folder that was made of it)."""
    table = [json.loads(line) for line in path.read_text().splitlines()]
    unpack(table, RUNS / name)
    return table, RUNS / name


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["pack", "unpack"])
    parser.add_argument("path", type=Path, help="folder of the study, or its table")
    args = parser.parse_args()
    name = args.path.resolve().name.removesuffix(".jsonl")
    act = pack if args.action == "pack" else unpack_file
    try:
        table, made = act(args.path, name)
    except (OSError, ValueError, LookupError, TypeError) as error:
        what = "folder, with spec.json" if args.action == "pack" else "table"
        parser.error(f"{args.path}: is not a study's {what} ({error})")
    print(f"{sum(row['kind'] == 'final' for row in table[1:])} runs in {made}")


if __name__ == "__main__":
    main()
