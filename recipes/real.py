"""A real language model by every method: SFT, RL, SFT then RL, a fixed mixture and AMFT, at one budget of responses.

    python recipes/smollm2.py runs/smollm2                              # once: the checkpoint, without a hub
    python recipes/real.py --model runs/smollm2                         # seed 0; on one GPU fifteen minutes should do
    python recipes/real.py --model runs/smollm2 --seeds 1               # the next fifteen minutes, the next seed
    python recipes/real.py --model runs/smollm2 --task gp
    python recipes/real.py --model runs/smollm2 --search                # learning rates, by val, on a seed of their own
    python recipes/real.py --model runs/smollm2 --list                  # the commands, without running them
    python recipes/real.py --record                                     # its logs into recipes/real.jsonl
    python recipes/real.py --recorded                                   # table and figure, of real.jsonl alone

Each method is a run of compare/rivals.py (amft.py, and --before) in a process of its own, into OUT/METHOD-SEED. What is
finished is skipped, what was cut off goes on from its last state, so this may be stopped and started at will; --minutes
stops it by itself. It ends with a table of success in percent, in and out of distribution (OUT/table.md), and a figure of
success and mu over the steps (OUT/real.png). What is not finished is in both as far as it came. Figures from one seed are
a lead, not a result.

The budget: --responses are sampled by each method that samples, the controller's own on val included, so AMFT takes
fewer steps of RL. SFT samples none and gets as many steps as RL after the warm-up. Learning rates are those of LR until
a --search has finished for a method: it tries each of RATES alike, and takes the one that ends best on val.
Success is at each policy's own best temperature (harness/evaluation.py), in the figure's curves at 1.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from harness.arguments import read_log  # noqa: E402

WARMUP = 12  # steps of SFT before any RL
RATES = ("1e-5", "3e-5", "1e-4")  # that a search tries
LR = {"sft": "5e-5", "rl": "2e-5", "sft-rl": "2e-5", "fixed": "5e-5", "amft": "5e-5"}  # guesses, not searched
OWN = {
    "sft": [],
    "rl": [],
    "sft-rl": ["--warmup", str(WARMUP)],
    "fixed": ["--warmup", str(WARMUP), "--mu", "0.5"],
    "amft": ["--warmup", str(WARMUP), "--mu", "0.5", "--utility", "both"],
}
COMMON = ["--max-new-tokens", "110", "--demos", "5000", "--micro-tokens", "8192"]  # flags that every method reads
NAMES = {"sft": "SFT", "rl": "RL", "sft-rl": "SFT then RL", "fixed": "mu = 0.5", "amft": "AMFT"}
EXPLORATION = ["--samples", "8", "--advantage", "group"]
SEARCH_SEED = 100
RECORDED = Path(__file__).with_suffix(".jsonl")
KEPT = ("kind", "task", "seed", "steps", "lr", "step", "mu", "success", "rollouts", "seconds", "split", "whole",
        "best")  # of a row
GRACE = 60  # seconds that a run has to finish its step and keep its state


def flags_of(method, lr, seed, args):
    """The words of a method's run."""
    n_steps = args.responses // (args.prompts * 8)
    if method == "amft":
        n_steps = n_steps * args.meta_every // (args.meta_every + 1)  # the rest are samples of val
    flags = ["--task", args.task, "--method", method, "--model", str(args.model), "--lr", lr, "--seed", str(seed),
             "--steps", str(n_steps + WARMUP * (method != "rl")), "--eval-n", str(args.eval_n), "--eval-samples", "4",
             "--val-every", str(args.val_every), "--device", args.device, *COMMON, *OWN[method]]
    flags += ["--before", str(int(method == "sft"))]  # the untrained model is one for all
    if args.search:
        flags += ["--splits", "val"]
    if method != "rl":
        flags += ["--sft-batch", str(args.sft_batch), "--imitation", "nll"]
    if method != "sft":
        flags += [*EXPLORATION, "--prompts", str(args.prompts)]
    if method == "amft":
        flags += ["--meta-every", str(args.meta_every)]
    return flags + ["--bf16", "1"] * args.bf16


def rows_of(folder, *kinds):
    """Rows of a run's log; none where it has not begun."""
    log = folder / "metrics.jsonl"
    return read_log(log, *kinds) if log.exists() else []


def best_rate(method, args):
    """The learning rate that ended best on val in a finished search, else LR's."""
    found = {}
    for lr in RATES:
        folder = args.out / "search" / f"{method}-{lr}"
        if rows_of(folder, "final"):
            last = [row for row in rows_of(folder, "eval") if row["split"] == "val"][-1]
            found[lr] = last["best"][0]
    return max(found, key=found.get) if len(found) == len(RATES) else LR[method]


def jobs_of(args):
    """{folder: the words of its run}, in the order in which they are done."""
    jobs = {}
    if args.search:
        for lr in RATES:
            for method in args.methods:
                jobs[args.out / "search" / f"{method}-{lr}"] = flags_of(method, lr, SEARCH_SEED, args)
        return jobs
    for seed in args.seeds:
        for method in args.methods:
            jobs[args.out / f"{method}-{seed}"] = flags_of(method, best_rate(method, args), seed, args)
    return jobs


