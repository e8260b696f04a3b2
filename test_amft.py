"""Tests of amft.py and tasks.py: each against an independent reference (a slow loop, an enumeration, a float64 finite
difference, torch's own optimiser), never against a copy of the code.

    python -m pytest -q test_amft.py
    AMFT_SLOW=1 python -m pytest -q test_amft.py     # and what takes longer

AMFT_MODULE names the module under test (default amft), so that this file grades a student's version; AMFT_TEST_SEED
(default 0) draws the inputs, so that a grader can draw others.
"""

import errno
import copy
import importlib
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import (AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlavaConfig,
                          LlavaForConditionalGeneration)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "base")]
amft = importlib.import_module(os.environ.get("AMFT_MODULE", "amft"))
tasks = importlib.import_module("tasks")
SEED = int(os.environ.get("AMFT_TEST_SEED", "0"))
slow = pytest.mark.skipif(not os.environ.get("AMFT_SLOW"), reason="takes longer: AMFT_SLOW=1 runs it")


GP_DEFAULTS = dict(tasks.GeneralPoints.defaults)


@pytest.fixture(autouse=True)
def plain_defaults(monkeypatch):
    """What is tested are Config's own defaults, whatever General Points sets differently for its default run."""
    monkeypatch.setattr(tasks.GeneralPoints, "defaults", {})


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(SEED)
    monkeypatch.setattr(sys, "argv", ["amft.py"])
    yield
    torch.set_default_dtype(torch.float32)


def roughened(model):
    """Weights far enough from transformers' initial ones that the policy is not nearly uniform."""
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def toy_model():
    """GPT-2, because Llama takes its norms and softmax in float32 whatever its weights are: too coarse for h. From here
    on the test is in float64."""
    torch.set_default_dtype(torch.float64)
    return roughened(GPT2LMHeadModel(GPT2Config(
        vocab_size=V, n_positions=8, n_embd=12, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager")).double())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(HERE / "base")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    """A checkpoint folder with the base's tokenizer and a random policy small enough for end-to-end tests."""
    torch.manual_seed(SEED)
    folder = tmp_path_factory.mktemp("tiny")
    roughened(LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def configured(**settings):
    return amft.Config(**{"device": "cpu", **settings})


def tiny_argv(model, out, *flags):
    return ["--task", "gp", "--smoke", "--model", model, "--out", str(out), "--device", "cpu",
            "--eval-n", "8", "--max-new-tokens", "34", *flags]


def tiny_run(model, out, *flags):
    """A run of seconds; returns the rows of its log."""
    amft.main(tiny_argv(model, out, *flags))
    return read(out)


def read(out, kind=None):
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if kind in (None, row["kind"])]


@pytest.fixture
def unevaluated(monkeypatch):
    """Runs spend their time on steps."""
    monkeypatch.setattr(amft, "evaluate", lambda _, __, task, split, *___: dict(
        split=split, n=1, success=0.0, low=0.0, high=1.0, any=0.0, greedy=0.0, outcomes={}))


@pytest.fixture
def rewarded(monkeypatch):
    """Rewards that a random policy does get, so that its RL gradient is not zero."""
    monkeypatch.setattr(tasks.Deal, "grade", lambda self, text: "correct" if len(text) % 2 else "no_answer")


def spied(monkeypatch, name):
    """Every call of a function of amft, as {parameter: argument}; "returns" is its result."""
    calls, true = [], getattr(amft, name)
    signature = inspect.signature(true)

    def spy(*args, **kwargs):
        said = signature.bind(*args, **kwargs)
        said.apply_defaults()
        calls.append({**said.arguments, **said.arguments.get("how", {}), "returns": true(*args, **kwargs)})
        return calls[-1]["returns"]
    monkeypatch.setattr(amft, name, spy)
    return calls


# --- a world small enough to enumerate: 5 tokens, responses of exactly 2 tokens, 3 prompts ------------------------

V, T = 5, 2
PROMPTS = torch.tensor([[1, 2, 3], [4, 0, 2], [3, 3, 1]])
ALL = torch.tensor(list(itertools.product(range(V), repeat=T)))  # (25, 2): every response


def batch_of(prompts, responses, mask=None):
    ids = torch.cat([prompts, responses], 1)
    mask = torch.ones(responses.shape) if mask is None else mask
    return amft.Batch(ids, torch.ones_like(ids), mask, [torch.empty(0)] * len(ids))


def sequences(prompt):
    """Batch of a prompt with every response."""
    return batch_of(prompt.expand(len(ALL), -1), ALL)


def rollouts_of(batch, success, graded=None):
    return amft.Rollouts([], batch, success, torch.zeros_like(batch.mask) if graded is None else graded, 0.0, 0.0)


def exact_logps(model, prompt, temperature=1.0):
    """log pi(y|x) of every response (25,), straight from the chain rule and a plain forward pass."""
    first = (model(prompt.unsqueeze(0)).logits[0, -1] / temperature).log_softmax(-1)
    second = model(torch.cat([prompt.expand(V, -1), torch.arange(V).unsqueeze(1)], 1)).logits[:, -1] / temperature
    return (first.unsqueeze(1) + second.log_softmax(-1)).reshape(-1)


def exact_utility(model, reward, temperature=1.0):
    """U(theta) = E[R] by enumeration; reward (3, 25)."""
    return sum((exact_logps(model, p, temperature).exp() * r).sum() for p, r in zip(PROMPTS, reward)) / len(PROMPTS)


def flat_grad(loss, model):
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([grad.reshape(-1) for grad in grads])


def close(actual, expected, rtol):
    """Relative to the whole vector: no entry is held to an absolute size."""
    assert expected.norm() > 0
    assert (actual - expected).norm() <= rtol * expected.norm(), ((actual - expected).norm() / expected.norm()).item()


def toy(steps_before):
    """(model, reward, g_rl, g_sft, Adam state after some steps) in float64."""
    generator = torch.Generator().manual_seed(SEED)
    model = toy_model()
    reward = (torch.rand(3, len(ALL), generator=generator) < 0.3).double()
    theta = amft.flatten(model)
    state = amft.AdamState(torch.zeros_like(theta), torch.zeros_like(theta), 0)
    for _ in range(steps_before):
        noise = torch.randn(len(theta), generator=generator, dtype=torch.float64)
        theta, state = amft.adamw_step(theta, noise, state, lr=1e-3, max_norm=1e9)
    vector_to_parameters(theta.clone(), model.parameters())
    g_rl = -flat_grad(exact_utility(model, (torch.rand(3, len(ALL), generator=generator) < 0.3).double()), model)
    demo = torch.randint(len(ALL), (3,), generator=generator)
    g_sft = -flat_grad(sum(exact_logps(model, p)[d] for p, d in zip(PROMPTS, demo)), model) / 3
    return model, reward, g_rl, g_sft, state


def torch_step(model, grad, state, lr, max_norm, weight_decay=0.0):
    """The same step by torch: clip_grad_norm_ and AdamW on a copy of the model."""
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    for p, m, v, g in zip(parameters, state.m.split(sizes), state.v.split(sizes), grad.split(sizes)):
        p.grad = g.view_as(p).clone()
        optimizer.state[p] = dict(step=torch.tensor(float(state.step)), exp_avg=m.view_as(p).clone(),
                                  exp_avg_sq=v.view_as(p).clone())
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    return model


# --- the step and the meta-gradient -------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [1e6, 0.1])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_step_equals_torch(max_norm, weight_decay):
    model = toy_model()
    theta = amft.flatten(model)
    state = amft.AdamState(torch.zeros_like(theta), torch.zeros_like(theta), 0)
    for step in range(4):
        grad = torch.randn_like(theta) * (torch.rand_like(theta) < 0.5) if step < 2 else torch.zeros_like(theta)
        stepped = torch_step(model, grad, state, 1e-2, max_norm, weight_decay)
        theta, state = amft.adamw_step(theta, grad, state, lr=1e-2, max_norm=max_norm, weight_decay=weight_decay)
        vector_to_parameters(theta.clone(), model.parameters())
        torch.testing.assert_close(theta, amft.flatten(stepped), rtol=1e-11, atol=1e-13)
    assert state.step == 4


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("steps_before", [0, 1, 30])
@pytest.mark.parametrize("mu", [0.3, 0.9])
def test_sensitivity_is_the_finite_difference_of_exact_utility(clipped, steps_before, mu):
    """The oracle: dU/dmu of the exact U after the whole step, torch's own, in float64, against <grad U, d theta'/d mu>."""
    model, reward, g_rl, g_sft, state = toy(steps_before)
    if not steps_before:  # the first step is sign(g) but within eps of 0: keep g(mu) from crossing it, as h would
        g_sft = g_rl * (1 + torch.rand_like(g_rl))
    norm = ((1 - mu) * g_rl + mu * g_sft).norm().item()
    how = dict(lr=0.05, max_norm=norm / 3 if clipped else norm * 3)

    def utility(mu):  # through torch's clip and AdamW, then by enumeration: shares nothing with amft.py
        stepped = torch_step(model, (1 - mu) * g_rl + mu * g_sft, state, how["lr"], how["max_norm"])
        with torch.no_grad():
            return exact_utility(stepped, reward).item()
    h = 1e-5
    expected = (utility(mu + h) - utility(mu - h)) / (2 * h)

    theta = amft.flatten(model)
    tangent = amft.step_sensitivity(theta, g_rl, g_sft, mu, state, **how)[0]
    stepped, _ = amft.adamw_step(theta, (1 - mu) * g_rl + mu * g_sft, state, **how)
    vector_to_parameters(stepped.clone(), model.parameters())
    slope = flat_grad(exact_utility(model, reward), model)
    # The tolerance is relative to what the inner product could be: it may happen to be near 0.
    assert (slope @ tangent).item() == pytest.approx(
        expected, rel=1e-4, abs=1e-5 * (slope.norm() * tangent.norm()).item() + 1e-10)
    if steps_before:
        assert tangent.norm() > 1e-3 * how["lr"]  # there is something to compare


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_meta_gradient_is_exactly_unbiased(temperature):
    """Every pair of responses at its probability, G = 2: the expectation is <grad U, tangent> by enumeration, where U is
    the success of sampling at the temperature."""
    model, reward, g_rl, g_sft, state = toy(10)
    tangent = amft.step_sensitivity(amft.flatten(model), g_rl, g_sft, 0.5, state, lr=0.05)[0]
    config, expected, total = configured(temperature=temperature), [], []
    for prompt, r in zip(PROMPTS[:2], reward):
        right, wrong = r.nonzero().squeeze(1)[:4].tolist(), (1 - r).nonzero().squeeze(1)[:7].tolist()
        chosen = right + wrong  # a task whose responses are these, renormalised: fewer pairs, as exact
        logps = exact_logps(model, prompt, temperature)[chosen].log_softmax(0)
        p = logps.exp().detach()
        # sum over pairs of p_i p_j estimate(i, j); pairs of equal reward have none
        value = 0.0
        for (i, y), (j, z) in itertools.product(enumerate(right), enumerate(wrong, len(right))):
            batch = batch_of(prompt.expand(2, -1), ALL[[y, z]])
            estimate = amft.meta_gradient(model, tangent, rollouts_of(batch, torch.tensor([[1.0, 0.0]])), config)[0]
            raw = exact_logps(model, prompt, temperature)
            # Given i right and j wrong, r_i - r_j = 1: half of the difference of their scores.
            score = flat_grad((raw[y] - raw[z]) / 2, model) @ tangent
            assert estimate == pytest.approx(score.item(), rel=1e-3, abs=1e-5 * tangent.norm().item())
            value += 2 * (p[i] * p[j]).item() * estimate
        total.append(value)
        expected.append((flat_grad(logps[:len(right)].exp().sum(), model) @ tangent).item())
    size = tangent.norm().item()
    assert total == pytest.approx(expected, rel=2e-3, abs=1e-5 * size)


def test_meta_gradient_against_a_slow_loop():
    """Prompts of different difficulty, one without a signal, conversations of different length: each sample's reward
    less the mean of its prompt's others, times its score; the standard error is over prompts."""
    model, P, G = toy_model(), 5, 4
    prompts, said = PROMPTS[[0, 1, 2, 0, 1]].repeat_interleave(G, 0), torch.randint(V, (P * G, T))
    mask = torch.ones(P * G, T)
    mask[torch.randperm(P * G)[:6], 1] = 0
    success = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]])
    tangent, tau, slopes = torch.randn_like(amft.flatten(model)), 0.7, []
    for p in range(P):
        total = 0.0
        for g in range(G):
            ids = torch.cat([prompts[p * G + g], said[p * G + g]]).unsqueeze(0)
            logp = (model(ids).logits[0] / tau).log_softmax(-1)
            others = sum(success[p, k] for k in range(G) if k != g) / (G - 1)
            total = total + (success[p, g] - others) * sum(
                mask[p * G + g, t] * logp[2 + t, ids[0, 3 + t]] for t in range(T)) / G
        slopes.append((flat_grad(total, model) @ tangent).item())
    slope, error = amft.meta_gradient(model, tangent, rollouts_of(batch_of(prompts, said, mask), success),
                                      configured(temperature=tau, samples=G))
    size = np.abs(slopes).max()
    assert slope == pytest.approx(np.mean(slopes), rel=1e-4, abs=1e-5 * size)
    assert error == pytest.approx(np.std(slopes, ddof=1) / math.sqrt(P), rel=1e-4) and slopes[2] == slopes[4] == 0


def test_the_standard_error_of_the_meta_gradient_covers():
    """Sampled on the toy world through a linear stand-in for the policy's scores: 95% of intervals hold the truth."""
    model, reward, g_rl, g_sft, state = toy(10)
    tangent = amft.step_sensitivity(amft.flatten(model), g_rl, g_sft, 0.5, state, lr=0.05)[0]
    with torch.no_grad():
        probabilities = torch.stack([exact_logps(model, p).exp() for p in PROMPTS])
    scores = torch.stack([torch.stack([flat_grad(exact_logps(model, p)[y], model) @ tangent for y in range(len(ALL))])
                          for p in PROMPTS])
    truth = (probabilities * reward * scores).sum().item() / 3
    P, G, repetitions = 24, 4, 150
    estimates, errors = np.zeros(repetitions), np.zeros(repetitions)
    for i in range(repetitions):
        which = torch.randint(3, (P,))
        samples = torch.multinomial(probabilities[which], G, replacement=True)
        batch = batch_of(PROMPTS[which].repeat_interleave(G, 0), ALL[samples.flatten()])
        success = reward[which.unsqueeze(1), samples]
        estimates[i], errors[i] = amft.meta_gradient(model, tangent, rollouts_of(batch, success), configured())
    assert abs(estimates.mean() - truth) < 4.5 * estimates.std() / math.sqrt(repetitions)
    assert np.sqrt(np.mean(errors ** 2)) == pytest.approx(estimates.std(), rel=0.45)
    # Half the error would cover 67%; where success is rare the mean of so few prompts is skewed, and 95% is not reached.
    assert np.mean(abs(estimates - truth) < 1.96 * errors) > 0.78


def test_adams_first_step_hides_mu():
    """On fresh moments the step is sign(g): d theta'/d mu is about 0, however large g_SFT - g_RL. Later it is not."""
    theta, mixed, apart = torch.randn(3, 50, dtype=torch.float64)
    mixed += 0.1 * mixed.sign()  # where it is as small as eps the sign has a slope
    g_rl, g_sft = mixed - apart / 2, mixed + apart / 2
    state = amft.AdamState(torch.zeros_like(theta), torch.zeros_like(theta), 0)
    norms = []
    for _ in range(3):
        norms.append(amft.step_sensitivity(theta, g_rl, g_sft, 0.5, state, lr=1.0, max_norm=1e9)[0].norm().item())
        theta, state = amft.adamw_step(theta, torch.randn_like(theta), state, lr=1.0, max_norm=1e9)
    assert norms[0] < 1e-4 and min(norms[1:]) > 0.1


def test_sensitivity_is_finite_where_no_gradient_ever_came():
    theta, zeros = torch.randn(4), torch.zeros(4)
    g_rl, g_sft = torch.tensor([0.0, 1, 0, 2]), torch.tensor([0.0, 0, 3, 2])
    for state in (amft.AdamState(zeros, zeros, 0), amft.AdamState(zeros, torch.tensor([0.0, 1, 1, 1]), 9)):
        tangent = amft.step_sensitivity(theta, g_rl, g_sft, 0.5, state, lr=0.1)[0]
        assert tangent.isfinite().all() and tangent[0] == 0
        assert amft.step_sensitivity(theta, zeros, zeros, 0.5, state, lr=0.1)[0].isfinite().all()


