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
        test_evidence_does_not_depend_on_the_scale_of_the_meta_gradient_and_is_calibrated_...
        test_paper_controller_is_equation_6_to_the_letter
    Algorithm 1
        test_the_budget_and_batches_without_signal
        test_same_seed_same_log, test_every_key_of_the_log_is_there
        test_an_interrupted_run_goes_on_bit_for_bit
"""

import copy
import errno
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
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import (AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
                          LlavaConfig, LlavaForConditionalGeneration)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

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
    measures = dict(n=1, success=0.0, low=0.0, high=1.0, any=0.0, greedy=0.0, outcomes={})
    monkeypatch.setattr(
        amft, "evaluate", lambda model, tokenizer, task, config, split: dict(measures, split=split))


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
