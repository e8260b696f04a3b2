"""python -m pytest -q compare/test_rivals.py: a minute. Each rule against its published loss, computed slowly."""

import dataclasses
import inspect
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import amft  # noqa: E402
import tasks  # noqa: E402
from compare import rivals  # noqa: E402

METHODS = sorted(set(rivals.METHODS) - set(rivals.CONTROLLERS))  # these: test_controllers.py
OWN_PROMPTS = {"superrl", "hpt", "dyme", "luffy", "srft"}  # these demonstrate the step's own prompts
NO_WARMUP = OWN_PROMPTS | {"sft", "dft", "rl", "relift", "cosine", "chord"}


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
    folder, tokenizer = tmp_path_factory.mktemp("tiny"), AutoTokenizer.from_pretrained(ROOT / "base")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def unevaluated(monkeypatch):
    row = dict(split="val", n=1, samples=4, success=0.0, low=0.0, high=1.0, any=0.0, greedy=0.0)
    monkeypatch.setattr(amft, "evaluate", lambda *_: row)


def graded(monkeypatch, outcome):
    monkeypatch.setattr(tasks.Deal, "grade", lambda self, text: outcome(text))


def mixed(text):
    return "correct" if len(text) % 3 == 0 else "no_answer"


def read(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def run(model, out, *flags):
    rivals.main(["--task", "gp", "--smoke", "--model", model, "--out", str(out), "--max-new-tokens", "34",
                 "--device", "cpu", *flags])
    return read(out)


def steps_of(rows):
    return [row for row in rows if row["kind"] == "step"]


def finite(rows):
    return all(math.isfinite(x) for row in rows for x in row.values() if x != "step")


def flat_grad(loss, model):
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.reshape(-1) for g in grads])


# --- every method, with the defaults that a user types ------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_with_its_defaults_and_with_either_advantage(method, tiny, tmp_path, monkeypatch):
    """To the end, evaluations included; finite; the warm-up is SFT."""
    graded(monkeypatch, mixed)
    monkeypatch.setattr(tasks.GeneralPoints, "splits", {k: tasks.GeneralPoints.splits[k] for k in ("val", "id")})
    length = "8" if method == "sasr" else "5"
    choices = (), ("--advantage", "group", "--ppo-epochs", "2")
    for i, flags in enumerate(choices if "advantage" not in rivals.METHODS[method].unused else choices[:1]):
        out = tmp_path / str(i)
        rows = run(tiny, out, "--eval-n", "1", "--method", method, "--steps", length, "--demos", "64", *flags)
        steps, config = steps_of(rows), rows[0]
        assert len(steps) == int(length) and rows[-1]["kind"] == "final" and (out / "final/model.safetensors").exists()
        assert finite(steps)
        assert sum(row["grad_norm"] for row in steps) > 0
        assert config["method"] == method and {row["split"] for row in rows if row["kind"] == "eval"} >= {"val", "id"}
        assert config["warmup"] == (0 if method in NO_WARMUP else 3) or method == "sft"
        for row in steps if method in ("sft", "dft") else steps[:config["warmup"]]:
            assert row["mu"] == 1 and "success" not in row  # the warm-up, or SFT alone
    assert (steps[-1]["rollouts"] == 0) == (method in ("sft", "dft"))


# --- each rule's gradient ----------------------------------------------------------------------------------------


def published(method, logp, A, H, G):
    """A demonstration's loss (1, T) as its paper prints it; autograd goes through all but what is said constant."""
    p = logp.exp()
    return {"dft": lambda: -p.detach() * logp, "chord": lambda: -(p * (1 - p)).detach() * logp,
            "luffy": lambda: -A * p / (p + 0.1), "srft": lambda: -0.5 * math.exp(-H) * logp - A * p,
            "dyme": lambda: -logp / G}.get(method, lambda: -logp)()


def group(success):
    """Of rows of successes: each less its group's mean, in units of the batch's standard deviation of these."""
    centred = np.array([[r - sum(row) / len(row) for r in row] for row in success.tolist()])
    return torch.tensor(centred / (np.sqrt((centred ** 2).mean()) if centred.any() else 1.0))


