"""Logs: the rows of a run, and a study of many runs in one table.

    python compare/logs.py pack runs/STUDY                       # its finished runs into compare/recorded/STUDY.jsonl
    python compare/logs.py unpack compare/recorded/STUDY.jsonl   # and back, where matrix.py goes on with what is missing

A run is a folder with metrics.jsonl, as amft.py writes it. A study is a folder of runs named NAME-SEED, with spec.json
(see matrix.py) beside them; a NAME may have a part before a slash, its group: search/amft.0, gp/rl. A table has one
JSON object a line: first the spec, then every row of every run, with the run's name and seed. Kept is what tables.py
and plot.py read (KEEP); nulls are left out, and floats have six digits. A spec with "every": N keeps each Nth step, and
those with a meta-gradient.
"""

import argparse
import contextlib
import json
import shlex
import statistics
from pathlib import Path

RECORDED = Path(__file__).resolve().parent / "recorded"
KEEP = {"step": ("step", "mu", "meta_grad", "meta_se", "meta_own", "meta_force", "entropy_force", "entropy", "success",
                 "rollouts", "grad_norm_sft"),
        "eval": ("step", "split", "n", "success", "low", "high", "any", "greedy", "first_try", "step_accuracy",
                 "recognition")}  # of the other kinds, all


class Row(dict):
    """A row of a log. What it lacks is None: a table stores no nulls, and logs of other days had other keys."""

    def __missing__(self, key):
        return None


def read(folder):
    """The rows of a run; a last line that was cut off is not one."""
    log = Path(folder) / "metrics.jsonl"
    return [Row(json.loads(line)) for line in log.read_text().split("\n")[:-1]] if log.exists() else []


def finished(rows):
    return any(row["kind"] == "final" for row in rows)


def slim(value):
    if isinstance(value, list):
        return [slim(x) for x in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def collect(folder):
    """The rows of a study's table, from its folder."""
    folder = Path(folder)
    table = [{"kind": "spec"} | json.loads((folder / "spec.json").read_text())]
    every = table[0].get("every", 1)
    for log in sorted(folder.rglob("metrics.jsonl")):
        rows, (run, seed) = read(log.parent), str(log.parent.relative_to(folder)).rsplit("-", 1)
        for row in rows if finished(rows) else ():
            kept = KEEP.get(row["kind"], row)
            if row["kind"] == "step" and (run.startswith("search/")  # a trial is judged by its evaluation alone
                                          or row["step"] % every and row["meta_grad"] is row["meta_own"] is None):
                continue
            table.append({"run": run, "seed": int(seed), "kind": row["kind"]}
                         | {key: slim(row[key]) for key in kept if row[key] is not None})
    return table


def unpack(table, folder):
    """The folder of a study from its table, but for runs that are there already."""
    runs = {}
    for row in table[1:]:
        runs.setdefault(folder / f"{row['run']}-{row['seed']}", []).append(
            {key: value for key, value in row.items() if key not in ("run", "seed")} | (
                {"seed": row["seed"]} if row["kind"] == "config" else {}))
    for out, rows in runs.items():
        if not out.exists():
            out.mkdir(parents=True)
            write(out / "metrics.jsonl", rows)
            run, seed = str(out.relative_to(folder)).rsplit("-", 1)
            with contextlib.suppress(LookupError):  # a run that the spec has no more
                Path(f"{out}.txt").write_text(shlex.join(words(table[0], flags_of(table, run), seed)) + "\n")
    write(folder / "spec.json", [{key: value for key, value in table[0].items() if key != "kind"}])


def words(spec, flags, seed):
    """What a run is started with, but for --out; the first line of what it prints."""
    return [*shlex.split(f"{spec['common']} {flags}"), "--seed", str(seed)]


def write(path, table):
    path.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in table))


def recorded(study):
    if not (RECORDED / f"{study}.jsonl").exists():
        raise ValueError(f"{study}: is not a recorded study; those are "
                         + ", ".join(sorted(path.stem for path in RECORDED.glob("*.jsonl"))))
    return [json.loads(line) for line in (RECORDED / f"{study}.jsonl").read_text().splitlines()]


