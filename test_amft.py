"""Tests of amft.py and tasks.py, each against an independent reference: a slow loop, an
enumeration, a float64 finite difference, torch's own optimiser, transformers' own `generate`;
never against a copy of the code.

    python -m pytest -q test_amft.py
    AMFT_SLOW=1 python -m pytest -q test_amft.py     # and what takes longer

AMFT_MODULE names the module under test (default amft), so that this file grades a student's
version; AMFT_TEST_SEED (default 0) draws the inputs, so that a grader can draw others.

From equation to test:
    (1) J_RL
        test_losses_against_slow_loops
        test_an_update_with_old_samples_is_the_clipped_one
        test_sampling_frequencies_and_truncation: y ~ pi_theta
        test_replies_are_those_of_generate, test_every_turn_is_that_of_generate
      its advantages
        test_group_advantages_by_hand, test_gae_against_its_definition
        test_graded_rewards_are_the_tasks_points, test_equal_rewards_move_nothing
    (2) L_SFT
        test_losses_against_slow_loops, test_the_loss_of_a_demonstration
        test_log_probabilities_do_not_depend_on_the_company
        test_sft_is_policy_gradient_with_the_implicit_reward: section 3.2
    (3) L(theta; mu)
        test_gradients_do_not_depend_on_micro_batches_and_silent_groups_add_nothing
        test_step_equals_torch
        test_a_step_of_every_method_is_the_gradient_of_its_loss
        test_at_mu_one_rl_cannot_matter_and_at_mu_zero_sft_cannot
        test_the_step_and_its_derivative_hang_together_in_training
    (4) U(theta')
        test_meta_gradient_is_exactly_unbiased, test_meta_gradient_against_a_slow_loop
        test_the_standard_error_of_the_meta_gradient_covers
      of a step's own prompts
        test_own_meta_gradient_is_the_slope_of_the_samples_utility
        test_own_meta_gradient_is_unbiased_whatever_the_value_function_says
    (5) dU/dmu
        test_sensitivity_is_the_finite_difference_of_exact_utility
        test_sensitivity_with_a_trace_is_the_derivative_in_a_mu_that_was_larger_all_along
    (6) mu
        test_controller_on_hand_computed_values, test_mu_follows_the_logged_meta_gradients
        test_belief_is_bayes_theorem, test_mu_rests_where_nothing_is_known_and_goes_where_...
        test_paper_controller_is_equation_6_to_the_letter
    Algorithm 1
        test_the_budget_and_batches_without_signal
        test_same_seed_same_log, test_every_key_of_the_log_is_there
        test_an_interrupted_run_goes_on_bit_for_bit
"""

import copy
import importlib
import inspect
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "base")]
amft = importlib.import_module(os.environ.get("AMFT_MODULE", "amft"))
tasks = importlib.import_module("tasks")
arguments = importlib.import_module("harness.arguments")
running = importlib.import_module("harness.run")
loading = importlib.import_module("harness.loading")
SEED = int(os.environ.get("AMFT_TEST_SEED", "0"))
slow = pytest.mark.skipif(
    not os.environ.get("AMFT_SLOW"), reason="takes longer: AMFT_SLOW=1 runs it")


GP_DEFAULTS = dict(tasks.GeneralPoints.defaults)


@pytest.fixture(autouse=True)
def plain_defaults(monkeypatch):
    """What is tested are Config's own defaults, whatever General Points sets differently."""
    monkeypatch.setattr(tasks.GeneralPoints, "defaults", {})


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """Every test draws from the same seed, and leaves torch's precision as it was."""
    torch.manual_seed(SEED)
    monkeypatch.setattr(sys, "argv", ["amft.py"])
    yield
    torch.set_default_dtype(torch.float32)


# --- policies -------------------------------------------------------------------------------------


