"""Is the meta-gradient a signal? How large it is against its noise, for several traces and several ways to estimate it.

    python results/snr.py            # three seeds, about 15 minutes on one core; then the table
    python results/snr.py --table    # the table from the log alone

A fixed mixture (mu = 0.5) is trained as AMFT would be. At some of its steps, many conversations are sampled from the
stepped policy on validation prompts, and dU/dmu is estimated from them for every trace: with so many, the estimate is
good enough to tell its size from its noise. The noise is quoted for what a run can afford, 32 prompts x 8 samples.
Other estimates from the same policy: on training prompts, which a run samples anyway, conversation by conversation and
by the RL gradient alone (own_meta_gradient); and the difference of success between theta' shifted half a unit of mu up
and down, both sampled with the same random numbers. Log: results/snr.jsonl, table: results/snr.md.
"""

import argparse
import dataclasses
import json
import math
import random
import statistics
import sys
from pathlib import Path

import torch
from torch.nn.utils import vector_to_parameters
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import amft  # noqa: E402
from compare import SETTINGS  # noqa: E402

LOG = HERE / "snr.jsonl"
TRACES = (0.0, 0.5, 0.9, 0.98)
AT = (12, 25, 40)
PROMPTS, SAMPLES = 96, 16  # of a measurement
AFFORD = 32, 8  # of a meta-gradient in a run


def measure(model, tokenizer, episodes, state, sensitivities, config):
    """[(how, trace, dU/dmu, its standard error, that of 256 conversations)] from one set of conversations."""
    many = dataclasses.replace(config, samples=SAMPLES)
    rollouts = amft.explore(model, tokenizer, episodes, many)
    result, (P, G) = [], AFFORD
    amft.add_advantages(model, None, rollouts, many)
    blocks = torch.arange(len(rollouts.batch)).split(P * G)  # the RL gradient's spread shows in parts of 256
    grads = []
    for rows in blocks:
        part = dataclasses.replace(rollouts, batch=rollouts.batch[rows], advantages=rollouts.advantages[rows])
        grads.append((part, amft.rl_gradient(model, None, part, many)[0]))
    for trace, sensitivity in sensitivities.items():
        dlogps = torch.zeros(len(rollouts.batch))
        for rows in amft.chunks((rollouts.success.std(1) > 0).repeat_interleave(SAMPLES), 256):
            dlogps[rows] = amft.logp_sensitivity(model, state.theta, sensitivity[0], rollouts.batch[rows])
        dlogps = dlogps.view_as(rollouts.success)
        few = [amft.meta_gradient(rollouts.success[:, i:i + G], dlogps[:, i:i + G])[1] for i in range(0, SAMPLES, G)]
        few = statistics.mean(few) * math.sqrt(len(episodes) / P)
        result.append(("by conversations", trace, *amft.meta_gradient(rollouts.success, dlogps), few))
        own = [amft.own_meta_gradient(g, sensitivity[0], part)[0] for part, g in grads]
        result.append(("by RL gradient", trace, statistics.mean(own), statistics.stdev(own) / math.sqrt(len(own)),
                       statistics.stdev(own)))
    return result


def difference(model, tokenizer, episodes, state, sensitivity, config):
    """The finite difference of U over one unit of mu, with common random numbers, and its two standard errors."""
    success = []
    for sign in (0.5, -0.5):
        vector_to_parameters(state.theta + sign * sensitivity[0], model.parameters())
        torch.manual_seed(1)
        success.append(amft.rollout(model, tokenizer, episodes, AFFORD[1]).success)
    vector_to_parameters(state.theta, model.parameters())
    each = (success[0] - success[1]).mean(1)
    error = each.std().item() / math.sqrt(len(each))
    return each.mean().item(), error, error * math.sqrt(len(each) / AFFORD[0]) * math.sqrt(2)  # 256 for both together


