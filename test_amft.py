"""Tests of amft.py and tasks.py: each against an independent reference (a slow loop, an enumeration, a float64 finite
difference, torch's own optimiser), never against a copy of the code.

    python -m pytest -q

AMFT_MODULE names the module under test (default amft), so that this file grades a student's version; AMFT_TEST_SEED
(default 0) draws the inputs, so that a grader can draw others.
"""

import copy
import importlib
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
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "base")]
amft = importlib.import_module(os.environ.get("AMFT_MODULE", "amft"))
tasks = importlib.import_module("tasks")
SEED = int(os.environ.get("AMFT_TEST_SEED", "0"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(SEED)


def roughened(model):
    """Weights far enough from transformers' initial ones that the policy is not nearly uniform."""
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def toy_model():
    """GPT-2, because Llama takes its norms and softmax in float32 whatever its weights are: too coarse for h."""
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
        max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_run(model, out, *flags):
    """A run of seconds; returns the rows of its log."""
    amft.main(["--task", "gp", "--smoke", "--model", model, "--out", str(out), "--device", "cpu", "--eval-n", "8",
               "--max-new-tokens", "34", *flags])
    return read(out)


def read(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


# --- a world small enough to enumerate: 5 tokens, responses of exactly 2 tokens, 3 prompts ------------------------

V, T = 5, 2
PROMPTS = torch.tensor([[1, 2, 3], [4, 0, 2], [3, 3, 1]])
ALL = torch.tensor(list(itertools.product(range(V), repeat=T)))  # (25, 2): every response


def sequences(prompt):
    """Batch of a prompt with every response."""
    ids = torch.cat([prompt.expand(len(ALL), -1), ALL], 1)
    return amft.Batch(ids, torch.ones_like(ids), torch.ones(len(ALL), T, dtype=torch.float64))


def exact_logps(model, prompt):
    """log pi(y|x) of every response (25,), straight from the chain rule and a plain forward pass."""
    first = model(prompt.unsqueeze(0)).logits[0, -1].log_softmax(-1)
    second = model(torch.cat([prompt.expand(V, -1), torch.arange(V).unsqueeze(1)], 1)).logits[:, -1].log_softmax(-1)
    return (first.unsqueeze(1) + second).reshape(-1)


def exact_utility(model, reward):
    """U(theta) = E[R] by enumeration; reward (3, 25)."""
    return sum((exact_logps(model, p).exp() * r).sum() for p, r in zip(PROMPTS, reward)) / len(PROMPTS)


def flat_grad(loss, model):
    return parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))


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
def test_meta_gradient_is_the_finite_difference_of_exact_utility(clipped, steps_before, mu):
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
    tangent = amft.step_sensitivity(theta, g_rl, g_sft, mu, state, **how)
    stepped, _ = amft.adamw_step(theta, (1 - mu) * g_rl + mu * g_sft, state, **how)
    vector_to_parameters(stepped.clone(), model.parameters())
    actual = 0.0
    for prompt, r in zip(PROMPTS, reward):  # E over every response, weighted by its probability, instead of samples
        dlogps = amft.logp_sensitivity(model, stepped, tangent, sequences(prompt))
        actual += (exact_logps(model, prompt).exp() * r * dlogps).sum().item() / len(PROMPTS)
    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-8)
    if steps_before:
        assert abs(expected) > 1e-4  # there is something to compare


def test_adams_first_step_hides_mu():
    """On fresh moments the step is sign(g): d theta'/d mu is about 0, however large g_SFT - g_RL. Later it is not."""
    theta, g_rl, g_sft = torch.randn(3, 50, dtype=torch.float64)
    state = amft.AdamState(torch.zeros_like(theta), torch.zeros_like(theta), 0)
    norms = []
    for _ in range(3):
        norms.append(amft.step_sensitivity(theta, g_rl, g_sft, 0.5, state, lr=1.0, max_norm=1e9).norm().item())
        theta, state = amft.adamw_step(theta, torch.randn_like(theta), state, lr=1.0, max_norm=1e9)
    assert norms[0] < 1e-2 and min(norms[1:]) > 0.1


