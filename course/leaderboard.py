"""A table of runs on General Points: success on validation deals, at the best temperature, for at most so many responses.

    python course/leaderboard.py                       # the table that leaderboard.toml claims
    python course/leaderboard.py check                 # every run again from its seed; minutes each
    python course/leaderboard.py check --only NAME     # one of them
    python course/leaderboard.py check --code FOLDER   # with a student's own amft.py: in a container, it is run

An entry is a name, flags of amft.py, a seed, and what it claims. The same seed gives the same run on the same kind of CPU, so
a claim is checked by running it again: what counts is what comes out here. Success is of sampled responses to EVAL_N
validation deals, four each, at the best of TEMPERATURES, as every run of amft.py is evaluated (harness/evaluation.py): a
policy that merely became sharper is to gain nothing against the untouched one, which may also be asked at its best.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
from harness.evaluation import TEMPERATURES, evaluation  # noqa: E402

EVAL_N = 200
TOLERANCE = 0.02  # of a claim, on another kind of CPU
SECONDS = 3600  # of one run
# What an entry may set: the algorithm. The task, the start, files and the device are the same for all.
FLAGS = set("method steps mu warmup controller eta-mu eta-h mu-min mu-max utility meta-every trace prompts samples temperature "
            "reward advantage clip ppo-epochs imitation demos sft-batch lr".split())


def read(path):
    """(most responses, entries) of a leaderboard's file; ValueError says what is wrong with it."""
    table = tomllib.loads(path.read_text())
    entries, names = table.get("entry", []), set()
    for entry in entries:
        name = entry.get("name")
        if set(entry) != {"name", "flags", "seed", "claim", "at"} or not isinstance(name, str) or name in names:
            raise ValueError(f"{name}: an entry has a name of its own, flags, seed, claim and at")
        names.add(name)
        if type(entry["seed"]) is not int or entry["at"] not in TEMPERATURES or not 0 <= float(entry["claim"]) <= 1:
            raise ValueError(f"{name}: seed is a whole number, claim a share, at one of {TEMPERATURES}")
        words = entry["flags"].split()
        for flag, value in zip(words[::2], [*words[1::2], ""]):
            if flag.removeprefix("--") not in FLAGS or not flag.startswith("--") or not re.fullmatch(r"-?[\w.-]+", value):
                raise ValueError(f"{name}: {flag} {value} is no flag that an entry may set")
    return table["responses"], entries


def trained(entry, code, folder):
    """(the folder of the policy that the entry's run ends with, how many responses it took); without flags the start's."""
    if not entry["flags"]:
        return "base/worn", 0
    command = [sys.executable, str(code / "amft.py"), "--task", "gp", "--device", "cpu", "--val-every", "0", "--eval-n", "1",
               "--seed", str(entry["seed"]), "--out", str(folder), *entry["flags"].split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise ValueError(f"{entry['name']}: {(done.stderr.strip().splitlines() or ['it failed'])[-1][:200]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return str(folder / "final"), next(row["rollouts"] for row in reversed(rows) if row["kind"] == "final")


def measured(model, eval_n=EVAL_N):
    """(success, temperature) of a policy on validation deals at its best temperature, by the published functions."""
    import amft
    import tasks
    task = tasks.GeneralPoints()
    config = amft.Config(model=model, device="cpu", eval_n=eval_n)
    policy = amft.load_policy(config, task, amft, learns=False)
    row = next(evaluation(partial(amft.evaluate, *policy, task, config), ["val"], 1.0, samples=4))
    return row["best"][0], row["temperature"]


def check(entry, most, code=ROOT, eval_n=EVAL_N):
    """(success, temperature, responses, what is wrong or "") of an entry that is run again."""
    with tempfile.TemporaryDirectory() as work:
        model, responses = trained(entry, code, Path(work) / "run")
        success, temperature = measured(model, eval_n)
    wrong = ""
    if responses > most:
        wrong = f"{responses} responses, at most {most}"
    elif abs(success - entry["claim"]) > TOLERANCE:
        wrong = f"claims {entry['claim']:.3f}"
    return success, temperature, responses, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("show", "check"), default="show")
    parser.add_argument("--file", type=Path, default=HERE / "leaderboard.toml", help="the entries")
    parser.add_argument("--only", help="the entry of this name alone")
    parser.add_argument("--code", type=Path, default=ROOT, help="a folder with the amft.py to run (default: the published one)")
    given, bad = parser.parse_args(), 0
    try:
        most, entries = read(given.file)
        print(f"At most {most} responses; success on {EVAL_N} validation deals at the best temperature")
        for entry in sorted(entries, key=lambda entry: -entry["claim"]):
            if given.only and entry["name"] != given.only:
                continue
            line = f"{entry['claim']:.3f} at temperature {entry['at']}  {entry['name']}  {entry['flags']} --seed {entry['seed']}"
            if given.what == "check":
                success, temperature, responses, wrong = check(entry, most, given.code.resolve())
                bad += bool(wrong)
                line = f"{success:.3f} at temperature {temperature}, {responses} responses  {entry['name']}  {wrong or 'as claimed'}"
            print(line, flush=True)
    except (OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        parser.error(str(error))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
