"""Rivals of AMFT: each one's published rule in a few lines, run through the same loop, amft.train.

    python compare/rivals.py                                   # the list of them
    python compare/rivals.py --method luffy --task gp          # with every flag of amft.py: --help
    python compare/rivals.py --method luffy --task gp --responses 25600    # for a fair race

A rule chooses the weight mu of L = (1 - mu) L_RL + mu L_SFT, one number or one of each prompt, the
weights of a demonstration's tokens, and the advantages of the samples. Everyone's are the loop, one
AdamW, PPO-clip, the value function phi, and one normalisation: each loss is a sum over response
tokens divided by its batch's response tokens. So where a paper has two optimisers, a KL term or an
entropy bonus, this has not.

A demonstration's loss is a constant weight times -log p, whose gradient is the published loss's:
of -f(p) that is the weight p f'(p).

k is how many of a prompt's G samples are correct, A an advantage, p the probability of a
demonstration's token, sg a stop-gradient. Shapes: P prompts, G samples of each, B sequences, b of
them in a micro-batch, T tokens.
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
from compare import controllers  # noqa: E402
from compare.experts import EXPERTS  # noqa: E402
from harness.arguments import CONTROLLER, MethodFlags  # noqa: E402

TASKS = {**amft.TASKS, **EXPERTS}


@dataclasses.dataclass
class Config(amft.Config):
    # Of the comparison
    responses: int = amft.flag(0, "so many samples in all, evenly; 0: --prompts at each step", 0)
    splits: str = amft.flag("", "only these, comma-separated, and all of them at --val-every")
    before: int = amft.flag(1, "evaluate before training, too; 0: no", 0, 1)
    shown: int = amft.flag(0, "imitate only the first so many problems' demonstrations; 0: all", 0)
    graded: int = amft.flag(0, "imitate only the demonstrations that the grader accepts; 0: all", 0, 1)
    # Of a rival
    gate: float = amft.flag(0.0, "hpt: imitate where at most this share is correct", 0, 1)
    shape: float = amft.flag(0.1, "luffy: gamma of p / (p + gamma)", 1e-6)
    sasr: float = amft.flag(1.0, "sasr: gamma, of the warm-up's gradient; larger: less SFT", 0)
    peak: float = amft.flag(0.9, "cosine: mu at the first step", 0, 1)
    valley: float = amft.flag(0.05, "cosine: mu at the last step", 0, 1)
    memory: float = amft.flag(0.9, "gac: share of its running means that a step keeps", 0, 1)
    replay: str = amft.flag("", "amft-replay: takes mu from the log of RUNS-SEED, another seed's")

    def __post_init__(self):
        least = self.samples * (self.steps + self.prompts * looks(self, 1))
        if 0 < self.responses < least:
            raise ValueError(f"--responses {self.responses}: must be 0 or at least {least}, a prompt "
                             "at each step and the controller's own")
        if self.shown > self.demos:
            raise ValueError(f"--shown {self.shown}: must be at most --demos, {self.demos}")
        if self.splits:
            known = list(amft.make_task(self, TASKS).splits)
            chosen = self.splits.split(",")
            if not set(chosen) <= set(known):
                raise ValueError(f"--splits {self.splits}: must be of {', '.join(known)}")
            self.splits = ",".join(split for split in known if split in chosen)


# ----- One loss or the other -----


class DFT(amft.SFT):
    """arXiv 2508.05629 Eq. 9: SFT with L = -sum_t sg(p_t) log p_t."""  # --imitation rectified


class SASR(amft.Method):
    """arXiv 2505.13026: a step is SFT with probability G_last / (G_last + gamma G_warm), else RL.

    G: norms of grad L_SFT, of the last SFT step (stale between them) and of the warm-up's end."""
    last = None
    warm = None

    def state_dict(self):
        return dict(last=self.last, warm=self.warm)

    def warms_up(self, t):
        return t <= max(self.config.warmup, 1)

    def explores(self, t):
        if self.warms_up(t):
            return False
        draw = random.Random(f"sasr {self.config.seed} {t}").random()  # one a step, whoever asks
        return draw >= self.last / (self.last + self.config.sasr * self.warm)

    def imitates(self, t):
        return not self.explores(t)

    def choose_mu(self, step):
        if step.demos is None:
            return 0.0
        self.last = step.g_sft.norm().item() + 1e-12  # never 0 / 0
        if self.warms_up(step.t):
            self.warm = self.last
        return 1.0