def test_sensitivity_is_finite_where_no_gradient_ever_came():
    theta, zeros = torch.randn(4), torch.zeros(4)
    g_rl, g_sft = torch.tensor([0.0, 1, 0, 2]), torch.tensor([0.0, 0, 3, 2])
    for state in (amft.AdamState(zeros, zeros, 0), amft.AdamState(zeros, torch.tensor([0.0, 1, 1, 1]), 9)):
        tangent = amft.step_sensitivity(theta, g_rl, g_sft, 0.5, state, lr=0.1)
        assert tangent.isfinite().all() and tangent[0] == 0
        assert amft.step_sensitivity(theta, zeros, zeros, 0.5, state, lr=0.1).isfinite().all()


def test_per_sample_form_equals_the_backward_inner_product():
    model, reward, g_rl, g_sft, state = toy(5)
    theta = amft.flatten(model)
    tangent = amft.step_sensitivity(theta, g_rl, g_sft, 0.4, state, lr=0.05)
    batch = sequences(PROMPTS[0])
    dlogps = amft.logp_sensitivity(model, theta, tangent, batch)
    weights = torch.rand(len(ALL), dtype=torch.float64)
    backward = flat_grad((exact_logps(model, PROMPTS[0]) * weights).sum(), model) @ tangent
    torch.testing.assert_close((dlogps * weights).sum(), backward, rtol=1e-9, atol=0)


def test_meta_gradient_is_unbiased_and_its_standard_error_covers():
    """Sampled on the toy world: mean over repetitions = the exact value, and 95% of intervals hold it."""
    model, reward, g_rl, g_sft, state = toy(10)
    theta = amft.flatten(model)
    tangent = amft.step_sensitivity(theta, g_rl, g_sft, 0.5, state, lr=0.05)
    with torch.no_grad():
        probabilities = torch.stack([exact_logps(model, p).exp() for p in PROMPTS])
    dlogps = torch.stack([amft.logp_sensitivity(model, theta, tangent, sequences(p)) for p in PROMPTS])
    truth = (probabilities * reward * dlogps).sum().item() / 3
    P, G, repetitions = 48, 4, 1500
    estimates, errors = np.zeros(repetitions), np.zeros(repetitions)
    for i in range(repetitions):
        which = torch.randint(3, (P,))
        samples = torch.multinomial(probabilities[which], G, replacement=True)
        rows = which.unsqueeze(1)
        estimates[i], errors[i] = amft.meta_gradient(reward[rows, samples], dlogps[rows, samples])
    assert abs(estimates.mean() - truth) < 4 * estimates.std() / math.sqrt(repetitions)
    assert np.mean(errors) == pytest.approx(estimates.std(), rel=0.1)
    assert 0.91 < np.mean(abs(estimates - truth) < 1.96 * errors) < 0.98


