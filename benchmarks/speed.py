"""Speed, side by side in one process: our RL-only step against TRL's GRPOTrainer. (Of the methods: cost.py.)

    pip install trl==1.16.0 && python benchmarks/speed.py

Same base policy, same prompts, same sampling (32 prompts x 8 samples, temperature 1, at most 40 tokens, one optimiser
step each), the two alternating step by step so that a noisy machine disturbs both alike. Learning rates are 0: the
policy stays the base, every step is a draw of the same work, and the two mean rewards must agree, which shows that
both sample and grade the same thing.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.utils import vector_to_parameters

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import amft  # noqa: E402
from tasks import RULE_10, Deal, GeneralPoints, load_policy  # noqa: E402


class Ours:
    """Our steps on a policy that never moves."""

    def __init__(self, episodes, **settings):
        self.config = amft.Config(device="cpu", lr=0.0, **settings)
        self.task, self.rng, self.episodes = GeneralPoints(), random.Random(0), episodes
        self.model, self.tokenizer = load_policy(self.config, self.task)
        self.theta = amft.flatten(self.model)
        self.adam = amft.AdamState(torch.zeros_like(self.theta), torch.ones_like(self.theta), 1)
        self.rewards = []

    def draw(self):
        return self.rng.sample(self.episodes, self.config.prompts)

    def rl_step(self):
        c = self.config
        rollouts = amft.rollout(self.model, self.tokenizer, self.draw(), c.samples, c.max_new_tokens, c.temperature)
        self.rewards.append(rollouts.success.mean().item())
        advantages = amft.advantages_of(self.model, None, rollouts, c)
        gradient = amft.rl_gradient(self.model, rollouts.batch, advantages, c)[0]
        self.theta, _ = amft.adamw_step(self.theta, gradient, self.adam, lr=0.0)
        vector_to_parameters(self.theta, self.model.parameters())


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def against_trl(ours, steps):
    """Seconds of our steps and of TRL's, alternating; TRL's mean rewards."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Alternate(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            trl_seconds.append(time.perf_counter() - self.start)
            our_seconds.append(timed(ours.rl_step))

    def reward(prompts, completions, numbers, **kwargs):
        deals = [Deal(ranks=(), stated=RULE_10, numbers=tuple(n), formula="") for n in numbers]
        values = [float(deal.grade(text) == "correct") for deal, text in zip(deals, completions)]
        trl_rewards.append(statistics.mean(values))
        return values

    trl_seconds, our_seconds, trl_rewards = [], [], []
    model, tokenizer = load_policy(ours.config, ours.task)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, learning_rate=0.0, max_steps=steps, beta=0.0, temperature=1.0,
            per_device_train_batch_size=ours.config.prompts * ours.config.samples, gradient_checkpointing=False,
            num_generations=ours.config.samples, max_completion_length=ours.config.max_new_tokens, top_k=0, top_p=1.0,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
        data = Dataset.from_list([dict(prompt=e.prompt, numbers=list(e.numbers)) for e in ours.episodes])
        GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer,
                    callbacks=[Alternate()]).train()
    return our_seconds, trl_seconds, trl_rewards


def show(name, seconds):
    quartiles = statistics.quantiles(seconds, n=4)
    print(f"{name:24} median {quartiles[1]:.3f} s  (quartiles {quartiles[0]:.3f}, {quartiles[2]:.3f}; n = {len(seconds)})")
    return quartiles[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of each kind")
    steps = parser.parse_args().steps
    rng, task = random.Random(1), GeneralPoints()
    episodes = [task.sample("train", rng) for _ in range(2000)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")

    ours = Ours(episodes, advantage="group")  # the group-relative baseline, as TRL's
    ours.rl_step()  # warm the caches
    ours.rewards.clear()
    try:
        our_seconds, trl_seconds, trl_rewards = against_trl(ours, steps)
    except ImportError:
        show("our RL-only step", [timed(ours.rl_step) for _ in range(steps)])
        sys.exit("no TRL here: pip install trl==1.16.0")
    ratio = show("TRL GRPOTrainer step", trl_seconds[1:]) / show("our RL-only step", our_seconds[1:])
    print(f"TRL seconds / ours: {ratio:.2f}")
    for name, rewards in (("TRL", trl_rewards), ("ours", ours.rewards)):
        error = statistics.stdev(rewards) / len(rewards) ** 0.5
        print(f"mean reward, {name}: {statistics.mean(rewards):.4f} +- {error:.4f}")


if __name__ == "__main__":
    main()