class ReLIFT(amft.Method):
    """arXiv 2506.07527: RL; prompts with k = 0 wait for an SFT step of their own.

    It comes when they fill one, and takes the newest first."""
    chosen = ()  # the step's prompts
    waiting = ()

    def state_dict(self):
        return dict(waiting=self.waiting)

    def explores(self, t):
        return len(self.waiting) < self.config.sft_batch

    def imitates(self, t):
        return not self.explores(t)

    def choose_prompts(self, step):
        self.chosen = super().choose_prompts(step)
        return self.chosen

    def choose_demos(self, step):
        return self.waiting[:self.config.sft_batch]

    def choose_mu(self, step):
        if step.demos:
            self.waiting = self.waiting[self.config.sft_batch:]
            return 1.0
        solved = step.rollouts.success.any(1).tolist()
        unsolved = [problem for problem, one in zip(self.chosen, solved) if not one]
        self.waiting = (*unsolved, *self.waiting)
        return 0.0


# ----- One mu for the whole loss -----


class Cosine(amft.Method):
    """CHORD-mu, arXiv 2508.11408: mu_t = valley + (peak - valley) (1 + cos(pi t / T)) / 2."""

    def choose_mu(self, step):
        peak, valley = self.config.peak, self.config.valley
        progress = (step.t - 1) / max(self.config.steps - 1, 1)
        return valley + (peak - valley) * (1 + math.cos(math.pi * progress)) / 2


class CHORD(amft.Method):
    """CHORD-phi, arXiv 2508.11408: a fixed mu, L_SFT = -sum_t sg(p_t (1 - p_t)) log p_t.

    (Its Eqs. 5-6 print no sg.)"""

    def token_weights(self, step, logps, rows):
        p = logps.exp()
        return p * (1 - p)


class TrSFT(amft.Method):
    """TRAPO, arXiv 2512.17636: a fixed mu, L_SFT = -sum_t p_t / max(sg p_t, 0.1).

    Its growing prefixes of the demonstration are left out."""

    def token_weights(self, step, logps, rows):
        return (logps.exp() / 0.1).clamp(max=1.0)


class AMFTWithTrSFT(TrSFT, amft.Controller):
    """AMFT as it is, with TrSFT's loss (TRAPO, arXiv 2512.17636) as L_SFT."""


def gac_proxies(advantages, mask, nll):
    """[mean (1 - A)^2, trimmed variance of the demonstrations, variance of A] of a step.

    A: the samples' mean advantages; nll: the demonstrations' mean -log p, 10% cut at either end."""
    A = (advantages.sum(1) / mask.sum(1)).cpu()
    cut = len(nll) // 10
    nll = torch.tensor(sorted(nll)[cut:len(nll) - cut])
    gap = ((1 - A) ** 2).mean().item()
    return [gap, nll.var(correction=0).item(), A.var(correction=0).item()]


def gac_mu(mu, gap, noise_sft, noise_rl, most):
    """Half way from 1/2 to the mu of least (mu - 1/2)^2 gap + mu^2 noise_sft + (1 - mu)^2 noise_rl.

    By at most `most` from where mu is."""
    best = (0.5 * gap + noise_rl) / (gap + noise_sft + noise_rl)
    move = (best + 0.5) / 2 - mu
    return mu + max(-most, min(most, move))