@pytest.mark.parametrize("advantage", ["group", "gae"])
def test_own_meta_gradient_is_the_slope_of_the_samples_utility(advantage):
    """Central differences in float64, conversation by conversation: d/dh of the mean of (r - baseline) log pi at
    theta + h tangent. Conversations of different length, a prompt without signal, the others not equally hard."""
    model, G, tau = toy_model(), 6, 0.8
    prompts = PROMPTS[[0, 1, 2, 0]].repeat_interleave(G, 0)
    said = torch.randint(V, (4 * G, T))
    mask = torch.ones(4 * G, T)
    mask[torch.randperm(4 * G)[:9], 1] = 0  # these stopped after one token
    success = torch.zeros(4, G, dtype=torch.float64)
    for row, right in enumerate((1, 3, 5)):
        success[row, torch.randperm(G)[:right]] = 1.0
    rollouts = rollouts_of(batch_of(prompts, said, mask), success)
    config = configured(advantage=advantage, samples=G, temperature=tau)
    phi = None
    if advantage == "gae":  # a value of 0 everywhere: every token's return is the conversation's reward
        phi = amft.value_function(model)
        phi[-1].weight.data.zero_(), phi[-1].bias.data.zero_()
        baseline = torch.full((4 * G,), ((success.flatten() * mask.sum(1)).sum() / mask.sum()).item()).double()
    else:  # the mean of a prompt's other samples
        baseline = ((success.sum(1, keepdim=True) - success) / (G - 1)).flatten()
    advantages = amft.advantages_of(model, phi, rollouts, config)
    g_rl = amft.rl_gradient(model, rollouts.batch, advantages, config)[0]
    tangent = torch.randn_like(amft.flatten(model))

    def weighted(h):
        moved = copy.deepcopy(model)
        vector_to_parameters(amft.flatten(model) + h * tangent, moved.parameters())
        total = 0.0
        for ids, words, m, r, b in zip(prompts, said, mask, success.flatten(), baseline):
            logits = (moved(torch.cat([ids, words]).unsqueeze(0)).logits[0] / tau).log_softmax(-1)
            total += (r - b) * sum(m[t] * logits[2 + t, words[t]] for t in range(T))
        return total.item() / (4 * G)
    with torch.no_grad():
        expected = (weighted(1e-5) - weighted(-1e-5)) / 2e-5
    slope, error = amft.own_meta_gradient(g_rl, tangent, rollouts.batch, advantages.scale)
    size = (g_rl.norm() * tangent.norm()).item() * advantages.scale * T
    assert slope == pytest.approx(expected, rel=1e-4, abs=1e-5 * size) and error == abs(slope) > 0


def test_own_meta_gradient_is_unbiased_whatever_the_value_function_says(monkeypatch):
    """Sampled on the toy world with a value function that knows nothing: mean over repetitions = <grad U, tangent> by
    enumeration; also where every response succeeds and U is flat. With lambda = 0 the RL gradient has a direction of
    its own there, and praises a policy that went that way: the tangent."""
    model, reward, _, _, _ = toy(0)
    phi = amft.value_function(model)
    roughened(phi)
    with torch.no_grad():
        probabilities = torch.stack([exact_logps(model, p).exp() for p in PROMPTS])
    true = amft.gae

    def sampled(reward, lam, B=384):
        which = torch.randint(3, (B,))
        samples = torch.multinomial(probabilities[which], 1).squeeze(1)
        rollouts = rollouts_of(batch_of(PROMPTS[which], ALL[samples]), reward[which, samples].view(-1, 8))
        if lam < 1:
            monkeypatch.setattr(amft, "gae", partial(true, lam=lam))
        learner = copy.deepcopy(phi)
        learner.optimizer = torch.optim.Adam(learner.parameters())
        advantages = amft.advantages_of(model, learner, rollouts, configured())
        monkeypatch.setattr(amft, "gae", true)
        return amft.rl_gradient(model, rollouts.batch, advantages, configured())[0], rollouts, advantages.scale
    always = torch.ones_like(reward)
    tangent = -sum(sampled(always, 0.0)[0] for _ in range(20))

    def z_of(reward, lam, repetitions=40):  # of the mean's distance from the truth
        truth = (flat_grad(exact_utility(model, reward), model) @ tangent).item()
        slopes = [amft.own_meta_gradient(g, tangent, r.batch, scale)[0]
                  for g, r, scale in (sampled(reward, lam) for _ in range(repetitions))]
        return (np.mean(slopes) - truth) / (np.std(slopes, ddof=1) / math.sqrt(repetitions))
    assert abs(z_of(reward, 1.0)) < 4.5 and abs(z_of(always, 1.0)) < 4.5 and z_of(always, 0.0, 160) > 3


@pytest.mark.parametrize("max_norm", [1e6, 0.1])
@pytest.mark.parametrize("with_last", [False, True])
def test_slices_give_the_step_and_its_derivative_of_the_whole(max_norm, with_last, monkeypatch):
    """In slices that do not divide N, against forward mode through a textbook step of the whole vector, which clips by
    the length of the whole: the one thing that ties slices together."""
    N, mu, trace, step, lr = 23, 0.3, 0.7, 4, 0.05
    theta, g_rl, g_sft, m, v, *last = torch.randn(8, N, dtype=torch.float64)
    last, v = last if with_last else None, v ** 2

    def whole(mu, theta, m, v):
        grad = (1 - mu) * g_rl + mu * g_sft
        grad = grad * torch.clamp(max_norm / (torch.linalg.vector_norm(grad) + 1e-6), max=1.0)
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad ** 2
        return theta - lr * (m / (1 - 0.9 ** step)) / ((v / (1 - 0.999 ** step)).sqrt() + 1e-8), m, v
    mus = torch.tensor(mu, dtype=torch.float64)
    moved = [trace * x for x in last] if with_last else [torch.zeros_like(theta)] * 3
    expected, slopes = torch.func.jvp(whole, (mus, theta, m, v), (torch.ones_like(mus), *moved))
    for size in (5, N, 1):
        monkeypatch.setattr(amft, "sliced", partial(tasks.sliced, size=size))
        state, how = amft.AdamState(m, v, step - 1), dict(lr=lr, max_norm=max_norm)
        after, adam = amft.adamw_step(theta, (1 - mu) * g_rl + mu * g_sft, state, **how)
        for actual, right in zip((after, adam.m, adam.v), expected):
            torch.testing.assert_close(actual, right, rtol=1e-12, atol=1e-14)
        for actual, right in zip(amft.step_sensitivity(theta, g_rl, g_sft, mu, state, last, trace, **how), slopes):
            torch.testing.assert_close(actual, right, rtol=1e-12, atol=1e-14)


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, as their storages come and go: `peak` is the most at one time."""
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, {}

    def gone(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self.gone, key)
                self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        return out


def test_floats_a_parameter_at_the_peak_of_a_run(tmp_path, tokenizer, monkeypatch, unevaluated, rewarded):
    """theta (the model's own), Adam's m and v, three d/d mu, two gradients and the three new d/d mu: 11 floats of memory a
    parameter at the peak of whole AMFT steps, and what slices of N/64 need. While gradients are made, when activations
    come on top, 9 or 10. A model whose activations are small; what generation needs is not counted."""
    folder = tmp_path / "wide"
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(amft.Run, "save", lambda *_: None)
    true = tasks.sliced
    monkeypatch.setattr(amft, "sliced", lambda *a: true(*a, size=max(true.__kwdefaults__["size"] >> 8, len(a[1]) >> 6)))
    peaks, alive = {}, Alive()

    def watched(name, true):
        def watch(*args, **kwargs):
            before, alive.peak = alive.peak, alive.now
            result = true(*args, **kwargs)
            peaks[name], alive.peak = max(peaks.get(name, 0), alive.peak), max(alive.peak, before)
            return result
        return watch
    for name in ("rl_gradient", "sft_gradient", "meta_gradient", "step_sensitivity", "adamw_step"):
        monkeypatch.setattr(amft, name, watched(name, getattr(amft, name)))
    rollout = amft.rollout

    def uncounted(*args):
        with _disable_current_modes():
            return rollout(*args)
    monkeypatch.setattr(amft, "rollout", uncounted)
    with alive:
        tiny_run(str(folder), tmp_path / "run", "--prompts", "2", "--samples", "2", "--sft-batch", "2", "--micro-tokens", "1",
                 "--warmup", "0", "--steps", "2", "--meta-every", "1", "--advantage", "group", "--demos", "50")
    N = len(final_policy(tmp_path / "run"))
    floats = {name: peak / 4 / N for name, peak in peaks.items()}
    assert 11 < alive.peak / 4 / N < 11.6, floats  # a lower one means that this no longer counts all
    assert 11 < floats.pop("step_sensitivity") and 10 < floats.pop("adamw_step") < 10.3
    assert len(floats) == 3 and max(floats.values()) < 10.2 and floats["rl_gradient"] < 9.2


def test_mu_follows_the_logged_meta_gradients(tiny, tmp_path, monkeypatch, unevaluated, rewarded):
    """Every force and every mu again from the log, in a slow loop: a step's own gradients move its own mu, along the
    d theta/d mu that the steps before it left."""
    steps, grads = spied(monkeypatch, "step_sensitivity"), spied(monkeypatch, "rl_gradient")
    owns, metas = spied(monkeypatch, "own_meta_gradient"), spied(monkeypatch, "meta_gradient")
    rows = [r for r in tiny_run(tiny, tmp_path / "run", "--steps", "12", "--trace", "0.5", "--eta-h", "0.1")
            if r["kind"] == "step" and r["step"] > 3]
    assert len(owns) == 8 and len(steps) == len(grads) == 9
    for i, own in enumerate(owns):  # the second mixed step has a step before it
        assert own["g_rl"] is grads[i + 1]["returns"][0] and own["tangent"] is steps[i]["returns"][0]
    assert [r["step"] for r in rows if "meta_grad" in r] == [5, 7, 9, 11] == [4 + 1 + 2 * i for i in range(len(metas))]
    assert all(meta["tangent"] is steps[2 * i]["returns"][0] for i, meta in enumerate(metas))
    mu, total, square = 0.5, 0.0, 0.0
    for row in rows:
        new = [(row["meta_own"], row["meta_own"])] if row.get("meta_own") else []
        new += [(row["meta_grad"], row["meta_se"])] if row.get("meta_se") else []
        force = 0.0
        if new:  # evidence fades where there is new evidence
            total, square = 0.98 * total + sum(x for x, _ in new), 0.98 ** 2 * square + sum(e * e for _, e in new)
            force = 0.05 * math.erf(total / math.sqrt(2 * square))
        assert row["meta_force"] == pytest.approx(force)
        assert row["entropy_force"] == pytest.approx(0.1 * (rows[0]["entropy"] - row["entropy"]))
        mu = min(max(mu + force + row["entropy_force"], 0.05), 0.95)
        assert row["mu"] == pytest.approx(mu)
    assert sum(r["meta_force"] != 0 for r in rows) >= 4
    for choice, own, meta in (("val", 0, 1), ("train", 1, 0)):
        rows = tiny_run(tiny, tmp_path / choice, "--utility", choice)
        assert (any("meta_own" in r for r in rows), any("meta_grad" in r for r in rows)) == (own, meta)


def test_the_step_and_its_derivative_hang_together_in_training(tiny, tmp_path, monkeypatch, unevaluated, rewarded):
    """Each d theta/d mu is taken of the step that is taken, at its learning rate (which falls linearly to 0) and its mu,
    from the theta and moments before it, and is handed the one before at the share trace."""
    derivatives, moves = spied(monkeypatch, "step_sensitivity"), spied(monkeypatch, "adamw_step")
    rows = tiny_run(tiny, tmp_path / "run", "--trace", "0.7", "--lr", "1e-3")
    mus, taken, before = [row["mu"] for row in rows if row["kind"] == "step"], moves[:1], None
    for move in moves:  # the derivative itself takes steps, which lead nowhere
        if move["theta"] is taken[-1]["returns"][0]:
            taken.append(move)
    assert [move["lr"] for move in taken] == pytest.approx([1e-3 * (1 - i / 9) for i in range(9)])
    assert len(derivatives) == 6
    for said, move, mu in zip(derivatives, taken[3:], mus[3:]):
        assert said["lr"] == move["lr"] and said["mu"] == mu and said["last"] is before
        assert said["theta"] is move["theta"] and said["state"] is move["state"]
        assert before is None or said["trace"] == 0.7
        close(move["grad"], (1 - mu) * said["g_rl"] + mu * said["g_sft"], 1e-6)
        before = said["returns"]
    other = tiny_run(tiny, tmp_path / "other", "--trace", "0", "--lr", "1e-3")
    assert [r.get("meta_own") for r in other] != [r.get("meta_own") for r in rows]


def test_sensitivity_fades_once_a_step_however_many_updates_it_has(tiny, tmp_path, monkeypatch, unevaluated, rewarded):
    """All updates of a step belong to its one mu: --trace 0 keeps them all and forgets the step before. And the old
    log-probabilities are those of the policy that sampled, at every update."""
    derivatives, grads = spied(monkeypatch, "step_sensitivity"), spied(monkeypatch, "rl_gradient")
    moves = spied(monkeypatch, "update_mu")
    tiny_run(tiny, tmp_path / "run", "--ppo-epochs", "3", "--trace", "0", "--lr", "1e-2", "--utility", "train")
    assert len(moves) == 6  # mu moves once a step
    assert [said["trace"] for said in derivatives] == [0, 1, 1] * 6
    assert all(said["last"] is derivatives[i - 1]["returns"] for i, said in enumerate(derivatives) if i)
    for i in range(0, 18, 3):
        at_sampling = grads[i]["returns"][1]
        assert grads[i]["old_logps"] is None
        assert all(torch.equal(later["old_logps"], at_sampling) for later in grads[i + 1:i + 3])
    assert any(not torch.equal(a["returns"][1], b["returns"][1]) for a, b in zip(grads[::3], grads[1::3]))


def test_the_target_entropy_is_measured_once_and_the_look_ahead_is_on_validation_prompts(tiny, tmp_path, monkeypatch,
                                                                                        unevaluated, rewarded):
    seen = spied(monkeypatch, "rollout")
    rows = [r for r in tiny_run(tiny, tmp_path / "run", "--temperature", "1.3") if r["kind"] == "step"]
    mixed = [r for r in rows if "entropy" in r]
    assert [r["step"] for r in mixed] == [4, 5, 6, 7, 8, 9]
    assert {r["target_entropy"] for r in mixed} == {mixed[0]["entropy"]} and len({r["entropy"] for r in mixed}) > 1
    roles = [{tasks.ROLES[e.unit] for e in call["returns"].episodes} for call in seen]
    assert roles == [{r} for r in "train train val train train val train train val".split()]
    for call in seen:  # exploration and look-ahead are at the temperature
        assert call["temperature"] == 1.3 and call["max_new_tokens"] == 34 and call["samples"] == 4


def test_published_settings_leave_mu_to_the_entropy_term(base):
    """Policy learning rate 1e-6, eta_mu 1e-4, a meta-gradient every 20 of 500 steps: mu moves by less than 1e-6."""
    config = configured(controller="paper", eta_mu=1e-4, eta_h=0.0, lr=1e-6, utility="val", trace=0.0,
                        advantage="group", samples=8, prompts=16)
    task, rng = tasks.GeneralPoints(), random.Random(SEED)
    (model, tokenizer), start = base, amft.flatten(base[0])
    theta, tangent = start, None
    state = amft.AdamState(torch.zeros_like(theta), torch.zeros_like(theta), 0)

    def demos():
        return amft.encode_demos(model, tokenizer, [task.sample("train", rng) for _ in range(16)])
    for _ in range(30):  # the published warm-up; on fresh moments a few entries with g(mu) near 0 make heavy tails
        theta, state = amft.adamw_step(theta, amft.sft_gradient(model, demos(), config, no_rows)[0], state, lr=config.lr)
    for _ in range(3):
        seen = amft.rollout(model, tokenizer, [task.sample("train", rng) for _ in range(16)], 8, 40)
        advantages = amft.advantages_of(model, None, seen, config)
        g_sft = amft.sft_gradient(model, demos(), config, no_rows)[0]
        g_rl = amft.rl_gradient(model, seen.batch, advantages, config)[0]
        tangent = amft.step_sensitivity(theta, g_rl, g_sft, 0.5, state, lr=config.lr)[0]
        theta, state = amft.adamw_step(theta, (g_rl + g_sft) / 2, state, lr=config.lr)
    vector_to_parameters(theta, model.parameters())
    seen = amft.rollout(model, tokenizer, [task.sample("val", rng) for _ in range(16)], 8, 40)
    slope, error = amft.meta_gradient(model, tangent, seen, config)
    vector_to_parameters(start, model.parameters())
    assert error > 0
    mu = 0.5
    for _ in range(500 // 20):  # all 25 updates in the same direction, and at the far end of the interval
        mu, _, _ = amft.update_mu(mu, 1.0, 1.0, [(abs(slope) + 2 * error, error)], (0.0, 0.0), config)
    assert 0 < mu - 0.5 < 1e-6, (slope, error)


def test_reference_codes_formula_has_the_wrong_sign():
    """The public code adds -alpha <grad CE_val, g_SFT - g_RL> to mu (adaptive_weight_controller.py:41, :80): under its
    own SGD step that is d CE_val/d mu, so mu climbs the validation loss. Utility is -CE_val; by finite differences."""
    model, _, g_rl, g_sft, _ = toy(3)
    labels = torch.randint(len(ALL), (3,))
    theta, alpha, mu, h = amft.flatten(model), 0.05, 0.5, 1e-5

    def cross_entropy(theta):
        vector_to_parameters(theta.clone(), model.parameters())
        return -sum(exact_logps(model, p)[y] for p, y in zip(PROMPTS, labels)) / 3

    def utility(mu):
        with torch.no_grad():
            return -cross_entropy(theta - alpha * ((1 - mu) * g_rl + mu * g_sft)).item()
    slope = (utility(mu + h) - utility(mu - h)) / (2 * h)
    stepped = theta - alpha * (g_rl + g_sft) / 2
    reference = -alpha * (flat_grad(cross_entropy(stepped), model) @ (g_sft - g_rl)).item()
    assert reference == pytest.approx(-slope, rel=1e-4, abs=1e-8 * alpha) and slope != 0


# --- the controller -----------------------------------------------------------------------------------------------


def controller(**settings):
    return configured(**dict(dict(eta_mu=0.1, eta_h=0.5, mu_min=0.1, mu_max=0.9), **settings))


def test_controller_on_hand_computed_values():
    update = partial(amft.update_mu, memory=0.5)
    # Entropy 0.2 below target, no meta-gradient: Eq. 6 raises mu by 0.5 * 0.2; the paper's text lowers it.
    assert update(0.5, 1.0, 1.2, (), (0.0, 0.0), controller())[0] == pytest.approx(0.6)
    assert update(0.5, 1.0, 1.2, (), (0.0, 0.0), controller(eta_h=-0.5))[0] == pytest.approx(0.4)
    assert update(0.5, 1.0, 1.2, (), (0.0, 0.0), controller(eta_h=0.0))[0] == 0.5
    # Eq. 6 to the letter.
    mu, _, forces = update(0.5, 1.0, 1.2, [(-3.0, 1.0)], (0.0, 0.0), controller(controller="paper"))
    assert mu == pytest.approx(0.5 - 0.3 + 0.1) and forces == pytest.approx((-0.3, 0.1))
    assert update(0.5, 0.0, 9.0, (), (0.0, 0.0), controller())[0] == 0.9  # mu_max
    assert update(0.5, 9.0, 0.0, (), (0.0, 0.0), controller())[0] == 0.1  # mu_min
    # Evidence: z = -2 moves mu by eta_mu (2 Phi(-2) - 1) = -0.1 * 0.9544997.
    mu, evidence, forces = update(0.5, 1.0, 1.0, [(-4.0, 2.0)], (0.0, 0.0), controller())
    assert forces[0] == pytest.approx(-0.09544997) and evidence == pytest.approx((-4.0, 4.0))
    # Then 0.5 * -4 + 2 = 0 with variance 0.25 * 4 + 9: contradicting evidence cancels.
    mu, evidence, forces = update(mu, 1.0, 1.0, [(2.0, 3.0)], evidence, controller())
    assert forces[0] == 0 and evidence == pytest.approx((0.0, 10.0))
    # No group with signal: nothing is known, nothing moves.
    assert update(0.5, 1.0, 1.0, [(0.0, 0.0)], (0.0, 0.0), controller())[0] == 0.5
    # Two new estimates enter side by side: the sum 3 - 4, variances 1 + 4; the old evidence fades once.
    assert update(0.5, 1.0, 1.0, [(3.0, 1.0), (-4.0, 2.0)], (2.0, 8.0), controller())[1] == pytest.approx((0.0, 7.0))
    assert update(0.5, 1.0, 1.0, [(3.0, 1.0), (0.0, 0.0)], (2.0, 8.0), controller())[1] == pytest.approx((4.0, 3.0))


def test_evidence_does_not_depend_on_the_scale_of_the_meta_gradient_and_is_calibrated_without_signal():
    rng = np.random.default_rng(SEED)
    noise, moves = rng.normal(size=4000), []
    for scale in (1.0, 1e-9):
        evidence, forces = (0.0, 0.0), []
        for x in noise * scale:
            _, evidence, (force, _) = amft.update_mu(0.5, 1.0, 1.0, [(x, scale)], evidence, controller(eta_mu=1.0),
                                                     memory=0.5)
            forces.append(force)
        moves.append(np.array(forces))
    np.testing.assert_allclose(moves[0], moves[1], rtol=1e-6)
    # Under no signal 2 Phi(z) - 1 is uniform on (-1, 1).
    assert abs(moves[0].mean()) < 0.07 and moves[0].std() == pytest.approx(1 / math.sqrt(3), rel=0.07)


# --- rewards and losses -------------------------------------------------------------------------------------------


def no_rows(logps, mask, tokens, rows):
    """amft.sft_loss as sft_gradient calls it."""
    return amft.sft_loss(logps, mask, tokens)


def random_batch(B=6, T=7):
    mask = (torch.rand(B, T) < 0.6).double()  # holes: what the environment says between two responses
    mask[:, 0] = 1.0
    return mask, [torch.randn(B, T, dtype=torch.float64) for _ in range(3)]


def test_losses_against_slow_loops():
    mask, (logps, old, advantages) = random_batch()
    logps.requires_grad_()
    nll, surrogate, count = 0.0, 0.0, 0
    for b in range(len(mask)):
        for t in range(mask.shape[1]):
            if mask[b, t] == 0:
                continue
            count += 1
            ratio, a = math.e ** (logps[b, t] - old[b, t]), advantages[b, t]
            clipped = 0.8 if ratio < 0.8 else 1.2 if ratio > 1.2 else ratio
            nll = nll - logps[b, t]
            surrogate = surrogate - (ratio * a if ratio * a < clipped * a else clipped * a)
    for actual, expected in ((amft.sft_loss(logps, mask), nll / count),
                             (amft.ppo_loss(logps, old, advantages, mask, 0.2), surrogate / count),
                             (amft.sft_loss(logps, mask, tokens=100), nll / 100),
                             (amft.ppo_loss(logps, old, advantages, mask, 0.2, tokens=100), surrogate / 100)):
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x, logps, retain_graph=True)[0] for x in (actual, expected)))
    rewards = amft.implicit_reward(logps, old, mask, beta=0.3)
    for b in range(len(mask)):
        assert rewards[b].item() == pytest.approx(0.3 * sum((logps - old)[b, t].item() for t in range(7) if mask[b, t]))


def test_gae_against_its_definition():
    """A_t = sum_k (gamma lam)^k delta_{t+k} over the policy's own tokens, summed directly, one row at a time."""
    mask, (rewards, values, _) = random_batch()
    gamma, lam = 0.9, 0.8
    advantages, returns = amft.gae(rewards * mask, values * mask, mask, gamma, lam)
    for b in range(len(mask)):
        own = [t for t in range(mask.shape[1]) if mask[b, t]]
        v = [values[b, t].item() for t in own] + [0.0]
        delta = [rewards[b, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(own)]
        for t in set(range(mask.shape[1])) - set(own):
            assert advantages[b, t] == returns[b, t] == 0
        for i, t in enumerate(own):
            expected = sum((gamma * lam) ** (k - i) * delta[k] for k in range(i, len(own)))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(expected + v[i], abs=1e-12)


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [5, -1, -3, -1]], dtype=torch.float64)
    actual, scale = amft.group_advantages(rewards)
    expected = torch.tensor([[r - (sum(row) - r) / 3 for r in row] for row in rewards.tolist()], dtype=torch.float64)
    torch.testing.assert_close(actual * scale, expected)
    assert scale == pytest.approx(np.std(expected.numpy()))  # one for the batch, of the population
    assert actual[0].tolist() == pytest.approx([1 / scale, -1 / 3 / scale, -1 / 3 / scale, -1 / 3 / scale])
    flat, scale = amft.group_advantages(torch.ones(3, 4))
    assert (flat == 0).all() and scale > 0
    with pytest.raises(ValueError):
        amft.group_advantages(torch.ones(3, 1))


