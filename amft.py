"""AMFT, Adaptive Meta Fine-Tuning (arXiv 2508.06944), in one file: one loss, L = (1 - mu) L_RL + mu L_SFT, and a
controller that learns mu from a meta-gradient of held-out reward, steadied by policy entropy.

    python amft.py --task gp                                   # Algorithm 1 on General Points, CPU or GPU, minutes
    python amft.py --task virl                                 # or: math, gp-vl and virl-vl (in pictures)
    python amft.py --task gp --smoke                           # the same path in under a minute
    python amft.py --task gp --method sft-rl                   # a rival: sft, rl, fixed, chord, luffy, hpt, gac, ...
    python amft.py --resume runs/gp                            # go on with a run that was cut off
    python amft.py --task gp --eval-only --model runs/gp/final
    python amft.py --plot runs/gp                              # curves of a run (needs matplotlib)

Read from top to bottom: policy, rewards and losses (Eqs. 1-3), the optimiser step and its derivative in mu, the
meta-gradient (Eqs. 4-5), the controller (Eq. 6), the rules (METHODS: AMFT and its rivals in one table), evaluation,
Algorithm 1. `train` ends the algorithm; the rest is the log, the saved state, checks of the input, the command line.
Shapes: P prompts, G samples of each, B = P * G conversations, S tokens of the whole, T of what follows the prompt,
V vocabulary, N parameters. theta, gradients and moments are flat vectors (N,).

Where this differs from the paper, and why, is in README.md; the lines concerned are marked "Differs".
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch.func import functional_call, jvp
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig,
                          LogitsProcessor)

from tasks import IMAGE, TASKS

HERE = Path(__file__).resolve().parent
METHODS = {}  # name -> Rule; the table is in the section "The rules"


class UserError(Exception):
    """Something the user can put right: one line, exit code 2."""


class RunError(Exception):
    """A run that cannot go on: one line, exit code 1."""


def flag(default, group, text, low=None, high=math.inf, choices=None):
    return dataclasses.field(default=default, metadata=dict(group=group, help=text, low=low, high=high,
                                                            choices=choices))


@dataclass
class Config:
    """Every flag: default, group in --help, meaning, lowest and highest value. The command line is built from it."""
    task: str = flag("gp", "what", "the task", choices=TASKS)
    model: str = flag("base", "what", "checkpoint folder or hub name to start from; base: the one beside amft.py; "
                      "base/early: the same, early in its pretraining")
    method: str = flag("amft", "what", "how SFT and RL are mixed: a row of METHODS", choices=METHODS)
    seed: int = flag(0, "what", "seed of everything random; same seed, same CPU: the same log", 0)
    turns: int = flag(0, "what", "graded attempts at each answer or step; 0: the task's own (1, in virl 2)", 0, 20)
    data: str = flag("", "what", "math: your problems, a .jsonl file with prompt, solution and answer in each line")
    data_heldout: float = flag(0.2, "what", "share of --data for the split heldout; as much again for val", 0.01, 0.45)
    device: str = flag("auto", "what", "cpu, cuda, mps; auto takes the first of cuda, mps, cpu that is there")
    out: str = flag("", "what", "folder of the run (default: runs/TASK, numbered if taken)")

    steps: int = flag(100, "optimisation", "optimiser steps of the whole run, the warm-up's included", 1)
    warmup: int = flag(10, "optimisation", "the first W of them are SFT alone, in methods that have a warm-up; 0 is an "
                       "ablation of Table 4", 0)
    lr: float = flag(1e-4, "optimisation", "learning rate alpha at the first step", 1e-12)
    decay: bool = flag(True, "optimisation", "alpha falls linearly to 0 over the run")
    weight_decay: float = flag(0.0, "optimisation", "AdamW's decoupled weight decay", 0)
    max_norm: float = flag(1.0, "optimisation", "clip the mixed gradient to this global norm", 1e-6)
    micro_batch: int = flag(256, "optimisation", "sequences in one forward pass: memory only, same gradient", 1)

    demos: int = flag(20000, "imitation", "training problems, each with one demonstration (gp: a random solution)", 1)
    sft_batch: int = flag(64, "imitation", "demonstrations in a step; methods that demonstrate the step's own prompts "
                          "take one of each instead", 1)
    beta: float = flag(1.0, "imitation", "scale of the logged implicit reward beta log(pi / pi_ref)", 0)

    prompts: int = flag(32, "exploration", "prompts P: the run samples --steps x P x G responses in all, whatever the "
                        "method, the controller's included, spread over the steps that sample", 1)
    samples: int = flag(8, "exploration", "samples G of each prompt", 1)
    temperature: float = flag(1.0, "exploration", "sampling temperature; log-probabilities are taken at it", 0.01)
    max_new_tokens: int = flag(40, "exploration", "longest response; longer ones are cut and count as truncated", 1)
    reward: str = flag("binary", "exploration", "1/0 (Eq. 1), or the original's +5/-1/-2/-3",
                       choices=("binary", "graded"))
    advantage: str = flag("gae", "exploration", "gae: a value function phi, as the paper; group: the baseline is the "
                          "mean of a prompt's samples, cheaper", choices=("gae", "group"))
    clip: float = flag(0.2, "exploration", "PPO's clip range", 0, 1)
    ppo_epochs: int = flag(1, "exploration", "optimiser updates in a step, all on its one batch of rollouts", 1)
    gamma: float = flag(1.0, "exploration", "GAE's discount", 0, 1)
    lam: float = flag(1.0, "exploration", "GAE's lambda; below 1 it trusts phi, which biases the RL gradient", 0, 1)
    value_lr: float = flag(1e-3, "exploration", "learning rate of the value function phi", 0)

    switch: float = flag(0.5, "rules", "sft-rl: the share of the steps that are SFT", 0, 1)
    gate: float = flag(0.0, "rules", "hpt: SFT where at most this share of a prompt's samples is correct", 0, 1)
    shape: float = flag(0.1, "rules", "luffy: gamma of p / (p + gamma)", 1e-6)
    sasr: float = flag(1.0, "rules", "sasr: gamma, the weight of the warm-up's gradient norm; larger: less SFT", 0)

    mu: float = flag(0.5, "controller", "mu of fixed (0.5) and chord (0.1), and at the start in amft and gac", 0, 1)
    mu_min: float = flag(0.05, "controller", "the controller never sets mu below; where cosine ends", 0, 1)
    mu_max: float = flag(0.95, "controller", "the controller never sets mu above; where cosine begins (0.9)", 0, 1)
    meta: bool = flag(True, "controller", "learn mu from the meta-gradient")
    entropy: bool = flag(True, "controller", "steady mu by the policy's entropy")
    controller: str = flag("evidence", "controller", "evidence: step by the meta-gradient's sign, as far as its "
                           "standard error makes it sure; paper: Eq. 6 to the letter", choices=("evidence", "paper"))
    eta_mu: float = flag(0.05, "controller", "evidence: farthest that an update moves mu; paper: learning rate", 0)
    eta_h: float = flag(0.5, "controller", "mu's move per step and per nat of entropy away from the target", 0)
    entropy_sign: str = flag("eq6", "controller", "eq6: entropy below target raises mu; text: it lowers mu",
                             choices=("eq6", "text"))
    meta_every: int = flag(5, "controller", "steps K between conversations on validation prompts", 1)
    meta_on: str = flag("both", "controller", "whose success a meta-gradient estimates: val, every K steps fresh "
                        "conversations on validation prompts (Eq. 4); train, at every step its own, by the RL gradient "
                        "that is there anyway; both", choices=("val", "train", "both"))
    meta_prompts: int = flag(32, "controller", "validation prompts in a meta-gradient, G samples each", 2)
    evidence_decay: float = flag(0.98, "controller", "share of old meta-gradients kept at an update; in gac of its "
                                 "proxies (0.9)", 0, 1)
    trace: float = flag(0.98, "controller", "share of earlier steps' d theta/d mu, moments included, that is carried "
                        "on; 0: of the last step alone (Eq. 5)", 0, 1)

    eval_n: int = flag(1000, "reporting", "greedy samples of each split", 1)
    val_every: int = flag(0, "reporting", "evaluate on val every so many steps; 0: never", 0)
    keep_best: bool = flag(False, "reporting", "evaluate also what was best in these, as early stopping would")
    evals: str = flag("all", "reporting", "all: evaluate before, after the warm-up and at the end; last: at the end; "
                      "val: at the end, and on val alone, as a search should", choices=("all", "last", "val"))
    save_every: int = flag(25, "reporting", "steps between states that --resume can go on from", 1)
    sample_every: int = flag(50, "reporting", "mixed steps between printed samples", 1)
    smoke: bool = flag(False, "reporting", "a very short run: a few steps, small batches and evaluations")
    resume: str = flag("", "runs", "go on with the run in this folder, with its own settings")
    plot: str = flag("", "runs", "draw the curves of the run in this folder and stop (needs matplotlib)")
    eval_only: bool = flag(False, "runs", "evaluate --model on every split and stop")


SMOKE = dict(steps=9, warmup=3, demos=200, prompts=8, samples=4, sft_batch=16, meta_prompts=8, meta_every=2,
             eval_n=100, save_every=3, sample_every=4)

# ---------------------------------------------------------------------------------------------------------------
# Policy: prompts in, sampled token ids out, log-probabilities of exactly those ids
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Conversations. Prompts are left-padded, so that every first response starts in the same column; after it, turns
    of different length leave holes, which attention hides."""
    ids: torch.Tensor  # (B, S)
    attention: torch.Tensor  # (B, S), 1 on real tokens
    mask: torch.Tensor  # (B, T), from the first response on: 1.0 on the policy's own tokens with EOS, which carry loss
    pixels: list = ()  # of each row: its pictures in order, (n, 3, H, W) or (0,); () if no row has any

    def __getitem__(self, rows):
        chosen = torch.arange(len(self))[rows.cpu() if torch.is_tensor(rows) else rows].tolist()
        pixels = [self.pixels[i] for i in chosen if self.pixels]
        return Batch(self.ids[rows], self.attention[rows], self.mask[rows], pixels)

    def __len__(self):
        return len(self.ids)

    def split(self, size):
        return [self[start:start + size] for start in range(0, len(self), size)]

    @property
    def responses(self):  # (B, T)
        return self.ids[:, -self.mask.shape[1]:]


