"""Merging in place of mixing: theta_0 + a (theta_SFT - theta_0) + b (theta_RL - theta_0), a and b by success on val.

    python compare/matrix.py compare/worn.json --keep         # with the policies that it leaves
    python compare/soup.py runs/compare/worn    # of every pair of policies that is kept there, a run "soup" beside it

The rival that needs no controller, and no mixture (arXiv 2605.00610): two runs of the study, made apart. What a choice
costs is counted: the responses that it was made by, on top of RL's.
"""

import argparse
import itertools
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import amft  # noqa: E402
from compare.logs import finished, name_and_seed, read, write  # noqa: E402
from harness.evaluation import evaluation  # noqa: E402

SHARES = (0.0, 0.5, 1.0)  # a, and b
GRID = [pair for pair in itertools.product(SHARES, SHARES) if pair != (0.0, 0.0)]
TEMPERATURE, SAMPLES = 0.3, 8  # of the responses that choose


def weights(name):
    """{parameter: tensor} of the checkpoint of that name, as amft.load_policy finds it."""
    return load(name)[0].state_dict()


def load(name, task="gp"):
    config = amft.Config(task=task, model=name, device="cpu")
    return amft.load_policy(config, amft.TASKS[task](), amft)


def merged(start, sft, rl, a, b):
    """theta_0 + a (theta_SFT - theta_0) + b (theta_RL - theta_0), entry by entry."""
    return {name: start[name] + a * (sft[name] - start[name]) + b * (rl[name] - start[name]) for name in start}


def choose(success):
    """(a, b) of the highest success(a, b), the first of equals."""
    return max(GRID, key=lambda pair: success(*pair))


def soup(sft, rl, out):
    """The merging of the policies in two runs' folders: its log in a third."""
    began, rows = time.time(), read(rl)
    settings = rows[0]
    splits = settings["splits"].split(",")
    steps, spent = [row for row in rows if row["kind"] == "step"][-1]["step"], rows[-1]["rollouts"]
    config = amft.Config(task="gp", eval_n=settings["eval_n"], device="cpu")
    model, tokenizer = load(settings["model"])
    parts = model.state_dict(), weights(str(sft / "final")), weights(str(rl / "final"))
    start = {name: tensor.clone() for name, tensor in parts[0].items()}
    look = partial(amft.evaluate, model, tokenizer, amft.TASKS["gp"](), config)
    seen = []

    def success(a, b):
        model.load_state_dict(merged(start, *parts[1:], a, b))
        row = look("val", TEMPERATURE, SAMPLES)
        seen.append(row["n"] * SAMPLES)
        return row["success"]
    a, b = choose(success)
    model.load_state_dict(merged(start, *parts[1:], a, b))
    log = [dict(settings, method="soup"),
           dict(kind="step", step=steps, mu=a / (a + b), rollouts=spent + sum(seen))]
    for row in evaluation(look, splits, config.temperature, settings["eval_samples"]):
        log.append(dict(kind="eval", step=steps, whole=True, **row))
    log.append(dict(kind="final", rollouts=spent + sum(seen), seconds=round(time.time() - began, 1), a=a, b=b))
    out.mkdir(parents=True, exist_ok=True)
    write(out / "metrics.jsonl", log)
    print(f"{out}: a = {a}, b = {b}", flush=True)


def pairs(folder):
    """(SFT's folder, RL's, soup's) of every seed and setting; RL of the first where a setting has none of its own."""
    for sft in sorted(folder.rglob("sft-[0-9]*")):
        name, seed = name_and_seed(sft, folder)
        out = sft.with_name(f"soup-{seed}")
        rl = next((own for own in (sft.with_name(f"rl-{seed}"), folder / f"rl-{seed}") if own.exists()), None)
        kept = rl and (sft / "final").exists() and (rl / "final").exists()
        if sft.is_dir() and kept and not name.startswith("search/") and not finished(read(out)):
            yield sft, rl, out


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a study, with policies that --keep left there")
    folder = parser.parse_args().folder
    found = list(pairs(folder))
    if not found:
        parser.error(f"{folder}: holds no policies of sft and rl to be merged; matrix.py --keep leaves them")
    for sft, rl, out in found:
        soup(sft, rl, out)


if __name__ == "__main__":
    main()
