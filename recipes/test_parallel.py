"""Tests of recipes/parallel.py: two ranks are two processes, by gloo on a CPU.

    python -m pytest -q recipes/test_parallel.py
"""

import fcntl
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
import harness.run  # noqa: E402
import parallel  # noqa: E402
import tasks  # noqa: E402

TOKENIZER = AutoTokenizer.from_pretrained(HERE.parent / "base")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint folder with the base's tokenizer and a small random policy."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=12, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.pad_token_id))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


# --- ranks: forks of this process, which has imported all -----------------------------------------


def grade(self, text):
    """Rewards that a random policy does get."""
    return "correct" if len(text) % 2 else "no_answer"


def child(folder, rank, count, machines, port, function, args):
    """Become a rank, and leave what function returns in a file."""
    code = 3
    try:
        os.setsid()
        out = os.open(folder / f"out-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        sys.argv = ["parallel.py"]
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank // machines), WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count // machines), MASTER_ADDR="localhost", MASTER_PORT=str(port))
        tasks.Deal.grade = grade
        tasks.GeneralPoints.defaults = {}
        (folder / f"result-{rank}").write_bytes(pickle.dumps(function(rank, *args)))
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ranks(folder, function, *args, count=2, machines=1):
    """What `function` returns on each of `count` ranks, or the exit codes where one fails.

    machines: they are told to be on so many."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            child(folder, rank, count, machines, port, function, args)
        children.append(pid)
    end, codes = time.time() + 120, {}
    while len(codes) < count and time.time() < end:
        for pid in set(children) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in set(children) - set(codes):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if any(codes.get(pid) != 0 for pid in children):
        return [codes.get(pid) for pid in children]
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(count)]


def said(folder):
    """The lines with which two ranks ended."""
    texts = [(folder / f"out-{rank}").read_text().replace("\r", "\n") for rank in (0, 1)]
    return [line for text in texts for line in text.split("\n") if "parallel.py: " in line]


def argv(model, out, *flags):
    return ["--task", "gp", "--smoke", "--model", model, "--out", str(out), "--device", "cpu",
            "--eval-n", "5", "--max-new-tokens", "34", *flags]


def changes(name, args):
    """Does this event change a file, or read a run's? (see Python's table of audit events)"""
    if name == "open":
        path, _, flags = args
        if not isinstance(path, (str, bytes)) or os.fsdecode(path).startswith("/dev"):
            return False
        if os.path.basename(os.fsdecode(path)) in ("state.pt", "metrics.jsonl"):
            return True  # which another machine has not
        return flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if name == "os.truncate":  # to the length that it has: nothing is lost
        return os.stat(args[0]).st_size != args[1]
    return name in ("os.mkdir", "os.rename", "os.remove", "fcntl.flock", "fcntl.lockf")


def run(rank, argv, end=None):
    """A whole run without evaluations; returns what this rank had at its end.

    end: "killed", all ranks after the row of step 5; "stopped", by a signal to rank 1 in step 4."""
    seen, changed, watching = dict(steps=[]), [], [True]

    class Watched(parallel.Run):
        def log_step(self, step, theta):
            super().log_step(step, theta)
            theta = amft.flatten(self.model)
            row = step.t, step.mu, step.metrics.get("meta_grad"), theta.sum().item()
            seen["steps"].append(row)
            seen.update(theta=theta)
            if end == "killed" and step.t == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        def save(self, theta, adam, modules):
            super().save(theta, adam, modules)
            seen.update(saved=theta, m=adam.m, v=adam.v)

    class Controller(amft.Controller):
        def before_update(self, step, *args, **more):
            super().before_update(step, *args, **more)
            seen.update(self.state_dict())
            if end == "stopped" and step.t == 4 and rank == 1 and more["first"]:
                os.kill(os.getpid(), signal.SIGTERM)

    def evaluate(model, tokenizer, task, config, split, temperature, samples):
        numbers = dict(success=0.0, low=0.0, high=1.0, any=0.0, hits=[0])
        return dict(split=split, n=1, samples=1, outcomes={}, **numbers)

    def hook(name, args):
        if watching[0] and changes(name, args):
            changed.append(f"{name} {args}")
    parallel.Run, harness.run.SAVE_SECONDS = Watched, -1
    amft.evaluate = evaluate
    sys.addaudithook(hook)
    parallel.main(argv, dict(amft.METHODS, amft=Controller))
    watching[0] = False
    if rank:
        assert not changed, changed
    return seen


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    made = [json.loads(line) for line in lines]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in made]


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
    gap = (actual - expected).norm() / expected.norm()
    assert gap <= rtol, gap.item()


def policy_of(model):
    """(task, model, tokenizer) of a checkpoint folder."""
    task = tasks.GeneralPoints()
    config = amft.Config(device="cpu", model=model, max_new_tokens=34)
    return task, *amft.load_policy(config, task, amft)


# --- one batch ------------------------------------------------------------------------------------


def measure(model, alone):
    """Gradients and estimates of one given batch, by amft's functions as they stand."""
    config = amft.Config(device="cpu", prompts=5, samples=4, micro_tokens=200, max_new_tokens=34)
    task, policy, tokenizer = policy_of(model)
    rng, phi = random.Random(0), amft.value_function(policy)
    for parameter in phi.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    episodes = [task.sample("train", rng) for _ in range(5)]
    torch.manual_seed(0)
    seen = alone(policy, tokenizer, episodes, 4, 34)
    tangent = torch.randn(
        len(amft.flatten(policy)), generator=torch.Generator().manual_seed(1))
    advantages = amft.advantages_of(policy, phi, seen, config)
    g_rl, logps, loss = amft.rl_gradient(policy, seen.batch, advantages, config)
    g_later, _, later = amft.rl_gradient(policy, seen.batch, advantages, config, logps + 0.3)

    def weights(logps, rows):  # rows: of the whole batch, whoever has them
        return (1 + rows.unsqueeze(1)) * logps.exp()
    demos = amft.encode_demos(policy, tokenizer, episodes)
    g_sft, _, sft_loss = amft.sft_gradient(policy, demos, config, weights)
    values = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    greedy = amft.rollout(policy, tokenizer, episodes[:3], 2, 34, 0)  # however it is shared out
    return dict(
        seen=seen.batch.input_ids, success=seen.success, advantages=advantages.values,
        phi=torch.cat([parameter.detach().flatten() for parameter in phi.parameters()]),
        g_rl=g_rl, logps=logps, loss=loss, g_later=g_later, later=later,
        g_sft=g_sft, sft_loss=sft_loss,
        meta=amft.meta_gradient(policy, tangent, seen, config),
        meta_given=amft.meta_gradient(policy, tangent, seen, config, (values, 2.0)),
        few=amft.rollout(policy, tokenizer, episodes[:1], 2, 34).success,  # fewer than ranks
        greedy=greedy, check=amft.logps_of(policy, greedy.batch).detach())


