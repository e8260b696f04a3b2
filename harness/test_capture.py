"""Tests of the captured decode step: a replay says what the step itself says, and asks for nothing.

Without a GPU a tape stands in for the CUDA graph: it keeps the kernels of one step and does them again
on the same tensors, without calling the step, and refuses what a graph would refuse.

    python -m pytest -q harness/test_capture.py
"""

import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import amft  # noqa: E402
import tasks  # noqa: E402
from harness import capture, loading  # noqa: E402

SEED = 0
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "multinomial",
         "_unique2", "unique_dim", "repeat_interleave")  # kernels whose values the host reads


class Tape(TorchDispatchMode):
    """record(once, reset) on a CPU: calling it does again, kernel by kernel, what `once` did once."""
    made = []  # all tapes

    def __init__(self, once, reset):
        super().__init__()
        self.kernels, self.replays = [], 0
        reset()
        with torch.random.fork_rng():
            with self:
                once()
        Tape.made.append(self)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        by_bools = name in ("index", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1])
        if name in WAITS or by_bools:
            raise RuntimeError(f"{name} waits for the device")
        made = function(*args, **(kwargs or {}))
        # A view is where it was; it needs no kernel.
        is_view = any(value.alias_info and not value.alias_info.is_write
                      for value in function._schema.returns)
        if not is_view:
            assert given or name in ("arange", "empty", "zeros", "ones", "full", "scalar_tensor"), name
            self.kernels.append((function, args, kwargs or {}, made))
        return made

    def __call__(self):
        self.replays += 1
        for function, args, kwargs, made in self.kernels:
            again = function(*args, **kwargs)
            for place, value in zip(tree_flatten(made)[0], tree_flatten(again)[0]):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    assert place.shape == value.shape
                    place.copy_(value)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(SEED)
    monkeypatch.setattr(sys, "argv", ["amft.py"])
    Tape.made.clear()


@pytest.fixture
def taped(monkeypatch):
    """Steps are captured, by a Tape."""
    monkeypatch.setitem(capture.RECORD, "cpu", Tape)


def shipped(name, device="cpu"):
    """(model, tokenizer, episodes) of a task."""
    task = tasks.TASKS[name]()
    config = amft.Config(task=name, device=device, **task.defaults)
    model, tokenizer = loading.load_policy(config, task, amft)
    rng = random.Random(SEED)
    return model, tokenizer, [task.sample("train", rng) for _ in range(5)]


def played(policy, temperature=1.0, n=40, samples=2, seed=SEED, episodes=None):
    """Rollouts of a policy (model, tokenizer, episodes)."""
    model, tokenizer, own = policy
    torch.manual_seed(seed)
    return amft.rollout(model, tokenizer, episodes or own, samples, n, temperature)


def played_eagerly(*args, **how):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "RECORD", {})
        return played(*args, **how)


def same(one, other):
    """Are two Rollouts the same conversations, with the same rewards?"""
    assert torch.equal(one.batch.input_ids, other.batch.input_ids)
    assert torch.equal(one.batch.attention_mask, other.batch.attention_mask)
    assert torch.equal(one.batch.response_mask, other.batch.response_mask)
    assert torch.equal(one.rewards, other.rewards)
    assert one.truncated == other.truncated
    assert one.entropy == pytest.approx(other.entropy, rel=1e-3)


# --- Replayed on a CPU: the kernels of one step, done again ---
@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_a_replay_says_greedily_what_the_step_says(name, taped):
    """A number of the first step that is built into the recording: a column, a length, a position;
    over several turns and with pictures."""
    policy = shipped(name)
    room = amft.Config(task=name, **tasks.TASKS[name].defaults).max_new_tokens
    eager = played_eagerly(policy, 0, room)
    assert not Tape.made
    same(played(policy, 0, room), eager)
    assert Tape.made and sum(tape.replays for tape in Tape.made) > len(Tape.made)


def test_a_replay_draws_what_the_step_draws(taped):
    """Random numbers that the recording uses up, or repeats; the temperature that it was made at; a
    loop that goes on where all are done."""
    policy = shipped("gp")
    for seed, temperature in enumerate([0.6, 1.0, 0, 1.5, 0.6, 1.0]):
        same(played(policy, temperature, seed=seed), played_eagerly(policy, temperature, seed=seed))
    assert len(Tape.made) == 1
    before = Tape.made[0].replays
    longest = played(policy, 0.6).batch.response_mask.shape[1]
    assert longest < 40  # not for want of room
    assert longest <= Tape.made[0].replays - before <= longest + capture.LOOK_EVERY


def test_one_recording_serves_prompts_of_any_length(taped):
    """What an earlier conversation leaves behind: its columns, its ends, its keys and values."""
    model, tokenizer, deals = shipped("gp")
    numbers = tasks.Mathematics().training(4, random.Random(SEED))
    deals = deals[:4]
    for episodes in (deals, numbers, deals, numbers[::-1]):
        policy = (model, tokenizer, episodes)
        same(played(policy, 0, 24), played_eagerly(policy, 0, 24))
    assert len(Tape.made) == 1
    for n in (24, 100):  # too wide for it
        same(played(policy, 0, n), played_eagerly(policy, 0, n))
    assert len(Tape.made) == 2