def test_log_probabilities_of_large_logits():
    """log(softmax) would underflow to -inf; the temperature must not round either."""
    logits = torch.tensor([[[0.0, 300.0, -300.0], [1e4, 0.0, 1e4]]])
    logps = amft.token_logps(logits, torch.tensor([[2, 1]]))
    torch.testing.assert_close(logps, torch.tensor([[-600.0, -1e4 - math.log(2)]]))
    logits = 3 * torch.randn(2, 3, V, dtype=torch.float64)
    ids = torch.randint(V, (2, 3))
    expected = [[(logits[b, t, ids[b, t]] - sum(x.exp() for x in logits[b, t]).log()).item() for t in range(3)]
                for b in range(2)]
    np.testing.assert_allclose(amft.token_logps(logits, ids), expected, rtol=1e-9)


def test_the_temperature_of_log_probabilities():
    model, batch = toy_model(), sequences(PROMPTS[2])
    for temperature in (1.0, 0.5, 2.0):
        expected = exact_logps(model, PROMPTS[2], temperature).detach()
        np.testing.assert_allclose(amft.logps_of(model, batch, temperature).sum(1).detach(), expected, rtol=1e-4)


@pytest.mark.parametrize("imitation", ["nll", "rectified"])
def test_the_loss_of_a_demonstration(imitation):
    """Rectified: each token's negative log-likelihood times its own probability, a constant; by a slow loop."""
    model, batch = toy_model(), sequences(PROMPTS[0]).rows(torch.arange(0, 25, 3))
    batch = batch._replace(mask=(torch.rand(batch.mask.shape) < 0.7).double())
    batch.mask[:, 0] = 1.0
    method, total = amft.SFT(configured(imitation=imitation)), 0.0
    for b, m in zip(batch.ids, batch.mask):
        logps = model(b.unsqueeze(0)).logits[0].log_softmax(-1)
        for t in range(T):
            logp = logps[2 + t, b[3 + t]]
            total = total - m[t] * logp * (logp.exp().item() if imitation == "rectified" else 1.0)
    expected = flat_grad(total / batch.mask.sum(), model)
    for size in (9, 2):
        config = configured(micro_tokens=size * batch.ids.shape[1])
        grad, logps, losses = amft.sft_gradient(model, batch, config, partial(method.imitation_loss, None))
        close(grad, expected, 1e-4)
        assert losses == pytest.approx((-(logps * batch.mask).sum() / batch.mask.sum()).item(), rel=1e-4)


@pytest.mark.parametrize("advantage", ["group", "gae"])
def test_graded_rewards_are_the_tasks_points(advantage):
    """--reward graded pays each response's points where it ends, binary 1 for a conversation that succeeded."""
    model, B = toy_model(), 8
    mask = torch.ones(B, T)
    mask[1::2, 1] = 0
    graded = torch.randn(B, T) * mask
    success = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    rollouts = rollouts_of(batch_of(PROMPTS[torch.arange(B) % 3], torch.randint(V, (B, T)), mask), success, graded)
    last = torch.tensor([1, 0] * 4)
    for reward in ("graded", "binary"):
        config = configured(reward=reward, advantage=advantage)
        paid = graded if reward == "graded" else torch.zeros_like(mask)
        if reward == "binary":
            paid[range(B), last] = success.flatten()
        if advantage == "group":
            actual = amft.advantages_of(model, None, rollouts, config)
            totals = paid.sum(1).view(2, 4)
            others = (totals.sum(1, keepdim=True) - totals) / 3
            expected = ((totals - others).reshape(-1, 1) * mask)
            torch.testing.assert_close(actual.values * actual.scale, expected)
        else:
            phi = amft.value_function(model)
            phi[-1].weight.data.zero_(), phi[-1].bias.data.fill_(0.25)
            states = amft.outputs(model, rollouts.batch, hidden=True)[1].detach()
            learner = copy.deepcopy(phi)
            optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
            actual = amft.advantages_of(model, phi, rollouts, config)
            togo = paid.flip(1).cumsum(1).flip(1) * mask  # returns, with lambda and gamma 1
            expected = (togo - 0.25) * mask
            mean = expected.sum() / mask.sum()
            torch.testing.assert_close(actual.values * actual.scale, (expected - mean) * mask)
            # phi takes Adam's step towards the returns, beside theta and not with it.
            (0.5 * ((learner(states).squeeze(-1) - togo) ** 2 * mask).sum() / mask.sum()).backward()
            optimizer.step()
            for moved, expected in zip(phi.parameters(), learner.parameters()):
                torch.testing.assert_close(moved, expected)
            own = actual.values[mask.bool()]
            assert own.std(correction=0).item() == pytest.approx(1.0, rel=1e-3)


def test_an_update_with_old_samples_is_the_clipped_one():
    """The RL gradient at a second update: PPO's, against the log-probabilities of the policy that sampled."""
    model, B, tau = toy_model(), 12, 0.7
    batch = batch_of(PROMPTS[torch.arange(B) % 3], torch.randint(V, (B, T)))
    advantages = amft.Advantages(torch.randn(B, T), 1.0)
    with torch.no_grad():
        old = amft.logps_of(model, batch, tau) + 0.3 * torch.randn(B, T)
    total = 0.0
    for b, row in enumerate(batch.ids):
        logps = (model(row.unsqueeze(0)).logits[0] / tau).log_softmax(-1)
        for t in range(T):
            ratio, a = (logps[2 + t, row[3 + t]] - old[b, t]).exp(), advantages.values[b, t]
            total = total - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) / (B * T)
    expected = flat_grad(total, model)
    for size in (12, 5):
        grad, logps, losses = amft.rl_gradient(model, batch, advantages,
                                               configured(temperature=tau, micro_tokens=size * 5), old)
        close(grad, expected, 1e-4)
        assert losses == pytest.approx(total.item(), rel=1e-3, abs=1e-5)
        np.testing.assert_allclose(logps, amft.logps_of(model, batch, tau).detach(), rtol=1e-4, atol=1e-6)


def test_sft_is_policy_gradient_with_the_implicit_reward():
    """By enumeration: grad L_SFT = -E_{y~pi}[1[y = y*] / pi(y|x) grad log pi(y|x)], exact-match RL is the same without
    the 1/pi, and mu L_SFT = mu KL(pi_demo || pi) + mu H(pi_demo)."""
    model, prompt, best = toy_model(), PROMPTS[0], 7
    batch = sequences(prompt).rows(torch.tensor([best]))
    g_sft = flat_grad(amft.sft_loss(amft.logps_of(model, batch), batch.mask, tokens=1), model)
    policy_gradient = exact_match = 0.0
    for y in range(len(ALL)):
        logps = exact_logps(model, prompt)
        pi, hit = logps[y].exp().item(), float(y == best)
        score = flat_grad(logps[y], model)
        policy_gradient, exact_match = policy_gradient + pi * (hit / pi) * score, exact_match + pi * hit * score
    close(g_sft, -policy_gradient, 1e-5)
    close(-g_sft * exact_logps(model, prompt)[best].exp(), exact_match, 1e-5)
    # PPO on every response at its probability, advantage 1[y = y*], is exact-match RL.
    everything = sequences(prompt)
    logps = amft.logps_of(model, everything)
    weighted = (torch.arange(len(ALL)) == best).double().unsqueeze(1) * everything.mask
    weighted = weighted * logps.sum(1, keepdim=True).detach().exp()
    g_rl = flat_grad(amft.ppo_loss(logps, logps.detach(), weighted, everything.mask, tokens=1), model)
    close(g_rl, -exact_match, 1e-5)
    # Demonstrations that are samples of pi_demo: the expected loss is KL plus a constant.
    demo = torch.rand(len(ALL), dtype=torch.float64).softmax(0)
    losses = torch.stack([amft.sft_loss(l.unsqueeze(0), torch.ones(1, T), tokens=1) for l in logps])
    kl = (demo * (demo.log() - exact_logps(model, prompt))).sum()
    torch.testing.assert_close((demo * losses).sum(), kl - (demo * demo.log()).sum(), rtol=1e-5, atol=1e-6)


# --- policy: encoding, sampling, masks ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return amft.load_policy(configured(), tasks.GeneralPoints())


def test_log_probabilities_do_not_depend_on_the_company(base, tokenizer):
    """Alone and unpadded, row by row and by a plain forward pass, against a left- and right-padded batch."""
    model, rng, task = base[0], random.Random(SEED), tasks.GeneralPoints()
    episodes = [task.sample(split, rng) for split in ("train", "heldout", "ood_rule", "ood_small")]
    batch = amft.encode_demos(model, tokenizer, episodes)
    extra = amft.Batch(*(torch.cat([pad, x], 1) for pad, x in (  # two more columns of padding on the left
        (torch.zeros(4, 2, dtype=torch.long), batch.ids), (torch.zeros(4, 2, dtype=torch.long), batch.attention))),
        batch.mask, batch.pixels)
    for b in (batch, extra):
        with torch.no_grad():
            logps = amft.logps_of(model, b)
        for episode, row, mask in zip(episodes, logps, b.mask):
            prompt = tokenizer(episode.prompt)["input_ids"]
            response = tokenizer(episode.expert)["input_ids"] + [tokenizer.eos_token_id]
            assert mask.sum() == len(response)  # EOS carries loss
            with torch.no_grad():
                plain = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            expected = [plain[len(prompt) + i - 1, token].item() for i, token in enumerate(response)]
            np.testing.assert_allclose(row[:len(response)], expected, atol=2e-4)


def test_left_padding_keeps_absolute_positions():
    """GPT-2 learns a vector for each position, so that a prompt shifted by its padding would show."""
    model, batch = toy_model(), sequences(PROMPTS[1])
    pad = torch.zeros(len(ALL), 2, dtype=torch.long)
    padded = amft.Batch(torch.cat([pad, batch.ids], 1), torch.cat([pad, batch.attention], 1), batch.mask,
                        batch.pixels)
    np.testing.assert_allclose(amft.logps_of(model, padded).sum(1).detach(),
                               exact_logps(model, PROMPTS[1]).detach(), rtol=1e-4)