class Study:
    """The runs of one group of a table: {(name, seed): rows}."""

    def __init__(self, table, group=""):
        self.spec, self.group, self.runs = table[0], group, {}
        self.groups = list(dict.fromkeys(row["run"].rpartition("/")[0] for row in table[1:]
                                         if not row["run"].startswith("search/")))
        for row in table[1:]:
            of, _, name = row["run"].rpartition("/")
            if of == group:
                self.runs.setdefault((name, row["seed"]), []).append(Row(row))
        names = list(dict.fromkeys(name for name, _ in self.runs))
        order = {run: i for i, run in enumerate(self.spec["runs"])}  # trials have none
        self.names = sorted(names, key=lambda name: order.get(self.full(name), 0))
        evals = [row for rows in self.runs.values() for row in rows if row["kind"] == "eval"]
        splits = list(dict.fromkeys(row["split"] for row in evals))
        self.pooled = {name: of for name, of in self.spec.get("pooled", {}).items() if set(of) <= set(splits)}
        self.splits = [*splits, *self.pooled]
        self.base = {row["split"]: row for row in reversed(evals) if row["step"] == 0}  # of the first run that has it

    def full(self, name):
        return f"{self.group}/{name}" if self.group else name

    def seeds(self, name):
        return [seed for other, seed in self.runs if other == name]

    def of(self, name, kind, seed=None):
        """The rows of one kind, of one seed or of all."""
        return [row for own in ([seed] if seed is not None else self.seeds(name)) for row in self.runs[name, own]
                if row["kind"] == kind]

    def at_end(self, name, seed, split, measure="success"):
        """The last evaluation of a split, in percent."""
        if split in self.pooled:
            return statistics.mean(self.at_end(name, seed, part, measure) for part in self.pooled[split])
        return 100 * first([row[measure] for row in self.of(name, "eval", seed) if row["split"] == split][-1])

    def at_step(self, name, seed, split, step):
        """Success in percent after some step, on the line between the evaluations of the split around it."""
        if split in self.pooled:
            return statistics.mean(self.at_step(name, seed, part, step) for part in self.pooled[split])
        rows = [(row["step"], 100 * row["success"]) for row in self.of(name, "eval", seed) if row["split"] == split]
        (before, low), (after, high) = next(pair for pair in zip(rows, rows[1:]) if step <= pair[1][0])
        return low + (high - low) * (step - before) / (after - before)

    def ends(self, name, split, measure="success"):
        return [self.at_end(name, seed, split, measure) for seed in self.seeds(name)]


def study_of(name, group=""):
    """A group of a recorded study; ValueError says which there are."""
    table = recorded(name)
    groups = Study(table).groups if "runs" in table[0] else []
    if group not in groups:
        raise ValueError(f"{name} has no runs of the group '{group}'; its groups: {', '.join(map(repr, groups)) or 'none'}")
    return Study(table, group)


def first(value):
    """Of a share that was stored with its interval, the share."""
    return value[0] if isinstance(value, list) else value


def trial_values(table, name):
    """Success of a run's trials in the search, in percent: the mean over the search's splits; of val where none is named."""
    *group, last = name.split("/")
    study, search = Study(table, "/".join(["search", *group])), table[0]["search"]
    return [statistics.mean(study.at_end(f"{last}.{i}", search["seed"], split) for split in search.get("splits", ["val"]))
            for i in range(len(table[0]["runs"][name]))]


def flags_of(table, name):
    """A run's own flags: of a list those of the best trial, the first of equals; for @NAME another run's; of a trial,
    search/NAME.i, those of the list's entry and the search's."""
    if name.startswith("search/"):
        run, _, i = name.removeprefix("search/").rpartition(".")
        return f"{table[0]['runs'][run][int(i)]} {table[0]['search'].get('flags', '')}"
    own = table[0]["runs"][name]
    if isinstance(own, list):
        values = trial_values(table, name)
        return own[values.index(max(values))]
    other, _, more = own[1:].partition(" ")
    return f"{flags_of(table, other)} {more}" if own.startswith("@") else own


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["pack", "unpack"])
    parser.add_argument("path", type=Path, help="folder of the study, or its table")
    args = parser.parse_args()
    name = args.path.resolve().name.removesuffix(".jsonl")
    packed, folder = RECORDED / f"{name}.jsonl", RECORDED.parent.parent / "runs" / name
    try:
        table = collect(args.path) if args.action == "pack" else list(map(json.loads, args.path.read_text().splitlines()))
        if args.action == "pack":
            write(packed, table)
        else:
            unpack(table, folder)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        what = "a study's folder, with spec.json" if args.action == "pack" else "a study's table"
        parser.error(f"{args.path}: is not {what} ({error})")
    print(f"{sum(row['kind'] == 'final' for row in table[1:])} runs in {packed if args.action == 'pack' else folder}")


if __name__ == "__main__":
    main()
