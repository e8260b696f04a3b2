"""AMFT, Adaptive Meta Fine-Tuning (arXiv 2508.06944), in one file.

A policy pi_theta learns from demonstrations (SFT) and from its own graded samples (RL) on one loss, and a
controller learns their balance mu from what mu does to success on held-out prompts, steadied by the entropy:

    (1)  J_RL(theta)  = E_{y ~ pi_theta}[R_explicit(y)]      R = 1 if y is correct, else 0; L_RL by PPO-clip
    (2)  L_SFT(theta) = -E_{(x, y*)}[log pi_theta(y* | x)]   the implicit reward of following the expert's y*
    (3)  L(theta; mu) = (1 - mu) L_RL(theta) + mu L_SFT(theta)
    (4)  U(theta')    = E_{x ~ val, y ~ pi_theta'}[R_explicit(y)], theta' = theta after a step on L(theta; mu)
    (5)  dU/dmu       = <grad U(theta'), d theta'/d mu>
    (6)  mu          <- clip(mu + eta_mu dU/dmu + eta_H (H* - H(pi_theta)), mu_min, mu_max)

Differs from the paper:
    Eq. 5 goes through the step that is taken (clipping, AdamW, momentum), not through plain SGD
    Eq. 6 moves mu by dU/dmu's sign, as far as it is sure (--controller paper: to the letter)
    U can also be of the step's own prompts, for a dot product (--utility val: Eq. 4)
    the entropy's sign is Eq. 6's; the paper's text has the other one (--eta-h below 0)
    both losses are divided by their batch's response tokens; the paper leaves it open
    General Points' defaults: no warm-up, --advantage group, --imitation rectified (the paper: W, gae, nll)

    python amft.py --task gp                    # Algorithm 1 on General Points, minutes on a CPU
    python amft.py --task gp --smoke            # the same path in under a minute
    python amft.py --task gp --method sft-rl    # or sft, rl, fixed; other rivals have their own file
    python amft.py --resume runs/gp             # go on with a run that was cut off

Shapes: P prompts, G samples of each, B = P * G conversations, S tokens of the whole, T after the prompt,
V vocabulary, D width, N parameters. theta, gradients and Adam's moments are flat (N,).
"""

import argparse, copy, dataclasses, inspect, io, json, math, os, random, re, sys, time  # noqa: E401
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from tqdm import tqdm

from tasks import (
    TASKS, Batch, InParts, curves, device_of, encode_demos, flatten, generation, load_policy, outputs, read,
    room_of, say, show, sliced, table, vector_to_parameters, wide)

# --- Configuration: the flags. Their comments are what --help prints ---

def flag(default, low=None, high=math.inf, choices=None):
    return dataclasses.field(default=default, metadata=dict(low=low, high=high, choices=choices))

@dataclasses.dataclass
class Config:
    # The mixture
    method: str = flag("amft")  # what chooses mu
    mu: float = flag(0.5, 0, 1)  # mu of fixed, and where amft starts
    warmup: int = flag(10, 0)  # W: the first steps, SFT alone; of sft-rl 0: half
    # The controller
    controller: str = flag("evidence", choices=("evidence", "paper"))  # paper: Eq. 6, trace 0, U on val
    eta_mu: float = flag(0.05, 0)  # most that a step moves mu; paper: its rate; 0: no meta-gradient
    eta_h: float = flag(0.5, -1e6, 1e6)  # mu's move per step and nat of entropy below H*
    mu_min: float = flag(0.05, 0, 1)  # mu stays at or above
    mu_max: float = flag(0.95, 0, 1)  # mu stays at or below
    utility: str = flag("both", choices=("val", "train", "both"))  # whose success; train: the step's prompts'
    meta_every: int = flag(5, 1)  # K: steps between looks at validation prompts
    trace: float = flag(0.98, 0, 1)  # share of d theta/d mu that is carried on; 0: Eq. 5
    # Exploration
    prompts: int = flag(32, 2)  # P: prompts in a step
    samples: int = flag(8, 2)  # G: samples of a prompt
    temperature: float = flag(1.0, 0.01)  # of sampling and log-probabilities
    max_new_tokens: int = flag(40, 1)  # longest response
    reward: str = flag("binary", choices=("binary", "graded"))  # 1/0 (Eq. 1), or the task's own points
    advantage: str = flag("gae", choices=("gae", "group"))  # over phi, or a prompt's other samples
    clip: float = flag(0.2, 0, 1)  # PPO's range of the ratio
    ppo_epochs: int = flag(1, 1)  # updates with each batch of samples
    # Imitation
    imitation: str = flag("nll", choices=("nll", "rectified"))  # Eq. 2; rectified: times each token's own p
    demos: int = flag(20000, 1)  # training problems, a demonstration each
    sft_batch: int = flag(64, 1)  # demonstrations in a step
    # The run
    steps: int = flag(100, 1)  # in all, the warm-up's included
    lr: float = flag(1e-4, 1e-12)  # alpha at the first step; it falls linearly to 0
    task: str = flag("gp", choices=tuple(TASKS))  # the task
    model: str = flag("base")  # checkpoint folder or hub name; base: the one here
    data: str = flag("")  # math: your problems, .jsonl: prompt, solution, answer
    data_test: str = flag("")  # math: more of them, only evaluated
    eval_n: int = flag(400, 1)  # episodes of a split, at most
    val_every: int = flag(0, 0)  # steps between evaluations on val; 0: none
    seed: int = flag(0, 0, 2 ** 62)  # same seed, same CPU: same log
    device: str = flag("auto")  # auto: the first here of cuda, mps, cpu
    micro_tokens: int = flag(4096, 1)  # tokens in a pass, a sequence at least: memory only
    gradient_checkpointing: int = flag(0, 0, 1)  # less memory, more time
    bf16: int = flag(0, 0, 1)  # the policy in bfloat16; theta and its sums in float32

