"""Seconds and peak memory per step of every method, side by side: whole short runs in turn, round by round.

    python benchmarks/cost.py                    # General Points, default sizes, on the device that is there
    python benchmarks/cost.py --steps 10 --methods fixed amft sft

A method's seconds a step are those of its run, without evaluations and states, divided by its steps; all
methods have the same steps and, where they sample, the same responses, the controller's included, as in a
comparison. Quoted: the median over rounds, and the median over rounds of the ratio to `fixed` in the same
round, which a noisy machine disturbs less. Memory: the highest resident size of the run's process less
that of one which loads the policy and stops (on a GPU: what torch allocated at most).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from compare import rivals  # noqa: E402

PROGRAM = """
import resource, sys, torch, amft
from compare import rivals
from harness.run import Run
Run.evaluate = Run.save = Run.finish = lambda *_, **__: None
if sys.argv[1] == "load":
    amft.load_policy(amft.Config(), amft.TASKS["gp"](), amft)
else:
    rivals.main(sys.argv[1:])
gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
print("PEAK", gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, bool(gpu))
"""


def run(*argv):
    """(peak bytes, whether of a GPU) of a run in its own process."""
    command = [sys.executable, "-c", PROGRAM, *argv]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(argv)}: failed\n{done.stderr}")
    peak, gpu = done.stdout.rsplit("PEAK ", 1)[1].split()
    return int(peak), gpu == "True"


def measured(name, out, steps, seed):
    """(seconds a step, peak bytes) of a run of this method."""
    flags = dict(steps=steps, warmup=0, seed=seed, responses=64 * steps)  # 8 x 8 a step
    unused = rivals.METHOD_FLAGS[name].unused  # what a method does not read is refused
    given = [f"--{flag}={value}" for flag, value in flags.items() if flag not in unused]
    peak, _ = run("--task", "gp", "--method", name, "--out", str(out), *given)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "step"][-1]
    return last["seconds"] / steps, peak


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=sorted(rivals.METHODS),
                        default=list(rivals.METHODS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    empty, gpu = run("load")
    methods = list(dict.fromkeys(["fixed", *args.methods]))
    seconds = {name: [] for name in methods}
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for name in tqdm(methods, desc=f"round {number + 1}", leave=False):
                out = Path(folder) / f"{name}-{number}"
                each, peaks[name] = measured(name, out, args.steps, seed=number)
                seconds[name].append(each)
    memory = "peak memory, MiB" + ("" if gpu else " above a loaded policy")
    print(f"| method | seconds a step | to fixed | {memory} |\n|---|---|---|---|")
    for name in methods:
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["fixed"]))
        above = (peaks[name] - (0 if gpu else empty)) / 2 ** 20
        print(f"| {name} | {statistics.median(seconds[name]):.2f} | {ratio:.2f} | {above:.0f} |")


if __name__ == "__main__":
    main()
