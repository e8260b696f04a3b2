"""Is the meta-gradient a signal? How large dU/dmu is against its noise, for several traces and ways to estimate it.

    python compare/snr.py                  # seeds 200, 201 and 202 of FLAGS into runs/snr.jsonl, and the table

A fixed mixture is trained as AMFT would be. After some of its steps many conversations are sampled from the stepped
policy, and dU/dmu is estimated from them for every trace: with so many, the estimate is good enough to tell its size
from its noise. The noise is quoted for what a run affords, 8 prompts x 8 samples. On validation prompts and on
training prompts, which a run samples anyway: conversation by conversation, and by the RL gradient alone
(own_meta_gradient); and as the difference of success between theta' moved half a unit of mu up and down, both sampled
with the same random numbers. To record it: cp runs/snr.jsonl compare/recorded/ && python compare/tables.py snr.
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
from torch.nn.utils import vector_to_parameters

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import amft  # noqa: E402
from compare.tables import snr  # noqa: E402

LOG = ROOT / "runs" / "snr.jsonl"
FLAGS = "--task gp --steps 300 --mu 0.5 --val-every 0 --eval-n 1"  # gp.json's fixed-0.5
TRACES = (0.0, 0.5, 0.9, 0.98)
AT = (25, 100, 200)
PROMPTS, SAMPLES = 96, 16  # of a measurement
AFFORD = 8, 8  # of a meta-gradient in a run


def estimates(s, config, split, tangents):
    """[(source, trace, dU/dmu, its standard error, that of AFFORD conversations)] from one set of conversations."""
    episodes, (P, G), result = [s.task.sample(split, s.rng) for _ in range(PROMPTS)], AFFORD, []
    seen = amft.rollout(s.model, s.tokenizer, episodes, SAMPLES, config.max_new_tokens, config.temperature)
    order = torch.arange(PROMPTS * SAMPLES, device=seen.success.device).view(PROMPTS, SAMPLES)
    few = [seen._replace(batch=seen.batch.rows(order[:, i:i + G].flatten()), success=seen.success[:, i:i + G])
           for i in range(0, SAMPLES, G)]
    advantages, grads = amft.advantages_of(s.model, None, seen, config), []
    for rows in order.flatten().split(P * G):  # the RL gradient's spread shows in parts as large as AFFORD
        part = seen.batch.rows(rows)
        values = amft.Advantages(advantages.values[rows], advantages.scale)
        grads.append((part, amft.rl_gradient(s.model, part, values, config)[0]))
    for trace, (tangent, *_) in tangents.items():
        error = statistics.mean(amft.meta_gradient(s.model, tangent, own, config)[1] for own in few)
        result.append((f"{split} by conversations", trace, *amft.meta_gradient(s.model, tangent, seen, config),
                       error * math.sqrt(PROMPTS / P)))
        own = [amft.own_meta_gradient(g, tangent, part, advantages.scale)[0] for part, g in grads]
        spread = statistics.stdev(own)
        result.append((f"{split} by RL gradient", trace, statistics.mean(own), spread / math.sqrt(len(own)), spread))
    return result


def difference(s, config, trace, tangent):
    """The same of the finite difference of U over one unit of mu, with common random numbers; AFFORD for both together."""
    episodes, success = [s.task.sample("val", s.rng) for _ in range(PROMPTS)], []
    for sign in (0.5, -0.5):
        vector_to_parameters(s.theta + sign * tangent, s.model.parameters())
        torch.manual_seed(1)
        success.append(amft.rollout(s.model, s.tokenizer, episodes, AFFORD[1], config.max_new_tokens,
                                    config.temperature).success)
    vector_to_parameters(s.theta, s.model.parameters())
    each = (success[0] - success[1]).mean(1)
    error = each.std().item() / math.sqrt(PROMPTS)
    return "val by difference", trace, each.mean().item(), error, error * math.sqrt(2 * PROMPTS / AFFORD[0])


class Measured(Exception):
    """There is nothing left to look at."""


class Probe(amft.Method):
    """A fixed mixture that is looked at: mu(s) is asked while the model still is what the step before made it."""

    def __init__(self, config):
        super().__init__(config)
        self.tangents = dict.fromkeys(TRACES)

    def mu(self, s):
        if s.t - 1 in AT:
            group = dataclasses.replace(self.config, advantage="group")
            rows = [row for split in ("val", "train") for row in estimates(s, group, split, self.tangents)]
            rows += [difference(s, group, trace, self.tangents[trace][0]) for trace in (0.0, 0.9)]
            with open(LOG, "a") as file:
                for row in rows:
                    named = zip(("source", "trace", "value", "error", "afford"), row)
                    file.write(json.dumps(dict(seed=self.config.seed, step=s.t - 1, **dict(named))) + "\n")
        if s.t > max(AT):
            raise Measured
        return super().mu(s)

    def moved(self, s):
        if s.rollouts:
            self.tangents = {trace: amft.step_sensitivity(s.theta, s.g_rl, s.g_sft, s.mu, s.adam, last, trace, lr=s.lr)
                             for trace, last in self.tangents.items()}


def main(argv=None):
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    LOG.parent.mkdir(exist_ok=True)
    if not LOG.exists():
        LOG.write_text(json.dumps(dict(kind="spec", prompts=PROMPTS, samples=SAMPLES, afford=AFFORD, common=FLAGS)) + "\n")
    rows = lambda: [json.loads(line) for line in LOG.read_text().splitlines()]  # noqa: E731
    for seed in (200, 201, 202):  # no recorded run has these
        if max(AT) not in [row["step"] for row in rows()[1:] if row["seed"] == seed]:
            with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Measured):
                amft.main([*FLAGS.split(), "--method", "probe", "--seed", str(seed), "--out", f"{folder}/run"],
                          {"probe": Probe})
    print("\n".join(snr(rows())))


if __name__ == "__main__":
    main()