def expected_step(method, model, rollouts, demos, config):
    """Gradient of the method's first mixed step, prompt by prompt and row by row, in whole-batch denominators."""
    success, H, (P, G) = rollouts.success, rollouts.entropy, rollouts.success.shape
    k = success.sum(1).tolist()
    mus = {"superrl": [float(n == 0) for n in k], "dyme": [float(n == 0) for n in k],
           "hpt": [float(n <= config["gate"] * G) for n in k], "luffy": [1 / (G + 1)] * P, "srft": [0.5] * P,
           "fixed": [0.5] * P, "gac": [config["mu"]] * P, "amft": [config["mu"]] * P, "chord": [0.1] * P,
           "cosine": [0.9] * P}.get(method, [0.0] * P)
    union = group(torch.cat([success, torch.ones(P, 1)], 1))
    A = {"luffy": union[:, :G], "srft": torch.where(success == 1, 0.1 * math.exp(H), -1.0)}.get(method, group(success))
    loss = 0.0
    for i in range(P * G):
        row = rollouts.batch.rows([i])
        logp = (amft.logps_of(model, row) * row.mask).sum()
        loss = loss - (1 - mus[i // G]) * A.reshape(-1)[i].item() * logp / rollouts.batch.mask.sum()
    for i in range(len(demos.ids) if demos else 0):
        row, own = demos.rows([i]), len(demos.ids) == P
        token_losses = published(method, amft.logps_of(model, row), union[i, G].item() if own else None, H, G)
        loss = loss + mus[i if own else 0] * (token_losses * row.mask).sum() / demos.mask.sum()
    return flat_grad(loss, model)


@pytest.fixture
def seen(monkeypatch):
    """What a run's calls gave: rollouts, batches of demonstrations, and the gradients of its steps."""
    calls = dict(rollout=[], encode_demos=[], adamw_step=[])
    for name in calls:
        def spy(*args, true=getattr(amft, name), name=name, **kwargs):
            calls[name].append(args[1] if name == "adamw_step" else true(*args, **kwargs))
            return true(*args, **kwargs) if name == "adamw_step" else calls[name][-1]
        monkeypatch.setattr(amft, name, spy)
    return calls


def first_step(method, tiny, out, *flags):
    """(policy before it, config) of a run of one mixed step, where 6 prompts have 4 samples each."""
    warm = () if "warmup" in rivals.METHODS[method].unused else ("--warmup", "0")
    group_ = () if "advantage" in rivals.METHODS[method].unused else ("--advantage", "group")
    prompts = () if "prompts" in rivals.METHODS[method].unused else ("--prompts", "6")
    batch = () if "sft_batch" in rivals.METHODS[method].unused else ("--sft-batch", "9")
    config = run(tiny, out, "--method", method, "--steps", "3" if method == "sft" else "1", "--micro-tokens", "150",
                 *warm, *group_, *prompts, *batch, *flags)[0]
    return amft.load_policy(amft.Config(device="cpu", model=tiny), tasks.GeneralPoints())[0], config


def close(actual, expected):
    assert expected.norm() > 0
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=1e-5 * expected.norm().item())


@pytest.mark.parametrize("method, flags", [*((m, ()) for m in METHODS), ("hpt", ("--gate", "0.5"))])
def test_a_step_of_every_method_is_the_gradient_of_its_published_loss(method, flags, tiny, tmp_path, monkeypatch, seen,
                                                                       unevaluated):
    """Through train: gates, coefficients, stop-gradients, advantages, micro-batches and the one normalisation."""
    graded(monkeypatch, mixed)
    model, config = first_step(method, tiny, tmp_path / "run", *flags)
    demos = seen["encode_demos"][0] if seen["encode_demos"] else None
    assert demos is None or len(demos.ids) == (6 if method in OWN_PROMPTS else 9)
    if method in ("sft", "dft", "sasr"):  # SASR knows no gradient norm yet: it starts with SFT
        assert not seen["rollout"]
        expected = flat_grad((published(method, amft.logps_of(model, demos), None, None, None) * demos.mask).sum()
                             / demos.mask.sum(), model)
    else:
        rollouts = seen["rollout"][0]
        k = rollouts.success.sum(1)
        assert rollouts.success.shape == (6, 4) and 0 < k.sum() < 24 and 0 in k and len(set(k.tolist())) > 1
        assert (demos is None) == (method in ("rl", "sft-rl", "relift"))
        expected = expected_step(method, model, rollouts, demos, config)
    close(seen["adamw_step"][0], expected)
    if method in ("dft", "chord"):  # the stop-gradient matters here: the test would see it gone
        logp = amft.logps_of(model, demos)
        loss = -(logp.exp() if method == "dft" else logp.exp() * (1 - logp.exp())) * logp
        through = flat_grad((loss * demos.mask).sum() / demos.mask.sum(), model)
        p = logp.detach().exp()
        loss = -(p if method == "dft" else p * (1 - p)) * amft.logps_of(model, demos)
        stopped = flat_grad((loss * demos.mask).sum() / demos.mask.sum(), model)
        assert (through - stopped).norm() > 0.2 * stopped.norm()


@pytest.mark.parametrize("outcome", ["correct", "no_answer"])
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"sft", "dft", "sasr"}))
def test_steps_where_every_prompt_or_none_is_solved(method, outcome, tiny, tmp_path, monkeypatch, seen, unevaluated):
    """Nothing is divided by 0; a gate that is open for all is SFT on the step's prompts, one closed for all is RL."""
    graded(monkeypatch, lambda text: outcome)
    model, config = first_step(method, tiny, tmp_path / "run")
    step, actual = steps_of(read(tmp_path / "run"))[0], seen["adamw_step"][0]
    assert finite([step]) and actual.isfinite().all()
    if method in ("superrl", "hpt", "dyme"):
        assert step["mu"] == (outcome == "no_answer")
    alone = method in ("rl", "sft-rl", "relift")  # these imitate nothing; the next let be what is solved
    if alone or method in ("superrl", "hpt", "dyme", "luffy") and outcome == "correct":
        assert actual.norm() == 0
    else:
        close(actual, expected_step(method, model, seen["rollout"][0], seen["encode_demos"][0], config))


