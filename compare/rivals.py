"""Rivals of AMFT: each one's published rule in a few lines, run through the same loop, amft.train.

    python compare/rivals.py --method luffy --task gp                      # with every flag of amft.py: --help
    python compare/rivals.py --method luffy --task gp --responses 25600    # so many samples in all, for a fair race

A rule chooses the weight mu of L = (1 - mu) L_RL + mu L_SFT, one number or one of each prompt, the loss of a
demonstration's tokens, and the advantages of the samples. Everyone's are the loop, one AdamW, PPO-clip, the value
function phi, and one normalisation: each loss is a sum over response tokens divided by its batch's response tokens.
So where a paper has two optimisers, a KL term or an entropy bonus, this has not.

k is how many of a prompt's G samples are correct, A an advantage, p the probability of a demonstration's token,
sg a stop-gradient. Shapes: P prompts, G samples of each, B sequences, b of them in a micro-batch, T tokens.
"""
import copy
import dataclasses
import math
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import amft  # noqa: E402
from compare.controllers import CONTROLLERS  # noqa: E402

@dataclasses.dataclass
class Config(amft.Config):
    # Of the comparison
    responses: int = amft.flag(0, 0)  # share out so many samples evenly over the steps; 0: --prompts at each
    gate: float = amft.flag(0.0, 0, 1)  # hpt: imitate a prompt if at most this share of its samples is correct
    shape: float = amft.flag(0.1, 1e-6)  # luffy: gamma of p / (p + gamma)
    sasr: float = amft.flag(1.0, 0)  # sasr: gamma, the weight of the warm-up's gradient norm; larger: less SFT
    peak: float = amft.flag(0.9, 0, 1)  # cosine: mu at the first step
    valley: float = amft.flag(0.05, 0, 1)  # cosine: mu at the last step
    memory: float = amft.flag(0.9, 0, 1)  # gac: share of its proxies' running means that is kept at a step
    splits: str = amft.flag("")  # evaluate on these alone, comma-separated, and on all of them at --val-every

    def __post_init__(self):
        least = self.samples * (self.steps + self.prompts * looks(self, 1))
        if 0 < self.responses < least:
            raise ValueError(f"--responses {self.responses}: must be 0 or at least {least}, a prompt at each "
                                 "step and the controller's own")

# ----- One loss or the other -----

class DFT(amft.SFT):
    """arXiv 2508.05629 Eq. 9: L = -sum_t sg(p_t) log p_t."""
    unused, defaults = [*amft.SFT.unused, "imitation"], dict(warmup=0, imitation="rectified")

class SASR(amft.Method):
    """arXiv 2505.13026: a step is SFT with probability G_last / (G_last + gamma G_warm), else RL. G: norms of grad
    L_SFT, of the last SFT step (stale between them) and of the end of the warm-up."""
    unused, reads = ["mu", *amft.CONTROLLER], ["sasr"]
    imitates = lambda self, t: not self.explores(t)  # noqa: E731

    def explores(self, t):  # one draw a step, whoever asks and however often
        draw = random.Random(f"sasr {self.config.seed} {t}").random()
        return t > max(self.config.warmup, 1) and draw >= self.last / (self.last + self.config.sasr * self.warm)

    def mu(self, s):
        if s.demos:
            self.last = s.g_sft.norm().item() + 1e-12  # never 0 / 0
            self.warm = self.last if s.t <= max(self.config.warmup, 1) else self.warm
        return 1.0 if s.demos else 0.0

class ReLIFT(amft.Method):
    """arXiv 2506.07527: RL; prompts with k = 0 wait, newest first, until they fill an SFT step of their own."""
    unused, defaults = ["mu", "warmup", *amft.CONTROLLER], dict(warmup=0, sft_batch=16)
    buffer = ()
    explores = lambda self, t: len(self.buffer) < self.config.sft_batch  # noqa: E731
    imitates = lambda self, t: not self.explores(t)  # noqa: E731
    demonstrations = lambda self, s: self.buffer[:self.config.sft_batch]  # noqa: E731

    def mu(self, s):
        if s.demos:
            self.buffer = self.buffer[self.config.sft_batch:]
            return 1.0
        solved = s.rollouts.success.amax(1).tolist()
        self.buffer = (*(problem for problem, one in zip(s.problems, solved) if not one), *self.buffer)
        return 0.0

# ----- One mu for the whole loss -----

class Cosine(amft.Method):
    """CHORD-mu, arXiv 2508.11408: mu_t = valley + (peak - valley) (1 + cos(pi t / T)) / 2."""
    unused, defaults, reads = ["mu", "warmup", *amft.CONTROLLER], dict(warmup=0), ["peak", "valley"]

    def mu(self, s):
        c, progress = self.config, (s.t - 1) / max(self.config.steps - 1, 1)
        return c.valley + (c.peak - c.valley) * (1 + math.cos(math.pi * progress)) / 2