def encode_shown(model, tokenizer, text, first=True):
    """Token ids of a prompt (first) or of an observation. A chat model gets its template, others plain text."""
    vision = getattr(model.config, "vision_config", None)
    text = text.replace(IMAGE, IMAGE * (vision.image_size // vision.patch_size) ** 2) if vision else text
    if tokenizer.chat_template:
        said = "<what the policy said>"
        before = [] if first else [dict(role="user", content="-"), dict(role="assistant", content=said)]
        text = tokenizer.apply_chat_template(before + [dict(role="user", content=text)], tokenize=False,
                                             add_generation_prompt=True)
        text = text.split(said)[-1].removeprefix(tokenizer.eos_token)  # an observation follows the policy's own EOS
    return tokenizer(text, add_special_tokens=first and not tokenizer.chat_template)["input_ids"]


def pad(rows, tokenizer, device, side="right"):
    """(ids, attention), each (B, width), of lists of token ids."""
    rows = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
    return (pad_sequence(rows, True, tokenizer.pad_token_id, side),
            pad_sequence([torch.ones_like(row) for row in rows], True, 0, side))


def pixels_of(images, device):
    """(n, 3, H, W) in [-1, 1] of a list of (H, W, 3) uint8 pictures; (0,) of none."""
    if not images:
        return torch.empty(0, device=device)
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def extra_inputs(pixels):
    """What a model with eyes takes beside the tokens: the pictures of all rows, in reading order."""
    pixels = [p for p in pixels if len(p)]
    return dict(pixel_values=torch.cat(pixels)) if pixels else {}


def encode_demos(model, tokenizer, episodes):
    """Batch of expert conversations. EOS carries loss, or the policy would never learn to stop."""
    prompts, rests, masks, pixels = [], [], [], []
    for turns in (episode.demonstration() for episode in episodes):
        prompts.append(encode_shown(model, tokenizer, turns[0].shown))
        rest, mask = [], []
        for i, turn in enumerate(turns):
            shown = encode_shown(model, tokenizer, turn.shown, first=False) if i else []
            said = tokenizer(turn.response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            rest, mask = rest + shown + said, mask + [0.0] * len(shown) + [float(turn.learn)] * len(said)
        rests.append(rest)
        masks.append(torch.tensor(mask, device=model.device))
        pixels.append(pixels_of([turn.image for turn in turns if turn.image is not None], model.device))
    ids, attention = (torch.cat(sides, 1) for sides in zip(pad(prompts, tokenizer, model.device, "left"),
                                                           pad(rests, tokenizer, model.device)))
    return Batch(ids, attention, pad_sequence(masks, True), pixels)


def positions(attention):
    return (attention.cumsum(1) - 1).clamp(min=0)


def outputs(model, batch, temperature=1.0, theta=None):
    """(logits (B, T, V) that predict the response tokens, last hidden states (B, T, D)) at theta, or as loaded."""
    T = batch.mask.shape[1]
    inputs = dict(input_ids=batch.ids, attention_mask=batch.attention, position_ids=positions(batch.attention),
                  logits_to_keep=T + 1, output_hidden_states=True, use_cache=False, **extra_inputs(batch.pixels))
    out = model(**inputs) if theta is None else functional_call(model, unflatten(model, theta), kwargs=inputs)
    # Column t of the logits predicts column t + 1 of the ids, so the response is predicted from one column earlier.
    return out.logits[:, :-1] / temperature, out.hidden_states[-1][:, -T - 1:-1]


def token_logps(logits, ids):
    """Log-probability of each id. logits (B, T, V), ids (B, T) -> (B, T)."""
    return logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def logps_of(model, batch, temperature=1.0, theta=None):
    return token_logps(outputs(model, batch, temperature, theta)[0], batch.responses)


def flatten(model):
    return parameters_to_vector(model.parameters()).detach()


def unflatten(model, theta):
    """{parameter name: its slice of theta (N,)}; differentiable, also in forward mode."""
    sizes = [p.numel() for p in model.parameters()]
    return {name: part.view_as(p) for (name, p), part in zip(model.named_parameters(), theta.split(sizes))}


class Watcher(LogitsProcessor):
    """Reads the policy's entropy (nats) off the logits that generation computes anyway; changes nothing in the
    conversations that go on, and lets those that are `done` (B,) say EOS at once."""

    def __init__(self, done, eos):
        self.done, self.eos, self.columns = done, eos, []

    def __call__(self, ids, logits):
        logp = logits.log_softmax(-1)
        self.columns.append(-(logp.exp() * logp).sum(-1))
        if self.done.any():
            logits = logits.masked_fill(self.done.unsqueeze(1), -torch.inf)
            logits[self.done, self.eos] = 0.0
        return logits


@dataclass
class Rollouts:
    """G conversations with each of P episodes, a prompt's conversations together; B = P * G."""
    episodes: list  # B copies, played to their ends
    batch: Batch
    responses: list  # of each conversation: the policy's texts
    seen: list  # of each conversation: whether a response read its picture right, or None
    graded: torch.Tensor  # (B, T) the task's reward of each response, at its last token
    success: torch.Tensor  # (P, G) 1.0 where the episode was solved: R_explicit of Eq. 1, whatever --reward says
    entropy: float  # of the policy at temperature 1, mean over the sampled tokens, nats
    truncated: float  # share of responses cut off before EOS
    rewards: torch.Tensor = None  # (B, T) of --reward
    advantages: torch.Tensor = None  # (B, T)
    scale: float = 1.0  # what the advantages were divided by
    returns: torch.Tensor = None  # (B, T)
    old_logps: torch.Tensor = None  # (B, T)


@torch.no_grad()
def rollout(model, tokenizer, episodes, samples=1, max_new_tokens=40, temperature=1.0):
    """Let the policy hold G = `samples` conversations with each of P episodes; temperature 0 is greedy. -> Rollouts"""
    def read(cache=None):
        """Prefill what is not in the cache, but for the last token, from which generate goes on."""
        new = slice(cache.get_seq_length() if cache else 0, -1)
        return model(input_ids=ids[:, new], attention_mask=attention[:, :-1], position_ids=positions(attention)[:, new],
                     past_key_values=cache, use_cache=True, logits_to_keep=1, **extra_inputs(pictures)).past_key_values

    prompts = [encode_shown(model, tokenizer, episode.prompt) for episode in episodes]
    ids, attention = pad(prompts, tokenizer, model.device, "left")
    pictures = [pixels_of([e.image] if IMAGE in e.prompt else [], model.device) for e in episodes]
    cache = read()  # each prompt once, not G times
    cache.batch_repeat_interleave(samples)
    ids, attention = ids.repeat_interleave(samples, 0), attention.repeat_interleave(samples, 0)
    played = [copy.copy(episode) for episode in episodes for _ in range(samples)]
    pixels = [[picture] for picture in pictures for _ in range(samples)]
    responses, seen = [[] for _ in played], [[] for _ in played]
    done = torch.zeros(len(played), dtype=torch.bool, device=model.device)
    graded = mask = torch.zeros(len(played), 0, device=model.device)
    entropy, said, truncated = 0.0, 0, 0
    how = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id,
                           pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
                           **dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else {})
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)

    while True:
        watcher = Watcher(done, tokenizer.eos_token_id)
        out = model.generate(ids, attention_mask=attention, past_key_values=cache, logits_processor=[watcher],
                             generation_config=how)
        new = out[:, ids.shape[1]:]
        # Finished before this token? Told by the EOS that came, never by ids == pad: pad may be EOS, or be sampled.
        ended = (new == tokenizer.eos_token_id).long()
        now = ((ended.cumsum(1) - ended == 0) & ~done.unsqueeze(1)).float()  # what was said in this turn
        entropy += (torch.stack(watcher.columns, 1) * now).sum().item()
        said += (~done).sum().item()
        truncated += (~done & ~ended.any(1)).sum().item()
        reward, shown, length = torch.zeros_like(now), [""] * len(played), now.sum(1).long().tolist()
        texts = tokenizer.batch_decode([ids[mask] for ids, mask in zip(new, now.bool() & ~ended.bool())])
        for row in (~done).nonzero().squeeze(1).tolist():  # grade, and let the environment answer
            episode, text = played[row], texts[row]
            responses[row].append(text)
            seen[row].append(episode.recognised(text))
            shown[row], reward[row, length[row] - 1], done[row] = episode.step(text)
        mask, graded = torch.cat([mask, now], 1), torch.cat([graded, reward], 1)
        ids, attention = out, torch.cat([attention, now.long()], 1)
        if done.all():
            break
        # A conversation that is over is shown one EOS: nothing reads it, and generate would warn of padding at the end.
        observed, real = pad([[tokenizer.eos_token_id] if over else encode_shown(model, tokenizer, text, first=False)
                              for text, over in zip(shown, done.tolist())], tokenizer, model.device, "left")
        if ids.shape[1] + observed.shape[1] + max_new_tokens > longest:
            break  # out of room: what is not solved by now stays unsolved
        pictures = [pixels_of([e.image] if IMAGE in text and not over else [], model.device)
                    for e, text, over in zip(played, shown, done.tolist())]
        pixels = [row + [picture] for row, picture in zip(pixels, pictures)]
        ids, attention = torch.cat([ids, observed], 1), torch.cat([attention, real], 1)
        mask, graded = (torch.cat([x, torch.zeros_like(real, dtype=x.dtype)], 1) for x in (mask, graded))
        read(cache)

    pixels = [torch.cat([p for p in row if len(p)]) if any(map(len, row)) else row[0] for row in pixels]
    success = torch.tensor([float(e.success) for e in played], device=model.device).view(-1, samples)
    return Rollouts(played, Batch(ids, attention, mask, pixels), responses, seen, graded, success,
                    entropy / mask.sum().item(), truncated / said)


# ---------------------------------------------------------------------------------------------------------------
# The two rewards and their losses (Eqs. 1-3). Pure functions. Both losses are sums over response tokens divided by
# one number, the count of response tokens in the whole batch; otherwise mu would mean nothing, and a micro-batch or
# a skipped sequence would change the gradient. Differs: the paper states no normalisation.
# ---------------------------------------------------------------------------------------------------------------


def sft_loss(logps, mask, tokens=None):
    """Eq. 2: negative log-likelihood of the demonstrations. logps, mask (B, T); tokens: the batch's, if not mask's."""
    return -(logps * mask).sum() / (mask.sum() if tokens is None else tokens)


def implicit_reward(logps, ref_logps, mask, beta=1.0):
    """beta log(pi(y|x) / pi_ref(y|x)) of each sequence: the reward that SFT implies (section 3.2). (B, T) -> (B,)."""
    return beta * ((logps - ref_logps) * mask).sum(-1)


def group_advantages(rewards):
    """(r - mean) / population std within each prompt's samples; 0 where all are equal. rewards (P, G) -> (P, G)."""
    if rewards.shape[1] < 2:
        raise ValueError("group advantages need at least 2 samples of a prompt")
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True, correction=0)
    return torch.where(std > 1e-6, centred / std.clamp(min=1e-6), torch.zeros_like(centred))


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016) over the policy's tokens of each conversation.

    rewards, values, mask (B, T) -> (advantages, returns), each (B, T), 0 off the mask. What the environment says is
    stepped over, so that advantages cross turns. The value after the last token is 0: a conversation is an episode,
    also when it was cut off.
    """
    advantages, nothing = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    running = next_value = nothing
    for t in reversed(range(values.shape[1])):
        own = mask[:, t] > 0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(own, delta + gamma * lam * running, running)
        next_value = torch.where(own, values[:, t], next_value)
        advantages[:, t] = running * own
    return advantages, (advantages + values) * mask


def ppo_loss(logps, old_logps, advantages, mask, clip=0.2, tokens=None):
    """Eq. 1's objective by PPO-clip, token by token. All (B, T); tokens: the batch's count, if not mask's.

    On a batch's first step old_logps = logps.detach(), the ratio is 1 and the value of the loss says nothing; its
    gradient does.
    """
    ratio = (logps - old_logps).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(surrogate * mask).sum() / (mask.sum() if tokens is None else tokens)


# ---------------------------------------------------------------------------------------------------------------
# The step theta' = step(theta, g(mu), state), and its derivative in mu
# ---------------------------------------------------------------------------------------------------------------


class AdamState(NamedTuple):
    m: torch.Tensor  # (N,) first moment
    v: torch.Tensor  # (N,) second moment
    step: int


def adamw_step(theta, grad, state, lr, max_norm=1.0, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8):
    """clip_grad_norm_, then AdamW, as a pure function: (theta', state'). All tensors (N,)."""
    grad = grad * (max_norm / (torch.linalg.vector_norm(grad) + 1e-6)).clamp(max=1.0)
    step = state.step + 1
    m = betas[0] * state.m + (1 - betas[0]) * grad
    v = betas[1] * state.v + (1 - betas[1]) * grad * grad
    # A token that never occurs has v = 0, where d sqrt(v) = 0/0: keep it out of the root, its derivative is 0.
    root = torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0)
    update = (m / (1 - betas[0] ** step)) / (root / math.sqrt(1 - betas[1] ** step) + eps)
    return theta * (1 - lr * weight_decay) - lr * update, AdamState(m, v, step)


def step_sensitivity(theta, g_rl, g_sft, mu, state, last=None, trace=0.0, **how):
    """d theta'/d mu (N,) of the step that is really taken, exact through clipping, both moments and eps; returned with
    the moments' derivatives, (theta, m, v), so that it can be given back as `last`.

    Differs from Eq. 5, which differentiates a plain SGD step: forward mode needs no more than the step itself. With
    trace > 0, `last` enters at that share: then it is the derivative in a mu that was larger at all past steps, by
    trace^i at the i-th last one, and what Adam's momentum still has to pay is in it (Xu et al. 2018; as there, the
    gradients' own dependence on theta, a Hessian, is left out).
    """
    def step(mu, theta, m, v):
        theta, after = adamw_step(theta, (1 - mu) * g_rl + mu * g_sft, AdamState(m, v, state.step), **how)
        return theta, after.m, after.v
    mu = torch.as_tensor(mu, dtype=theta.dtype, device=theta.device)
    moved = [torch.zeros_like(theta) if last is None else trace * x for x in last or range(3)]
    return jvp(step, (mu, theta, state.m, state.v), (torch.ones_like(mu), *moved))[1]


# ---------------------------------------------------------------------------------------------------------------
# The meta-gradient (Eqs. 4-5) and the controller (Eq. 6)
# ---------------------------------------------------------------------------------------------------------------


def logp_sensitivity(model, theta, tangent, batch, temperature=1.0):
    """d log pi_theta(y|x)/d mu of each sequence (B,), along tangent = d theta/d mu (N,): one forward-mode product."""
    def sequence_logps(theta):
        return (logps_of(model, batch, temperature, theta) * batch.mask).sum(-1)
    with torch.no_grad():  # no backward pass follows; forward mode is not affected
        return jvp(sequence_logps, (theta,), (tangent,))[1]


def meta_gradient(rewards, dlogps):
    """dU/dmu = E_val[A d log pi(y)/d mu] and its standard error, from fresh samples of the stepped policy.

    rewards, dlogps (P, G). Eq. 5's inner product <grad U, d theta'/d mu>, one number per sample: U's score-function
    gradient with the mean of a prompt's other samples as baseline (unbiased). Prompts are the independent units.
    """
    P, G = rewards.shape
    advantages = (rewards - rewards.mean(1, keepdim=True)) * G / (G - 1)
    per_prompt = (advantages * dlogps).mean(1)
    return per_prompt.mean().item(), per_prompt.std().item() / math.sqrt(P)


def own_meta_gradient(g_rl, tangent, rollouts):
    """dU/dmu on a step's own prompts: -<grad L_RL, d theta/d mu>, with L_RL's normalisation undone (mean of a
    conversation, in units of reward). Returned with its size as its standard error.

    Differs: not in the paper, which pays a forward-mode product and new samples for each estimate. The stepped policy
    sampled these too, on prompts drawn after the step, and the RL gradient is needed anyway: this costs one dot
    product. A single number has no spread to tell its error from; its size is never too small on average
    (E[x^2] >= Var[x]), and makes update_mu's z the self-normalised sum of x / sqrt(sum of x^2).

    The RL gradient must be unbiased, whatever phi says: the group baseline, or gamma = lambda = 1. Otherwise its bias,
    much the same at every step, agrees with what earlier RL steps did, and speaks for RL where all samples succeed.
    """
    mask = rollouts.batch.mask
    slope = -(g_rl @ tangent * mask.sum() / len(mask)).item() * rollouts.scale
    return slope, abs(slope)


def update_mu(mu, entropy, target_entropy, meta, evidence, config):
    """Eq. 6: mu' = clip(mu + meta force + entropy force). Returns (mu', evidence', (meta force, entropy force)).

    meta: new estimates of dU/dmu, each (estimate, standard error); () between meta-gradients. evidence: (sum, variance
    of the sum) of the estimates so far, old ones fading. Differs (controller "evidence"): dU/dmu is as small as the
    learning rate and mostly noise, so mu moves by eta_mu times the expected sign of dU/dmu given the evidence,
    2 Phi(z) - 1 with z the sum over its standard error: all of eta_mu where the sign is certain, next to nothing where
    it is not. Controller "paper" moves mu by eta_mu dU/dmu.
    """
    sign = 1.0 if config.entropy_sign == "eq6" else -1.0  # Differs: the paper's text contradicts its Eq. 6
    entropy_force = sign * config.eta_h * (target_entropy - entropy) if config.entropy else 0.0
    meta_force, meta = 0.0, [(estimate, error) for estimate, error in meta if error > 0]  # 0: no group had a signal
    if meta and config.controller == "paper":
        meta_force = config.eta_mu * sum(estimate for estimate, _ in meta)
    elif meta:
        total = config.evidence_decay * evidence[0] + sum(estimate for estimate, _ in meta)
        variance = config.evidence_decay ** 2 * evidence[1] + sum(error ** 2 for _, error in meta)
        evidence, meta_force = (total, variance), config.eta_mu * math.erf(total / math.sqrt(2 * variance))
    mu = min(max(mu + meta_force + entropy_force, config.mu_min), config.mu_max)
    return mu, evidence, (meta_force, entropy_force)


# ---------------------------------------------------------------------------------------------------------------
# The rules. Every method is a weight mu of L = (1 - mu) L_RL + mu L_SFT, one number or one of each prompt, and a
# coefficient c(p) on each demonstration token: its loss has the gradient -c(p) grad log p, with c taken as a constant.
# The loop, the normalisation, the optimiser, PPO-clip and the budget are everyone's; so where a paper has two
# optimisers, a KL term or an entropy bonus, this has not.
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What a rule may look at. Nothing in it carries a gradient."""
    config: Config
    state: "State"
    step: int
    rng: random.Random
    success: torch.Tensor = None  # (P, G) of the step's rollouts
    entropy: float = None  # of the step's rollouts, nats a token
    problems: tuple = ()  # indices of the step's prompts
    meta: tuple = ()  # amft: new estimates of dU/dmu, each with its standard error
    sft_norm: float = None  # norm of grad L_SFT, once it is known
    nll: torch.Tensor = None  # (B,) mean over tokens of each demonstration's -log p, once it is known
    advantages: torch.Tensor = None  # (P * G,) mean over tokens of each conversation's advantage
    forces: tuple = (0.0, 0.0)  # amft and gac leave here what moved mu: (meta force, entropy force)

    @property
    def correct(self):  # k (P,): how many of a prompt's G samples are
        return self.success.sum(1)

    @property
    def memory(self):  # what the rule itself wants to remember; saved with the run
        return self.state.memory

    @property
    def progress(self):  # 0 at the first mixed step, 1 at the last
        return (self.step - self.config.warmup - 1) / max(self.config.steps - self.config.warmup - 1, 1)


