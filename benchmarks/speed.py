"""Speed: a default AMFT step and its parts, then our RL-only step against TRL's GRPOTrainer. (Of the methods: cost.py.)

    pip install trl==1.16.0 && python benchmarks/speed.py
    python benchmarks/speed.py --device cpu --steps 12
    python benchmarks/speed.py --model FOLDER --bf16 --prompts 16 --max-new-tokens 100   # SmolLM2: recipes/smollm2.py

The AMFT step is that of `python amft.py --task gp`: 8 prompts x 8 samples, 32 demonstrations. Against TRL:
same policy, same prompts, same sampling (32 prompts x 8 samples, temperature 1, at most 40 tokens, one
optimiser step each), the two alternating step by step so that a noisy machine disturbs both alike.
Learning rates are 0: the policy stays as it is, every step is a draw of the same work, and the two mean
rewards must agree, which shows that both sample and grade the same thing. Without TRL: ours alone.
Goals, on one H100 that does nothing else: 0.08 s for the AMFT step, and 4 times TRL's speed.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import amft  # noqa: E402
from harness.loading import device_of  # noqa: E402
from tasks import RULE_10, Deal, GeneralPoints  # noqa: E402


def where(device):
    """The device, the versions and the threads, in a line."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return (f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, "
            f"{torch.get_num_threads()} threads")