def test_published_settings_leave_mu_to_the_entropy_term(tokenizer):
    """Policy learning rate 1e-6, eta_mu 1e-4, a meta-gradient every 20 of 500 steps: mu moves by less than 1e-6."""
    config = amft.Config(controller="paper", eta_mu=1e-4, entropy=False, lr=1e-6, advantage="group", device="cpu")
    model, _ = amft.load_policy(config)
    task, rng = tasks.GeneralPoints(), random.Random(SEED)
    theta = amft.flatten(model)
    state = amft.State(theta, amft.AdamState(torch.zeros_like(theta), torch.zeros_like(theta), 0), mu=0.5)
    config.prompts, config.samples, config.meta_prompts = 16, 8, 16

    def demos():
        return amft.encode_demos(tokenizer, [task.sample("train", rng) for _ in range(16)], "cpu")
    for _ in range(50):  # the published warm-up; on fresh moments a few entries with g(mu) near 0 make heavy tails
        theta, state.adam = amft.adamw_step(theta, amft.sft_gradient(model, demos(), config)[0], state.adam, lr=config.lr)
    for _ in range(3):
        rollouts = amft.explore(model, tokenizer, [task.sample("train", rng) for _ in range(16)], config)
        amft.add_advantages(model, None, rollouts, config)
        g_sft, g_rl = amft.sft_gradient(model, demos(), config)[0], amft.rl_gradient(model, None, rollouts, config)[0]
        state.sensitivity = amft.step_sensitivity(theta, g_rl, g_sft, 0.5, state.adam, lr=config.lr)
        theta, state.adam = amft.adamw_step(theta, (g_rl + g_sft) / 2, state.adam, lr=config.lr)
    state.theta = theta
    vector_to_parameters(theta, model.parameters())
    meta = amft.look_ahead(model, tokenizer, task, state, rng, config)
    assert meta[1] > 0
    mu = 0.5
    for _ in range(500 // 20):  # all 25 updates in the same direction, and at the far end of the interval
        mu, _, _ = amft.update_mu(mu, 1.0, 1.0, (abs(meta[0]) + 2 * meta[1], meta[1]), (0.0, 0.0), config)
    assert 0 < mu - 0.5 < 1e-6, meta


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
    assert reference == pytest.approx(-slope, rel=1e-4) and abs(slope) > 1e-4


# --- the controller -----------------------------------------------------------------------------------------------


def controller(**settings):
    return amft.Config(**dict(dict(eta_mu=0.1, eta_h=0.5, mu_min=0.1, mu_max=0.9, evidence_decay=0.5), **settings))


def test_controller_on_hand_computed_values():
    update = amft.update_mu
    # Entropy 0.2 below target, no meta-gradient: Eq. 6 raises mu by 0.5 * 0.2; the paper's text lowers it.
    assert update(0.5, 1.0, 1.2, None, (0.0, 0.0), controller())[0] == pytest.approx(0.6)
    assert update(0.5, 1.0, 1.2, None, (0.0, 0.0), controller(entropy_sign="text"))[0] == pytest.approx(0.4)
    assert update(0.5, 1.0, 1.2, None, (0.0, 0.0), controller(entropy=False))[0] == 0.5
    # Eq. 6 to the letter.
    mu, _, forces = update(0.5, 1.0, 1.2, (-3.0, 1.0), (0.0, 0.0), controller(controller="paper"))
    assert mu == pytest.approx(0.5 - 0.3 + 0.1) and forces == pytest.approx((-0.3, 0.1))
    assert update(0.5, 0.0, 9.0, None, (0.0, 0.0), controller())[0] == 0.9  # mu_max
    assert update(0.5, 9.0, 0.0, None, (0.0, 0.0), controller())[0] == 0.1  # mu_min
    # Evidence: z = -2 moves mu by eta_mu (2 Phi(-2) - 1) = -0.1 * 0.9544997.
    mu, evidence, forces = update(0.5, 1.0, 1.0, (-4.0, 2.0), (0.0, 0.0), controller())
    assert forces[0] == pytest.approx(-0.09544997) and evidence == pytest.approx((-2.0, 1.0))
    # Then 0.5 * -2 + 1 = 0 with variance 0.25 * 1 + 1: contradicting evidence cancels.
    mu, evidence, forces = update(mu, 1.0, 1.0, (3.0, 3.0), evidence, controller())
    assert forces[0] == 0 and evidence == pytest.approx((0.0, 1.25))
    # No group with signal: nothing is known, nothing moves.
    assert update(0.5, 1.0, 1.0, (0.0, 0.0), (0.0, 0.0), controller())[0] == 0.5


def test_evidence_does_not_depend_on_the_scale_of_the_meta_gradient_and_is_calibrated_without_signal():
    rng = np.random.default_rng(SEED)
    noise = rng.normal(size=4000)
    moves = []
    for scale in (1.0, 1e-9):
        evidence, forces = (0.0, 0.0), []
        for x in noise * scale:
            _, evidence, (force, _) = amft.update_mu(0.5, 1.0, 1.0, (x, scale), evidence, controller(eta_mu=1.0))
            forces.append(force)
        moves.append(np.array(forces))
    np.testing.assert_allclose(moves[0], moves[1], rtol=1e-6)
    # Under no signal 2 Phi(z) - 1 is uniform on (-1, 1).
    assert abs(moves[0].mean()) < 0.05 and moves[0].std() == pytest.approx(1 / math.sqrt(3), rel=0.05)


# --- rewards and losses -------------------------------------------------------------------------------------------


def random_batch(B=6, T=7):
    lengths = torch.randint(1, T + 1, (B,))
    mask = (torch.arange(T) < lengths.unsqueeze(1)).double()
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
    """A_t = sum_k (gamma lam)^k delta_{t+k}, summed directly; one batch row at a time, without padding."""
    mask, (rewards, values, _) = random_batch()
    gamma, lam = 0.9, 0.8
    advantages, returns = amft.gae(rewards * mask, values * mask, mask, gamma, lam)
    for b in range(len(mask)):
        n = int(mask[b].sum())
        v = values[b, :n].tolist() + [0.0]
        delta = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(mask.shape[1]):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(expected + v[t] if t < n else 0.0, abs=1e-12)


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [5, -1, -3, -1]])
    actual = amft.group_advantages(rewards)
    torch.testing.assert_close(actual[0], torch.tensor([3.0, -1, -1, -1]) / math.sqrt(3))  # population std sqrt(3)/4
    assert (actual[1:3] == 0).all()
    torch.testing.assert_close(actual[3], torch.tensor([5.0, -1, -3, -1]) / 3)  # mean 0, variance 36 / 4
    with pytest.raises(ValueError):
        amft.group_advantages(torch.ones(3, 1))


