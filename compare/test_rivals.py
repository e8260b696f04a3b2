"""python -m pytest -q compare/test_rivals.py: minutes. Each rule against its published loss, slowly."""

import collections
import dataclasses
import gc
import inspect
import json
import math
import random
import re
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import amft  # noqa: E402
import harness.run  # noqa: E402
import tasks  # noqa: E402
from compare import controllers, experts, logs, race, regret, rivals, snr, soup  # noqa: E402
from harness.arguments import parse  # noqa: E402

# torch's own, where it first loads what torch.func.jvp needs
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

METHODS = sorted(set(rivals.METHODS) - set(controllers.CONTROLLERS))  # these: test_controllers.py
OWN_PROMPTS = {"superrl", "hpt", "dyme", "luffy", "srft"}  # these imitate the step's own prompts
NO_WARMUP = OWN_PROMPTS | {"sft", "dft", "rl", "relift", "cosine", "chord", "trsft", "amft-trsft"}
SILENT = {"sft", "dft"}  # these sample nothing
LATE = {"rl", "sft-rl", "relift"}  # these imitate nothing in a first step without a warm-up
GATED = {"superrl", "hpt", "dyme"}


@pytest.fixture(autouse=True)
def plain_defaults(monkeypatch):
    """Config's own defaults, whatever General Points sets differently for its default run."""
    monkeypatch.setattr(tasks.GeneralPoints, "defaults", {})


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint folder: the base's tokenizer, a random policy far from uniform."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "base")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=12, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, pad_token_id=tokenizer.pad_token_id))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def unevaluated(monkeypatch):
    """Runs without their evaluations."""
    row = dict(split="val", n=1, samples=4, success=0.0, low=0.0, high=1.0, any=0.0, hits=[0])
    monkeypatch.setattr(amft, "evaluate", lambda *_: row)


@pytest.fixture
def calls(monkeypatch):
    """What a run's calls gave: rollouts, batches of demonstrations; and the gradients of its steps."""
    calls = dict(rollout=[], encode_demos=[], adamw_step=[])

    def spy_on(name):
        true = getattr(amft, name)

        def spy(*args, **kwargs):
            result = true(*args, **kwargs)
            calls[name].append(args[1] if name == "adamw_step" else result)
            return result
        monkeypatch.setattr(amft, name, spy)

    for name in calls:
        spy_on(name)
    load_policy = amft.load_policy

    def load_and_forget(*args):  # a checkpoint is tried out first
        policy = load_policy(*args)
        for made in calls.values():
            made.clear()
        return policy
    monkeypatch.setattr(amft, "load_policy", load_and_forget)
    return calls


def graded(monkeypatch, outcome):
    """Let a response be graded by a function of its text."""
    monkeypatch.setattr(tasks.Deal, "grade", lambda self, text: outcome(text))


def mixed(text):
    return "correct" if len(text) % 3 == 0 else "no_answer"


def read(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def run(model, out, *flags):
    rivals.main(["--task", "gp", "--smoke", "--model", model, "--out", str(out),
                 "--max-new-tokens", "34", "--device", "cpu", *flags])
    return read(out)


def steps_of(rows):
    return [row for row in rows if row["kind"] == "step"]


def finite(rows):
    return all(math.isfinite(x) for row in rows for x in row.values() if x != "step")


def uses(method, flag):
    return flag not in rivals.METHOD_FLAGS[method].unused


def flat_grad(loss, model):
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.reshape(-1) for g in grads])


def method_of(name, **settings):
    """A method, with the flags that it sets differently."""
    settings = {"method": name, **rivals.METHOD_FLAGS[name].defaults, **settings}
    return rivals.METHODS[name](rivals.Config(**settings))


def step_of(t=1, success=None, **fields):
    """A Step that sampled with this success (P, G), or that imitated."""
    rollouts = None if success is None else SimpleNamespace(success=success)
    demos = True if success is None else None
    return amft.Step(t, 0.1, random.Random(t), rollouts=rollouts, demos=demos, **fields)


