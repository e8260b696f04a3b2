"""Variants of AMFT's controller: tried beside it, each through the same loop: python compare/rivals.py --method amft-pass.

Shapes: P prompts, G samples of each.
"""
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import amft  # noqa: E402

def pass_advantages(success, k):
    """Advantages of pass@k, P(one of k samples is right), for k <= G - 1 (PKPO, arXiv 2505.15201): (P, G) -> (P, G).

    With c of n samples right, sample i is in subsets of k of which a share 1, or rho(n - 1, c, k - 1) if i is wrong, is
    solved; the baseline is the share among the others' subsets, rho(n - 1, c - r_i, k). k = 1: r_i less the others' mean."""
    n, table = success.shape[1], {}
    def rho(n, c, k):  # that k of n, c of which are right, hold a right one
        return 1 - math.comb(n - c, k) / math.comb(n, k)
    for c in range(n + 1):
        for r in range(2):
            if r <= c < n + r:
                table[c, r] = k * ((1.0 if r else rho(n - 1, c, k - 1)) - rho(n - 1, c - r, k))
    return success.new_tensor([[table[sum(row), r] for r in row] for row in success.int().tolist()])

class Recent(amft.AMFT):
    """Evidence of the last ten looks or so, 50 steps, in place of 50 looks, 250 steps: it fades by 0.9, not by 0.98."""
    def estimates(self, s):
        shown, more = super().estimates(s), 0.9 / 0.98
        if any(error > 0 for _, error in shown):  # else update_mu leaves it as it is
            self.evidence = more * self.evidence[0], more ** 2 * self.evidence[1]
        return shown

class Rule(amft.AMFT):
    """U is success under the other rule, on the controller's deals."""
    on = "val_rule"

class PassVal(amft.AMFT):
    """U is pass@k on validation prompts; k falls from G - 1 to 1 at the run's end.

    Coverage is what imitation brings first; it becomes success only when exploration has time left to sharpen it."""
    def k(self, s):
        return max(1, math.ceil((self.config.samples - 1) * (1 - s.t / self.config.steps)))
    def given(self, s, seen):
        s.row["k"] = self.k(s)
        return pass_advantages(seen.success, s.row["k"]), 1.0

class Pass(PassVal):
    """The same on the step's own prompts, which needs no more samples."""
    defaults = dict(utility="train")
    def estimates(self, s):
        if not self.tangents:
            return []
        shown = amft.meta_gradient(s.model, self.tangents[0], s.rollouts, self.config, self.given(s, s.rollouts))
        s.row.update(zip(("meta_grad", "meta_se"), shown))
        return [shown]

class PassThroughout(Pass):
    """The same with k = 4 from first to last."""
    def k(self, s):
        return min(4, self.config.samples - 1)

class AutoWarmup(amft.AMFT):
    """Warm-up by imitation until the loss on demonstrations of unseen deals has stopped falling (no new low in
    `patience` looks, one every 10 steps); H* is set there."""
    low, waited, over, patience = math.inf, 0, False, 3
    def explores(self, t):
        return self.over or t > self.config.steps // 2
    def moved(self, s):
        super().moved(s)
        if not self.over and s.t % 10 == 0:
            deals = [s.task.sample("val", s.rng) for _ in range(256)]
            batch = amft.encode_demos(s.model, s.tokenizer, deals)
            with torch.no_grad():
                loss = amft.sft_loss(amft.logps_of(s.model, batch), batch.mask).item()
            s.row["val_loss"] = loss
            self.low, self.waited = min(loss, self.low), 0 if loss < self.low else self.waited + 1
            self.over = self.waited >= self.patience

CONTROLLERS = {"amft-recent": Recent, "amft-rule": Rule, "amft-pass": Pass, "amft-pass4": PassThroughout,
               "amft-pass-val": PassVal, "amft-auto": AutoWarmup}