class GAC(amft.Method):
    """arXiv 2605.26184: mu of least (mu - 1/2)^2 D^2 + mu^2 s_S^2 + (1 - mu)^2 s_R^2, by proxies.

    Published for longer runs: memory 0.99, every 10 steps (--meta-every) by at most 0.01 (--eta-mu)."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.mu = self.config.mu
        self.means = None  # the proxies' running means
        self.nll = []  # of the step's demonstrations

    def state_dict(self):
        return dict(mu=self.mu, means=self.means)

    def choose_demos(self, step):
        self.nll = []
        return super().choose_demos(step)

    def token_weights(self, step, logps, rows):
        mask = step.demos.response_mask[rows]
        self.nll += (-(logps * mask).sum(1) / mask.sum(1)).tolist()
        return super().token_weights(step, logps, rows)

    def choose_mu(self, step):
        if step.rollouts is None:
            return 1.0
        config = self.config
        mask = step.rollouts.batch.response_mask
        proxies = gac_proxies(step.advantages.values, mask, self.nll)
        old, kept = self.means or proxies, config.memory
        self.means = [kept * a + (1 - kept) * b for a, b in zip(old, proxies)]
        if (step.t - config.warmup) % config.meta_every == 0:
            mu = gac_mu(self.mu, *self.means, config.eta_mu)
            self.mu = min(max(mu, config.mu_min), config.mu_max)
        return self.mu


# ----- A mu of each prompt -----


class OwnDemos(amft.Method):
    """A step imitates one demonstration of each prompt that it samples."""
    chosen = ()  # the step's prompts

    def choose_prompts(self, step):
        self.chosen = super().choose_prompts(step)
        return self.chosen

    def choose_demos(self, step):
        return self.chosen


class PerPrompt(OwnDemos):
    """L = sum over the step's prompts p of (1 - mu_p) L_RL,p + mu_p L_SFT,p.

    Algorithm 1 has one mu: their mean. So mu_p / mu and (1 - mu_p) / (1 - mu) go inside the losses."""
    mus = None  # (P,), the step's mu_p

    def prompt_mus(self, success):
        """mu_p (P,), of success (P, G); here 1 where k = 0."""
        return (success.sum(1) == 0).float()

    def advantages(self, step, phi):
        self.mus = self.prompt_mus(step.rollouts.success)
        share = (1 - self.mus) / (1 - self.mus.mean()).clamp(min=1e-9)
        plain = super().advantages(step, phi)
        of_samples = share.repeat_interleave(self.config.samples).unsqueeze(1)  # (B, 1)
        return plain._replace(values=plain.values * of_samples)

    def token_weights(self, step, logps, rows):
        share = self.mus / self.mus.mean().clamp(min=1e-9)
        return share[rows].unsqueeze(1) * super().token_weights(step, logps, rows)

    def choose_mu(self, step):
        return self.mus.mean().item()


class SuperRL(PerPrompt):
    """arXiv 2506.01096: L = L_SFT on a prompt where max_i r_i = 0, else L_RL."""


class HPT(PerPrompt):
    """arXiv 2509.04419: L = L_SFT on a prompt where k / G <= gamma (--gate), else L_RL."""

    def prompt_mus(self, success):
        return (success.mean(1) <= self.config.gate).float()


class DyME(PerPrompt):
    """arXiv 2506.23061: where k = 0, the demonstration takes one of the G slots, with A = 1.

    The others of its prompt have A = 0."""

    def token_weights(self, step, logps, rows):
        return super().token_weights(step, logps, rows) / self.config.samples


# ----- The demonstration joins its prompt's samples -----


def union_advantages(success):
    """Group advantages of samples (P, G), and of a demonstration (P,) that joins them as correct."""
    demo = torch.ones_like(success[:, :1])
    union, _ = amft.group_advantages(torch.cat([success, demo], 1))
    return union[:, :-1], union[:, -1]


class LUFFY(OwnDemos):
    """arXiv 2504.14945: a demonstration joins its prompt's samples, with loss -A p / (p + gamma).

    A of the union (Eq. 4), not divided by each prompt's own std, as in its code; PPO-clip as in its
    paper alone."""
    A = None  # (P,), of the step's demonstrations

    def advantages(self, step, phi):
        of_samples, self.A = union_advantages(step.rollouts.success)
        values = of_samples.reshape(-1, 1) * step.rollouts.batch.response_mask
        return amft.Advantages(values, 1.0)

    def token_weights(self, step, logps, rows):
        p, gamma = logps.exp(), self.config.shape
        return self.A[rows].unsqueeze(1) * p * gamma / (p + gamma) ** 2

    def choose_mu(self, step):
        return 1 / (self.config.samples + 1)  # the demonstration's share of the union


class SRFT(OwnDemos):
    """arXiv 2506.19767 Eqs. 8, 12, 13: 0.5 e^-H L_SFT - A p + 0.1 e^H E[-log pi(y+)] + E[log pi(y-)].

    H without a gradient, A as LUFFY's. A sum has no mu: 1/2 of each. Its code has e^+H before L_SFT;
    the last term is unbounded."""
    A = None  # (P,), of the step's demonstrations

    def advantages(self, step, phi):
        rollouts = step.rollouts
        self.A = union_advantages(rollouts.success)[1]
        right = 0.1 * math.exp(rollouts.entropy)
        of_samples = torch.where(rollouts.success > 0, right, -1.0)
        return amft.Advantages(of_samples.reshape(-1, 1) * rollouts.batch.response_mask, 1.0)

    def token_weights(self, step, logps, rows):
        return 0.5 * math.exp(-step.rollouts.entropy) + self.A[rows].unsqueeze(1) * logps.exp()

    def choose_mu(self, step):
        return 0.5


# ----- Fewer demonstrations, and equal budgets of samples -----


def accepted(episode):
    """Does the task's grader accept this episode's demonstration?"""
    played = copy.copy(episode)
    for turn in episode.demonstration():
        played.step(turn.response)
    return played.success


class FewerDemos(amft.Method):
    """Before a method: it imitates only what --shown and --graded leave; its prompts stay all problems."""

    def __init__(self, config, *of_task):
        super().__init__(config, *of_task)
        self.kept = range(config.demos)[:config.shown or None]
        if config.graded:
            problems = self.task.training(config.demos, random.Random(f"demos {config.seed}"))  # as in amft.train
            self.kept = [i for i in self.kept if accepted(problems[i])]
        if len(self.kept) < min(config.sft_batch, config.demos):
            given = ", ".join(f"--{name} {value}" for name, value in (("shown", config.shown), ("graded", config.graded)) if value)
            instead = f"fewer than --sft-batch {config.sft_batch}" if self.kept else "so there is nothing to imitate: use --method rl"
            raise ValueError(f"{given}: leaves {len(self.kept)} of {config.demos} demonstrations, {instead}")

    def choose_demos(self, step):
        if self.config.shown or self.config.graded:
            return step.rng.sample(self.kept, self.config.sft_batch)
        return super().choose_demos(step)


def looks(config, t):
    """How often AMFT still samples on val, from step t on."""
    if not config.method.startswith("amft") or config.utility == "train" or config.eta_mu == 0 or config.meta_every < 1:
        return 0
    first = max(t, config.warmup + 2)  # before it nothing has moved by mu yet
    return sum((later - config.warmup) % config.meta_every == 0
               for later in range(first, config.steps + 1))


class EqualBudget(amft.Method):
    """Before a method: shares out --responses, AMFT's on val among them, over steps that explore."""
    spent = 0  # responses so far
    explored = 0  # steps that sampled
    first = 0  # and the first of them

    def state_dict(self):
        own = dict(spent=self.spent, explored=self.explored, first=self.first)
        return {**super().state_dict(), **own}

    def choose_prompts(self, step):
        self.first = self.first or step.t
        self.explored += 1
        config = self.config
        if config.responses:
            self.config = copy.copy(config)
            self.config.prompts = self.share(step.t)
        chosen = super().choose_prompts(step)
        self.config = config
        return chosen

    def share(self, t):
        """How many prompts step t samples."""
        config = self.config
        later = config.steps - t  # steps after it
        left = (config.responses - self.spent) // config.samples - config.prompts * looks(config, t)
        # SASR and ReLIFT do not explore at each step: as often from now on as so far, and some may
        # stay unused.
        often = self.explored / (t - self.first + 1)
        steps = max(round(often * (later + 1)), 1)
        return min(left // steps, left - later, config.demos)  # one is kept for each later step

    def before_update(self, step, theta, adam, first):
        if first:
            self.spent += step.n_sampled
        super().before_update(step, theta, adam, first)


# ----- Methods by their names, and the flags that each does not read -----

RIVALS = {
    "dft": DFT,
    "sasr": SASR,
    "relift": ReLIFT,
    "cosine": Cosine,
    "chord": CHORD,
    "trsft": TrSFT,
    "amft-trsft": AMFTWithTrSFT,
    "gac": GAC,
    "superrl": SuperRL,
    "hpt": HPT,
    "dyme": DyME,
    "luffy": LUFFY,
    "srft": SRFT,
}


def budgeted(name, method):
    return type(name, (EqualBudget, FewerDemos, method), dict(__doc__=method.__doc__))


PLAIN = {**amft.METHODS, **controllers.CONTROLLERS, **RIVALS}
METHODS = {name: budgeted(name, method) for name, method in PLAIN.items()}

OF_A_RIVAL = ["gate", "shape", "sasr", "peak", "valley", "memory", "replay"]
OWN_MU = ["mu", "warmup", *CONTROLLER]
OWN_DEMOS = [*OWN_MU, "sft_batch"]
UNION = [*OWN_DEMOS, "imitation", "advantage", "reward"]


def flags(unused, reads=(), **defaults):
    """MethodFlags, whose `unused` hold the flags of Config that belong to other rivals."""
    others = [name for name in OF_A_RIVAL if name not in reads]
    if "prompts" in unused:
        others.append("responses")
    if "sft_batch" in unused:
        others += ["shown", "graded"]
    return MethodFlags([*unused, *others], defaults)


METHOD_FLAGS = {
    name: flags(row.unused, **row.defaults)
    for name, row in {**amft.METHOD_FLAGS, **controllers.METHOD_FLAGS}.items()}
METHOD_FLAGS.update({
    "amft-replay": flags(controllers.METHOD_FLAGS["amft-replay"].unused, ["replay"], warmup=0),
    "amft-auto": flags([*controllers.METHOD_FLAGS["amft-auto"].unused, "shown", "graded"],
                       **controllers.METHOD_FLAGS["amft-auto"].defaults),  # its warm-up looks at val's, as they are
    "dft": flags([*amft.METHOD_FLAGS["sft"].unused, "imitation"], warmup=0, imitation="rectified"),
    "sasr": flags(["mu", *CONTROLLER], ["sasr"]),
    "relift": flags([*OWN_MU, "shown", "graded"], warmup=0, sft_batch=16),
    "cosine": flags(OWN_MU, ["peak", "valley"], warmup=0),
    "chord": flags(["warmup", "imitation", *CONTROLLER], warmup=0, mu=0.1),
    "trsft": flags(["warmup", "imitation", *CONTROLLER], warmup=0),
    "amft-trsft": flags(["imitation"], warmup=0),
    "gac": flags(["controller", "eta_h", "utility", "trace", "shown", "graded"], ["memory"], mu_max=0.9, eta_mu=0.05),
    "superrl": flags(OWN_DEMOS, warmup=0),
    "hpt": flags(OWN_DEMOS, ["gate"], warmup=0),
    "dyme": flags(OWN_DEMOS, warmup=0),
    "luffy": flags(UNION, ["shape"], warmup=0, advantage="group"),
    "srft": flags(UNION, warmup=0, advantage="group"),
})


# ----- Command line -----


class Run(amft.Run):
    """A run that evaluates --splits alone, also where amft.py looks at val, and not where --before is 0."""

    def __init__(self, arguments, model):
        super().__init__(arguments, model)
        self.before = arguments.config.before
        self.only = arguments.config.splits

    def evaluate(self, evaluate, splits, whole=True):
        if self.t or self.before:
            super().evaluate(evaluate, self.only.split(",") if self.only else splits, whole)


def listing():
    """The rivals and the variants of the controller, a line each."""
    lines = ["choose one with --method; amft, fixed, sft, rl and sft-rl are amft.py's own", ""]
    for name, method in {**RIVALS, **controllers.CONTROLLERS}.items():
        lines.append(f"{name:15}{method.__doc__.splitlines()[0]}")
    return "\n".join(lines)


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    given = {word.split("=")[0] for word in words}
    if not given & {"--method", "--resume", "--eval-only", "--help", "-h"}:
        return print(listing())
    amft.main(words, METHODS, Config, METHOD_FLAGS, TASKS, Run)


if __name__ == "__main__":
    main()