def measured(rank, model):
    alone = amft.rollout
    parallel.start()
    return measure(model, alone)


def test_two_ranks_compute_what_one_process_does(tiny, tmp_path, monkeypatch):
    """A share of the work that is lost or counted twice: in gradients, estimates, conversations."""
    monkeypatch.setattr(tasks.Deal, "grade", grade)
    one = measure(tiny, amft.rollout)
    assert 0 < one["success"].mean() < 1 and one["meta"][1] > 0 and one["loss"] != 0
    both = ranks(tmp_path, measured, tiny)
    first, second = ({k: v for k, v in made.items() if k != "greedy"} for made in both)
    assert same(first, second), "ranks differ"
    for two in both:
        assert torch.equal(two["seen"], one["seen"])  # the given batch is one and the same
        for name in ("advantages", "phi", "g_rl", "g_later", "g_sft", "logps"):
            close(two[name], one[name], 1e-6)
        gap = (two["g_rl"] - one["g_rl"]).abs().max()
        assert gap < 1e-7 * max(1.0, one["g_rl"].norm())
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-7)
        assert two["later"] == pytest.approx(one["later"])
        assert two["sft_loss"] == pytest.approx(one["sft_loss"])
        for name in ("meta", "meta_given"):
            assert two[name] == pytest.approx(one[name], rel=1e-4)
        alike(two, one)


def alike(two, one):
    """Are the greedy conversations the same, but for how wide they are padded?"""
    a, b = two["greedy"], one["greedy"]
    masks = a.batch.response_mask, b.batch.response_mask
    width = max(mask.shape[1] for mask in masks)
    assert [e.prompt for e in a.episodes] == [e.prompt for e in b.episodes]
    assert torch.equal(a.success, b.success)
    logps = two["check"] * masks[0], one["check"] * masks[1]
    for pair in (masks, (a.rewards, b.rewards), logps):
        mine, right = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in pair)
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    assert a.entropy == pytest.approx(b.entropy, rel=1e-5)
    assert a.truncated == pytest.approx(b.truncated)