def others(s):
    """The demonstrations of a step: of any training problems."""
    return s.rng.sample(range(s.config.demos), s.config.sft_batch)


def own(s):
    """The demonstrations of a step: one of each of its own prompts, so that a weight can be given to each prompt."""
    return list(s.problems)


class Rule(NamedTuple):
    """One way to mix: functions of a Seen. `alone` and, where it says yes, `shown` are asked before any sampling."""
    mu: callable = lambda s: 0.0  # weight of L_SFT, a number or (P,)
    c: callable = lambda s, p, A: 1.0  # coefficient of each demonstration token: p (B, T), its demonstration's A (B, 1)
    A: callable = None  # (advantages of the samples (P, G), of the demonstrations (P,)) in place of --advantage's
    alone: callable = lambda s: False  # is this step SFT alone, without rollouts? (In the warm-up it is.)
    shown: callable = others  # indices of the problems whose demonstrations the step uses
    learn: callable = lambda s: None  # after the step
    warm: bool = False  # is there an SFT warm-up before the mixed steps?
    defaults: dict = {}  # of flags


def union_advantages(success):
    """LUFFY Eq. 4, SRFT Eq. 7: group advantages over a prompt's samples and its demonstration, which counts as correct.

    success (P, G) -> advantages (P, G), (P,). All wrong: the demonstration's is largest. All right: it is 0.
    """
    union = group_advantages(torch.cat([success, torch.ones_like(success[:, :1])], 1))
    return union[:, :-1], union[:, -1]