def test_sft_is_policy_gradient_with_the_implicit_reward():
    """By enumeration: grad L_SFT = -E_{y~pi}[1[y = y*] / pi(y|x) grad log pi(y|x)], exact-match RL is the same without
    the 1/pi, and mu L_SFT = mu KL(pi_demo || pi) + mu H(pi_demo)."""
    model, prompt, best = toy_model(), PROMPTS[0], 7
    batch = sequences(prompt)[torch.tensor([best])]
    g_sft = flat_grad(amft.sft_loss(amft.logps_of(model, batch), batch.mask, tokens=1), model)
    policy_gradient = exact_match = 0.0
    for y in range(len(ALL)):
        logps = exact_logps(model, prompt)
        pi, hit = logps[y].exp().item(), float(y == best)
        score = flat_grad(logps[y], model)
        policy_gradient, exact_match = policy_gradient + pi * (hit / pi) * score, exact_match + pi * hit * score
    torch.testing.assert_close(g_sft, -policy_gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(-g_sft * exact_logps(model, prompt)[best].exp(), exact_match, rtol=1e-9, atol=1e-12)
    # PPO on every response at its probability, advantage 1[y = y*], is exact-match RL.
    everything = sequences(prompt)
    logps = amft.logps_of(model, everything)
    weighted = (torch.arange(len(ALL)) == best).double().unsqueeze(1) * everything.mask
    weighted = weighted * logps.sum(1, keepdim=True).detach().exp()
    g_rl = flat_grad(amft.ppo_loss(logps, logps.detach(), weighted, everything.mask, tokens=1), model)
    torch.testing.assert_close(g_rl, -exact_match, rtol=1e-9, atol=1e-12)
    # Demonstrations that are samples of pi_demo: the expected loss is KL plus a constant.
    demo = torch.rand(len(ALL), dtype=torch.float64).softmax(0)
    losses = torch.stack([amft.sft_loss(l.unsqueeze(0), torch.ones(1, T), tokens=1) for l in logps])
    kl = (demo * (demo.log() - exact_logps(model, prompt))).sum()
    torch.testing.assert_close((demo * losses).sum(), kl - (demo * demo.log()).sum())


# --- policy: encoding, sampling, masks ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return amft.load_policy(amft.Config(device="cpu"))


def test_log_probabilities_do_not_depend_on_the_company(base, tokenizer):
    """Alone and unpadded, row by row and by a plain forward pass, against a left- and right-padded batch."""
    model, rng, task = base[0], random.Random(SEED), tasks.GeneralPoints()
    episodes = [task.sample(split, rng) for split in ("train", "heldout", "ood_rule", "ood_small")]
    batch = amft.encode_demos(tokenizer, episodes, "cpu")
    extra = amft.Batch(*(torch.cat([pad, x], 1) for pad, x in (  # two more columns of padding on the left
        (torch.zeros(4, 2, dtype=torch.long), batch.ids), (torch.zeros(4, 2, dtype=torch.long), batch.attention))),
        batch.mask)
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
    padded = amft.Batch(torch.cat([pad, batch.ids], 1), torch.cat([pad, batch.attention], 1), batch.mask)
    torch.testing.assert_close(amft.logps_of(model, padded).sum(1), exact_logps(model, PROMPTS[1]))


def test_rollout_samples_the_policy(base, tokenizer):
    model, rng, task = base[0], random.Random(SEED), tasks.GeneralPoints()
    prompts = [task.sample("train", rng).prompt for _ in range(3)]
    batch, texts, entropy, truncated = amft.rollout(model, tokenizer, prompts, 5, 40, temperature=1.0)
    assert len(batch) == len(texts) == 15 and batch.ids.shape[1] == batch.attention.shape[1]
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
    greedy = amft.rollout(model, tokenizer, prompts, 1, 40, temperature=0)[1]
    for prompt, text in zip(prompts, greedy):
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        while len(ids) < start + 40 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert tokenizer.decode([i for i in ids[start:] if i != tokenizer.eos_token_id]) == text


def test_sampling_frequencies_and_truncation(tiny, tokenizer):
    """First tokens of 4,000 samples against softmax(logits / temperature): top-k or top-p left on would show."""
    model = LlamaForCausalLM.from_pretrained(tiny).eval()
    prompt = tasks.GeneralPoints().sample("train", random.Random(SEED)).prompt
    batch, _, _, truncated = amft.rollout(model, tokenizer, [prompt], 4000, 1, temperature=0.7)
    with torch.no_grad():
        p = (model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1] / 0.7).softmax(-1).numpy()
    counts = np.bincount(batch.ids[:, -1], minlength=len(p))
    assert (abs(counts - 4000 * p) < 5 * np.sqrt(4000 * p * (1 - p)) + 2).all()
    assert (p > 0).sum() == len(p) and (counts > 0).sum() > 55  # more than a top-50 would leave
    assert truncated == pytest.approx(1 - counts[tokenizer.eos_token_id] / 4000)