EVALUATES = "task model data data_test eval_n temperature max_new_tokens device bf16 smoke eval_only".split()
SMOKE = dict(steps=9, warmup=3, demos=200, prompts=8, samples=4, sft_batch=16, meta_every=2, eval_n=40)

# --- Policy: the log-probabilities of token ids ---

def token_logps(logits, ids):  # (B, T, V), (B, T) -> log-probability of each id (B, T), float32 at least
    return wide(logits).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)

def logps_of(model, batch, temperature=1.0):  # (B, T)
    return InParts.apply(token_logps, outputs(model, batch, temperature)[0], batch.responses)

# --- Rollouts: conversations of the policy with the task ---

class Rollouts(NamedTuple):  # G conversations with each of P episodes, a prompt's together
    episodes: list  # B, played to their ends
    batch: Batch
    success: torch.Tensor  # (P, G), 1.0 where the episode was solved: R_explicit of Eq. 1
    graded: torch.Tensor  # (B, T), the task's points, at each response's last token
    entropy: float  # at temperature 1, mean over sampled tokens, nats
    truncated: float  # share of responses without an end

@torch.no_grad()
def rollout(model, tokenizer, episodes, samples=1, max_new_tokens=40, temperature=1.0):
    """G = `samples` conversations with each of P episodes; temperature 0 is greedy."""
    device, how = model.device, generation(model, tokenizer, max_new_tokens, temperature)
    ids, attention, pixels = show(model, tokenizer, episodes, [e.prompt for e in episodes], first=True)
    cache = read(model, ids, attention, pixels)  # each prompt once, not G times
    cache.batch_repeat_interleave(samples)
    ids, attention = ids.repeat_interleave(samples, 0), attention.repeat_interleave(samples, 0)
    played = [copy.copy(episode) for episode in episodes for _ in range(samples)]
    pixels = [picture for picture in pixels for _ in range(samples)]
    done = torch.zeros(len(played), dtype=torch.bool, device=device)
    graded = mask = torch.zeros(len(played), 0, device=device)
    entropy, turns, cut = 0.0, 0, 0
    while True:
        width, turns = ids.shape[1], turns + (~done).sum().item()
        ids, own, nats, unfinished = say(model, tokenizer, ids, attention, cache, done, how)
        entropy, cut = entropy + nats, cut + unfinished.sum().item()
        points, shown = torch.zeros_like(own), [""] * len(played)
        for row in (~done).nonzero().squeeze(1).tolist():  # the task answers
            said = ids[row, width:][own[row].bool()].tolist()
            text = tokenizer.decode([i for i in said if i not in how.eos_token_id])
            shown[row], points[row, len(said) - 1], done[row] = played[row].step(text)
        attention, mask = torch.cat([attention, own.long()], 1), torch.cat([mask, own], 1)
        graded = torch.cat([graded, points], 1)
        if done.all():
            break
        # A finished conversation is shown one end: generate wants no padding there.
        shown = ["" if over else text for text, over in zip(shown, done.tolist())]
        observed, real, pictures = show(model, tokenizer, played, shown)
        if ids.shape[1] + observed.shape[1] + max_new_tokens > room_of(model):
            break  # out of room: what is not solved by now stays unsolved
        ids, attention = torch.cat([ids, observed], 1), torch.cat([attention, real], 1)
        graded, mask = (torch.cat([x, torch.zeros_like(real, dtype=x.dtype)], 1) for x in (graded, mask))
        pixels = [torch.cat(both) for both in zip(pixels, pictures)]
        read(model, ids, attention, pictures, cache)
    success = torch.tensor([float(e.success) for e in played], device=device).view(-1, samples)
    batch, entropy = Batch(ids, attention, mask, pixels), entropy / mask.sum().item()
    return Rollouts(played, batch, success, graded, entropy, cut / turns)

