"""Variants of AMFT's controller, tried beside it: python compare/rivals.py --method amft-pass.

Each runs through the same loop. Shapes: P prompts, G samples of each.
"""

import copy
import math
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import amft  # noqa: E402
import tasks  # noqa: E402
from compare.logs import name_and_seed, read  # noqa: E402
from harness.arguments import CONTROLLER, MethodFlags  # noqa: E402


def holds_a_right_one(n, c, k):
    """The share of the subsets of k of n samples, c of them right, that hold a right one."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_advantages(success, k):
    """Advantages of pass@k, P(one of k samples is right), for k <= G - 1: (P, G) -> (P, G).

    PKPO, arXiv 2505.15201. Of the subsets of k that hold sample i, which share is solved? Less the
    same share among the others' subsets, the baseline, times k. k = 1: r_i less the others' mean."""
    n = success.shape[1]

    def advantage(c, right):  # of a sample where c of n are right
        with_it = 1.0 if right else holds_a_right_one(n - 1, c, k - 1)
        without_it = holds_a_right_one(n - 1, c - right, k)
        return k * (with_it - without_it)
    rows = success.int().tolist()
    return success.new_tensor([[advantage(sum(row), right) for right in row] for row in rows])


class Null(amft.Controller):
    """AMFT told nothing: each estimate is replaced by noise of its own error. A rule must beat it."""

    def estimates(self, step):
        rng = random.Random(f"null {self.config.seed} {step.t}")
        return [(rng.gauss(0, error), error) for _, error in super().estimates(step)]


def replayed(runs, seed, steps):
    """{step: mu} of another seed's run among those named RUNS-SEED: the next seed's, after the last the first.

    ValueError where there is none, or its log is shorter."""
    if not runs:
        raise ValueError("--method amft-replay: needs --replay RUNS, as in runs/compare/worn/amft of amft-20, amft-21")
    runs = Path(runs)
    found = [(*name_and_seed(log.parent, runs.parent), log.parent)
             for log in runs.parent.glob(f"{runs.name}-*/metrics.jsonl") if log.parent.name.rpartition("-")[2].isdecimal()]
    others = {own: folder for name, own, folder in found if name == runs.name and own != seed}
    if not others:
        raise ValueError(f"--replay {runs}: there is no run {runs.name}-SEED of another seed than {seed}")
    chosen = others[min((other for other in others if other > seed), default=min(others))]
    path = {row["step"]: row["mu"] for row in read(chosen) if row["kind"] == "step"}
    if not path.keys() >= set(range(1, steps + 1)):
        raise ValueError(f"--replay {runs}: the log of {chosen.name} has not all of --steps {steps}")
    return path


class Replay(amft.Method):
    """mu step by step as another seed's run had it: does AMFT's feedback count, or mu's path alone?

    The share of --responses that AMFT's looks take stays unused, so it trains on as many as AMFT."""

    def __init__(self, config, *of_task):
        super().__init__(config, *of_task)
        self.path = replayed(config.replay, config.seed, config.steps)

    def choose_mu(self, step):
        return self.path[step.t] if step.rollouts else 1.0


class Sum(amft.Controller):
    """AMFT as it was: adds up dU/dmu, and moves mu in each step by the sign of the sum, as far as it is sure.

    It integrates twice, so it never rests: of noise alone 3 runs in 5 end at a limit. The variants below were tried
    with this rule. (Then a look with one or two informative prompts counted, too.)"""

    def choose_mu(self, step):
        if step.rollouts is None:
            return 1.0
        entropy = step.rollouts.entropy
        if self.target_entropy is None:
            self.target_entropy = entropy
        seen = [one for one in (self.estimates(step) if self.sensitivity else []) if one[1] > 0]
        meta_force = 0.0
        if seen:
            total = 0.98 * self.evidence[0] + sum(slope for slope, _ in seen)
            variance = 0.98 ** 2 * self.evidence[1] + sum(error ** 2 for _, error in seen)
            meta_force = self.config.eta_mu * math.erf(total / math.sqrt(2 * variance))
            self.evidence = (total, variance)
        entropy_force = self.config.eta_h * (self.target_entropy - entropy)
        step.metrics.update(meta_force=meta_force, entropy_force=entropy_force)
        mu = self.mu + meta_force + entropy_force
        self.mu = min(max(mu, self.config.mu_min), self.config.mu_max)
        return self.mu