def finish_work(device):
    """Wait for what a GPU still does."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Parts:
    """Seconds of the parts of steps, each waited for to its end."""

    def __init__(self, device):
        self.device, self.seconds = device, {}

    def timed(self, name, function, *args, **how):
        start = time.perf_counter()
        result = function(*args, **how)
        finish_work(self.device)
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result


class DefaultStep:
    """Steps of `python amft.py --task gp`, without val, on a policy that never moves."""

    def __init__(self, device):
        task = GeneralPoints()
        self.config = amft.Config(device=device, **task.defaults)
        self.rng = random.Random(0)
        self.problems = task.training(2000, self.rng)
        self.model, self.tokenizer = amft.load_policy(self.config, task, amft)
        self.method = amft.Controller(self.config, task, (self.model, self.tokenizer))
        self.theta = amft.flatten(self.model)
        self.adam = amft.AdamState(torch.zeros_like(self.theta), torch.ones_like(self.theta), 1)
        self.sensitivity = None
        self.parts = Parts(device)

    def take(self):
        config, model, timed = self.config, self.model, self.parts.timed
        start = time.perf_counter()
        prompts = self.rng.sample(self.problems, config.prompts)
        rollouts = timed("rollout", amft.rollout, model, self.tokenizer, prompts, config.samples,
                         config.max_new_tokens, config.temperature)
        advantages = amft.advantages_of(model, None, rollouts, config)
        chosen = self.rng.sample(self.problems, config.sft_batch)
        demos = timed("encode demonstrations", amft.encode_demos, model, self.tokenizer, chosen)
        step = amft.Step(1, lr=0.0, rng=self.rng, rollouts=rollouts, demos=demos)
        g_rl, _, _ = timed("gradient of RL", amft.rl_gradient, model, rollouts.batch, advantages, config)
        g_sft, _, _ = timed("gradient of SFT", amft.sft_gradient, model, demos, config,
                            partial(self.method.token_weights, step))
        self.sensitivity = timed("sensitivity", amft.step_sensitivity, self.theta, g_rl, g_sft, 0.5, self.adam,
                                 self.sensitivity, config.trace, lr=0.0)
        theta, _ = timed("AdamW", amft.adamw_step, self.theta, 0.5 * (g_rl + g_sft), self.adam, lr=0.0)
        amft.set_theta(model, theta)
        finish_work(config.device)
        return time.perf_counter() - start


def default_step(device, steps):
    """Print the seconds of a default AMFT step, and of its parts."""
    default = DefaultStep(device)
    for _ in range(2):  # a step of warming up, and one that captures with the sensitivity there
        default.take()
    default.parts.seconds.clear()
    show("default AMFT step", [default.take() for _ in range(steps)])
    for name, seconds in default.parts.seconds.items():
        show(f"  {name}", seconds)


class Ours:
    """Our steps on a policy that never moves."""

    def __init__(self, episodes, **settings):
        self.config = amft.Config(lr=0.0, **settings)
        self.task = GeneralPoints()
        self.rng = random.Random(0)
        self.episodes = episodes
        self.model, self.tokenizer = amft.load_policy(self.config, self.task, amft)
        self.theta = amft.flatten(self.model)
        self.adam = amft.AdamState(torch.zeros_like(self.theta), torch.ones_like(self.theta), 1)
        self.rewards = []

    def rl_step(self):
        config = self.config
        prompts = self.rng.sample(self.episodes, config.prompts)
        rollouts = amft.rollout(self.model, self.tokenizer, prompts, config.samples,
                                config.max_new_tokens, config.temperature)
        self.rewards.append(rollouts.success.mean().item())
        advantages = amft.advantages_of(self.model, None, rollouts, config)
        gradient, _, _ = amft.rl_gradient(self.model, rollouts.batch, advantages, config)
        self.theta, _ = amft.adamw_step(self.theta, gradient, self.adam, lr=0.0)
        amft.set_theta(self.model, self.theta)

    def timed_step(self):
        """Its seconds."""
        start = time.perf_counter()
        self.rl_step()
        finish_work(self.config.device)
        return time.perf_counter() - start


def against_trl(ours, steps):
    """Seconds of our steps and of TRL's, alternating; TRL's mean rewards."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    our_seconds, trl_seconds, trl_rewards = [], [], []

    class Alternate(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            finish_work(ours.config.device)
            trl_seconds.append(time.perf_counter() - self.start)
            our_seconds.append(ours.timed_step())

    def reward(prompts, completions, numbers, **kwargs):
        values = []
        for own, text in zip(numbers, completions):
            deal = Deal(ranks=(), stated=RULE_10, numbers=tuple(own), formula="")
            values.append(float(deal.grade(text) == "correct"))
        trl_rewards.append(statistics.mean(values))
        return values

    config = ours.config
    model, tokenizer = amft.load_policy(config, ours.task, amft)
    rows = [dict(prompt=deal.prompt, numbers=list(deal.numbers)) for deal in ours.episodes]
    with tempfile.TemporaryDirectory() as folder:
        # A policy in bfloat16 is loaded as such, as ours is.
        how = GRPOConfig(
            output_dir=folder, use_cpu=config.device == "cpu", bf16=False, learning_rate=0.0,
            max_steps=steps, beta=0.0, temperature=1.0, top_k=0, top_p=1.0,
            per_device_train_batch_size=config.prompts * config.samples,
            num_generations=config.samples, max_completion_length=config.max_new_tokens,
            gradient_checkpointing=False, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True)
        trainer = GRPOTrainer(
            model=model, reward_funcs=reward, args=how, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[Alternate()])
        trainer.train()
    return our_seconds, trl_seconds, trl_rewards


def show(name, seconds):
    """Print their median and quartiles; the median."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
    print(f"{name:24} median {median:.3f} s  "
          f"(quartiles {low:.3f}, {high:.3f}; n = {len(seconds)})")
    return median


def show_rewards(name, rewards):
    error = statistics.stdev(rewards) / len(rewards) ** 0.5 if len(rewards) > 1 else float("nan")
    print(f"mean reward, {name}: {statistics.mean(rewards):.4f} +- {error:.4f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of each kind, at least 1")
    parser.add_argument("--device", default="auto", help="auto: the first here of cuda, mps, cpu")
    parser.add_argument("--model", default="base", help="a checkpoint for the RL step in place of the base")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: must be at least 1")
    try:
        device = device_of(args.device)
    except ValueError as error:
        parser.error(str(error))
    rng, task = random.Random(1), GeneralPoints()
    episodes = [task.sample("train", rng) for _ in range(2000)]
    print(where(device), time.strftime("%Y-%m-%d"), sep=", ")
    default_step(device, args.steps)
    ours = Ours(  # the group baseline, as TRL's
        episodes, device=device, advantage="group", model=args.model, prompts=args.prompts, samples=args.samples,
        max_new_tokens=args.max_new_tokens, bf16=int(args.bf16))
    ours.rl_step()  # warms the caches
    ours.rewards.clear()
    try:
        our_seconds, trl_seconds, trl_rewards = against_trl(ours, args.steps)
    except ImportError:
        show("our RL-only step", [ours.timed_step() for _ in range(args.steps)])
        sys.exit("no TRL here to compare with: pip install trl==1.16.0")
    warm = slice(1, None) if args.steps > 1 else slice(None)  # TRL's first step warms its caches
    trl = show("TRL GRPOTrainer step", trl_seconds[warm])
    own = show("our RL-only step", our_seconds[warm])
    print(f"TRL seconds / ours: {trl / own:.2f}")
    show_rewards("TRL", trl_rewards)
    show_rewards("ours", ours.rewards)


if __name__ == "__main__":
    main()
