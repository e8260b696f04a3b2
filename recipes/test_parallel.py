"""Tests of recipes/parallel.py: two ranks are two processes, by gloo on a CPU.

    python -m pytest -q recipes/test_parallel.py
"""

import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import amft  # noqa: E402
import parallel  # noqa: E402
import tasks  # noqa: E402

TOKENIZER = AutoTokenizer.from_pretrained(HERE.parent / "base")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint folder with the base's tokenizer and a small random policy."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, eos_token_id=TOKENIZER.eos_token_id, bos_token_id=None,
        pad_token_id=TOKENIZER.pad_token_id))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def ranks(folder, function, *args, count=2, kill=None):
    """What `function` returns on each of `count` ranks, forks of this process (which has imported all), or the exit
    codes where one fails. kill(): when it says so, all are killed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        if (child := os.fork()) == 0:
            code = 3
            try:
                os.setsid()
                out = os.open(folder / f"out-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1)
                os.dup2(out, 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
                sys.argv = ["parallel.py"]
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                                  MASTER_ADDR="localhost", MASTER_PORT=str(port))
                tasks.Deal.grade = lambda self, text: "correct" if len(text) % 2 else "no_answer"
                tasks.GeneralPoints.defaults = {}
                (folder / f"result-{rank}").write_bytes(pickle.dumps(function(rank, *args)))
                code = 0
            except SystemExit as stop:
                code = stop.code
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    end, codes = time.time() + 120, {}
    while len(codes) < count and time.time() < end:
        for child in children:
            if child not in codes and (done := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(done[1])
        if kill and kill():
            end = 0
        time.sleep(0.02)
    for child in set(children) - set(codes):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if any(codes.get(child) != 0 for child in children):
        return [codes.get(child) for child in children]
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(count)]


def argv(model, out, *flags):
    return ["--task", "gp", "--smoke", "--model", model, "--out", str(out), "--device", "cpu", "--eval-n", "5",
            "--max-new-tokens", "34", *flags]


def run(rank, argv):
    """A whole run without evaluations; returns what this rank had at its end."""
    seen = {}

    class Watched(parallel.Run):
        def log_step(self, s):
            super().log_step(s)
            seen.setdefault("steps", []).append((s.t, s.mu, s.row.get("meta_grad"), s.theta.sum().item()))
            seen.update(theta=s.theta, m=s.adam.m, v=s.adam.v)
    parallel.Run, amft.SAVE_SECONDS = Watched, -1
    amft.evaluate = lambda _, __, task, split, *___: dict(
        split=split, n=1, success=0.0, low=0.0, high=1.0, any=0.0, greedy=0.0, outcomes={})
    method, moved = amft.AMFT, amft.AMFT.moved

    def watched(self, s):
        moved(self, s)
        seen.update(tangents=self.tangents, evidence=self.evidence, target=self.target_entropy)
    method.moved = watched
    parallel.main(argv)
    return seen


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "out")} for line in lines]


def same(a, b):
    """Bit for bit, whatever they hold."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def close(actual, expected, rtol):
    assert expected.norm() > 0
    assert (actual - expected).norm() <= rtol * expected.norm(), ((actual - expected).norm() / expected.norm()).item()


def measure(model, alone):
    """Gradients and estimates of one given batch, by amft's functions as they stand."""
    config = amft.Config(device="cpu", prompts=5, samples=4, micro_tokens=200, max_new_tokens=34)
    task = tasks.GeneralPoints()
    policy, tokenizer = amft.load_policy(amft.Config(device="cpu", model=model, max_new_tokens=34), task)
    rng, phi = random.Random(0), amft.value_function(policy)
    for parameter in phi.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    episodes = [task.sample("train", rng) for _ in range(5)]
    torch.manual_seed(0)
    seen = alone(policy, tokenizer, episodes, 4, 34)
    tangent = torch.randn(len(amft.flatten(policy)), generator=torch.Generator().manual_seed(1))
    advantages = amft.advantages_of(policy, phi, seen, config)
    g_rl, logps, loss = amft.rl_gradient(policy, seen.batch, advantages, config)
    g_sft = amft.sft_gradient(policy, amft.encode_demos(policy, tokenizer, episodes), config)
    again = amft.rollout(policy, tokenizer, episodes[:3], 2, 34, 0)  # greedy: the same however they are shared out
    few = amft.rollout(policy, tokenizer, episodes[:1], 2, 34)  # fewer than ranks
    return dict(seen=seen.batch.ids, success=seen.success, advantages=advantages.values, g_rl=g_rl, logps=logps, loss=loss,
                g_sft=g_sft[0], sft_loss=g_sft[2], meta=amft.meta_gradient(policy, tangent, seen, config), greedy=again,
                few=few.success, check=amft.logps_of(policy, again.batch).detach())