# --- Every method, with the defaults that a user types --------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_with_its_defaults_and_with_either_advantage(method, tiny, tmp_path,
                                                                       monkeypatch):
    """A method that fails, gives no number, stands still or has another warm-up than SFT."""
    graded(monkeypatch, mixed)
    splits = {split: tasks.GeneralPoints.splits[split] for split in ("val", "id")}
    monkeypatch.setattr(tasks.GeneralPoints, "splits", splits)
    length = 8 if method == "sasr" else 5
    short = ["--eval-n", "1", "--method", method, "--steps", str(length), "--demos", "64"]
    choices = [()]
    if uses(method, "advantage"):
        choices.append(("--advantage", "group", "--ppo-epochs", "2"))
    for i, flags in enumerate(choices):
        rows = run(tiny, tmp_path / str(i), *short, *flags)
        steps, config = steps_of(rows), rows[0]
        assert len(steps) == length and finite(steps)
        assert rows[-1]["kind"] == "final"
        assert (tmp_path / str(i) / "final/model.safetensors").exists()
        assert sum(row["grad_norm"] for row in steps) > 0
        assert config["method"] == method
        assert {row["split"] for row in rows if row["kind"] == "eval"} >= {"val", "id"}
        if method != "sft":
            assert config["warmup"] == (0 if method in NO_WARMUP else min(3, length // 2))
        for row in steps if method in SILENT else steps[:config["warmup"]]:
            assert row["mu"] == 1 and "success" not in row
        assert (steps[-1]["rollouts"] == 0) == (method in SILENT)


# --- Each rule's gradient -------------------------------------------------------------------------


def published(method, logp, A, H, G, gamma=0.1):
    """A demonstration's token losses as the paper prints them, for autograd.

    It goes through all but what is said to be constant."""
    p = logp.exp()
    if method == "dft":
        return -p.detach() * logp
    if method == "chord":
        return -(p * (1 - p)).detach() * logp
    if method in ("trsft", "amft-trsft"):
        return -p / p.detach().clamp(min=0.1)
    if method == "luffy":
        return -A * p / (p + gamma)
    if method == "srft":
        return -0.5 * math.exp(-H) * logp - A * p
    if method == "dyme":
        return -logp / G
    return -logp


@pytest.mark.parametrize("method", [name for name in METHODS if name != "rl"])
def test_a_tokens_weight_has_the_gradient_of_the_published_loss(method):
    """A weight that is not the derivative of its paper's loss, p from 0.001 to 0.999, in float64."""
    A = torch.tensor([1.5, -0.5, 0.7], dtype=torch.float64)
    rows, G, H = torch.tensor([2, 1]), 4, 0.3
    mask = (torch.arange(25) > 2).double().expand(3, 25)
    p = torch.linspace(0.001, 0.999, 50, dtype=torch.float64).view(2, 25)
    logps = p.log().requires_grad_()
    rule = method_of(method, shape=0.2, samples=G)
    rule.A = A
    rule.mus = torch.ones(3, dtype=torch.float64)  # imitation alone
    demos = SimpleNamespace(response_mask=mask)
    step = amft.Step(1, 0.1, None, rollouts=SimpleNamespace(entropy=H), demos=demos)
    weights = rule.token_weights(step, logps.detach(), rows)
    ours = amft.sft_loss(weights * logps, mask[rows], n_tokens=7)
    token_losses = published(method, logps, A[rows].unsqueeze(1), H, G, gamma=0.2)
    theirs = (token_losses * mask[rows]).sum() / 7
    actual, expected = (torch.autograd.grad(loss, logps)[0] for loss in (ours, theirs))
    assert expected[:, 3:].all() and not expected[:, :3].any()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def group(success):
    """Successes less their group's mean, in units of the batch's standard deviation of these."""
    centred = np.array([[r - sum(row) / len(row) for r in row] for row in success.tolist()])
    scale = np.sqrt((centred ** 2).mean()) if centred.any() else 1.0
    return torch.tensor(centred / scale)


def expected_mus(method, success, config):
    """mu of each prompt in a first mixed step, as published."""
    P, G = success.shape
    k = success.sum(1).tolist()
    if method in ("superrl", "dyme"):
        return [float(n == 0) for n in k]
    if method == "hpt":
        return [float(n <= config["gate"] * G) for n in k]
    one = {"luffy": 1 / (G + 1), "srft": 0.5, "fixed": 0.5, "gac": config["mu"],
           "amft": config["mu"], "amft-trsft": config["mu"], "trsft": 0.5, "chord": 0.1, "cosine": 0.9}
    return [one.get(method, 0.0)] * P


def expected_step(method, model, rollouts, demos, config):
    """Gradient of the first mixed step, row by row, in whole-batch denominators."""
    success, H = rollouts.success, rollouts.entropy
    P, G = success.shape
    mus = expected_mus(method, success, config)
    union = group(torch.cat([success, torch.ones(P, 1)], 1))
    A = group(success)
    if method == "luffy":
        A = union[:, :G]
    if method == "srft":
        A = torch.where(success == 1, 0.1 * math.exp(H), -1.0)
    loss = 0.0
    for i in range(P * G):
        row = rollouts.batch.rows([i])
        logp = (amft.logps_of(model, row) * row.response_mask).sum()
        weight = (1 - mus[i // G]) * A.reshape(-1)[i].item()
        loss = loss - weight * logp / rollouts.batch.response_mask.sum()
    for i in range(len(demos.input_ids) if demos else 0):
        row = demos.rows([i])
        own = len(demos.input_ids) == P
        own_A = union[i, G].item() if own else None
        token_losses = published(method, amft.logps_of(model, row), own_A, H, G)
        share = (token_losses * row.response_mask).sum() / demos.response_mask.sum()
        loss = loss + mus[i if own else 0] * share
    return flat_grad(loss, model)


def policy_of(folder):
    return amft.load_policy(amft.Config(device="cpu", model=folder), tasks.GeneralPoints(), amft)[0]


def first_step(method, tiny, out, calls, *flags):
    """(policy before it, config, its calls) of a run of one mixed step, 6 prompts of 4 samples."""
    wanted = {"warmup": "0", "advantage": "group", "prompts": "6", "sft_batch": "9"}
    for name, value in wanted.items():
        if uses(method, name):
            flags += (amft_flag(name), value)
    steps = "3" if method == "sft" else "1"
    config = run(tiny, out, "--method", method, "--steps", steps, "--micro-tokens", "150", *flags)[0]
    made = {name: list(results) for name, results in calls.items()}
    return policy_of(tiny), config, made


def amft_flag(name):
    return "--" + name.replace("_", "-")


def close(actual, expected):
    assert expected.norm() > 0
    atol = 1e-5 * expected.norm().item()
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=atol)


def demo_gradient(method, model, demos):
    """Of a published loss that needs no samples."""
    token_losses = published(method, amft.logps_of(model, demos), None, None, None)
    mask = demos.response_mask
    return flat_grad((token_losses * mask).sum() / mask.sum(), model)


@pytest.mark.parametrize("method, flags", [
    *((method, ()) for method in METHODS), ("hpt", ("--gate", "0.5"))])
def test_a_step_of_every_method_is_the_gradient_of_its_published_loss(
        method, flags, tiny, tmp_path, monkeypatch, calls, unevaluated):
    """Through train: wrong gates, coefficients, advantages, micro-batches or normalisation."""
    graded(monkeypatch, mixed)
    model, config, made = first_step(method, tiny, tmp_path / "run", calls, *flags)
    demos = made["encode_demos"][0] if made["encode_demos"] else None
    if demos:
        assert len(demos.input_ids) == (6 if method in OWN_PROMPTS else 9)
    if method in SILENT | {"sasr"}:  # SASR knows no gradient norm yet: it starts with SFT
        assert not made["rollout"]
        expected = demo_gradient(method, model, demos)
    else:
        rollouts = made["rollout"][0]
        k = rollouts.success.sum(1)
        assert rollouts.success.shape == (6, 4)
        assert 0 < k.sum() < 24 and 0 in k and len(set(k.tolist())) > 1
        assert (demos is None) == (method in LATE)
        expected = expected_step(method, model, rollouts, demos, config)
    close(made["adamw_step"][0], expected)


@pytest.mark.parametrize("method", ["dft", "chord"])
def test_the_stop_gradient_matters_where_steps_are_compared(method, tiny):
    """A policy on which the test above could not see a stop-gradient that is gone."""
    model = policy_of(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rng = random.Random(0)
    deals = [tasks.GeneralPoints().sample("train", rng) for _ in range(9)]
    demos = amft.encode_demos(model, tokenizer, deals)
    logp = amft.logps_of(model, demos)
    p = logp.exp()
    loss = -(p if method == "dft" else p * (1 - p)) * logp
    mask = demos.response_mask
    through = flat_grad((loss * mask).sum() / mask.sum(), model)
    stopped = demo_gradient(method, model, demos)
    assert (through - stopped).norm() > 0.2 * stopped.norm()


@pytest.mark.parametrize("outcome", ["correct", "no_answer"])
@pytest.mark.parametrize("method", sorted(set(METHODS) - SILENT - {"sasr"}))
def test_steps_where_every_prompt_or_none_is_solved(
        method, outcome, tiny, tmp_path, monkeypatch, calls, unevaluated):
    """A division by 0; a gate open for all that is not SFT, one closed for all that is not RL."""
    graded(monkeypatch, lambda text: outcome)
    model, config, made = first_step(method, tiny, tmp_path / "run", calls)
    step, actual = steps_of(read(tmp_path / "run"))[0], made["adamw_step"][0]
    assert finite([step]) and actual.isfinite().all()
    if method in GATED:
        assert step["mu"] == (outcome == "no_answer")
    lets_be = GATED | {"luffy"}  # what is solved
    if method in LATE or (method in lets_be and outcome == "correct"):
        assert actual.norm() == 0
        return
    rollouts, demos = made["rollout"][0], made["encode_demos"][0]
    close(actual, expected_step(method, model, rollouts, demos, config))


@pytest.mark.parametrize("method", ["superrl", "hpt"])
def test_weights_of_single_prompts_add_up_also_with_the_value_function(
        method, tiny, tmp_path, monkeypatch, calls, unevaluated):
    """With GAE's advantages, nowhere 0: a step that is not the sum over prompts weighted singly."""
    graded(monkeypatch, mixed)
    plain, true = [], amft.advantages_of

    def spy(*args):
        plain.append(true(*args))
        return plain[-1]
    monkeypatch.setattr(amft, "advantages_of", spy)
    run(tiny, tmp_path / "run", "--method", method, "--steps", "1", "--prompts", "6")
    rollouts, demos = calls["rollout"][0], calls["encode_demos"][0]
    actual = calls["adamw_step"][0]
    model = policy_of(tiny)
    loss = 0.0
    for i, k in enumerate(rollouts.success.sum(1).tolist()):
        own = slice(4 * i, 4 * i + 4)
        A = plain[0].values[own]
        assert A.any()
        if k == 0:
            demo = demos.rows([i])
            logp = (amft.logps_of(model, demo) * demo.response_mask).sum()
            loss = loss - logp / demos.response_mask.sum()
        else:
            weighted = (amft.logps_of(model, rollouts.batch.rows(own)) * A).sum()
            loss = loss - weighted / rollouts.batch.response_mask.sum()
    close(actual, flat_grad(loss, model))


def test_gates_and_union_advantages_on_every_number_of_correct_samples():
    """A gate that is off by one; union advantages of another baseline or scale."""
    success = torch.tensor([[1.0] * k + [0.0] * (8 - k) for k in range(9)])
    for name, gate, imitated in (("superrl", 0.0, 1), ("dyme", 0.0, 1), ("hpt", 0.0, 1),
                                 ("hpt", 0.25, 3), ("hpt", 1.0, 9)):
        mus = method_of(name, samples=8, gate=gate).prompt_mus(success)
        assert mus.tolist() == [1.0] * imitated + [0.0] * (9 - imitated)
    samples, demos = rivals.union_advantages(success)
    expected = group(torch.cat([success, torch.ones(9, 1)], 1))
    actual = torch.cat([samples, demos.unsqueeze(1)], 1)
    torch.testing.assert_close(actual, expected.float())
    assert demos[8] == 0 and demos[0] == demos.max()  # a soft gate of its own


# --- Rules that remember --------------------------------------------------------------------------


def test_relift_keeps_what_no_sample_solved():
    """Not newest first; an SFT step too early or late, or one that takes nothing from what waits."""
    method = method_of("relift", samples=8, sft_batch=2)
    for chosen, k, waiting in (((5, 6), (0, 1), [5]), ((7,), (8,), [5]),
                               ((8, 9), (0, 0), [8, 9, 5])):
        assert method.explores(1) and not method.imitates(1)
        method.chosen = chosen
        success = torch.tensor([[1.0] * n + [0.0] * (8 - n) for n in k])
        assert method.choose_mu(step_of(11, success)) == 0
        assert list(method.waiting) == waiting
    assert method.imitates(1) and not method.explores(1)
    assert list(method.choose_demos(None)) == [8, 9]
    assert method.choose_mu(step_of(12)) == 1
    assert list(method.waiting) == [5] and method.explores(1)


def test_relift_remembers_the_prompts_that_it_drew():
    """Problems that wait which are not those that were sampled."""
    method = method_of("relift", prompts=4, demos=50, samples=2)
    step = step_of(1, torch.tensor([[0.0, 0], [1, 0], [0, 0], [1, 1]]))
    drawn = method.choose_prompts(step)
    method.choose_mu(step)
    assert list(method.waiting) == [drawn[0], drawn[2]]


def test_sasr_by_hand():
    """p that is not G_last / (G_last + gamma G_warm); norms learned in other than SFT steps."""
    method = method_of("sasr", warmup=10, sasr=2.0)
    assert not any(method.explores(t) for t in range(1, 11))
    for t, norm, success, norms in ((9, 4.0, None, (4, 4)), (10, 3.0, None, (3, 3)),
                                    (11, 1.0, None, (1, 3)), (12, 7.0, torch.zeros(1, 8), (1, 3))):
        mu = method.choose_mu(step_of(t, success, g_sft=torch.tensor([norm, 0.0])))
        assert (method.last, method.warm) == pytest.approx(norms)
        assert mu == (success is None)
    sft = [method.imitates(t) for t in range(11, 20011)]
    assert np.mean(sft) == pytest.approx(1 / (1 + 2 * 3), abs=0.01)
    assert sft == [not method.explores(t) for t in range(11, 20011)]  # one draw, however often asked


def test_cosine_by_hand():
    """A schedule with other ends or another shape."""
    method = method_of("cosine", steps=7, peak=0.9, valley=0.1)
    mus = [method.choose_mu(step_of(t)) for t in (1, 4, 7)]
    assert mus == pytest.approx([0.9, 0.5, 0.1])
    assert method.choose_mu(step_of(3)) == pytest.approx(0.1 + 0.8 * 0.75)


def test_gac_by_hand():
    """A closed form that does not minimise what it should; a move that is too large."""
    # (0.5 * 2 + 1) / (2 + 3 + 1) = 1/3; half way to 1/2: 5/12.
    assert rivals.gac_mu(0.4, 2.0, 3.0, 1.0, most=1.0) == pytest.approx(5 / 12)
    assert rivals.gac_mu(0.4, 2.0, 3.0, 1.0, most=0.01) == pytest.approx(0.41)
    assert rivals.gac_mu(0.9, 2.0, 3.0, 1.0, most=0.01) == pytest.approx(0.89)
    grid = torch.linspace(0, 1, 100001, dtype=torch.float64)
    errors = (grid - 0.5) ** 2 * 2 + grid ** 2 * 3 + (1 - grid) ** 2
    assert grid[errors.argmin()].item() == pytest.approx(1 / 3, abs=1e-4)


def gac_step(t, A, mask):
    """A Step of samples (4, 3) whose tokens on the mask have these advantages (4,)."""
    step = step_of(t, torch.zeros(1, 4))
    step.rollouts.batch = SimpleNamespace(response_mask=mask)
    step.advantages = amft.Advantages(A.unsqueeze(1) * mask, 1.0)
    step.demos = SimpleNamespace(response_mask=mask[:1].expand(10, 3))
    return step


def test_gac_follows_its_three_proxies():
    """Proxies that count masked tokens, one micro-batch, or the last step's demonstrations."""
    method = method_of("gac", warmup=5, meta_every=5, eta_mu=1.0, memory=0.75, demos=64)
    method.mu, method.means = 0.5, [1.0, 3.0, 0.0]
    nll = torch.tensor([9.0, 1, 3, 1, 3, 1, 3, 1, 3, -9.0])
    mask = torch.tensor([[1.0, 1, 0]] * 4)  # the third token is not the policy's
    step = gac_step(10, torch.tensor([2.0, 0.0, -2.0, 1.0]), mask)
    method.nll = [1e6]  # of the step before
    method.choose_demos(step)
    for rows in (torch.arange(7), torch.arange(7, 10)):  # micro-batches
        logps = torch.stack([-nll[rows] - 1, -nll[rows] + 1, nll[rows]], 1)
        method.token_weights(step, logps, rows)
    mu = method.choose_mu(step)
    # Now: mean (1 - A)^2 = (1 + 1 + 9 + 0) / 4; variance of 1, 3 without the extremes = 1;
    # variance of A = 9/4 - 1/16.
    gap, sft, rl = expected = [0.75 + 2.75 / 4, 0.75 * 3 + 1 / 4, 2.1875 / 4]
    assert method.means == pytest.approx(expected)
    assert mu == pytest.approx(((0.5 * gap + rl) / (gap + sft + rl) + 0.5) / 2)
    later = gac_step(11, torch.tensor([1.0, 0.0, -1.0, 0.5]), mask)
    assert method.choose_mu(later) == mu  # between the K only its means move
    assert method.means != pytest.approx(expected)
    assert method.choose_mu(step_of(3)) == 1  # the warm-up


STOPPED = {
    "sasr": ["--warmup", "2", "--sasr", "3"],
    "relift": [],
    "gac": ["--warmup", "2", "--meta-every", "2"],
    "amft": ["--warmup", "2", "--meta-every", "2"],
}


def stopped_in(step):
    """A Run.log_step that is stopped in this step."""
    true = harness.run.Run.log_step

    def log_step(self, done, theta):
        if done.t == step:
            raise KeyboardInterrupt
        true(self, done, theta)
    return log_step


def without_seconds(rows):
    return [{key: row[key] for key in row if key != "seconds"} for row in steps_of(rows)]


@pytest.mark.parametrize("method", STOPPED)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
        method, tiny, tmp_path, monkeypatch, unevaluated):
    """A rule whose memory, or whose budget's, is not all in its state."""
    graded(monkeypatch, mixed)
    flags = ["--method", method, "--steps", "6", "--responses", "240", "--sft-batch", "3",
             *STOPPED[method]]
    whole = run(tiny, tmp_path / "whole", *flags)
    assert 0 < whole[-1]["rollouts"] <= 240
    monkeypatch.setattr(harness.run, "SAVE_SECONDS", 0)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(harness.run.Run, "log_step", stopped_in(5))
        run(tiny, tmp_path / "cut", *flags)
    gc.collect()  # a run is let go of with its last reference
    rivals.main(["--resume", str(tmp_path / "cut")])
    assert without_seconds(read(tmp_path / "cut")) == without_seconds(whole)
    thetas = [torch.load(tmp_path / name / "state.pt")["theta"] for name in ("cut", "whole")]
    assert torch.equal(*thetas)


# --- Budgets, flags -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_responses_are_shared_out_evenly(method, tiny, tmp_path, monkeypatch, unevaluated, capsys):
    """A run that samples more than its budget, leaves some, or has steps of other sizes."""
    graded(monkeypatch, mixed)
    flags = ["--method", method, "--steps", "7", "--responses", "222"]
    if method in ("rl", "hpt"):
        flags += ["--ppo-epochs", "2"]
    if method in SILENT:
        with pytest.raises(SystemExit):
            run(tiny, tmp_path / "run", *flags)
        assert capsys.readouterr().err.splitlines()[-1].count("--responses: is not used") == 1
        return
    rows = run(tiny, tmp_path / "run", *flags)
    steps = steps_of(rows)
    totals = [0, *(row["rollouts"] for row in steps)]
    each = [after - before - 32 * ("meta_grad" in row)
            for before, after, row in zip(totals, totals[1:], steps) if "success" in row]
    assert min(each) >= 4
    assert any("meta_grad" in row for row in steps) == method.startswith("amft")
    if method in ("sasr", "relift"):
        assert 28 <= rows[-1]["rollouts"] <= 220
    else:
        assert rows[-1]["rollouts"] == 220 and max(each) - min(each) <= 4


@pytest.mark.parametrize("flags, says", [
    ("--method amft --responses 10", "--responses 10: must be 0 or at least 132"),
    ("--method rl --responses 35", "must be 0 or at least 36"),
    ("--method rl --gate 0.5", "--gate: is not used"),
    ("--method luffy --warmup 3", "--warmup: is not used"),
    ("--method gac --trace 0.5", "--trace: is not used"),
    ("--method hpt --gate 2", "2"),
    ("--method mifo", "mifo"),
    ("--method rl --splits val,test", "--splits val,test: must be of val, id"),
])
def test_a_budget_too_small_and_flags_of_other_methods_are_one_line(flags, says, tiny, tmp_path,
                                                                   capsys):
    """A traceback, or a run that begins with a flag that means nothing."""
    with pytest.raises(SystemExit) as stop:
        run(tiny, tmp_path / "run", *flags.split())
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and says in line
    assert not (tmp_path / "run").exists()


def test_chosen_splits_are_evaluated_at_every_look(tiny, tmp_path, monkeypatch):
    """--splits that changes the first and last evaluation alone: figures need those between."""
    graded(monkeypatch, mixed)
    rows = run(tiny, tmp_path / "run", "--method", "sft", "--steps", "4", "--eval-n", "1",
               "--splits", "ood_rule,val", "--val-every", "2")
    looks = [(row["step"], row["split"]) for row in rows if row["kind"] == "eval"]
    assert looks == [(step, split) for step in (0, 2, 4) for split in ("val", "ood_rule")]


@pytest.mark.parametrize("words", [[], ["--task", "gp"]])
def test_without_a_method_the_rivals_are_listed_and_nothing_starts(words, tmp_path, monkeypatch,
                                                                  capsys):
    """A run of AMFT by who asked for a rival and named none."""
    monkeypatch.chdir(tmp_path)
    rivals.main(words)
    lines = capsys.readouterr().out.splitlines()
    for name, cls in {**rivals.RIVALS, **controllers.CONTROLLERS}.items():
        own = [line for line in lines if line.split()[:1] == [name]]
        assert len(own) == 1 and own[0].endswith(cls.__doc__.splitlines()[0])
    assert not list(tmp_path.iterdir())


def test_every_flag_is_explained_and_used_by_some_method(capsys):
    """A flag that no method reads, or that --help does not tell of; one refused that there is not."""
    with pytest.raises(SystemExit):
        rivals.main(["--help"])
    said = capsys.readouterr().out
    fields = {field.name for field in dataclasses.fields(rivals.Config)}
    for name in fields:
        assert amft_flag(name) in said
        assert any(uses(method, name) for method in rivals.METHODS)
    assert list(rivals.METHOD_FLAGS) == list(rivals.METHODS)
    for name, row in rivals.METHOD_FLAGS.items():
        assert name in said and {*row.unused, *row.defaults} <= fields


@pytest.mark.parametrize("study", ["gp", "tasks", "worn"])
def test_recorded_flags_still_mean_what_they_meant(study, monkeypatch, tmp_path):
    """A default or a flag whose change would make another run of a recorded one's command."""
    monkeypatch.undo()  # with the tasks' defaults
    table = logs.recorded(study)
    configs = [row for row in table[1:] if row["kind"] == "config" and row["method"] not in ("soup", "race")]  # theirs are made
    assert configs
    for row in configs:
        words = logs.words(table[0], logs.flags_of(table, row["run"]), row["seed"])
        words += ["--out", str(tmp_path / "new")]
        config = parse(words, rivals.Config, rivals.TASKS, rivals.METHOD_FLAGS).config
        unused = rivals.METHOD_FLAGS[config.method].unused
        read = {key: value for key, value in vars(config).items() if key in row and key not in unused}
        read["device"] = row["device"]
        if study != "worn":  # its rule was amft's then
            read["method"] = read["method"].replace("amft-sum", "amft")
        assert read == {key: row[key] for key in read}


def test_looks_that_never_come_are_refused_in_a_line(tmp_path, capsys):
    """A division by --meta-every 0 before it is checked."""
    with pytest.raises(SystemExit) as stopped:
        rivals.main(["--task", "gp", "--method", "amft", "--meta-every", "0", "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2 and "--meta-every 0" in capsys.readouterr().err


def test_each_rival_is_short_and_says_where_it_is_from():
    """A rule that has grown into more than its paper's."""
    for cls in rivals.RIVALS.values():
        lines = inspect.getsource(cls).removesuffix("\n").replace(cls.__doc__, "").splitlines()
        assert len([line for line in lines if line.strip()]) <= 30, cls
        assert "arXiv 25" in cls.__doc__ or "arXiv 26" in cls.__doc__


def test_budgets_leave_a_prompt_for_each_later_step_and_the_controllers_own():
    """A budget that is gone before the last step, or forgets what a look samples."""
    config = rivals.Config(method="amft", steps=9, warmup=3, meta_every=1)
    assert [rivals.looks(config, t) for t in (1, 5, 9)] == [5, 5, 1]  # at 4 nothing moved by mu yet
    every_other = dataclasses.replace(config, meta_every=2)
    assert rivals.looks(every_other, 1) == 3  # steps 5, 7, 9
    method = method_of("relift", steps=10, samples=2, responses=20, demos=64)
    method.first, method.explored = 1, 1  # 1 of 7 steps so far: its share says all is for now
    assert len(method.choose_prompts(step_of(8))) == 8
    assert method.config.prompts == 32
    method.config.responses = 1000
    assert len(method.choose_prompts(step_of(10))) == 64


# --- The probe of the meta-gradient ---------------------------------------------------------------


def test_the_probe_of_the_meta_gradient_runs_to_its_table(tiny, tmp_path, monkeypatch, unevaluated,
                                                          capsys):
    """snr.py at a small size: a missing estimate, or two ways to one number that disagree."""
    small = dict(PROMPTS=4, SAMPLES=4, AFFORD=(2, 2), AT=(4,), LOG=tmp_path / "runs" / "snr.jsonl")
    for name, value in small.items():
        monkeypatch.setattr(snr, name, value)
    graded(monkeypatch, mixed)
    monkeypatch.setattr(snr, "FLAGS", f"--task gp --model {tiny} --steps 5 --warmup 2 --prompts 2 "
                        "--samples 2 --demos 40 --sft-batch 4 --advantage group --lr 1e-3 "
                        "--max-new-tokens 34 --device cpu")
    snr.main([])
    rows = [json.loads(line) for line in snr.LOG.read_text().splitlines()][1:]
    assert len(rows) == 3 * (2 * 2 * len(snr.TRACES) + 2)
    assert all(math.isfinite(row["value"]) for row in rows)
    values = {(row["source"], row["trace"]): row["value"] for row in rows if row["seed"] == 200}
    for trace in snr.TRACES:
        product = values["val by RL gradient", trace]
        own = values["val by conversations", trace]
        assert product == pytest.approx(own, rel=1e-2, abs=1e-9)
    assert "z of 4" in capsys.readouterr().out


def formula_of(deal):
    """The right side of what the expert says, as Python would compute it (the numbers are our own)."""
    left, right = json.loads(deal.expert)["formula"].split("=")
    numbers = [int(word) for word in re.findall(r"\d+", left)]
    return eval(left), sorted(numbers), right


@pytest.mark.parametrize("name, least, most", [("gp-wrong", 1.0, 1.0), ("gp-half", 0.45, 0.55)])
def test_a_worse_expert_uses_the_cards_and_misses_the_target(name, least, most):
    deals = experts.EXPERTS[name]().training(1000, random.Random(3))
    plain = tasks.TASKS["gp"]().training(1000, random.Random(3))
    missed = 0
    for deal, same in zip(deals, plain):
        assert (deal.prompt, deal.unit) == (same.prompt, same.unit)  # the deals are gp's, only the expert is not
        value, numbers, right = formula_of(deal)
        assert numbers == sorted(deal.numbers) and right == "24"
        wrong = abs(value - 24) > 1e-9
        assert deal.grade(deal.expert) == ("wrong_result" if wrong else "correct")
        missed += wrong
    assert least <= missed / len(deals) <= most


@pytest.mark.parametrize("name, least, most", [("math-wrong", 1.0, 1.0), ("math-half", 0.45, 0.55)])
def test_an_expert_that_slips_is_right_up_to_its_last_result(name, least, most):
    """A slip that earns a reward, is negative, or comes earlier; another answer than what was worked out."""
    problems = experts.EXPERTS[name]().training(1000, random.Random(3))
    off = collections.Counter()
    for problem, same in zip(problems, tasks.TASKS["math"]().training(1000, random.Random(3))):
        assert (problem.prompt, problem.answer, problem.unit) == (same.prompt, same.answer, same.unit)
        work, said = problem.solution.rsplit(" = ", 1)
        result, box = re.fullmatch(r"([0-9/]+)\. Answer: \\boxed\{(.*)\}", said).groups()
        assert same.solution.startswith(f"{work} = ") and box == result
        wrong = problem.grade(problem.solution) == "wrong_answer"
        assert wrong == (problem.solution != same.solution)
        off[Fraction(result) - Fraction(same.answer)] += 1
    assert set(off) == {0, *range(-9, 0), *range(1, 10)} - ({0} if least == 1 else set())
    assert least <= 1 - off[0] / 1000 <= most


def test_an_expert_in_another_form_is_right_and_counts_as_wrong():
    """A formula that is wrong, or one that the grader takes."""
    deals = experts.EXPERTS["gp-form"]().training(200, random.Random(3))
    for deal, same in zip(deals, tasks.TASKS["gp"]().training(200, random.Random(3))):
        assert deal.prompt == same.prompt and deal.grade(same.expert) == "correct"
        assert deal.grade(deal.expert) == "illegal_formula"
        turned = json.loads(deal.expert)
        left, right = turned["formula"].split("=")
        assert json.dumps({**turned, "formula": f"{right}={left}"}) == same.expert


def test_a_worse_expert_makes_the_same_mistake_whenever_it_is_asked():
    for name, same in (("gp-half", "numbers"), ("math-half", "unit")):
        said = {}
        for episode in experts.EXPERTS[name]().training(3000, random.Random(4)):
            fits = episode.grade(episode.expert) == "correct"
            assert said.setdefault(getattr(episode, same), fits) == fits
        assert len(said) < 3000  # some came more than once


def small_run(tmp_path, name, *words):
    """The run's rows, without seconds and what it was started with."""
    rivals.main(["--model", "base", "--steps", "3", "--demos", "100", "--splits", "val", "--before", "0",
                 "--eval-n", "2", "--eval-samples", "1", "--val-every", "0", "--out", str(tmp_path / name), *words])
    rows = logs.read(tmp_path / name)
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows[1:]]


def test_rl_on_a_task_with_a_worse_expert_is_rl_on_the_task(tmp_path):
    def log(name):
        return small_run(tmp_path, name, "--task", name, "--method", "rl", "--prompts", "2", "--samples", "2")
    assert log("gp") == log("gp-wrong") == log("gp-form")
    assert log("math") == log("math-wrong")


@pytest.mark.parametrize("method", ["amft", "sft", "trsft"])
def test_grading_right_demonstrations_changes_no_digit(tmp_path, method):
    words = ["--task", "gp", "--method", method, *(["--prompts", "2"] if method != "sft" else [])]
    assert small_run(tmp_path, "all", *words) == small_run(tmp_path, "graded", *words, "--graded", "1")


def test_only_accepted_demonstrations_are_shown_and_all_problems_are_sampled(tmp_path, monkeypatch):
    """Wrong ones among them; prompts of the accepted alone; accepted by another seed's list."""
    shown, asked = [], []
    encode, rollout = amft.encode_demos, amft.rollout
    monkeypatch.setattr(amft, "encode_demos", lambda model, tokenizer, episodes: shown.extend(episodes) or encode(model, tokenizer, episodes))
    monkeypatch.setattr(amft, "rollout", lambda model, tokenizer, episodes, *rest: asked.extend(episodes) or rollout(
        model, tokenizer, episodes, *rest))
    small_run(tmp_path, "run", "--task", "gp-half", "--method", "fixed", "--graded", "1", "--prompts", "20",
              "--samples", "2", "--sft-batch", "6", "--seed", "5")
    fits = lambda deal: deal.grade(deal.expert) == "correct"  # noqa: E731
    assert len(shown) == 18 and all(map(fits, shown))
    problems = experts.EXPERTS["gp-half"]().training(100, random.Random("demos 5"))
    right = {deal.prompt for deal in problems if fits(deal)}
    assert {deal.prompt for deal in shown} <= right and len({deal.prompt for deal in shown}) > 6
    assert any(deal.prompt in right for deal in asked[:60]) and not all(deal.prompt in right for deal in asked[:60])


@pytest.mark.parametrize("name", sorted(amft.TASKS))
def test_a_demonstration_is_graded_as_a_whole_conversation(name):
    """Slips that it makes on purpose count as its failure; an episode that is graded is used up."""
    task = rivals.TASKS[name](turns=3)
    for episode in task.training(30, random.Random(1)):
        assert rivals.accepted(episode) and episode.history == ()
    bad = task.training(1, random.Random(2))[0]
    last = bad.demonstration()[-1]
    bad.demonstration = lambda: [last._replace(response="no answer")]
    assert not rivals.accepted(bad)


@pytest.mark.parametrize("words, says", [
    ("--task gp-wrong --method fixed", "--graded 1: leaves 0 of 100 demonstrations, so there is nothing to imitate: use --method rl"),
    ("--task gp --method amft --shown 40", "--shown 40, --graded 1: leaves 40 of 100 demonstrations, fewer than --sft-batch 64"),
    ("--task gp --method sft --shown 101", "--shown 101: must be at most --demos, 100"),
    *((f"--task gp --method {name}", f"--graded: is not used by --method {name}") for name in ["rl", "relift"])])
def test_grading_where_nothing_is_left_or_imitated_is_refused(tmp_path, capsys, words, says):
    with pytest.raises(SystemExit) as stop:
        small_run(tmp_path, "run", *words.split(), "--graded", "1")
    assert stop.value.code == 2 and says in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_every_method_grades_its_demonstrations_or_refuses_to():
    """One that says --graded 1 and imitates the wrong ones, too."""
    task = experts.EXPERTS["gp-half"]()
    for name, flags in rivals.METHOD_FLAGS.items():
        assert ("graded" in flags.unused) == ("shown" in flags.unused)
        if "graded" not in flags.unused and name not in ("rl", "amft-replay"):
            method = rivals.METHODS[name](rivals.Config(task="gp-half", method=name, demos=100, graded=1, sft_batch=30), task)
            assert all(rivals.accepted(task.training(100, random.Random("demos 0"))[i])
                       for i in method.choose_demos(amft.Step(2, 0.1, random.Random(0)))), name
    config = rivals.Config(task="gp-half", method="fixed", demos=100, graded=1, shown=40, sft_batch=15, prompts=90)
    few = rivals.METHODS["fixed"](config, task)
    chosen = {i for t in range(20) for i in few.choose_demos(amft.Step(2, 0.1, random.Random(t)))}
    assert chosen == {i for i, deal in enumerate(task.training(100, random.Random("demos 0"))[:40]) if rivals.accepted(deal)}
    assert len(few.choose_prompts(amft.Step(2, 0.1, random.Random(0)))) == 90
    assert max(rivals.METHODS["fixed"](dataclasses.replace(config, shown=0), task).kept) > 40
    ungraded = {name for name, flags in rivals.METHOD_FLAGS.items() if "graded" in flags.unused}
    assert ungraded == {"rl", "amft-auto", "relift", "gac", "superrl", "hpt", "dyme", "luffy", "srft"}


# --- Merging --------------------------------------------------------------------------------------


def test_merging_is_linear_in_the_weights():
    """One that starts from zero, or from one of the two."""
    rng = np.random.default_rng(0)
    start, sft, rl = ({"w": rng.normal(size=(3, 4))} for _ in range(3))
    tensors = [{"w": torch.tensor(part["w"])} for part in (start, sft, rl)]
    for a, b in soup.GRID:
        expected = (1 - a - b) * start["w"] + a * sft["w"] + b * rl["w"]
        assert np.allclose(soup.merged(*tensors, a, b)["w"].numpy(), expected, atol=1e-12)
    assert len(soup.GRID) == 8 and (0.0, 0.0) not in soup.GRID


@pytest.mark.parametrize("task, splits", [("gp", ["--splits", "val,id"]), ("math", [])])
def test_a_soup_of_one_policy_alone_is_that_policy(tmp_path, tiny, monkeypatch, task, splits):
    """Weights of the other run, an evaluation that is not a run's, responses that are not counted."""
    for method, more in (("sft", []), ("rl", ["--prompts", "2"])):
        rivals.main(["--task", task, "--model", str(tiny), "--method", method, "--steps", "2", "--eval-n", "5",
                     "--eval-samples", "2", *splits, "--lr", "0.05", *more,
                     "--out", str(tmp_path / f"{method}-3")])
        (tmp_path / f"{method}-3.txt").write_text("what it printed")  # as matrix.py leaves it
    (tmp_path / "spec.json").write_text(json.dumps(dict(seeds=[4], more={"s*": [3]}, runs=dict(soup="+sft +rl", sft="", rl=""))))
    monkeypatch.setattr(soup, "choose", lambda success: success(0.5, 0.5) or (1.0, 0.0))
    (sft, rl, out), = soup.pairs(tmp_path)
    soup.soup(sft, rl, out)
    rows, of_sft, of_rl = map(logs.read, (out, sft, rl))
    last = [row for row in of_sft if row["kind"] == "eval" and row["step"] == 2]
    own = [row for row in rows if row["kind"] == "eval"]
    assert [row["split"] for row in own] == (["val", "id"] if splits else list(tasks.TASKS[task].splits))
    for row, same in zip(own, last, strict=True):
        assert (row["success"], row["hits"], row["outcomes"]) == (same["success"], same["hits"], same["outcomes"])
    assert rows[-1]["rollouts"] == of_rl[-1]["rollouts"] + 5 * soup.SAMPLES
    assert not list(soup.pairs(tmp_path))  # it is done


def test_a_soup_is_chosen_by_success_on_val():
    of = {pair: 0.1 for pair in soup.GRID}
    of[0.5, 1.0] = of[1.0, 0.5] = 0.3
    assert soup.choose(lambda a, b: of[a, b]) == (0.5, 1.0)


# --- The race -------------------------------------------------------------------------------------


def trained(rows):
    """What training did, without the clock and the count of responses."""
    return [{key: value for key, value in row.items() if key not in ("seconds", "rollouts")}
            for row in rows if row["kind"] == "step"]


def test_a_race_is_three_runs_of_which_one_is_finished(tiny, tmp_path, unevaluated, monkeypatch):
    """Heats that differ from the runs whose first steps they are, a winner that starts again, a race that cannot go on."""
    words = f"--task gp --model {tiny} --steps 4 --samples 2 --prompts 2 --max-new-tokens 32 --sft-batch 2 --warmup 1 --device cpu".split()
    started, go = [], race.go
    monkeypatch.setattr(race, "go", lambda words, run_class: (started.append(words), go(words, run_class)))
    monkeypatch.setattr(race, "MUS", (0.1, 0.5))
    out = tmp_path / "race"
    race.main([*words, "--heat", "2", "--out", str(out)])
    assert len(started) == 3 and started[2] == ["--resume", str(out / "heats" / "mu-0.1")]  # of equals the lowest
    for mu in race.MUS:
        rivals.main([*words, "--method", "fixed", "--mu", str(mu), "--out", str(tmp_path / str(mu))])
    winner, loser = (logs.read(tmp_path / str(mu)) for mu in race.MUS)
    assert trained(logs.read(out)) == trained(winner) and len(trained(winner)) == 4
    assert trained(logs.read(out / "heats" / "mu-0.5")) == trained(loser)[:2]
    assert torch.load(out / "heats" / "mu-0.5" / "state.pt")["own"]["t"] == 2
    first, *_, last = logs.read(out)
    assert (first["method"], last["rollouts"], last["heats"]) == ("race", 4 * 4, [0, 0])  # of three and one steps that sample
    del started[:]
    race.main([*words, "--heat", "2", "--out", str(out)])
    assert started == []
    first_heat = ["--resume", str(tmp_path / "short" / "heats" / "mu-0.1")]
    new = [*words, "--method", "fixed", "--mu", "0.1", "--out", first_heat[1]]
    go(new, type("Heat", (race.Heat,), dict(heat=1)))
    race.main([*words, "--heat", "2", "--out", str(tmp_path / "short")])  # one heat stands in its midst
    assert started[0] == first_heat
    assert trained(logs.read(tmp_path / "short")) == trained(winner)
    assert len(trained(logs.read(tmp_path / "short" / "heats" / "mu-0.5"))) == 2


def test_a_race_goes_to_the_heat_that_is_right_most_often_in_its_last_steps(tmp_path, monkeypatch):
    """One that is judged by a heat's first steps, by its last step alone, or by what a winner did after its heat."""
    ends = {0.1: [1.0] * 10 + [0.2] * 20, 0.5: [0.0] * 10 + [0.3] * 20, 0.9: [0.0] * 29 + [1.0] + [1.0] * 9}
    for mu, successes in ends.items():
        folder = tmp_path / "heats" / f"mu-{mu}"
        folder.mkdir(parents=True)
        steps = [dict(kind="step", step=t, success=x, rollouts=t, seconds=1.0) for t, x in enumerate(successes, 1)]
        logs.write(folder / "metrics.jsonl", [dict(kind="config", method="fixed"), *steps])
    gone = []
    monkeypatch.setattr(race, "go", lambda words, run_class: gone.append((words[1], run_class)))
    race.race([], tmp_path, heat=30)
    assert gone == [(str(tmp_path / "heats" / "mu-0.5"), rivals.Run)]


def test_the_table_chooses_as_a_race_does():
    """Other mus or other steps in regret.py than in race.py."""
    assert regret.RACERS == [f"fixed-{mu}" for mu in race.MUS]
    assert race.JUDGED == 50 - 30 and "default: 50" in inspect.getsource(race.main)


@pytest.mark.parametrize("flags", ["--mu 0.3", "--method=amft", "--heat 0", "--heat 3 --warmup 3", "--heat 6 --steps 6",
                                   "--resume runs/race"])
def test_a_race_refuses_what_it_sets_itself(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        race.main([*flags.split(), "--out", str(tmp_path / "race")])
    assert stopped.value.code == 2 and not (tmp_path / "race").exists()
    assert flags.split()[0].split("=")[0] in capsys.readouterr().err.splitlines()[-1]