class CHORD(amft.Method):
    """CHORD-phi, arXiv 2508.11408: a fixed mu, L_SFT = -sum_t sg(p_t (1 - p_t)) log p_t (Eqs. 5-6 print no sg)."""
    unused, defaults = ["warmup", "imitation", *amft.CONTROLLER], dict(warmup=0, mu=0.1)

    def imitation_loss(self, s, logps, mask, tokens, rows):
        p = logps.detach().exp()
        return amft.sft_loss(p * (1 - p) * logps, mask, tokens)

def gac_proxies(s):
    """[mean (1 - A)^2, 10% trimmed variance of the demonstrations' mean -log p, variance of the samples' mean A]."""
    A, cut = s.advantages.values.sum(1).cpu() / s.rollouts.batch.mask.sum(1).cpu(), len(s.nll) // 10
    nll = torch.tensor(sorted(s.nll)[cut:len(s.nll) - cut])
    return [((1 - A) ** 2).mean().item(), nll.var(correction=0).item(), A.var(correction=0).item()]

def gac_mu(mu, gap, noise_sft, noise_rl, most):
    """Half way from 1/2 to argmin of (mu - 1/2)^2 gap + mu^2 noise_sft + (1 - mu)^2 noise_rl, by at most `most`."""
    best = (0.5 * gap + noise_rl) / (gap + noise_sft + noise_rl)
    return mu + max(-most, min(most, (best + 0.5) / 2 - mu))

def gac_step(s, mu, means, c):
    """(mu after the step's proxies, running means of these), each as it was before or None."""
    new, mu = gac_proxies(s), c.mu if mu is None else mu
    means = [c.memory * a + (1 - c.memory) * b for a, b in zip(means or new, new)]
    if (s.t - c.warmup) % c.meta_every == 0:
        mu = min(max(gac_mu(mu, *means, c.eta_mu), c.mu_min), c.mu_max)
    return mu, means

class GAC(amft.Method):
    """arXiv 2605.26184: mu -> argmin of (mu - 1/2)^2 D^2 + mu^2 s_S^2 + (1 - mu)^2 s_R^2, the proxies above.
    Published for longer runs: memory 0.99, every 10 steps (--meta-every) by at most 0.01 (--eta-mu)."""
    unused, defaults, reads = ["controller", "eta_h", "utility", "trace"], dict(mu_max=0.9), ["memory"]
    state = None, None

    def imitation_loss(self, s, logps, mask, tokens, rows):
        s.nll = [*getattr(s, "nll", ()), *(-(logps.detach() * mask).sum(1) / mask.sum(1)).tolist()]
        return super().imitation_loss(s, logps, mask, tokens, rows)

    def mu(self, s):
        self.state = gac_step(s, *self.state, self.config) if s.rollouts else self.state
        return self.state[0] if s.rollouts else 1.0

# ----- A mu of each prompt -----

class PerPrompt(amft.Method):
    """L = sum over the step's prompts p of (1 - mu_p) L_RL,p + mu_p L_SFT,p, with one demonstration of each.

    Algorithm 1 has one mu: the mean of mu_p. So mu_p / mu and (1 - mu_p) / (1 - mu) go inside the two losses."""
    unused, defaults = ["mu", "warmup", "sft_batch", *amft.CONTROLLER], dict(warmup=0)

    def demonstrations(self, s):
        return s.problems

    def weights(self, s):  # mu_p (P,); here k = 0
        return (s.rollouts.success.sum(1) == 0).float()

    def advantages(self, s):
        s.weights, A = self.weights(s), super().advantages(s)
        share = (1 - s.weights) / (1 - s.weights.mean()).clamp(min=1e-9)
        return A._replace(values=A.values * share.repeat_interleave(self.config.samples).unsqueeze(1))

    def imitation_loss(self, s, logps, mask, tokens, rows):
        share = s.weights / s.weights.mean().clamp(min=1e-9)
        return super().imitation_loss(s, logps, mask * share[rows].unsqueeze(1), tokens, rows)

    def mu(self, s):
        return s.weights.mean().item()

class SuperRL(PerPrompt):
    """arXiv 2506.01096: L = L_SFT on a prompt where max_i r_i = 0, else L_RL."""

class HPT(PerPrompt):
    """arXiv 2509.04419: L = L_SFT on a prompt where k / G <= gamma (--gate), else L_RL."""
    reads = ["gate"]

    def weights(self, s):
        return (s.rollouts.success.mean(1) <= self.config.gate).float()

class DyME(PerPrompt):
    """arXiv 2506.23061: where k = 0, the demonstration takes one of the G slots, with A = 1; the others have 0."""
    def imitation_loss(self, s, logps, mask, tokens, rows):
        return super().imitation_loss(s, logps, mask, tokens, rows) / self.config.samples

# ----- The demonstration joins its prompt's samples -----