def test_gradients_do_not_depend_on_micro_batches_and_silent_groups_add_nothing(base, tokenizer):
    model, rng, task = base[0], random.Random(SEED), tasks.GeneralPoints()
    episodes = [task.sample("train", rng) for _ in range(6)]
    config = amft.Config(samples=4, advantage="group", device="cpu")
    rollouts = amft.explore(model, tokenizer, episodes, config)
    rollouts.rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [0] * 4, [1, 1, 1, 0]])
    amft.add_advantages(model, None, rollouts, config)
    logps = amft.logps_of(model, rollouts.batch)  # every row, in one pass, by the textbook formula
    advantages = (rollouts.rewards - rollouts.rewards.mean(1, keepdim=True)) / (
        rollouts.rewards.std(1, keepdim=True, correction=0) + 1e-20)
    expected = flat_grad(-(advantages.reshape(-1, 1) * logps * rollouts.batch.mask).sum() / rollouts.batch.mask.sum(),
                         model)
    demos = amft.encode_demos(tokenizer, episodes, "cpu")
    reference = model(input_ids=torch.cat([demos.ids]), attention_mask=demos.attention).logits.log_softmax(-1)
    picked = reference[:, -demos.mask.shape[1] - 1:-1].gather(-1, demos.responses.unsqueeze(-1)).squeeze(-1)
    expected_sft = flat_grad(-(picked * demos.mask).sum() / demos.mask.sum(), model)
    for size in (24, 5, 1):
        config.micro_batch = size
        rollouts.old_logps = None
        torch.testing.assert_close(amft.rl_gradient(model, None, rollouts, config)[0], expected, rtol=1e-3, atol=2e-6)
        torch.testing.assert_close(amft.sft_gradient(model, demos, config)[0], expected_sft, rtol=1e-3, atol=2e-6)


# --- whole runs ---------------------------------------------------------------------------------------------------


def final_policy(out):
    return parameters_to_vector(LlamaForCausalLM.from_pretrained(Path(out) / "final").parameters()).detach()


def without_clock(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "out", "commit")} for row in rows]