def began_of(folder):
    """The file with the words that a run was begun with."""
    return folder.with_suffix(".flags")


def refuse_other_flags(folder, flags):
    """ValueError where a run, also a finished one, was begun with others: a table compares like with like."""
    began = began_of(folder)
    if began.exists() and began.read_text() != shlex.join(flags):
        raise ValueError(f"{folder}: was begun with other flags, {began.read_text()}; remove it, or name another --out")


def words_of(folder, flags):
    """What a run is started with, or goes on with."""
    begun = (folder / "state.pt").exists()
    return ["--resume", os.path.relpath(folder)] if begun else [*flags, "--out", os.path.relpath(folder)]


def run(folder, flags, end):
    """A run until it is finished, or until the time `end`; its exit code, 130 where it was stopped."""
    words = words_of(folder, flags)
    if words[0] != "--resume":
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        began_of(folder).write_text(shlex.join(flags))
    print(f"$ python compare/rivals.py {shlex.join(words)}", flush=True)
    process = subprocess.Popen([sys.executable, str(ROOT / "compare" / "rivals.py"), *words])
    try:
        return process.wait(max(1.0, end - time.time() - GRACE))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it ends its step, and keeps its state
        process.wait()
        return 130
    except KeyboardInterrupt:  # which the process got, too; a second signal would not wait for its step
        process.wait()
        return 130


def tidy(folder, args):
    """Of a finished run the log and the figure stay: a state has 24 bytes a parameter."""
    if not args.keep:
        (folder / "state.pt").unlink(missing_ok=True)
        shutil.rmtree(folder / "final", ignore_errors=True)


# --- What came out ---
def begun_in(out):
    """{method: its runs in a folder that have taken a step, by seed}."""
    found = {}
    for method in OWN:
        runs = [run for run in out.glob(f"{method}-*") if run.name.removeprefix(f"{method}-").isdecimal()]
        runs = [run for run in sorted(runs, key=seed_of) if rows_of(run, "step")]
        if runs:
            found[method] = runs
    return found


def seed_of(run):
    return int(run.name.rpartition("-")[2])


def report(out, figure):
    """The table of the runs in a folder, and their figure."""
    begun = begun_in(out)
    if not begun:
        return print("no run has taken a step yet")
    lines = table_lines(begun)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")
    print(draw(begun, figure))


def is_finished(run):
    return bool(rows_of(run, "final"))


def whole_evaluations(begun):
    """Rows, of all runs."""
    return [row for runs in begun.values() for run in runs for row in rows_of(run, "eval") if row["whole"]]


def untrained(begun):
    """{split: its evaluation before any training}, which the runs of SFT have; empty without them."""
    return {row["split"]: row for row in whole_evaluations(begun) if row["step"] == 0}


def table_lines(begun):
    """Markdown: success in percent at each policy's best temperature on val, its mean over seeds, and its interval
    (from problems) or each seed's."""
    splits = list(dict.fromkeys(row["split"] for row in whole_evaluations(begun)))
    header = ["method", *splits, "mu at the end", "responses", "minutes", "learning rate"]
    lines = [header, ["---"] * len(header)]
    before = untrained(begun)
    if before:
        lines.append(["before", *(cell([before.get(split)]) for split in splits), "", "", "", ""])
    for method, runs in begun.items():
        done = [run for run in runs if is_finished(run)]
        if done:
            last = [{row["split"]: row for row in rows_of(run, "eval") if row["whole"] and row["step"]} for run in done]
            cells = [cell([rows.get(split) for rows in last]) for split in splits]
            lines.append([NAMES[method], *cells, *how(done)])
        for run in runs:
            if run not in done:
                last, n = rows_of(run, "step")[-1]["step"], rows_of(run, "config")[0]["steps"]
                lines.append([f"{NAMES[method]}, cut off at step {last} of {n}", *["-"] * len(splits), *how([run])])
    return [f"| {' | '.join(line)} |" for line in lines]


def cell(rows):
    """Success of the evaluations of a split, one a seed; "-" where a run has none."""
    if None in rows:
        return "-"
    best = [[100 * share for share in row["best"]] for row in rows]
    if len(best) == 1:
        return "{:.1f} [{:.0f}, {:.0f}]".format(*best[0])
    return f"{statistics.mean(share for share, _, _ in best):.1f} ({', '.join(f'{share:.1f}' for share, _, _ in best)})"


def how(runs):
    """The last cells of a line: mu at the end, responses, minutes, learning rate."""
    steps = [rows_of(run, "step") for run in runs]
    minutes = statistics.mean(rows[-1]["seconds"] - rows[0]["seconds"] for rows in steps) / 60  # loading apart
    rates = dict.fromkeys(f"{rows_of(run, 'config')[0]['lr']:g}" for run in runs)
    return [f"{statistics.mean(rows[-1]['mu'] for rows in steps):.2f}",
            f"{statistics.mean(rows[-1]['rollouts'] for rows in steps):.0f}", f"{minutes:.1f}", ", ".join(rates)]