# --- The two losses ---
# Differs: each is divided by one number, the response tokens of its whole batch; otherwise mu would mean
# nothing, and a micro-batch or a skipped row would change the gradient.

def ppo_loss(logps, old_logps, advantages, mask, clip=0.2, tokens=None):
    """Eq. 1 by PPO-clip, token by token. All (B, T); tokens: the divisor, if not mask's sum."""
    ratio = (logps - old_logps).exp()  # 1 on the first update, but not its gradient
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(surrogate * mask).sum() / (mask.sum() if tokens is None else tokens)

def sft_loss(logps, mask, tokens=None):
    """Eq. 2: negative log-likelihood. logps, mask (B, T); tokens as in ppo_loss."""
    return -(logps * mask).sum() / (mask.sum() if tokens is None else tokens)

def implicit_reward(logps, ref_logps, mask, beta=1.0):
    """beta log(pi(y|x) / pi_ref(y|x)): the reward that SFT implies (section 3.2). (B, T) -> (B,)"""
    return beta * ((logps - ref_logps) * mask).sum(-1)

def group_advantages(rewards):
    """((r - mean of the prompt's other samples) / scale, scale). rewards (P, G) -> (P, G), float."""
    if (G := rewards.shape[1]) < 2:
        raise ValueError("group advantages need 2 samples of a prompt")
    centred = (rewards - rewards.mean(1, keepdim=True)) * G / (G - 1)
    # One scale for all: a prompt's own would weigh prompts anew.
    scale = centred.std(correction=0).item()
    return (centred / scale, scale) if scale > 1e-6 else (torch.zeros_like(centred), 1.0)

def gae(rewards, values, mask, gamma=1.0, lam=1.0):
    """Generalised advantage estimation, (B, T) each -> (advantages, returns), 0 off the mask."""
    # Below lam = 1 phi's error biases the RL gradient, and the step's own meta-gradient with it.
    advantages = torch.zeros_like(values)
    # The value after the last token is 0: a conversation is an episode, also when it was cut off.
    running = following = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        own = mask[:, t] > 0  # what the task says is stepped over
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(own, delta + gamma * lam * running, running)
        following = torch.where(own, values[:, t], following)
        advantages[:, t] = running * own
    return advantages, (advantages + values) * mask

def value_function(model, lr=1e-3):
    """phi: last hidden state -> a token's value."""
    width, nn = model.get_input_embeddings().weight.shape[1], torch.nn
    phi = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)).to(model.device)
    phi.optimizer = torch.optim.Adam(phi.parameters(), lr=lr)
    return phi

class Advantages(NamedTuple):
    values: torch.Tensor  # (B, T)
    scale: float  # what they were divided by

def advantages_of(model, phi, rollouts, config):
    """The Advantages of a step's rollouts, as --reward and --advantage say; phi then learns their returns."""
    batch, mask = rollouts.batch, rollouts.batch.mask
    last = (mask.cumsum(1) == mask.sum(1, keepdim=True)) * mask  # the conversation's last token
    rewards = rollouts.graded if config.reward == "graded" else rollouts.success.reshape(-1, 1) * last
    if phi is None:
        values, scale = group_advantages(rewards.sum(1).view_as(rollouts.success))  # (P, G)
        return Advantages(values.reshape(-1, 1) * mask, scale)
    with torch.no_grad():  # phi learns beside theta on fixed features: theta moves by Eq. 3 alone
        states = torch.cat([outputs(model, batch.rows(rows), hidden=True)[1]
                            for rows in micro(batch, mask, config)])  # (B, T, D)
    baseline = phi(states).squeeze(-1) * mask  # (B, T)
    values, returns = gae(rewards, baseline.detach(), mask)
    phi.optimizer.zero_grad()
    (0.5 * ((baseline - returns) ** 2).sum() / mask.sum()).backward()
    phi.optimizer.step()
    own = values[mask > 0]
    scale = own.std(correction=0).item() + 1e-8
    return Advantages((values - own.mean()) / scale * mask, scale)

# --- Their gradients ---