@pytest.mark.parametrize("method", ["superrl", "hpt"])
def test_weights_of_single_prompts_add_up_also_with_the_value_function(method, tiny, tmp_path, monkeypatch, seen,
                                                                       unevaluated):
    """With GAE's advantages, which are nowhere 0: the step is the sum over prompts, each weighted by itself."""
    graded(monkeypatch, mixed)
    plain = []
    monkeypatch.setattr(amft, "advantages_of", lambda *a, true=amft.advantages_of: plain.append(true(*a)) or plain[0])
    run(tiny, tmp_path / "run", "--method", method, "--steps", "1", "--prompts", "6")
    model = amft.load_policy(amft.Config(device="cpu", model=tiny), tasks.GeneralPoints())[0]
    rollouts, demos, loss = seen["rollout"][0], seen["encode_demos"][0], 0.0
    for i, k in enumerate(rollouts.success.sum(1).tolist()):
        own = slice(4 * i, 4 * i + 4)
        samples, demo, A = rollouts.batch.rows(own), demos.rows([i]), plain[0].values[own]
        assert A.any()
        loss += (-(amft.logps_of(model, demo) * demo.mask).sum() / demos.mask.sum() if k == 0 else
                 -(amft.logps_of(model, samples) * A).sum() / rollouts.batch.mask.sum())
    close(seen["adamw_step"][0], flat_grad(loss, model))


def test_gates_and_union_advantages_on_every_number_of_correct_samples():
    success = torch.tensor([[1.0] * k + [0.0] * (8 - k) for k in range(9)])
    none, few = [1.0] + [0.0] * 8, [1.0] * 3 + [0.0] * 6
    for name, gate, expected in (("superrl", 0.0, none), ("dyme", 0.0, none), ("hpt", 0.0, none), ("hpt", 0.25, few),
                                 ("hpt", 1.0, [1.0] * 9)):
        method = rivals.METHODS[name](rivals.Config(method=name, samples=8, gate=gate))
        assert method.weights(SimpleNamespace(rollouts=SimpleNamespace(success=success))).tolist() == expected
    samples, demos = rivals.union_advantages(success)
    expected = group(torch.cat([success, torch.ones(9, 1)], 1))
    torch.testing.assert_close(torch.cat([samples, demos.unsqueeze(1)], 1), expected.float())
    assert demos[8] == 0 and demos[0] == demos.max()  # a soft gate of its own