class Recent(Sum):
    """Evidence of the last ten looks or so, 50 steps, not of 50 looks: it fades by 0.9, not by 0.98."""

    def estimates(self, step):
        estimates = super().estimates(step)
        if any(error > 0 for _, error in estimates):  # else the evidence stays as it is
            total, variance = self.evidence
            more = 0.9 / 0.98  # the sum does the rest
            self.evidence = (more * total, more ** 2 * variance)
        return estimates


class Rule(Sum):
    """U is success under the other rule, on the controller's deals."""
    split = "val_rule"

    def __init__(self, config, task=None, policy=(None, None)):
        super().__init__(config, task, policy)
        if not isinstance(task, tasks.GeneralPoints):  # another would look for such a problem for ever
            raise ValueError(f"--method amft-rule: only General Points has another rule to ask for, not --task {config.task}")


class Cold(amft.Controller):
    """U is success at temperature 0.3, not at that of training: what merely makes the policy certain raises it less."""

    def estimates(self, step):
        config = self.config
        self.config = copy.copy(config)
        self.config.temperature = 0.3
        estimates = super().estimates(step)
        self.config = config
        return estimates


class PassVal(Sum):
    """U is pass@k on validation prompts; k falls from G - 1 to 1 at the run's end.

    Coverage is what imitation brings first; it becomes success only when exploration has time left
    to sharpen it."""

    def k(self, t):
        left = 1 - t / self.config.steps
        return max(1, math.ceil((self.config.samples - 1) * left))

    def val_advantages(self, step, val):
        k = self.k(step.t)
        step.metrics["k"] = k
        return pass_advantages(val.success, k), 1.0


class Pass(PassVal):
    """U is pass@k, k falling likewise, on the step's own prompts, which needs no more samples."""

    def estimates(self, step):
        if len(step.rollouts.success) < 2:  # one prompt has no error
            return []
        advantages = self.val_advantages(step, step.rollouts)
        slope, error = amft.meta_gradient(
            self.policy[0], self.sensitivity[0], step.rollouts, self.config, advantages)
        step.metrics.update(meta_grad=slope, meta_se=error)
        return [(slope, error)]


class PassThroughout(Pass):
    """U is pass@4 on the step's own prompts, from first to last."""

    def k(self, t):
        return min(4, self.config.samples - 1)


class AutoWarmup(Sum):
    """Warm-up by imitation until the loss on demonstrations of unseen deals stops falling.

    That is, until no new low in `patience` looks, one every 10 steps; H* is set there."""
    patience = 3
    low = math.inf  # the lowest loss seen
    waited = 0  # looks since
    over = False  # the warm-up is

    def state_dict(self):
        own = dict(low=self.low, waited=self.waited, over=self.over)
        return {**super().state_dict(), **own}

    def explores(self, t):
        return self.over or t > self.config.steps // 2

    def before_update(self, step, theta, adam, first):
        super().before_update(step, theta, adam, first)
        if first and not self.over and step.t % 10 == 0:
            loss = self.unseen_loss(step.rng)
            step.metrics["val_loss"] = loss
            self.waited = 0 if loss < self.low else self.waited + 1
            self.low = min(loss, self.low)
            self.over = self.waited >= self.patience

    @torch.no_grad()
    def unseen_loss(self, rng):
        model, tokenizer = self.policy
        deals = [self.task.sample("val", rng) for _ in range(256)]
        batch = amft.encode_demos(model, tokenizer, deals)
        return amft.sft_loss(amft.logps_of(model, batch), batch.response_mask).item()


CONTROLLERS = {
    "amft-null": Null,
    "amft-replay": Replay,
    "amft-cold": Cold,
    "amft-sum": Sum,
    "amft-recent": Recent,
    "amft-rule": Rule,
    "amft-pass": Pass,
    "amft-pass4": PassThroughout,
    "amft-pass-val": PassVal,
    "amft-auto": AutoWarmup,
}
ADDS_UP = dict(eta_mu=0.05, eta_h=0.05)  # the most in a step; in a step and nat
METHOD_FLAGS = {name: MethodFlags(defaults=ADDS_UP) for name in CONTROLLERS}
METHOD_FLAGS["amft-null"] = MethodFlags()
METHOD_FLAGS["amft-cold"] = MethodFlags(defaults=dict(utility="val"))
METHOD_FLAGS["amft-replay"] = MethodFlags(["mu", *CONTROLLER])
METHOD_FLAGS["amft-pass"] = METHOD_FLAGS["amft-pass4"] = MethodFlags(defaults=dict(ADDS_UP, utility="train"))