def test_rollout_samples_the_policy(base, tokenizer):
    model, rng, task = base[0], random.Random(SEED), tasks.GeneralPoints()
    episodes = [task.sample("train", rng) for _ in range(3)]
    prompts = [episode.prompt for episode in episodes]
    rollouts = amft.rollout(model, tokenizer, episodes, 5, 40, temperature=1.0)
    batch, entropy, texts = rollouts.batch, rollouts.entropy, [e.responses[0] for e in rollouts.episodes]
    assert len(batch.ids) == len(texts) == 15 and batch.ids.shape[1] == batch.attention.shape[1]
    width, total, count = batch.mask.shape[1], 0.0, 0
    with torch.no_grad():
        logits = model(batch.ids).logits  # these prompts have one length, so there is no left padding
    for b, (ids, text) in enumerate(zip(batch.ids.tolist(), texts)):
        prompt, response = ids[:-width], ids[-width:]
        assert prompt == tokenizer(prompts[b // 5])["input_ids"]
        end = response.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in response else width
        assert batch.mask[b].tolist() == [1.0 if t <= end else 0.0 for t in range(width)]
        assert batch.attention[b].tolist() == [1] * len(prompt) + [int(m) for m in batch.mask[b]]
        assert text == tokenizer.decode(response[:end])
        for t in range(min(end + 1, width)):
            p = logits[b, len(prompt) + t - 1].softmax(-1)
            total, count = total - (p * p.clamp(min=1e-30).log()).sum().item(), count + 1
    assert entropy == pytest.approx(total / count, rel=1e-3)
    # Greedy from one shared reading of the prompts equals an argmax loop without any cache.
    greedy = amft.rollout(model, tokenizer, episodes, 1, 40, temperature=0).episodes
    for prompt, text in zip(prompts, (e.responses[0] for e in greedy)):
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        while len(ids) < start + 40 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert tokenizer.decode([i for i in ids[start:] if i != tokenizer.eos_token_id]) == text


def test_sampling_frequencies_and_truncation(tiny, tokenizer):
    """First tokens of 4,000 samples against softmax(logits / temperature): top-k or top-p left on would show."""
    model = LlamaForCausalLM.from_pretrained(tiny).eval()
    episode = tasks.GeneralPoints().sample("train", random.Random(SEED))
    rollouts = amft.rollout(model, tokenizer, [episode], 4000, 1, temperature=0.7)
    with torch.no_grad():
        p = (model(torch.tensor([tokenizer(episode.prompt)["input_ids"]])).logits[0, -1] / 0.7).softmax(-1).numpy()
    counts = np.bincount(rollouts.batch.ids[:, -1], minlength=len(p))
    assert (abs(counts - 4000 * p) < 5 * np.sqrt(4000 * p * (1 - p)) + 2).all()
    assert (p > 0).sum() == len(p) and (counts > 0).sum() > 55  # more than a top-50 would leave
    assert rollouts.truncated == pytest.approx(1 - counts[tokenizer.eos_token_id] / 4000)


def test_gradients_do_not_depend_on_micro_batches_and_silent_groups_add_nothing(base, tokenizer):
    model, rng, task = base[0], random.Random(SEED), tasks.GeneralPoints()
    episodes = [task.sample("train", rng) for _ in range(6)]
    config = configured(samples=4, advantage="group")
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [0] * 4, [1, 1, 1, 0]])
    rollouts = amft.rollout(model, tokenizer, episodes, 4, 40)._replace(success=rewards)
    advantages = amft.advantages_of(model, None, rollouts, config)
    logps = amft.logps_of(model, rollouts.batch)  # every row, in one pass, by the textbook formula
    weights = rewards - (rewards.sum(1, keepdim=True) - rewards) / 3
    weights = weights / weights.std(correction=0)
    expected = flat_grad(-(weights.reshape(-1, 1) * logps * rollouts.batch.mask).sum() / rollouts.batch.mask.sum(), model)
    demos = amft.encode_demos(model, tokenizer, episodes)
    reference = model(input_ids=demos.ids, attention_mask=demos.attention).logits.log_softmax(-1)
    picked = reference[:, -demos.mask.shape[1] - 1:-1].gather(-1, demos.responses.unsqueeze(-1)).squeeze(-1)
    expected_sft = flat_grad(-(picked * demos.mask).sum() / demos.mask.sum(), model)
    passes = spied_rows(model)
    for size in (24, 5, 1):
        config.micro_tokens = size * rollouts.batch.ids.shape[1] + 1
        passes.clear()
        close(amft.rl_gradient(model, rollouts.batch, advantages, config)[0], expected, 1e-3)
        assert sum(passes) == 12 and max(passes) == min(size, 12)  # the three silent groups cost nothing
        config.micro_tokens = size * demos.ids.shape[1] - (size == 1)  # a sequence that is longer goes alone
        close(amft.sft_gradient(model, demos, config, no_rows)[0], expected_sft, 1e-3)
    model._forward_pre_hooks.clear()


def spied_rows(model):
    """Sequences of each forward pass."""
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    return seen


# --- methods ------------------------------------------------------------------------------------------------------

METHODS = sorted(amft.METHODS)


def used(method, **flags):
    """As flags, those that the method reads; a flag that it does not is refused."""
    return [x for name, value in flags.items() if name not in amft.METHODS[method].unused
            for x in ("--" + name.replace("_", "-"), str(value))]


@pytest.mark.parametrize("imitation", ["nll", "rectified"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_every_method_is_the_gradient_of_its_loss(method, imitation, tiny, tmp_path, monkeypatch, unevaluated):
    """Through train(): mu, advantages, temperature, stop-gradient and the normalisation at once, row by row."""
    graded = itertools.cycle(3 * ["correct", *3 * ["no_answer"]] + 3 * [*3 * ["correct"], "no_answer"])  # whatever is said
    monkeypatch.setattr(tasks.Deal, "grade", lambda self, text: next(graded))
    seen, demos = spied(monkeypatch, "rollout"), spied(monkeypatch, "encode_demos")
    moves = spied(monkeypatch, "adamw_step")
    steps = [row for row in tiny_run(
        tiny, tmp_path / "run", "--method", method, "--steps", "3", "--temperature", "0.8", *used(
            method, imitation=imitation, warmup=0, advantage="group", prompts=6, sft_batch=9, meta_every=3))
        if row["kind"] == "step"]
    model = amft.load_policy(configured(model=tiny), tasks.GeneralPoints())[0]
    mu = {"sft": 1.0, "rl": 0.0, "sft-rl": 1.0}.get(method, 0.5)  # sft-rl: one of three steps is SFT
    assert steps[0]["mu"] == mu and bool(demos) == (mu > 0) and bool(seen) == (method != "sft")
    loss = 0.0
    if mu < 1:
        success, batch = seen[0]["returns"].success, seen[0]["returns"].batch
        assert 0 < success.sum() < success.numel() and len(set(success.sum(1).tolist())) > 1
        A = success - (success.sum(1, keepdim=True) - success) / (success.shape[1] - 1)
        A = (A / np.std(A.numpy())).reshape(-1)
        for i in range(len(A)):
            row = batch.rows([i])
            logp = (model(row.ids, attention_mask=row.attention).logits / 0.8).log_softmax(-1)
            logp = logp[0, -row.mask.shape[1] - 1:-1].gather(-1, row.responses[0].unsqueeze(-1)).squeeze(-1)
            loss = loss - (1 - mu) * A[i] * (logp * row.mask[0]).sum() / batch.mask.sum()
    if demos:
        batch = demos[0]["returns"]
        assert len(batch.ids) == 9
        for i in range(len(batch.ids)):
            row = batch.rows([i])
            logp = amft.logps_of(model, row)
            p = logp.exp().detach() if imitation == "rectified" else 1.0
            loss = loss - mu * (p * logp * row.mask).sum() / batch.mask.sum()
    close(moves[0]["grad"], flat_grad(loss, model), 2e-3)


@pytest.mark.parametrize("advantage", ["gae", "group"])
@pytest.mark.parametrize("method", METHODS)
def test_the_budget_and_batches_without_signal(method, advantage, tiny, tmp_path, monkeypatch, unevaluated):
    """Every method with both baselines; responses are counted, the look-ahead's too; nothing is NaN where no prompt, or
    every prompt, is solved."""
    for outcome in ("correct", "no_answer"):
        monkeypatch.setattr(tasks.Deal, "grade", lambda self, text: outcome)
        rows = tiny_run(tiny, tmp_path / outcome, "--method", method, "--steps", "6",
                        *used(method, prompts=5, sft_batch=10, advantage=advantage, warmup=1, meta_every=2))
        steps = [row for row in rows if row["kind"] == "step"]
        warmup = 6 if method == "sft" else 0 if method == "rl" else 1
        looks = 2 if method == "amft" else 0  # at steps 3 and 5
        assert len(steps) == 6 and rows[-1]["rollouts"] == ((6 - warmup) + looks) * 5 * 4 == steps[-1]["rollouts"]
        assert all(math.isfinite(value) for row in steps for value in row.values() if isinstance(value, float))
        assert [row["mu"] == 1.0 for row in steps[:warmup]] == [True] * warmup
        for row in steps[warmup:]:
            assert row["zero_adv"] == 1 and row["success"] == (outcome == "correct")
            assert ("sft_loss" in row) == (method not in ("rl", "sft-rl"))
            if advantage == "group":
                assert row["rl_loss"] == row["grad_norm_rl"] == 0
            if method in ("rl", "sft-rl"):
                assert row["mu"] == 0


@slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_the_defaults_that_a_user_types(method, tmp_path):
    amft.main(["--method", method, "--smoke", "--device", "cpu", "--eval-n", "8", "--out", str(tmp_path / "run")])
    assert read(tmp_path / "run")[-1]["kind"] == "final"


def test_sensitivity_with_a_trace_is_the_derivative_in_a_mu_that_was_larger_all_along():
    """Float64 central differences through torch's own clipping and AdamW, gradients held fixed."""
    generator, N, trace, h = torch.Generator().manual_seed(SEED), 20, 0.7, 1e-6
    grads = torch.randn(6, 2, N, generator=generator, dtype=torch.float64)

    def final(shift):
        theta = torch.nn.Parameter(torch.ones(N, dtype=torch.float64))
        optimizer = torch.optim.AdamW([theta], lr=0.05, weight_decay=0.0)
        for i, (g_rl, g_sft) in enumerate(grads):
            mu = 0.4 + shift * trace ** (len(grads) - 1 - i)
            theta.grad = (1 - mu) * g_rl + mu * g_sft
            torch.nn.utils.clip_grad_norm_([theta], 2.0)
            optimizer.step()
        return theta.detach()
    theta, last = torch.ones(N, dtype=torch.float64), None
    state = amft.AdamState(torch.zeros_like(theta), torch.zeros_like(theta), 0)
    for g_rl, g_sft in grads:
        how = dict(lr=0.05, max_norm=2.0)
        last = amft.step_sensitivity(theta, g_rl, g_sft, 0.4, state, last, trace, **how)
        theta, state = amft.adamw_step(theta, 0.6 * g_rl + 0.4 * g_sft, state, **how)
    torch.testing.assert_close(last[0], (final(h) - final(-h)) / (2 * h), rtol=1e-5, atol=1e-7)


# --- whole runs ---------------------------------------------------------------------------------------------------


def final_policy(out):
    return parameters_to_vector(LlamaForCausalLM.from_pretrained(Path(out) / "final").parameters()).detach()


def without_clock(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "out", "commit")} for row in rows]


def test_mu_one_is_sft_mu_zero_is_rl_and_no_advantage_is_sft(tiny, tmp_path, monkeypatch, unevaluated):
    """Through train(): with mu = 1 the RL gradient cannot matter, with mu = 0 the SFT gradient cannot, and a random
    policy that never solves a deal moves as mu L_SFT alone would."""
    fixed = ["--method", "fixed", "--warmup", "0", "--steps", "2", "--advantage", "group"]
    with monkeypatch.context() as patch:
        patch.setattr(tasks.Deal, "grade", lambda self, text: "correct" if len(text) % 2 else "no_answer")
        for mu in (0, 1):
            tiny_run(tiny, tmp_path / f"mu{mu}", *fixed, "--mu", str(mu))
        for mu, name in ((1, "rl_gradient"), (0, "sft_gradient")):
            true = getattr(amft, name)
            with monkeypatch.context() as inner:
                inner.setattr(amft, name, lambda *a, **k: (torch.randn_like(true(*a, **k)[0]), *true(*a, **k)[1:]))
                tiny_run(tiny, tmp_path / f"noise{mu}", *fixed, "--mu", str(mu))
            assert torch.equal(final_policy(tmp_path / f"mu{mu}"), final_policy(tmp_path / f"noise{mu}"))
        assert not torch.equal(final_policy(tmp_path / "mu0"), final_policy(tmp_path / "mu1"))
    monkeypatch.setattr(tasks.Deal, "grade", lambda self, text: "no_answer")
    tiny_run(tiny, tmp_path / "silent", *fixed, "--mu", "0.4")
    true = amft.rl_gradient
    with monkeypatch.context() as patch:
        patch.setattr(amft, "rl_gradient", lambda *a: (0 * true(*a)[0], *true(*a)[1:]))
        tiny_run(tiny, tmp_path / "sft", *fixed, "--mu", "0.4")
    assert torch.equal(final_policy(tmp_path / "silent"), final_policy(tmp_path / "sft"))
    assert all(row["zero_adv"] == 1 and row["rl_loss"] == 0 for row in read(tmp_path / "silent", "step"))


def test_paper_controller_is_equation_6_to_the_letter(tiny, tmp_path, unevaluated, rewarded, monkeypatch):
    """--controller paper takes val's utility, forgets the step before, and moves mu by eta_mu times the estimate."""
    derivatives = spied(monkeypatch, "step_sensitivity")
    rows = tiny_run(tiny, tmp_path / "run", "--controller", "paper", "--eta-mu", "3")
    assert (rows[0]["utility"], rows[0]["trace"]) == ("val", 0.0)
    mu = 0.5
    assert [said["trace"] for said in derivatives] == [0.0] * 6
    for row in [row for row in rows if row["kind"] == "step" and row["step"] > 3]:
        assert "meta_own" not in row and row["meta_force"] == pytest.approx(3 * row.get("meta_grad", 0.0))
        mu = min(max(mu + row["meta_force"] + 0.5 * (row["target_entropy"] - row["entropy"]), 0.05), 0.95)
        assert row["mu"] == pytest.approx(mu)


def test_same_seed_same_log_and_every_key_is_there(tiny, tmp_path):
    first, again, other = (tiny_run(tiny, tmp_path / name, "--eval-n", "4", "--val-every", "4", *flags)
                           for name, flags in (("a", []), ("b", []), ("c", ["--seed", "1"])))
    assert without_clock(first) == without_clock(again) and without_clock(first)[1:] != without_clock(other)[1:]
    kinds = Counter(row["kind"] for row in first)
    splits = set(tasks.GeneralPoints.splits)
    assert kinds == {"config": 1, "step": 9, "eval": 2 * len(splits) + 2, "final": 1}
    always = {"step", "mu", "sft_loss", "grad_norm", "grad_norm_rl", "grad_norm_sft", "rollouts", "seconds"}
    mixed = always | {"meta_force", "entropy_force", "target_entropy", "entropy", "rl_loss", "success",
                      "zero_adv", "response_len", "truncated"}
    for row in first:
        if row["kind"] == "step":
            assert (mixed if row["step"] > 3 else always) <= set(row)
            assert {"meta_grad", "meta_se"} & set(row) == ({"meta_grad", "meta_se"} if row["step"] in (5, 7, 9) else set())
        if row["kind"] == "eval":
            assert row["split"] in splits and row["n"] == 4 and sum(row["outcomes"].values()) == 4 * row["samples"]
            assert 0 <= row["low"] <= row["success"] <= row["high"] <= 1 and row["success"] <= row["any"] <= 1
    assert {"seed", "lr", "torch", "device", "threads"} <= set(first[0])
    last = [row for row in first if row["kind"] == "step"][-1]
    assert last["rollouts"] == (6 + 3) * 8 * 4  # the warm-up samples nothing; three look-aheads of 8 x 4


def stopped(argv, monkeypatch, calls, where="adamw_step"):
    """A run that is interrupted at so many calls of a function."""
    true, count = getattr(amft, where), itertools.count(1)

    def interrupt(*args, **kwargs):
        if next(count) == calls:
            raise KeyboardInterrupt
        return true(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(amft, where, interrupt)
        with pytest.raises(SystemExit) as info:
            amft.main(argv)
    assert info.value.code == 130


@pytest.mark.parametrize("flags", [
    [], ["--advantage", "group", "--reward", "graded"], ["--method", "fixed"], ["--method", "sft-rl"],
    ["--ppo-epochs", "2", "--trace", "0.9", "--utility", "train", "--val-every", "2"]])
def test_an_interrupted_run_goes_on_bit_for_bit(tiny, tmp_path, flags, monkeypatch, unevaluated, rewarded, capsys):
    """Cut off in the middle of mixed steps, when H*, evidence and d theta/d mu are there, and again before that."""
    monkeypatch.setattr(amft, "SAVE_SECONDS", -1)
    whole = tiny_run(tiny, tmp_path / "unbroken", *flags, "--steps", "10")
    moving = [row["mu"] for row in whole if row["kind"] == "step" and row["step"] > 6]
    assert "--method" in flags or len(set(moving)) == 4 and all(0.05 < mu < 0.95 for mu in moving)
    stopped(tiny_argv(tiny, tmp_path / "run", *flags, "--steps", "10"), monkeypatch, 2, "sft_gradient")
    assert f"go on with --resume {tmp_path / 'run'}" in capsys.readouterr().err
    stopped(["--resume", str(tmp_path / "run")], monkeypatch, 5, "encode_demos" if "sft-rl" not in flags else "rollout")
    reached = len(read(tmp_path / "run", "step"))
    assert 4 < reached < 9 and not (tmp_path / "run" / "final").exists()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as log:
        log.write('{"kind": "step", "step": 99, "half a li')
    amft.main(["--resume", str(tmp_path / "run")])
    assert without_clock(read(tmp_path / "run")) == without_clock(whole)
    assert torch.equal(final_policy(tmp_path / "run"), final_policy(tmp_path / "unbroken"))
    assert "finished" in fails(["--resume", str(tmp_path / "run")], capsys)


def test_a_run_that_is_older_than_its_last_state_starts_from_there(tiny, tmp_path, monkeypatch, unevaluated, rewarded):
    """Without a state yet, from the beginning; a state is written every SAVE_SECONDS, and steps since are done again."""
    whole = tiny_run(tiny, tmp_path / "unbroken")
    monkeypatch.setattr(amft, "SAVE_SECONDS", 1e9)
    stopped(tiny_argv(tiny, tmp_path / "run"), monkeypatch, 7, "sft_gradient")
    assert len(read(tmp_path / "run", "step")) == 6 and not (tmp_path / "run" / "state.pt").exists()
    amft.main(["--resume", str(tmp_path / "run")])
    assert without_clock(read(tmp_path / "run")) == without_clock(whole)
    assert torch.equal(final_policy(tmp_path / "run"), final_policy(tmp_path / "unbroken"))
    # Interrupted while a state is written: the one before is whole.
    monkeypatch.setattr(amft, "SAVE_SECONDS", -1)
    true, count = Path.write_bytes, itertools.count(1)

    def half(path, state):
        if next(count) == 7:
            true(path, state[:100])
            raise KeyboardInterrupt
        true(path, state)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "write_bytes", half)
        amft.main(tiny_argv(tiny, tmp_path / "again"))
    amft.main(["--resume", str(tmp_path / "again")])
    assert without_clock(read(tmp_path / "again")) == without_clock(whole)