def union_advantages(success):
    """Group advantages of samples and of a demonstration that joins them as correct: (P, G) -> (P, G), (P,)."""
    union, _ = amft.group_advantages(torch.cat([success, torch.ones_like(success[:, :1])], 1))
    return union[:, :-1], union[:, -1]

class LUFFY(PerPrompt):
    """arXiv 2504.14945: a demonstration joins its prompt's samples, and its loss is -A p / (p + gamma).

    A of the union (Eq. 4), not divided by each prompt's own std, as in its code; PPO-clip as in its paper alone."""
    unused, reads = [*PerPrompt.unused, "imitation", "advantage", "reward"], ["shape"]
    defaults = dict(warmup=0, advantage="group")
    mu = lambda self, s: 1 / (self.config.samples + 1)  # noqa: E731  # the demonstration's share of the union

    def advantages(self, s):
        A, s.A = union_advantages(s.rollouts.success)
        return amft.Advantages(A.reshape(-1, 1) * s.rollouts.batch.mask, 1.0)

    def imitation_loss(self, s, logps, mask, tokens, rows):
        p = logps.exp()
        return amft.sft_loss(s.A[rows].unsqueeze(1) * p / (p + self.config.shape), mask, tokens)

class SRFT(PerPrompt):
    """arXiv 2506.19767 Eqs. 8, 12, 13: L = 0.5 e^-H L_SFT - A p + 0.1 e^H E[-log pi(y+)] + E[log pi(y-)], sg(H).

    A as LUFFY's. A sum has no mu: 1/2 of each. Its code has e^+H before L_SFT; the last term is unbounded."""
    unused, defaults = LUFFY.unused, LUFFY.defaults
    mu = lambda self, s: 0.5  # noqa: E731

    def advantages(self, s):
        s.A = union_advantages(s.rollouts.success)[1]
        A = torch.where(s.rollouts.success > 0, 0.1 * math.exp(s.rollouts.entropy), -1.0)
        return amft.Advantages(A.reshape(-1, 1) * s.rollouts.batch.mask, 1.0)

    def imitation_loss(self, s, logps, mask, tokens, rows):
        gain = 0.5 * math.exp(-s.rollouts.entropy) * logps + s.A[rows].unsqueeze(1) * logps.exp()
        return amft.sft_loss(gain, mask, tokens)

# ----- Equal budgets of samples -----

def looks(config, t):
    """How often AMFT still samples on val, from step t on."""
    if not config.method.startswith("amft") or config.utility == "train" or not config.eta_mu:
        return 0
    return sum((u - config.warmup) % max(config.meta_every, 1) == 0
               for u in range(max(t, config.warmup + 2), config.steps + 1))

class EqualBudget:
    """Before a method: shares out --responses, AMFT's on val among them, evenly over the steps that explore."""
    spent = explored = first = 0

    def prompts(self, s):
        c, self.first, self.explored = self.config, self.first or s.t, self.explored + 1
        if c.responses:
            later, left = c.steps - s.t, (c.responses - self.spent) // c.samples - c.prompts * looks(c, s.t)
            # sasr and relift do not explore at each step: as often from now on as so far, and some may stay unused.
            steps = max(round(self.explored / (s.t - self.first + 1) * (later + 1)), 1)
            self.config = copy.copy(c)
            self.config.prompts = min(left // steps, left - later, c.demos)  # one is kept for each later step
        s.problems, self.config = super().prompts(s), c
        return s.problems

    def moved(self, s):
        self.spent += 0 if s.update else s.sampled
        super().moved(s)

RIVALS = {"dft": DFT, "sasr": SASR, "relift": ReLIFT, "cosine": Cosine, "chord": CHORD, "gac": GAC,
          "superrl": SuperRL, "hpt": HPT, "dyme": DyME, "luffy": LUFFY, "srft": SRFT}

def compared(name, cls):
    """The method with the budget before it, and without the flags here that belong to others."""
    others = {f.name for f in dataclasses.fields(Config)} - {f.name for f in dataclasses.fields(amft.Config)} - {"splits"}
    others -= {*getattr(cls, "reads", ()), *(() if "prompts" in cls.unused else ("responses",))}
    return type(name, (EqualBudget, cls), dict(unused=[*cls.unused, *others], __doc__=cls.__doc__))

METHODS = {name: compared(name, cls) for name, cls in {**amft.METHODS, **CONTROLLERS, **RIVALS}.items()}

class Run(amft.Run):
    def report(self, t, model, tokenizer, task, config, splits=None):
        if only := getattr(config, "splits", ""):  # what uses amft alone has none
            if not {*only.split(",")} <= {*task.splits}:
                raise ValueError(f"--splits {only}: must be of {', '.join(task.splits)}")
            task.splits = {split: text for split, text in task.splits.items() if split in only.split(",")}
            splits = splits and [*task.splits]
        super().report(t, model, tokenizer, task, config, splits)

def main(argv=None):
    amft.Run = Run
    amft.main(argv, METHODS, Config)

if __name__ == "__main__":
    main()