def test_mu_one_is_sft_mu_zero_is_rl_and_no_advantage_is_sft(tiny, tmp_path, monkeypatch):
    """Through train(): with mu = 1 the RL gradient cannot matter, with mu = 0 the SFT gradient cannot, and a random
    policy that never solves a deal moves as mu L_SFT alone would."""
    # Rewards that this random policy does get, so that its RL gradient is not zero.
    monkeypatch.setattr(tasks.Episode, "grade", lambda self, text: "correct" if len(text) % 2 else "no_answer")
    fixed = ["--no-meta", "--no-entropy", "--warmup", "0", "--steps", "2", "--advantage", "group"]
    plain = {mu: tiny_run(tiny, tmp_path / f"mu{mu}", *fixed, "--mu", str(mu)) for mu in (0, 1)}
    assert plain[0][-1]["kind"] == "final"
    for mu, name in ((1, "rl_gradient"), (0, "sft_gradient")):
        true = getattr(amft, name)
        with monkeypatch.context() as patch:
            patch.setattr(amft, name, lambda *a: (torch.randn_like(true(*a)[0]), *true(*a)[1:]))
            tiny_run(tiny, tmp_path / f"noise{mu}", *fixed, "--mu", str(mu))
        assert torch.equal(final_policy(tmp_path / f"mu{mu}"), final_policy(tmp_path / f"noise{mu}"))
    assert not torch.equal(final_policy(tmp_path / "mu0"), final_policy(tmp_path / "mu1"))
    monkeypatch.setattr(tasks.Episode, "grade", lambda self, text: "no_answer")
    tiny_run(tiny, tmp_path / "silent", *fixed, "--mu", "0.4")
    with monkeypatch.context() as patch:
        patch.setattr(amft, "rl_gradient", lambda model, phi, rollouts, config: (0.0 * amft.flatten(model), 0.0, 0.0))
        tiny_run(tiny, tmp_path / "sft", *fixed, "--mu", "0.4")
    assert torch.equal(final_policy(tmp_path / "silent"), final_policy(tmp_path / "sft"))
    steps = [row for row in read(tmp_path / "silent") if row["kind"] == "step"]
    assert all(row["zero_adv"] == 1 and row["rl_loss"] == 0 for row in steps)


def test_same_seed_same_log_and_every_key_is_there(tiny, tmp_path):
    first, again, other = (tiny_run(tiny, tmp_path / name, *flags) for name, flags in (
        ("a", []), ("b", []), ("c", ["--seed", "1"])))
    assert without_clock(first) == without_clock(again) and without_clock(first) != without_clock(other)
    kinds = Counter(row["kind"] for row in first)
    splits = set(tasks.GeneralPoints.splits)
    assert kinds == {"config": 1, "step": 9, "eval": 3 * len(splits), "final": 1}
    needed = {"step", "mu", "meta_grad", "meta_se", "entropy", "target_entropy", "sft_loss", "rl_loss", "value_loss",
              "reward", "zero_adv", "implicit_reward", "grad_norm", "grad_cos", "response_len", "truncated",
              "rollouts", "seconds"}
    for row in first:
        if row["kind"] == "step":
            assert needed <= set(row)
        if row["kind"] == "eval":
            assert row["split"] in splits and sum(row["outcomes"].values()) == row["n"] == 8
            assert 0 <= row["low"] <= row["success"] <= row["high"] <= 1
    assert {"seed", "lr", "torch", "transformers", "device", "commit"} <= set(first[0])
    last = [row for row in first if row["kind"] == "step"][-1]
    # 6 mixed steps of 8 x 4, and meta-gradients of 8 x 4 at mixed steps 2, 4 and 6 (every 2).
    assert last["rollouts"] == 6 * 32 + 3 * 32