def measured(rank, model):
    alone = amft.rollout
    parallel.start()
    return measure(model, alone)


def test_two_ranks_compute_what_one_process_does(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.Deal, "grade", lambda self, text: "correct" if len(text) % 2 else "no_answer")
    one = measure(tiny, amft.rollout)
    assert 0 < one["success"].mean() < 1 and one["meta"][1] > 0 and one["loss"] != 0
    both = ranks(tmp_path, measured, tiny)
    drop = lambda made: {key: value for key, value in made.items() if key not in ("greedy",)}  # noqa: E731
    assert same(*map(drop, both)), "ranks differ"
    for two in both:
        assert torch.equal(two["seen"], one["seen"])  # the given batch is one and the same
        for name in ("advantages", "g_rl", "g_sft", "logps"):
            close(two[name], one[name], 1e-6)
        assert (two["g_rl"] - one["g_rl"]).abs().max() < 1e-7 * max(1.0, one["g_rl"].norm())
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-7) and two["sft_loss"] == pytest.approx(one["sft_loss"])
        assert two["meta"] == pytest.approx(one["meta"], rel=1e-4)
        a, b = two["greedy"], one["greedy"]
        width = max(a.batch.mask.shape[1], b.batch.mask.shape[1])
        assert [e.prompt for e in a.episodes] == [e.prompt for e in b.episodes] and torch.equal(a.success, b.success)
        for mine, right in ((a.batch.mask, b.batch.mask), (a.graded, b.graded),
                            (two["check"] * a.batch.mask, one["check"] * b.batch.mask)):
            wide = [torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (mine, right)]
            torch.testing.assert_close(*wide, rtol=1e-4, atol=1e-5)
        assert a.entropy == pytest.approx(b.entropy, rel=1e-5) and a.truncated == pytest.approx(b.truncated)


def test_joined_conversations_are_those_of_their_own(tiny):
    """Of two parts of unlike lengths: prompts and log-probabilities as before, in the order of the episodes; entropy and
    the share without an end again from the logits and the tokens."""
    task = tasks.GeneralPoints()
    policy, tokenizer = amft.load_policy(amft.Config(device="cpu", model=tiny, max_new_tokens=34), task)
    episodes = [task.sample("train", random.Random(i)) for i in range(3)]
    torch.manual_seed(0)
    parts = [amft.rollout(policy, tokenizer, episodes[::2], 2, 34), amft.rollout(policy, tokenizer, episodes[1::2], 2, 5)]
    one = parallel.joined(parts, [0, 2, 1], tokenizer.pad_token_id)
    assert [e.prompt for e in one.episodes] == [e.prompt for e in episodes for _ in range(2)]
    with torch.no_grad():
        logits = amft.outputs(policy, one.batch)[0].log_softmax(-1)
        logps = (amft.token_logps(logits, one.batch.responses) * one.batch.mask).sum(1)
        first, second = ((amft.logps_of(policy, part.batch) * part.batch.mask).sum(1) for part in parts)
    torch.testing.assert_close(logps, torch.cat([first[:2], second, first[2:]]), rtol=1e-4, atol=1e-4)
    entropy = (-(logits.exp() * logits).sum(-1) * one.batch.mask).sum() / one.batch.mask.sum()
    assert one.entropy == pytest.approx(entropy.item(), rel=1e-5) and parts[0].entropy != pytest.approx(one.entropy, rel=1e-4)
    ends = [tokenizer.eos_token_id in ids[own > 0] for ids, own in zip(one.batch.responses, one.batch.mask)]
    assert one.truncated == pytest.approx(1 - sum(ends) / 6)


def sampled(rank, model):
    parallel.start()
    task = tasks.GeneralPoints()
    policy, tokenizer = amft.load_policy(amft.Config(device="cpu", model=model, max_new_tokens=34), task)
    amft.torch.manual_seed(0)
    twins = amft.rollout(policy, tokenizer, 2 * [task.sample("train", random.Random(0))], 4, 34)
    return twins.batch.responses, torch.rand(3)