@pytest.mark.parametrize("method", ["sft", "dft", "chord", "luffy", "srft"])
def test_coefficients_of_probable_and_improbable_tokens(method):
    """-c(p) grad log p, by autograd through the loss as it is used, for p from 0.001 to 0.999; masked tokens: 0."""
    p, A, H = torch.linspace(0.001, 0.999, 50).view(2, 25), torch.tensor([[1.5], [-0.5], [0.7]]), 0.3
    c = {"sft": torch.ones_like(p), "dft": p, "chord": p * (1 - p), "luffy": A[1:] * 0.2 * p / (p + 0.2) ** 2,
         "srft": 0.5 * math.exp(-H) + A[1:] * p}[method]
    cls = rivals.METHODS[method]
    config = rivals.Config(**{"method": method, "shape": 0.2, **cls.defaults})
    s = SimpleNamespace(A=A.squeeze(1), rollouts=SimpleNamespace(entropy=H))
    logps, mask = p.log().requires_grad_(), (torch.arange(25) > 2).float().expand(2, 25)
    loss = cls(config).imitation_loss(s, logps, mask, torch.tensor(7.0), torch.tensor([1, 2]))
    torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], -c * mask / 7)


# --- rules that remember ------------------------------------------------------------------------------------------


def step(t=1, success=None, **fields):
    rollouts = None if success is None else SimpleNamespace(success=success)
    return SimpleNamespace(t=t, rollouts=rollouts, demos=None if rollouts else True, rng=random.Random(t), **fields)


def test_relift_buffers_what_no_sample_solved():
    """Newest first; an SFT step when the buffer can fill one, which takes from it; nothing else does."""
    method = rivals.METHODS["relift"](rivals.Config(method="relift", samples=8, sft_batch=2))
    for problems, k, buffer in (((5, 6), (0, 1), [5]), ((7,), (8,), [5]), ((8, 9), (0, 0), [8, 9, 5])):
        assert method.explores(1) and not method.imitates(1)
        assert method.mu(step(11, torch.tensor([[1.0] * n + [0.0] * (8 - n) for n in k]), problems=problems)) == 0
        assert list(method.buffer) == buffer
    assert method.imitates(1) and not method.explores(1) and list(method.demonstrations(None)) == [8, 9]
    assert method.mu(step(12)) == 1 and list(method.buffer) == [5] and method.explores(1)


def test_sasr_by_hand():
    """p = G_last / (G_last + gamma G_warm); norms are learned from SFT steps alone, G_warm in the warm-up alone."""
    method = rivals.METHODS["sasr"](rivals.Config(method="sasr", warmup=10, sasr=2.0))
    assert not any(method.explores(t) for t in range(1, 11))
    for t, norm, success, expected in ((9, 4.0, None, (4, 4)), (10, 3.0, None, (3, 3)), (11, 1.0, None, (1, 3)),
                                       (12, 7.0, torch.zeros(1, 8), (1, 3))):
        mu = method.mu(step(t, success, g_sft=torch.tensor([norm, 0.0])))
        assert (method.last, method.warm) == pytest.approx(expected) and mu == (success is None)
    sft = [method.imitates(t) for t in range(11, 20011)]
    assert np.mean(sft) == pytest.approx(1 / (1 + 2 * 3), abs=0.01)
    assert sft == [not method.explores(t) for t in range(11, 20011)]  # one draw a step, however often it is asked


def test_cosine_by_hand():
    method = rivals.METHODS["cosine"](rivals.Config(method="cosine", steps=7, peak=0.9, valley=0.1))
    assert [method.mu(step(t)) for t in (1, 4, 7)] == pytest.approx([0.9, 0.5, 0.1])
    assert method.mu(step(3)) == pytest.approx(0.1 + 0.8 * 0.75)


def test_gac_by_hand():
    # (0.5 * 2 + 1) / (2 + 3 + 1) = 1/3; half way to 1/2: 5/12.
    assert rivals.gac_mu(0.4, 2.0, 3.0, 1.0, most=1.0) == pytest.approx(5 / 12)
    assert rivals.gac_mu(0.4, 2.0, 3.0, 1.0, most=0.01) == pytest.approx(0.41)
    assert rivals.gac_mu(0.9, 2.0, 3.0, 1.0, most=0.01) == pytest.approx(0.89)
    grid = torch.linspace(0, 1, 100001, dtype=torch.float64)
    errors = (grid - 0.5) ** 2 * 2 + grid ** 2 * 3 + (1 - grid) ** 2
    assert grid[errors.argmin()].item() == pytest.approx(1 / 3, abs=1e-4)  # what the closed form minimises