@pytest.mark.parametrize("flags", [["--advantage", "group"], ["--ppo-epochs", "2", "--trace", "0.9"]])
def test_killed_run_goes_on_bit_for_bit(tiny, tmp_path, flags):
    tiny_run(tiny, tmp_path / "unbroken", *flags)
    command = [sys.executable, amft.__file__, "--task", "gp", "--smoke", "--model", tiny, "--out",
               str(tmp_path / "killed"), "--device", "cpu", "--eval-n", "8", "--max-new-tokens", "34", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = tmp_path / "killed" / "metrics.jsonl", time.time() + 120
    while time.time() < deadline and not (log.exists() and '"step": 5,' in log.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "final").exists()
    amft.main(["--resume", str(tmp_path / "killed")])
    assert without_clock(read(tmp_path / "killed")) == without_clock(read(tmp_path / "unbroken"))
    assert torch.equal(final_policy(tmp_path / "killed"), final_policy(tmp_path / "unbroken"))


def test_eval_only_repeats_the_runs_last_evaluation(tiny, tmp_path, capsys):
    rows = tiny_run(tiny, tmp_path / "run")
    capsys.readouterr()
    amft.main(["--eval-only", "--model", str(tmp_path / "run" / "final"), "--eval-n", "8", "--device", "cpu"])
    printed = capsys.readouterr().out
    for row in [row for row in rows if row["kind"] == "eval"][-len(tasks.GeneralPoints.splits):]:
        assert re.search(rf"^{row['split']} +{100 * row['success']:.1f} \[", printed, re.M)


def fails(argv, capsys, code=2):
    capsys.readouterr()
    with pytest.raises(SystemExit) as info:
        amft.main(argv)
    error = capsys.readouterr().err.strip()
    assert info.value.code == code
    return error


def test_bad_input_is_one_clear_line_and_exit_code_2(tiny, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "metrics.jsonl").write_text("precious")
    (tmp_path / "empty").mkdir()
    shutil.copytree(tiny, tmp_path / "corrupt")
    (tmp_path / "corrupt" / "model.safetensors").write_bytes(b"x" * 100)
    foreign = tmp_path / "foreign"
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(foreign)
    make = importlib.import_module("make")
    words = make.PreTrainedTokenizerFast(tokenizer_object=make.Tokenizer(make.models.WordLevel(
        {"<unk>": 0, "Make": 1}, unk_token="<unk>")), unk_token="<unk>", eos_token="<unk>")
    words.save_pretrained(foreign)
    for argv, says in (
            (["--tsk", "gp"], "--tsk"), (["--task", "go"], "'go'"), (["--steps", "-1"], "--steps -1"),
            (["--samples", "1"], "--samples 1"), (["--mu", "1.5"], "--mu 1.5"), (["--mu", "nan"], "--mu nan"),
            (["--mu", "1"], "--mu-max"), (["--lr", "0"], "--lr 0"), (["--steps", "many"], "'many'"),
            (["--out", str(tmp_path / "taken")], "already holds a run"),
            (["--model", str(tmp_path / "empty")], "not a checkpoint"),
            (["--model", str(tmp_path / "corrupt")], "not a checkpoint"), (["--model", "no/such"], "not a checkpoint"),
            (["--model", str(foreign)], "tokenizer cannot encode"), (["--max-new-tokens", "9"], "--max-new-tokens 9"),
            (["--device", "quantum"], "--device quantum"), (["--demos", "3"], "--demos 3"),
            (["--resume", str(tmp_path / "empty")], "no run there"), (["--plot", str(tmp_path)], "no run there"),
            (["--resume", str(tmp_path), "--lr", "1"], "--resume goes alone")):
        error = fails([*argv, "--out", str(tmp_path / "unused")] if "--out" not in argv and "--resume" not in argv
                      else argv, capsys)
        assert len(error.splitlines()) == 1 and error.startswith("amft.py: ") and says in error, error
    assert (tmp_path / "taken" / "metrics.jsonl").read_text() == "precious"
    assert not (tmp_path / "unused").exists()


def test_non_finite_loss_stops_the_run_and_keeps_the_log(tiny, tmp_path, capsys, monkeypatch):
    true, calls = amft.sft_loss, itertools.count()
    monkeypatch.setattr(amft, "sft_loss", lambda *a, **k: true(*a, **k) * (math.nan if next(calls) == 4 else 1))
    error = fails(["--smoke", "--model", tiny, "--out", str(tmp_path / "run"), "--device", "cpu", "--eval-n", "8"],
                  capsys, code=1)
    assert "step 5" in error and "sft_loss" in error
    assert [row["step"] for row in read(tmp_path / "run") if row["kind"] == "step"] == [1, 2, 3, 4]
    amft.main(["--resume", str(tmp_path / "run")])  # nothing was lost
    assert read(tmp_path / "run")[-1]["kind"] == "final"


def test_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit) as info:
        amft.main(["--help"])
    text = capsys.readouterr().out
    assert info.value.code == 0
    for field in amft.dataclasses.fields(amft.Config):
        assert "--" + field.name.replace("_", "-") in text and field.metadata["help"][:20] in " ".join(text.split())