@slow
def test_killed_run_goes_on_bit_for_bit(tiny, tmp_path):
    """By SIGKILL, in a process of its own."""
    flags = "--steps", "400"
    command = [sys.executable, amft.__file__, *tiny_argv(tiny, tmp_path / "killed", *flags)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed" / "state.pt").exists():
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed: more steps"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "final").exists()
    subprocess.run([sys.executable, amft.__file__, "--resume", str(tmp_path / "killed")], check=True)
    subprocess.run([sys.executable, amft.__file__, *tiny_argv(tiny, tmp_path / "unbroken", *flags)], check=True)
    assert without_clock(read(tmp_path / "killed")) == without_clock(read(tmp_path / "unbroken"))
    assert torch.equal(final_policy(tmp_path / "killed"), final_policy(tmp_path / "unbroken"))


def test_eval_only_repeats_the_runs_last_evaluation(tiny, tmp_path, capsys):
    rows = tiny_run(tiny, tmp_path / "run", "--eval-n", "4", "--steps", "3")
    capsys.readouterr()
    amft.main(["--eval-only", "--model", str(tmp_path / "run" / "final"), "--eval-n", "4", "--device", "cpu",
               "--max-new-tokens", "34"])
    printed = capsys.readouterr().out
    for row in [row for row in rows if row["kind"] == "eval"][-len(tasks.GeneralPoints.splits):]:
        assert re.search(rf"^{row['split']} +{100 * row['success']:.1f} \[", printed, re.M)


def test_an_evaluation_reports_samples_and_greedy_responses_of_the_same_episodes(base):
    """Again by hand: the same episodes, 3 samples each at the temperature, and one greedy response each."""
    (model, tokenizer), task = base, tasks.GeneralPoints()
    config = configured(eval_n=20, temperature=0.9)
    row = amft.evaluate(model, tokenizer, task, "id", config, 3, 7)
    assert row == amft.evaluate(model, tokenizer, task, "id", config, 3, 7)
    episodes = task.episodes("id", 20)
    greedy = [e.success for e in amft.rollout(model, tokenizer, episodes, 1, 40, 0).episodes]
    assert row["greedy"] == pytest.approx(np.mean(greedy)) and row["n"] == 20 and row["samples"] == 3
    torch.manual_seed(0)
    played = []
    for start in range(0, 20, 7):
        played += amft.rollout(model, tokenizer, episodes[start:start + 7], 3, 40, 0.9).episodes
        amft.rollout(model, tokenizer, episodes[start:start + 7], 1, 40, 0)
    assert [e.unit for e in played] == [e.unit for e in episodes for _ in range(3)]
    success = [e.success for e in played]
    assert row["success"] == pytest.approx(np.mean(success)) and sum(row["outcomes"].values()) == 60
    assert row["any"] == pytest.approx(np.mean([any(success[3 * i:3 * i + 3]) for i in range(20)]))
    assert (row["success"], row["low"], row["high"]) == pytest.approx(tasks.interval([(e.success, e.unit) for e in played]))


# --- bad input: one line, exit code 2 -----------------------------------------------------------------------------


@pytest.fixture
def untrained(monkeypatch, unevaluated):
    """What should have been refused must not train for minutes."""
    def train(*_):
        raise AssertionError("this was to be refused")
    monkeypatch.setattr(amft, "train", train)


def fails(argv, capsys, code=2):
    capsys.readouterr()
    with pytest.raises(SystemExit) as info:
        amft.main([str(x) for x in argv])
    error = capsys.readouterr().err.strip()
    assert info.value.code == code, error
    error = error.split("\r")[-1]  # what progress bars left
    assert len(error.splitlines()) == 1 and error.startswith("amft.py: "), error
    return error


def test_bad_flags(tiny, tmp_path, capsys, untrained):
    for argv, says in (
            (["--tsk", "gp"], "--tsk"), (["--task", "go"], "'go'"), (["--steps", "-1"], "--steps -1"),
            (["--samples", "1"], "--samples 1"), (["--mu", "1.5"], "--mu 1.5"), (["--mu", "nan"], "--mu nan"),
            (["--mu", "1"], "--mu"), (["--method", "gap"], "'gap'"), (["--warmup", "101"], "--warmup"),
            (["--lr", "0"], "--lr 0"), (["--steps", "many"], "'many'"), (["--demos", "3"], "--demos"),
            (["--max-new-tokens", "9"], "--max-new-tokens is 9"), (["--device", "quantum"], "--device quantum"),
            (["--device", "meta"], "--device meta"), (["--data", "x.jsonl"], "--data"),
            (["--seed", "18446744073709551616"], "--seed 18446744073709551616"), (["--seed", "-1"], "--seed -1"),
            (["--mu-min", "0.9", "--mu-max", "0.1"], "--mu-min 0.9"), (["--st", "5"], "--st"), (["gp"], "gp"),
            (["--task", "math", "--data", str(tmp_path / "none.jsonl")], "cannot be read"),
            *((["--" + name, "inf"], f"--{name} inf") for name in ("temperature", "eta-mu", "eta-h", "lr", "trace", "clip")),
            # Flags that would not do anything.
            (["--method", "sft", "--mu", "0.5"], "--mu: is not used"),
            (["--method", "rl", "--sft-batch", "8"], "--sft-batch"), (["--method", "fixed", "--trace", "0"], "--trace"),
            (["--method", "sft", "--samples", "8"], "--samples"), (["--method", "sft-rl", "--mu", "0.5"], "--mu"),
            (["--eval-only", "--steps", "5"], "--steps"), (["--eval-only", "--method", "rl"], "--method"),
            (["--resume", str(tmp_path), "--lr", "1"], "no other flag"),
            (["--resume", str(tmp_path), "--lr", "1e-4"], "no other flag"),
            (["--resume", str(tmp_path), "--eval-only"], "no other flag")):
        if not {"--resume", "--eval-only"} & set(argv):
            argv = [*argv, "--out", str(tmp_path / "unused")]
        error = fails(argv, capsys)
        assert all(word in error for word in says.split(" ")), error
    assert "--out" in fails(["--eval-only", "--out", tmp_path / "unused"], capsys)
    assert not (tmp_path / "unused").exists()


def test_checkpoints_that_are_none(tiny, tmp_path, capsys, untrained):
    """Also one that lacks a tensor, or has a NaN: it must not be filled at random and evaluated."""
    from safetensors.torch import load_file, save_file
    (tmp_path / "empty").mkdir()
    for name in ("corrupt", "lacking", "nan", "rare", "other"):
        shutil.copytree(tiny, tmp_path / name)
    (tmp_path / "corrupt" / "model.safetensors").write_bytes(b"x" * 100)
    tensors, key = load_file(Path(tiny) / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    meta = dict(metadata={"format": "pt"})
    save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / "lacking" / "model.safetensors", **meta)
    broken = tensors[key].clone()
    broken[0, 0] = math.nan
    save_file({**tensors, key: broken}, tmp_path / "nan" / "model.safetensors", **meta)
    rare = tensors["model.embed_tokens.weight"].clone()
    rare[AutoTokenizer.from_pretrained(tiny).convert_tokens_to_ids("apples")] = math.nan  # no card is called so
    save_file({**tensors, "model.embed_tokens.weight": rare}, tmp_path / "rare" / "model.safetensors", **meta)
    save_file({**tensors, key: tensors[key][:, :3].contiguous()}, tmp_path / "other" / "model.safetensors", **meta)
    foreign = tmp_path / "foreign"
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(foreign)
    make = importlib.import_module("make")
    make.PreTrainedTokenizerFast(tokenizer_object=make.Tokenizer(make.models.WordLevel(
        {"<unk>": 0, "Make": 1}, unk_token="<unk>")), unk_token="<unk>", eos_token="<unk>").save_pretrained(foreign)
    for name in ("empty", "corrupt", "lacking", "nan", "rare", "other", "none/such"):
        for argv in (["--out", tmp_path / "unused"], ["--eval-only"]):
            assert "not a checkpoint" in fails(["--model", tmp_path / name, *argv], capsys)
    assert "tokenizer cannot encode" in fails(["--model", foreign, "--out", tmp_path / "unused"], capsys)
    assert "not a vision-language checkpoint" in fails(["--task", "gp-vl", "--model", tiny, "--out", tmp_path / "unused"],
                                                      capsys)
    assert not (tmp_path / "unused").exists()


def test_folders_that_cannot_hold_a_run(tiny, tmp_path, capsys, monkeypatch, unevaluated):
    """A file, below a file, too long a name, read-only, taken; a state without a log is a run, too."""
    (tmp_path / "file").write_text("precious")
    for name in ("log", "state"):
        (tmp_path / name).mkdir()
    (tmp_path / "log" / "metrics.jsonl").write_text("precious")
    (tmp_path / "state" / "state.pt").write_text("precious")
    start = ["--smoke", "--model", tiny, "--device", "cpu", "--out"]
    for out, says in (("file", ""), ("file/run", ""), ("x" * 400, ""), ("log", "already holds a run"),
                      ("state", "already holds a run")):
        error = fails([*start, tmp_path / out], capsys)
        assert says in error and (str(tmp_path / out)[:40] in error) and "--resume" not in error.replace(
            f"--resume {tmp_path / out} goes on with it", "")
    for path in ("file", "log/metrics.jsonl", "state/state.pt"):
        assert (tmp_path / path).read_text() == "precious"
    if os.getuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        fails([*start, tmp_path / "locked" / "run"], capsys)

    def full(self, kind, **fields):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(amft.Run, "write", full)
    assert "No space left" in fails([*start, tmp_path / "new"], capsys)


def test_an_interrupt_before_there_is_a_run_does_not_say_resume(tiny, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(amft, "load_policy", interrupt)
    assert "--resume" not in fails(["--smoke", "--model", tiny, "--out", tmp_path / "run"], capsys, code=130)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def broken_off(tiny, tmp_path, monkeypatch, unevaluated, capsys):
    monkeypatch.setattr(amft, "SAVE_SECONDS", -1)
    stopped(tiny_argv(tiny, tmp_path / "run"), monkeypatch, 6)
    return tmp_path / "run"


def test_states_and_logs_that_are_none(tiny, tmp_path, capsys, broken_off, monkeypatch):
    """Garbage, empty, cut, of another model, of another log: one line that names the file, and nothing is lost."""
    state, log = (broken_off / name for name in ("state.pt", "metrics.jsonl"))
    good = state.read_bytes(), log.read_bytes()
    other = torch.load(state, weights_only=True)
    small = {**other, "theta": other["theta"][:-1]}
    ahead = {**other, "log": other["log"] + 1}
    lacking = {k: v for k, v in other.items() if k != "method"}
    config, rest = good[1].split(b"\n", 1)

    def saved(value):
        torch.save(value, tmp_path / "x.pt")
        return (tmp_path / "x.pt").read_bytes()
    for content in (b"garbage", b"", good[0][:1000], good[0][:-1000], saved(small), saved(ahead), saved(lacking),
                    saved([1, 2]), saved({**other, "adam": 3})):
        state.write_bytes(content)
        assert f"{state}: is not the state of this run" in fails(["--resume", broken_off], capsys)
        assert log.read_bytes() == good[1]
    state.write_bytes(good[0])
    fields = json.loads(config)

    def settings(**changed):
        return json.dumps({**fields, **changed}).encode() + b"\n" + rest
    for content in (b"\xff\xfe\x00" * 50 + b"\n", b"not json\n" + good[1], good[1].replace(b'"step": 2', b'"st', 1),
                    b"[1, 2]\n" + good[1], b"7\n", b"{}\n", b"", rest, settings(steps="many"), settings(lr=None),
                    settings(method=5), settings(prompts=[8]), settings(steps=-1), settings(method="gap"),
                    settings(task="go"), settings(seed=2 ** 64), settings(lr=math.nan)):
        log.write_bytes(content)
        fails(["--resume", broken_off], capsys)
        assert log.read_bytes() == content and state.read_bytes() == good[0]
    log.unlink()
    assert str(log) in fails(["--resume", broken_off], capsys)  # a state alone is no run
    log.mkdir()
    assert str(log) in fails(["--resume", broken_off], capsys)
    log.rmdir()
    assert str(tmp_path / "none") in fails(["--resume", tmp_path / "none"], capsys)
    log.write_bytes(good[1])
    amft.main(["--resume", str(broken_off)])
    assert read(broken_off)[-1]["kind"] == "final"


def test_the_log_never_holds_what_is_not_json(tmp_path):
    run = amft.Run(tmp_path / "run", configured())
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError):
            run.write("step", mu=value)
    assert [row["kind"] for row in read(tmp_path / "run")] == ["config"]


@pytest.mark.parametrize("what", ["--eval-only", pytest.param("--help", marks=slow)])
def test_nobody_reads_the_output(what, tiny):
    """`| head -1`: no traceback."""
    argv = [what] if what == "--help" else [what, "--model", tiny, "--device", "cpu", "--eval-n", "1"]
    process = subprocess.Popen([sys.executable, amft.__file__, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    process.stdout.close()
    error = process.stderr.read()
    process.wait()
    assert "Traceback" not in error and "Exception" not in error, error


def test_a_full_disk_is_one_line_and_loses_nothing(tiny, tmp_path, capsys, monkeypatch, unevaluated):
    monkeypatch.setattr(amft, "SAVE_SECONDS", -1)
    whole, true, count = tiny_run(tiny, tmp_path / "whole"), Path.write_bytes, itertools.count(1)

    def full(path, state):
        if next(count) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        true(path, state)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        error = fails(tiny_argv(tiny, tmp_path / "run"), capsys)
    assert "No space left" in error and f"--resume {tmp_path / 'run'}" in error
    amft.main(["--resume", str(tmp_path / "run")])
    assert without_clock(read(tmp_path / "run")) == without_clock(whole)


@pytest.mark.parametrize("flags, mus", [([], [1, 1, 0, 0]), (["--warmup", "1"], [1, 0, 0, 0]), (["--warmup", "3"], [1, 1, 1, 0])])
def test_sft_then_rl_switches_at_the_warm_up_or_half_way(flags, mus, tiny, tmp_path, monkeypatch, unevaluated):
    """Also with General Points' own defaults, which have no warm-up: it must not end up as RL alone."""
    monkeypatch.setattr(tasks.GeneralPoints, "defaults", {**GP_DEFAULTS, "warmup": 0})
    smoke = {name: value for name, value in amft.SMOKE.items() if name != "warmup"}
    monkeypatch.setattr(amft, "SMOKE", smoke)
    rows = [row for row in tiny_run(tiny, tmp_path / "run", "--method", "sft-rl", "--steps", "4", *flags) if row["kind"] == "step"]
    assert [row["mu"] for row in rows] == mus
    assert [("sft_loss" in row, "success" in row) for row in rows] == [(mu == 1, mu == 0) for mu in mus]


def test_non_finite_loss_stops_the_run_and_keeps_the_log(tiny, tmp_path, capsys, monkeypatch, unevaluated):
    monkeypatch.setattr(amft, "SAVE_SECONDS", -1)
    true, count = amft.sft_gradient, itertools.count(1)

    def sick(*args):
        grad, logps, loss = true(*args)
        return grad, logps, loss if next(count) != 5 else math.nan
    with monkeypatch.context() as patch:
        patch.setattr(amft, "sft_gradient", sick)
        error = fails(tiny_argv(tiny, tmp_path / "run"), capsys)
    assert "step 5" in error and "sft_loss" in error and "--resume" in error
    assert [row["step"] for row in read(tmp_path / "run", "step")] == [1, 2, 3, 4]
    amft.main(["--resume", str(tmp_path / "run")])  # nothing was lost
    assert read(tmp_path / "run")[-1]["kind"] == "final"


def test_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit) as info:
        amft.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not info.value.code
    source = inspect.getsource(amft.Config)
    for field in amft.dataclasses.fields(amft.Config):
        comment = re.search(rf"^    {field.name}: .*?  # (.*)$", source, re.M)[1]
        assert "--" + field.name.replace("_", "-") in text and " ".join(comment.split()) in text


def test_runs_without_a_name_get_their_own_folders(tiny, tmp_path, monkeypatch, unevaluated):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        amft.main(["--smoke", "--model", tiny, "--device", "cpu", "--steps", "3", "--method", "sft"])
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["gp", "gp-2"]
    assert read("runs/gp-2")[-1]["kind"] == "final"


def test_micro_batches_do_not_change_a_run(tiny, tmp_path, unevaluated, rewarded):
    for size in ("16384", "400"):
        tiny_run(tiny, tmp_path / size, "--micro-tokens", size, "--steps", "5", "--method", "fixed")
    whole, parts = (final_policy(tmp_path / size) for size in ("16384", "400"))
    start = parameters_to_vector(LlamaForCausalLM.from_pretrained(tiny).parameters()).detach()
    # Adam's step of an entry whose gradient is next to nothing has any sign: most entries, not every one.
    assert ((whole - parts).abs() < 0.02 * (whole - start).abs().max()).float().mean() > 0.97


def test_amft_learns(tmp_path, monkeypatch):
    """From the shipped base, on a world of 12 training multisets: success of samples rises well above the base's."""
    few = random.Random(SEED).sample([m for m, role in tasks.ROLES.items() if role == "train" and max(m) <= 10
                                      and tasks.solve(m)], 12)
    monkeypatch.setattr(tasks, "ROLES", {m: role if role != "train" or m in few else "unused"
                                         for m, role in tasks.ROLES.items()})
    monkeypatch.setattr(tasks.GeneralPoints, "splits", {"id": "these 12"})
    amft.main(["--task", "gp", "--warmup", "50", "--steps", "56", "--prompts", "8", "--lr", "1e-3", "--demos", "1000",
               "--out", str(tmp_path / "run"), "--device", "cpu"])
    rows = read(tmp_path / "run", "eval")
    assert [row["n"] for row in rows] == [12, 12]
    first, last = (row["success"] for row in rows)
    assert last > 1.5 * first and last > first + (1 - first) / 5, (first, last)


def test_interval_covers_when_deals_come_in_clusters():
    """60 multisets, each solved or missed as a whole: the interval must hold the true rate about 95% of the time, and
    without clusters it is Wilson's."""
    rng, covered, narrow = random.Random(SEED), 0, 0
    for _ in range(400):
        solved = [rng.random() < 0.4 for _ in range(60)]
        units = [rng.randrange(60) for _ in range(1000)]
        share, low, high = tasks.interval([(solved[u], u) for u in units])
        covered, narrow = covered + (low <= 0.4 <= high), narrow + (high - low < 0.1)
    assert 0.89 < covered / 400 < 0.99 and narrow == 0
    share, low, high = tasks.interval([(i < 30, i) for i in range(100)])
    assert (share, low, high) == pytest.approx((0.3, 0.2189, 0.3958), abs=1e-3)  # Wilson 1927, 30 of 100
    share, low, high = tasks.interval([(False, i) for i in range(50)])
    assert share == low == 0 and 0.06 < high < 0.08


# --- General Points -----------------------------------------------------------------------------------------------


def brute_force(numbers):
    """Can these numbers make 24? Join any two, in floating point, until one is left."""
    if len(numbers) == 1:
        return abs(numbers[0] - 24) < 1e-6
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [numbers[k] for k in range(len(numbers)) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        if any(brute_force(rest + [c]) for c in (a + b, a - b, a * b, a / b if b else math.inf)):
            return True
    return False


def answer(formula, **others):
    return json.dumps(dict(others, formula=formula))


def grade(response, numbers, target=24):
    return tasks.Deal(("A",) * 4, tasks.RULE_10, tuple(numbers), "", target).grade(response)


def test_solver_and_grader_against_brute_force_on_every_multiset():
    solvable = 0
    for numbers in tasks.MULTISETS:
        solutions = tasks.solve(numbers)
        assert bool(solutions) == brute_force(list(numbers)), numbers
        assert len(set(solutions)) == len(solutions)
        solvable += bool(solutions)
        for formula in solutions:
            exact = eval(re.sub("([0-9]+)", r"Fraction(\1)", formula))
            assert exact == 24 and sorted(map(int, re.findall("[0-9]+", formula))) == list(numbers)
            assert grade(answer(formula + "=24"), numbers) == "correct"
    assert len(tasks.MULTISETS) == 1820 and solvable == 1362
    assert sum(bool(tasks.solve(m)) for m in tasks.MULTISETS if max(m) <= 10) == 566
    assert "8/(3-8/3)" in tasks.solve((3, 3, 8, 8))  # floating point misses this one


def test_grader_on_every_bracketing():
    """Every permutation, operator and bracketing of a few multisets; Python's own arithmetic tells right from wrong."""
    rng = random.Random(SEED)
    for numbers in rng.sample(tasks.MULTISETS, 4):
        seen = Counter()
        for (a, b, c, d), (x, y, z) in itertools.product(set(itertools.permutations(numbers)),
                                                         itertools.product("+-*/", repeat=3)):
            for formula in (f"(({a}{x}{b}){y}{c}){z}{d}", f"({a}{x}({b}{y}{c})){z}{d}", f"({a}{x}{b}){y}({c}{z}{d})",
                            f"{a}{x}(({b}{y}{c}){z}{d})", f"{a}{x}({b}{y}({c}{z}{d}))", f"{a}{x}{b}{y}{c}{z}{d}"):
                try:
                    right = eval(re.sub("([0-9]+)", r"Fraction(\1)", formula)) == 24
                except ZeroDivisionError:
                    right = False
                outcome = grade(answer(formula), numbers)
                seen[outcome] += 1
                assert outcome == ("correct" if right else "wrong_result"), formula
        assert bool(seen["correct"]) == bool(tasks.solve(numbers))


@pytest.mark.parametrize("response, outcome", [
    (answer("(1+2+3)*4=24"), "correct"), (answer("(1+2+3)*4"), "correct"), (answer(" ( 1 + 2+3) *4 = 24 "), "correct"),
    (answer("(1+2+3)*4=25"), "illegal_formula"), (answer("(1+2+3)*4=24=24"), "illegal_formula"),
    (answer("1+2+3+4=24"), "wrong_result"), (answer("4/(3-1-2)=24"), "wrong_result"),
    (answer("4*3*2=24"), "illegal_number"), (answer("(1+2+3)*4*1=24"), "illegal_number"),
    (answer("12+3*4=24"), "illegal_number"), (answer("9**9**9**9"), "illegal_formula"),
    (answer("__import__('os').system('true')"), "illegal_formula"), (answer("-1+2+3*4"), "illegal_formula"),
    (answer("(1+2+3)(4)"), "illegal_formula"), (answer("(1+2+3*4"), "illegal_formula"), (answer(""), "illegal_formula"),
    (answer("(1+2+3))*4"), "illegal_formula"), (answer("01+2+3*4"), "illegal_formula"),
    (answer("(1+2+3)*\u0664"), "illegal_formula"), (answer("(1+2+3)*\uff14"), "illegal_formula"),
    (answer("(1+2+3)//4"), "illegal_formula"), (answer("1.0+2+3*4"), "illegal_formula"),
    (answer("1 2+3*4"), "illegal_formula"), (answer("1+2+3*4\n"), "illegal_formula"),
    (answer("9" * 50), "illegal_formula"), (answer("(" * 59), "illegal_formula"),
    (answer("1+" * 40000 + "1"), "no_answer"), (answer("(" * 100_000), "no_answer"), ("[" * 100_000, "no_answer"),
    ("[" * 999, "no_answer"), ("9" * 999, "no_answer"), ("", "no_answer"), ("null", "no_answer"), ("[1]", "no_answer"),
    (answer("(1+2+3)*4", number=math.nan), "no_answer"), (answer("(1+2+3)*4", cards=[-math.inf]), "no_answer"),
    ("{}", "no_answer"), ('{"formula": 24}', "no_answer"), ('{"formula": ["24"]}', "no_answer"), ("NaN", "no_answer"),
    ('{"formula": "(1+2+3)*4", "formula": "(1+2+3)*4"}', "no_answer"), (answer("(1+2+3)*4") + "x", "no_answer"),
    (answer("(1+2+3)*4", cards=[], number="rubbish"), "correct"),
])
def test_grader_on_hostile_text(response, outcome):
    start = time.process_time()
    assert grade(response, (4, 3, 2, 1)) == outcome
    assert time.process_time() - start < 0.05


def test_digits_that_were_not_dealt_cannot_be_glued():
    assert grade(answer("10+10+4*1"), (10, 10, 4, 1)) == "correct"
    assert grade(answer("1 0+10+4*1"), (10, 10, 4, 1)) == "illegal_formula"
    assert grade(answer("11+13+1-1"), (1, 1, 1, 1)) == "illegal_number"


def test_splits_are_disjoint_and_say_what_they_are():
    task, rng, seen = tasks.GeneralPoints(), random.Random(SEED), {}
    for split in ["train", *task.splits]:
        episodes = [task.sample(split, rng) for _ in range(1500)]
        seen[split] = {tuple(sorted(e.numbers)) for e in episodes}
        for e in episodes:
            assert e.grade(e.expert) == "correct"
            stated = dict(re.findall("([JQK]) counts as ([0-9]+)", e.prompt))
            shown = re.search("Cards: (.*?)[.] J", e.prompt)[1].split(", ")
            values = tuple(int(stated.get(rank, "1" if rank == "A" else rank)) for rank in shown)
            rule = tuple(int(stated[face]) for face in "JQK")
            expected = {"ood_rule": {(11, 12, 13)}, "fake": {(11, 12, 13)}, "ood_small": {(5, 5, 5), (7, 7, 7)}}
            assert rule in expected.get(split, {(10, 10, 10)}) and e.prompt.endswith("Make 24.\n")
            assert (values == e.numbers) == (split != "fake")
            if split in expected:
                assert set(shown) & set("JQK")
    roles = {role: {m for m, r in tasks.ROLES.items() if r == role} for role in ("train", "val", "heldout")}
    assert (seen["id"] | seen["train"]) <= roles["train"] and seen["val"] <= roles["val"]
    assert len(seen["id"] & seen["train"]) > 0.5 * len(seen["id"])
    for a, b in itertools.combinations(("train", "val", "heldout", "ood_rule"), 2):
        assert not seen[a] & seen[b]
    assert (seen["heldout"] | seen["ood_rule"] | seen["ood_small"] | seen["fake"]) <= roles["heldout"]


def test_pretraining_never_makes_24_of_a_deal_kept_for_evaluation(tokenizer):
    make, rng, held = importlib.import_module("make"), random.Random(SEED), Counter()
    task = tasks.GeneralPoints()
    evaluated = {tuple(sorted(task.sample(split, rng).numbers)) for split in task.splits if split != "id"
                 for _ in range(3000)}
    for _ in range(40_000):
        deal = make.gp(rng)
        prompt, response = deal.prompt, deal.expert
        numbers, target = json.loads(response)["number"], int(re.search(r"Make (\d+)\.\n$", prompt)[1])
        assert grade(response, numbers, target) == "correct"
        held[tuple(sorted(numbers)) in evaluated, target == 24] += 1
    assert held[True, True] == 0 and held[False, True] > 100 and held[True, False] > 1000
    text = prompt + response
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_base_recipes_run_and_make_the_shipped_tokenizer(tmp_path, tokenizer):
    make = importlib.import_module("make")
    make.main(["--steps", "3", "--tokens", "1000", "--device", "cpu", "--out", str(tmp_path / "text")])
    make.main(["--steps", "3", "--tokens", "1000", "--device", "cpu", "--out", str(tmp_path / "eyes"), "--pictures",
               "--init", str(tmp_path / "text")])
    for name, shipped in (("text", "base"), ("eyes", "base-vl")):
        assert AutoTokenizer.from_pretrained(tmp_path / name).get_vocab() == tokenizer.get_vocab()
        assert AutoTokenizer.from_pretrained(HERE / shipped).get_vocab() == tokenizer.get_vocab()
        made, kept = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / name, HERE / shipped))
        assert dict(made, transformers_version=0) == dict(kept, transformers_version=0)
        assert sum(f.stat().st_size for f in (HERE / shipped).iterdir() if f.is_file()) < 10 * 2 ** 20


# --- conversations ------------------------------------------------------------------------------------------------

ALL_TASKS = list(tasks.TASKS)


def shipped(name, **options):
    task = tasks.TASKS[name](**options)
    config = configured(task=name, **{k: v for k, v in task.defaults.items() if k == "max_new_tokens"})
    return task, *amft.load_policy(config, task), config


def alone(model, batch, row, grad=False):
    """Log-probabilities of a row's own tokens, without padding, holes or company, by a plain forward pass."""
    keep = batch.attention[row].bool()
    ids = batch.ids[row][keep].unsqueeze(0)
    own = torch.cat([torch.zeros(batch.ids.shape[1] - batch.mask.shape[1]), batch.mask[row]])[keep].bool()
    with torch.set_grad_enabled(grad):
        extra = dict(pixel_values=batch.pixels[row]) if len(batch.pixels[row]) else {}
        logps = model(input_ids=ids, **extra).logits[0].log_softmax(-1)
    return logps[:-1].gather(-1, ids[0, 1:].unsqueeze(-1)).squeeze(-1)[own[1:]]


@pytest.mark.parametrize("name", ALL_TASKS)
def test_conversations_alone_and_in_company(name):
    """What was sampled, and what is demonstrated: the same log-probabilities in a batch with holes as alone; and each
    sampled token came from the distribution that training sees."""
    task, model, tokenizer, config = shipped(name)
    rng = random.Random(SEED)
    episodes = [task.sample("train", rng) for _ in range(4)]
    rollouts = amft.rollout(model, tokenizer, episodes, 3, config.max_new_tokens, 2.0)  # hot: failures, retries, cuts
    if name in ("gp-turns", "virl", "virl-vl"):
        assert max(len(e.responses) for e in rollouts.episodes) > 1
        assert (rollouts.batch.attention[:, -rollouts.batch.mask.shape[1]:] == 0).any()
    for batch in (rollouts.batch, amft.encode_demos(model, tokenizer, episodes)):
        with torch.no_grad():
            together = amft.logps_of(model, batch)
        for row in range(len(batch.ids)):
            own = together[row][batch.mask[row].bool()]
            torch.testing.assert_close(own, alone(model, batch, row), rtol=1e-3, atol=2e-3)
            for rows in (slice(row, row + 1), torch.tensor([row])):
                part = batch.rows(rows)
                assert len(part.ids) == 1 and torch.equal(part.pixels[0], batch.pixels[row])
    # The text that was graded is the text in the batch, and the rewards stand on the last token of each response.
    for row, episode in enumerate(rollouts.episodes):
        texts = episode.responses
        own = rollouts.batch.mask[row].bool()
        spoken = tokenizer.decode(rollouts.batch.responses[row][own])
        assert spoken.count("<eos>") <= len(texts)  # nothing is said after the end
        assert spoken.replace("<eos>", "") == "".join(texts) and len(texts) == len(episode.history)
        paid = [task.episode.outcomes[outcome][0] for outcome in episode.history]
        assert sum(paid) == pytest.approx(rollouts.graded[row].sum().item())
        assert (rollouts.graded[row][~own] == 0).all() and len(own.nonzero()) > 0


@pytest.mark.parametrize("name", ALL_TASKS)
def test_every_token_is_sampled_from_the_policy_that_is_trained(name, monkeypatch):
    """The entropy that sampling saw, with its cache and its holes, is that of training's logits, turn by turn."""
    task, model, tokenizer, config = shipped(name)
    rng, columns = random.Random(SEED), []
    true = tasks.Watcher.__call__

    def watch(self, ids, logits):
        columns.append(torch.where(self.done, torch.nan, -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)))
        return true(self, ids, logits)
    monkeypatch.setattr(tasks.Watcher, "__call__", watch)
    episodes = [task.sample("train", rng) for _ in range(4)]
    rollouts = amft.rollout(model, tokenizer, episodes, 2, config.max_new_tokens, 1.5)
    with torch.no_grad():
        logp = amft.outputs(model, rollouts.batch)[0].log_softmax(-1)
    trained = -(logp.exp() * logp).sum(-1)
    seen = iter(columns)
    spoken = [t for t in range(trained.shape[1]) if rollouts.batch.mask[:, t].any()]
    assert len(spoken) <= len(columns)
    for t in spoken:
        own = rollouts.batch.mask[:, t].bool()
        column = next(c for c in seen if (~c[own].isnan()).all())
        torch.testing.assert_close(column[own], trained[own, t], rtol=1e-3, atol=3e-3)


