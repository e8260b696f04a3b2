"""Large policies (recipes/large.py, harness/memory.py): the same numbers in parts, and how much
memory a run of them takes.

    python -m pytest -q recipes/test_large.py
"""

import importlib
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
amft = importlib.import_module("amft")
tasks = importlib.import_module("tasks")
large = importlib.import_module("recipes.large")
memory = importlib.import_module("harness.memory")
running = importlib.import_module("harness.run")


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """Every test draws from the same seed."""
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", ["amft.py"])


# --- slices of theta ------------------------------------------------------------------------------


def textbook_step(mu, theta, m, v, g_rl, g_sft, step, lr, max_norm):
    """Eq. 3, clipped by the length of the whole gradient, and Adam's step: (theta', m', v')."""
    grad = (1 - mu) * g_rl + mu * g_sft
    norm = torch.linalg.vector_norm(grad)
    grad = grad * torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    m = 0.9 * m + 0.1 * grad
    v = 0.999 * v + 0.001 * grad ** 2
    m_hat = m / (1 - 0.9 ** step)
    v_hat = v / (1 - 0.999 ** step)
    return theta - lr * m_hat / (v_hat.sqrt() + 1e-8), m, v


@pytest.mark.parametrize("size", [5, 23, 1])
@pytest.mark.parametrize("max_norm", [1e6, 0.1])
@pytest.mark.parametrize("with_last", [False, True])
def test_slices_give_the_step_and_its_derivative_of_the_whole(
        with_last, max_norm, size, monkeypatch):
    """A slice that is lost, or put elsewhere, or clipped by its own length."""
    # Against forward mode through a textbook step of the whole; most sizes do not divide N.
    N, mu, trace, step, lr = 23, torch.tensor(0.3, dtype=torch.float64), 0.7, 4, 0.05
    theta, g_rl, g_sft, m, root, *last = torch.randn(8, N, dtype=torch.float64)
    v = root ** 2
    if not with_last:
        last = None
    moved = [trace * x for x in last or torch.zeros(3, N, dtype=torch.float64)]
    how = dict(lr=lr, max_norm=max_norm)
    whole = partial(textbook_step, g_rl=g_rl, g_sft=g_sft, step=step, **how)
    expected, slopes = torch.func.jvp(
        whole, (mu, theta, m, v), (torch.ones_like(mu), *moved))
    true, lengths = large.in_slices, []

    def in_slices(function, *vectors):
        def of_a_slice(*parts):
            lengths.append(len(parts[0]))
            return function(*parts)
        return true(of_a_slice, *vectors, size=size)
    monkeypatch.setattr(memory, "LARGE", 0)
    monkeypatch.setattr(large, "in_slices", in_slices)
    state = amft.AdamState(m, v, step - 1)
    grad = (1 - mu) * g_rl + mu * g_sft
    after, adam = amft.adamw_step(theta, grad, state, **how)
    same = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)
    for actual, right in zip((after, adam.m, adam.v), expected):
        same(actual, right)
    sensitivity = amft.step_sensitivity(
        theta, g_rl, g_sft, mu.item(), state, last, trace, **how)
    for actual, right in zip(sensitivity, slopes):
        same(actual, right)
    assert max(lengths) == size
    assert sum(lengths) == 2 * N


def test_what_is_small_is_not_cut(monkeypatch):
    """Below LARGE the function is called once, on the vectors themselves."""
    seen = []

    def three(*vectors):
        seen.append(vectors)
        return vectors
    vectors = torch.randn(3, 10)
    monkeypatch.setattr(memory, "LARGE", 10)
    made = memory.by_slices(three, *vectors)
    assert len(seen) == 1
    for x, y, z in zip(vectors, seen[0], made):
        assert torch.equal(x, y) and torch.equal(x, z)
    monkeypatch.setattr(memory, "LARGE", 9)
    monkeypatch.setattr(large, "in_slices", partial(large.in_slices, size=4))
    made = memory.by_slices(three, *vectors)
    assert [len(parts[0]) for parts in seen[1:]] == [4, 4, 2]
    for x, z in zip(vectors, made):
        assert torch.equal(x, z)