def draw(begun, path):
    """Success on val over steps, and mu, a line a run; what became of it, in words."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "No figure: pip install matplotlib"
    figure = Figure((11, 4.2), layout="constrained")
    success, mu = figure.subplots(1, 2)
    before = untrained(begun)
    for i, (method, runs) in enumerate(begun.items()):
        style = dict(linewidth=1.2, color="black" if method == "amft" else f"C{i}")
        for n, run in enumerate(runs):
            name = None if n else NAMES[method] + ("" if all(map(is_finished, runs)) else ", cut off")
            rows = [row for row in rows_of(run, "eval") if row["split"] == "val" and row["step"]]
            if before:
                rows.insert(0, before["val"])
            success.plot([row["step"] for row in rows], [100 * row["success"] for row in rows], "o-", markersize=3,
                         label=name, **style)
            rows = rows_of(run, "step")
            mu.plot([row["step"] for row in rows], [row["mu"] for row in rows], **style)
    success.set(title="samples right on validation, %", xlabel="step", ylim=(0, None))
    mu.set(title="mu: 0 is RL, 1 is SFT", xlabel="step", ylim=(-0.03, 1.03))
    success.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    return f"Figure: {path}"


# --- What was recorded ---
def record(out):
    """Keep of the logs in a folder what table and figure read, in recipes/real.jsonl."""
    runs = [run for runs in begun_in(out).values() for run in runs]
    if not runs:
        raise ValueError(f"--out {out}: there are no runs to record")
    lines = []
    for run in runs:
        for row in rows_of(run, "config", "step", "eval", "final"):
            kept = {key: row[key] for key in KEPT if key in row}
            lines.append(json.dumps({"run": run.name, **kept}) + "\n")
    RECORDED.write_text("".join(lines))
    print(f"{len(runs)} runs in {RECORDED}")


def unpack(folder):
    """The logs of recipes/real.jsonl as folders of runs."""
    for line in RECORDED.read_text().splitlines():
        row = json.loads(line)
        run = folder / row.pop("run")
        run.mkdir(exist_ok=True)
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


def show_recorded():
    """The table of recipes/real.jsonl; the figure beside it."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(Path(folder))
        report(Path(folder), RECORDED.with_suffix(".png"))


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder, or a hub's name")
    parser.add_argument("--task", choices=("math", "gp"), default="math")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=tuple(OWN), default=list(OWN),
                        help="sft evaluates the untrained model, for all")
    parser.add_argument("--out", type=Path, help="default: runs/real-TASK")
    parser.add_argument("--minutes", type=float, default=15, help="after which it stops, to be started again")
    parser.add_argument("--responses", type=int, default=7680, help="the budget of each method that samples")
    parser.add_argument("--prompts", type=int, default=16, help="of a step, with 8 samples each")
    parser.add_argument("--sft-batch", type=int, default=32)
    parser.add_argument("--meta-every", type=int, default=5, help="steps between AMFT's looks at val")
    parser.add_argument("--eval-n", type=int, default=100, help="episodes of a split")
    parser.add_argument("--val-every", type=int, default=10, help="steps between looks at val for the figure")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--bf16", type=int, default=1, choices=(0, 1))
    parser.add_argument("--keep", action="store_true", help="states and policies of finished runs, too")
    parser.add_argument("--search", action="store_true", help=f"learning rates {', '.join(RATES)}, seed {SEARCH_SEED}")
    parser.add_argument("--list", action="store_true", help="print the commands that are still to do")
    parser.add_argument("--record", action="store_true", help=f"keep the logs of --out in {RECORDED.name}, nothing else")
    parser.add_argument("--recorded", action="store_true", help=f"table and figure of {RECORDED.name}, nothing else")
    args = parser.parse_args(argv)
    if not (args.model or args.record or args.recorded):
        parser.error("--model: a checkpoint folder, or a hub's name, is needed; python recipes/smollm2.py makes one")
    args.out = args.out or ROOT / "runs" / f"real-{args.task}"
    return args


def main(argv=None):
    try:
        compare(arguments(argv))
    except (OSError, ValueError) as error:
        print(f"real.py: {error}", file=sys.stderr)
        sys.exit(2)


def compare(args):
    """What was asked for: the runs and their report, or the record alone."""
    if args.recorded:
        return show_recorded()
    if args.record:
        return record(args.out)
    end = time.time() + 60 * args.minutes
    for folder, flags in jobs_of(args).items():
        refuse_other_flags(folder, flags)
        if rows_of(folder, "final"):
            tidy(folder, args)
            continue
        if args.list:
            print(f"python compare/rivals.py {shlex.join(words_of(folder, flags))}")
            continue
        if time.time() > end - GRACE:
            print(f"{args.minutes:g} minutes are over; the same command goes on with {folder.name}")
            break
        code = run(folder, flags, end)
        if code == 130:
            print(f"stopped in {folder.name}; the same command goes on there")
            break
        if code:
            sys.exit(code)
        tidy(folder, args)
    if not args.list:
        report(args.out, args.out / "real.png")


if __name__ == "__main__":
    main()