def test_entropy_is_that_of_the_policys_own_tokens(tiny, tokenizer):
    """Not of what generation pads a finished response with."""
    model = amft.load_policy(amft.Config(model=tiny, max_new_tokens=34, device="cpu"), tasks.GeneralPoints())[0]
    rng = random.Random(SEED)
    seen = amft.rollout(model, tokenizer, [tasks.GeneralPoints().sample("train", rng) for _ in range(16)], 16, 60)
    lengths = seen.batch.mask.sum(1)
    assert lengths.min() < lengths.max()
    with torch.no_grad():
        logp = amft.outputs(model, seen.batch)[0].log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    assert seen.entropy == pytest.approx((entropy * seen.batch.mask).sum().item() / lengths.sum().item(), rel=1e-4)


def test_demonstrations_teach_what_is_right_and_show_what_went_wrong(base, tokenizer):
    task, rng, model = tasks.GeneralPoints(turns=2), random.Random(SEED), base[0]
    deal = next(d for d in (task.sample("train", rng) for _ in range(100)) if d.slips)
    batch = amft.encode_demos(model, tokenizer, [deal])
    taught = tokenizer.decode(batch.responses[0][batch.mask[0].bool()])
    everything = tokenizer.decode(batch.ids[0])
    assert taught == deal.expert + "<eos>"
    assert everything == deal.prompt + deal.slips[0] + "<eos>" + tasks.FEEDBACK.format(
        deal.outcomes["wrong_result"][1]) + "\n" + deal.expert + "<eos>"