def srft_advantages(s):
    """SRFT Eq. 13: 0.1 exp(H) on correct samples, -1 on wrong ones; the demonstration's advantage as LUFFY's.

    Its -E[-log pi(wrong)] has no lower bound; nothing but the learning rate and the clip holds it.
    """
    return torch.where(s.success > 0, 0.1 * math.exp(s.entropy), -1.0), union_advantages(s.success)[1]


def cosine(progress, peak, valley):
    """CHORD's schedule of mu: from peak at progress 0 to valley at 1."""
    return valley + (peak - valley) * (1 + math.cos(math.pi * progress)) / 2


def sasr_alone(s):
    """SASR: SFT with probability G_last / (G_last + gamma G_warm), G being norms of grad L_SFT, else RL."""
    last, warm = s.memory.get("last"), s.memory.get("warm")
    return last is None or s.rng.random() < last / (last + s.config.sasr * warm)


def sasr_learn(s):
    """G_last is known of SFT steps alone, and goes stale between them."""
    if s.sft_norm is not None and s.success is None:
        s.memory["last"] = s.sft_norm
        if s.step <= s.config.warmup or "warm" not in s.memory:
            s.memory["warm"] = s.sft_norm


def relift_shown(s):
    return s.memory["buffer"][:s.config.sft_batch]


def relift_learn(s):
    """ReLIFT: prompts that no sample solved wait, newest first, until they fill an SFT step of their own."""
    buffer = s.memory.setdefault("buffer", [])
    if s.success is None and s.step > s.config.warmup:
        del buffer[:s.config.sft_batch]
    elif s.success is not None:
        buffer[:0] = [problem for problem, k in zip(s.problems, s.correct.tolist()) if k == 0]


def gac_mu(mu, gap, noise_sft, noise_rl, most):
    """GAC's closed form: the mu that minimises (mu - a)^2 gap + mu^2 noise_sft + (1 - mu)^2 noise_rl, a = 1/2, drawn
    half way to the prior 1/2; mu goes there by at most `most`."""
    best = (0.5 * gap + noise_rl) / (gap + noise_sft + noise_rl)
    return mu + max(-most, min(most, (best + 0.5) / 2 - mu))