def micro(batch, used, config):
    """Rows of `used` (B, T) that are not all 0, --micro-tokens at a time; others add exactly nothing."""
    rows = (used != 0).any(1).nonzero().squeeze(1)
    return rows.split(max(1, config.micro_tokens // batch.ids.shape[1])) if len(rows) else ()

def gradient(model, loss, grad=None):
    """d loss/d theta (N,), in float32 at least, added to `grad` in place; 0 where the loss uses nothing."""
    grad = torch.zeros_like(flatten(model)) if grad is None else grad
    parts = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    for mine, part in zip(grad.split([part.numel() for part in parts]), parts):
        mine += part.reshape(-1)
    return grad

def loss_gradient(model, batch, used, loss, config, temperature=1.0):
    """(gradient (N,), logps (B, T), value) of loss(logps (b, T), rows (b,)), summed over the rows used."""
    grad, logps, total = torch.zeros_like(flatten(model)), torch.zeros_like(batch.mask), 0.0
    for rows in micro(batch, used, config):
        logp = logps_of(model, batch.rows(rows), temperature)
        value, logps[rows] = loss(logp, rows), logp.detach()
        grad, total = gradient(model, value, grad), total + value.item()
    return grad, logps, total

def rl_gradient(model, batch, advantages, config, old_logps=None):
    """Of L_RL. old_logps: None on the first update, when the policy still is the one that sampled."""
    tokens = batch.mask.sum()
    def loss(logp, rows):
        old = logp.detach() if old_logps is None else old_logps[rows]
        return ppo_loss(logp, old, advantages.values[rows], batch.mask[rows], config.clip, tokens)
    return loss_gradient(model, batch, advantages.values, loss, config, config.temperature)

def sft_gradient(model, batch, config, loss=lambda logps, mask, tokens, rows: sft_loss(logps, mask, tokens)):
    """Of L_SFT; its value is mean -log p, whatever the loss."""
    mask, tokens = batch.mask, batch.mask.sum()
    def part(logp, rows):
        return loss(logp, mask[rows], tokens, rows)
    grad, logps, _ = loss_gradient(model, batch, mask, part, config)
    return grad, logps, sft_loss(logps, batch.mask).item()

# --- The step, and its derivative in mu ---

AdamState = NamedTuple("AdamState", [("m", torch.Tensor), ("v", torch.Tensor), ("step", int)])  # moments (N,)

def adamw(theta, grad, m, v, norm, step, lr, max_norm=1.0, weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8):
    """(theta', m', v') of some entries; norm: |grad| of all."""
    grad = grad * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad * grad
    root = v.clamp(min=1e-37).sqrt()  # a token that never occurs has v = 0, where d sqrt(v) would be 0/0
    update = m / (1 - b1 ** step) / (root / math.sqrt(1 - b2 ** step) + eps)
    return theta * (1 - lr * weight_decay) - lr * update, m, v

def adamw_step(theta, grad, state, **how):
    """clip_grad_norm_, then AdamW: (theta', state'). All tensors (N,)."""
    step = partial(adamw, norm=grad.norm(), step=state.step + 1, **how)
    theta, m, v = sliced(step, theta, grad, *state[:2])
    return theta, AdamState(m, v, state.step + 1)

def step_sensitivity(theta, g_rl, g_sft, mu, state, last=None, trace=0.0, **how):
    """d (theta', m', v')/d mu, each (N,), of the step that is taken: exact through clipping, moments, eps."""
    # `last`, the step before's, enters at the share trace: mu was larger at past steps, by trace^i at the
    # i-th last, and momentum has still to pay (Xu et al. 2018; as there, without the gradients' Hessian).
    g = (1 - mu) * g_rl + mu * g_sft  # Eq. 3
    norm = g.norm()
    d_norm = (g @ g_sft - g @ g_rl) / (norm + 1e-30)  # d |g|/d mu
    del g  # memory
    def slopes(theta, m, v, g_rl, g_sft, d_theta, d_m, d_v):  # forward mode
        values = theta, (1 - mu) * g_rl + mu * g_sft, m, v, norm
        tangents = trace * d_theta, g_sft - g_rl, trace * d_m, trace * d_v, d_norm
        return torch.func.jvp(partial(adamw, step=state.step + 1, **how), values, tangents)[1]
    return sliced(slopes, theta, *state[:2], g_rl, g_sft, *last or 3 * [0 * theta])

# --- The meta-gradient (Eqs. 4-5) and the controller (Eq. 6) ---

def meta_gradient(model, tangent, rollouts, config, given=None):
    """dU/dmu = <grad U(theta'), d theta'/d mu> and its standard error, from fresh samples of theta'.

    tangent: d theta'/d mu (N,); given: other (advantages (P, G), scale)."""
    P, G = rollouts.success.shape
    # grad U is the score-function gradient, its baseline a prompt's other samples.
    advantages, scale = given or group_advantages(rollouts.success)
    slopes = torch.zeros(P, dtype=tangent.dtype, device=tangent.device)
    # One backward pass a prompt: prompts are the error's units.
    for p in advantages.any(1).nonzero().squeeze(1).tolist():  # elsewhere the slope is exactly 0
        part = rollouts.batch.rows(slice(p * G, (p + 1) * G))
        def surrogate(logps, rows):
            return (scale * advantages[p][rows] * (logps * part.mask[rows]).sum(1)).sum() / G
        used = advantages[p].unsqueeze(1)
        slopes[p] = loss_gradient(model, part, used, surrogate, config, config.temperature)[0] @ tangent
    return slopes.mean().item(), slopes.std().item() / math.sqrt(P)

def own_meta_gradient(g_rl, tangent, batch, scale):
    """dU/dmu on a step's own prompts, -<grad L_RL, d theta/d mu> in units of reward; its size as error."""
    # Differs: theta' sampled these, on prompts drawn after its step. One number has no
    # spread; its size is not too small an error on average: E[x^2] >= Var[x].
    slope = -(g_rl @ tangent * batch.mask.sum() / len(batch.ids)).item() * scale
    return slope, abs(slope)

def update_mu(mu, entropy, target_entropy, estimates, evidence, config, memory=0.98):
    """Eq. 6: mu' = clip(mu + meta force + entropy force) -> (mu', evidence', (meta force, entropy force)).

    estimates: new (dU/dmu, standard error); evidence: (their sum so far, its variance), old ones fading."""
    # Differs from the paper's text, which has the other sign: Eq. 6 lifts mu where entropy is below H*.
    entropy_force, meta_force = config.eta_h * (target_entropy - entropy), 0.0
    estimates = [(slope, error) for slope, error in estimates if error > 0]  # 0: no group had a signal
    if estimates and config.controller == "paper":
        meta_force = config.eta_mu * sum(slope for slope, _ in estimates)
    elif estimates:
        # Differs: dU/dmu is tiny and mostly noise: mu moves by its expected sign, 2 Phi(z) - 1, times eta_mu.
        total = memory * evidence[0] + sum(slope for slope, _ in estimates)
        variance = memory ** 2 * evidence[1] + sum(error ** 2 for _, error in estimates)
        evidence, meta_force = (total, variance), config.eta_mu * math.erf(total / math.sqrt(2 * variance))
    mu = min(max(mu + meta_force + entropy_force, config.mu_min), config.mu_max)
    return mu, evidence, (meta_force, entropy_force)

# --- Methods: what chooses mu. A method's plain attributes are saved with the run ---

CONTROLLER = "controller eta_mu eta_h mu_min mu_max utility meta_every trace".split()

class Method:
    """What Algorithm 1 asks of a step s. As it stands --method fixed: W steps of SFT, then one mu."""
    unused, defaults = CONTROLLER, {}  # flags that it does not read, flags that it sets differently

    def __init__(self, config):
        self.config = config
    def explores(self, t):  # does step t sample responses?
        return t > self.config.warmup
    def imitates(self, t):  # does it use demonstrations?
        return True
    def prompts(self, s):  # indices of the training problems to sample
        return s.rng.sample(range(self.config.demos), self.config.prompts)
    def demonstrations(self, s):  # and of those to imitate
        return s.rng.sample(range(self.config.demos), self.config.sft_batch)
    def advantages(self, s):
        return advantages_of(s.model, s.phi, s.rollouts, self.config)
    def imitation_loss(self, s, logps, mask, tokens, rows):  # of rows (b,) of s.demos
        # SFT is RL with a reward of 1/pi; a constant p removes it (2508.05629).
        c = logps.detach().exp() if self.config.imitation == "rectified" else 1.0
        return sft_loss(c * logps, mask, tokens)
    def mu(self, s):  # once a step, when both gradients are known
        return self.config.mu if s.rollouts else 1.0
    def moved(self, s):  # at each update, before theta changes
        pass

class SFT(Method):
    unused = [*"mu warmup prompts samples reward advantage clip ppo_epochs".split(), *CONTROLLER]
    defaults = dict(warmup=0)
    def explores(self, t):
        return False

class RL(Method):
    unused, defaults = ["mu", "warmup", "sft_batch", "imitation", *CONTROLLER], dict(mu=0.0, warmup=0)
    def imitates(self, t):
        return False

class SFTThenRL(Method):
    unused, defaults = ["mu", *CONTROLLER], dict(mu=0.0)
    def explores(self, t):
        return t > (self.config.warmup or self.config.steps // 2)
    def imitates(self, t):
        return not self.explores(t)

class AMFT(Method):
    """Eqs. 4-6. Its state: mu, H*, the evidence on dU/dmu, and d (theta, m, v)/d mu."""
    unused, on, given = [], "val", lambda self, s, seen: None  # U's prompts, other advantages
    def __init__(self, config):
        super().__init__(config)
        self.now, self.target_entropy, self.evidence, self.tangents = config.mu, None, (0.0, 0.0), None

    def estimates(self, s):
        """[(dU/dmu, its standard error)] that this step shows."""
        c, shown = self.config, []
        if self.tangents and c.utility != "val":
            shown = [own_meta_gradient(s.g_rl, self.tangents[0], s.rollouts.batch, s.advantages.scale)]
            s.row["meta_own"] = shown[0][0]
        if self.tangents and c.utility != "train" and (s.t - c.warmup) % c.meta_every == 0:
            episodes = [s.task.sample(self.on, s.rng) for _ in range(c.prompts)]
            seen = rollout(s.model, s.tokenizer, episodes, c.samples, c.max_new_tokens, c.temperature)
            s.sampled += len(seen.episodes)
            shown.append(meta_gradient(s.model, self.tangents[0], seen, c, self.given(s, seen)))
            s.row.update(zip(("meta_grad", "meta_se"), shown[-1]))
        return shown

    def mu(self, s):
        if not s.rollouts:
            return 1.0  # the warm-up
        if self.target_entropy is None:
            self.target_entropy = s.rollouts.entropy  # H*: of the first samples after the warm-up
        self.now, self.evidence, forces = update_mu(
            self.now, s.rollouts.entropy, self.target_entropy, self.estimates(s), self.evidence, self.config)
        s.row.update(zip(("meta_force", "entropy_force"), forces), target_entropy=self.target_entropy)
        return self.now

    def moved(self, s):
        if s.rollouts and self.config.eta_mu:
            lam = 1.0 if s.update else self.config.trace  # all updates of one step belong to its one mu
            self.tangents = step_sensitivity(
                s.theta, s.g_rl, s.g_sft, s.mu, s.adam, self.tangents, lam, lr=s.lr)

METHODS = {"amft": AMFT, "fixed": Method, "sft": SFT, "rl": RL, "sft-rl": SFTThenRL}

# --- Algorithm 1 ---

def train(config, method, task, model, tokenizer, run):
    """Algorithm 1, from where `run` stands to its end: the model then holds theta_T."""
    # Initialise theta, phi, and (in the method) mu.
    torch.manual_seed(config.seed)
    phi = value_function(model) if config.advantage == "gae" else None
    theta, adam = run.restore(flatten(model), phi, method)
    vector_to_parameters(theta, model.parameters())
    how = config.samples, config.max_new_tokens, config.temperature
    rng = random.Random(f"demos {config.seed}")
    problems = task.training(config.demos, rng)
    if run.t == 0:
        run.report(0, model, tokenizer, task, config)
    for t in tqdm(range(run.t + 1, config.steps + 1), initial=run.t, total=config.steps, leave=False):
        # Every step has its own seed: a resumed run repeats the unbroken one.
        rng = random.Random(f"step {config.seed} {t}")
        torch.manual_seed(rng.getrandbits(62))
        s = SimpleNamespace(t=t, rng=rng, lr=config.lr * (1 - (t - 1) / config.steps), theta=theta, adam=adam,
                            phi=phi, model=model, tokenizer=tokenizer, task=task, rollouts=None, demos=None,
                            sampled=0, row={})
        # Exploration: rollouts, their explicit reward, advantages. Imitation: a batch of demonstrations.
        if method.explores(t):
            episodes = [problems[i] for i in method.prompts(s)]
            s.rollouts = rollout(model, tokenizer, episodes, *how)
            s.advantages, s.sampled = method.advantages(s), len(s.rollouts.episodes)
        if method.imitates(t):
            s.demos = encode_demos(model, tokenizer, [problems[i] for i in method.demonstrations(s)])
        old = None  # log-probabilities of the policy that sampled
        for s.update in range(config.ppo_epochs if s.rollouts else 1):
            # Their two gradients. (Eqs. 1-2)
            s.g_rl = s.g_sft = torch.zeros_like(theta)
            if s.rollouts:
                s.g_rl, logps, s.row["rl_loss"] = rl_gradient(
                    model, s.rollouts.batch, s.advantages, config, old)
                old = logps if old is None else old
            if s.demos:
                s.g_sft, _, s.row["sft_loss"] = sft_gradient(
                    model, s.demos, config, partial(method.imitation_loss, s))
            # Controller: mu, from the meta-gradient and the entropy. (Eqs. 4-6)
            s.mu = method.mu(s) if s.update == 0 else s.mu
            # d theta'/d mu for the next meta-gradient, and a step on the unified loss. (Eq. 3)
            method.moved(s)
            s.g = (1 - s.mu) * s.g_rl + s.mu * s.g_sft
            s.row.update({"grad_norm" + x: vars(s)["g" + x].norm().item() for x in ("", "_rl", "_sft")})
            del s.g_rl, s.g_sft  # memory
            theta, adam = s.theta, s.adam = adamw_step(s.theta, s.g, s.adam, lr=s.lr)
            vector_to_parameters(theta, model.parameters())
        run.log_step(s)
        if config.val_every and t % config.val_every == 0 and t < config.steps:
            run.report(t, model, tokenizer, task, config, ["val"])
        if time.time() - run.clock > SAVE_SECONDS or t == config.steps:
            run.save(t, theta, adam, phi, method)

# --- Evaluation ---

@torch.no_grad()
def evaluate(model, tokenizer, task, split, config, samples=4, at_once=64):
    """A row of the log (see Task.measures), of always the same --eval-n episodes, or all there are."""
    torch.manual_seed(0)
    episodes, sampled, greedy = task.episodes(split, config.eval_n), [], []
    for part in (episodes[start:start + at_once] for start in range(0, len(episodes), at_once)):
        for k, T, played in (samples, config.temperature, sampled), (1, 0, greedy):
            played += rollout(model, tokenizer, part, k, config.max_new_tokens, T).episodes
    return dict(split=split, n=len(episodes), samples=samples, **task.measures(sampled, greedy))

# --- A run's folder: metrics.jsonl (an object a line), state.pt (for --resume), final/ (the policy) ---

SAVE_SECONDS = 30  # between states
SHOWN = "mu", "meta_own", "meta_grad", "entropy", "sft_loss", "success", "zero_adv", "grad_norm"

class Run:
    def __init__(self, folder, config=None):  # config: of a new run
        self.folder, self.log, self.state = folder, folder / "metrics.jsonl", folder / "state.pt"
        self.t, self.rollouts, self.seconds, self.clock = None, 0, 0.0, time.time()
        if config:
            if self.log.exists() or self.state.exists():
                raise ValueError(f"--out {folder}: already holds a run; --resume {folder} goes on with it")
            folder.mkdir(parents=True, exist_ok=True)
            self.write("config", **vars(config), torch=torch.__version__, threads=torch.get_num_threads())

    def write(self, kind, **fields):
        with open(self.log, "a") as file:
            file.write(json.dumps(dict(kind=kind, **fields), allow_nan=False) + "\n")

    def rows(self, *kinds):
        try:  # half a line at the end, of a run that was killed, does not count
            rows = [json.loads(line) for line in self.log.read_text().split("\n")[:-1]]
            return [row for row in rows if row["kind"] in kinds]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.log}: is not the log of a run ({error})")

    def save(self, t, theta, adam, phi, method):
        """All that the next step needs."""
        self.seconds, self.clock = self.seconds + time.time() - self.clock, time.time()
        buffer = io.BytesIO()  # so that a full disk is an OSError
        torch.save(dict(
            t=t, theta=theta, adam=tuple(adam), phi=phi and (phi.state_dict(), phi.optimizer.state_dict()),
            method={**vars(method), "config": None}, log=self.log.stat().st_size, rollouts=self.rollouts,
            seconds=self.seconds), buffer)
        # Atomic: a run killed in here still has its last state.
        (self.folder / "state.tmp").write_bytes(buffer.getbuffer())
        os.replace(self.folder / "state.tmp", self.state)

    def restore(self, theta, phi, method):
        """(theta, Adam's state), phi, method and log as they were saved; or as they begin."""
        try:
            if not self.state.exists():
                os.truncate(self.log, len(self.log.open("rb").readline()))
                self.t = 0
                return theta, AdamState(0 * theta, 0 * theta, 0)
            state = torch.load(self.state, map_location=theta.device, weights_only=True)
            if state["theta"].shape != theta.shape or state["log"] > self.log.stat().st_size:
                raise ValueError("it belongs to another model or log")
            if phi:
                phi.load_state_dict(state["phi"][0])
                phi.optimizer.load_state_dict(state["phi"][1])
            vars(method).update(state["method"], config=method.config)
            self.t, self.rollouts, self.seconds = state["t"], state["rollouts"], state["seconds"]
            os.truncate(self.log, state["log"])
            return state["theta"], AdamState(*state["adam"])
        except Exception as error:  # garbage, cut off: each has its own
            raise ValueError(f"{self.state}: is not the state of this run ({str(error).strip()[:80]})")

    def log_step(self, s):
        row = dict(step=s.t, mu=s.mu, **s.row)
        if r := s.rollouts:
            row.update(success=r.success.mean().item(), entropy=r.entropy, truncated=r.truncated,
                       zero_adv=(r.success.std(1) == 0).float().mean().item(),
                       response_len=r.batch.mask.sum(1).mean().item())
        if bad := [name for name, value in row.items() if not math.isfinite(value)]:
            raise ValueError(f"step {s.t}: {', '.join(bad)} not finite; a lower --lr?")
        self.rollouts += s.sampled
        seconds = self.seconds + time.time() - self.clock
        self.write("step", **row, rollouts=self.rollouts, seconds=round(seconds, 2))
        tqdm.write(f"{s.t:5d}" + "".join(f"  {key} {row[key]:.3f}" for key in SHOWN if key in row))

    def report(self, t, model, tokenizer, task, config, splits=None):
        for split in tqdm(splits or task.splits, desc="evaluation", leave=False):
            self.write("eval", step=t, whole=not splits, **evaluate(model, tokenizer, task, split, config))

# --- Command line ---

def parse(argv, methods, config_class):
    """(Config, folder of the run, is it new); folder None: only evaluate."""
    parser = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name, description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    source = "".join(map(inspect.getsource, config_class.__mro__[:-1]))
    texts = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    fields = dataclasses.fields(config_class)
    for f in fields:
        def number(text, f=f, low=f.metadata["low"], high=f.metadata["high"]):
            if low is not None and not (low <= f.type(text) <= high and math.isfinite(f.type(text))):
                raise argparse.ArgumentTypeError(f"{text}: must be finite, in [{low}, {high}]")
            return f.type(text)
        choices = tuple(methods) if f.name == "method" else f.metadata["choices"]
        alone = dict(nargs="?", const=1) if f.type is int and f.metadata["high"] == 1 else {}  # or with 0, 1
        parser.add_argument("--" + f.name.replace("_", "-"), type=number, choices=choices, **alone,
                            help=f"{texts[f.name]} (default: {f.default})")
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/TASK)")
    parser.add_argument("--resume", type=Path, help="go on with the run in this folder")
    parser.add_argument("--eval-only", action="store_true", help="evaluate --model and stop")
    parser.add_argument("--smoke", action="store_true", help="a very short run")
    given = vars(parser.parse_args(argv))
    if folder := given.get("resume"):
        run = Run(folder)
        if len(given) > 1 or not (rows := run.rows("config")) or run.rows("final"):
            raise ValueError(f"--resume {folder}: takes an unfinished run, and no other flag")
        flags = (f"--{f.name.replace('_', '-')}={rows[0].get(f.name)}" for f in fields)
        return config_class(**vars(parser.parse_args(flags))), folder, False
    cls, task = methods[given.get("method", "amft")], TASKS[given.get("task", "gp")]
    evaluates = "eval_only" in given
    for name in given:
        if name in cls.unused or evaluates and name not in EVALUATES:
            raise ValueError(f"--{name.replace('_', '-')}: is not used by "
                            + ("--eval-only" if evaluates else f"--method {given.get('method', 'amft')}"))
    paper = dict(utility="val", trace=0.0) if given.get("controller") == "paper" else {}
    settings = {**task.defaults, **(SMOKE if "smoke" in given else {}), **cls.defaults, **paper, **given}
    config = config_class(**{f.name: settings[f.name] for f in fields if f.name in settings})
    numbered = (Path(f"runs/{config.task}" + f"-{i}" * (i > 1)) for i in range(1, 10000))
    folder = given.get("out") or next(name for name in numbered if not name.exists())
    return config, None if evaluates else folder, True

def check(config, method):
    """Raise ValueError, one line; settle on a device."""
    low, high, most = config.mu_min, config.mu_max, max(config.prompts, config.sft_batch)
    for ok, right in ((config.warmup <= config.steps, f"--warmup {config.warmup}: at most --steps"),
                      (config.demos >= most, f"--demos {config.demos}: at least --prompts and --sft-batch"),
                      (low <= high, f"--mu-min {low}: at most --mu-max, {high}"),
                      ("mu_min" in method.unused or low <= config.mu <= high, f"--mu: in [{low}, {high}]")):
        if not ok:
            raise ValueError(right)
    config.device = device_of(config.device)

def main(argv=None, methods=METHODS, config_class=Config):
    run = None
    try:
        config, folder, new = parse(argv, methods, config_class)
        check(config, methods[config.method])
        task = TASKS[config.task](data=config.data, data_test=config.data_test)
        model, tokenizer = load_policy(config, task, folder is not None)
        if folder is None:
            rows = [evaluate(model, tokenizer, task, split, config) for split in task.splits]
            return print(table({config.model: rows}))
        run = Run(folder, config if new else None)
        train(config, methods[config.method](config), task, model, tokenizer, run)
        run.report(config.steps, model, tokenizer, task, config)
        model.save_pretrained(folder / "final")
        tokenizer.save_pretrained(folder / "final")
        run.write("final", rollouts=run.rollouts, seconds=round(run.seconds, 1))
        rows = [row for row in run.rows("eval") if row["whole"]]
        print(table({f"step {t}": [row for row in rows if row["step"] == t] for t in (0, config.steps)}))
        curves(run.rows("step", "eval"), folder / "curves.png")
        print(f"{run.rollouts} responses, {run.seconds / 60:.1f} minutes; see {folder}")
    except (OSError, ValueError, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError):  # | head: the interpreter's last flush must not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        stopped, name = isinstance(error, KeyboardInterrupt), Path(sys.argv[0]).name
        go_on = f"; go on with --resume {run.folder}" if run and run.t is not None else ""
        print(f"{name}: {'stopped' if stopped else error}{go_on}", file=sys.stderr)
        sys.exit(130 if stopped else 2)

if __name__ == "__main__":
    main()