@pytest.mark.parametrize("name", ALL_TASKS)
def test_rewards_and_gradients_of_whole_conversations(name):
    """Paid once, for success; and the RL gradient equals the textbook one over all turns."""
    task, model, tokenizer, config = shipped(name)
    config = amft.dataclasses.replace(config, samples=4, advantage="group")
    rng = random.Random(SEED)
    seen = amft.rollout(model, tokenizer, [task.sample("train", rng) for _ in range(4)], 4, config.max_new_tokens)
    assert seen.success.reshape(-1).tolist() == [float(e.success) for e in seen.episodes]
    if not seen.success.std(1).any():  # no signal by chance
        seen = seen._replace(success=(torch.arange(16).view(4, 4) % 3 == 0).float())
    advantages = amft.advantages_of(model, None, seen, config)
    weights = seen.success - (seen.success.sum(1, keepdim=True) - seen.success) / 3
    weights = weights / weights.std(correction=0)
    config.micro_tokens = 3 * seen.batch.ids.shape[1]
    grad = amft.rl_gradient(model, seen.batch, advantages, config)[0]
    rows = [flat_grad(-weights.flatten()[row] * alone(model, seen.batch, row, grad=True).sum() / seen.batch.mask.sum(), model)
            for row in range(16)]
    # Where a prompt's samples are all alike, theirs cancel: the error is judged by the largest row, not by what is left.
    assert (grad - sum(rows)).norm() <= 5e-3 * max(row.norm() for row in rows) > 0


def test_a_chat_model_gets_its_own_template_turn_by_turn(base, tokenizer):
    """Prompt, response and observation, encoded one by one, make what the template makes of the whole conversation."""
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = ("{% for m in messages %}{% if m.role == 'user' %} where {{ m.content }}\n{% else %}"
                          "{{ m.content }}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}Turn {% endif %}")
    said = [dict(role=role, content=text) for role, text in (("user", "3 + 4"), ("assistant", "8"), ("user", "10"))]
    whole = chat.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    parts = [tasks.encode_shown(base[0], chat, "3 + 4"), chat("8")["input_ids"] + [chat.eos_token_id],
             tasks.encode_shown(base[0], chat, "10", first=False)]
    text = chat.decode(sum(parts, []))
    assert text.replace("Turn 8", "8") == whole and text.count("Turn ") == 2  # asked to speak at each turn


def test_a_policy_cannot_say_a_picture():
    task, model, tokenizer, config = shipped("gp-vl")
    batch = amft.encode_demos(model, tokenizer, [task.sample("train", random.Random(SEED))])
    with torch.no_grad():
        logits = amft.outputs(model, batch)[0]
    assert (logits[..., model.config.image_token_id] < -1e8).all()


@pytest.mark.parametrize("name", ALL_TASKS)
def test_the_shipped_policies_are_above_chance_and_below_saturation(name):
    task, model, tokenizer, config = shipped(name)
    row = amft.evaluate(model, tokenizer, task, "id", amft.dataclasses.replace(config, eval_n=24), 2)
    assert 0 < row["success"] < 1 and sum(row["outcomes"].values()) >= 24


class Sums(tasks.Episode):
    """A sixth task, as a student would add it: a + b, in three attempts."""
    outcomes = {"correct": (1.0, ""), "wrong": (-1.0, "your formula is not a formula")}
    attempts = 3

    def __init__(self, a, b):
        self.a, self.b = a, b

    @property
    def prompt(self):
        return f"{self.a} + {self.b} = "

    @property
    def expert(self):
        return str(self.a + self.b)

    @property
    def unit(self):
        return self.a, self.b

    def grade(self, response):
        return "correct" if response == self.expert else "wrong"


class Addition(tasks.Task):
    episode = Sums
    splits = {"val": "sums below 40", "heldout": "larger ones"}

    def draw(self, split, rng):
        low, high = (20, 40) if split == "heldout" else (0, 19)
        return Sums(rng.randint(low, high), rng.randint(low, high))


@amft.dataclasses.dataclass
class SumsConfig(amft.Config):
    task: str = amft.flag("sums", choices=("sums",))  # choices are fixed when amft is imported


def test_a_sixth_task_in_thirty_lines(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "sums", Addition)
    argv = tiny_argv(tiny, tmp_path / "sums", "--max-new-tokens", "5")
    amft.main([*argv[:1], "sums", *argv[2:]], config_class=SumsConfig)
    rows = read(tmp_path / "sums")
    assert rows[-1]["kind"] == "final" and {row["split"] for row in rows if row["kind"] == "eval"} == {"val", "heldout"}
    for row in rows:
        if row["kind"] == "eval":  # one to three responses in each conversation
            assert row["n"] * row["samples"] <= sum(row["outcomes"].values()) <= 3 * row["n"] * row["samples"]
            assert 0 <= row["first_try"][0] <= row["success"]
    assert [turn[2:] for turn in Sums(2, 3).demonstration()] == [("5", True)]


@pytest.fixture(scope="module")
def tiny_eyes(tmp_path_factory, tokenizer):
    """A vision-language checkpoint small enough for end-to-end tests."""
    torch.manual_seed(SEED)
    make, folder = importlib.import_module("make"), tmp_path_factory.mktemp("eyes")
    config = LlavaConfig.from_pretrained(HERE / "base-vl")
    for part, sizes in ((config.text_config, dict(hidden_size=12, intermediate_size=16, num_hidden_layers=2,
                                                  num_attention_heads=2, num_key_value_heads=2, head_dim=6)),
                        (config.vision_config, dict(hidden_size=12, intermediate_size=16, num_attention_heads=2))):
        for key, value in sizes.items():
            setattr(part, key, value)
    assert make.LlavaForConditionalGeneration is LlavaForConditionalGeneration
    roughened(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ALL_TASKS)
def test_every_task_runs(name, tiny, tiny_eyes, tmp_path, monkeypatch):
    splits = dict(list(tasks.TASKS[name].splits.items())[:2])
    monkeypatch.setattr(tasks.TASKS[name], "splits", splits)
    rows = tiny_run(tiny_eyes if name.endswith("-vl") else tiny, tmp_path / name, "--task", name, "--max-new-tokens",
                    "90" if name == "math" else "60", "--prompts", "3", "--steps", "3", "--warmup", "1", "--eval-n", "4",
                    "--meta-every", "2")
    evals, kinds = [row for row in rows if row["kind"] == "eval"], Counter(row["kind"] for row in rows)
    assert kinds == {"config": 1, "step": 3, "eval": 2 * len(splits), "final": 1} and "val" in splits
    assert "meta_grad" in [row for row in rows if row["kind"] == "step"][-1]
    for row in evals:
        assert ("step_accuracy" in row) == (name.startswith("virl") or name == "gp-turns")
        assert ("recognition" in row) == (name not in ("gp", "gp-turns", "math"))
        for measure in ("step_accuracy", "first_try", "recognition"):
            if measure in row:
                share, low, high = row[measure]
                assert 0 <= low <= share <= high <= 1


def test_meta_gradient_of_a_policy_with_eyes_against_finite_differences(tiny_eyes, tokenizer, monkeypatch):
    """As on the toy world, but through a LLaVA: dU/dmu of the exact U over every response of one token, given pictures,
    through torch's own clipping and AdamW. The library takes norms and softmax in float32; here they are float64."""
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: x.softmax(dim))
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: self.weight * x * (
        x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())
    rng = random.Random(SEED)
    config = configured(task="gp-vl", model=tiny_eyes, max_new_tokens=60)
    task = tasks.GeneralPointsPictures()
    model, _ = amft.load_policy(config, task)
    model = model.double()
    deals = [task.sample("val", rng) for _ in range(3)]
    prompts = [torch.tensor(tasks.encode_shown(model, tokenizer, deal.prompt)) for deal in deals]
    pixels = [tasks.pixels_of([deal.image], "cpu").double() for deal in deals]
    vocabulary = len(tokenizer)
    generator = torch.Generator().manual_seed(SEED)
    reward = (torch.rand(3, vocabulary, generator=generator) < 0.3).double()

    def exact(model):  # log pi of every one-token response to every prompt, (3, V)
        return torch.stack([model(input_ids=ids.unsqueeze(0), pixel_values=image).logits[0, -1].log_softmax(-1)
                            for ids, image in zip(prompts, pixels)])

    def utility(model):
        return (exact(model).exp() * reward).sum() / 3
    theta = amft.flatten(model)
    state = amft.AdamState(torch.zeros_like(theta), torch.zeros_like(theta), 0)
    for _ in range(5):
        noise = torch.randn(len(theta), generator=generator, dtype=torch.float64)
        theta, state = amft.adamw_step(theta, noise, state, lr=1e-3, max_norm=1e9)
    vector_to_parameters(theta.clone(), model.parameters())
    g_rl = -flat_grad((exact(model).exp() * (torch.rand(3, vocabulary, generator=generator) < 0.3)).sum(), model)
    g_sft = -flat_grad(exact(model)[range(3), [5, 6, 7]].sum(), model)
    how, mu, h = dict(lr=0.02, max_norm=0.5), 0.4, 1e-3

    def after(mu):
        with torch.no_grad():
            return utility(torch_step(model, (1 - mu) * g_rl + mu * g_sft, state, **how)).item()
    expected = (8 * (after(mu + h) - after(mu - h)) - (after(mu + 2 * h) - after(mu - 2 * h))) / (12 * h)
    tangent = amft.step_sensitivity(theta, g_rl, g_sft, mu, state, **how)[0]
    stepped, _ = amft.adamw_step(theta, (1 - mu) * g_rl + mu * g_sft, state, **how)
    vector_to_parameters(stepped.clone(), model.parameters())
    actual = 0.0
    words = [i for i in range(vocabulary) if i != model.config.image_token_id]  # that one has no probability
    for ids, image, r in zip(prompts, pixels, reward):
        every = torch.cat([ids.expand(vocabulary, -1), torch.arange(vocabulary).unsqueeze(1)], 1)[words]
        batch = amft.Batch(every, torch.ones_like(every), torch.ones(len(words), 1), [image] * len(words))
        logps = amft.logps_of(model, batch).squeeze(1)
        score = amft.gradient(model, (logps.exp().detach() * r[words] * logps).sum())
        actual += (score @ tangent).item() / 3
    size = (score.norm() * tangent.norm()).item()
    assert actual == pytest.approx(expected, rel=1e-3, abs=1e-4 * size) and size > 0


# --- every task: experts, chance, hostile text --------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_TASKS)
def test_every_demonstration_is_graded_correct(name):
    """Thousands, on every split: the expert scores 100%, its slips do not, and what it learns is only what is right."""
    for turns in (0, 3):
        task, rng = tasks.TASKS[name](turns=turns), random.Random(SEED)
        for split in ["train", *task.splits]:
            for _ in range(200):
                episode = task.sample(split, rng)
                assert episode.attempts == (turns or tasks.TASKS[name].turns or type(episode).attempts)
                replay, total = copy.copy(episode), 0.0
                shown, done = replay.prompt, False
                for turn in episode.demonstration():
                    assert not done and turn.shown == shown
                    assert (turn.image is None) == (tasks.IMAGE not in shown)
                    seen = replay.recognised(turn.response)
                    shown, reward, done = replay.step(turn.response)
                    assert (replay.history[-1] == "correct") == turn.learn and seen is not False
                    total += reward
                assert done and replay.success and not episode.history  # playing a copy leaves the episode alone
                assert total == sum(episode.outcomes[o][0] for o in replay.history)
        if turns and name.startswith("gp"):  # demonstrations show what to do after a failure, too
            kinds = Counter(len(task.sample("train", rng).demonstration()) for _ in range(300))
            assert set(kinds) == {1, 2} and min(kinds.values()) > 60


@pytest.mark.parametrize("name", ALL_TASKS)
def test_wrong_responses_get_their_named_outcome_in_bounded_time(name):
    task, rng = tasks.TASKS[name](), random.Random(SEED)
    hostile = ["", "{}", "null", "[" * 100_000, "[" * 999, "9" * 999, '{"a":' * 300, "\x00\uffff", "\\boxed{" * 5000,
               "{" * 10 ** 6, '{"action": "stop()", "action": "forward()"}', '{"action": ["stop()"]}',
               '{"action": {}}', '{"formula": {}}', "\\boxed{" + "9" * 10 ** 6 + "}", "\\boxed{}", "\\boxed{1",
               "\\boxed{1/0}", "\\boxed{9**9**9}", "\\boxed{" + "\\frac{" * 999]
    for text in hostile:
        episode = task.sample("train", rng)
        start = time.process_time()
        observation, reward, done = episode.step(text)
        assert time.process_time() - start < 0.1
        assert episode.history == ("no_answer",) and not episode.success and reward == episode.outcomes["no_answer"][0]
        assert done == (episode.attempts == 1) and len(observation) < 200
        episode.recognised(text)


def test_feedback_says_what_was_wrong_and_not_how_near_it_was():
    rng, said = random.Random(SEED), {}
    task = tasks.GeneralPoints(turns=5)
    for _ in range(3000):
        deal = task.sample("train", rng)
        (formula, _), _ = tasks.random_formula(rng.sample(deal.numbers, rng.choice((3, 4))), rng)
        near = deal.formula[:rng.randrange(len(deal.formula) + 1)]  # beginnings of a solution
        observation, _, done = deal.step(deal.respond(rng.choice((formula, near))))
        said.setdefault(deal.history[0], set()).add(observation)
        assert done == (deal.history[0] == "correct")
    assert {"correct", "wrong_result", "illegal_number", "illegal_formula"} <= set(said)
    assert all(len(texts) == 1 for texts in said.values())
    deal.tries = deal.point = 0
    assert [deal.step("x")[2] for _ in range(5)] == [False] * 4 + [True] and not deal.success


def exact_chance(numbers, target=24):
    """The share of random_formula over shuffled numbers that makes the target: every shuffle, cut and operator."""
    def outcomes(part):
        if len(part) == 1:
            return {Fraction(part[0]): Fraction(1)}
        total = Counter()
        for cut in range(1, len(part)):
            for (a, p), (b, q) in itertools.product(outcomes(part[:cut]).items(), outcomes(part[cut:]).items()):
                for value in (None if a is None or b is None else x for x in (
                        (a or 0) + (b or 0), (a or 0) - (b or 0), (a or 0) * (b or 0), (a or 0) / b if b else None)):
                    total[value] += p * q / 4 / (len(part) - 1)
        return total
    return float(sum(outcomes(order).get(target, 0) for order in itertools.permutations(numbers))) / 24


def test_a_random_agent_scores_what_chance_predicts():
    rng, n = random.Random(SEED), 4000
    deal = tasks.GeneralPoints().sample("heldout", rng)
    chance = exact_chance(deal.numbers)
    hits = sum(deal.grade(deal.respond(tasks.random_formula(rng.sample(deal.numbers, 4), rng)[0][0])) == "correct"
               for _ in range(n))
    assert abs(hits - n * chance) < 4.5 * math.sqrt(n * chance) + 1
    for split, actions in (("id", 10), ("ood_rule", 6), ("ood_rule_hard", 6)):
        task, right, said, passed, routes = tasks.VIRL(), 0, 0, 0, 600
        for _ in range(routes):
            route, done = task.sample(split, rng), False
            assert len(set(route.actions)) == actions
            while not done:
                done = route.step(route.respond(rng.choice(route.actions)))[2]
            right, said = right + route.history.count("correct"), said + len(route.history)
            passed += route.point > 0
        chance = 1 / actions  # of one response; of the first stop, in two attempts: 1 - (1 - chance)^2
        assert abs(right / said - chance) < 4.5 * math.sqrt(chance * (1 - chance) / said)
        stop = 1 - (1 - chance) ** 2
        assert abs(passed / routes - stop) < 4.5 * math.sqrt(stop * (1 - stop) / routes)
    problems = [tasks.Mathematics().sample("heldout", rng) for _ in range(n)]
    chance = sum(Fraction(p.answer).denominator == 1 for p in problems) / 101  # answers lie in 0..100
    hits = sum(p.grade(f"\\boxed{{{rng.randint(0, 100)}}}") == "correct" for p in problems)
    assert abs(hits - chance) < 4.5 * math.sqrt(chance)


# --- V-IRL --------------------------------------------------------------------------------------------------------