def gac_learn(s):
    """Running means of GAC's three proxies; mu follows them every --meta-every steps, by at most --eta-mu.

    noise_rl: variance of the samples' advantages; noise_sft: 10% trimmed variance of the demonstrations' mean -log p;
    gap: mean squared difference of the coefficients, 1 on demonstrations and A on samples. Published: a memory of 0.99
    (here --evidence-decay), every 10 steps by at most 0.01, for runs of hundreds of steps.
    """
    if s.success is None:
        return
    nll = s.nll.sort().values[len(s.nll) // 10:len(s.nll) - len(s.nll) // 10]
    now = [((1 - s.advantages) ** 2).mean().item(), nll.var(correction=0).item(), s.advantages.var(correction=0).item()]
    decay, old = s.config.evidence_decay, s.memory.get("proxies", now)
    s.memory["proxies"] = [decay * a + (1 - decay) * b for a, b in zip(old, now)]
    if (s.step - s.config.warmup) % s.config.meta_every == 0:
        mu = gac_mu(s.state.mu, *s.memory["proxies"], s.config.eta_mu)
        s.state.mu = min(max(mu, s.config.mu_min), s.config.mu_max)


def amft_mu(s):
    """Eq. 6, at every step; between meta-gradients by the entropy alone."""
    if s.config.meta or s.config.entropy:
        s.state.mu, s.state.evidence, s.forces = update_mu(s.state.mu, s.entropy, s.state.target_entropy, s.meta,
                                                           s.state.evidence, s.config)
    return s.state.mu


METHODS.update({
    # One loss or the other. dft: 2508.05629 Eq. 9, -sg(p) log p.
    "sft": Rule(alone=lambda s: True),
    "dft": Rule(alone=lambda s: True, c=lambda s, p, A: p),
    "rl": Rule(),
    "sft-rl": Rule(alone=lambda s: s.step <= s.config.switch * s.config.steps),  # two stages

    # One mu for the whole loss. cosine and chord: CHORD's mu and phi, 2508.11408 (its Eqs. 5-6 print no stop-gradient
    # on phi = p(1 - p), its code has one); sasr: 2505.13026, each step all SFT or all RL; gac: 2605.26184.
    "fixed": Rule(mu=lambda s: s.config.mu, warm=True),
    "cosine": Rule(mu=lambda s: cosine(s.progress, s.config.mu_max, s.config.mu_min), defaults=dict(mu_max=0.9)),
    "chord": Rule(mu=lambda s: s.config.mu, c=lambda s, p, A: p * (1 - p), defaults=dict(mu=0.1)),
    "sasr": Rule(alone=sasr_alone, learn=sasr_learn, warm=True),
    "gac": Rule(mu=lambda s: s.state.mu, learn=gac_learn, warm=True, defaults=dict(mu_max=0.9, evidence_decay=0.9)),
    "amft": Rule(mu=amft_mu, warm=True),

    # A gate on k, how many of a prompt's G samples are correct. superrl: 2506.01096; hpt: 2509.04419 (its equation
    # divides advantages by std, its code does not: here as --advantage says, for all); dyme: 2506.23061, the
    # demonstration takes one of the G slots, with advantage 1; relift: 2506.07527 (there SFT has an Adam of its own).
    "superrl": Rule(mu=lambda s: (s.correct == 0).float(), shown=own),
    "hpt": Rule(mu=lambda s: (s.correct <= s.config.gate * s.config.samples).float(), shown=own),
    "dyme": Rule(mu=lambda s: (s.correct == 0).float(), c=lambda s, p, A: 1 / s.config.samples, shown=own),
    "relift": Rule(alone=lambda s: len(s.memory.get("buffer", ())) >= s.config.sft_batch, shown=relift_shown,
                   learn=relift_learn, defaults=dict(sft_batch=16)),

    # The demonstration joins its prompt's samples. luffy: 2504.14945, -A p / (p + gamma) with the gradient through p
    # (samples keep PPO's clip, as its paper prints; its code removes it); mu is the demonstration's share of the union.
    # srft: 2506.19767 Eqs. 8 and 13, a sum without a mu, so 1/2 each (its code has exp(+H), Eq. 8 has exp(-H)).
    "luffy": Rule(mu=lambda s: 1 / (s.config.samples + 1), A=lambda s: union_advantages(s.success), shown=own,
                  c=lambda s, p, A: A * s.config.shape * p / (p + s.config.shape) ** 2),
    "srft": Rule(mu=lambda s: 0.5, A=srft_advantages, shown=own,
                 c=lambda s, p, A: 0.5 * math.exp(-s.entropy) + A * p),
})


# ---------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------


def interval(hits, units, z=1.96):
    """95% interval of a success rate whose samples come in clusters: Wilson's, at the effective sample size.

    hits: list of 0/1; units: the cluster of each. All orders of one multiset of numbers tend to be solved or missed
    together, so a thousand deals are worth far fewer independent ones; without this the interval is too narrow.
    """
    n, p, residuals = len(hits), sum(hits) / len(hits), Counter()
    for hit, unit in zip(hits, units):
        residuals[unit] += hit - p
    variance = sum(r * r for r in residuals.values()) / n ** 2  # of p, with clusters as the independent draws
    n = min(n, p * (1 - p) / variance) if variance > 0 else n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return min(p, centre - half), max(p, centre + half)


def evaluate(model, tokenizer, task, split, n, max_new_tokens=40, batch_size=250):
    """Greedy play of n episodes of a split, always the same ones.

    Returns {split, n, success, low, high, outcomes of all responses}, and, where they say something else, each as
    (share, low, high): step_accuracy, of single responses; first_try, episodes solved without a failed attempt;
    recognition, responses that read their picture right.
    """
    rng = random.Random(f"evaluate {split}")
    episodes = [task.sample(split, rng) for _ in range(n)]
    played, seen = [], []
    for start in range(0, n, batch_size):
        part = rollout(model, tokenizer, episodes[start:start + batch_size], 1, max_new_tokens, temperature=0)
        played, seen = played + part.episodes, seen + part.seen

    def measure(hits):
        """(share, low, high) of lists of hits, one list for each episode."""
        flat = [(int(hit), e.unit) for e, own in zip(played, hits) for hit in own]
        hits, units = zip(*flat)
        return sum(hits) / len(hits), *interval(hits, units)
    correct = [[outcome == "correct" for outcome in e.history] for e in played]
    success, low, high = measure([[e.success] for e in played])
    counts = Counter(outcome for e in played for outcome in e.history)
    row = dict(split=split, n=n, success=success, low=low, high=high,
               outcomes={name: counts[name] for name in task.episode.outcomes})
    if any(e.points > 1 or e.attempts > 1 for e in played):
        row.update(step_accuracy=measure(correct),
                   first_try=measure([[e.success and all(own)] for e, own in zip(played, correct)]))
    if seen[0][0] is not None:
        row.update(recognition=measure(seen))
    return row


# ---------------------------------------------------------------------------------------------------------------
# Algorithm 1. First its parts: the two gradients, the exploration, the look-ahead; then the loop.
# ---------------------------------------------------------------------------------------------------------------


def chunks(chosen, size):
    """Indices of the rows where `chosen` (B,) holds, `size` at a time; nothing where it never holds."""
    indices = chosen.nonzero().squeeze(1)
    return indices.split(size) if len(indices) else ()


def gradient(model, loss):
    """(N,); zero for what the loss does not use, as the last layers of a vision tower."""
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([grad.reshape(-1) for grad in grads])


def sft_gradient(model, batch, config, c=None, tokens=None):
    """(grad L_SFT (N,), mean -log p of a token, logps (B, T)) of a batch of demonstrations.

    c(p (b, T), rows) gives each token's coefficient; without it it is 1, Eq. 2. tokens: the number to divide by, if not
    the batch's own.
    """
    tokens, grad, logps = batch.mask.sum() if tokens is None else tokens, 0.0, torch.zeros_like(batch.mask)
    for rows in torch.arange(len(batch), device=batch.ids.device).split(config.micro_batch):
        part = batch[rows]
        logp = logps_of(model, part)
        logps[rows] = logp.detach()
        weighted = logp if c is None else c(logp.detach().exp(), rows) * logp  # the stop-gradient is here
        grad = grad + gradient(model, sft_loss(weighted, part.mask, tokens))
    return grad, sft_loss(logps, batch.mask).item(), logps


def rl_gradient(model, phi, rollouts, config):
    """(grad L_RL (N,), L_RL, value loss) of a batch of Rollouts.

    Leaves two things behind: the value loss's gradient in phi, and, on the first step, rollouts.old_logps.
    """
    batch, tokens, total, value_total = rollouts.batch, rollouts.batch.mask.sum(), 0.0, 0.0
    grad, seen = torch.zeros_like(flatten(model)), torch.zeros_like(batch.mask)
    # A sequence without advantage adds exactly nothing: it is left out, and stays in the denominator.
    for rows in chunks((rollouts.advantages != 0).any(1), config.micro_batch):
        part = batch[rows]
        logits, hidden = outputs(model, part, config.temperature)
        logps = token_logps(logits, part.responses)
        seen[rows] = logps.detach()
        # On the first step with these rollouts the policy is still the one that sampled them.
        old_logps = (seen if rollouts.old_logps is None else rollouts.old_logps)[rows]
        loss = ppo_loss(logps, old_logps, rollouts.advantages[rows], part.mask, config.clip, tokens)
        grad, total = grad + gradient(model, loss), total + loss.item()
        if phi is not None:
            # Detached features: the value function learns beside theta, and theta moves by Eq. 3 alone.
            error = (phi(hidden.detach()).squeeze(-1) - rollouts.returns[rows]) * part.mask
            value_loss = 0.5 * (error ** 2).sum() / tokens
            value_loss.backward()
            value_total += value_loss.item()
    rollouts.old_logps = seen if rollouts.old_logps is None else rollouts.old_logps
    return grad, total, value_total


def explore(model, tokenizer, episodes, config):
    """Rollouts with the reward that --reward asks for."""
    rollouts = rollout(model, tokenizer, episodes, config.samples, config.max_new_tokens, config.temperature)
    mask = rollouts.batch.mask
    last = (mask.cumsum(1) == mask.sum(1, keepdim=True)) * mask  # the conversation's last token
    rollouts.rewards = rollouts.graded if config.reward == "graded" else rollouts.success.reshape(-1, 1) * last
    return rollouts


@torch.no_grad()
def add_advantages(model, phi, rollouts, config, given=None):
    """Fill in advantages, and the value function's targets; given: advantages (P, G) by a rule's own definition."""
    batch, mask = rollouts.batch, rollouts.batch.mask
    if given is None and phi is None:
        rewards = rollouts.rewards.sum(1).view(-1, config.samples)
        given = group_advantages(rewards)
        std = rewards.std(1, correction=0)
        # One number for all groups; G / (G - 1) takes the sample itself out of its baseline, the group's mean.
        rollouts.scale = (std.sum() / (std > 1e-6).sum().clamp(min=1)).item() * config.samples / (config.samples - 1)
    if given is not None:
        rollouts.advantages = given.reshape(-1, 1) * mask
        return
    values = torch.cat([phi(outputs(model, part)[1]).squeeze(-1) for part in batch.split(config.micro_batch)]) * mask
    advantages, rollouts.returns = gae(rollouts.rewards, values, mask, config.gamma, config.lam)
    mean = (advantages * mask).sum() / mask.sum()
    rollouts.scale = (((advantages - mean) ** 2 * mask).sum() / mask.sum()).sqrt().item() + 1e-8
    rollouts.advantages = (advantages - mean) / rollouts.scale * mask


def looks_ahead(config, step):
    """Does this step sample conversations on validation prompts? Every K mixed steps; the first has none before it."""
    mixed = step - config.warmup
    return config.meta and config.meta_on != "train" and mixed > 1 and mixed % config.meta_every == 0


def look_ahead(model, tokenizer, task, state, rng, config):
    """Eqs. 4-5 at the stepped policy theta': (dU/dmu, standard error) from conversations on validation prompts."""
    rollouts = explore(model, tokenizer, [task.sample("val", rng) for _ in range(config.meta_prompts)], config)
    state.rollouts += len(rollouts.batch)
    dlogps = torch.zeros(len(rollouts.batch), device=state.theta.device)
    signal = (rollouts.success.std(1) > 0).repeat_interleave(config.samples)  # elsewhere the advantage is exactly 0
    for rows in chunks(signal, config.micro_batch):
        dlogps[rows] = logp_sensitivity(model, state.theta, state.sensitivity[0], rollouts.batch[rows],
                                        config.temperature)
    return meta_gradient(rollouts.success, dlogps.view_as(rollouts.success))


def prompts_now(config, state, step):
    """How many prompts to sample at this step, so that the run's responses are steps x P x G in all: what is left, less
    what the controller will take, spread evenly over the steps to come that will sample: as large a share of them as of
    the steps since the first that did (1 but in sasr and relift, where chance may leave some of the budget unused)."""
    left = config.steps * config.prompts - state.rollouts // config.samples
    left -= config.meta_prompts * sum(looks_ahead(config, later) for later in range(step, config.steps + 1))
    share = (state.sampled[1] + 1) / (step - (state.sampled[0] or step) + 1)
    now = max(left // max(round(share * (config.steps - step + 1)), 1), 1)
    return min(now, left - (config.steps - step), config.demos)  # one is kept for each later step: never over budget


@dataclass
class State:
    """All that the next step depends on; what --resume reads."""
    theta: torch.Tensor  # (N,)
    adam: AdamState
    mu: float
    step: int = 0
    evidence: tuple = (0.0, 0.0)
    sensitivity: tuple = None  # d theta/d mu (N,) of the last step, and the derivatives of Adam's moments
    own: tuple = ()  # (own_meta_gradient of the last step,), for the next mu; () if there was none
    target_entropy: float = None  # H*, set after the warm-up
    rollouts: int = 0  # conversations sampled, the controller's included
    sampled: tuple = (0, 0)  # the first step with rollouts, and how many steps had any
    memory: dict = dataclasses.field(default_factory=dict)  # a rule's own
    best: tuple = (-1.0, 0, None)  # --keep-best: success on val, step, theta (N,)
    seconds: float = 0.0


def train(config, out):
    """Algorithm 1, or with --method a rival's. Writes folder `out`, or goes on from the state that lies there."""
    task, rule = make_task(config), METHODS[config.method]
    model, tokenizer = load_policy(config, task)
    run = Run(out, config)
    theta = flatten(model)
    reference = theta.clone()  # pi_ref of the implicit reward: the policy before fine-tuning
    torch.manual_seed(config.seed)
    phi, phi_optimizer = value_function(model, config) if config.advantage == "gae" else (None, None)
    state = State(theta, AdamState(torch.zeros_like(theta), torch.zeros_like(theta), 0), config.mu)
    state = run.load(state, phi, phi_optimizer)
    vector_to_parameters(state.theta, model.parameters())
    start, last = time.time() - state.seconds, config.steps
    problem_rng = random.Random(f"demos {config.seed}")
    problems = [task.sample("train", problem_rng) for _ in range(config.demos)]
    if state.step == 0 and config.evals == "all":
        run.report(0, model, tokenizer, task, config)

    print(HEADER)
    for step in tqdm(range(state.step + 1, last + 1), initial=state.step, total=last, desc=config.task, leave=False):
        # Every step has its own seed, so a resumed run repeats the unbroken one without saved generators.
        rng = random.Random(f"step {config.seed} {step}")
        torch.manual_seed(rng.getrandbits(62))
        how = dict(lr=config.lr * (1 - (step - 1) / last if config.decay else 1), max_norm=config.max_norm,
                   weight_decay=config.weight_decay)
        s, warming = Seen(config, state, step, rng), step <= config.warmup
        row, rollouts, demos, mu, given, A = dict(step=step), None, None, 1.0, None, None

        if not (warming or rule.alone(s)):
            s.problems = rng.sample(range(config.demos), prompts_now(config, state, step))
            rollouts = explore(model, tokenizer, [problems[i] for i in s.problems], config)
            state.rollouts += len(rollouts.batch)
            state.sampled = state.sampled[0] or step, state.sampled[1] + 1
            s.success, s.entropy = rollouts.success, rollouts.entropy
            if state.target_entropy is None:
                state.target_entropy = rollouts.entropy  # H*: these are the first samples after the warm-up
            if rule.A:
                given, A = rule.A(s)
            add_advantages(model, phi, rollouts, config, given)
            s.advantages = rollouts.advantages.sum(1) / rollouts.batch.mask.sum(1)
            # Eqs. 4-5, then Eq. 6; the step below uses the new mu.
            s.meta = state.own
            if looks_ahead(config, step):
                meta = row["meta_grad"], row["meta_se"] = look_ahead(model, tokenizer, task, state, rng, config)
                s.meta = (*s.meta, meta)
            mu = rule.mu(s)
            row.update(meta_force=s.forces[0], entropy_force=s.forces[1], entropy=rollouts.entropy,
                       target_entropy=state.target_entropy)

        each = torch.is_tensor(mu)  # a weight of each prompt, and of its demonstration: it goes inside the losses
        if each or mu > 0:
            demos = encode_demos(model, tokenizer, [problems[i] for i in (others if warming else rule.shown)(s)])
            tokens, weights = demos.mask.sum(), mu if each else torch.ones(len(demos), device=model.device)
            used = weights.nonzero().squeeze(1)  # the others add exactly nothing, and stay in the denominator
            demos, weights, A = demos[used], weights[used], A if A is None else A[used]
        if each:
            rollouts.advantages = rollouts.advantages * (1 - mu).repeat_interleave(config.samples).unsqueeze(1)
        w_rl, w_sft = (1.0, 1.0) if each else (1 - mu, mu)

        def c(p, rows):
            return weights[rows, None] * rule.c(s, p, A if A is None else A[rows, None])

        for epoch in range(1 if rollouts is None else config.ppo_epochs):
            g_rl = g_sft = torch.zeros_like(state.theta)
            if demos:
                g_sft, row["sft_loss"], logps = sft_gradient(model, demos, config, None if warming else c, tokens)
            if rollouts is not None:
                g_rl, row["rl_loss"], row["value_loss"] = rl_gradient(model, phi, rollouts, config)
            g = w_rl * g_rl + w_sft * g_sft  # the gradient of Eq. 3
            if config.meta and rollouts is not None:
                if config.meta_on != "val" and state.sensitivity is not None and epoch == 0:
                    meta = own_meta_gradient(g_rl, state.sensitivity[0], rollouts)
                    state.own, row["meta_own"] = (meta,), meta[0]
                state.sensitivity = step_sensitivity(state.theta, g_rl, g_sft, mu, state.adam, state.sensitivity,
                                                     config.trace, **how)
            row.update(grad_norm=g.norm().item(), grad_norm_rl=g_rl.norm().item(), grad_norm_sft=g_sft.norm().item(),
                       grad_cos=torch.cosine_similarity(g_rl, g_sft, dim=0).item() if demos and rollouts else None)
            check_finite(row, run)
            state.theta, state.adam = adamw_step(state.theta, g, state.adam, **how)
            if phi is not None:
                phi_optimizer.step()
                phi_optimizer.zero_grad()
            vector_to_parameters(state.theta, model.parameters())

        row.update(mu=mu.mean().item() if each else mu, demos=len(demos) if demos else 0)
        if demos:
            with torch.no_grad():
                ref_logps = torch.cat([logps_of(model, part, theta=reference)
                                       for part in demos.split(config.micro_batch)])
            row["implicit_reward"] = implicit_reward(logps, ref_logps, demos.mask, config.beta).mean().item()
            s.sft_norm, s.nll = row["grad_norm_sft"], -(logps * demos.mask).sum(1) / demos.mask.sum(1)
        rule.learn(s)

        state.step, state.seconds = step, time.time() - start
        run.log_step(row, rollouts, state, tokenizer, config)
        if step == config.warmup and config.evals == "all":
            run.report(step, model, tokenizer, task, config)
        elif config.val_every and step % config.val_every == 0 and step < last:
            success = run.report(step, model, tokenizer, task, config, ["val"])["val"]
            if success > state.best[0]:
                state.best = success, step, state.theta
        if step % config.save_every == 0 or step == last:
            run.save(state, phi, phi_optimizer)

    splits = ["val"] if config.evals == "val" else None
    success = run.report(last, model, tokenizer, task, config, splits)
    model.save_pretrained(out / "final")
    tokenizer.save_pretrained(out / "final")
    if config.keep_best:
        state.best = max(state.best, (success["val"], last, state.theta), key=lambda best: best[0])
        vector_to_parameters(state.best[2], model.parameters())
        run.report(state.best[1], model, tokenizer, task, config, splits, best=True)
    run.finish(state, config)
    return run


# ---------------------------------------------------------------------------------------------------------------
# A run's folder: metrics.jsonl (one JSON object a line), state.pt (what --resume reads), final/ (the policy)
# ---------------------------------------------------------------------------------------------------------------

STEP_KEYS = ("step", "mu", "meta_grad", "meta_se", "meta_own", "meta_force", "entropy_force", "entropy",
             "target_entropy", "sft_loss", "rl_loss", "value_loss", "reward", "success", "zero_adv", "implicit_reward",
             "grad_norm", "grad_norm_rl", "grad_norm_sft", "grad_cos", "demos", "correct", "response_len", "turns",
             "truncated", "recognition", "rollouts", "seconds")
COLUMNS = dict(step="5d", mu="6.3f", meta_grad="10.2e", meta_se="9.2e", entropy="8.3f", sft_loss="9.4f",
               rl_loss="8.4f", success="8.3f", zero_adv="9.2f", grad_norm="10.3f", grad_cos="9.3f", rollouts="9d",
               seconds="8.1f")


def cells(row):
    """One aligned line; blank where there is no value: no meta-gradient at this step, no rollouts in the warm-up."""
    return " ".join(" " * int(form.split(".")[0].strip("d")) if row.get(name) is None else format(row[name], form)
                    for name, form in COLUMNS.items())


HEADER = " ".join(f"{name:>{form.split('.')[0].strip('d')}}" for name, form in COLUMNS.items())


class Run:
    def __init__(self, folder, config):
        self.folder, self.log, self.last_state = folder, folder / "metrics.jsonl", folder / "state.pt"
        folder.mkdir(parents=True, exist_ok=True)
        if not self.log.exists():
            self.write("config", **dataclasses.asdict(config), python=sys.version.split()[0], torch=torch.__version__,
                       transformers=transformers.__version__, numpy=np.__version__, threads=torch.get_num_threads(),
                       commit=git_commit())

    @classmethod
    def at(cls, folder, flag):
        """The run that already lies in a folder."""
        if not (Path(folder) / "metrics.jsonl").exists():
            raise UserError(f"{flag} {folder}: no run there (no metrics.jsonl)")
        return cls(Path(folder), None)

    def write(self, kind, **fields):
        with open(self.log, "a") as file:
            file.write(json.dumps(dict(kind=kind, **fields)) + "\n")

    def rows(self, kind):
        lines = self.log.read_text().split("\n")[:-1]  # a killed run may have left half a line
        return [row for row in map(json.loads, lines) if row["kind"] == kind]

    def save(self, state, phi, phi_optimizer):
        """Atomic: a run killed in here still has its last state. The log's length says where that state stood."""
        saved = dict(vars(state), adam=tuple(state.adam), log_bytes=self.log.stat().st_size)
        if phi is not None:
            saved.update(phi=phi.state_dict(), phi_optimizer=phi_optimizer.state_dict())
        torch.save(saved, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.last_state)

    def load(self, state, phi, phi_optimizer):
        """The last saved state (or the given one, if none was), with the log cut back to where it stood."""
        if not self.last_state.exists():
            with open(self.log, "rb") as file:
                os.truncate(self.log, len(file.readline()))
            return state
        saved = torch.load(self.last_state, map_location=state.theta.device, weights_only=True)
        os.truncate(self.log, saved.pop("log_bytes"))
        if phi is not None:
            phi.load_state_dict(saved.pop("phi"))
            phi_optimizer.load_state_dict(saved.pop("phi_optimizer"))
        return State(**dict(saved, adam=AdamState(*saved["adam"])))

    def log_step(self, row, rollouts, state, tokenizer, config):
        """One line on the screen, one in the log, now and then a sample."""
        if rollouts is not None:
            rewards = rollouts.rewards.sum(1).view(-1, config.samples)
            seen = [hit for own in rollouts.seen for hit in own if hit is not None]
            row.update(reward=rewards.mean().item(), success=rollouts.success.mean().item(),
                       correct=torch.bincount(rollouts.success.sum(1).long(), minlength=config.samples + 1).tolist(),
                       zero_adv=(rewards.amax(1) == rewards.amin(1)).float().mean().item(),
                       response_len=rollouts.batch.mask.sum(1).mean().item(), truncated=rollouts.truncated,
                       turns=statistics.mean(map(len, rollouts.responses)),
                       recognition=statistics.mean(seen) if seen else None)
        row.update(rollouts=state.rollouts, seconds=round(state.seconds, 3))
        self.write("step", **{key: row.get(key) for key in STEP_KEYS})
        tqdm.write(cells(row))
        if rollouts is not None and (state.step - config.warmup) % config.sample_every == 1:
            text = tokenizer.decode(rollouts.batch.ids[0][rollouts.batch.attention[0].bool()])
            tqdm.write(f"\n{re.sub(f'({IMAGE})+', IMAGE, text)}\n-> {', '.join(rollouts.episodes[0].history)}\n")

    def report(self, step, model, tokenizer, task, config, splits=None, best=False):
        """Evaluate on these splits, or on all -> {split: success}."""
        success = {}
        for split in tqdm(splits or task.splits, desc="evaluation", leave=False):
            row = evaluate(model, tokenizer, task, split, config.eval_n, config.max_new_tokens)
            self.write("eval", step=step, whole=splits is None, best=best, **row)
            success[split] = row["success"]
        return success

    def finish(self, state, config):
        mu = self.rows("step")[-1]["mu"]
        self.write("final", step=state.step, mu=mu, rollouts=state.rollouts, seconds=round(state.seconds, 1))
        stages = {config.warmup: "after warm-up", 0: "base", config.steps: "final"}
        evals = [row for row in self.rows("eval") if row["whole"]]
        columns = {name: [row for row in evals if row["step"] == step and not row["best"]]
                   for step, name in sorted(stages.items())}
        columns[f"best on val (step {state.best[1]})"] = [row for row in evals if row["best"]]
        print_table({name: rows for name, rows in columns.items() if rows})
        print(f"{state.step} steps, {state.rollouts} rollouts, {state.seconds / 60:.1f} minutes, mu {mu:.3f}; "
              f"log and policy in {self.folder}")


MEASURES = {"success": "success", "first_try": "success without a failed attempt",
            "step_accuracy": "accuracy of single responses", "recognition": "observations read right"}


def print_table(columns):
    """Greedy success in percent with its 95% interval; columns: {heading: [eval row of each split]}."""
    for name, title in MEASURES.items():
        if not columns or not all(name in row for rows in columns.values() for row in rows):
            continue
        print(f"\n{title + ', %':35}" + "".join(f"{heading:>22}" for heading in columns))
        for rows in zip(*columns.values()):
            values = ((r["success"], r["low"], r["high"]) if name == "success" else r[name] for r in rows)
            cells = ("{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in value)) for value in values)
            print(f"{rows[0]['split']:35}" + "".join(f"{text:>22}" for text in cells))


def check_finite(row, run):
    bad = {name: row[name] for name in ("sft_loss", "rl_loss", "value_loss", "grad_norm")
           if not math.isfinite(row.get(name) or 0.0)}
    if bad:
        raise RunError(f"step {row['step']}: {bad} is not finite; the log up to the step before is in {run.folder}")


def git_commit():
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


# ---------------------------------------------------------------------------------------------------------------
# Loading, checking, command line
# ---------------------------------------------------------------------------------------------------------------


def make_task(config):
    options = dict(turns=config.turns)
    if config.data and config.task != "math":
        raise UserError(f"--data {config.data}: task {config.task} makes its own problems; --task math takes a file")
    if config.data:
        options.update(data=config.data, heldout=config.data_heldout)
    try:
        return TASKS[config.task](**options)
    except ValueError as error:
        raise UserError(f"--data {error}")


def load_policy(config, task):
    """(model, tokenizer) of a checkpoint folder or hub name, checked against the task."""
    transformers.utils.logging.disable_progress_bar()
    episode = task.sample("train", random.Random(0))
    eyes = episode.image is not None
    source = "base-vl" if eyes and config.model == "base" else config.model
    source = HERE / source if (HERE / source / "config.json").exists() else source
    try:
        # Fused attention has no forward-mode derivative, which the meta-gradient needs: "eager" has.
        kind = AutoModelForImageTextToText if eyes else AutoModelForCausalLM
        model = kind.from_pretrained(source, attn_implementation="eager", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # missing, corrupt, of an unknown kind, unreachable: each library has its own error
        raise UserError(f"--model {config.model}: not a {'vision-language ' * eyes}checkpoint that transformers can "
                        f"load ({(str(error).splitlines() or [type(error).__name__])[0][:100]})")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for turn in episode.demonstration():
        for text in (turn.shown, turn.response):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if tokenizer.decode(ids).split() != text.split():
                raise UserError(f"--model {config.model}: its tokenizer cannot encode the task {config.task} "
                                f"(a text comes back as {tokenizer.decode(ids)[-60:]!r})")
        if len(ids) >= config.max_new_tokens:
            raise UserError(f"--max-new-tokens {config.max_new_tokens}: a demonstration has {len(ids) + 1} with this "
                            "tokenizer")
    if eyes:
        # A response may not hold the token that a picture stands for: no picture would come with it.
        token = model.config.image_token_id
        model.get_output_embeddings().register_forward_hook(
            lambda _, __, logits: logits.index_fill(-1, torch.tensor([token], device=logits.device), -1e9))
    return model.to(config.device).eval(), tokenizer


def value_function(model, config):
    """phi: last hidden state -> value of a token's state, with an optimiser of its own."""
    width = model.get_input_embeddings().weight.shape[1]
    phi = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))
    phi = phi.to(model.device)
    return phi, torch.optim.Adam(phi.parameters(), lr=config.value_lr)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, no usage block
        self.exit(2, f"{self.prog}: {message}; --help lists every flag\n")


def parse_config(argv):
    parser = Parser(prog="amft.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    groups = {}
    for field in dataclasses.fields(Config):
        title = field.metadata["group"]
        group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        name, text = "--" + field.name.replace("_", "-"), field.metadata["help"] + " (default: %(default)s)"
        if field.type is bool:
            group.add_argument(name, default=field.default, help=text, action=argparse.BooleanOptionalAction)
        else:
            group.add_argument(name, default=field.default, help=text, type=field.type,
                               choices=field.metadata["choices"])
    given = parser.parse_args(argv)
    rule, learned = METHODS[given.method], given.method == "amft"
    # Flags that are given still win.
    parser.set_defaults(**{**TASKS[given.task].defaults, **(SMOKE if given.smoke else {}), **rule.defaults,
                           **({} if rule.warm else dict(warmup=0)),
                           **({} if learned else dict(meta=False, entropy=False))})
    return Config(**vars(parser.parse_args(argv)))


def check_config(config):
    """Raise UserError, naming the flag and what would be right."""
    def need(ok, name, right):
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be {right}")
    for field in dataclasses.fields(Config):
        low, high = field.metadata["low"], field.metadata["high"]
        need(low is None or low <= getattr(config, field.name) <= high, field.name,
             f"at least {low}" if high == math.inf else f"in [{low}, {high}]")
    need(config.warmup <= config.steps, "warmup", f"at most --steps, {config.steps}")
    need(config.method == "amft" or not (config.meta or config.entropy), "method", "amft for --meta or --entropy")
    looks = sum(looks_ahead(config, step) for step in range(config.steps + 1))
    need(config.steps * (config.prompts - 1) >= looks * config.meta_prompts, "meta_prompts",
         f"less: {looks} meta-gradients would take more than the run's --steps x --prompts, "
         f"{config.steps} x {config.prompts}")
    unbiased = config.advantage == "group" or config.gamma == config.lam == 1
    need(unbiased or not config.meta or config.meta_on == "val", "meta_on", "val with --lam or --gamma below 1, or "
         "--advantage group: a biased RL gradient is no estimate of dU/dmu")
    need(not config.keep_best or config.val_every, "val_every", "at least 1 with --keep-best")
    need(config.demos >= config.sft_batch, "demos", f"at least --sft-batch, {config.sft_batch}")
    need(config.samples > 1 or (config.advantage == "gae" and not config.meta), "samples",
         "at least 2: group advantages and the meta-gradient compare a prompt's samples")
    need(not (config.meta or config.entropy) or config.mu_min <= config.mu <= config.mu_max, "mu",
         f"in [--mu-min, --mu-max] = [{config.mu_min}, {config.mu_max}], or fixed by --no-meta --no-entropy")


def resolve_device(name):
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not to be had here ({str(error).splitlines()[0][:80]})")
    return name


def run_folder(config):
    """--out if it holds no run yet; without it runs/TASK, runs/TASK-2, ..."""
    if config.out:
        if (Path(config.out) / "metrics.jsonl").exists():
            raise UserError(f"--out {config.out}: already holds a run; --resume {config.out} goes on with it")
        return Path(config.out)
    names = (f"runs/{config.task}{suffix}" for suffix in [""] + [f"-{i}" for i in range(2, 10000)])
    return next(Path(name) for name in names if not (Path(name) / "metrics.jsonl").exists())


def resume_config(given):
    """The run's own settings. Other flags beside --resume would be lost silently, so they are refused."""
    if given != dataclasses.replace(Config(), resume=given.resume):
        raise UserError("--resume goes alone: a run goes on with its own settings")
    run = Run.at(given.resume, "--resume")
    if run.rows("final") or not run.rows("config"):
        raise UserError(f"--resume {given.resume}: that run is finished, or never began")
    names = {field.name for field in dataclasses.fields(Config)}
    settings = {name: value for name, value in run.rows("config")[0].items() if name in names}
    return Config(**dict(settings, resume=given.resume))


def draw(run):
    try:
        from results.plot import plot_run
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib")
    plot_run(run)


def main(argv=None):
    config = parse_config(argv)
    try:
        if config.plot:
            return draw(Run.at(config.plot, "--plot"))
        config = resume_config(config) if config.resume else config
        check_config(config)
        folder = Path(config.resume) if config.resume else run_folder(config)
        config = dataclasses.replace(config, device=resolve_device(config.device), out=str(folder))
        if config.eval_only:
            task = make_task(config)
            model, tokenizer = load_policy(config, task)
            return print_table({config.model: [evaluate(model, tokenizer, task, split, config.eval_n,
                                                        config.max_new_tokens) for split in task.splits]})
        train(config, folder)
    except (UserError, RunError, KeyboardInterrupt) as error:
        stopped = f"stopped; go on with --resume {config.out}"
        print(f"amft.py: {stopped if isinstance(error, KeyboardInterrupt) else error}", file=sys.stderr)
        sys.exit({UserError: 2, RunError: 1}.get(type(error), 130))


if __name__ == "__main__":
    main()