def test_gac_follows_its_three_proxies():
    method = rivals.METHODS["gac"](rivals.Config(method="gac", warmup=5, meta_every=5, eta_mu=1.0, memory=0.75))
    method.state = 0.5, [1.0, 3.0, 0.0]
    A, nll = torch.tensor([2.0, 0.0, -2.0, 1.0]), torch.tensor([9.0, 1, 3, 1, 3, 1, 3, 1, 3, -9.0])
    mask = torch.tensor([[1.0, 1, 0]] * 4)
    s = step(10, torch.zeros(1, 4), advantages=SimpleNamespace(values=A.unsqueeze(1) * mask))
    s.rollouts.batch = SimpleNamespace(mask=mask)
    for rows in (slice(0, 7), slice(7, 10)):  # micro-batches; the third token is masked
        logps = torch.stack([-nll[rows] - 1, -nll[rows] + 1, nll[rows]], 1)
        method.imitation_loss(s, logps, torch.tensor([[1.0, 1, 0]]).expand_as(logps), torch.tensor(20.0), rows)
    mu = method.mu(s)
    # now: mean (1 - A)^2 = (1 + 1 + 9 + 0) / 4; variance of 1, 3 without the extremes = 1; variance of A = 9/4 - 1/16
    gap, sft, rl = expected = [0.75 + 2.75 / 4, 0.75 * 3 + 1 / 4, 2.1875 / 4]
    assert method.state[1] == pytest.approx(expected)
    assert mu == pytest.approx(((0.5 * gap + rl) / (gap + sft + rl) + 0.5) / 2)
    s.t = 11
    s.advantages.values = s.advantages.values / 2
    assert method.mu(s) == mu and method.state[1] != pytest.approx(expected)  # between the K, these alone move
    assert method.mu(step(3)) == 1  # the warm-up