def test_joined_conversations_are_those_of_their_own(tiny):
    """Parts of unlike lengths: prompts, log-probabilities, entropy, ends from the tokens anew."""
    task, policy, tokenizer = policy_of(tiny)
    episodes = [task.sample("train", random.Random(i)) for i in range(3)]
    torch.manual_seed(0)
    parts = [amft.rollout(policy, tokenizer, episodes[::2], 2, 34),
             amft.rollout(policy, tokenizer, episodes[1::2], 2, 5)]
    batch = parts[1].batch  # a prompt that is wider, by padding on its left
    wider = [torch.nn.functional.pad(x, (3, 0)) for x in (batch.input_ids, batch.attention_mask)]
    parts[1] = parts[1]._replace(batch=amft.Batch(*wider, batch.response_mask, batch.images))
    one = parallel.joined(parts, [0, 2, 1], tokenizer.pad_token_id)
    mask = one.batch.response_mask
    assert [e.prompt for e in one.episodes] == [e.prompt for e in episodes for _ in range(2)]

    def totals(batch):
        return (amft.logps_of(policy, batch) * batch.response_mask).sum(1)
    with torch.no_grad():
        logits = amft.response_outputs(policy, one.batch)[0].log_softmax(-1)
        logps = (amft.token_logps(logits, one.batch.responses) * mask).sum(1)
        first, second = (totals(part.batch) for part in parts)
    expected = torch.cat([first[:2], second, first[2:]])
    torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-4)
    entropy = (-(logits.exp() * logits).sum(-1) * mask).sum() / mask.sum()
    assert one.entropy == pytest.approx(entropy.item(), rel=1e-5)
    assert parts[0].entropy != pytest.approx(one.entropy, rel=1e-4)
    ends = [tokenizer.eos_token_id in ids[own > 0] for ids, own in zip(one.batch.responses, mask)]
    assert one.truncated == pytest.approx(1 - sum(ends) / 6)


def sampled(rank, model):
    parallel.start()
    task, policy, tokenizer = policy_of(model)
    torch.manual_seed(0)
    twins = 2 * [task.sample("train", random.Random(0))]
    return amft.rollout(policy, tokenizer, twins, 4, 34).batch.responses, torch.rand(3)


def test_ranks_have_random_streams_of_their_own_and_one_in_common(tiny, tmp_path):
    """Both play one prompt: no sample of one is one of the other. Then they are in step again."""
    (responses, after), other = ranks(tmp_path, sampled, tiny)
    assert same((responses, after), other)
    assert len({tuple(row) for row in responses.tolist()}) == 8


# --- a run ----------------------------------------------------------------------------------------

FLAGS = ("--steps 7 --warmup 1 --meta-every 2 --ppo-epochs 2 --prompts 5 --utility both "
         "--advantage gae").split()


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    """(folder, what both ranks had at the end) of a run that was let alone."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, ranks(folder, run, argv(tiny, folder / "run", *FLAGS))


def test_ranks_of_a_run_are_equal_and_rank_0_alone_writes(unbroken):
    """theta, moments, d/d mu and mu, bit for bit; no other rank touches a file, or prints."""
    folder, (first, second) = unbroken
    assert same(first, second) and len(first["steps"]) == 7
    assert len({mu for _, mu, *_ in first["steps"]}) > 3
    assert any(step[2] for step in first["steps"]) and first["sensitivity"] is not None
    assert torch.equal(first["theta"], first["saved"])
    whole = rows(folder / "run")
    assert (folder / "run" / "final" / "config.json").exists() and whole[-1]["kind"] == "final"
    assert [row["step"] for row in whole if row["kind"] == "step"] == list(range(1, 8))
    assert (folder / "out-1").read_text() == ""
    assert "mu ended at" in (folder / "out-0").read_text()


@pytest.mark.parametrize("end, machines", [("killed", 1), ("stopped", 1), ("killed", 2)])
def test_a_broken_run_goes_on(end, machines, unbroken, tiny, tmp_path):
    """Killed, or stopped by a signal to one rank, and resumed: the log is the unbroken one's, also
    on two machines, of which the second has no files of the run's."""
    out, (whole, _) = tmp_path / "run", unbroken
    codes = ranks(tmp_path, run, argv(tiny, out, *FLAGS), end, machines=machines)
    done = [row["step"] for row in rows(out) if row["kind"] == "step"]
    if end == "stopped":
        assert codes == [130, 130] and done[-1] == 4
        line, = said(tmp_path)
        assert line == f"parallel.py: stopped; --resume {out} goes on after step 4"
    else:
        assert codes == [-signal.SIGKILL, -signal.SIGKILL] and done[-1] == 5
    assert not (out / "final").exists() and (out / "state.pt").exists()
    first, second = ranks(tmp_path, run, ["--resume", str(out)], machines=machines)
    assert same(first, second)
    assert len(first["steps"]) == 3 if end == "stopped" else 2 < len(first["steps"]) < 8
    assert rows(out) == rows(whole / "run")


