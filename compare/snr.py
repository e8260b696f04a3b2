"""Is the meta-gradient a signal? How large dU/dmu is against its noise, by trace and by way to estimate it.

    python compare/snr.py           # seeds 200, 201, 202 of FLAGS into runs/compare/snr.jsonl, and the table

A fixed mixture is trained as AMFT would be. After some of its steps many conversations are sampled
from the stepped policy, and dU/dmu is estimated from them for every trace: with so many, the estimate
is good enough to tell its size from its noise. The noise is quoted for what a run affords, 8 prompts x
8 samples. On validation prompts and on training prompts, which a run samples anyway: conversation by
conversation, and by the RL gradient alone (own_meta_gradient); and as the difference of success
between theta' moved half a unit of mu up and down, both sampled with the same random numbers.
To record it: cp runs/compare/snr.jsonl compare/recorded/ && python compare/tables.py snr.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import amft  # noqa: E402
from compare.logs import RUNS  # noqa: E402
from compare.tables import snr  # noqa: E402
from harness.arguments import CONTROLLER, MethodFlags  # noqa: E402

LOG = RUNS / "snr.jsonl"
SEEDS = (200, 201, 202)  # no recorded run has these
FLAGS = "--task gp --model base --sft-batch 64 --lr 2e-4 --steps 300 --mu 0.5 --val-every 0 --eval-n 1"  # gp.json's fixed-0.5
TRACES = (0.0, 0.5, 0.9, 0.98)
AT = (25, 100, 200)  # the steps after which is measured
PROMPTS, SAMPLES = 96, 16  # of a measurement
AFFORD = 8, 8  # of a meta-gradient in a run


def row_of(source, trace, value, error, afford):
    """dU/dmu as estimated, its standard error, and that of AFFORD conversations."""
    return dict(source=source, trace=trace, value=value, error=error, afford=afford)


def sampled(policy, episodes, samples, config):
    return amft.rollout(*policy, episodes, samples, config.max_new_tokens, config.temperature)


def by_conversations(model, d_theta, rollouts, config):
    """(dU/dmu, its standard error, that of AFFORD conversations): each conversation's own gradient."""
    value, error = amft.meta_gradient(model, d_theta, rollouts, config)
    P, G = AFFORD
    order = torch.arange(PROMPTS * SAMPLES, device=rollouts.success.device).view(PROMPTS, SAMPLES)
    errors = []
    for start in range(0, SAMPLES, G):  # as many samples of a prompt as a run affords
        columns = slice(start, start + G)
        few = rollouts._replace(
            batch=rollouts.batch.rows(order[:, columns].flatten()),
            success=rollouts.success[:, columns])
        errors.append(amft.meta_gradient(model, d_theta, few, config)[1])
    return value, error, statistics.mean(errors) * math.sqrt(PROMPTS / P)


def parts_of(model, rollouts, advantages, config):
    """[(batch, its RL gradient)] of parts as large as AFFORD, in which its spread shows."""
    parts = []
    for rows in torch.arange(PROMPTS * SAMPLES).split(math.prod(AFFORD)):
        rows = rows.to(rollouts.success.device)
        batch = rollouts.batch.rows(rows)
        own = amft.Advantages(advantages.values[rows], advantages.scale)
        parts.append((batch, amft.rl_gradient(model, batch, own, config)[0]))
    return parts


def by_rl_gradient(d_theta, parts, scale):
    """The same, by the products of RL gradients."""
    values = [amft.own_meta_gradient(g_rl, d_theta, batch, scale)[0] for batch, g_rl in parts]
    spread = statistics.stdev(values)
    return statistics.mean(values), spread / math.sqrt(len(values)), spread


def estimates(policy, task, split, rng, config, sensitivities):
    """The rows of a split, all from one set of conversations."""
    model = policy[0]
    episodes = [task.sample(split, rng) for _ in range(PROMPTS)]
    rollouts = sampled(policy, episodes, SAMPLES, config)
    advantages = amft.advantages_of(model, None, rollouts, config)
    parts = parts_of(model, rollouts, advantages, config)
    rows = []
    for trace, (d_theta, *_) in sensitivities.items():
        whole = by_conversations(model, d_theta, rollouts, config)
        rows.append(row_of(f"{split} by conversations", trace, *whole))
        product = by_rl_gradient(d_theta, parts, advantages.scale)
        rows.append(row_of(f"{split} by RL gradient", trace, *product))
    return rows


def difference(policy, task, rng, config, trace, d_theta):
    """The row of the finite difference of U over one unit of mu; AFFORD for both together."""
    model = policy[0]
    theta = amft.flatten(model)
    episodes = [task.sample("val", rng) for _ in range(PROMPTS)]
    success = []
    for move in (0.5, -0.5):
        amft.set_theta(model, theta + move * d_theta)
        torch.manual_seed(1)  # common random numbers
        success.append(sampled(policy, episodes, AFFORD[1], config).success)
    amft.set_theta(model, theta)
    each = (success[0] - success[1]).mean(1)  # (PROMPTS,)
    error = each.std().item() / math.sqrt(PROMPTS)
    afford = error * math.sqrt(2 * PROMPTS / AFFORD[0])
    return row_of("val by difference", trace, each.mean().item(), error, afford)


class Measured(Exception):
    """There is nothing left to look at."""


class Probe(amft.Method):
    """A fixed mixture that is looked at: asked for mu, the model still is what the last step made it."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.sensitivities = dict.fromkeys(TRACES)  # trace -> d (theta, m, v)/d mu

    def choose_mu(self, step):
        if step.t - 1 in AT:
            self.measure(step)
        if step.t > max(AT):
            raise Measured
        return super().choose_mu(step)

    def measure(self, step):
        config = dataclasses.replace(self.config, advantage="group")
        rows = []
        for split in ("val", "train"):
            rows += estimates(
                self.policy, self.task, split, step.rng, config, self.sensitivities)
        for trace in (0.0, 0.9):
            d_theta = self.sensitivities[trace][0]
            rows.append(difference(self.policy, self.task, step.rng, config, trace, d_theta))
        with open(LOG, "a") as file:
            for row in rows:
                place = dict(seed=self.config.seed, step=step.t - 1)
                file.write(json.dumps({**place, **row}) + "\n")

    def before_update(self, step, theta, adam, first):
        if step.rollouts is None:
            return
        for trace, last in self.sensitivities.items():
            self.sensitivities[trace] = amft.step_sensitivity(
                theta, step.g_rl, step.g_sft, step.mu, adam, last, trace, lr=step.lr)


def logged():
    return [json.loads(line) for line in LOG.read_text().splitlines()]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    LOG.parent.mkdir(parents=True, exist_ok=True)
    if not LOG.exists():
        spec = dict(kind="spec", prompts=PROMPTS, samples=SAMPLES, afford=AFFORD, common=FLAGS)
        LOG.write_text(json.dumps(spec) + "\n")
    for seed in SEEDS:
        if max(AT) in [row["step"] for row in logged()[1:] if row["seed"] == seed]:
            continue
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Measured):
            flags = [*FLAGS.split(), "--method", "probe", "--seed", str(seed)]
            amft.main([*flags, "--out", f"{folder}/run"], {"probe": Probe}, amft.Config,
                      {"probe": MethodFlags(CONTROLLER)})
    print("\n".join(snr(logged())))


if __name__ == "__main__":
    main()