def test_ranks_have_random_streams_of_their_own_and_one_in_common(tiny, tmp_path):
    """One prompt, played by both ranks: no sample of one is a sample of the other. Afterwards they are in step."""
    (responses, after), other = ranks(tmp_path, sampled, tiny)
    assert same((responses, after), other) and len({tuple(row) for row in responses.tolist()}) == 8


def test_ranks_of_a_run_are_equal_and_a_killed_run_goes_on(tiny, tmp_path):
    """Every rank has the same theta, moments, d/d mu and mu at the end, bit for bit; killed and resumed, the log is the same."""
    flags = "--steps", "7", "--warmup", "1", "--meta-every", "2", "--ppo-epochs", "2", "--prompts", "5"
    first, second = ranks(tmp_path, run, argv(tiny, tmp_path / "unbroken", *flags))
    assert same(first, second) and len(first["steps"]) == 7 and len({mu for _, mu, *_ in first["steps"]}) > 3
    assert any(step[2] for step in first["steps"]) and first["tangents"] is not None
    whole = rows(tmp_path / "unbroken")
    assert (tmp_path / "unbroken" / "final" / "config.json").exists() and whole[-1]["kind"] == "final"
    assert [row["step"] for row in whole if row["kind"] == "step"] == list(range(1, 8))
    assert (tmp_path / "out-1").read_text() == "" and "responses" in (tmp_path / "out-0").read_text()
    log = tmp_path / "run" / "metrics.jsonl"
    codes = ranks(tmp_path, run, argv(tiny, tmp_path / "run", *flags),
                  kill=lambda: log.exists() and '"step": 5' in log.read_text())
    assert codes == [None, None] and not (tmp_path / "run" / "final").exists() and (tmp_path / "run" / "state.pt").exists()
    first, second = ranks(tmp_path, run, ["--resume", str(tmp_path / "run")])
    assert same(first, second) and 1 < len(first["steps"]) < 6
    assert rows(tmp_path / "run") == whole


def drifting(rank, argv):
    step = amft.adamw_step

    def drift(*args, **how):
        theta, state = step(*args, **how)
        return theta + 1e-6 * (rank == 1), state
    amft.adamw_step = drift
    return run(rank, argv)


def breaking(rank, argv):
    if rank == 1:
        def fail(*_, **__):
            raise RuntimeError("CUDA out of memory\nand a page of text")
        amft.step_sensitivity = fail
    return run(rank, argv)


@pytest.mark.parametrize("what, flags, codes, said", [
    (run, ["--mu-min", "0.9", "--mu-max", "0.1"], {2}, "--mu-min 0.9: at most --mu-max, 0.1"),
    (drifting, [], {2}, "step 1: the ranks no longer have one theta and one mu"),
    (breaking, [], {1}, "RuntimeError: CUDA out of memory (rank 1)")])
def test_errors_end_all_ranks_with_one_line(what, flags, codes, said, tiny, tmp_path):
    assert set(ranks(tmp_path, what, argv(tiny, tmp_path / "run", *flags))) == codes
    lines = [line for rank in (0, 1) for line in (tmp_path / f"out-{rank}").read_text().replace("\r", "\n").split("\n")
             if "parallel.py: " in line]
    assert len(lines) == 1 and said in lines[0], lines


def test_only_torchrun_starts_it(monkeypatch, capsys):
    for nodes in ({}, dict(LOCAL_WORLD_SIZE="2", WORLD_SIZE="4")):
        for name, value in nodes.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as info:
            parallel.main(["--smoke"])
        error = capsys.readouterr().err
        assert info.value.code == 2 and error.count("\n") == 1 and "torchrun --nproc-per-node" in error


def test_the_command_line(tiny, tmp_path):
    """torchrun itself, evaluations with fewer episodes than ranks among it."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE / "parallel.py"),
         *argv(tiny, tmp_path / "run", "--steps", "2", "--warmup", "1", "--eval-n", "1")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    made = rows(tmp_path / "run")
    assert [row["kind"] for row in made].count("step") == 2 and done.stdout.count("responses,") == 1
    assert all(row["n"] == 1 and sum(row["outcomes"].values()) == 4 for row in made if row["kind"] == "eval")