def roughened(model):
    """Weights far enough from transformers' initial ones that the policy is not nearly uniform."""
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def toy_model():
    """A policy of the world below; from here on the test is in float64.

    GPT-2, because Llama takes its norms and softmax in float32 whatever its weights are: too coarse
    for finite differences."""
    torch.set_default_dtype(torch.float64)
    config = GPT2Config(
        vocab_size=V,
        n_positions=8,
        n_embd=12,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager")
    return roughened(GPT2LMHeadModel(config).double())


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer of the shipped policies."""
    return AutoTokenizer.from_pretrained(HERE / "base")


@pytest.fixture(scope="module")
def base():
    """(model, tokenizer): the policy that is shipped."""
    return amft.load_policy(configured(), tasks.GeneralPoints(), amft)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    """A checkpoint folder with the base's tokenizer and a random policy, for end-to-end tests."""
    torch.manual_seed(SEED)
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    roughened(LlamaForCausalLM(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# --- runs -----------------------------------------------------------------------------------------


def configured(**settings):
    return amft.Config(**{"device": "cpu", **settings})


def tiny_argv(model, out, *flags):
    return ["--task", "gp", "--smoke", "--model", model, "--out", str(out), "--device", "cpu",
            "--eval-n", "8", "--max-new-tokens", "34", *flags]


def tiny_run(model, out, *flags, **how):
    """A run of seconds; returns the rows of its log. how: more arguments of main()."""
    amft.main(tiny_argv(model, out, *flags), **how)
    return read(out)


def read(out, kind=None):
    """The rows of a run's log, or those of one kind."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if kind in (None, row["kind"])]


@pytest.fixture
def unevaluated(monkeypatch):
    """Runs spend their time on steps."""
    measures = dict(n=1, samples=1, success=0.0, low=0.0, high=1.0, any=0.0, hits=[0], outcomes={})

    def evaluate(model, tokenizer, task, config, split, temperature, samples):
        return dict(measures, split=split)
    monkeypatch.setattr(amft, "evaluate", evaluate)


def graded(monkeypatch, grade):
    """General Points pays what grade(response) says."""
    monkeypatch.setattr(tasks.Deal, "grade", lambda self, response: grade(response))


@pytest.fixture
def rewarded(monkeypatch):
    """Rewards that a random policy does get, so that its RL gradient is not zero."""
    graded(monkeypatch, lambda response: "correct" if len(response) % 2 else "no_answer")


def spied(monkeypatch, name):
    """Every call of a function of amft, as {parameter: argument}; "returns" is its result."""
    calls = []
    true = getattr(amft, name)
    signature = inspect.signature(true)

    def spy(*args, **kwargs):
        said = signature.bind(*args, **kwargs)
        said.apply_defaults()
        call = {**said.arguments, **said.arguments.get("how", {})}
        call["returns"] = true(*args, **kwargs)
        calls.append(call)
        return call["returns"]
    monkeypatch.setattr(amft, name, spy)
    return calls


def watched(name):
    """(methods for main(), updates): the method, which keeps all that each of its updates is made
    of: the Step's fields; theta and adam before it; first; before and after: the method's state;
    choices: how often mu has been chosen; val: what the controller sampled."""
    updates = []

    class Watched(amft.METHODS[name]):
        choices = 0
        val = None

        def choose_mu(self, step):
            self.choices += 1
            self.val = None
            return super().choose_mu(step)

        def val_advantages(self, step, val):
            self.val = val

        def before_update(self, step, theta, adam, first):
            update = SimpleNamespace(**vars(step), theta=theta, adam=adam, first=first)
            update.before = self.state_dict()
            super().before_update(step, theta, adam, first)
            update.after = self.state_dict()
            update.choices = self.choices
            update.val = self.val
            updates.append(update)
    return {**amft.METHODS, name: Watched}, updates


# --- a world small enough to enumerate: 5 tokens, responses of exactly 2 tokens, 3 prompts --------

V, T = 5, 2
PROMPTS = torch.tensor([[1, 2, 3], [4, 0, 2], [3, 3, 1]])
ALL = torch.tensor(list(itertools.product(range(V), repeat=T)))  # (25, 2): every response


def batch_of(prompts, responses, mask=None):
    ids = torch.cat([prompts, responses], 1)
    if mask is None:
        mask = torch.ones(responses.shape)
    return amft.Batch(ids, torch.ones_like(ids), mask, [[]] * len(ids))


def sequences(prompt):
    """Batch of a prompt with every response."""
    return batch_of(prompt.expand(len(ALL), -1), ALL)


def toy_batch(which, G=1, mask=None):
    """Batch of G random responses to each of PROMPTS[which]."""
    prompts = PROMPTS[which].repeat_interleave(G, 0)
    responses = torch.randint(V, (len(prompts), T))
    return batch_of(prompts, responses, mask)


def mask_of(lengths, width=T):
    """The mask of responses of these lengths, (B, width)."""
    mask = torch.zeros(len(lengths), width)
    for row, length in zip(mask, lengths):
        row[:length] = 1.0
    return mask


def digits(*rows):
    """A matrix of one-digit numbers, a text for each row."""
    return torch.tensor([list(map(int, row)) for row in rows])


def rollouts_of(batch, success, rewards=None):
    if rewards is None:
        rewards = torch.zeros_like(batch.response_mask)
    return amft.Rollouts([], batch, success, rewards, 0.0, 0.0)


def exact_logps(model, prompt, temperature=1.0):
    """log pi(y|x) of every response (25,), from the chain rule and a plain forward pass."""
    first = model(prompt.unsqueeze(0)).logits[0, -1] / temperature
    longer = torch.cat([prompt.expand(V, -1), torch.arange(V).unsqueeze(1)], 1)
    second = model(longer).logits[:, -1] / temperature
    return (first.log_softmax(-1).unsqueeze(1) + second.log_softmax(-1)).reshape(-1)


def exact_utility(model, reward, temperature=1.0):
    """U(theta) = E[R] by enumeration; reward (3, 25)."""
    total = 0.0
    for prompt, r in zip(PROMPTS, reward):
        total = total + (exact_logps(model, prompt, temperature).exp() * r).sum()
    return total / len(PROMPTS)


def toy_rewards(generator):
    return (torch.rand(3, len(ALL), generator=generator) < 0.3).double()


def toy(steps_before):
    """(model, reward, g_rl, g_sft, Adam state after some steps) in float64."""
    generator = torch.Generator().manual_seed(SEED)
    model = toy_model()
    reward = toy_rewards(generator)
    theta = amft.flatten(model)
    state = fresh(theta)
    for _ in range(steps_before):
        noise = torch.randn(len(theta), generator=generator, dtype=torch.float64)
        theta, state = amft.adamw_step(theta, noise, state, lr=1e-3, max_norm=1e9)
    put(model, theta)
    g_rl = -flat_grad(exact_utility(model, toy_rewards(generator)), model)
    demo = torch.randint(len(ALL), (3,), generator=generator)
    demo_logps = [exact_logps(model, prompt)[y] for prompt, y in zip(PROMPTS, demo)]
    g_sft = -flat_grad(sum(demo_logps), model) / 3
    return model, reward, g_rl, g_sft, state


# --- references -----------------------------------------------------------------------------------


def fresh(theta):
    """Adam's state before the first step."""
    return amft.AdamState(torch.zeros_like(theta), torch.zeros_like(theta), 0)


def put(model, theta):
    """The model with the weights theta (N,), a copy."""
    vector_to_parameters(theta.detach().clone(), model.parameters())
    return model


def flat_weights(model):
    return parameters_to_vector(model.parameters()).detach().clone()


def flat_grad(loss, model, **how):
    weights = list(model.parameters())
    grads = torch.autograd.grad(loss, weights, materialize_grads=True, **how)
    return torch.cat([grad.reshape(-1) for grad in grads])


def slow_logps(model, batch, row, temperature=1.0):
    """log pi of a row's own tokens (n,), by a plain forward pass of it: no padding, no holes."""
    real = batch.attention_mask[row].bool()
    ids = batch.input_ids[row][real]
    learned = torch.zeros(len(real), dtype=torch.bool)
    learned[-batch.response_mask.shape[1]:] = batch.response_mask[row].bool()
    logps = (model(ids.unsqueeze(0)).logits[0] / temperature).log_softmax(-1)
    of_ids = logps[:-1].gather(-1, ids[1:].unsqueeze(-1)).squeeze(-1)
    return of_ids[learned[real][1:]]


def slow_totals(model, batch, temperature=1.0):
    """log pi(y|x) of each row, (B,)."""
    rows = range(len(batch.input_ids))
    return torch.stack([slow_logps(model, batch, row, temperature).sum() for row in rows])


def mean_logp(model, batch):
    """Of a batch's own tokens, row by row."""
    rows = [slow_logps(model, batch, row) for row in range(len(batch.input_ids))]
    return torch.cat(rows).mean()


def others_mean(rewards):
    """The mean reward of a prompt's other samples, of each sample: (P, G)."""
    means = torch.zeros_like(rewards)
    for p, row in enumerate(rewards):
        for g in range(len(row)):
            means[p, g] = torch.cat([row[:g], row[g + 1:]]).mean()
    return means


def torch_step(model, grad, state, lr, max_norm, weight_decay=0.0):
    """The same step by torch: clip_grad_norm_ and AdamW on a copy of the model."""
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    parts = (vector.split(sizes) for vector in (state.m, state.v, grad))
    for p, m, v, g in zip(parameters, *parts):
        p.grad = g.view_as(p).clone()
        optimizer.state[p] = dict(
            step=torch.tensor(float(state.step)),
            exp_avg=m.view_as(p).clone(),
            exp_avg_sq=v.view_as(p).clone())
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    return model


def central_difference(function, x, h):
    return (function(x + h) - function(x - h)) / (2 * h)


def z_score(samples, truth):
    """By how many of its standard errors the samples' mean lies above the truth."""
    return (np.mean(samples) - truth) / (np.std(samples, ddof=1) / math.sqrt(len(samples)))


def close(actual, expected, rtol):
    """Relative to the whole vector: no entry is held to an absolute size."""
    assert expected.norm() > 0
    error = (actual - expected).norm() / expected.norm()
    assert error <= rtol, error.item()


# --- Eqs. 1-2: losses, advantages and their gradients ---------------------------------------------


def nll(logps, rows):
    """Weights of Eq. 2 as it stands: every token of a demonstration counts alike."""
    return torch.ones_like(logps)


def random_tokens(B=6, T=7):
    """(mask with holes, where the task speaks between two responses; three random (B, T))."""
    mask = (torch.rand(B, T) < 0.6).double()
    mask[:, 0] = 1.0
    return mask, [torch.randn(B, T, dtype=torch.float64) for _ in range(3)]


def same_with_gradient(actual, expected, x):
    torch.testing.assert_close(actual, expected)
    slope = torch.autograd.grad(actual, x, retain_graph=True)[0]
    expected_slope = torch.autograd.grad(expected, x, retain_graph=True)[0]
    torch.testing.assert_close(slope, expected_slope)


def test_losses_against_slow_loops():
    """A wrong sign, mask, divisor or side of the clip, in a loss or in its gradient."""
    mask, (logps, old, advantages) = random_tokens()
    logps.requires_grad_()
    likelihood = 0.0
    surrogate = 0.0
    count = 0
    for b, t in mask.nonzero().tolist():
        count += 1
        ratio = math.e ** (logps[b, t] - old[b, t])
        clipped = ratio
        if ratio < 0.8:
            clipped = 0.8
        if ratio > 1.2:
            clipped = 1.2
        advantage = advantages[b, t]
        likelihood = likelihood + logps[b, t]
        surrogate = surrogate - min(ratio * advantage, clipped * advantage)
    same_with_gradient(amft.sft_loss(logps, mask), -likelihood / count, logps)
    same_with_gradient(amft.sft_loss(logps, mask, n_tokens=100), -likelihood / 100, logps)
    ppo = partial(amft.ppo_loss, logps, old, advantages, mask, 0.2)
    same_with_gradient(ppo(), surrogate / count, logps)
    same_with_gradient(ppo(n_tokens=100), surrogate / 100, logps)
    implicit = amft.implicit_reward(logps, old, mask, beta=0.3)
    for b in range(len(mask)):
        own = mask[b].nonzero().squeeze(1)
        expected = 0.3 * sum((logps - old)[b, t].item() for t in own)
        assert implicit[b].item() == pytest.approx(expected)


def test_gae_against_its_definition():
    """A_t = sum_k (gamma lam)^k delta_{t+k} over the policy's own tokens, summed directly."""
    mask, (rewards, values, _) = random_tokens()
    gamma, lam = 0.9, 0.8
    advantages, returns = amft.gae(rewards * mask, values * mask, mask, gamma, lam)
    assert (advantages[mask == 0] == 0).all()
    assert (returns[mask == 0] == 0).all()
    for b, own in enumerate(mask.bool()):
        r = rewards[b][own].tolist()
        v = values[b][own].tolist()
        delta = [now + gamma * later - here for now, here, later in zip(r, v, [*v[1:], 0.0])]
        expected = np.zeros(len(r))
        for i in range(len(r)):
            for k in range(i, len(r)):
                expected[i] += (gamma * lam) ** (k - i) * delta[k]
        np.testing.assert_allclose(advantages[b][own], expected, atol=1e-12)
        np.testing.assert_allclose(returns[b][own], expected + v, atol=1e-12)


def test_group_advantages_by_hand():
    """A baseline that holds the sample itself, or a scale of each prompt's own."""
    rewards = torch.tensor([
        [1.0, 0, 0, 0],
        [1, 1, 1, 1],
        [0, 0, 0, 0],
        [5, -1, -3, -1]], dtype=torch.float64)
    actual, scale = amft.group_advantages(rewards)
    expected = rewards - others_mean(rewards)
    torch.testing.assert_close(actual * scale, expected)
    assert scale == pytest.approx(np.std(expected.numpy()))  # one for the batch, of the population
    first = actual[0] * scale
    assert first.tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    flat, scale = amft.group_advantages(torch.ones(3, 4))
    assert (flat == 0).all() and scale > 0


def advantages_to_go(mask, paid, value):
    """(returns with lambda and gamma 1; advantages over a constant value, less their mean)."""
    togo = paid.flip(1).cumsum(1).flip(1) * mask
    expected = (togo - value) * mask
    mean = expected.sum() / mask.sum()
    return togo, (expected - mean) * mask


def constant_phi(model, value):
    """A value function that says the same of every token, but can learn."""
    phi = amft.value_function(model)
    phi.layers[-1].weight.data.zero_()
    phi.layers[-1].bias.data.fill_(value)
    return phi


@pytest.mark.parametrize("reward", ["graded", "binary"])
@pytest.mark.parametrize("advantage", ["group", "gae"])
def test_graded_rewards_are_the_tasks_points(advantage, reward):
    """Points paid elsewhere than they were made; a phi that learns anything but the returns."""
    # graded pays a response's points where it ends, binary 1 at the end of what succeeded.
    model = toy_model()
    lengths = torch.tensor([2, 1] * 4)
    mask = mask_of(lengths)
    points = torch.randn(8, T) * mask
    success = digits("1001", "0100").double()
    batch = toy_batch([0, 1], 4, mask)
    rollouts = rollouts_of(batch, success, points)
    config = configured(reward=reward, advantage=advantage)
    paid = points
    if reward == "binary":
        paid = torch.zeros_like(mask)
        paid[range(8), lengths - 1] = success.flatten()
    if advantage == "group":
        actual = amft.advantages_of(model, None, rollouts, config)
        totals = paid.sum(1).view(2, 4)
        expected = (totals - others_mean(totals)).reshape(-1, 1) * mask
        torch.testing.assert_close(actual.values * actual.scale, expected)
        return
    phi = constant_phi(model, 0.25)
    learner = copy.deepcopy(phi.layers)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    actual = amft.advantages_of(model, phi, rollouts, config)
    togo, expected = advantages_to_go(mask, paid, 0.25)
    torch.testing.assert_close(actual.values * actual.scale, expected)
    own = actual.values[mask.bool()]
    assert own.std(correction=0).item() == pytest.approx(1.0, rel=1e-3)
    with torch.no_grad():  # what the policy's head reads where it predicts a response's tokens
        states = model.transformer(batch.input_ids).last_hidden_state[:, 2:-1]
    errors = (learner(states).squeeze(-1) - togo) ** 2 * mask
    (0.5 * errors.sum() / mask.sum()).backward()
    optimizer.step()
    for moved, expected in zip(phi.parameters(), learner.parameters(), strict=True):
        torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("columns", [5, 12])
def test_phi_reads_what_the_policys_head_reads(columns):
    """Another layer's states, or another column's than the one that predicts the token."""
    model = toy_model()
    batch = toy_batch([0, 1, 2], 2)
    logits, states = amft.response_outputs(model, batch, hidden=True)
    torch.testing.assert_close(model.lm_head(states), logits)

    class Phi:
        def __call__(self, states):
            self.states = states
            return states.sum(-1)

        def learn(self, values, returns, mask):
            pass
    phi = Phi()
    rollouts = rollouts_of(batch, digits("10", "01", "11").double())
    amft.advantages_of(model, phi, rollouts, configured(micro_tokens=columns))
    logps = model.lm_head(phi.states).log_softmax(-1)
    for b, ids in enumerate(batch.responses):
        said = logps[b, range(T), ids]
        torch.testing.assert_close(said, slow_logps(model, batch, b))


@pytest.mark.parametrize("reward", ["graded", "binary"])
@pytest.mark.parametrize("advantage", ["group", "gae"])
@pytest.mark.parametrize("total", [0.0, 1.0])
def test_equal_rewards_move_nothing(advantage, reward, total):
    """Phi's error alone, blown up to a spread of 1: theta and mu would move on nothing."""
    # Responses of different length, points in different places, one total.
    model, phi = toy_model(), None
    points = torch.zeros(8, T)
    points[:, 0] = total
    points[1, 0] -= 0.5
    points[1, 1] += 0.5
    batch = toy_batch([0, 1], 4, mask_of([1, 2] * 4))
    rollouts = rollouts_of(batch, torch.full((2, 4), total), points)
    config = configured(advantage=advantage, reward=reward)
    if advantage == "gae":
        phi = roughened(amft.value_function(model))
        before = flat_weights(phi)
    advantages = amft.advantages_of(model, phi, rollouts, config)
    assert (advantages.values == 0).all()
    assert advantages.scale == 1
    if phi:
        assert not torch.equal(flat_weights(phi), before)  # it goes on learning
    g_rl, _, loss = amft.rl_gradient(model, batch, advantages, config)
    assert (g_rl == 0).all()
    assert loss == 0
    tangent = torch.randn_like(g_rl)
    own = amft.own_meta_gradient(g_rl, tangent, batch, advantages.scale)
    val = amft.meta_gradient(model, tangent, rollouts, config)
    moved = amft.update_mu(0.4, 1.0, 1.0, [own, val], (0.0, 3.0), config)
    assert moved == (0.5, (0.0, 3.0), (0.0, 0.0))
    # One sample that differs is a signal.
    rollouts.success[0, 0] = 1 - total
    rollouts.rewards[0, 0] = 1 - total
    advantages = amft.advantages_of(model, phi, rollouts, config)
    assert amft.rl_gradient(model, batch, advantages, config)[0].norm() > 0


def test_an_update_with_old_samples_is_the_clipped_one():
    """The RL gradient at a second update: PPO's, against the policy that sampled."""
    model, B, tau = toy_model(), 12, 0.7
    batch = toy_batch([0, 1, 2], 4)
    advantages = amft.Advantages(torch.randn(B, T), 1.0)
    with torch.no_grad():
        old = amft.logps_of(model, batch, tau) + 0.3 * torch.randn(B, T)
    total = 0.0
    for b in range(B):
        ratios = (slow_logps(model, batch, b, tau) - old[b]).exp()
        for ratio, a in zip(ratios, advantages.values[b]):
            clipped = ratio.clamp(0.8, 1.2)
            total = total - min(ratio * a, clipped * a) / (B * T)
    expected = flat_grad(total, model)
    logps = amft.logps_of(model, batch, tau).detach()
    for size in (12, 5):
        config = configured(temperature=tau, micro_tokens=size * 5)
        grad, seen, losses = amft.rl_gradient(model, batch, advantages, config, old)
        close(grad, expected, 1e-4)
        assert losses == pytest.approx(total.item(), rel=1e-3, abs=1e-5)
        np.testing.assert_allclose(seen, logps, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("imitation", ["nll", "rectified"])
def test_the_loss_of_a_demonstration(imitation):
    """Rectified: each token's -log p times its own p, a constant, over all tokens of the batch."""
    model, batch = toy_model(), sequences(PROMPTS[0]).rows(torch.arange(0, 25, 3))
    mask = (torch.rand(batch.response_mask.shape) < 0.7).double()
    mask[:, 0] = 1.0
    batch = batch._replace(response_mask=mask)
    method = amft.SFT(configured(imitation=imitation))
    total = 0.0
    for b in range(len(mask)):
        for logp in slow_logps(model, batch, b):
            weight = logp.exp().item() if imitation == "rectified" else 1.0
            total = total - weight * logp
    expected = flat_grad(total / mask.sum(), model)
    for size in (9, 2):
        config = configured(micro_tokens=size * batch.input_ids.shape[1])
        weights = partial(method.token_weights, None)
        grad, logps, losses = amft.sft_gradient(model, batch, config, weights)
        close(grad, expected, 1e-4)
        mean = (logps * mask).sum() / mask.sum()
        assert losses == pytest.approx(-mean.item(), rel=1e-4)


def test_sft_is_policy_gradient_with_the_implicit_reward():
    """A loss that is not what section 3.2 makes of it, by enumeration."""
    # grad L_SFT = -E_{y~pi}[1[y = y*] / pi(y|x) grad log pi(y|x)], exact-match RL is the same
    # without the 1/pi, and mu L_SFT = mu KL(pi_demo || pi) + mu H(pi_demo).
    model, prompt, best = toy_model(), PROMPTS[0], 7
    batch = sequences(prompt).rows(torch.tensor([best]))
    loss = amft.sft_loss(amft.logps_of(model, batch), batch.response_mask, n_tokens=1)
    g_sft = flat_grad(loss, model)
    policy_gradient = exact_match = 0.0
    for y in range(len(ALL)):
        logp = exact_logps(model, prompt)[y]
        pi = logp.exp().item()
        hit = float(y == best)
        score = flat_grad(logp, model)
        policy_gradient = policy_gradient + pi * (hit / pi) * score
        exact_match = exact_match + pi * hit * score
    close(g_sft, -policy_gradient, 1e-5)
    close(-g_sft * exact_logps(model, prompt)[best].exp(), exact_match, 1e-5)
    # PPO on every response at its probability, advantage 1[y = y*], is exact-match RL.
    everything = sequences(prompt)
    mask = everything.response_mask
    logps = amft.logps_of(model, everything)
    hits = (torch.arange(len(ALL)) == best).double().unsqueeze(1) * mask
    weighted = hits * logps.sum(1, keepdim=True).detach().exp()
    loss = amft.ppo_loss(logps, logps.detach(), weighted, mask, n_tokens=1)
    close(flat_grad(loss, model), -exact_match, 1e-5)
    # Demonstrations that are samples of pi_demo: the expected loss is KL plus a constant.
    demo = torch.rand(len(ALL), dtype=torch.float64).softmax(0)
    one = torch.ones(1, T)
    losses = torch.stack([amft.sft_loss(row.unsqueeze(0), one, n_tokens=1) for row in logps])
    kl = (demo * (demo.log() - exact_logps(model, prompt))).sum()
    entropy = -(demo * demo.log()).sum()
    torch.testing.assert_close((demo * losses).sum(), kl + entropy, rtol=1e-5, atol=1e-6)


def counted_rows(model):
    """(how many sequences each forward pass from now on has; a handle whose remove() ends it)."""
    seen = []

    def count(_, args, kwargs):
        seen.append(len(kwargs["input_ids"]))
    return seen, model.register_forward_pre_hook(count, with_kwargs=True)


def test_gradients_do_not_depend_on_micro_batches_and_silent_groups_add_nothing(base, tokenizer):
    """A divisor of each micro-batch's own, rows lost or counted twice, passes for silent rows."""
    model, rng, task = base[0], random.Random(SEED), tasks.GeneralPoints()
    episodes = [task.sample("train", rng) for _ in range(6)]
    config = configured(samples=4, advantage="group")
    success = digits("1001", "0000", "1111", "0100", "0000", "1110").float()
    rollouts = amft.rollout(model, tokenizer, episodes, 4, 40)
    rollouts = rollouts._replace(success=success)
    batch = rollouts.batch
    mask = batch.response_mask
    advantages = amft.advantages_of(model, None, rollouts, config)
    logps = amft.logps_of(model, batch)  # every row, in one pass, by the textbook formula
    weights = success - others_mean(success)
    weights = weights / weights.std(correction=0)
    loss = -(weights.reshape(-1, 1) * logps * mask).sum()
    expected = flat_grad(loss / mask.sum(), model)
    demos = amft.encode_demos(model, tokenizer, episodes)
    expected_sft = flat_grad(-mean_logp(model, demos), model)
    passes, hook = counted_rows(model)
    for size in (24, 5, 1):
        config.micro_tokens = size * batch.input_ids.shape[1] + 1
        passes.clear()
        close(amft.rl_gradient(model, batch, advantages, config)[0], expected, 1e-3)
        assert sum(passes) == 12  # the three silent groups cost nothing
        assert max(passes) == min(size, 12)
        # A sequence that is longer than micro_tokens goes alone.
        config.micro_tokens = size * demos.input_ids.shape[1] - (size == 1)
        close(amft.sft_gradient(model, demos, config, nll)[0], expected_sft, 1e-3)
    hook.remove()


def test_demonstrations_that_begin_with_a_slip_are_learned_from(base, tokenizer):
    """Rows chosen by their first token's weight: what follows a slip would drop out unseen."""
    model, rng, task = base[0], random.Random(SEED), tasks.GeneralPoints(turns=2)
    deals = [task.sample("train", rng) for _ in range(100)]
    slips = [deal for deal in deals if deal.slips][:2]
    plain = [deal for deal in deals if not deal.slips][:2]
    batch = amft.encode_demos(model, tokenizer, [*slips, *plain])
    assert batch.response_mask[:, 0].tolist() == [0, 0, 1, 1]
    mean = mean_logp(model, batch)
    expected = flat_grad(-mean, model)
    for size in (4, 1):
        config = configured(micro_tokens=size * batch.input_ids.shape[1])
        grad, _, loss = amft.sft_gradient(model, batch, config, nll)
        close(grad, expected, 1e-3)
        assert loss == pytest.approx(-mean.item(), rel=1e-3)


# --- Eq. 3: the step ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [1e6, 0.1])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_step_equals_torch(max_norm, weight_decay):
    """clip_grad_norm_ and AdamW, step after step; entries without any gradient, and no gradient."""
    model = toy_model()
    theta = amft.flatten(model)
    state = fresh(theta)
    how = dict(lr=1e-2, max_norm=max_norm, weight_decay=weight_decay)
    for step in range(4):
        grad = torch.zeros_like(theta)
        if step < 2:
            grad = torch.randn_like(theta) * (torch.rand_like(theta) < 0.5)
        stepped = torch_step(model, grad, state, **how)
        theta, state = amft.adamw_step(theta, grad, state, **how)
        put(model, theta)
        torch.testing.assert_close(theta, flat_weights(stepped), rtol=1e-11, atol=1e-13)
    assert state.step == 4


def test_weights_come_and_go_as_one_vector():
    """theta in another order than torch's, or cut wrongly into the weights."""
    model, other = toy_model(), toy_model()
    theta = amft.flatten(model)
    torch.testing.assert_close(theta, flat_weights(model), rtol=0, atol=0)
    amft.set_theta(other, theta)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    half = copy.deepcopy(model).bfloat16()
    assert amft.flatten(half).dtype == torch.float32
    amft.set_theta(half, theta)
    assert half.dtype == torch.bfloat16
    assert torch.equal(flat_weights(half), theta.bfloat16())


# --- Eqs. 4-5: the derivative of the step, and the meta-gradient ----------------------------------


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("steps_before", [0, 1, 30])
@pytest.mark.parametrize("mu", [0.3, 0.9])
def test_sensitivity_is_the_finite_difference_of_exact_utility(clipped, steps_before, mu):
    """dU/dmu of the exact U after the whole step, torch's own, against <grad U, d theta'/d mu>."""
    model, reward, g_rl, g_sft, state = toy(steps_before)
    # The first step is sign(g) but within eps of 0: keep g(mu) from crossing it.
    if not steps_before:
        g_sft = g_rl * (1 + torch.rand_like(g_rl))

    def mixed(mu):
        return (1 - mu) * g_rl + mu * g_sft
    norm = mixed(mu).norm().item()
    max_norm = norm / 3 if clipped else norm * 3
    how = dict(lr=0.05, max_norm=max_norm)

    def utility(mu):  # through torch's clip and AdamW, then by enumeration
        stepped = torch_step(model, mixed(mu), state, **how)
        with torch.no_grad():
            return exact_utility(stepped, reward).item()
    expected = central_difference(utility, mu, 1e-5)
    theta = amft.flatten(model)
    tangent, _, _ = amft.step_sensitivity(theta, g_rl, g_sft, mu, state, **how)
    after, _ = amft.adamw_step(theta, mixed(mu), state, **how)
    put(model, after)
    slope = flat_grad(exact_utility(model, reward), model)
    # The tolerance is relative to what the inner product could be: it may happen to be near 0.
    size = (slope.norm() * tangent.norm()).item()
    actual = (slope @ tangent).item()
    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5 * size + 1e-10)
    if steps_before:
        assert tangent.norm() > 1e-3 * how["lr"]  # there is something to compare


def test_sensitivity_with_a_trace_is_the_derivative_in_a_mu_that_was_larger_all_along():
    """Float64 central differences through torch's own clipping and AdamW, gradients held fixed."""
    generator, N, trace = torch.Generator().manual_seed(SEED), 20, 0.7
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
    expected = central_difference(final, 0.0, 1e-6)
    theta, last = torch.ones(N, dtype=torch.float64), None
    state = fresh(theta)
    how = dict(lr=0.05, max_norm=2.0)
    for g_rl, g_sft in grads:
        last = amft.step_sensitivity(theta, g_rl, g_sft, 0.4, state, last, trace, **how)
        theta, state = amft.adamw_step(theta, 0.6 * g_rl + 0.4 * g_sft, state, **how)
    torch.testing.assert_close(last[0], expected, rtol=1e-5, atol=1e-7)


def test_adams_first_step_hides_mu():
    """A derivative that takes Adam for SGD: on fresh moments the step is sign(g), whatever mu."""
    theta, mixed, apart = torch.randn(3, 50, dtype=torch.float64)
    mixed += 0.1 * mixed.sign()  # where it is as small as eps the sign has a slope
    g_rl = mixed - apart / 2
    g_sft = mixed + apart / 2
    state = fresh(theta)
    how = dict(lr=1.0, max_norm=1e9)
    norms = []
    for _ in range(3):
        tangent = amft.step_sensitivity(theta, g_rl, g_sft, 0.5, state, **how)[0]
        norms.append(tangent.norm().item())
        theta, state = amft.adamw_step(theta, torch.randn_like(theta), state, **how)
    assert norms[0] < 1e-4
    assert min(norms[1:]) > 0.1


def test_sensitivity_is_finite_where_no_gradient_ever_came():
    """0/0 in the derivative of Adam's root, or of the norm of a gradient that is 0."""
    theta, zeros = torch.randn(4), torch.zeros(4)
    g_rl, g_sft, v = digits("0102", "0032", "0111").float()
    for state in (fresh(theta), amft.AdamState(zeros, v, 9)):
        tangent = amft.step_sensitivity(theta, g_rl, g_sft, 0.5, state, lr=0.1)[0]
        assert tangent.isfinite().all()
        assert tangent[0] == 0
        nothing = amft.step_sensitivity(theta, zeros, zeros, 0.5, state, lr=0.1)[0]
        assert nothing.isfinite().all()


def toy_tangent(steps_before=10):
    """(model, reward, d theta'/d mu of a step of it)."""
    model, reward, g_rl, g_sft, state = toy(steps_before)
    theta = amft.flatten(model)
    return model, reward, amft.step_sensitivity(theta, g_rl, g_sft, 0.5, state, lr=0.05)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.filterwarnings("ignore:std")  # of one prompt there is no error
def test_meta_gradient_is_exactly_unbiased(temperature):
    """A bias of Eq. 5: its mean over every pair of responses is <grad U, tangent>, enumerated."""
    # U is the success of sampling at the temperature; each pair counts at its probability, G = 2.
    model, reward, tangent = toy_tangent()
    size = tangent.norm().item()
    config = configured(temperature=temperature)
    success = digits("10").double()
    expected = []
    total = []
    for prompt, r in zip(PROMPTS[:2], reward):
        right = r.nonzero().squeeze(1)[:4].tolist()
        wrong = (1 - r).nonzero().squeeze(1)[:7].tolist()
        logps = exact_logps(model, prompt, temperature)
        # A task whose responses are these, renormalised: fewer pairs, as exact.
        p = torch.zeros(len(ALL))
        p[right + wrong] = logps[right + wrong].softmax(0)
        value = 0.0  # sum over pairs of p_y p_z estimate(y, z); pairs of equal reward have none
        for y, z in itertools.product(right, wrong):
            pair = batch_of(prompt.expand(2, -1), ALL[[y, z]])
            estimate, _ = amft.meta_gradient(model, tangent, rollouts_of(pair, success), config)
            # Given y right and z wrong, r_y - r_z = 1: half of the difference of their scores.
            half = (logps[y] - logps[z]) / 2
            score = flat_grad(half, model, retain_graph=True) @ tangent
            assert estimate == pytest.approx(score.item(), rel=1e-3, abs=1e-5 * size)
            value += 2 * (p[y] * p[z]).item() * estimate
        total.append(value)
        slope = flat_grad(p[right].sum(), model) @ tangent
        expected.append(slope.item())
    assert total == pytest.approx(expected, rel=2e-3, abs=1e-5 * size)


@pytest.mark.parametrize("rows", [100, 3, 1])
def test_meta_gradient_against_a_slow_loop(rows):
    """A wrong baseline, scale, mask or row of a micro-batch; an error that is not over prompts."""
    # Prompts of different difficulty, two without a signal, conversations of different length.
    model, P, G, tau = toy_model(), 5, 4, 0.7
    lengths = torch.randint(1, 3, (P * G,))
    batch = toy_batch([0, 1, 2, 0, 1], G, mask_of(lengths))
    success = digits("1000", "1100", "1111", "0111", "0000").double()
    weights = (success - others_mean(success)) / G
    tangent = torch.randn_like(amft.flatten(model))
    slopes = []
    for p in range(P):
        total = 0.0
        for g in range(G):
            logp = slow_logps(model, batch, p * G + g, tau).sum()
            total = total + weights[p, g] * logp
        slope = flat_grad(total, model) @ tangent
        slopes.append(slope.item())
    config = configured(temperature=tau, samples=G, micro_tokens=rows * 5)
    slope, error = amft.meta_gradient(model, tangent, rollouts_of(batch, success), config)
    size = np.abs(slopes).max()
    assert slope == pytest.approx(np.mean(slopes), rel=1e-4, abs=1e-5 * size)
    assert error == pytest.approx(np.std(slopes, ddof=1) / math.sqrt(P), rel=1e-4)
    assert slopes[2] == 0
    assert slopes[4] == 0


def test_meta_gradient_with_advantages_of_ones_own():
    """Advantages that are handed over: another baseline than the group's, with its scale."""
    model, P, G = toy_model(), 2, 3
    batch = toy_batch([0, 1], G)
    values = torch.randn(P, G)
    tangent = torch.randn_like(amft.flatten(model))
    total = 1.7 * (values.flatten() * slow_totals(model, batch)).mean()
    expected = (flat_grad(total, model) @ tangent).item()
    rollouts = rollouts_of(batch, torch.ones(P, G))
    for rows in (100, 2):
        config = configured(micro_tokens=rows * 5)
        slope, _ = amft.meta_gradient(model, tangent, rollouts, config, (values, 1.7))
        assert slope == pytest.approx(expected, rel=1e-4)


def test_the_standard_error_of_the_meta_gradient_covers():
    """Sampled on the toy world: the mean is the truth, and 95% intervals hold it."""
    model, reward, tangent = toy_tangent()
    with torch.no_grad():
        probabilities = torch.stack([exact_logps(model, p).exp() for p in PROMPTS])
    truth = (flat_grad(exact_utility(model, reward), model) @ tangent).item()
    P, G, repetitions = 24, 4, 150
    estimates = np.zeros(repetitions)
    errors = np.zeros(repetitions)
    for i in range(repetitions):
        which = torch.randint(3, (P,))
        samples = torch.multinomial(probabilities[which], G, replacement=True)
        batch = batch_of(PROMPTS[which].repeat_interleave(G, 0), ALL[samples.flatten()])
        rollouts = rollouts_of(batch, reward[which.unsqueeze(1), samples])
        estimates[i], errors[i] = amft.meta_gradient(model, tangent, rollouts, configured())
    assert abs(z_score(estimates, truth)) < 4.5
    assert np.sqrt(np.mean(errors ** 2)) == pytest.approx(estimates.std(), rel=0.45)
    # Half the error would cover 67%; where success is rare the mean of so few prompts is skewed,
    # and 95% is not reached.
    assert np.mean(abs(estimates - truth) < 1.96 * errors) > 0.78


@pytest.mark.parametrize("advantage", ["group", "gae"])
def test_own_meta_gradient_is_the_slope_of_the_samples_utility(advantage):
    """A wrong sign or unit: d/dh of the mean of (r - baseline) log pi at theta + h tangent."""
    # Conversations of different length, a prompt without signal.
    model, P, G, tau = toy_model(), 4, 6, 0.8
    mask = mask_of(torch.randint(1, 3, (P * G,)))
    batch = toy_batch([0, 1, 2, 0], G, mask)
    success = digits("000100", "101010", "110111", "000000").double()
    config = configured(advantage=advantage, samples=G, temperature=tau)
    phi = None
    baseline = others_mean(success).flatten()
    if advantage == "gae":  # a value of 0 everywhere: every token's return is the reward
        phi = constant_phi(model, 0.0)
        mean = (success.flatten() * mask.sum(1)).sum() / mask.sum()
        baseline = mean.expand(P * G)
    advantages = amft.advantages_of(model, phi, rollouts_of(batch, success), config)
    g_rl = amft.rl_gradient(model, batch, advantages, config)[0]
    tangent = torch.randn_like(amft.flatten(model))
    weights = (success.flatten() - baseline) / (P * G)

    def weighted(h):
        moved = put(copy.deepcopy(model), amft.flatten(model) + h * tangent)
        with torch.no_grad():
            return (weights @ slow_totals(moved, batch, tau)).item()
    expected = central_difference(weighted, 0.0, 1e-5)
    slope, error = amft.own_meta_gradient(g_rl, tangent, batch, advantages.scale)
    size = (g_rl.norm() * tangent.norm()).item() * advantages.scale * T
    assert slope == pytest.approx(expected, rel=1e-4, abs=1e-5 * size)
    assert error == abs(slope) > 0


def test_own_meta_gradient_is_unbiased_whatever_the_value_function_says():
    """A bias that praises what the RL gradient does anyway: phi knows nothing here."""
    # Sampled, against <grad U, tangent> by enumeration; also where nearly all responses succeed.
    # With lambda = 0 the RL gradient has a direction of its own there, and the tangent is that of a
    # policy that went that way: the test would see a bias.
    model, reward, _, _, _ = toy(0)
    phi = roughened(amft.value_function(model))
    phi.learn = lambda *_: None
    with torch.no_grad():
        probabilities = torch.stack([exact_logps(model, p).exp() for p in PROMPTS])
    rare = (probabilities - 0.05).abs().argmin(1)
    nearly = torch.ones_like(reward)
    nearly[range(3), rare] = 0.0

    def sampled(reward, B=384):
        which = torch.randint(3, (B,))
        samples = torch.multinomial(probabilities[which], 1).squeeze(1)
        batch = batch_of(PROMPTS[which], ALL[samples])
        return rollouts_of(batch, reward[which, samples].view(-1, 8))

    def one_step(rollouts):  # the Advantages of lambda = 0: A_t = r_t + V_{t+1} - V_t
        _, states = amft.response_outputs(model, rollouts.batch, hidden=True)
        first, second = phi(states).detach().T
        raw = torch.stack([second - first, rollouts.success.flatten() - second], 1)
        scale = raw.std(correction=0).item()
        return amft.Advantages((raw - raw.mean()) / scale, scale)

    def all_along(rollouts):  # lambda = 1, the default
        return amft.advantages_of(model, phi, rollouts, configured())

    def gradient(rollouts, advantages):
        return amft.rl_gradient(model, rollouts.batch, advantages, configured())[0]

    def slopes(reward, advantages_of, n):
        for _ in range(n):
            rollouts = sampled(reward)
            advantages = advantages_of(rollouts)
            g_rl = gradient(rollouts, advantages)
            yield amft.own_meta_gradient(g_rl, tangent, rollouts.batch, advantages.scale)[0]

    def z_of(reward, advantages_of, n=40):
        truth = (flat_grad(exact_utility(model, reward), model) @ tangent).item()
        return z_score(list(slopes(reward, advantages_of, n)), truth)
    tangent = 0.0
    for _ in range(20):
        rollouts = sampled(nearly)
        tangent = tangent - gradient(rollouts, one_step(rollouts))
    assert abs(z_of(reward, all_along)) < 4.5
    assert abs(z_of(nearly, all_along)) < 4.5
    assert z_of(nearly, one_step, 160) > 3
    assert set(slopes(torch.ones_like(reward), all_along, 3)) == {0.0}


def test_published_settings_leave_mu_to_the_entropy_term(base, tokenizer):
    """At learning rate 1e-6 and eta_mu 1e-4, 25 meta-gradients move mu by less than 1e-6."""
    config = configured(
        controller="paper", eta_mu=1e-4, eta_h=0.0, lr=1e-6, utility="val", trace=0.0,
        advantage="group", samples=8, prompts=16)
    model, task, rng = copy.deepcopy(base[0]), tasks.GeneralPoints(), random.Random(SEED)
    theta = amft.flatten(model)
    state = fresh(theta)

    def sampled(split):
        return [task.sample(split, rng) for _ in range(16)]

    def g_sft_of_a_batch():
        demos = amft.encode_demos(model, tokenizer, sampled("train"))
        return amft.sft_gradient(model, demos, config, nll)[0]
    for _ in range(30):  # the warm-up; on fresh moments entries with g(mu) near 0 make heavy tails
        theta, state = amft.adamw_step(theta, g_sft_of_a_batch(), state, lr=config.lr)
    for _ in range(3):
        seen = amft.rollout(model, tokenizer, sampled("train"), 8, 40)
        advantages = amft.advantages_of(model, None, seen, config)
        g_rl = amft.rl_gradient(model, seen.batch, advantages, config)[0]
        g_sft = g_sft_of_a_batch()
        tangent = amft.step_sensitivity(theta, g_rl, g_sft, 0.5, state, lr=config.lr)[0]
        theta, state = amft.adamw_step(theta, (g_rl + g_sft) / 2, state, lr=config.lr)
    put(model, theta)
    seen = amft.rollout(model, tokenizer, sampled("val"), 8, 40)
    slope, error = amft.meta_gradient(model, tangent, seen, config)
    assert error > 0
    far = [(abs(slope) + 2 * error, error)]  # the far end of the interval
    mu = 0.5
    for _ in range(500 // 20):  # all 25 updates in the same direction
        mu, _, _ = amft.update_mu(mu, 1.0, 1.0, far, (0.0, 0.0), config)
    assert 0 < mu - 0.5 < 1e-6, (slope, error)


def test_reference_codes_formula_has_the_wrong_sign():
    """The public code's formula climbs the validation loss, by finite differences."""
    # It adds -alpha <grad CE_val, g_SFT - g_RL> to mu (adaptive_weight_controller.py:41, :80):
    # under its own SGD step that is d CE_val/d mu. Utility is -CE_val.
    model, _, g_rl, g_sft, _ = toy(3)
    labels = torch.randint(len(ALL), (3,))
    theta, alpha = amft.flatten(model), 0.05

    def cross_entropy(mu):
        put(model, theta - alpha * ((1 - mu) * g_rl + mu * g_sft))
        return -sum(exact_logps(model, p)[y] for p, y in zip(PROMPTS, labels)) / 3

    def utility(mu):
        with torch.no_grad():
            return -cross_entropy(mu).item()
    slope = central_difference(utility, 0.5, 1e-5)
    reference = -alpha * (flat_grad(cross_entropy(0.5), model) @ (g_sft - g_rl)).item()
    assert reference == pytest.approx(-slope, rel=1e-4, abs=1e-8 * alpha)
    assert slope != 0


# --- Eq. 6: the controller ------------------------------------------------------------------------


def controller(**settings):
    return configured(**{**dict(eta_mu=0.1, eta_h=0.5, mu_min=0.1, mu_max=0.9), **settings})


NO_EVIDENCE = (0.0, 0.0)


def moved(estimates, evidence, mu=0.5, entropy=1.0, target=1.0, **settings):
    """update_mu with a memory of half."""
    return amft.update_mu(
        mu, entropy, target, estimates, evidence, controller(**settings), memory=0.5)


def test_controller_on_hand_computed_values():
    """A wrong sign of the entropy term, a bound that does not hold, evidence that fades wrongly."""
    # Entropy 0.2 below target, no meta-gradient: Eq. 6 raises mu by 0.5 * 0.2; the paper's text
    # lowers it.
    assert moved([], NO_EVIDENCE, target=1.2)[0] == pytest.approx(0.6)
    assert moved([], NO_EVIDENCE, target=1.2, eta_h=-0.5)[0] == pytest.approx(0.4)
    assert moved([], NO_EVIDENCE, target=1.2, eta_h=0.0)[0] == 0.5
    # Eq. 6 to the letter.
    mu, _, forces = moved([(-3.0, 1.0)], NO_EVIDENCE, target=1.2, controller="paper")
    assert mu == pytest.approx(0.3)
    assert forces == pytest.approx((-0.3, 0.1))
    assert moved([], NO_EVIDENCE, entropy=0.0, target=9.0)[0] == 0.9  # mu_max
    assert moved([], NO_EVIDENCE, entropy=9.0, target=0.0)[0] == 0.1  # mu_min
    # Evidence: z = -2. Odds of above and below to 0: 0.2 exp(-0.8 - 0.08) and 0.2 exp(0.8 - 0.08),
    # so P[above] - P[below] = (0.0829566 - 0.4108866) / 1.4938432.
    mu, evidence, forces = moved([(-4.0, 2.0)], NO_EVIDENCE)
    assert forces[0] == pytest.approx(-0.02195210)
    assert mu == pytest.approx(0.5 - 0.02195210)
    assert evidence == (-2.0, 1.0)
    # Then 0.5 * -2 + 1 = 0: contradicting evidence cancels, and mu is where it began.
    mu, evidence, forces = moved([(3.0, 3.0)], evidence, mu=mu)
    assert (mu, forces[0]) == (0.5, 0)
    assert evidence == (0.0, 1.5)
    # No group with signal: nothing is known, nothing moves or fades.
    assert moved([(0.0, 0.0)], NO_EVIDENCE)[0] == 0.5
    assert moved([(0.0, 0.0)], (2.0, 3.0))[1] == (2.0, 3.0)
    # Two new estimates enter side by side; old evidence fades once.
    assert moved([(3.0, 1.0), (-4.0, 2.0)], (2.0, 8.0))[1] == (2.0, 6.0)
    assert moved([(3.0, 1.0), (0.0, 0.0)], (2.0, 8.0))[1] == (4.0, 5.0)


def test_belief_is_bayes_theorem():
    """A likelihood ratio, or the odds, upside down."""
    def density(z, mean):
        return math.exp(-(z - mean) ** 2 / 2) / math.sqrt(2 * math.pi)
    rng = random.Random(SEED)
    zs, evidence = [], NO_EVIDENCE
    for _ in range(12):
        zs.append(rng.gauss(0.7, 1))
        estimates = [(2e-5 * zs[-1], 2e-5)]  # whatever its scale
        _, evidence, (force, _) = amft.update_mu(
            0.5, 1.0, 1.0, estimates, evidence, controller(eta_mu=1.0), memory=1, effect=0.3, odds=0.1)
        above, zero, below = (
            prior * math.prod(density(z, mean) for z in zs)
            for prior, mean in ((0.1, 0.3), (1.0, 0.0), (0.1, -0.3)))
        assert force == pytest.approx((above - below) / (above + zero + below))


@pytest.mark.parametrize("rule, informative, counts", [
    ("evidence", 2, False), ("evidence", 3, True), ("paper", 1, True)])
def test_a_look_with_few_informative_prompts_is_no_evidence(rule, informative, counts, monkeypatch):
    """|z| = 1, which is algebra where one prompt's samples differ, taken for evidence."""
    success = torch.zeros(8, 4)
    success[:informative, 0] = 1
    val = SimpleNamespace(success=success, episodes=[None] * 32)
    monkeypatch.setattr(amft, "rollout", lambda *_: val)
    monkeypatch.setattr(amft, "meta_gradient", lambda *_: (1.0, 0.5))
    config = configured(controller=rule, utility="val", meta_every=1, warmup=0)
    method = amft.Controller(config, SimpleNamespace(sample=lambda *_: None), (None, None))
    method.sensitivity = (None, None, None)
    step = amft.Step(1, 1e-4, random.Random(0))
    assert method.estimates(step) == ([(1.0, 0.5)] if counts else [])
    assert step.metrics == dict(meta_grad=1.0, meta_se=0.5)


def looks(signal, n=60, runs=300):
    """mu after each of n looks whose z has mean signal(mu) and deviation 1: (runs, n)."""
    config = configured(mu=0.5, eta_h=0.0)
    paths = np.empty((runs, n))
    noise = np.random.default_rng(SEED).normal(size=(runs, n))
    for path, own in zip(paths, noise):
        mu, evidence = 0.5, NO_EVIDENCE
        for i, x in enumerate(own):
            mu, evidence, _ = amft.update_mu(mu, 1.0, 1.0, [(signal(mu) + x, 1.0)], evidence, config)
            path[i] = mu
    return paths


def test_mu_rests_where_nothing_is_known_and_goes_where_something_is():
    """Noise that adds up and carries mu to an end; a rule that never moves, or overshoots."""
    silent = looks(lambda mu: 0.0)
    assert (abs(silent[:, -1] - 0.5) < 0.1).mean() > 0.8
    assert (abs(silent - 0.5) > 0.4).any(1).mean() < 0.04
    helps = looks(lambda mu: 0.4)
    assert helps[:, 29].mean() > 0.68 and helps[:, -1].mean() > 0.75
    between = looks(lambda mu: 2 * (0.3 - mu))[:, -1]  # dU/dmu is 0 at mu = 0.3
    assert 0.3 < between.mean() < 0.45 and between.std() < 0.12


# --- the policy: encoding and log-probabilities ---------------------------------------------------


def test_log_probabilities_of_large_logits():
    """log(softmax) would underflow to -inf."""
    logits = torch.tensor([
        [0.0, 300.0, -300.0],
        [1e4, 0.0, 1e4]])
    logps = amft.token_logps(logits, torch.tensor([2, 1]))
    torch.testing.assert_close(logps, torch.tensor([-600.0, -1e4 - math.log(2)]))
    logits = 3 * torch.randn(2, 3, V, dtype=torch.float64)
    ids = torch.randint(V, (2, 3))
    logps = amft.token_logps(logits, ids)
    for b, t in np.ndindex(2, 3):
        exps = [math.exp(x) for x in logits[b, t]]
        expected = exps[ids[b, t]] / sum(exps)
        assert logps[b, t].exp().item() == pytest.approx(expected, rel=1e-9)


def test_the_temperature_of_log_probabilities():
    """A temperature that is left out, or multiplies."""
    model, batch = toy_model(), sequences(PROMPTS[2])
    for temperature in (1.0, 0.5, 2.0):
        expected = exact_logps(model, PROMPTS[2], temperature).detach()
        actual = amft.logps_of(model, batch, temperature).sum(1).detach()
        np.testing.assert_allclose(actual, expected, rtol=1e-4)


def left_padded(batch, columns):
    """The batch with more columns of padding on the left."""
    pad = torch.zeros(len(batch.input_ids), columns, dtype=torch.long)
    return batch._replace(
        input_ids=torch.cat([pad, batch.input_ids], 1),
        attention_mask=torch.cat([pad, batch.attention_mask], 1))


def test_log_probabilities_do_not_depend_on_the_company(base, tokenizer):
    """Padding that is read, a column too far, or an end without loss."""
    # Alone and unpadded, by a plain forward pass, against a left- and right-padded batch.
    model, rng, task = base[0], random.Random(SEED), tasks.GeneralPoints()
    splits = ("train", "heldout", "ood_rule", "ood_small")
    episodes = [task.sample(split, rng) for split in splits]
    batch = amft.encode_demos(model, tokenizer, episodes)
    for padded in (batch, left_padded(batch, 2)):
        with torch.no_grad():
            logps = amft.logps_of(model, padded)
        for episode, row, mask in zip(episodes, logps, padded.response_mask):
            prompt = tokenizer(episode.prompt)["input_ids"]
            response = tokenizer(episode.expert)["input_ids"] + [tokenizer.eos_token_id]
            assert mask.sum() == len(response)
            ids = torch.tensor([prompt + response])
            with torch.no_grad():
                plain = model(ids).logits[0].log_softmax(-1)
            expected = plain[len(prompt) - 1:-1][range(len(response)), response]
            np.testing.assert_allclose(row[:len(response)], expected, atol=2e-4)


def test_left_padding_keeps_absolute_positions():
    """GPT-2 learns a vector for each position: a prompt shifted by its padding would show."""
    model, batch = toy_model(), sequences(PROMPTS[1])
    actual = amft.logps_of(model, left_padded(batch, 2)).sum(1).detach()
    np.testing.assert_allclose(actual, exact_logps(model, PROMPTS[1]).detach(), rtol=1e-4)


def test_padding_of_what_is_shown_is_not_read(base, tokenizer):
    """An observation's padding that is attended to; where nothing is shown there is one end."""
    model = base[0]
    texts = ["Cards: 3, 4", "", "Cards: 10, J, Q, K. Make 24. Again:"]
    episodes = [tasks.GeneralPoints().sample("train", random.Random(SEED))] * 3
    ids, attention_mask, images = amft.encode_observations(model, tokenizer, episodes, texts)
    assert images == [[], [], []]
    for row, text in enumerate(texts):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = expected or [tokenizer.eos_token_id]
        padding = ids.shape[1] - len(expected)
        assert attention_mask[row].tolist() == [0] * padding + [1] * len(expected)
        assert ids[row, padding:].tolist() == expected


# --- the policy: sampling -------------------------------------------------------------------------


def generated(model, input_ids, attention_mask, max_new_tokens, temperature):
    """transformers' own response to each row (B, <= n), which amft.py does not call."""
    sampling = dict(do_sample=False)
    if temperature:
        sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    ids = model.generate(
        input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, **sampling)
    return ids[:, input_ids.shape[1]:]


def length_of(said, end):
    """How many ids a response has, its end included."""
    return said.index(end) + 1 if end in said else len(said)


def a_reply(model, input_ids, attention_mask, max_new_tokens, temperature, done=None):
    """A Reply to whole conversations, which are read first."""
    cache = amft.prefill(model, input_ids, attention_mask, [])
    if done is None:
        done = torch.zeros(len(input_ids), dtype=torch.bool)
    return amft.generate_reply(
        model, input_ids, attention_mask, cache, done, max_new_tokens, temperature)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["<pad>", "<eos>"])
@pytest.mark.parametrize("temperature", [0, 0.6, 1.0, 1.5])
def test_replies_are_those_of_generate(temperature, padding, base, tokenizer):
    """Other ids than transformers' own loop says, greedy or at the same seed, with its padding."""
    # Prompts of different length.
    model, rng = copy.deepcopy(base[0]), random.Random(SEED)
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids(padding)
    episodes = []
    for task in (tasks.GeneralPoints(), tasks.Mathematics(), tasks.VIRL()):
        episodes += [task.sample("train", rng), task.sample("train", rng)]
    prompts = [episode.prompt for episode in episodes]
    ids, attention_mask, _ = amft.encode_observations(model, tokenizer, episodes, prompts, True)
    assert len(set(attention_mask.sum(1).tolist())) >= 3
    for max_new_tokens in (100, 12):
        torch.manual_seed(SEED)
        expected = generated(model, ids, attention_mask, max_new_tokens, temperature)
        torch.manual_seed(SEED)
        reply = a_reply(model, ids, attention_mask, max_new_tokens, temperature)
        assert reply.ids.tolist() == expected.tolist()
        lengths = [length_of(said, tokenizer.eos_token_id) for said in expected.tolist()]
        assert torch.equal(reply.mask, mask_of(lengths, expected.shape[1]))
        ended = (expected == tokenizer.eos_token_id).any(1)
        assert torch.equal(reply.truncated, ~ended)


@torch.no_grad()
def test_every_turn_is_that_of_generate(base, tokenizer):
    """A cache, padding or holes that change what the policy says in a later turn."""
    # Greedy conversations of several turns, side by side: each response is what transformers' own
    # loop says to that conversation so far, alone.
    model, rng, task = base[0], random.Random(SEED), tasks.GeneralPointsTurns()
    episodes = [task.sample("ood_rule", rng) for _ in range(6)]
    for i, episode in enumerate(episodes):
        episode.attempts = 1 + i % 3  # so that some are over before others
    rollouts = amft.rollout(model, tokenizer, episodes, 1, 40, temperature=0)
    batch = rollouts.batch
    turns = [len(episode.responses) for episode in rollouts.episodes]
    assert min(turns) == 1
    assert max(turns) > 1
    ended = 0
    for row, played in enumerate(rollouts.episodes):
        shown = tokenizer(played.prompt)["input_ids"]
        for outcome, response in zip(played.history, played.responses):
            ids = torch.tensor([shown])
            said = generated(model, ids, torch.ones_like(ids), 40, 0)[0].tolist()
            ended += said[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(said).removesuffix("<eos>") == response
            shown = shown + said
            if response is not played.responses[-1]:
                _, wrong = played.outcomes[outcome]
                feedback = tasks.FEEDBACK.format(wrong) + "\n"
                shown = shown + tokenizer(feedback)["input_ids"]
        real = batch.attention_mask[row].bool()
        conversation = batch.input_ids[row][real].tolist()
        assert conversation[:len(shown)] == shown
        # What was over long before the others were is shown ends that nobody reads.
        assert set(conversation[len(shown):]) <= {tokenizer.eos_token_id}
    assert rollouts.truncated == pytest.approx(1 - ended / sum(turns))


class Scripted:
    """A policy that says in row b what script[b] holds, and keeps what it is asked."""

    def __init__(self, *script, stop, pad):
        self.generation_config = SimpleNamespace(eos_token_id=stop, pad_token_id=pad)
        self.script = digits(*script)
        self.asked = []

    def __call__(self, **inputs):
        said = self.script[:, len(self.asked)]
        self.asked.append(SimpleNamespace(**copy.deepcopy(inputs)))
        logits = 100.0 * torch.nn.functional.one_hot(said, 10)
        return SimpleNamespace(logits=logits.unsqueeze(1))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_reply_ends_when_all_are_done(temperature):
    """An end that is missed, a pass too many, a conversation that was over and speaks on."""
    # Several ends, one of which is padding too.
    model = Scripted("18222", "92222", "11182", "11111", stop=[8, 9], pad=9)
    ids = digits("777", "777", "777", "777")
    attention_mask = digits("111", "011", "001", "111")
    done = digits("0001")[0].bool()
    reply = amft.generate_reply(model, ids, attention_mask, None, done, 5, temperature)
    assert torch.equal(reply.ids, digits("1899", "9999", "1118", "9999"))
    assert torch.equal(reply.mask, digits("1100", "1000", "1111", "0000").float())
    assert not reply.truncated.any()
    assert len(model.asked) == 4
    ids = torch.cat([ids, reply.ids], 1)
    attention_mask = torch.cat([attention_mask, reply.mask.long()], 1)
    for column, asked in enumerate(model.asked, start=2):
        assert torch.equal(asked.input_ids, ids[:, column:column + 1])
        known = attention_mask[:, :column + 1]
        assert torch.equal(asked.attention_mask, known)
        speaking = known[:, -1].bool()
        position = known.sum(1) - 1
        assert torch.equal(asked.position_ids.squeeze(1)[speaking], position[speaking])


def test_a_reply_without_an_end_is_truncated():
    """Padding that the policy says itself is a token like others; room used up is no end."""
    ids = digits("77", "77", "77")
    nobody = torch.zeros(3, dtype=torch.bool)
    for room, truncated in ((3, "011"), (4, "010")):
        model = Scripted("0081", "1111", "1118", stop=8, pad=0)
        reply = amft.generate_reply(model, ids, torch.ones_like(ids), None, nobody, room, 0)
        assert torch.equal(reply.truncated, digits(truncated)[0].bool())
        expected = digits("1110", "1111", "1111").float()
        assert torch.equal(reply.mask, expected[:, :room])


def test_points_stand_on_a_responses_last_token(base, tokenizer):
    """Points on another token, graded ends, or a conversation that is over asked again."""
    model, end = base[0], tokenizer.eos_token_id

    class Echo(tasks.Episode):
        outcomes = {"correct": (1.0, ""), "short": (2.0, "it was short")}
        attempts = 2

        def grade(self, response):
            return "correct" if response == tokenizer.decode(right) else "short"
    right = tokenizer("Cards: 10")["input_ids"][:2]
    a, b = right
    ids = torch.tensor([
        [a, b, end],
        [a, end, 0],
        [a, b, 0],
        [end, 0, 0],
        [0, 0, 0]])
    mask = mask_of([3, 2, 2, 1, 0], 3)
    done = mask[:, 0] == 0
    played = [Echo() for _ in ids]
    reply = amft.Reply(ids, mask, torch.zeros_like(mask), torch.zeros_like(done))
    observations, points, over = amft.answer_replies(model, tokenizer, played, reply, done)
    assert torch.equal(points, digits("001", "020", "010", "200", "000").float())
    assert over.tolist() == [True, False, True, False, True]
    assert torch.equal(done, mask[:, 0] == 0)
    again = tasks.FEEDBACK.format("it was short") + "\n"
    assert observations == ["", again, "", again, ""]
    assert played[1].responses == (tokenizer.decode([a]),)
    assert played[3].responses == ("",)
    assert played[4].responses == ()


def test_rollout_samples_the_policy(base, tokenizer):
    """Ids, masks, texts and entropy belong together, and greedy is an argmax without any cache."""
    model, rng, task = base[0], random.Random(SEED), tasks.GeneralPoints()
    end = tokenizer.eos_token_id
    episodes = [task.sample("train", rng) for _ in range(3)]
    prompts = [tokenizer(episode.prompt)["input_ids"] for episode in episodes]
    rollouts = amft.rollout(model, tokenizer, episodes, 5, 40, temperature=1.0)
    batch = rollouts.batch
    width = batch.response_mask.shape[1]
    assert len(batch.input_ids) == len(rollouts.episodes) == 15
    assert batch.input_ids.shape == batch.attention_mask.shape
    with torch.no_grad():
        logits = model(batch.input_ids).logits  # the prompts have one length: no left padding
    entropies = []
    for b, (ids, episode) in enumerate(zip(batch.input_ids.tolist(), rollouts.episodes)):
        prompt, response = ids[:-width], ids[-width:]
        assert prompt == prompts[b // 5]
        n = length_of(response, end)
        said = [1.0] * n + [0.0] * (width - n)
        assert batch.response_mask[b].tolist() == said
        assert batch.attention_mask[b].tolist() == [1] * len(prompt) + said
        text = tokenizer.decode(response[:n]).removesuffix("<eos>")
        assert episode.responses == (text,)
        for t in range(n):
            p = logits[b, len(prompt) - 1 + t].softmax(-1)
            logp = p.clamp(min=1e-30).log()
            entropies.append(-(p * logp).sum().item())
    assert rollouts.entropy == pytest.approx(np.mean(entropies), rel=1e-3)
    # From one shared reading of the prompts.
    greedy = amft.rollout(model, tokenizer, episodes, 1, 40, temperature=0).episodes
    for prompt, episode in zip(prompts, greedy):
        said = []
        while len(said) < 40 and end not in said:
            ids = torch.tensor([prompt + said])
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            said.append(logits.argmax().item())
        text = tokenizer.decode(said).removesuffix("<eos>")
        assert episode.responses == (text,)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampling_frequencies_and_truncation(temperature, tiny, tokenizer):
    """Top-k or top-p left on, or another temperature, in first tokens of 4,000 samples."""
    model = LlamaForCausalLM.from_pretrained(tiny).eval()
    episode = tasks.GeneralPoints().sample("train", random.Random(SEED))
    rollouts = amft.rollout(model, tokenizer, [episode], 4000, 1, temperature)
    prompt = torch.tensor([tokenizer(episode.prompt)["input_ids"]])
    with torch.no_grad():
        p = (model(prompt).logits[0, -1] / temperature).softmax(-1).numpy()
    counts = np.bincount(rollouts.batch.input_ids[:, -1], minlength=len(p))
    expected = 4000 * p
    spread = np.sqrt(expected * (1 - p))
    assert (abs(counts - expected) < 5 * spread + 2).all()
    assert (p > 0).all()
    assert (counts > 0).sum() > 55  # more than a top-50 would leave
    assert rollouts.truncated == pytest.approx(1 - counts[tokenizer.eos_token_id] / 4000)


# --- methods, and the loop that asks them ---------------------------------------------------------

METHODS = sorted(amft.METHODS)


def used(method, **flags):
    """As flags, those that the method reads; a flag that it does not is refused."""
    words = []
    for name, value in flags.items():
        if name not in arguments.METHOD_FLAGS[method].unused:
            words += ["--" + name.replace("_", "-"), str(value)]
    return words


def steps_of(rows):
    return [row for row in rows if row["kind"] == "step"]


def load(folder):
    return LlamaForCausalLM.from_pretrained(folder).eval()


def test_mu_follows_the_logged_meta_gradients(tiny, tmp_path, unevaluated, rewarded):
    """A force of other gradients, of another d theta/d mu, or of another policy's samples."""
    # Every force and every mu again from the log, in a slow loop: a step's own gradients move its
    # own mu, along the d theta/d mu that the steps before it left; so do validation prompts.
    methods, updates = watched("amft")
    rows = tiny_run(tiny, tmp_path / "run", "--steps", "12", "--trace", "0.5", "--eta-h", "0.1",
                    methods=methods)
    config = configured(max_new_tokens=34)
    rows = steps_of(rows)[3:]
    updates = updates[3:]
    model = load(tiny)
    # The second mixed step has a step before it.
    assert "meta_own" not in rows[0] and "meta_grad" not in rows[0]
    assert [row["step"] for row in rows if "meta_grad" in row] == [5, 7, 9, 11]
    for last, update, row in zip(updates, updates[1:], rows[1:]):
        d_theta = last.after["sensitivity"][0]
        batch, scale = update.rollouts.batch, update.advantages.scale
        own = amft.own_meta_gradient(update.g_rl, d_theta, batch, scale)
        assert row["meta_own"] == pytest.approx(own[0], rel=1e-6)
        assert (update.val is None) == ("meta_grad" not in row)
        if update.val:
            val = amft.meta_gradient(put(model, update.theta), d_theta, update.val, config)
            assert (row["meta_grad"], row["meta_se"]) == pytest.approx(val, rel=1e-4)
    total, n = 0.0, 0.0
    for row, update in zip(rows, updates):
        new = []
        if row.get("meta_own"):
            new.append(math.copysign(1, row["meta_own"]))
        if row.get("meta_se") and sum(0 < k < 4 for k in update.val.success.sum(1)) >= 3:
            new.append(row["meta_grad"] / row["meta_se"])
        if new:  # evidence fades where there is new evidence
            total = 0.98 * total + sum(new)
            n = 0.98 * n + len(new)
        odds = [0.2 * math.exp(sign * 0.4 * total - 0.08 * n) for sign in (1, -1)]
        force = 0.45 * (odds[0] - odds[1]) / (1 + sum(odds))
        assert row["meta_force"] == pytest.approx(force)
        assert row["entropy_force"] == pytest.approx(0.1 * (rows[0]["entropy"] - row["entropy"]))
        mu = min(max(0.5 + force + row["entropy_force"], 0.05), 0.95)
        assert row["mu"] == pytest.approx(mu)
    assert sum(row["meta_force"] != 0 for row in rows) >= 4


@pytest.mark.parametrize("utility, seen", [("val", {"meta_grad"}), ("train", {"meta_own"})])
def test_utility_says_whose_success_moves_mu(utility, seen, tiny, tmp_path, unevaluated, rewarded):
    """An estimate that is made though it was not asked for."""
    rows = steps_of(tiny_run(tiny, tmp_path / "run", "--utility", utility))
    assert {"meta_grad", "meta_own"} & set().union(*rows) == seen


def test_the_step_and_its_derivative_hang_together_in_training(
        tiny, tmp_path, unevaluated, rewarded):
    """A step, or its derivative, at another learning rate, mu or state than the loop's."""
    # theta is where torch's own optimiser goes on (1 - mu) g_RL + mu g_SFT, at a learning rate that
    # falls linearly to 0; each d theta/d mu is that of this very step, and is handed the one before
    # at the share trace.
    methods, updates = watched("amft")
    flags = ["--lr", "1e-3", "--trace", "0.7"]
    rows = tiny_run(tiny, tmp_path / "run", *flags, methods=methods)
    assert len(updates) == 9
    rates = [1e-3 * (1 - i / 9) for i in range(9)]
    assert [update.lr for update in updates] == pytest.approx(rates)
    assert [update.mu for update in updates] == [row["mu"] for row in steps_of(rows)]
    thetas = [update.theta for update in updates] + [flat_weights(load(tmp_path / "run" / "final"))]
    torch.testing.assert_close(thetas[0], flat_weights(load(tiny)), rtol=0, atol=0)
    theta = torch.nn.Parameter(thetas[0].clone())
    optimizer = torch.optim.AdamW([theta], weight_decay=0.0)
    last = None
    for update, after in zip(updates, thetas[1:], strict=True):
        theta.grad = (1 - update.mu) * update.g_rl + update.mu * update.g_sft
        torch.nn.utils.clip_grad_norm_([theta], 1.0)
        optimizer.param_groups[0]["lr"] = update.lr
        optimizer.step()
        torch.testing.assert_close(after, theta.detach(), rtol=1e-5, atol=1e-6)
        assert update.adam.step == update.t - 1
        if update.rollouts is None:
            assert update.after["sensitivity"] is None
            continue
        expected = amft.step_sensitivity(
            update.theta, update.g_rl, update.g_sft, update.mu, update.adam, last,
            0.7, lr=update.lr)
        for actual, right in zip(update.after["sensitivity"], expected):
            torch.testing.assert_close(actual, right)
        last = expected
    assert len({update.mu for update in updates[3:]}) == 6
    other = tiny_run(tiny, tmp_path / "other", "--lr", "1e-3", "--trace", "0")
    with_trace, without = ([row.get("meta_own") for row in steps_of(x)] for x in (rows, other))
    assert with_trace != without


def test_sensitivity_fades_once_a_step_however_many_updates_it_has(
        tiny, tmp_path, unevaluated, rewarded):
    """A trace that fades at every update, or a ratio to a policy that did not sample."""
    # All updates of a step belong to its one mu: --trace 0 keeps them all, forgets the step before.
    methods, updates = watched("amft")
    flags = ["--ppo-epochs", "3", "--trace", "0", "--lr", "1e-2", "--utility", "train"]
    tiny_run(tiny, tmp_path / "run", *flags, methods=methods)
    updates = updates[3:]  # the warm-up has one a step
    assert [update.t for update in updates] == [t for t in range(4, 10) for _ in range(3)]
    assert [update.first for update in updates] == [True, False, False] * 6
    assert updates[-1].choices == 9  # mu is chosen once a step
    last = None
    for update in updates:
        trace = 0.0 if update.first else 1.0
        expected = amft.step_sensitivity(
            update.theta, update.g_rl, update.g_sft, update.mu, update.adam, last,
            trace, lr=update.lr)
        for actual, right in zip(update.after["sensitivity"], expected):
            torch.testing.assert_close(actual, right)
        last = expected
    model, config = load(tiny), configured()
    stale = 0
    for i in range(0, 18, 3):
        first, second, third = updates[i:i + 3]
        assert first.mu == second.mu == third.mu
        batch = first.rollouts.batch
        with torch.no_grad():
            at_sampling = amft.logps_of(put(model, first.theta), batch)
        for update in (first, second, third):
            put(model, update.theta)
            g_rl, logps, _ = amft.rl_gradient(model, batch, first.advantages, config, at_sampling)
            close(update.g_rl, g_rl, 1e-4)
            now = amft.rl_gradient(model, batch, first.advantages, config)[0]
            stale += (now - g_rl).norm() > 1e-2 * g_rl.norm()
    assert stale > 6  # it does matter


def test_the_target_entropy_is_measured_once_and_the_look_ahead_is_on_validation_prompts(
        tiny, tmp_path, monkeypatch, unevaluated, rewarded):
    """H* of every step anew; a look-ahead on training prompts, or sampled in another way."""
    seen = spied(monkeypatch, "rollout")
    rows = steps_of(tiny_run(tiny, tmp_path / "run", "--temperature", "1.3"))
    mixed = [row for row in rows if "entropy" in row]
    assert [row["step"] for row in mixed] == [4, 5, 6, 7, 8, 9]
    assert {row["target_entropy"] for row in mixed} == {mixed[0]["entropy"]}
    assert len({row["entropy"] for row in mixed}) > 1
    seen = [call for call in seen if call["max_new_tokens"] == 34]  # loading tries a checkpoint out
    order = "train train val train train val train train val".split()
    for call, role in zip(seen, order, strict=True):
        assert {tasks.ROLES[episode.unit] for episode in call["returns"].episodes} == {role}
        assert call["temperature"] == 1.3
        assert call["samples"] == 4


def loss_of_a_step(model, step, mu, imitation, tau):
    """Eq. 3 of a Step's samples and demonstrations, row by row."""
    loss = 0.0
    if step.rollouts:
        success, batch = step.rollouts.success, step.rollouts.batch
        A = success - others_mean(success)
        A = (A / np.std(A.numpy())).reshape(-1)
        for i in range(len(A)):
            logps = slow_logps(model, batch, i, tau)
            loss = loss - (1 - mu) * A[i] * logps.sum() / batch.response_mask.sum()
    if step.demos:
        for i in range(len(step.demos.input_ids)):
            logps = slow_logps(model, step.demos, i)
            p = logps.exp().detach() if imitation == "rectified" else 1.0
            loss = loss - mu * (p * logps).sum() / step.demos.response_mask.sum()
    return loss


@pytest.mark.parametrize("imitation", ["nll", "rectified"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_every_method_is_the_gradient_of_its_loss(
        method, imitation, tiny, tmp_path, monkeypatch, unevaluated):
    """Through train(): mu, advantages, temperature, stop-gradient and the normalisation at once."""
    hard, easy = ["correct", *3 * ["no_answer"]], [*3 * ["correct"], "no_answer"]
    outcomes = itertools.cycle(3 * hard + 3 * easy)
    graded(monkeypatch, lambda response: next(outcomes))  # whatever is said
    methods, updates = watched(method)
    settings = dict(imitation=imitation, warmup=0, advantage="group", prompts=6, sft_batch=9)
    rows = tiny_run(
        tiny, tmp_path / "run", "--method", method, "--steps", "3", "--temperature", "0.8",
        *used(method, meta_every=3, **settings), methods=methods)
    step, after = updates[:2]
    mu = {"sft": 1.0, "rl": 0.0, "sft-rl": 1.0}.get(method, 0.5)  # sft-rl: the first third is SFT
    assert steps_of(rows)[0]["mu"] == mu
    assert (step.demos is not None) == (mu > 0)
    assert (step.rollouts is not None) == (mu < 1)
    if step.rollouts:
        assert set(step.rollouts.success.sum(1).tolist()) == {1, 3}
    if step.demos:
        assert len(step.demos.input_ids) == 9
    model = load(tiny)
    grad = flat_grad(loss_of_a_step(model, step, mu, imitation, 0.8), model)
    assert steps_of(rows)[0]["grad_norm"] == pytest.approx(grad.norm().item(), rel=2e-3)
    clipped = grad / max(1.0, grad.norm().item())
    close(after.adam.m, 0.1 * clipped, 2e-3)  # Adam's first moment after one step


@pytest.mark.parametrize("advantage", ["gae", "group"])
@pytest.mark.parametrize("method", METHODS)
def test_the_budget_and_batches_without_signal(
        method, advantage, tiny, tmp_path, monkeypatch, unevaluated):
    """Responses not counted, NaN or a move where no prompt, or every prompt, is solved."""
    warmup = {"sft": 6, "rl": 0}.get(method, 1)
    looks = 2 if method == "amft" else 0  # at steps 3 and 5
    settings = dict(prompts=5, sft_batch=10, advantage=advantage, warmup=1, meta_every=2)
    for outcome in ("correct", "no_answer"):
        graded(monkeypatch, lambda response: outcome)
        rows = tiny_run(tiny, tmp_path / outcome, "--method", method, "--steps", "6",
                        *used(method, **settings))
        steps = steps_of(rows)
        assert len(steps) == 6
        sampled = (6 - warmup + looks) * 5 * 4
        assert rows[-1]["rollouts"] == steps[-1]["rollouts"] == sampled
        numbers = [x for row in steps for x in row.values() if isinstance(x, float)]
        assert np.isfinite(numbers).all()
        assert [row["mu"] for row in steps[:warmup]] == [1.0] * warmup
        for row in steps[warmup:]:
            assert row["zero_adv"] == 1
            assert row["success"] == (outcome == "correct")
            assert ("sft_loss" in row) == (method not in ("rl", "sft-rl"))
            assert row["rl_loss"] == row["grad_norm_rl"] == 0
            assert row.get("meta_force", 0) == 0
            if method in ("rl", "sft-rl"):
                assert row["mu"] == row["grad_norm"] == 0


@slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_the_defaults_that_a_user_types(method, tmp_path):
    """A default that one method cannot do with."""
    out = tmp_path / "run"
    flags = ["--smoke", "--device", "cpu", "--eval-n", "8"]
    amft.main(["--method", method, "--out", str(out), *flags])
    assert read(out)[-1]["kind"] == "final"


# --- Algorithm 1 and whole runs -----------------------------------------------------------------


def final_policy(out):
    model = LlamaForCausalLM.from_pretrained(Path(out) / "final")
    return parameters_to_vector(model.parameters()).detach()


def without_clock(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same_run(one, other):
    """Two folders hold the same log, but for the clock, and the same policy bit for bit."""
    assert without_clock(read(one)) == without_clock(read(other))
    assert torch.equal(final_policy(one), final_policy(other))


def fails(argv, capsys, code=2):
    """The one line with which a command ends."""
    capsys.readouterr()
    found = None
    try:
        amft.main([str(word) for word in argv])
    except SystemExit as end:
        found = end.code
    error = capsys.readouterr().err.strip()
    assert found == code, error
    error = error.split("\r")[-1]  # what progress bars left
    assert len(error.splitlines()) == 1 and error.startswith("amft.py: "), error
    return error


def at_call(monkeypatch, owner, name, number, action):
    """Do something as a function is called for the number-th time, then call it."""
    true = getattr(owner, name)
    count = itertools.count(1)

    def acting(*args, **kwargs):
        if next(count) == number:
            action(*args)
        return true(*args, **kwargs)
    monkeypatch.setattr(owner, name, acting)


def cut_off(argv, capsys, monkeypatch, calls, where):
    """A run that ends at so many calls of a function of amft, in the middle of its step."""
    def interrupt(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        at_call(patch, amft, where, calls, interrupt)
        return fails(argv, capsys, code=130)


FIXED = ["--method", "fixed", "--warmup", "0", "--steps", "2", "--advantage", "group"]


@pytest.mark.parametrize("mu, unread", [("1", "rl_gradient"), ("0", "sft_gradient")])
def test_at_mu_one_rl_cannot_matter_and_at_mu_zero_sft_cannot(
        mu, unread, tiny, tmp_path, monkeypatch, unevaluated, rewarded):
    """Would catch a mixture (Eq. 3) with mu on the wrong side, or off: noise for that gradient."""
    tiny_run(tiny, tmp_path / "plain", *FIXED, "--mu", mu)
    tiny_run(tiny, tmp_path / "half", *FIXED, "--mu", "0.5")
    true = getattr(amft, unread)

    def noise(*args):
        grad, *rest = true(*args)
        return torch.randn_like(grad), *rest
    monkeypatch.setattr(amft, unread, noise)
    tiny_run(tiny, tmp_path / "noise", *FIXED, "--mu", mu)
    plain = final_policy(tmp_path / "plain")
    assert torch.equal(plain, final_policy(tmp_path / "noise"))
    assert not torch.equal(plain, final_policy(tmp_path / "half"))


def test_a_policy_that_solves_nothing_learns_by_sft_alone(
        tiny, tmp_path, monkeypatch, unevaluated):
    """Would catch an RL gradient without a reward: it must move as mu L_SFT alone would."""
    monkeypatch.setattr(tasks.Deal, "grade", lambda self, text: "no_answer")
    rows = tiny_run(tiny, tmp_path / "silent", *FIXED, "--mu", "0.4")
    true = amft.rl_gradient

    def nothing(*args):
        grad, *rest = true(*args)
        return 0 * grad, *rest
    monkeypatch.setattr(amft, "rl_gradient", nothing)
    tiny_run(tiny, tmp_path / "sft", *FIXED, "--mu", "0.4")
    assert torch.equal(final_policy(tmp_path / "silent"), final_policy(tmp_path / "sft"))
    steps = [row for row in rows if row["kind"] == "step"]
    assert all(row["zero_adv"] == 1 for row in steps)
    assert all(row["rl_loss"] == 0 for row in steps)


def test_paper_controller_is_equation_6_to_the_letter(
        tiny, tmp_path, unevaluated, rewarded, monkeypatch):
    """Would catch --controller paper with a trace, its own prompts, or another rule than Eq. 6."""
    derivatives = spied(monkeypatch, "step_sensitivity")
    rows = tiny_run(tiny, tmp_path / "run", "--controller", "paper", "--eta-mu", "3")
    assert rows[0]["utility"] == "val"
    assert rows[0]["trace"] == 0.0
    assert [said["trace"] for said in derivatives] == [0.0] * 6
    mu = 0.5
    mixed = [row for row in rows if row["kind"] == "step" and row["step"] > 3]
    assert any("meta_grad" in row for row in mixed)
    for row in mixed:
        assert "meta_own" not in row
        assert row["meta_force"] == pytest.approx(3 * row.get("meta_grad", 0.0))
        entropy_force = 0.1 * (row["target_entropy"] - row["entropy"])
        mu = min(max(mu + row["meta_force"] + entropy_force, 0.05), 0.95)
        assert row["mu"] == pytest.approx(mu)


# --- the log


def test_same_seed_same_log(tiny, tmp_path):
    """Would catch noise that is not the seed's, also in the evaluations; and a seed unread."""
    few = ["--eval-n", "4", "--val-every", "4"]
    first = tiny_run(tiny, tmp_path / "first", *few)
    again = tiny_run(tiny, tmp_path / "again", *few)
    other = tiny_run(tiny, tmp_path / "other", *few, "--seed", "1")
    assert without_clock(first) == without_clock(again)
    assert without_clock(first)[1:] != without_clock(other)[1:]


ALWAYS = {"step", "mu", "sft_loss", "grad_norm", "grad_norm_rl", "grad_norm_sft", "rollouts",
          "seconds"}
MIXED = ALWAYS | {"meta_force", "entropy_force", "target_entropy", "entropy", "rl_loss", "success",
                  "zero_adv", "response_len", "truncated"}
META = {"meta_grad", "meta_se"}


def test_every_key_of_the_log_is_there(tiny, tmp_path):
    """Would catch a row or a key that tables and figures read and the log has no more."""
    rows = tiny_run(tiny, tmp_path / "run", "--eval-n", "4", "--val-every", "4")
    splits = set(tasks.GeneralPoints.splits)
    kinds = Counter(row["kind"] for row in rows)
    assert kinds == {"config": 1, "step": 9, "eval": 2 * len(splits) + 2, "final": 1}
    assert rows[-1]["kind"] == "final"
    assert {"seed", "lr", "torch", "device", "threads"} <= set(rows[0])
    steps = [row for row in rows if row["kind"] == "step"]
    for row in steps:
        assert (MIXED if row["step"] > 3 else ALWAYS) <= set(row)
        assert META & set(row) == (META if row["step"] in (5, 7, 9) else set())
    # The warm-up samples nothing; three looks at validation prompts have 8 x 4 each.
    assert steps[-1]["rollouts"] == (6 + 3) * 8 * 4
    for row in [row for row in rows if row["kind"] == "eval"]:
        assert row["split"] in splits
        assert row["n"] == 4
        assert sum(row["outcomes"].values()) == 4 * row["samples"]
        assert 0 <= row["low"] <= row["success"] <= row["high"] <= 1
        assert row["success"] <= row["any"] <= 1


def noise_of_steps(monkeypatch, tiny, out, *flags):
    """[(seed of torch's noise, indices of the prompts)] of each step, and the training problems."""
    seen, problems = [], []
    true = amft.Method.choose_prompts
    training = tasks.GeneralPoints.training

    def choose_prompts(self, step):
        indices = true(self, step)
        seen.append((torch.initial_seed(), tuple(indices)))
        return indices

    def drawn(self, n, rng):
        problems.extend(training(self, n, rng))
        return problems
    with monkeypatch.context() as patch:
        patch.setattr(amft.Method, "choose_prompts", choose_prompts)
        patch.setattr(tasks.GeneralPoints, "training", drawn)
        tiny_run(tiny, out, "--method", "rl", "--steps", "3", *flags)
    return seen, [problem.prompt for problem in problems]


def test_each_step_of_each_seed_has_its_own_noise_and_problems(
        tiny, tmp_path, monkeypatch, unevaluated):
    """Would catch noise, prompts or demonstrations drawn by the seed or the step's number alone."""
    seen, problems = noise_of_steps(monkeypatch, tiny, tmp_path / "0")
    more, others = noise_of_steps(monkeypatch, tiny, tmp_path / "1", "--seed", "1")
    noises, prompts = zip(*seen, *more)
    assert len(set(noises)) == 6
    assert len(set(prompts)) == 6
    assert len(problems) == len(others) == 200
    assert len(set(problems) & set(others)) < 100


def test_val_every_looks_at_the_policy_of_these_steps(tiny, tmp_path, monkeypatch):
    """Would catch an evaluation a step early or late, twice at the end, or of other splits."""
    def norm(model, tokenizer, task, config, split, temperature, samples):
        size = amft.flatten(model).norm().item()
        return dict(split=split, n=1, samples=1, success=size, low=size, high=size, any=size, hits=[])
    monkeypatch.setattr(amft, "evaluate", norm)
    updates = spied(monkeypatch, "adamw_step")
    rows = tiny_run(tiny, tmp_path / "run", "--method", "sft", "--val-every", "3")
    evals = [row for row in rows if row["kind"] == "eval"]
    splits = list(tasks.GeneralPoints.splits)
    expected = [(0, split, True) for split in splits]
    expected += [(3, "val", False), (6, "val", False)]
    expected += [(9, split, True) for split in splits]
    assert [(row["step"], row["split"], row["whole"]) for row in evals] == expected
    sizes = [updates[0]["theta"].norm().item()]
    sizes += [said["returns"][0].norm().item() for said in updates]
    assert len(set(sizes)) == 10
    for row in evals:
        assert row["success"] == pytest.approx(sizes[row["step"]], rel=1e-6)


def counted(rollouts, stops):
    """(tokens of each conversation, [did it end?] of each response), row by row by hand."""
    lengths, ended = [], []
    batch = rollouts.batch
    for ids, mask in zip(batch.responses.tolist(), batch.response_mask.tolist()):
        lengths.append(sum(mask))
        for t, own in enumerate(mask):
            if own and (t + 1 == len(mask) or not mask[t + 1]):  # a response's last token
                ended.append(ids[t] in stops)
    return lengths, ended


def test_what_the_log_counts_of_conversations(
        tiny, tmp_path, monkeypatch, unevaluated, rewarded, tokenizer):
    """Would catch truncated of conversations, not responses; lengths or zero_adv of other axes."""
    stops = [tokenizer.eos_token_id, *range(0, len(tokenizer), 20)]  # so that many do end
    monkeypatch.setattr(amft, "stop_token_ids", lambda model: stops)
    looks = spied(monkeypatch, "rollout")
    rows = tiny_run(tiny, tmp_path / "run", "--task", "gp-turns", "--method", "fixed",
                    "--warmup", "0", "--steps", "4", "--samples", "3")
    rows = [row for row in rows if row["kind"] == "step"]
    looks = looks[-4:]  # a foreign checkpoint's check had one before
    some_alike = 0
    for row, look in zip(rows, looks):
        rollouts = look["returns"]
        lengths, ended = counted(rollouts, stops)
        assert len(ended) == sum(len(episode.responses) for episode in rollouts.episodes)
        assert len(ended) > len(rollouts.episodes)  # some had several turns
        assert 0 < row["truncated"] < 1
        assert row["truncated"] == pytest.approx(1 - np.mean(ended))
        assert row["response_len"] == pytest.approx(np.mean(lengths))
        solved = [episode.success for episode in rollouts.episodes]
        groups = [solved[3 * p:3 * p + 3] for p in range(8)]
        alike = [len(set(group)) == 1 for group in groups]
        some_alike += 0 < sum(alike) < 8
        assert row["zero_adv"] == pytest.approx(np.mean(alike))
        assert row["success"] == pytest.approx(np.mean(solved))
    assert some_alike


# --- kill and resume


@pytest.mark.parametrize("flags", [
    [],
    ["--advantage", "group", "--reward", "graded"],
    ["--method", "fixed"],
    ["--method", "sft-rl"],
    ["--ppo-epochs", "2", "--trace", "0.9", "--utility", "train", "--val-every", "2"],
])
def test_an_interrupted_run_goes_on_bit_for_bit(
        tiny, tmp_path, flags, monkeypatch, unevaluated, rewarded, capsys):
    """Would catch state that --resume forgets: cut off in the warm-up, then in a mixed step."""
    monkeypatch.setattr(running, "SAVE_SECONDS", -1)
    folder = tmp_path / "run"
    whole = tiny_run(tiny, tmp_path / "unbroken", *flags, "--steps", "10")
    if "--method" not in flags:
        moving = [row["mu"] for row in whole if row["kind"] == "step" and row["step"] > 6]
        assert len(set(moving)) == 4
        assert all(0.05 < mu < 0.95 for mu in moving)
    argv = tiny_argv(tiny, folder, *flags, "--steps", "10")
    error = cut_off(argv, capsys, monkeypatch, 2, "sft_gradient")
    assert f"--resume {folder} goes on after step 1" in error
    updates = 8 if "--ppo-epochs" in flags else 5  # to the middle of step 6
    cut_off(["--resume", folder], capsys, monkeypatch, updates, "adamw_step")
    assert len(read(folder, "step")) == 5
    assert not (folder / "final").exists()
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"kind": "step", "step": 99, "half a li')
    amft.main(["--resume", str(folder)])
    same_run(folder, tmp_path / "unbroken")
    assert "unfinished" in fails(["--resume", folder], capsys)


def test_a_run_that_is_older_than_its_last_state_starts_from_there(
        tiny, tmp_path, monkeypatch, unevaluated, rewarded, capsys):
    """Would catch steps since the last state that are kept in the log and done again."""
    tiny_run(tiny, tmp_path / "unbroken")
    monkeypatch.setattr(running, "SAVE_SECONDS", 1e9)
    folder = tmp_path / "run"
    error = cut_off(tiny_argv(tiny, folder), capsys, monkeypatch, 7, "sft_gradient")
    assert "after step 0" in error
    assert len(read(folder, "step")) == 6
    amft.main(["--resume", str(folder)])
    same_run(folder, tmp_path / "unbroken")


def test_a_run_without_a_state_or_a_step_begins_anew(
        tiny, tmp_path, monkeypatch, unevaluated, capsys):
    """Would catch evaluations of before the first step that stay in the log twice."""
    tiny_run(tiny, tmp_path / "unbroken")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        def interrupt(*_):
            raise KeyboardInterrupt
        at_call(patch, amft, "evaluate", 5 + 2 + 2 + 1, interrupt)  # of two temperatures off val
        assert "--resume" not in fails(tiny_argv(tiny, folder), capsys, code=130)
    assert len(read(folder, "eval")) == 3
    assert not (folder / "state.pt").exists()
    amft.main(["--resume", str(folder)])
    same_run(folder, tmp_path / "unbroken")


def test_interrupted_while_a_state_is_written_the_one_before_is_whole(
        tiny, tmp_path, monkeypatch, unevaluated, rewarded):
    """Would catch a state that is written in place."""
    tiny_run(tiny, tmp_path / "unbroken")
    monkeypatch.setattr(running, "SAVE_SECONDS", -1)
    true = Path.write_bytes

    def half(path, state):
        true(path, state[:100])
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        at_call(patch, Path, "write_bytes", 7, half)
        with pytest.raises(SystemExit):
            amft.main(tiny_argv(tiny, tmp_path / "run"))
    amft.main(["--resume", str(tmp_path / "run")])
    same_run(tmp_path / "run", tmp_path / "unbroken")


def wait_for(process, ready):
    while process.poll() is None and not ready():
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed: more steps"


@slow
def test_killed_run_goes_on_bit_for_bit(tiny, tmp_path):
    """Would catch state that only lives in the process: by SIGTERM and by SIGKILL, in its own."""
    program = [sys.executable, amft.__file__]
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    log = killed / "metrics.jsonl"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([*program, *tiny_argv(tiny, killed, "--steps", "400")], **quiet)
    wait_for(process, lambda: log.exists() and len(read(killed, "step")) > 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    reached = len(read(killed, "step"))
    assert reached > 5
    process = subprocess.Popen([*program, "--resume", str(killed)], **quiet)
    wait_for(process, lambda: len(read(killed, "step")) > reached + 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "final").exists()
    subprocess.run([*program, "--resume", str(killed)], check=True)
    subprocess.run([*program, *tiny_argv(tiny, unbroken, "--steps", "400")], check=True)
    same_run(killed, unbroken)


# --- evaluation


def test_eval_only_repeats_the_runs_last_evaluation(tiny, tmp_path, capsys, rewarded):
    """Would catch a policy in final/ that is not the one that was evaluated, or other noise."""
    rows = tiny_run(tiny, tmp_path / "run", "--eval-n", "4", "--steps", "3")
    capsys.readouterr()
    final = str(tmp_path / "run" / "final")
    amft.main(["--eval-only", "--model", final, "--eval-n", "4", "--eval-samples", "4", "--device", "cpu",
               "--max-new-tokens", "34"])
    printed = capsys.readouterr().out
    last = [row for row in rows if row["kind"] == "eval" and row["step"] == 3]
    assert len(last) == len(tasks.GeneralPoints.splits)
    for row in last:
        assert 0 < row["success"] < 1
        best = re.escape(f"{100 * row['best'][0]:.1f}")
        assert re.search(rf"\({row['split']}\).* {best}% \[.* {100 * row['success']:.1f}\n", printed)


def test_an_evaluation_reports_the_responses_of_its_episodes_at_its_temperature(base):
    """Would catch other episodes, noise or temperature than said: once more by hand."""
    model, tokenizer = base
    task = tasks.GeneralPoints()
    config = configured(eval_n=20)
    row = amft.evaluate(model, tokenizer, task, config, "id", 0.9, samples=3, at_once=21)
    again = amft.evaluate(model, tokenizer, task, config, "id", 0.9, samples=3, at_once=21)
    assert row == again
    episodes = task.episodes("id", 20)
    assert row["n"] == 20
    assert row["samples"] == 3
    torch.manual_seed(0)
    played = []
    for start in range(0, 20, 7):
        part = episodes[start:start + 7]
        played += amft.rollout(model, tokenizer, part, 3, 40, 0.9).episodes
    assert [episode.unit for episode in played] == [e.unit for e in episodes for _ in range(3)]
    success = [episode.success for episode in played]
    assert row["success"] == pytest.approx(np.mean(success))
    assert sum(row["outcomes"].values()) == 60
    hits = [sum(success[3 * i:3 * i + 3]) for i in range(20)]
    assert row["hits"] == hits
    assert row["any"] == pytest.approx(np.mean([hit > 0 for hit in hits]))
    interval = tasks.interval([(episode.success, episode.unit) for episode in played])
    assert (row["success"], row["low"], row["high"]) == pytest.approx(interval)


def test_interval_covers_when_deals_come_in_clusters():
    """Would catch an interval that counts episodes, not multisets, which are solved as a whole."""
    rng = random.Random(SEED)
    covered = narrow = 0
    for _ in range(400):
        solved = [rng.random() < 0.4 for _ in range(60)]
        units = [rng.randrange(60) for _ in range(1000)]
        share, low, high = tasks.interval([(solved[unit], unit) for unit in units])
        covered += low <= 0.4 <= high
        narrow += high - low < 0.1
    assert 0.89 < covered / 400 < 0.99  # about 95%
    assert narrow == 0


def test_interval_without_clusters_is_wilsons():
    """Would catch another formula than Wilson's of 1927, for 30 of 100 and at the edge."""
    share, low, high = tasks.interval([(i < 30, i) for i in range(100)])
    assert (share, low, high) == pytest.approx((0.3, 0.2189, 0.3958), abs=1e-3)
    share, low, high = tasks.interval([(False, i) for i in range(50)])
    assert share == low == 0
    assert 0.06 < high < 0.08


# --- whole runs


@pytest.mark.parametrize("flags, mus", [
    ([], [1, 1, 0, 0]),
    (["--warmup", "1"], [1, 0, 0, 0]),
    (["--warmup", "3"], [1, 1, 1, 0]),
])
def test_sft_then_rl_switches_at_the_warm_up_or_half_way(
        flags, mus, tiny, tmp_path, monkeypatch, unevaluated):
    """Would catch RL alone with General Points' own defaults, which have no warm-up."""
    monkeypatch.setattr(tasks.GeneralPoints, "defaults", {**GP_DEFAULTS, "warmup": 0})
    smoke = {name: value for name, value in arguments.SMOKE.items() if name != "warmup"}
    monkeypatch.setattr(arguments, "SMOKE", smoke)
    tiny_run(tiny, tmp_path / "run", "--method", "sft-rl", "--steps", "4", *flags)
    rows = read(tmp_path / "run", "step")
    assert [row["mu"] for row in rows] == mus
    assert ["sft_loss" in row for row in rows] == [mu == 1 for mu in mus]
    assert ["success" in row for row in rows] == [mu == 0 for mu in mus]


def test_micro_batches_do_not_change_a_run(tiny, tmp_path, unevaluated, rewarded):
    """Would catch losses that are divided by a micro-batch's tokens, not the batch's."""
    for size in ("16384", "400"):
        flags = ["--micro-tokens", size, "--steps", "5", "--method", "fixed"]
        tiny_run(tiny, tmp_path / size, *flags)
    whole = final_policy(tmp_path / "16384")
    parts = final_policy(tmp_path / "400")
    start = LlamaForCausalLM.from_pretrained(tiny)
    moved = whole - parameters_to_vector(start.parameters()).detach()
    # Adam's step of an entry with next to no gradient has any sign: most entries, not every one.
    near = (whole - parts).abs() < 0.02 * moved.abs().max()
    assert near.float().mean() > 0.97


def test_amft_learns(tmp_path, monkeypatch):
    """Would catch a loop that runs and does not learn: from the shipped base, on 12 multisets."""
    small = [multiset for multiset, role in tasks.ROLES.items()
             if role == "train" and max(multiset) <= 10 and tasks.solve(multiset)]
    few = random.Random(SEED).sample(small, 12)
    roles = {multiset: role if role != "train" or multiset in few else "unused"
             for multiset, role in tasks.ROLES.items()}
    monkeypatch.setattr(tasks, "ROLES", roles)
    monkeypatch.setattr(tasks.GeneralPoints, "splits", {"id": "these 12"})
    amft.main(["--task", "gp", "--warmup", "50", "--steps", "56", "--prompts", "8", "--lr", "1e-3",
               "--demos", "1000", "--out", str(tmp_path / "run"), "--device", "cpu"])
    rows = read(tmp_path / "run", "eval")
    assert [row["n"] for row in rows] == [12, 12]
    first, last = (row["success"] for row in rows)
    assert last > 1.5 * first, (first, last)
    assert last > first + (1 - first) / 5, (first, last)



# --- Conversations of the policy with a task ---

ALL_TASKS = list(tasks.TASKS)
TEXT_TASKS = [name for name in ALL_TASKS if not name.endswith("-vl")]


def shipped(name, **options):
    """(task, model, tokenizer, config): a task, and the policy that lies here for it."""
    task = tasks.TASKS[name](**options)
    room = task.defaults.get("max_new_tokens", amft.Config.max_new_tokens)
    config = configured(task=name, max_new_tokens=room)
    model, tokenizer = loading.load_policy(config, task, amft)
    return task, model, tokenizer, config


def drawn(task, n, split="train", seed=SEED):
    """n episodes of a split."""
    rng = random.Random(seed)
    return [task.sample(split, rng) for _ in range(n)]


def ends_of_responses(batch):
    """(B, T), True on each response's last token: what follows is shown, padding or nothing."""
    mask = batch.response_mask.bool()
    following = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    return mask & ~following


def alone(model, batch, row):
    """Log-probabilities of a row's own tokens by a plain forward pass: no padding, no company."""
    if batch.images[row]:
        pixels = np.stack(batch.images[row]).transpose(0, 3, 1, 2)
        pixels = torch.tensor(pixels) / 127.5 - 1  # black is -1, white 1
        model = partial(model, pixel_values=pixels)
    return slow_logps(model, batch, row)


def entropies_of(model, batch):
    """(B, T), at temperature 1, of the logits that training sees."""
    with torch.no_grad():
        logps = amft.response_outputs(model, batch)[0].log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


@pytest.fixture(scope="module", params=ALL_TASKS)
def played(request):
    """Conversations of a shipped policy, so hot that it fails, tries again and is cut off."""
    task, model, tokenizer, config = shipped(request.param)
    episodes = drawn(task, 4)
    torch.manual_seed(SEED)
    with pytest.MonkeyPatch.context() as patch:
        replies = spied(patch, "generate_reply")
        rollouts = amft.rollout(
            model, tokenizer, episodes, 3, config.max_new_tokens, temperature=2.0)
    if request.param in ("gp-turns", "virl", "virl-vl"):
        T = rollouts.batch.response_mask.shape[1]
        assert max(len(episode.responses) for episode in rollouts.episodes) > 1
        assert (rollouts.batch.attention_mask[:, -T:] == 0).any()
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, episodes=episodes, rollouts=rollouts, replies=replies)


def test_conversations_alone_and_in_company(played):
    """Padding, holes, positions or pictures that change what training sees of a conversation."""
    demos = amft.encode_demos(played.model, played.tokenizer, played.episodes)
    for batch in (played.rollouts.batch, demos):
        with torch.no_grad():
            together = amft.logps_of(played.model, batch)
            by_itself = [alone(played.model, batch, row) for row in range(len(batch.input_ids))]
        for row, expected in enumerate(by_itself):
            own = together[row][batch.response_mask[row].bool()]
            torch.testing.assert_close(own, expected, rtol=1e-3, atol=2e-3)


def test_rows_of_a_batch_keep_their_pictures(played):
    """A micro-batch whose pictures belong to other rows."""
    batch = played.rollouts.batch
    for row in range(len(batch.input_ids)):
        for rows in (slice(row, row + 1), torch.tensor([row])):
            part = batch.rows(rows)
            assert torch.equal(part.input_ids, batch.input_ids[row:row + 1])
            assert torch.equal(part.attention_mask, batch.attention_mask[row:row + 1])
            assert torch.equal(part.response_mask, batch.response_mask[row:row + 1])
            assert len(part.images) == 1 and len(part.images[0]) == len(batch.images[row])
            for picture, expected in zip(part.images[0], batch.images[row]):
                assert np.array_equal(picture, expected)


def test_what_is_attended_to_is_the_conversation(played):
    """Attention to padding, to a hole, or to anything but prompt, responses and observations."""
    batch = played.rollouts.batch
    for row, episode in enumerate(played.rollouts.episodes):
        replay = copy.copy(played.episodes[row // 3])
        expected = replay.prompt
        for response in episode.responses:
            shown, _, done = replay.step(response)
            expected += response
            if not done:
                expected += shown
        if played.model.config.model_type == "llava":  # a token for each of a picture's patches
            expected = expected.replace(tasks.IMAGE, 16 * tasks.IMAGE)
        attended = batch.input_ids[row][batch.attention_mask[row].bool()]
        text = played.tokenizer.decode(attended)
        assert text.replace("<eos>", "") == expected
        # One end a response, and one for each turn that the others go on without this row.
        inside = re.sub("(<eos>)+$", "", text)
        assert inside.count("<eos>") <= len(episode.responses) - 1


def test_what_was_graded_is_what_was_said(played):
    """A response that goes on after its end, or that is graded as another text than the batch's."""
    batch = played.rollouts.batch
    for row, episode in enumerate(played.rollouts.episodes):
        own = batch.response_mask[row].bool()
        spoken = played.tokenizer.decode(batch.responses[row][own])
        assert own.any() and len(episode.responses) == len(episode.history)
        assert spoken.count("<eos>") <= len(episode.responses)
        assert spoken.replace("<eos>", "") == "".join(episode.responses)


def test_points_stand_on_the_last_token_of_each_response(played):
    """Points on a response's first token, on another turn, or off the policy's tokens."""
    rollouts = played.rollouts
    last = ends_of_responses(rollouts.batch)
    assert last.sum() < rollouts.batch.response_mask.sum()
    for row, episode in enumerate(rollouts.episodes):
        points = [episode.outcomes[outcome][0] for outcome in episode.history]
        assert rollouts.rewards[row][last[row]].tolist() == pytest.approx(points)
        assert (rollouts.rewards[row][~last[row]] == 0).all()


def test_every_token_is_sampled_from_the_policy_that_is_trained(played):
    """A cache, a hole or a position by which sampling saw other distributions than training."""
    batch = played.rollouts.batch
    trained = entropies_of(played.model, batch)
    start = batch.input_ids.shape[1] - batch.response_mask.shape[1]  # of the first response
    spoken = 0
    for call in played.replies:
        reply = call["returns"]
        first = call["input_ids"].shape[1] - start
        columns = slice(first, first + reply.ids.shape[1])
        own = reply.mask.bool()
        assert torch.equal(reply.ids[own], batch.responses[:, columns][own])
        torch.testing.assert_close(
            reply.entropy[own], trained[:, columns][own], rtol=1e-3, atol=3e-3)
        spoken += own.sum().item()
    assert spoken == batch.response_mask.sum().item()


def test_entropy_is_that_of_the_policys_own_tokens(tiny, tokenizer):
    """An entropy that counts what a finished response is padded with."""
    task = tasks.GeneralPoints()
    model, _ = loading.load_policy(configured(model=tiny, max_new_tokens=34), task, amft)
    seen = amft.rollout(model, tokenizer, drawn(task, 16), 16, 60)
    lengths = seen.batch.response_mask.sum(1)
    assert lengths.min() < lengths.max()
    total = (entropies_of(model, seen.batch) * seen.batch.response_mask).sum()
    assert seen.entropy == pytest.approx(total.item() / lengths.sum().item(), rel=1e-4)


def test_a_conversation_ends_where_the_next_response_might_not_fit(tiny, tokenizer):
    """The check of room, one token or one response too early or too late."""
    task = tasks.GeneralPoints(turns=3)
    model, _ = loading.load_policy(configured(model=tiny, max_new_tokens=34), task, amft)

    def tokens_and_turns(room):
        torch.manual_seed(SEED)
        model.config.max_position_embeddings = room
        rollouts = amft.rollout(model, tokenizer, drawn(task, 8), 2, 34)
        turns = max(len(episode.responses) for episode in rollouts.episodes)
        return rollouts.batch.input_ids.shape[1], turns, rollouts.truncated
    width, turns, truncated = tokens_and_turns(10 ** 6)
    assert turns == 3 and truncated > 0.5  # so that some response in the last turn is a longest one
    assert tokens_and_turns(width)[:2] == (width, 3)
    shorter, turns, _ = tokens_and_turns(width - 1)
    assert turns == 2 and shorter < width - 34


def test_demonstrations_teach_what_is_right_and_show_what_went_wrong():
    """A loss on a wrong response, or an expert's answer without the failure that it follows."""
    task, model, tokenizer, _ = shipped("gp", turns=2)
    deal = next(deal for deal in drawn(task, 100) if deal.slips)
    batch = amft.encode_demos(model, tokenizer, [deal])
    taught = tokenizer.decode(batch.responses[0][batch.response_mask[0].bool()])
    assert taught == deal.expert + "<eos>"
    feedback = tasks.FEEDBACK.format(deal.outcomes["wrong_result"][1]) + "\n"
    whole = deal.prompt + deal.slips[0] + "<eos>" + feedback + deal.expert + "<eos>"
    assert tokenizer.decode(batch.input_ids[0]) == whole


@pytest.mark.parametrize("name", ALL_TASKS)
def test_rewards_and_gradients_of_whole_conversations(name):
    """Success that is paid per turn, an RL gradient that is not the textbook's over all turns."""
    task, model, tokenizer, config = shipped(name)
    config.advantage = "group"
    seen = amft.rollout(model, tokenizer, drawn(task, 4), 4, config.max_new_tokens)
    assert seen.success.reshape(-1).tolist() == [float(e.success) for e in seen.episodes]
    if not seen.success.std(1).any():  # no signal by chance
        seen = seen._replace(success=(torch.arange(16).view(4, 4) % 3 == 0).float())
    config.micro_tokens = 3 * seen.batch.input_ids.shape[1]
    advantages = amft.advantages_of(model, None, seen, config)
    grad, _, _ = amft.rl_gradient(model, seen.batch, advantages, config)
    weights = seen.success - others_mean(seen.success)
    weights = (weights / weights.std(correction=0)).flatten()
    n_tokens = seen.batch.response_mask.sum()
    rows = []
    for row in range(16):
        logps = alone(model, seen.batch, row)
        rows.append(flat_grad(-weights[row] * logps.sum() / n_tokens, model))
    # Where a prompt's samples are alike, theirs cancel: the largest row is the error's yardstick.
    largest = max(row.norm() for row in rows)
    assert (grad - sum(rows)).norm() <= 5e-3 * largest and largest > 0


# --- Chat templates ---

CHAT = ("{% for m in messages %}"
        "{% if m.role == 'user' %} where {{ m.content }}\n"
        "{% else %}Turn {{ m.content }}<eos>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}Turn {% endif %}")


def test_a_chat_model_gets_its_own_template_turn_by_turn(tokenizer):
    """Prompt, response and observation that do not add up to the template's conversation."""
    model = shipped("gp")[1]
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = CHAT
    said = [dict(role="user", content="3 + 4"),
            dict(role="assistant", content="8"),
            dict(role="user", content="10")]
    whole = chat.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    prompt = amft.encode_text(model, chat, "3 + 4")
    response = chat("8")["input_ids"] + [chat.eos_token_id]
    observation = amft.encode_text(model, chat, "10", first=False)
    text = chat.decode(prompt + response + observation)
    assert text == whole and text.count("Turn ") == 2  # asked to speak at each turn


@pytest.mark.parametrize(
    "template", [None, CHAT, "{{ bos_token }}" + CHAT], ids=["none", "without BOS", "with BOS"])
def test_a_conversation_begins_once(tokenizer, template):
    """A second BOS before a chat template that has one, or one before an observation."""
    task, model, _, _ = shipped("gp", turns=2)
    begins = copy.deepcopy(tokenizer)
    begins.add_special_tokens(dict(bos_token="<bos>"))
    bos = begins.bos_token_id
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)])
    assert begins("3 + 4")["input_ids"].count(bos) == 1  # it adds one by itself, as Llama's do
    begins.chat_template = template
    n = 0 if template == CHAT else 1
    prompt = amft.encode_text(model, begins, "3 + 4")
    assert prompt.count(bos) == n and (prompt[0] == bos) == (n == 1)
    assert bos not in amft.encode_text(model, begins, "10", first=False)
    deals = [deal for deal in drawn(task, 60) if deal.slips][:5]
    batch = amft.encode_demos(model, begins, deals)
    assert (batch.input_ids == bos).sum(1).tolist() == [n] * 5
    assert not (batch.responses == bos).any()


# --- Every task ---

class Sums(tasks.Episode):
    """A task as a student would add it: a + b, in three attempts."""
    outcomes = {"correct": (1.0, ""), "wrong": (-1.0, "your formula is not a formula")}
    attempts = 3

    def __init__(self, a, b):
        self.a = a
        self.b = b

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


def test_a_new_task_in_thirty_lines(tiny, tmp_path, monkeypatch):
    """A task that needs more than a subclass of Episode and one of Task."""
    monkeypatch.setitem(tasks.TASKS, "sums", Addition)
    rows = tiny_run(tiny, tmp_path / "sums", "--task", "sums", "--max-new-tokens", "5")
    evals = [row for row in rows if row["kind"] == "eval"]
    assert rows[-1]["kind"] == "final"
    assert {row["split"] for row in evals} == {"val", "heldout"}
    for row in evals:  # one to three responses in each conversation
        conversations = row["n"] * row["samples"]
        assert conversations <= sum(row["outcomes"].values()) <= 3 * conversations
        assert 0 <= row["first_try"][0] <= row["success"]
    turns = Sums(2, 3).demonstration()
    assert [(turn.response, turn.learn) for turn in turns] == [("5", True)]


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_every_task_runs(name, tiny, tmp_path, monkeypatch):
    """A task that cannot be trained on, or a log without what its conversations tell."""
    splits = dict(list(tasks.TASKS[name].splits.items())[:2])
    monkeypatch.setattr(tasks.TASKS[name], "splits", splits)
    length = "90" if name == "math" else "60"
    rows = tiny_run(
        tiny, tmp_path / name, "--task", name, "--max-new-tokens", length, "--prompts", "3",
        "--steps", "3", "--warmup", "1", "--eval-n", "4", "--meta-every", "2")
    kinds = Counter(row["kind"] for row in rows)
    assert kinds == {"config": 1, "step": 3, "eval": 2 * len(splits), "final": 1}
    assert "val" in splits and "meta_grad" in read(tmp_path / name, "step")[-1]
    for row in read(tmp_path / name, "eval"):
        assert ("step_accuracy" in row) == (name in ("virl", "gp-turns"))
        assert ("recognition" in row) == (name == "virl")
        shares = [row[key] for key in ("step_accuracy", "first_try", "recognition") if key in row]
        assert all(0 <= low <= share <= high <= 1 for share, low, high in shares)


@pytest.mark.parametrize("name", ALL_TASKS)
def test_the_shipped_policies_are_above_chance_and_below_saturation(name):
    """A base that knows nothing of a task, so that RL has no signal, or has nothing to learn."""
    task, model, tokenizer, config = shipped(name)
    config.eval_n = 24
    row = amft.evaluate(model, tokenizer, task, config, "id", 1.0, 2)
    assert 0 < row["success"] < 1 and sum(row["outcomes"].values()) >= 24


def test_tasks_know_nothing_of_a_model():
    """An import in tasks.py of torch or transformers, which takes seconds."""
    code = "import sys, tasks; print({'torch', 'transformers', 'amft'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert shown.stdout == "set()\n", shown.stderr


def test_a_task_is_shown_at_once(tmp_path):
    """python tasks.py --show that takes long, misses a split, or leaves files of a task in text."""
    before = sum(os.times()[2:4])
    argv = [sys.executable, str(HERE / "tasks.py"), "--show", "gp"]
    shown = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert sum(os.times()[2:4]) - before < 1.5  # seconds of a processor; torch alone takes more
    assert shown.returncode == 0 and shown.stderr == ""
    for split in ("train", *tasks.GeneralPoints.splits):
        assert f"--- {split}: " in shown.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("turns", [0, 3])
@pytest.mark.parametrize("name", ALL_TASKS)
def test_every_demonstration_is_graded_correct(name, turns):
    """An expert that fails on a split, a slip that is learned, an episode that playing changes."""
    task = tasks.TASKS[name](turns=turns)
    rng = random.Random(SEED)
    for split in ["train", *task.splits]:
        for _ in range(200):
            episode = task.sample(split, rng)
            assert episode.attempts == (turns or type(task).turns or type(episode).attempts)
            replay = copy.copy(episode)
            shown = replay.prompt
            done = False
            total = 0.0
            for turn in episode.demonstration():
                assert not done and turn.shown == shown
                assert (turn.image is None) == (tasks.IMAGE not in shown)
                assert replay.recognised(turn.response) is not False
                shown, reward, done = replay.step(turn.response)
                assert (replay.history[-1] == "correct") == turn.learn
                total += reward
            assert done and replay.success
            assert total == sum(episode.outcomes[outcome][0] for outcome in replay.history)
            assert not episode.history and not episode.responses and episode.point == 0


@pytest.mark.parametrize("name", [name for name in ALL_TASKS if name.startswith("gp")])
def test_demonstrations_show_what_to_do_after_a_failure(name):
    """Tasks of several attempts whose demonstrations never fail first, or always do."""
    episodes = drawn(tasks.TASKS[name](turns=3), 300)
    kinds = Counter(len(episode.demonstration()) for episode in episodes)
    assert set(kinds) == {1, 2} and min(kinds.values()) > 60


HOSTILE = [
    "", "{}", "null", "[" * 100_000, "[" * 999, "9" * 999, '{"a":' * 300, "\x00\uffff",
    "\\boxed{" * 5000, "{" * 10 ** 6, '{"action": "stop()", "action": "forward()"}',
    '{"action": ["stop()"]}', '{"action": {}}', '{"formula": {}}', "\\boxed{" + "9" * 10 ** 6 + "}",
    "\\boxed{}", "\\boxed{1", "\\boxed{1/0}", "\\boxed{9**9**9}", "\\boxed{" + "\\frac{" * 999,
]


@pytest.mark.parametrize("name", ALL_TASKS)
def test_wrong_responses_get_their_named_outcome_in_bounded_time(name):
    """A text that a grader takes long over, stumbles over, or takes for an answer."""
    task = tasks.TASKS[name]()
    rng = random.Random(SEED)
    for text in HOSTILE:
        episode = task.sample("train", rng)
        start = time.process_time()
        observation, reward, done = episode.step(text)
        assert time.process_time() - start < 0.1
        assert episode.history == ("no_answer",) and not episode.success
        assert reward == episode.outcomes["no_answer"][0]
        assert done == (episode.attempts == 1) and len(observation) < 200
        episode.recognised(text)


def test_measures_of_conversations_with_failures():
    """first_try of first responses alone, or of lost conversations; a wrong step accuracy."""
    task = tasks.VIRL()
    fresh = task.sample("train", random.Random(SEED))

    def route(**failures):
        """Played with so many failures at some points."""
        played = copy.copy(fresh)
        done = False
        while not done:
            wrong = played.tries < failures.get(f"at_{played.point}", 0)
            _, _, done = played.step("x" if wrong else played.expert)
        return played
    flawless = route()
    routes = [flawless, route(at_0=1), route(at_2=1), route(at_1=2)]  # the last one is lost
    row = task.measures(routes, samples=2)
    n = fresh.points
    assert row["success"] == 0.75 and row["any"] == 1.0 and row["hits"] == [2, 1]
    assert row["first_try"][0] == 0.25
    assert row["step_accuracy"][0] == pytest.approx((3 * n + 1) / (n + 2 * (n + 1) + 3))
    assert row["outcomes"]["correct"] == 3 * n + 1 and row["outcomes"]["no_answer"] == 4
    assert row["recognition"][0] == row["step_accuracy"][0]  # "x" reads nothing right


def near(hits, n, chance):
    """Do n draws hit as often as their chance predicts, within 4.5 standard deviations?"""
    return abs(hits - n * chance) < 4.5 * math.sqrt(n * chance * (1 - chance)) + 1e-9


def exact_chance(numbers, target=24):
    """Share of random_formula over shuffled numbers that makes the target, by every way it goes."""
    def values(part):
        if len(part) == 1:
            return {Fraction(part[0]): Fraction(1)}
        total = Counter()
        cuts = range(1, len(part))
        for cut in cuts:
            pairs = itertools.product(values(part[:cut]).items(), values(part[cut:]).items())
            for (a, p), (b, q) in pairs:
                share = p * q / 4 / len(cuts)
                if a is None or b is None:
                    total[None] += 4 * share
                    continue
                for value in (a + b, a - b, a * b, a / b if b else None):
                    total[value] += share
        return total
    orders = itertools.permutations(numbers)
    return float(sum(values(order).get(target, 0) for order in orders)) / 24


def test_random_formulas_score_what_chance_predicts():
    """A grader of General Points that is too generous or too strict to random formulas."""
    n = 4000
    rng = random.Random(SEED)
    deal = tasks.GeneralPoints().sample("heldout", rng)
    hits = 0
    for _ in range(n):
        (formula, _), _ = tasks.random_formula(rng.sample(deal.numbers, 4), rng)
        hits += deal.grade(deal.respond(formula)) == "correct"
    chance = exact_chance(deal.numbers)
    assert abs(hits - n * chance) < 4.5 * math.sqrt(n * chance) + 1


@pytest.mark.parametrize("split, actions", [("id", 10), ("ood_rule", 6), ("ood_rule_hard", 6)])
def test_random_actions_score_what_chance_predicts(split, actions):
    """Routes whose right action can be guessed more often than one in so many."""
    rng = random.Random(SEED)
    task = tasks.VIRL()
    routes = 600
    right = said = passed = 0
    for _ in range(routes):
        route = task.sample(split, rng)
        assert len(set(route.actions)) == actions
        done = False
        while not done:
            _, _, done = route.step(route.respond(rng.choice(route.actions)))
        right += route.history.count("correct")
        said += len(route.history)
        passed += route.point > 0
    chance = 1 / actions
    assert near(right, said, chance)
    assert near(passed, routes, 1 - (1 - chance) ** 2)  # of the first stop, in two attempts


def test_random_numbers_score_what_chance_predicts():
    """Problems of mathematics whose answer can be guessed."""
    rng = random.Random(SEED)
    problems = [tasks.Mathematics().sample("heldout", rng) for _ in range(4000)]
    whole = sum(Fraction(problem.answer).denominator == 1 for problem in problems)
    chance = whole / 101  # answers lie in 0..100
    hits = sum(p.grade(f"\\boxed{{{rng.randint(0, 100)}}}") == "correct" for p in problems)
    assert abs(hits - chance) < 4.5 * math.sqrt(chance)


# --- General Points ---

def brute_force(numbers):
    """Can these numbers make 24? Join any two, in floating point, until one is left."""
    if len(numbers) == 1:
        return abs(numbers[0] - 24) < 1e-6
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [numbers[k] for k in range(len(numbers)) if k not in (i, j)]
        a = numbers[i]
        b = numbers[j]
        joined = (a + b, a - b, a * b, a / b if b else math.inf)
        if any(brute_force(rest + [c]) for c in joined):
            return True
    return False


def exact(formula):
    """Its value by Python's own arithmetic, in fractions; None after a division by zero."""
    try:
        return eval(re.sub("([0-9]+)", r"Fraction(\1)", formula))
    except ZeroDivisionError:
        return None


def answer(formula, **others):
    return json.dumps(dict(others, formula=formula))


def grade(response, numbers, target=24):
    return tasks.Deal(("A",) * 4, tasks.RULE_10, tuple(numbers), "", target).grade(response)


def test_solver_and_grader_against_brute_force_on_every_multiset():
    """A multiset that the solver misses, a formula of its own that is wrong, or one graded so."""
    solvable = 0
    for numbers in tasks.MULTISETS:
        solutions = tasks.solve(numbers)
        assert bool(solutions) == brute_force(list(numbers)), numbers
        assert len(set(solutions)) == len(solutions)
        solvable += bool(solutions)
        for formula in solutions:
            used = sorted(map(int, re.findall("[0-9]+", formula)))
            assert exact(formula) == 24 and used == list(numbers)
            assert grade(answer(formula + "=24"), numbers) == "correct"
    assert len(tasks.MULTISETS) == 1820 and solvable == 1362
    small = [numbers for numbers in tasks.MULTISETS if max(numbers) <= 10]
    assert sum(bool(tasks.solve(numbers)) for numbers in small) == 566
    assert "8/(3-8/3)" in tasks.solve((3, 3, 8, 8))  # floating point misses this one


BRACKETINGS = (
    "(({a}{x}{b}){y}{c}){z}{d}", "({a}{x}({b}{y}{c})){z}{d}", "({a}{x}{b}){y}({c}{z}{d})",
    "{a}{x}(({b}{y}{c}){z}{d})", "{a}{x}({b}{y}({c}{z}{d}))", "{a}{x}{b}{y}{c}{z}{d}")


def test_grader_on_every_bracketing():
    """Precedence, associativity or brackets that the grader reads otherwise than Python."""
    rng = random.Random(SEED)
    for numbers in rng.sample(tasks.MULTISETS, 4):
        seen = Counter()
        orders = set(itertools.permutations(numbers))
        operators = itertools.product("+-*/", repeat=3)
        for (a, b, c, d), (x, y, z) in itertools.product(orders, operators):
            for form in BRACKETINGS:
                formula = form.format(a=a, b=b, c=c, d=d, x=x, y=y, z=z)
                expected = "correct" if exact(formula) == 24 else "wrong_result"
                assert grade(answer(formula), numbers) == expected, formula
                seen[expected] += 1
        assert bool(seen["correct"]) == bool(tasks.solve(numbers))


def brief(value):
    """Of a parameter, for the test's name."""
    return ascii(value)[:24]


@pytest.mark.parametrize("formula, outcome", [
    ("(1+2+3)*4=24", "correct"),
    ("(1+2+3)*4", "correct"),
    (" ( 1 + 2+3) *4 = 24 ", "correct"),
    ("(1+2+3)*4=25", "illegal_formula"),
    ("(1+2+3)*4=24=24", "illegal_formula"),
    ("1+2+3+4=24", "wrong_result"),
    ("4/(3-1-2)=24", "wrong_result"),
    ("4*3*2=24", "illegal_number"),
    ("(1+2+3)*4*1=24", "illegal_number"),
    ("12+3*4=24", "illegal_number"),
    ("9**9**9**9", "illegal_formula"),
    ("__import__('os').system('true')", "illegal_formula"),
    ("-1+2+3*4", "illegal_formula"),
    ("(1+2+3)(4)", "illegal_formula"),
    ("(1+2+3*4", "illegal_formula"),
    ("", "illegal_formula"),
    ("(1+2+3))*4", "illegal_formula"),
    ("01+2+3*4", "illegal_formula"),
    ("(1+2+3)*\u0664", "illegal_formula"),
    ("(1+2+3)*\uff14", "illegal_formula"),
    ("(1+2+3)//4", "illegal_formula"),
    ("1.0+2+3*4", "illegal_formula"),
    ("1 2+3*4", "illegal_formula"),
    ("1+2+3*4\n", "illegal_formula"),
    ("9" * 50, "illegal_formula"),
    ("(" * 59, "illegal_formula"),
    ("1+" * 40000 + "1", "no_answer"),
    ("(" * 100_000, "no_answer"),
], ids=brief)
def test_grader_on_hostile_formulas(formula, outcome):
    """A formula that is run as code, takes long, or is taken for another one."""
    start = time.process_time()
    assert grade(answer(formula), (4, 3, 2, 1)) == outcome
    assert time.process_time() - start < 0.05


@pytest.mark.parametrize("response, outcome", [
    ("[" * 100_000, "no_answer"),
    ("[" * 999, "no_answer"),
    ("9" * 999, "no_answer"),
    ("", "no_answer"),
    ("null", "no_answer"),
    ("[1]", "no_answer"),
    (answer("(1+2+3)*4", number=math.nan), "no_answer"),
    (answer("(1+2+3)*4", cards=[-math.inf]), "no_answer"),
    ("{}", "no_answer"),
    ('{"formula": 24}', "no_answer"),
    ('{"formula": ["24"]}', "no_answer"),
    ("NaN", "no_answer"),
    ('{"formula": "(1+2+3)*4", "formula": "(1+2+3)*4"}', "no_answer"),
    (answer("(1+2+3)*4") + "x", "no_answer"),
    (answer("(1+2+3)*4", cards=[], number="rubbish"), "correct"),
], ids=brief)
def test_grader_on_hostile_text(response, outcome):
    """A response that is no JSON object with one formula, and is graded as if it were."""
    start = time.process_time()
    assert grade(response, (4, 3, 2, 1)) == outcome
    assert time.process_time() - start < 0.05


def test_digits_that_were_not_dealt_cannot_be_glued():
    """A 1 and a 0 that are read as the 10 that was dealt."""
    assert grade(answer("10+10+4*1"), (10, 10, 4, 1)) == "correct"
    assert grade(answer("1 0+10+4*1"), (10, 10, 4, 1)) == "illegal_formula"
    assert grade(answer("11+13+1-1"), (1, 1, 1, 1)) == "illegal_number"


OTHER_RULES = {
    "ood_rule": {(11, 12, 13)},
    "fake": {(11, 12, 13)},
    "ood_small": {(5, 5, 5), (7, 7, 7)}}


@pytest.mark.parametrize("split", ["train", *tasks.GeneralPoints.splits])
def test_a_split_is_what_it_says(split):
    """Deals under another rule than their split's, without a face, or of numbers not shown."""
    for deal in drawn(tasks.GeneralPoints(), 1500, split):
        assert deal.grade(deal.expert) == "correct" and deal.prompt.endswith("Make 24.\n")
        stated = dict(re.findall("([JQK]) counts as ([0-9]+)", deal.prompt))
        rule = tuple(int(stated[face]) for face in "JQK")
        assert rule in OTHER_RULES.get(split, {(10, 10, 10)})
        shown = re.search("Cards: (.*?)[.] J", deal.prompt)[1].split(", ")
        meaning = dict(stated, A="1")
        values = tuple(int(meaning.get(rank, rank)) for rank in shown)
        assert (values == deal.numbers) == (split != "fake")
        if split in OTHER_RULES:
            assert set(shown) & set("JQK")


def test_splits_are_disjoint():
    """A multiset of numbers that is trained on and asked for elsewhere."""
    task = tasks.GeneralPoints()
    rng = random.Random(SEED)
    seen = {}
    for split in ["train", *task.splits]:
        deals = [task.sample(split, rng) for _ in range(1500)]
        seen[split] = {tuple(sorted(deal.numbers)) for deal in deals}
    roles = {}
    for numbers, role in tasks.ROLES.items():
        roles.setdefault(role, set()).add(numbers)
    assert (seen["id"] | seen["train"]) <= roles["train"] and seen["val"] <= roles["val"]
    assert len(seen["id"] & seen["train"]) > 0.5 * len(seen["id"])
    for a, b in itertools.combinations(("train", "val", "heldout", "ood_rule"), 2):
        assert not seen[a] & seen[b]
    for split in ("heldout", "ood_rule", "ood_small", "fake"):
        assert seen[split] <= roles["heldout"]


def test_feedback_says_what_was_wrong_and_not_how_near_it_was():
    """Feedback that differs within an outcome, and so helps to search; a try beyond the last."""
    rng = random.Random(SEED)
    task = tasks.GeneralPoints(turns=5)
    said = {}
    for _ in range(3000):
        deal = task.sample("train", rng)
        (formula, _), _ = tasks.random_formula(rng.sample(deal.numbers, rng.choice((3, 4))), rng)
        beginning = deal.formula[:rng.randrange(len(deal.formula) + 1)]  # of a solution
        observation, _, done = deal.step(deal.respond(rng.choice((formula, beginning))))
        said.setdefault(deal.history[0], set()).add(observation)
        assert done == (deal.history[0] == "correct")
    assert set(said) == {"correct", "wrong_result", "illegal_number", "illegal_formula"}
    assert all(len(texts) == 1 for texts in said.values())
    deal = task.sample("train", rng)
    assert [deal.step("x")[2] for _ in range(5)] == [False] * 4 + [True]
    assert not deal.success


# --- V-IRL ---

ROUTE_SPLITS = ["train", *tasks.VIRL.splits]
DEGREES = {name: 45 * i for i, name in enumerate(tasks.HEADINGS)}
BEARINGS = {
    "front": 0, "right front": 45, "right": 90, "right behind": 135,
    "behind": 180, "left behind": 225, "left": 270, "left front": 315}
TURN_WORDS = {45: "slightly right", 90: "right", 135: "right",
              225: "left", 270: "left", 315: "slightly left"}
TURN = "(?:First, turn|Turn)(?: ((?:slightly )?(?:left|right)))?(?: to face (\\w+))?[.]"
MOVE = "Move forward until you reach (next intersection|destination)(?: where (.*))?[.]"


def city_of(split, route):
    """The city that a route of this split goes through, made anew from its seed."""
    role = split if split in ("train", "val") else "train" if split == "id" else "heldout"
    share = "heldout" if role == "heldout" else "train"
    names = [name for name in tasks.NAMES if tasks.NAME_ROLES[name] == share]
    return tasks.City(f"{role} {route.city}", names)


def read_legs(route, split):
    """[(heading in degrees, place or None)] of the instruction, read word by word."""
    heading = DEGREES[re.search("You face (\\w+)[.]", route.prompt)[1]]
    legs = []
    for i, line in enumerate(route.lines):
        if i % 2 == 0:
            relative, absolute = re.fullmatch(TURN, line).groups()
            turn = (DEGREES[absolute] - heading) % 360
            assert turn in TURN_WORDS
            assert relative == (None if split == "ood_rule_hard" else TURN_WORDS[turn])
            heading = DEGREES[absolute]
        else:
            end, place = re.fullmatch(MOVE, line).groups()
            assert (end == "destination") == (i == len(route.lines) - 1)
            legs.append((heading, place))
    return legs


def stands_there(landmark, place, heading):
    """Is the landmark of a node what the instruction says stands there?"""
    if landmark is None or place is None:
        return landmark is place
    name, bearing = re.fullmatch("(.*) is on your (.*)", place).groups()
    where = (45 * landmark[1] - heading - BEARINGS[bearing]) % 360
    return name == landmark[0] and where == 0


def leads(city, node, legs):
    """Do the legs lead from this node along streets, past what they say?"""
    if not legs:
        return True
    heading, place = legs[0]
    east = round(math.sin(math.radians(heading)))
    north = round(math.cos(math.radians(heading)))
    following = (node[0] + east, node[1] + north)
    if following not in city.streets[node].values():
        return False
    if not stands_there(city.landmarks.get(following), place, heading):
        return False
    return leads(city, following, legs[1:])


@pytest.mark.parametrize("split", ROUTE_SPLITS)
def test_routes_are_walks_through_their_city(split):
    """An instruction that leads off the streets, to no landmark, or past others than it says."""
    for route in drawn(tasks.VIRL(), 150, split):
        city = city_of(split, route)
        legs = read_legs(route, split)
        assert len(legs) in (2, 3) and legs[-1][1]
        assert any(leads(city, node, legs) for node in city.streets)


@pytest.mark.parametrize("split", ROUTE_SPLITS)
def test_actions_are_those_of_the_instruction(split):
    """Routes without an end, or with turns in another frame than the split's or at no corner."""
    lengths = Counter()
    for route in drawn(tasks.VIRL(), 150, split):
        actions = [stop.action for stop in route.stops]
        lengths[len(actions)] += 1
        assert actions[-1] == "stop()" and actions.count("stop()") == 1
        turns = [stop for stop in route.stops if stop.action.startswith("turn")]
        assert len(turns) == len(route.lines) / 2
        for turn in turns:
            word = re.fullmatch("turn_direction\\((.*)\\)", turn.action)[1]
            assert (word in DEGREES) == (not split.startswith("ood_rule"))
            assert turn.intersection == (turn is not turns[0])
        others = [stop for stop in route.stops if not stop.action.startswith("turn")]
        assert not any(stop.intersection for stop in others)
    assert min(lengths) >= 3 and max(lengths) <= 10 and len(lengths) > 4


def test_cities_and_names_of_new_splits_are_new(monkeypatch):
    """A city or a landmark's name of training that a new split has, too."""
    task = tasks.VIRL()
    rng = random.Random(SEED)
    City = tasks.City
    seeds = []
    monkeypatch.setattr(
        tasks, "City", lambda seed, names: seeds.append(seed) or City(seed, names))
    names = {}
    cities = {}
    for split in ROUTE_SPLITS:
        seeds.clear()
        text = " ".join(task.sample(split, rng).prompt for _ in range(300))
        names[split] = {name for name in tasks.NAMES if name in text}
        cities[split] = set(seeds)
    assert names["id"] == names["train"] == names["val"] and len(names["train"]) == 40
    for split in ("heldout", "ood_rule", "ood_rule_hard"):
        assert not names[split] & names["train"] and len(names[split]) == 24
        assert not cities[split] & (cities["val"] | cities["train"])
    assert len(cities["heldout"]) > 50 and cities["id"] & cities["train"]
    assert not cities["val"] & cities["train"]


def test_cities_of_different_roles_differ():
    """A city of a new split whose streets are those of one that is trained on."""
    streets = {}
    for role in ("train", "val", "heldout", "pretraining"):
        cities = [tasks.City(f"{role} {i}", tasks.NAMES) for i in range(tasks.CITIES)]
        streets[role] = {str(city.streets) for city in cities}
    for a, b in itertools.combinations(streets, 2):
        assert not streets[a] & streets[b]


def test_feedback_is_never_wrong_about_an_intersection():
    """Feedback on an intersection that is none, that was seen, or where the text does not say."""
    rng = random.Random(SEED)
    task = tasks.VIRL()
    outcomes = Counter()
    illegal = ("fly()", "turn_direction(up)")
    for _ in range(400):
        route = task.sample("train", rng)
        done = False
        while not done:
            stop = route.stops[route.point]
            end = route.point in (0, route.points - 1)  # the ends are corners, too
            say = rng.choice((tasks.NOTHING, tasks.NOTHING + tasks.CROSSING, stop.seen))
            action = stop.action
            if rng.random() > 0.7:
                action = rng.choice((*route.actions, *illegal))
            said = json.dumps({"current observation": say, "action": action})
            observation, _, done = route.step(said)
            outcome = route.history[-1]
            outcomes[outcome] += 1
            assert (outcome == "correct") == (action == stop.action)
            assert (outcome == "illegal_action") == (action in illegal)
            claims = "intersection" in say
            if "you are not at an intersection" in observation:
                assert claims and not stop.intersection and not end
            elif "you are at an intersection" in observation:
                assert stop.intersection and not claims
            elif outcome == "wrong_action":
                assert claims == stop.intersection or end
    assert set(outcomes) == set(tasks.Route.outcomes) - {"no_answer"}


def test_each_point_has_its_own_attempts():
    """Two failures at different stops that end a route, or two at one that do not."""
    route = drawn(tasks.VIRL(), 1)[0]
    failing = copy.copy(route)
    for point in range(route.points):
        assert route.step("x")[2] is False and route.point == point
        _, _, done = route.step(route.expert)
    assert done and route.success and len(route.history) == 2 * route.points
    assert failing.step("x")[2] is False and failing.step("x")[2] is True
    assert not failing.success


# --- Mathematics ---

STEP = r"(\w+) = (\w+)(?: (.) (\w+))?[.]"  # of a prompt: name = first, or name = first op second


def work_out(steps, rule):
    """{name: value} of the prompt's steps; rule: (operator, what it means), or None."""
    known = {}

    def value(word):
        return known[word] if word in known else Fraction(word)
    for name, first, op, second in steps:
        a = value(first)
        if not op:
            known[name] = a
            continue
        b = value(second)
        if rule and op == rule[0]:
            known[name] = eval(rule[1], {}, dict(a=a, b=b))
        else:
            known[name] = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[op]
    return known


@pytest.mark.parametrize("split", ["train", *tasks.Mathematics.splits])
def test_problems_by_reading_the_prompt(split):
    """A wrong answer, a wrong line of a solution, or a problem that is not as its split says."""
    for problem in drawn(tasks.Mathematics(), 400, split):
        explained = re.match("a (.) b means (.*?)[.] ", problem.prompt)
        assert bool(explained) == (split == "ood_rule")
        rule = explained.groups() if explained else None
        steps = re.findall(STEP, problem.prompt[explained.end() if explained else 0:])
        known = work_out(steps, rule)
        assert len(steps) - 1 in ((5,) if split == "ood_length" else (3, 4))
        asked = re.search(r"How many (\w+)\?", problem.prompt)[1]
        assert Fraction(problem.answer) == known[asked] and asked == steps[-1][0]
        for equation in re.findall(r"\w+ = (.*?)[.] ", problem.solution):
            sides = equation.split(" = ")
            plain = [side for side in sides if not set(side) & set(tasks.SYMBOLS)]
            assert len({exact(side) for side in plain}) == 1, equation


def test_problems_of_different_roles_differ():
    """A problem that is trained on, under whatever names, and asked for elsewhere."""
    task = tasks.Mathematics()
    rng = random.Random(SEED)
    units = {}
    for split in ["train", *task.splits]:
        units[split] = {task.sample(split, rng).unit for _ in range(3000)}
    assert units["train"] & units["id"]
    for a, b in itertools.combinations(("train", "val", "heldout", "ood_length", "ood_rule"), 2):
        assert not units[a] & units[b]


def test_roles_have_their_shares():
    """A hash that gives a role more or fewer problems than its share."""
    share = Counter(tasks.role_of(str(i)) for i in range(20_000))
    assert share["train"] == pytest.approx(12_000, rel=0.03)
    assert share["val"] == pytest.approx(4000, rel=0.06)


@pytest.mark.parametrize("right, box, outcome", [
    ("1/2", "1/2", "correct"),
    ("1/2", "0.5", "correct"),
    ("1/2", "\\frac{1}{2}", "correct"),
    ("1/2", "2/4", "correct"),
    ("1/2", "\\dfrac{1}{2}", "correct"),
    ("1/2", " 1 / 2 ", "correct"),
    ("1/2", "$0.50$", "correct"),
    ("1000", "1,000", "correct"),
    ("1,000", "1000.0", "correct"),
    ("-3", "-3", "correct"),
    ("-1/2", "-\\frac{1}{2}", "correct"),
    ("3", "-3", "wrong_answer"),
    ("7", "+7", "correct"),
    ("7", "007", "correct"),
    ("1/3", "0.333", "wrong_answer"),
    ("7", "8", "wrong_answer"),
    ("1000", "1,00", "no_answer"),
    ("1000", "10,00", "no_answer"),
    ("7", "7 apples", "no_answer"),
    ("7", "x=7", "no_answer"),
    ("7", "3+4", "no_answer"),
    ("7", "7e0", "no_answer"),
    ("7", "\u0667", "no_answer"),
    ("7", "--7", "no_answer"),
    ("7", "\\frac{14}{2}x", "no_answer"),
    ("1/2", "1//2", "no_answer"),
    ("7", "7/0", "no_answer"),
    ("7", "\\frac{7}{0}", "no_answer"),
    ("7", "7.", "no_answer"),
    ("7", "seven", "no_answer"),
    ("7", "", "no_answer"),
    ("1/2", "{1/2}", "no_answer"),
    ("x+1", "x+1", "correct"),
    ("x+1", "1+x", "wrong_answer"),
])
def test_equal_numbers_in_different_forms(right, box, outcome):
    """A right number that is refused for its form, a text that passes, a box before the last."""
    problem = tasks.Problem("", "", right)
    assert problem.grade(f"so \\boxed{{{box}}} it is") == outcome
    assert problem.grade(f"\\boxed{{99}} no, \\boxed{{{box}}}") == outcome
    assert problem.grade(f"\\boxed{{{box}}} no, \\boxed{{99}}") == "wrong_answer"
    assert problem.grade(f"\\boxed{{{box}") == problem.grade(box) == "no_answer"


# --- The base policies ---

def test_pretraining_never_makes_24_of_a_deal_kept_for_evaluation():
    """Pretraining that gives away a deal of an evaluation, or that leaves out more than those."""
    make = importlib.import_module("make")
    rng = random.Random(SEED)
    task = tasks.GeneralPoints()
    evaluated = set()
    for split in task.splits:
        if split != "id":
            deals = [task.sample(split, rng) for _ in range(3000)]
            evaluated |= {tuple(sorted(deal.numbers)) for deal in deals}
    seen = Counter()
    for _ in range(40_000):
        deal = make.gp(rng)
        numbers = json.loads(deal.expert)["number"]
        target = int(re.search(r"Make (\d+)\.\n$", deal.prompt)[1])
        assert grade(deal.expert, numbers, target) == "correct"
        seen[tuple(sorted(numbers)) in evaluated, target == 24] += 1
    assert seen[True, True] == 0 and seen[False, True] > 100 and seen[True, False] > 1000


def test_pretraining_never_explains_an_operator_of_ood_rule():
    """Pretraining on a meaning that ood_rule asks for, or on problems that are not trained on."""
    make = importlib.import_module("make")
    rng = random.Random(SEED)

    def meaning(prompt):
        """What its operator means, whichever sign it has: "a @ b means 2 * a + b"."""
        return "a @" + prompt[3:prompt.index(". ")]
    used = {meaning(problem.prompt) for problem in drawn(tasks.Mathematics(), 400, "ood_rule")}
    seen = set()
    for _ in range(4000):
        problem = make.mathematics(rng)
        assert tasks.role_of(problem.unit) == "train"
        if problem.prompt.startswith("a "):
            seen.add(meaning(problem.prompt))
    assert len(used) == len(tasks.OOD_MEANINGS) and len(seen) > 8 and not used & seen


@pytest.mark.parametrize("name", ALL_TASKS)
def test_the_tokenizer_gives_back_every_text(name, tokenizer):
    """A text of a task that comes back changed, or with an unknown token in it."""
    task = tasks.TASKS[name]()
    for split in ["train", *task.splits]:
        for episode in drawn(task, 30, split):
            for turn in episode.demonstration():
                text = turn.shown + turn.response
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("shipped_as", ["base", "base-vl"])
def test_base_recipes_run_and_make_the_shipped_tokenizer(shipped_as, tmp_path, tokenizer):
    """A recipe that fails, or that makes another tokenizer or architecture than those shipped."""
    make = importlib.import_module("make")
    made = tmp_path / "made"
    flags = ["--pictures", "--init", str(HERE / "base")] if shipped_as == "base-vl" else []
    make.main(["--steps", "3", "--tokens", "1000", "--device", "cpu", "--out", str(made), *flags])
    kept = HERE / shipped_as
    assert AutoTokenizer.from_pretrained(made).get_vocab() == tokenizer.get_vocab()
    assert AutoTokenizer.from_pretrained(kept).get_vocab() == tokenizer.get_vocab()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (made, kept)]
    for config in configs:
        del config["transformers_version"]
    assert configs[0] == configs[1]
    sizes = [file.stat().st_size for file in kept.iterdir() if file.is_file()]
    assert sum(sizes) < 10 * 2 ** 20


def test_the_worn_base_is_the_base_with_noise(tmp_path):
    """Another policy in base/worn than its recipe says; noise that is not each matrix's own, or in the norms."""
    make = importlib.import_module("make")
    flags = ["--init", str(HERE / "base"), "--noise", "0.45", "--steps", "0", "--device", "cpu"]
    make.main([*flags, "--out", str(tmp_path / "made")])
    made, worn, base = (load(folder) for folder in (tmp_path / "made", HERE / "base" / "worn", HERE / "base"))
    for name, weight in worn.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], weight, rtol=1e-5, atol=1e-6)
        before = base.state_dict()[name]
        if weight.ndim == 2:
            assert (weight - before).std().item() == pytest.approx(0.45 * before.std().item(), rel=0.05)
        else:
            assert torch.equal(weight, before)
