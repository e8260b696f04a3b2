"""Merging in place of mixing: theta_0 + a (theta_SFT - theta_0) + b (theta_RL - theta_0), a and b by success on val.

    python compare/matrix.py compare/worn.json --keep    # --keep: with the policies (a run that is done keeps none)
    python compare/soup.py runs/compare/worn             # its runs that are "+sft +rl"

The rival that needs no controller, and no mixture: two runs of the study, made apart. After DoTS (arXiv 2605.00610),
without what it does to the differences before it adds them, and with a and b from a grid of eight. What a choice costs
is counted: the responses that it was made by, on top of RL's.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import amft  # noqa: E402
from compare import rivals  # noqa: E402
from compare.logs import finished, read, write  # noqa: E402
from compare.matrix import seeds_of  # noqa: E402
from harness.evaluation import evaluation  # noqa: E402

SHARES = (0.0, 0.5, 1.0)  # a, and b
GRID = [pair for pair in itertools.product(SHARES, SHARES) if pair != (0.0, 0.0)]
TEMPERATURE, SAMPLES = 0.3, 8  # of the responses that choose


def load(config, task, name):
    """(model, tokenizer) of the checkpoint of that name."""
    return amft.load_policy(dataclasses.replace(config, model=name), task, amft)


def merged(start, sft, rl, a, b):
    """theta_0 + a (theta_SFT - theta_0) + b (theta_RL - theta_0), entry by entry."""
    return {name: start[name] + a * (sft[name] - start[name]) + b * (rl[name] - start[name]) for name in start}


def choose(success):
    """(a, b) of the highest success(a, b), the first of equals."""
    return max(GRID, key=lambda pair: success(*pair))


def soup(sft, rl, out):
    """The merging of the policies in two runs' folders: its log in a third."""
    began, rows = time.time(), read(rl)
    settings, last = rows[0], rows[-1]
    if read(sft)[0]["model"] != settings["model"]:
        raise ValueError(f"{sft} and {rl} did not start from one policy")
    fields = {field.name: settings[field.name] for field in dataclasses.fields(amft.Config)}
    config = amft.Config(**{**fields, "device": "cpu"})
    task = amft.make_task(config, rivals.TASKS)
    splits = settings["splits"].split(",") if settings["splits"] else task.splits
    model, tokenizer = load(config, task, config.model)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    of_sft, of_rl = (load(config, task, str(folder / "final"))[0].state_dict() for folder in (sft, rl))
    look = partial(amft.evaluate, model, tokenizer, task, config)
    spent = last["rollouts"]

    def success(a, b):
        nonlocal spent
        model.load_state_dict(merged(start, of_sft, of_rl, a, b))
        row = look("val", TEMPERATURE, SAMPLES)
        spent += row["n"] * SAMPLES
        return row["success"]
    a, b = choose(success)
    model.load_state_dict(merged(start, of_sft, of_rl, a, b))
    steps, seconds = settings["steps"], read(sft)[-1]["seconds"] + last["seconds"]
    log = [dict(settings, method="soup"), dict(kind="step", step=steps, rollouts=spent)]  # it has no mu
    for row in evaluation(look, splits, config.temperature, settings["eval_samples"]):
        log.append(dict(kind="eval", step=steps, whole=True, **row))
    seconds += time.time() - began
    log.append(dict(kind="final", rollouts=spent, seconds=round(seconds, 1), a=a, b=b))
    out.mkdir(parents=True, exist_ok=True)
    write(out / "metrics.jsonl", log)
    print(f"{out}: a = {a}, b = {b}", flush=True)


def pairs(folder, seeds=None):
    """(SFT's folder, RL's, soup's) of the merged runs in a study's spec, seed by seed, that are not done."""
    spec = json.loads((folder / "spec.json").read_text())
    merges = {name: own.split() for name, own in spec["runs"].items() if str(own).startswith("+")}
    for name, parts in merges.items():
        for seed in seeds or seeds_of(spec, name):
            sft, rl = (folder / f"{part[1:]}-{seed}" for part in parts)
            out = folder / f"{name}-{seed}"
            if finished(read(sft)) and finished(read(rl)) and not finished(read(out)):
                yield sft, rl, out


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a study, with policies that --keep left there")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the spec's, these alone")
    args = parser.parse_args()
    folder = args.folder
    try:
        found = list(pairs(folder, args.seeds))
    except (OSError, ValueError, LookupError) as error:
        parser.error(f"{folder}: is not a study's folder, with spec.json ({error})")
    gone = [part for *parts, _ in found for part in parts if not (part / "final").exists()]
    for sft, rl, out in found:
        if sft not in gone and rl not in gone:
            soup(sft, rl, out)
    if gone:
        names = ", ".join(dict.fromkeys(map(str, gone)))
        sys.exit(f"not kept, so not merged: {names}; matrix.py --keep, in a new folder")


if __name__ == "__main__":
    main()