def study(seed):
    config = amft.parse_config([*SETTINGS, "--method", "fixed", "--seed", str(seed)])
    config.device = "cpu"
    task, last = amft.make_task(config), config.steps
    model, tokenizer = amft.load_policy(config, task)
    theta = amft.flatten(model)
    torch.manual_seed(seed)
    state = amft.State(theta, amft.AdamState(torch.zeros_like(theta), torch.zeros_like(theta), 0), 0.5)
    rng = random.Random(f"signal {seed}")
    sensitivities = dict.fromkeys(TRACES)
    for step in tqdm(range(1, max(AT) + 1), desc=f"seed {seed}"):
        how = dict(lr=config.lr * (1 - (step - 1) / last), max_norm=config.max_norm)
        draw = lambda split, n: [task.sample(split, rng) for _ in range(n)]  # noqa: E731
        demos = amft.encode_demos(model, tokenizer, draw("train", config.sft_batch))
        g = g_sft = amft.sft_gradient(model, demos, config)[0]
        if step > config.warmup:
            rollouts = amft.explore(model, tokenizer, draw("train", config.prompts), config)
            amft.add_advantages(model, None, rollouts, config)
            g_rl = amft.rl_gradient(model, None, rollouts, config)[0]
            sensitivities = {trace: amft.step_sensitivity(state.theta, g_rl, g_sft, 0.5, state.adam, old, trace, **how)
                             for trace, old in sensitivities.items()}
            g = (g_rl + g_sft) / 2
        state.theta, state.adam = amft.adamw_step(state.theta, g, state.adam, **how)
        vector_to_parameters(state.theta, model.parameters())
        if step in AT:
            rows = [(f"{source} {how}", *values) for source in ("val", "train") for how, *values in measure(
                model, tokenizer, draw(source, PROMPTS), state, sensitivities, config)]
            episodes = draw("val", PROMPTS)
            rows += [("val by difference", trace, *difference(
                model, tokenizer, episodes, state, sensitivities[trace], config)) for trace in (0.0, 0.9)]
            with open(LOG, "a") as file:
                for source, trace, value, error, afford in rows:
                    file.write(json.dumps(dict(seed=seed, step=step, source=source, trace=trace, value=value,
                                               error=error, afford=afford)) + "\n")


def table():
    rows = [json.loads(line) for line in LOG.read_text().splitlines()]
    lines = ["# Is the meta-gradient a signal?", "", "Made by `python results/snr.py` from `snr.jsonl`: "
             f"{len({r['seed'] for r in rows})} seeds, after steps {', '.join(map(str, AT))} of a fixed mixture; "
             f"{PROMPTS} prompts x {SAMPLES} samples an estimate. Signal: root mean square of dU/dmu, less what the "
             "noise of the estimates adds to it. Noise: standard error of what a run can afford, 256 responses. z: their "
             "ratio; responses for z = 2: what a meta-gradient would have to sample to be that sure of its sign.", "",
             "| estimated on | trace | dU/dmu, mean | negative | signal | noise of 256 | z of 256 | for z = 2 |",
             "|---|---|---|---|---|---|---|---|"]
    for source in dict.fromkeys(r["source"] for r in rows):
        for trace in sorted({r["trace"] for r in rows if r["source"] == source}):
            own = [r for r in rows if (r["source"], r["trace"]) == (source, trace)]
            signal = statistics.mean(r["value"] ** 2 - r["error"] ** 2 for r in own)
            noise = math.sqrt(statistics.mean(r["afford"] ** 2 for r in own))
            z = math.sqrt(signal) / noise if signal > 0 else 0.0
            need = f"{256 * (2 / z) ** 2:,.0f}" if z > 0.01 else "no signal seen"
            lines.append(f"| {source} | {trace} | {statistics.mean(r['value'] for r in own):+.1e} | "
                         f"{sum(r['value'] < 0 for r in own)} of {len(own)} | {math.sqrt(max(signal, 0)):.1e} | "
                         f"{noise:.1e} | {z:.2f} | {need} |")
    (HERE / "snr.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="no measurements, only the table")
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        done = {json.loads(line)["seed"] for line in LOG.read_text().splitlines()} if LOG.exists() else set()
        for seed in (200, 201, 202):  # no recorded run has these
            if seed not in done:
                study(seed)
    table()


if __name__ == "__main__":
    main()