def drifting(rank, argv):
    step = amft.adamw_step

    def drift(*args, **how):
        theta, state = step(*args, **how)
        return theta + 1e-6 * (rank == 1), state
    amft.adamw_step = drift
    return run(rank, argv)


def disagreeing(rank, argv):
    class Own(amft.Method):
        def choose_mu(self, step):
            return 0.5 + 2 ** -52 * rank * (step.t > 1)  # theta, in float32, is the same
    return parallel.main([*argv, "--method", "fixed"], dict(amft.METHODS, fixed=Own))


def breaking(rank, argv):
    if rank == 1:
        def fail(*_, **__):
            raise RuntimeError("CUDA out of memory\nand a page of text")
        amft.step_sensitivity = fail
    return run(rank, argv)


def without_gpus(rank, argv):
    parallel.device_of = lambda name: "cuda"
    return parallel.main(argv)


@pytest.mark.parametrize("what, flags, codes, words", [
    (run, ["--mu-min", "0.9", "--mu-max", "0.1"], {2}, "--mu-min 0.9: at most --mu-max, 0.1"),
    (without_gpus, [], {2}, "--nproc-per-node 2: there are 0 GPUs here"),
    (drifting, [], {2}, "step 1: the ranks no longer have one theta and one mu"),
    (disagreeing, [], {2}, "step 2: the ranks no longer have one theta and one mu"),
    (breaking, [], {1}, "RuntimeError: CUDA out of memory (rank 1)")])
def test_errors_end_all_ranks_with_one_line(what, flags, codes, words, tiny, tmp_path):
    """A rank that waits for one that is gone, a line from each, an error that is not told."""
    made = ranks(tmp_path, what, argv(tiny, tmp_path / "run", *flags))
    assert set(made) == codes
    line, = said(tmp_path)
    assert words in line


def resuming(rank, folder):
    return parallel.main(["--resume", folder])


def test_a_run_that_another_process_writes_is_refused(tiny, tmp_path):
    """Two torchruns on one folder would write one log: rank 0's lock speaks for all."""
    log = tmp_path / "metrics.jsonl"
    config = amft.Config(device="cpu", model=tiny, max_new_tokens=34)
    log.write_text(json.dumps(dict(kind="config", **vars(config))) + "\n")
    with open(log) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        codes = ranks(tmp_path, resuming, str(tmp_path))
    assert set(codes) == {2}
    line, = said(tmp_path)
    assert "another process is writing this run" in line


def test_only_torchrun_starts_it(monkeypatch, capsys):
    """Started by itself it would wait for ever."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as info:
        parallel.main(["--smoke"])
    error = capsys.readouterr().err
    assert info.value.code == 2 and error.count("\n") == 1
    assert "torchrun --nproc-per-node" in error


def test_two_machines_are_as_two_ranks_of_one(tiny, tmp_path):
    """Two torchruns that find each other, in folders of their own: the log of one with two ranks."""
    def started(out, cwd, *how):
        cwd.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", *how, str(HERE / "parallel.py"),
                   *argv(tiny, out, "--steps", "3", "--warmup", "1", "--eval-n", "2")]
        return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "1",
            "--rdzv-endpoint", f"localhost:{port}"]
    machines = [started("run", tmp_path / name, *meet) for name in ("first", "second")]
    ends = [machine.communicate(timeout=200) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ends
    folders = [tmp_path / name / "run" for name in ("first", "second")]
    mine, = [folder for folder in folders if folder.exists()]  # of rank 0, whichever it is
    assert sum(said.count("mu ended at") for said, _ in ends) == 1
    alone = started("run", tmp_path / "alone", "--standalone", "--nproc-per-node", "2")
    assert alone.communicate(timeout=200) and alone.returncode == 0
    assert rows(mine) == rows(tmp_path / "alone" / "run")


def test_the_command_line(tiny, tmp_path):
    """torchrun itself, evaluations with fewer episodes than ranks among it."""
    flags = argv(tiny, tmp_path / "run", "--steps", "2", "--warmup", "1", "--eval-n", "1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", str(HERE / "parallel.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    made = rows(tmp_path / "run")
    assert [row["kind"] for row in made].count("step") == 2
    assert done.stdout.count("mu ended at") == 1
    evals = [row for row in made if row["kind"] == "eval"]
    assert evals and all(row["n"] == 1 and sum(row["outcomes"].values()) == 4 for row in evals)