def test_routes_are_walks_through_their_city():
    """The instruction, read word by word and walked with angles in degrees, leads along streets to the landmark; what
    it says of landmarks and turns is what stands there."""
    rng, words = random.Random(SEED), {name: 45 * i for i, name in enumerate(tasks.HEADINGS)}
    bearings = {"front": 0, "right front": 45, "right": 90, "right behind": 135, "behind": 180, "left behind": 225,
                "left": 270, "left front": 315}
    task, lengths = tasks.VIRL(), Counter()
    for split in ["train", *task.splits]:
        for _ in range(150):
            route = task.sample(split, rng)
            role = split if split in ("train", "val") else "train" if split == "id" else "heldout"
            names = [n for n in tasks.NAMES if tasks.NAME_ROLES[n] == ("heldout" if role == "heldout" else "train")]
            city = tasks.City(f"{role} {route.city}", names)
            heading, legs = words[re.search("You face (\\w+)[.]", route.prompt)[1]], []
            for i, line in enumerate(route.lines):
                if i % 2 == 0:
                    said = "(?:First, turn|Turn)(?: ((?:slightly )?(?:left|right)))?(?: to face (\\w+))?[.]"
                    relative, absolute = re.fullmatch(said, line).groups()
                    turn = (words[absolute] - heading) % 360
                    if relative:
                        expected = {45: "slightly right", 90: "right", 135: "right", 225: "left", 270: "left",
                                    315: "slightly left"}
                        assert relative == expected[turn]
                    assert (relative is None) == (split == "ood_rule_hard") and turn not in (0, 180)
                    heading = words[absolute]
                else:
                    end, place = re.fullmatch("Move forward until you reach (next intersection|destination)"
                                              "(?: where (.*))?[.]", line).groups()
                    assert (end == "destination") == (i == len(route.lines) - 1)
                    legs.append((heading, place))
            assert len(legs) in (2, 3) and place
            # Some node of the city is the start of exactly this walk.
            def leads(node, legs):
                if not legs:
                    return True
                (heading, place), rest = legs[0], legs[1:]
                step = round(math.sin(math.radians(heading))), round(math.cos(math.radians(heading)))
                following = (node[0] + step[0], node[1] + step[1])
                if following not in city.streets[node].values():
                    return False
                mark = city.landmarks.get(following)
                if (mark is None) != (place is None):
                    return False
                if mark:
                    name, bearing = re.fullmatch("(.*) is on your (.*)", place).groups()
                    if name != mark[0] or (45 * mark[1] - heading - bearings[bearing]) % 360:
                        return False
                return leads(following, rest)
            assert any(leads(node, legs) for node in city.streets)
            actions = [stop.action for stop in route.stops]
            lengths[len(actions)] += 1
            assert actions[-1] == "stop()" and actions.count("stop()") == 1
            turns = [action for action in actions if action.startswith("turn")]
            ways = [re.fullmatch("turn_direction\\((.*)\\)", turn)[1] for turn in turns]
            assert len(turns) == len(legs) and all((a in words) != split.startswith("ood_rule") for a in ways)
            assert [stop.intersection for stop in route.stops if stop.action.startswith("turn")] == [False] + [True] * (
                len(legs) - 1) and not any(s.intersection for s in route.stops if not s.action.startswith("turn"))
    assert min(lengths) >= 3 and max(lengths) <= 10 and len(lengths) > 4


def test_cities_and_names_of_new_splits_are_new(monkeypatch):
    task, rng, names, cities, seeds, City = tasks.VIRL(), random.Random(SEED), {}, {}, [], tasks.City
    monkeypatch.setattr(tasks, "City", lambda seed, names: seeds.append(seed) or City(seed, names))
    for split in ["train", *task.splits]:
        text = " ".join(task.sample(split, rng).prompt for _ in range(300))  # two cities may have one by chance
        names[split] = {name for name in tasks.NAMES if name in text}
        cities[split] = {seeds.pop() for _ in range(len(seeds))}
    assert names["id"] == names["train"] == names["val"] and len(names["train"]) == 40
    for split in ("heldout", "ood_rule", "ood_rule_hard"):
        assert not names[split] & names["train"] and len(names[split]) == 24
    assert len(cities["heldout"]) > 50 and cities["id"] & cities["train"]
    assert not cities["val"] & cities["train"] and not cities["heldout"] & (cities["val"] | cities["train"])
    fingerprint = lambda city: tuple(sorted((n, tuple(w.items())) for n, w in city.streets.items()))  # noqa: E731
    streets = {role: {fingerprint(City(f"{role} {i}", tasks.NAMES)) for i in range(tasks.CITIES)}
               for role in ("train", "val", "heldout", "pretraining")}
    for a, b in itertools.combinations(streets, 2):
        assert not streets[a] & streets[b]


def test_feedback_is_never_wrong_about_an_intersection():
    rng, task, outcomes = random.Random(SEED), tasks.VIRL(), Counter()
    for _ in range(400):
        route, done = task.sample("train", rng), False
        while not done:
            stop, end = route.stops[route.point], route.point in (0, route.points - 1)  # the ends are corners, too
            say = rng.choice((tasks.NOTHING, tasks.NOTHING + tasks.CROSSING, stop.seen))
            action = stop.action if rng.random() < 0.7 else rng.choice((*route.actions, "fly()", "turn_direction(up)"))
            observation, _, done = route.step(json.dumps({"current observation": say, "action": action}))
            outcome, claims = route.history[-1], "intersection" in say
            outcomes[outcome] += 1
            assert (outcome == "correct") == (action == stop.action)
            assert (outcome == "illegal_action") == (action in ("fly()", "turn_direction(up)"))
            if "you are not at an intersection" in observation:
                assert claims and not stop.intersection and not end
            elif "you are at an intersection" in observation:
                assert stop.intersection and not claims
            elif outcome == "wrong_action":
                assert claims == stop.intersection or end
    assert set(outcomes) == set(tasks.Route.outcomes) - {"no_answer"}


def test_each_point_has_its_own_attempts():
    """One failure at every stop is forgiven in two attempts; two at one stop end the route."""
    route = tasks.VIRL().sample("train", random.Random(SEED))
    failing = copy.copy(route)
    for point in range(route.points):
        assert route.step("x")[2] is False and route.point == point
        done = route.step(route.expert)[2]
    assert done and route.success and len(route.history) == 2 * route.points
    assert not failing.step("x")[2] and failing.step("x")[2] and not failing.success


# --- mathematics --------------------------------------------------------------------------------------------------


def test_problems_by_reading_the_prompt():
    """The answer, and every equation of the solution, worked out anew from the text of the prompt."""
    task, rng = tasks.Mathematics(), random.Random(SEED)
    for split in ["train", *task.splits]:
        for _ in range(400):
            problem = task.sample(split, rng)
            rule = re.match("a (.) b means (.*?)[.] ", problem.prompt)
            assert bool(rule) == (split == "ood_rule")
            steps = re.findall(r"(\w+) = (\w+)(?: (.) (\w+))?[.]", problem.prompt[rule.end() if rule else 0:])
            known = {}
            for name, first, op, second in steps:
                a = known[first] if first in known else Fraction(first)
                if op:
                    b = known[second] if second in known else Fraction(second)
                    a = eval(rule[2], {}, dict(a=a, b=b)) if rule and op == rule[1] else {
                        "+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[op]
                known[name] = a
            assert len(steps) - 1 in ((5,) if split == "ood_length" else (3, 4))
            asked = re.search(r"How many (\w+)\?", problem.prompt)[1]
            assert Fraction(problem.answer) == known[asked] and asked == steps[-1][0]
            for equation in re.findall(r"\w+ = (.*?)[.] ", problem.solution):
                values = {eval(re.sub(r"(\d+)", r"Fraction(\1)", part)) for part in equation.split(" = ")
                          if not set(part) & set(tasks.SYMBOLS)}
                assert len(values) == 1, equation
    used = {problem.prompt[:problem.prompt.index(". ")].replace(symbol, "@") for symbol in tasks.SYMBOLS
            for problem in (task.sample("ood_rule", rng) for _ in range(100))
            if problem.prompt[2] == symbol}
    make, seen = importlib.import_module("make"), set()
    for _ in range(4000):
        problem = make.mathematics(rng)
        assert tasks.role_of(problem.unit) == "train"
        if problem.prompt.startswith("a "):
            seen.add("a @" + problem.prompt[3:problem.prompt.index(". ")])
    assert len(used) == len(tasks.OOD_MEANINGS) and len(seen) > 8 and not used & seen


def test_problems_of_different_roles_differ():
    task, rng, units = tasks.Mathematics(), random.Random(SEED), {}
    for split in ["train", *task.splits]:
        units[split] = {task.sample(split, rng).unit for _ in range(3000)}
    assert units["train"] & units["id"]
    for a, b in itertools.combinations(("train", "val", "heldout", "ood_length", "ood_rule"), 2):
        assert not units[a] & units[b]
    share = Counter(tasks.role_of(str(i)) for i in range(20_000))
    assert share["train"] == pytest.approx(12_000, rel=0.03) and share["val"] == pytest.approx(4000, rel=0.06)


@pytest.mark.parametrize("answer_, box, outcome", [
    ("1/2", "1/2", "correct"), ("1/2", "0.5", "correct"), ("1/2", "\\frac{1}{2}", "correct"), ("1/2", "2/4", "correct"),
    ("1/2", "\\dfrac{1}{2}", "correct"), ("1/2", " 1 / 2 ", "correct"), ("1/2", "$0.50$", "correct"),
    ("1000", "1,000", "correct"), ("1,000", "1000.0", "correct"), ("-3", "-3", "correct"),
    ("-1/2", "-\\frac{1}{2}", "correct"), ("3", "-3", "wrong_answer"),
    ("7", "+7", "correct"), ("7", "007", "correct"), ("1/3", "0.333", "wrong_answer"), ("7", "8", "wrong_answer"),
    ("1000", "1,00", "no_answer"), ("1000", "10,00", "no_answer"), ("7", "7 apples", "no_answer"),
    ("7", "x=7", "no_answer"),
    ("7", "3+4", "no_answer"), ("7", "7e0", "no_answer"), ("7", "\u0667", "no_answer"), ("7", "--7", "no_answer"),
    ("7", "\\frac{14}{2}x", "no_answer"), ("1/2", "1//2", "no_answer"), ("7", "7/0", "no_answer"),
    ("7", "\\frac{7}{0}", "no_answer"),
    ("7", "7.", "no_answer"), ("7", "seven", "no_answer"), ("7", "", "no_answer"), ("1/2", "{1/2}", "no_answer"),
    ("x+1", "x+1", "correct"), ("x+1", "1+x", "wrong_answer"),
])
def test_equal_numbers_in_different_forms(answer_, box, outcome):
    problem = tasks.Problem("", "", answer_)
    assert problem.grade(f"so \\boxed{{{box}}} it is") == outcome
    assert problem.grade(f"\\boxed{{99}} no, \\boxed{{{box}}}") == outcome  # the last box counts
    assert problem.grade(f"\\boxed{{{box}}} no, \\boxed{{99}}") == "wrong_answer"
    assert problem.grade(f"\\boxed{{{box}") == problem.grade(box) == "no_answer"


def test_a_readers_own_problems(tiny, tmp_path, capsys):
    rng, file = random.Random(SEED), tmp_path / "own.jsonl"
    problems = [tasks.chain(rng, 2) for _ in range(400)]
    rows = [dict(prompt=p.prompt, solution=p.solution, answer=p.answer) for p in problems]
    rows[0]["solution"] = rows[0]["solution"].split("Answer")[0]  # GSM8K has no box: one is added
    file.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    task = tasks.Mathematics(data=str(file), heldout=0.25)
    roles = {split: {task.sample(split, rng).prompt for _ in range(6000)} for split in ["train", *task.splits]}
    assert roles["train"] == roles["id"] and set.union(*roles.values()) == {row["prompt"] for row in rows}
    for a, b in itertools.combinations(("train", "val", "heldout"), 2):
        assert not roles[a] & roles[b]
    assert 65 <= len(roles["heldout"]) <= 135 and 65 <= len(roles["val"]) <= 135
    log = tiny_run(tiny, tmp_path / "run", "--task", "math", "--data", str(file), "--max-new-tokens", "60", "--steps",
                   "4", "--eval-n", "4")
    assert log[-1]["kind"] == "final" and {r["split"] for r in log if r["kind"] == "eval"} == {"val", "id", "heldout"}
    good = json.dumps(rows[1])
    for bad, says in (("{", "line 2: is not JSON"), ("[1]", 'line 2: "prompt" must'),
                      ('{"prompt": "x"}', 'line 2: "solution" must'),
                      (json.dumps(dict(rows[1], prompt="<image> 3 + 4?")), "line 2: <image> stands for a picture"),
                      (json.dumps(dict(rows[1], answer=7)), 'line 2: "answer" must'),
                      ("[" * 10 ** 5, "line 2: is not JSON"), (good[:-1] + ', "x": NaN}', "line 2: is not JSON"),
                      (json.dumps(dict(rows[1], answer="999")),
                       'line 2: "solution" ends in another answer than "answer", 999')):
        file.write_text(good + "\n" + bad + "\n")
        error = fails(["--task", "math", "--data", str(file), "--model", tiny, "--out", str(tmp_path / "no")], capsys)
        assert says in error and len(error.splitlines()) == 1
    file.write_text(good + "\n")
    assert "too few problems" in fails(["--task", "math", "--data", str(file), "--out", str(tmp_path / "no")], capsys)


# --- pictures -----------------------------------------------------------------------------------------------------


def test_a_nearest_template_reader_recovers_every_card_in_black_and_red():
    """Templates are whole cards in black; what is read is where a card is not white, whatever the ink."""
    def corners(picture):
        return [picture[top:top + 24, left:left + 24] for top in (0, 24) for left in (0, 24)]

    def marks(card):
        return (card.astype(int).sum(-1) < 600)[2:22, 4:20]
    rank_of = {rank: marks(corners(tasks.draw_cards((rank,) * 4, "SSSS"))[0])[:12] for rank in tasks.RANKS}
    pip_of = {suit: marks(corners(tasks.draw_cards(("A",) * 4, suit * 4))[0])[12:] for suit in "SCHD"}
    rng, seen = random.Random(SEED), set()
    for suits in ("SC", "HD", "SCHD"):
        for _ in range(150):
            ranks, chosen = tuple(rng.choices(tasks.RANKS, k=4)), "".join(rng.choices(suits, k=4))
            picture = tasks.draw_cards(ranks, chosen)
            assert picture.shape == (48, 48, 3) and picture.dtype == np.uint8
            for rank, suit, card in zip(ranks, chosen, corners(picture)):
                read = min(rank_of, key=lambda r: (marks(card)[:12] != rank_of[r]).sum())
                pip = min(pip_of, key=lambda s: (marks(card)[12:] != pip_of[s]).sum())
                ink = card[3:22, 5:20][marks(card)[1:, 1:][:19, :15]].mean(0)
                assert (read, pip) == (rank, suit) and (ink[0] > 100) == (suit in "HD")
                seen.add((rank, suit))
    assert len(seen) == 52


def test_a_nearest_sign_reader_recovers_every_landmark_in_every_look():
    """Where the sign hangs gives the bearing, its pixels the name: read back from the picture alone."""
    views = {0: (0, 0), 1: (0, 24), 2: (24, 0), 3: (24, 24)}  # front, right / behind, left: as the prompt says
    assert "front and right above, behind and left below" in tasks.PictureRoute.layout
    signs = tasks.signs()
    for look, style in enumerate(tasks.LOOKS):
        board, ink = np.array(style.sign, float), np.array(style.ink, float)

        def likeness(patch, sign):
            return abs(patch - np.where(sign[..., None], ink, board)).mean()
        for i, name in enumerate(tasks.NAMES):
            bearing = (i + look) % 8
            picture = tasks.draw_views((name, bearing), look, "x").astype(float)
            assert picture.shape == (48, 48, 3)
            places = {}  # (view, offset) -> how well the best sign fits there
            for view, (top, left) in views.items():
                for offset in (-1, 0, 1):
                    patch = picture[top + 5:top + 12, left + 8 + 7 * offset:left + 15 + 7 * offset]
                    places[view, offset] = min((likeness(patch, sign), other) for other, sign in signs.items())
            wanted = {(v, o) for v in range(4) for o in (-1, 0, 1) if (2 * v + o) % 8 == bearing}
            ranked = sorted(places, key=lambda place: places[place][0])
            assert set(ranked[:len(wanted)]) == wanted and all(places[place][1] == name for place in wanted)
        empty = tasks.draw_views(None, look, "x")
        assert not np.array_equal(empty, picture)


def test_pictures_hold_what_the_text_does_not():
    rng = random.Random(SEED)
    deals, routes = tasks.GeneralPointsPictures(), tasks.VIRLPictures()
    for split in ["train", *deals.splits]:
        for _ in range(100):
            deal = deals.sample(split, rng)
            assert set(deal.suits) <= set("HD" if split == "ood_visual" else "SC")
            assert f"Cards: {tasks.IMAGE}. J counts as" in deal.prompt and deal.image.shape == (48, 48, 3)
            wrong = json.loads(deal.expert)
            wrong["cards"] = wrong["cards"][:3] + ["A" if wrong["cards"][3] != "A" else "K"]
            assert deal.grade(json.dumps(wrong)) == "wrong_cards" and not deal.recognised(json.dumps(wrong))
    for split in ["train", *routes.splits]:
        for _ in range(30):
            route = routes.sample(split, rng)
            assert (route.look > 0) == (split == "ood_visual")
            instruction, first = route.prompt.split("\nO_1: ")
            assert first == f"{tasks.IMAGE}You observe an image of 4 views\nA_1: "
            for turn in route.demonstration()[1:]:
                assert not any(name in turn.shown for name in tasks.NAMES) and tasks.NOTHING not in turn.shown
    for role in ("train", "val", "heldout", "ood_visual"):
        task = tasks.GeneralPointsPictures()
        assert {tasks.ROLES[task.sample(role, rng).unit] for _ in range(50)} == {role.replace("ood_visual", "heldout")}


def test_show_draws_what_the_policy_sees(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for name in ("gp-vl", "virl-vl", "math"):
        tasks.show_task(name)
    assert (tmp_path / "gp-vl.png").stat().st_size > 10_000 < (tmp_path / "virl-vl.png").stat().st_size
    assert "ood_visual" in capsys.readouterr().out and not (tmp_path / "math.png").exists()


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", __file__]))