# --- rows of logits -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_of_logits_give_the_log_probabilities_and_the_gradient_of_the_whole(
        dtype, rows, monkeypatch):
    """A few rows at a time, against torch's cross entropy: rows lost, or another row's slope."""
    B, columns, V = 5, 3, 7
    logits = torch.randn(B, columns, V, dtype=torch.float64).to(dtype).requires_grad_()
    ids = torch.randint(V, (B, columns))
    weights = torch.randn(B, columns, dtype=torch.float64)
    exact = logits.to(torch.promote_types(dtype, torch.float32))
    expected = -torch.nn.functional.cross_entropy(
        exact.flatten(0, 1), ids.flatten(), reduction="none").view(B, columns)
    slope = torch.autograd.grad((weights * expected).sum(), logits)[0]
    monkeypatch.setattr(memory, "LARGE", 0)
    monkeypatch.setattr(large.InParts, "at_once", rows * columns * V)
    calls = []

    def function(logits, ids):
        calls.append(len(ids))
        return amft.token_logps(logits, ids)
    actual = memory.by_rows(function, logits, ids)
    torch.testing.assert_close(actual, expected)
    assert max(calls) == rows
    own = torch.autograd.grad((weights * actual).sum(), logits)[0]
    torch.testing.assert_close(own, slope)


# --- memory ---------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, as their storages come and go.

    peak: the most at one time."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.sizes = {}

    def gone(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor):
                self.see(x.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def see(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            weakref.finalize(storage, self.gone, key)
            self.now += storage.nbytes()


def watch(monkeypatch, names, alive):
    """{name: the most that was alive during a call of that function of amft}, as it fills."""
    peaks = dict.fromkeys(names, 0)

    def watched(name, true):
        def call(*args, **kwargs):
            before = alive.peak
            alive.peak = alive.now
            result = true(*args, **kwargs)
            peaks[name] = max(peaks[name], alive.peak)
            alive.peak = max(alive.peak, before)
            return result
        return call
    for name in names:
        monkeypatch.setattr(amft, name, watched(name, getattr(amft, name)))
    return peaks


@pytest.fixture
def wide(tmp_path):
    """A checkpoint whose activations are small beside its weights."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "base")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    return str(tmp_path / "wide"), model.num_parameters()


def test_floats_a_parameter_at_the_peak_of_a_run(wide, tmp_path, monkeypatch):
    """A vector (N,) that is kept alive, or slices that are not taken."""
    # theta (the model's own), Adam's m and v, three d/d mu, two gradients and three new d/d mu: 11
    # floats of memory a parameter at the peak of whole AMFT steps, and what slices of N/64 need.
    # While gradients are made, when activations come on top, 9 or 10. Generation is not counted.
    folder, N = wide
    default = large.in_slices.__kwdefaults__["size"]
    size = max(default >> 8, N >> 6)  # as small beside N as the default is beside a large policy's
    monkeypatch.setattr(memory, "LARGE", default >> 8)
    monkeypatch.setattr(large, "in_slices", partial(large.in_slices, size=size))
    monkeypatch.setattr(running.Run, "save", lambda *_: None)
    outcomes = ("no_answer", "correct")
    monkeypatch.setattr(tasks.Deal, "grade", lambda self, text: outcomes[len(text) % 2])
    measures = dict(n=1, samples=1, success=0.0, low=0.0, high=1.0, any=0.0, hits=[0], outcomes={})
    monkeypatch.setattr(amft, "evaluate", lambda *words: dict(measures, split=words[4]))
    names = ["rl_gradient", "sft_gradient", "meta_gradient", "step_sensitivity", "adamw_step"]
    alive = Alive()
    peaks = watch(monkeypatch, names, alive)
    rollout = amft.rollout

    def uncounted(*args, **kwargs):
        with _disable_current_modes():
            return rollout(*args, **kwargs)
    monkeypatch.setattr(amft, "rollout", uncounted)
    flags = ("--smoke --device cpu --max-new-tokens 34 --prompts 2 --samples 2 --sft-batch 2 "
             "--micro-tokens 1 --warmup 0 --steps 2 --meta-every 1 --advantage group --demos 50")
    with alive:
        amft.main(["--model", folder, "--out", str(tmp_path / "run"), *flags.split()])
    floats = {name: peak / 4 / N for name, peak in peaks.items()}
    # A lower one would mean that this no longer counts all.
    assert 11 < alive.peak / 4 / N < 11.6, floats
    assert 11 < floats.pop("step_sensitivity")
    assert 10 < floats.pop("adamw_step") < 10.3
    assert max(floats.values()) < 10.2
    assert min(floats.values()) > 1, floats
    assert floats["rl_gradient"] < 9.2