def test_plot(tiny, tmp_path, monkeypatch, capsys):
    tiny_run(tiny, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in fails(["--plot", str(tmp_path / "run")], capsys)
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    amft.main(["--plot", str(tmp_path / "run")])
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000


def test_amft_learns(tmp_path, monkeypatch):
    """From the shipped base, on a world of 12 training multisets: greedy success goes from under a half to over it."""
    few = random.Random(SEED).sample([m for m, role in tasks.ROLES.items() if role == "train" and max(m) <= 10
                                      and tasks.solve(m)], 12)
    monkeypatch.setattr(tasks, "ROLES", {m: role if role != "train" or m in few else "unused"
                                         for m, role in tasks.ROLES.items()})
    monkeypatch.setattr(tasks.GeneralPoints, "splits", {"id": "these 12"})
    amft.main(["--task", "gp", "--warmup", "25", "--steps", "5", "--prompts", "8", "--meta-prompts", "8", "--lr",
               "1e-3", "--eval-n", "200", "--demos", "1000", "--out", str(tmp_path / "run"), "--device", "cpu"])
    success = [row["success"] for row in read(tmp_path / "run") if row["kind"] == "eval"]
    assert success[0] < 0.5 and success[-1] > max(0.5, success[0] + 0.2), success


def test_interval_covers_when_deals_come_in_clusters():
    """60 multisets, each solved or missed as a whole: the interval must hold the true rate about 95% of the time, and
    without clusters it is Wilson's."""
    rng, covered, narrow = random.Random(SEED), 0, 0
    for _ in range(400):
        solved = [rng.random() < 0.4 for _ in range(60)]
        units = [rng.randrange(60) for _ in range(1000)]
        low, high = amft.interval([int(solved[u]) for u in units], units)
        covered, narrow = covered + (low <= 0.4 <= high), narrow + (high - low < 0.1)
    assert 0.90 < covered / 400 < 0.99 and narrow == 0
    low, high = amft.interval([1] * 30 + [0] * 70, range(100))
    assert (low, high) == pytest.approx((0.2189, 0.3958), abs=1e-3)  # Wilson 1927, 30 of 100
    low, high = amft.interval([0] * 50, range(50))
    assert low == 0 and 0.06 < high < 0.08


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
            assert tasks.grade(answer(formula + "=24"), numbers) == "correct"
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
                outcome = tasks.grade(answer(formula), numbers)
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
    (answer("(1+2+3)//4"), "illegal_formula"), (answer("1.0+2+3*4"), "illegal_formula"), (answer("1 2+3*4"), "illegal_formula"),
    (answer("1+2+3*4\n"), "illegal_formula"), (answer("9" * 50), "illegal_formula"), (answer("(" * 59), "illegal_formula"),
    (answer("1+" * 40000 + "1"), "no_answer"), (answer("(" * 100_000), "no_answer"), ("[" * 100_000, "no_answer"),
    ("[" * 999, "no_answer"), ("9" * 999, "no_answer"), ("", "no_answer"), ("null", "no_answer"), ("[1]", "no_answer"),
    ("{}", "no_answer"), ('{"formula": 24}', "no_answer"), ('{"formula": ["24"]}', "no_answer"), ("NaN", "no_answer"),
    ('{"formula": "(1+2+3)*4", "formula": "(1+2+3)*4"}', "no_answer"), (answer("(1+2+3)*4") + "x", "no_answer"),
    (answer("(1+2+3)*4", cards=[], number="rubbish"), "correct"),
])
def test_grader_on_hostile_text(response, outcome):
    start = time.perf_counter()
    assert tasks.grade(response, (4, 3, 2, 1)) == outcome
    assert time.perf_counter() - start < 0.05


def test_digits_that_were_not_dealt_cannot_be_glued():
    assert tasks.grade(answer("10+10+4*1"), (10, 10, 4, 1)) == "correct"
    assert tasks.grade(answer("1 0+10+4*1"), (10, 10, 4, 1)) == "illegal_formula"
    assert tasks.grade(answer("11+13+1-1"), (1, 1, 1, 1)) == "illegal_number"


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
        prompt, response = make.example(rng)
        numbers, target = json.loads(response)["number"], int(re.search(r"Make (\d+)\.\n$", prompt)[1])
        assert tasks.grade(response, numbers, target) == "correct"
        held[tuple(sorted(numbers)) in evaluated, target == 24] += 1
    assert held[True, True] == 0 and held[False, True] > 100 and held[True, False] > 1000
    text = prompt + response
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_base_recipe_runs_and_makes_the_shipped_tokenizer(tmp_path, tokenizer, capsys):
    make = importlib.import_module("make")
    make.main(["--steps", "3", "--batch-size", "8", "--device", "cpu", "--out", str(tmp_path)])
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert model.config.to_dict()["hidden_size"] == LlamaConfig.from_pretrained(HERE / "base").hidden_size
    assert sum(f.stat().st_size for f in (HERE / "base").iterdir() if f.is_file()) < 10 * 2 ** 20


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", __file__]))
