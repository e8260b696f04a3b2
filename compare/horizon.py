"""What does mu do to success, truly, after 1, 10 and 50 steps? And what does the meta-gradient say of it?

    python compare/horizon.py           # into runs/compare/horizon.jsonl, resumable; then the table and the figure
    python compare/horizon.py --recorded    # table and figure from compare/recorded/horizon.jsonl

A mixture is trained at mu = 0.5, with rectified imitation and with the plain loss. After some of its steps it branches:
held at 0.3 and at 0.7, with the same prompts, demonstrations and noise, branch pairs go on from the same state. Success on
all validation deals, 0.7's less 0.3's, over 0.4, is dU/dmu as it is at that horizon: U as the controller is told it, success
at temperature 1; and success at 0.1, which a policy does not raise by getting more certain. Beside it: what the controller
would have estimated in that state, with many more conversations than it has in a run, for each trace; in units of U per
unit of mu, too.
"""

import argparse
import contextlib
import json
import math
import shutil
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import amft  # noqa: E402
from compare.logs import RECORDED, RUNS  # noqa: E402
from compare.tables import markdown  # noqa: E402
from harness import run as running  # noqa: E402
from harness.arguments import CONTROLLER, MethodFlags  # noqa: E402

LOG = RUNS / "horizon.jsonl"
FOLDER = RUNS / "horizon"
SEED = 300  # of the trunk; the branches' follow. No recorded run has these
FLAGS = "--task gp --steps 300 --method trunk --mu 0.5 --val-every 0 --eval-n 110 --eval-samples 1"
SETTINGS = {"rectified": "--lr 1e-4", "plain": "--imitation nll --lr 4e-4"}  # rates as searched
AT = (50, 150)  # the steps after which it branches
HORIZONS = (1, 10, 50)
SIDES = (0.3, 0.7)
TRACES = (0.0, 0.5, 0.9, 0.98)
PROMPTS, SAMPLES = 96, 16  # of an estimate
COLD = 0.1  # the other temperature at which branches are measured
KNOWN = {"trunk": MethodFlags(CONTROLLER)}


class Measured(Exception):
    """There is nothing left to look at."""


def write(**row):
    with open(LOG, "a") as file:
        file.write(json.dumps(row) + "\n")


def rows_of(path, setting=None):
    """All rows of a log, or a setting's."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if setting in (None, row["setting"])]


class Trunk(amft.Method):
    """The mixture. Where it branches it is saved, and the meta-gradient is estimated, by every trace."""
    setting = ""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.sensitivities = dict.fromkeys(TRACES)

    def choose_mu(self, step):
        if step.t - 1 in AT:  # the model still is what the last step made it
            folder = FOLDER / self.setting
            shutil.copytree(folder / "trunk", folder / f"at-{step.t - 1}", dirs_exist_ok=True)
            self.estimate(step)
        if step.t > max(AT):
            raise Measured
        return super().choose_mu(step)

    def estimate(self, step):
        model, config = self.policy[0], self.config
        episodes = [self.task.sample("val", step.rng) for _ in range(PROMPTS)]
        rollouts = amft.rollout(*self.policy, episodes, SAMPLES, config.max_new_tokens)
        for trace, (d_theta, *_) in self.sensitivities.items():
            slope, error = amft.meta_gradient(model, d_theta, rollouts, config)
            write(kind="estimate", setting=self.setting, at=step.t - 1, trace=trace, slope=slope, error=error)

    def before_update(self, step, theta, adam, first):
        for trace, last in self.sensitivities.items():
            self.sensitivities[trace] = amft.step_sensitivity(
                theta, step.g_rl, step.g_sft, step.mu, adam, last, trace, lr=step.lr)


class Branch(amft.Method):
    """Goes on from the trunk's state with its own mu and seed, and is measured at each horizon."""
    setting = ""
    start = 0  # the step after which it branched

    def choose_mu(self, step):
        done = step.t - 1 - self.start
        if done in HORIZONS:
            row, cold = (amft.evaluate(*self.policy, self.task, self.config, "val", temperature, SAMPLES)
                         for temperature in (1.0, COLD))
            write(kind="branch", setting=self.setting, at=self.start, horizon=done, mu=self.config.mu,
                  seed=self.config.seed, success=row["success"], hits=row["hits"], cold=cold["success"])
        if done == max(HORIZONS):
            raise Measured
        return super().choose_mu(step)

    def load_state_dict(self, state):  # the trunk's, which has nothing for it
        pass


def grow_trunk(setting):
    """The trunk, with its folders to branch from, if the log has not all of its estimates."""
    folder = FOLDER / setting
    if sum(row["kind"] == "estimate" for row in rows_of(LOG, setting)) == len(AT) * len(TRACES):
        return
    shutil.rmtree(folder, ignore_errors=True)
    if LOG.exists():  # what is left of a trunk that was cut off
        LOG.write_text("".join(json.dumps(row) + "\n" for row in rows_of(LOG) if row["setting"] != setting))
    Trunk.setting = setting
    with contextlib.suppress(Measured):
        flags = [*FLAGS.split(), *SETTINGS[setting].split(), "--seed", str(SEED), "--out", str(folder / "trunk")]
        amft.main(flags, {"trunk": Trunk}, amft.Config, KNOWN)