@pytest.mark.parametrize("method", ["sasr", "relift", "gac", "amft"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(method, tiny, tmp_path, monkeypatch, unevaluated):
    graded(monkeypatch, mixed)
    flags = ["--method", method, "--steps", "6", "--responses", "240", "--sft-batch", "3", "--meta-every", "2"]
    flags = flags[:-2] if method in ("sasr", "relift") else flags
    flags += {"relift": [], "sasr": ["--warmup", "2", "--sasr", "3"]}.get(method, ["--warmup", "2"])
    whole = run(tiny, tmp_path / "whole", *flags)
    assert 0 < whole[-1]["rollouts"] <= 240
    monkeypatch.setattr(amft, "SAVE_SECONDS", 0)
    true = amft.Run.log_step

    def stop(self, s, *rest):
        if s.t == 5:
            raise KeyboardInterrupt
        return true(self, s, *rest)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(amft.Run, "log_step", stop)
        run(tiny, tmp_path / "cut", *flags)
    rivals.main(["--resume", str(tmp_path / "cut")])
    clean = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in steps_of(rows)]  # noqa: E731
    assert clean(read(tmp_path / "cut")) == clean(whole)
    assert torch.equal(*(torch.load(tmp_path / x / "state.pt")["theta"] for x in ("cut", "whole")))


# --- budgets, flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_responses_are_shared_out_evenly(method, tiny, tmp_path, monkeypatch, unevaluated, capsys):
    graded(monkeypatch, mixed)
    flags = ["--method", method, "--steps", "7", "--responses", "222"]
    flags += ["--ppo-epochs", "2"] if method in ("rl", "hpt") else []
    if method in ("sft", "dft"):
        with pytest.raises(SystemExit):
            run(tiny, tmp_path / "run", *flags)
        assert capsys.readouterr().err.splitlines()[-1].count("--responses: is not used") == 1
        return
    rows = run(tiny, tmp_path / "run", *flags)
    assert rows[-1]["rollouts"] == 220 or method in ("sasr", "relift") and 28 <= rows[-1]["rollouts"] <= 220
    steps = steps_of(rows)
    each = [b["rollouts"] - a["rollouts"] - 32 * ("meta_grad" in b) for a, b in zip([dict(rollouts=0), *steps], steps)]
    each = [n for n, row in zip(each, steps) if "success" in row]
    assert (method == "amft") == any("meta_grad" in row for row in steps)
    assert min(each) >= 4 and (max(each) - min(each) <= 4 or method in ("sasr", "relift"))


def test_a_budget_too_small_and_flags_of_other_methods_are_one_line(tiny, tmp_path, capsys):
    for flags, said in ((["--responses", "10"], "--responses 10: must be 0 or at least 132"),
                        (["--method", "rl", "--responses", "35"], "must be 0 or at least 36"),
                        (["--method", "rl", "--gate", "0.5"], "--gate: is not used"),
                        (["--method", "luffy", "--warmup", "3"], "--warmup: is not used"),
                        (["--method", "gac", "--trace", "0.5"], "--trace: is not used"),
                        (["--method", "hpt", "--gate", "2"], "2"), (["--method", "mifo"], "mifo")):
        with pytest.raises(SystemExit) as stop:
            run(tiny, tmp_path / "run", *flags)
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and said in line and not (tmp_path / "run").exists()


def test_every_flag_is_explained_and_used_by_some_method(capsys):
    with pytest.raises(SystemExit):
        rivals.main(["--help"])
    said = capsys.readouterr().out
    for field in dataclasses.fields(rivals.Config):
        assert f"--{field.name.replace('_', '-')}" in said
        assert any(field.name not in cls.unused for cls in rivals.METHODS.values())
    for name, cls in rivals.METHODS.items():
        assert name in said and not set(cls.unused) - {field.name for field in dataclasses.fields(rivals.Config)}


def test_each_rival_is_short_and_says_where_it_is_from():
    for cls in rivals.RIVALS.values():
        assert len(inspect.getsource(cls).strip().splitlines()) <= 15, cls
        assert "arXiv 25" in cls.__doc__ or "arXiv 26" in cls.__doc__


def test_budgets_leave_a_prompt_for_each_later_step_and_the_controllers_own():
    config = rivals.Config(method="amft", steps=9, warmup=3, meta_every=1)
    assert [rivals.looks(config, t) for t in (1, 5, 9)] == [5, 5, 1]  # none at step 4: nothing has moved by mu yet
    assert rivals.looks(dataclasses.replace(config, meta_every=2), 1) == 3  # steps 5, 7, 9
    method = rivals.METHODS["relift"](rivals.Config(method="relift", steps=10, samples=2, responses=20, demos=64))
    method.first, method.explored = 1, 1  # it explored at 1 of 7 steps so far: its share says all is for now
    assert len(method.prompts(step(8))) == 8 and method.config.prompts == 32
    method.config.responses = 1000
    assert len(method.prompts(step(10))) == 64


def test_the_probe_of_the_meta_gradient_runs_to_its_table(tiny, tmp_path, monkeypatch, unevaluated, capsys):
    """compare/snr.py at a small size: both ways to estimate it on both splits for every trace, and two differences."""
    from compare import snr
    for name, value in dict(PROMPTS=4, SAMPLES=4, AFFORD=(2, 2), AT=(4,), LOG=tmp_path / "runs" / "snr.jsonl").items():
        monkeypatch.setattr(snr, name, value)
    monkeypatch.setattr(tasks.Deal, "grade", lambda self, text: "correct" if len(text) % 3 == 0 else "no_answer")
    monkeypatch.setattr(snr, "FLAGS", f"--task gp --model {tiny} --steps 5 --warmup 2 --prompts 2 --samples 2 --demos 40 "
                        "--sft-batch 4 --advantage group --lr 1e-3 --max-new-tokens 34 --device cpu")
    snr.main([])
    rows = [json.loads(line) for line in snr.LOG.read_text().splitlines()][1:]
    assert len(rows) == 3 * (2 * 2 * len(snr.TRACES) + 2) and all(math.isfinite(row["value"]) for row in rows)
    both = {(row["source"], row["trace"]): row["value"] for row in rows if row["seed"] == 200}
    for trace in snr.TRACES:  # one number in two ways: by conversations, and as the RL gradient's product
        assert both["val by RL gradient", trace] == pytest.approx(both["val by conversations", trace], rel=1e-2, abs=1e-9)