def test_a_replay_reads_the_weights_that_the_model_has_now(taped):
    """A policy that goes on sampling from weights of an earlier step, or writes over a theta."""
    policy = shipped("gp")
    model = policy[0]
    theta = amft.flatten(model)
    amft.set_theta(model, theta)  # its weights are now a part of this theta
    first = played(policy, 0)
    other = theta + 0.03 * torch.randn_like(theta)
    kept, kept_other = theta.clone(), other.clone()
    for now in (other, theta, other):
        amft.set_theta(model, now)
        eager = played_eagerly(policy, 0)
        same(played(policy, 0), eager)
        assert torch.equal(amft.flatten(model), now)
    assert not torch.equal(first.batch.responses, eager.batch.responses)
    played(policy, 0, samples=3)  # another shape, after the weights have moved
    amft.set_theta(model, theta)
    same(played(policy, 0, samples=3), played_eagerly(policy, 0, samples=3))
    same(played(policy, 0), first)
    assert torch.equal(theta, kept) and torch.equal(other, kept_other)
    assert len(Tape.made) == 2
    model.double()
    same(played(policy, 0), played_eagerly(policy, 0))
    assert model.dtype == torch.float64


def test_a_step_of_training_on_replayed_samples(taped, tmp_path):
    """A run whose samples are replayed: the log of the same run without."""
    rows = []
    argv = ["--task", "gp", "--model", "base", "--smoke", "--device", "cpu", "--steps", "5", "--eval-n", "8"]
    for record in (Tape, None):
        if record is None:
            capture.RECORD.pop("cpu")
        folder = tmp_path / str(record)
        amft.main([*argv, "--out", str(folder)])
        rows.append(loading.Path(folder, "metrics.jsonl").read_text().splitlines()[1:])
    assert len(Tape.made) <= 3  # of training's samples, of an evaluation's and of its greedy ones
    for one, other in zip(*rows, strict=True):
        one, other = json.loads(one), json.loads(other)
        assert one.keys() == other.keys()
        for name in one.keys() - {"seconds"}:
            if isinstance(other[name], (float, list)):
                assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name
            else:
                assert one[name] == other[name], name


def test_what_cannot_be_captured_is_sampled_by_the_step_itself(taped, capsys):
    """A model that asks for a value: an error, or another reply, or a notice at every step."""
    policy = shipped("gp")
    expected = played_eagerly(policy, 1.0)
    policy[0].lm_head.register_forward_hook(lambda _, __, logits: logits * float(logits.max() < 1e9))
    for _ in range(2):
        same(played(policy, 1.0), expected)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "cannot be captured" in said[0] and "_local_scalar_dense" in said[0]
    assert not Tape.made


def test_few_recordings_are_kept(taped, monkeypatch):
    """A cache for every shape that ever came."""
    monkeypatch.setattr(capture, "KEPT", 2)
    policy = shipped("gp")
    for samples in (1, 2, 1, 3, 1, 2):
        played(policy, 0, 8, samples)
    assert len(Tape.made) == 4  # 2 went when 3 came, and then 3
    assert len(capture.RECORDINGS[policy[0]].of_shape) == 2


def test_draws_are_those_of_multinomial():
    """Another distribution, or other random numbers."""
    logits = 3 * torch.randn(500, 40)
    logits[:, ::7] = -1e9
    for temperature in (0.3, 1.0, 1.7):
        torch.manual_seed(SEED)
        expected = torch.multinomial((logits / temperature).softmax(-1), 1).squeeze(1)
        torch.manual_seed(SEED)
        assert torch.equal(capture.draw(logits, torch.tensor([temperature])), expected)


def test_temperature_0_takes_the_first_of_the_most_likely():
    """A draw among those that are equally likely, as they are in bfloat16, or a division by 0."""
    logits = torch.randn(500, 40).bfloat16().float()
    logits[:, 5] = logits[:, 9] = logits.max(1).values  # a tie
    assert torch.equal(capture.draw(logits, torch.tensor([0.0])), logits.argmax(-1))
    assert (logits.argmax(-1) <= 5).all()


# --- On a GPU: the graph itself ---
def on_gpu(name="gp"):
    return shipped(name, "cuda")


@needs_gpu
@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_a_graph_says_greedily_what_the_step_says(name, capsys):
    policy = on_gpu(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        eager = played_eagerly(policy, 0, 34)
        graph = played(policy, 0, 34)
    assert "cannot be captured" not in capsys.readouterr().err
    assert capture.RECORDINGS[policy[0]].of_shape
    same(graph, eager)


@needs_gpu
def test_a_graph_draws_as_often_as_the_step_does():
    """Frequencies of the fifth token, in 4,000 samples each: within 4 standard errors."""
    policy = on_gpu()
    counts = []
    for play in (played, played_eagerly):
        batch = play(policy, 1.5, samples=800, seed=len(counts)).batch
        counts.append(Counter(batch.responses[:, 4].tolist()))
    n = 4000
    for token in counts[0] | counts[1]:
        p, q = counts[0][token] / n, counts[1][token] / n
        error = (2 * max((p + q) / 2, 1 / n) / n) ** 0.5
        assert abs(p - q) < 4 * error, token


@needs_gpu
def test_the_same_seed_gives_the_same_samples_before_and_after_a_capture():
    """Random numbers that warming up or capturing uses up: a resumed run would not repeat."""
    policy = on_gpu()
    same(played(policy), played(policy))


@needs_gpu
def test_a_graph_reads_the_weights_that_the_model_has_now():
    policy = on_gpu()
    first = played(policy, 0)
    theta = amft.flatten(policy[0])
    amft.set_theta(policy[0], theta + 0.03 * torch.randn_like(theta))
    assert not torch.equal(played(policy, 0).batch.responses, first.batch.responses)
    amft.set_theta(policy[0], theta)
    same(played(policy, 0), first)


@needs_gpu
def test_a_graph_is_faster_than_the_step():
    policy = on_gpu()
    seconds = []
    for play in (played_eagerly, played):
        play(policy, samples=13)
        torch.cuda.synchronize()
        start = time.perf_counter()
        play(policy, samples=13)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < seconds[0] / 2