def grow_branch(setting, at, mu, seed):
    """One branch, if the log has not all of it: the trunk's folder with another mu and seed in its first line."""
    found = [row for row in rows_of(LOG, setting) if row["kind"] == "branch"
             and (row["at"], row["mu"], row["seed"]) == (at, mu, seed)]
    if {row["horizon"] for row in found} == set(HORIZONS):
        return
    out = FOLDER / setting / "branch"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(FOLDER / setting / f"at-{at}", out)
    text = (out / "metrics.jsonl").read_text()
    other = text.replace(f'"seed": {SEED},', f'"seed": {seed},', 1).replace('"mu": 0.5,', f'"mu": {mu},', 1)
    assert len(other) == len(text)  # the state knows how long the log was
    (out / "metrics.jsonl").write_text(other)
    Branch.setting, Branch.start = setting, at
    with contextlib.suppress(Measured):
        amft.main(["--resume", str(out)], {"trunk": Branch}, amft.Config, KNOWN)


def truths(rows, at, horizon, measure="success"):
    """dU/dmu of every pair of branches at this horizon; measure: success at temperature 1, or cold, at 0.1."""
    success = {(row["seed"], row["mu"]): row[measure] for row in rows
               if row["kind"] == "branch" and (row["at"], row["horizon"]) == (at, horizon) and measure in row}
    low, high = SIDES
    seeds = sorted({seed for seed, _ in success})
    return [(success[seed, high] - success[seed, low]) / (high - low) for seed in seeds
            if (seed, low) in success and (seed, high) in success]


def value_and_error(values):
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def places_of(rows):
    """[(setting, the rows of it, step after which it branches)], in the order of SETTINGS."""
    places = []
    for setting in SETTINGS:
        own = [row for row in rows if row["setting"] == setting]
        places += [(setting, own, at) for at in sorted({row["at"] for row in own if row["kind"] == "branch"})]
    return places


def table(rows):
    """dU/dmu in points of success per unit of mu, with its standard error."""
    places, lines = places_of(rows), []
    for measure, temperature in (("success", 1), ("cold", COLD)):
        for horizon in HORIZONS:
            values = [truths(own, at, horizon, measure) for _, own, at in places]
            cells = ["{:+.2f} ± {:.2f}".format(*(100 * x for x in value_and_error(own))) if own else "-" for own in values]
            lines.append([f"true, T = {temperature}, after {horizon} steps", *cells])
    for trace in TRACES:
        found = [next(row for row in own if (row["kind"], row["at"], row.get("trace")) == ("estimate", at, trace))
                 for _, own, at in places]
        cells = [f"{100 * row['slope']:+.2f} ± {100 * row['error']:.2f}" for row in found]
        lines.append([f"estimated, trace {trace}", *cells])
    pairs = [len(truths(own, at, HORIZONS[0])) for _, own, at in places]
    header = ["dU/dmu on val, points, ± a standard error",
              *(f"{setting}, after step {at} ({n} pairs)" for (setting, _, at), n in zip(places, pairs))]
    return "\n".join(markdown(header, lines)[1:])


def draw(rows, path):
    from matplotlib.figure import Figure
    places = places_of(rows)
    figure = Figure((3.8 * len(places), 3.6), layout="constrained")
    for axis, (setting, own, at) in zip(figure.subplots(1, len(places), squeeze=False)[0], places):
        for measure, style, colour, temperature in (("cold", "v:", "grey", COLD), ("success", "o-", "black", 1)):
            points = [value_and_error(found) for horizon in HORIZONS if (found := truths(own, at, horizon, measure))]
            if points:
                values, errors = zip(*points)
                axis.errorbar(HORIZONS, [100 * x for x in values], [196 * x for x in errors], fmt=style, color=colour,
                              capsize=3, label=f"true, T = {temperature}: branches held at 0.7 and 0.3")
        for row in own:
            if row["kind"] == "estimate" and row["at"] == at:  # a trace sees 1 / (1 - trace) steps
                axis.errorbar(min(1 / (1 - row["trace"]), 60), 100 * row["slope"], 196 * row["error"], fmt="s",
                              capsize=3, label=f"estimated, trace {row['trace']}")
        axis.axhline(0, color="grey", linewidth=0.6)
        axis.set(xscale="log", xlabel="horizon, steps")
        axis.set_title(f"{setting} loss, after step {at}", fontsize=10)
    figure.axes[0].set_ylabel("dU/dmu on val, points (95%)")
    figure.axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8, help="of branches, at each place; two at least")
    parser.add_argument("--only", choices=SETTINGS, help="run this setting alone")
    parser.add_argument("--recorded", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    if args.pairs < 2:
        parser.error(f"--pairs {args.pairs}: at least 2, or there is no error")
    if args.recorded:
        rows, path = rows_of(RECORDED / "horizon.jsonl"), RECORDED / "horizon.png"
    else:
        running.SAVE_SECONDS = -1  # the trunk's state is there after each step
        LOG.parent.mkdir(parents=True, exist_ok=True)
        for setting in [args.only] if args.only else SETTINGS:
            grow_trunk(setting)
            for pair in range(args.pairs):
                for at in AT:
                    for mu in SIDES:
                        grow_branch(setting, at, mu, SEED + 1 + pair)
        rows, path = rows_of(LOG), LOG.with_suffix(".png")
    print(table(rows))
    draw(rows, path)
    print(path)


if __name__ == "__main__":
    main()
