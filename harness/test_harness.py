"""Tests of what is around the algorithm: the command line, a run's folder, its ends, checkpoints.

    python -m pytest -q harness/test_harness.py
    AMFT_SLOW=1 python -m pytest -q harness/test_harness.py     # and what takes longer
"""

import dataclasses
import errno
import fcntl
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import amft  # noqa: E402
import tasks  # noqa: E402
from harness import arguments, loading, run as running  # noqa: E402
from harness.evaluation import evaluation, short_evaluation  # noqa: E402
from harness.screen import Screen, table  # noqa: E402

PROGRAM = str(ROOT / "amft.py")
slow = pytest.mark.skipif(
    not os.environ.get("AMFT_SLOW"), reason="takes longer: AMFT_SLOW=1 runs it")


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", ["amft.py"])
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint folder with the base's tokenizer and a random policy."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "base")
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
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def no_evaluation(model, tokenizer, task, config, split, temperature, samples):
    measures = dict(n=1, samples=1, success=0.0, low=0.0, high=1.0, any=0.0, hits=[0], outcomes={})
    return dict(measures, split=split)


@pytest.fixture
def unevaluated(monkeypatch):
    """Runs spend their time on steps."""
    monkeypatch.setattr(amft, "evaluate", no_evaluation)


@pytest.fixture
def untrained(monkeypatch, unevaluated):
    """What should have been refused must not train for minutes."""
    def train(*_):
        raise AssertionError("this was to be refused")
    monkeypatch.setattr(amft, "train", train)


def short(model, out, *flags):
    """The words of a run of seconds."""
    return ["--smoke", "--model", model, "--out", str(out), "--device", "cpu", *flags]


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
    assert len(error.splitlines()) == 1, error
    assert error.startswith("amft.py: "), error
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


def interrupt(*_):
    raise KeyboardInterrupt


def read(folder, kind=None):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if kind in (None, row["kind"])]


def without_clock(folder):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read(folder)]


def tree(folder):
    """All that is in a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Two runs, not to be changed: one is whole, the other was cut off in its sixth step."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amft, "evaluate", no_evaluation)
        patch.setattr(running, "SAVE_SECONDS", -1)
        amft.main(short(tiny, folder / "whole"))
        at_call(patch, amft, "adamw_step", 6, interrupt)
        with pytest.raises(SystemExit):
            amft.main(short(tiny, folder / "broken"))
    return folder


@pytest.fixture
def whole(runs):
    return runs / "whole"


@pytest.fixture
def broken(runs, tmp_path):
    """A run that was cut off, to do with as one likes."""
    return shutil.copytree(runs / "broken", tmp_path / "run")


# --- flags ----------------------------------------------------------------------------------------

REFUSED = [
    # Not flags, or not their values.
    ("--tsk gp", "--tsk"),
    ("--st 5", "--st"),
    ("gp", "gp"),
    ("--task go", "'go'"),
    ("--method gap", "'gap'"),
    ("--controller pid", "'pid'"),
    ("--steps many", "'many'"),
    ("--steps -1", "--steps -1"),
    ("--samples 1", "--samples 1"),
    ("--lr 0", "--lr 0"),
    ("--mu 1.5", "--mu 1.5"),
    ("--mu nan", "--mu nan"),
    ("--seed -1", "--seed -1"),
    ("--seed 18446744073709551616", "--seed 18446744073709551616"),
    ("--temperature inf", "--temperature inf"),
    ("--eta-mu inf", "--eta-mu inf"),
    ("--eta-h inf", "--eta-h inf"),
    ("--lr inf", "--lr inf"),
    ("--trace inf", "--trace inf"),
    ("--clip inf", "--clip inf"),
    ("--device quantum", "--device quantum"),
    ("--device meta", "--device meta"),
    # Values that do not fit together.
    ("--mu 1", "--mu 1.0 --mu-max"),
    ("--mu-min 0.6 --mu 0.5", "--mu 0.5 --mu-min"),
    ("--mu-min 0.9 --mu-max 0.1", "--mu-min 0.9"),
    ("--steps 100 --warmup 101", "--warmup 101 --steps"),
    ("--demos 3", "--demos 3"),
    ("--method rl --demos 5", "--demos 5 --prompts"),
    ("--method sft --demos 5", "--demos 5 --sft-batch"),
    ("--max-new-tokens 9", "--max-new-tokens is 9"),
    ("--controller paper --utility train", "--utility train val --controller"),
    ("--controller paper --utility both", "--utility both val --controller"),
    ("--controller paper --trace 0.5", "--trace 0.5 0.0 --controller"),
    ("--reward graded --utility both", "--utility both val --reward"),
    ("--reward graded --utility train", "--utility train val --reward"),
    ("--data x.jsonl", "--data x.jsonl math"),
    ("--data-test x.jsonl", "--data-test x.jsonl math"),
    ("--task math --data none.jsonl", "none.jsonl cannot be read"),
    # Flags that would not do anything.
    ("--method sft --mu 0.5", "--mu: is not used"),
    ("--method sft --samples 8", "--samples: is not used"),
    ("--method sft-rl --mu 0.5", "--mu: is not used"),
    ("--method rl --sft-batch 8", "--sft-batch: is not used"),
    ("--method fixed --trace 0", "--trace: is not used"),
    ("--eval-only --steps 5", "--steps: is not used"),
    ("--eval-only --method rl", "--method: is not used"),
    ("--eval-only --out unused", "--out: is not used"),
    ("--eval-only --verbose", "--verbose: is not used"),
]


@pytest.mark.parametrize("flags, words", REFUSED)
def test_bad_flags_are_refused(flags, words, tmp_path, monkeypatch, capsys, untrained):
    """Would catch a traceback, a run that starts anyway, a line that does not name the flag."""
    monkeypatch.chdir(tmp_path)
    argv = flags.split()
    if "--eval-only" not in argv:
        argv += ["--out", "unused"]
    error = fails(argv, capsys)
    for word in words.split():
        assert word in error
    assert tree(tmp_path) == {}


ACCEPTED = [
    ("", dict(steps=300, model="base/worn", warmup=0, utility="val", mu=0.5)),
    ("--method rl --demos 50", dict(demos=50, mu=0.0, warmup=0)),
    ("--method sft --demos 5 --sft-batch 5", dict(demos=5, mu=0.5)),
    ("--smoke --steps 2", dict(steps=2, warmup=1)),
    ("--smoke --steps 1", dict(steps=1, warmup=0)),
    ("--task virl --steps 5", dict(steps=5, warmup=2)),
    ("--task virl --steps 5 --warmup 5", dict(steps=5, warmup=5)),
    ("--reward graded", dict(utility="val")),
    ("--task virl", dict(utility="both")),
    ("--task virl --reward graded", dict(utility="val")),
    ("--reward graded --utility val", dict(utility="val")),
    ("--task virl --controller paper", dict(utility="val", trace=0.0)),
    ("--controller paper --trace 0 --utility val", dict(utility="val", trace=0.0)),
    ("--method fixed --mu 1", dict(mu=1.0)),
    ("--bf16", dict(bf16=1)),
    ("--bf16 0", dict(bf16=0)),
    ("--smoke --method sft", dict(steps=9, warmup=0)),
    ("--smoke --eval-n 7 --demos 99", dict(eval_n=7, demos=99, steps=9)),
]


@pytest.mark.parametrize("flags, settings", ACCEPTED)
def test_flags_that_fit_are_taken(flags, settings, tmp_path, monkeypatch):
    """Would catch a complaint about a flag that was not typed, or is not read; and what wins."""
    monkeypatch.chdir(tmp_path)
    config = arguments.parse(flags.split(), amft.Config, tasks.TASKS).config
    for name, value in settings.items():
        assert getattr(config, name) == value, name


@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_smoke_wins_over_a_tasks_own_defaults(task, tmp_path, monkeypatch):
    """Would catch a very short run of 600 steps; what --smoke leaves open is the task's."""
    monkeypatch.chdir(tmp_path)
    config = arguments.parse(["--smoke", "--task", task], amft.Config, tasks.TASKS).config
    short = {**arguments.SMOKE, **tasks.TASKS[task].smoke}
    for name, value in short.items():
        assert getattr(config, name) == value <= arguments.SMOKE[name], name
    left = set(tasks.TASKS[task].defaults) - set(arguments.SMOKE)
    for name in left:
        assert getattr(config, name) == tasks.TASKS[task].defaults[name], name


def ends_without_torch(*words):
    """(exit code, what was printed, was torch imported?, processor seconds) of the program."""
    code = ("import runpy, sys\n"
            "sys.argv = sys.argv[1:]\n"
            "try:\n"
            "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "finally:\n"
            "    print('torch' in sys.modules)\n")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run([sys.executable, "-c", code, PROGRAM, *words],
                             capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    text, _, imported = process.stdout.strip().rpartition("\n")
    return process.returncode, " ".join(text.split()) + process.stderr, imported, seconds


@pytest.mark.parametrize("words, code, says", [
    ("--help", 0, "--steps STEPS in all, the warm-up's included (default: 300)"),
    ("--task virl --help", 0, "--steps STEPS in all, the warm-up's included (default: 40)"),
    ("--method rl --help", 0, "--warmup WARMUP"),
    ("--stpes 5", 2, "amft.py: error: unrecognized arguments: --stpes 5"),
    ("--mu 2", 2, "amft.py: error: --mu 2.0"),
])
def test_help_and_mistyped_flags_answer_without_torch(words, code, says):
    """Would catch seconds of imports before an answer, and defaults of another task."""
    found, text, imported, seconds = ends_without_torch(*words.split())
    assert found == code
    assert says in text
    assert imported == "False"
    assert seconds < 2


def test_every_flag_is_explained(capsys):
    """Would catch a flag without a text or with another default than the task's."""
    with pytest.raises(SystemExit) as info:
        amft.main(["--help"])
    assert not info.value.code
    text = " ".join(capsys.readouterr().out.split())
    defaults = tasks.GeneralPoints.defaults
    for field in amft.dataclasses.fields(amft.Config):
        flag = "--" + field.name.replace("_", "-")
        default = defaults.get(field.name, field.default)
        assert f"{field.metadata['help']} (default: {default})" in text
        assert re.search(rf"{flag}[ =,{{\[]", text)
    for flag in ("--out", "--resume", "--eval-only", "--verbose", "--smoke"):
        assert flag in text


def test_a_configuration_made_in_a_notebook_is_parsed(tmp_path, capsys):
    """Would catch help that is read from a source file, and a field that must have one."""
    made = dict(amft=amft, dataclasses=amft.dataclasses)
    exec("@dataclasses.dataclass\n"
         "class Mine(amft.Config):\n"
         "    patience: int = 7\n", made)
    argv = ["--patience", "3", "--out", str(tmp_path / "run")]
    config = arguments.parse(argv, made["Mine"], tasks.TASKS).config
    assert config.patience == 3
    with pytest.raises(SystemExit):
        arguments.parse(["--help"], made["Mine"], tasks.TASKS)
    assert "--patience" in capsys.readouterr().out


@pytest.mark.parametrize("problem", [
    '{"prompt": "1 + 1?", "solution": "\\ud800", "answer": "2"}',
    '{"prompt": "\\udfff", "solution": "2", "answer": "2"}',
    "not json",
    '{"prompt": "1 + 1?"}',
])
def test_bad_problems_name_their_line(problem, tmp_path, capsys, untrained):
    """Would catch a lone surrogate, or half a problem, that fails somewhere in the tokenizer."""
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "2 + 2?", "solution": "4", "answer": "4"}\n' + problem + "\n")
    argv = ["--task", "math", "--data", file, "--out", tmp_path / "run"]
    assert f"{file}, line 2" in fails(argv, capsys)
    assert not (tmp_path / "run").exists()


# --- checkpoints ----------------------------------------------------------------------------------

KEY = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def lacking(tensors):
    del tensors[KEY]


def not_finite(tensors):
    tensors[KEY][0, 0] = math.nan


def not_finite_where_no_card_is(tensors):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "base")
    tensors[EMBEDDING][tokenizer.convert_tokens_to_ids("apples")] = math.nan


def of_another_shape(tensors):
    tensors[KEY] = tensors[KEY][:, :3].contiguous()


@pytest.mark.parametrize(
    "change", [lacking, not_finite, not_finite_where_no_card_is, of_another_shape])
def test_checkpoints_with_bad_weights_are_refused(change, tiny, tmp_path, capsys, untrained):
    """Would catch a tensor that is filled at random, or a NaN, and is evaluated."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused_as_checkpoint(folder, tmp_path, capsys)


def refused_as_checkpoint(model, tmp_path, capsys):
    for rest in (["--out", tmp_path / "unused"], ["--eval-only"]):
        error = fails(["--model", model, *rest], capsys)
        assert f"--model {model}" in error
        assert "checkpoint" in error
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("device, given, passes", [
    ("cpu", 4096, 4096), ("meta", 4096, 2 ** 15), ("meta", 1024, 1024), ("meta", 10 ** 6, 10 ** 6)])
def test_a_small_policy_off_the_cpu_takes_a_batch_in_one_pass(device, given, passes, monkeypatch):
    """A --micro-tokens that was given and does not count; many passes where one fits, which a GPU waits for."""
    monkeypatch.setattr(loading, "device_of", lambda name: name)  # meta stands in for a GPU: it has no values
    config = amft.Config(device=device, micro_tokens=given)
    amft.load_policy(config, tasks.TASKS["gp"](), amft)
    assert config.micro_tokens == passes


def test_folders_and_names_that_are_no_checkpoints_are_refused(tiny, tmp_path, capsys, untrained):
    """Would catch a traceback of the library that loads."""
    (tmp_path / "empty").mkdir()
    corrupt = shutil.copytree(tiny, tmp_path / "corrupt")
    (corrupt / "model.safetensors").write_bytes(b"x" * 100)
    for model in (tmp_path / "empty", corrupt, "none/such"):
        refused_as_checkpoint(model, tmp_path, capsys)


def test_checkpoints_that_cannot_read_the_task_are_refused(tiny, tmp_path, capsys, untrained):
    """Would catch a tokenizer of two words, and a policy without eyes before a picture."""
    foreign = tmp_path / "foreign"
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(foreign)
    words = models.WordLevel({"<unk>": 0, "Make": 1}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), unk_token="<unk>", eos_token="<unk>")
    tokenizer.save_pretrained(foreign)
    out = ["--out", tmp_path / "unused"]
    assert "tokenizer cannot encode" in fails(["--model", foreign, *out], capsys)
    blind = fails(["--task", "gp-vl", "--model", tiny, *out], capsys)
    assert "not a vision-language checkpoint" in blind
    assert not (tmp_path / "unused").exists()


# --- the folder of a run --------------------------------------------------------------------------


def strangers_files(folder, whole):
    folder.mkdir()
    (folder / "notes.txt").write_text("precious")


def a_state_alone(folder, whole):
    folder.mkdir()
    (folder / "state.pt").write_text("precious")


def another_log(folder, whole):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("precious")


def an_empty_log(folder, whole):
    folder.mkdir()
    (folder / "metrics.jsonl").touch()


def half_a_configuration(folder, whole):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"kind": "config", "ta')


def a_file(folder, whole):
    folder.write_text("precious")


def a_finished_run(folder, whole):
    shutil.copytree(whole, folder)


@pytest.mark.parametrize("fill", [
    strangers_files, a_state_alone, another_log, an_empty_log, half_a_configuration, a_file,
    a_finished_run])
def test_a_folder_that_is_not_empty_is_refused_and_not_touched(
        fill, whole, tmp_path, capsys, untrained):
    """Would catch files that a run overwrites, and a --resume that is promised and refused."""
    folder = tmp_path / "taken"
    fill(folder, whole)
    before = tree(tmp_path)
    error = fails(["--smoke", "--out", folder], capsys)
    assert f"--out {folder}" in error
    assert "--resume" not in error
    assert tree(tmp_path) == before


def test_the_folder_of_an_unfinished_run_is_refused_and_says_how_to_go_on(
        broken, capsys, untrained):
    """Would catch a run that is begun over the one that is there."""
    before = tree(broken)
    assert f"--resume {broken} goes on" in fails(["--smoke", "--out", broken], capsys)
    assert tree(broken) == before


def test_the_current_folder_is_refused(tmp_path, monkeypatch, capsys, untrained):
    """Would catch --out . among a person's files."""
    (tmp_path / "notes.txt").write_text("precious")
    monkeypatch.chdir(tmp_path)
    assert "--out ." in fails(["--smoke", "--out", "."], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_taken(tmp_path):
    """Would catch a folder that had to be removed before a run."""
    parsed = arguments.parse(["--out", str(tmp_path)], amft.Config, tasks.TASKS)
    assert parsed.folder == tmp_path
    assert parsed.new


@pytest.mark.parametrize("name", ["file/run", "x" * 400, "locked/run"])
def test_folders_that_cannot_be_made_are_one_line(name, tiny, tmp_path, capsys, unevaluated):
    """Would catch a traceback: below a file, too long a name, without the right to write."""
    if name == "locked/run" and not os.getuid():
        pytest.skip("root may write anywhere")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "locked").mkdir(mode=0o500)
    error = fails(short(tiny, tmp_path / name), capsys)
    assert name[:40] in error
    assert "--resume" not in error
    assert (tmp_path / "file").read_text() == "precious"


def test_runs_without_a_name_get_their_own_folders(tiny, tmp_path, monkeypatch, unevaluated):
    """Would catch a second run in the first one's folder."""
    monkeypatch.chdir(tmp_path)
    argv = ["--smoke", "--model", tiny, "--device", "cpu", "--steps", "1", "--method", "sft"]
    for _ in range(2):
        amft.main(argv)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["gp", "gp-2"]
    assert read(Path("runs/gp-2"))[-1]["kind"] == "final"


# --- two processes --------------------------------------------------------------------------------


def test_a_second_process_on_a_run_is_refused(tiny, whole, tmp_path, monkeypatch, capsys,
                                              unevaluated):
    """Would catch two that write one log: in the fifth step another one wants to go on with it."""
    folder = tmp_path / "run"
    errors = []

    def second(*_):
        with torch.random.fork_rng():
            errors.append(fails(["--resume", folder], capsys))
            errors.append(fails(short(tiny, folder), capsys))
    at_call(monkeypatch, amft, "adamw_step", 5, second)
    amft.main(short(tiny, folder))
    assert "another process is writing" in errors[0]
    assert "must be a new or an empty folder" in errors[1]
    assert without_clock(folder) == without_clock(whole)


def test_of_two_that_start_at_once_one_is_refused(tiny, tmp_path, monkeypatch, capsys, unevaluated):
    """Would catch a folder that was free when the words were read, and no more when it is taken."""
    folder = tmp_path / "run"
    held = []

    def other(*_):
        folder.mkdir()
        file = open(folder / "metrics.jsonl", "w")
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("theirs\n")
        file.flush()
        held.append(file)
    at_call(monkeypatch, amft, "load_policy", 1, other)
    assert "another process is writing" in fails(short(tiny, folder), capsys)
    assert (folder / "metrics.jsonl").read_text() == "theirs\n"
    held[0].close()


def test_a_run_that_ended_is_free_though_its_error_is_kept(broken, whole, monkeypatch, unevaluated):
    """Would catch a notebook, which keeps the last error and with it the Run, locked out."""
    with monkeypatch.context() as patch:
        at_call(patch, amft, "adamw_step", 2, interrupt)
        with pytest.raises(SystemExit) as kept:
            amft.main(["--resume", str(broken)])
    amft.main(["--resume", str(broken)])
    assert kept.value.code == 130
    assert without_clock(broken) == without_clock(whole)


# --- interrupts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_saves_it(
        number, tiny, whole, tmp_path, monkeypatch, capsys, unevaluated):
    """Would catch steps that are lost to Ctrl-C or SIGTERM, and a line that names another step."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, amft, "adamw_step", 5, lambda *_: signal.raise_signal(number))
        error = fails(short(tiny, folder), capsys, code=130)
    assert error == f"amft.py: stopped; --resume {folder} goes on after step 5"
    assert len(read(folder, "step")) == 5
    with monkeypatch.context() as patch:
        at_call(patch, amft, "adamw_step", 1, interrupt)  # it begins where it was said
        assert "after step 5" in fails(["--resume", folder], capsys, code=130)
    amft.main(["--resume", str(folder)])
    assert without_clock(folder) == without_clock(whole)


def test_a_second_signal_is_not_waited_for(tiny, whole, tmp_path, monkeypatch, capsys, unevaluated):
    """Would catch a step of hours that cannot be left, or one that is called saved and is not."""
    folder = tmp_path / "run"

    def twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    with monkeypatch.context() as patch:
        at_call(patch, amft, "adamw_step", 5, twice)
        error = fails(short(tiny, folder), capsys, code=130)
    assert error.endswith(f"--resume {folder} goes on after step 0")
    assert len(read(folder, "step")) == 4
    amft.main(["--resume", str(folder)])
    assert without_clock(folder) == without_clock(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_evaluation_loses_no_step(
        number, tiny, whole, tmp_path, monkeypatch, capsys, unevaluated):
    """Would catch evaluations that are in the log twice, or steps that are done again."""
    folder = tmp_path / "run"
    first = 5 + 2 * (len(tasks.GeneralPoints.splits) - 1)  # five temperatures on val, then two
    with monkeypatch.context() as patch:
        at_call(patch, amft, "evaluate", first + 2, lambda *_: signal.raise_signal(number))
        assert "after step 9" in fails(short(tiny, folder), capsys, code=130)
    amft.main(["--resume", str(folder)])
    assert without_clock(folder) == without_clock(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_first_evaluation_leaves_a_run_that_goes_on(
        number, tiny, whole, tmp_path, monkeypatch, capsys, unevaluated):
    """Would catch a traceback, or the evaluations before the first step in the log twice."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, amft, "evaluate", 3, lambda *_: signal.raise_signal(number))
        assert "stopped" in fails(short(tiny, folder), capsys, code=130)
    amft.main(["--resume", str(folder)])
    assert without_clock(folder) == without_clock(whole)


@pytest.mark.parametrize("part", ["finish", "samples"])
def test_ctrl_c_while_something_is_printed_leaves_a_run_that_goes_on(
        part, tiny, whole, tmp_path, monkeypatch, capsys, unevaluated):
    """Would catch a run that calls itself finished before its last table was printed."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(running.Screen, part, interrupt)
        error = fails(short(tiny, folder, "--warmup", "0"), capsys, code=130)
    assert f"--resume {folder} goes on" in error
    assert read(folder, "final") == []
    amft.main(["--resume", str(folder)])
    assert read(folder)[-1]["kind"] == "final"
    assert [row["step"] for row in read(folder, "step")] == list(range(1, 10))


def test_an_interrupt_before_there_is_a_run_does_not_say_resume(
        tiny, tmp_path, capsys, monkeypatch):
    """Would catch a promise to go on with nothing."""
    monkeypatch.setattr(amft, "load_policy", interrupt)
    error = fails(short(tiny, tmp_path / "run"), capsys, code=130)
    assert error == "amft.py: stopped"
    assert not (tmp_path / "run").exists()


@slow
def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    """Would catch a traceback of somebody else's import."""
    process = subprocess.Popen([sys.executable, PROGRAM, "--smoke", "--out", tmp_path / "run"],
                               stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "amft.py: stopped\n"
    assert process.returncode == 130


# --- states and logs that are none ----------------------------------------------------------------


def changed(key, value):
    """What makes another state of one."""
    return lambda state: {**state, key: value}


STATES = {
    "theta of another model": lambda state: {**state, "theta": state["theta"][:-1]},
    "log of another run": lambda state: {**state, "own": {**state["own"], "log": 10 ** 9}},
    "no modules": lambda state: {key: state[key] for key in ("own", "theta", "adam")},
    "no theta": lambda state: {key: state[key] for key in ("own", "modules", "adam")},
    "empty modules": changed("modules", []),
    "empty own": changed("own", {}),
    "adam a number": changed("adam", 3),
    "a list": lambda state: [1, 2],
}
BYTES = {
    "garbage": lambda content: b"garbage",
    "empty": lambda content: b"",
    "its first half": lambda content: content[:1000],
    "all but its end": lambda content: content[:-1000],
}


def not_a_state(folder, content, capsys):
    """It is refused in one line that names it, and the log is as it was."""
    state = folder / "state.pt"
    state.write_bytes(content)
    before = tree(folder)
    error = fails(["--resume", folder], capsys)
    assert f"{state}: is not the state of this run" in error
    assert tree(folder) == before


@pytest.mark.parametrize("name", list(BYTES))
def test_states_that_are_none_are_refused(name, broken, capsys, unevaluated):
    """Would catch a traceback, or a log that is cut before its state is found to be garbage."""
    content = (broken / "state.pt").read_bytes()
    not_a_state(broken, BYTES[name](content), capsys)


@pytest.mark.parametrize("name", list(STATES))
def test_states_of_something_else_are_refused(name, broken, tmp_path, capsys, unevaluated):
    """Would catch a state that fits in part: one line, nothing lost."""
    state = torch.load(broken / "state.pt", weights_only=True)
    torch.save(STATES[name](state), tmp_path / "other.pt")
    not_a_state(broken, (tmp_path / "other.pt").read_bytes(), capsys)


def test_a_state_that_is_gone_is_missed(broken, whole, capsys, unevaluated):
    """Would catch a run that silently begins anew, its log thrown away."""
    state = broken / "state.pt"
    content = state.read_bytes()
    state.unlink()
    before = tree(broken)
    assert f"{state}: is gone" in fails(["--resume", broken], capsys)
    assert tree(broken) == before
    state.write_bytes(content)
    amft.main(["--resume", str(broken)])  # nothing was lost
    assert without_clock(broken) == without_clock(whole)


LOGS = {
    "no text": lambda config, rest: b"\xff\xfe\x00" * 50 + b"\n",
    "no JSON first": lambda config, rest: b"not json\n" + config + rest,
    "half a line within": lambda config, rest: config + rest.replace(b'"step": 2', b'"st', 1),
    "a list first": lambda config, rest: b"[1, 2]\n" + config + rest,
    "a number": lambda config, rest: b"7\n",
    "an object": lambda config, rest: b"{}\n",
    "empty": lambda config, rest: b"",
    "no configuration": lambda config, rest: rest,
    "half a configuration": lambda config, rest: config[:30],
}


@pytest.mark.parametrize("name", list(LOGS))
def test_logs_that_are_none_are_refused(name, broken, capsys, untrained):
    """Would catch a traceback, or a run that goes on with other settings."""
    log = broken / "metrics.jsonl"
    config, rest = log.read_bytes().split(b"\n", 1)
    log.write_bytes(LOGS[name](config + b"\n", rest))
    before = tree(broken)
    error = fails(["--resume", broken], capsys)
    assert str(broken) in error
    assert "goes on" not in error
    assert tree(broken) == before


@pytest.mark.parametrize("name, value", [
    ("steps", "many"), ("steps", -1), ("lr", None), ("lr", math.nan), ("method", 5),
    ("method", "gap"), ("task", "go"), ("controller", "pid"), ("prompts", [8]), ("seed", 2 ** 64)])
def test_logs_with_bad_settings_are_refused(name, value, broken, capsys, untrained):
    """Would catch settings of a log that the command line would not have taken."""
    log = broken / "metrics.jsonl"
    config, rest = log.read_text().split("\n", 1)
    settings = {**json.loads(config), name: value}
    log.write_text(json.dumps(settings) + "\n" + rest)
    before = tree(broken)
    assert str(broken) in fails(["--resume", broken], capsys)
    assert tree(broken) == before


def test_a_log_that_is_gone_is_missed(broken, tmp_path, capsys, untrained):
    """Would catch a traceback: a state alone is no run, nor is a folder in the log's place."""
    log = broken / "metrics.jsonl"
    log.unlink()
    assert str(log) in fails(["--resume", broken], capsys)
    log.mkdir()
    assert str(log) in fails(["--resume", broken], capsys)
    assert str(tmp_path / "none") in fails(["--resume", tmp_path / "none"], capsys)


@pytest.mark.parametrize("flags", ["--lr 1", "--lr 1e-4", "--eval-only", "--task gp", "--smoke",
                                   "--steps 99", "--out other"])
def test_resume_takes_no_other_flag(flags, broken, capsys, untrained):
    """Would catch a flag that is taken and not heeded; --verbose alone may go along."""
    before = tree(broken)
    error = fails(["--resume", broken, *flags.split()], capsys)
    assert "no other flag" in error
    assert tree(broken) == before
    words = ["--resume", str(broken), "--verbose"]
    parsed = arguments.parse(words, amft.Config, tasks.TASKS)
    assert parsed.verbose
    assert not parsed.new


@pytest.mark.parametrize("flags", [
    "--method rl", "--method sft-rl", "--method sft --demos 5 --sft-batch 5", "--task gp-turns",
    "--controller paper", "--reward graded", "--method fixed --mu 1"])
def test_what_the_command_line_took_goes_on(flags, tiny, tmp_path, monkeypatch):
    """Would catch a run of another method than the default that --resume then refuses."""
    words = [*short(tiny, tmp_path), *flags.split()]
    config = arguments.parse(words, amft.Config, tasks.TASKS).config
    row = dict(kind="config", **vars(config))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    parsed = arguments.parse(["--resume", str(tmp_path)], amft.Config, tasks.TASKS)
    assert parsed.config == config
    assert parsed.folder == tmp_path


def test_a_finished_run_is_not_gone_on_with(whole, capsys, untrained):
    """Would catch a second end, or a promise to go on."""
    before = tree(whole)
    assert "unfinished" in fails(["--resume", whole], capsys)
    assert tree(whole) == before


# --- what goes wrong on the way -------------------------------------------------------------------


def test_the_log_never_holds_what_is_not_json(tmp_path):
    """Would catch NaN in the log, which other readers of JSON refuse."""
    model = SimpleNamespace(num_parameters=lambda: 0)
    run = running.Run(arguments.Arguments(amft.Config(), tmp_path / "run", True), model)
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError):
            run.write("step", mu=value)
    assert [row["kind"] for row in read(tmp_path / "run")] == ["config"]


def test_non_finite_loss_stops_the_run_and_keeps_the_log(
        tiny, tmp_path, capsys, monkeypatch, unevaluated):
    """Would catch a NaN that goes on, and a --resume that would come to the same step again."""
    monkeypatch.setattr(running, "SAVE_SECONDS", -1)
    true = amft.sft_gradient
    count = itertools.count(1)

    def sick(*args):
        grad, logps, loss = true(*args)
        return grad, logps, math.nan if next(count) == 5 else loss
    monkeypatch.setattr(amft, "sft_gradient", sick)
    error = fails(short(tiny, tmp_path / "run"), capsys)
    assert "step 5: sft_loss not finite" in error
    assert "--lr" in error
    assert "--resume" not in error
    assert [row["step"] for row in read(tmp_path / "run", "step")] == [1, 2, 3, 4]


@pytest.mark.parametrize("flags", ["--lr 100", "--lr 1e39", "--lr 1e39 --steps 1 --method sft"])
def test_too_high_a_learning_rate_is_one_line(flags, tmp_path, capsys, unevaluated):
    """Would catch a traceback of the sampler, or a policy that is not finite in final/."""
    error = fails(short("base", tmp_path / "run", *flags.split()), capsys)
    assert "not finite" in error
    assert "--lr" in error
    assert "--resume" not in error
    assert not (tmp_path / "run" / "final").exists()


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line_and_loses_nothing(
        tiny, whole, tmp_path, capsys, monkeypatch, unevaluated):
    """Would catch a traceback, or a state that was overwritten by half of one."""
    monkeypatch.setattr(running, "SAVE_SECONDS", -1)
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, Path, "write_bytes", 4, no_space)
        error = fails(short(tiny, folder), capsys)
    assert "No space left" in error
    assert f"--resume {folder} goes on after step 2" in error
    amft.main(["--resume", str(folder)])
    assert without_clock(folder) == without_clock(whole)


def test_a_disk_that_is_full_from_the_start_promises_nothing(
        tiny, tmp_path, capsys, monkeypatch, unevaluated):
    """Would catch a promise to go on with a run that was not begun."""
    at_call(monkeypatch, running.Run, "write", 1, no_space)
    error = fails(short(tiny, tmp_path / "run"), capsys)
    assert "No space left" in error
    assert "--resume" not in error


@pytest.mark.parametrize("words", [
    ["--help"],
    ["--eval-only", "--eval-n", "1"],
    pytest.param(["--smoke", "--out", "run"], marks=slow),
])
def test_nobody_reads_the_output(words, tiny, tmp_path):
    """Would catch a traceback of `| head -1`."""
    model = [] if words == ["--help"] else ["--model", tiny, "--device", "cpu"]
    process = subprocess.Popen([sys.executable, PROGRAM, *words, *model], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read()
    process.wait()
    assert "Traceback" not in error
    assert "Exception" not in error


# --- evaluation, and what is said of it


SHARES = {0: 0.3, 0.1: 0.35, 0.3: 0.35, 0.6: 0.2, 0.9: 0.1, 1: 0.05}  # on val


def looked(asked):
    """A look that notes what it was asked, and is best at 0.9 off val."""
    def look(split, temperature, samples):
        asked.append((split, temperature, samples))
        share = SHARES[temperature] if split == "val" else temperature / 2
        return dict(split=split, n=2, samples=samples, success=share, low=share / 2, high=2 * share,
                    any=0.5, hits=[1, 0])
    return look


def test_an_evaluation_is_at_the_best_temperature_on_val():
    """A temperature that is chosen on the split that is reported, or by the last of equals."""
    asked = []
    rows = list(evaluation(looked(asked), ["id", "val", "heldout"], 0.9, 16))
    assert [row["split"] for row in rows] == ["val", "id", "heldout"]
    assert all(row["temperature"] == 0.1 for row in rows)
    assert [row["best"] for row in rows] == [[0.35, 0.175, 0.7]] + 2 * [[0.05, 0.025, 0.1]]
    assert [row["success"] for row in rows] == [0.1, 0.45, 0.45]  # at the temperature of training
    assert [row["greedy"] for row in rows] == [0.3, 0, 0]
    assert set(rows[0]["hits"]) == {"0", "0.1", "0.3", "0.6", "0.9", "1"}
    assert set(rows[1]["hits"]) == {"0", "0.1", "0.9"}
    assert all(samples == (16 if temperature else 1) for _, temperature, samples in asked)
    asked.clear()
    row, = short_evaluation(looked(asked), ["val"], 0.9)
    assert asked == [("val", 0.9, 4)] and row["success"] == 0.1 and "hits" not in row


def test_the_table_and_the_sentence_say_the_best_temperature(tmp_path, capsys):
    """A gain that is told at the temperature of training, where being more certain looks like one."""
    def rows(step, shift):
        for row in evaluation(looked([]), ["val", "id"], 1, 16):
            best = [x + shift for x in row["best"]]
            yield dict(row, kind="eval", step=step, whole=True, best=best)
    log = [*rows(0, 0), dict(kind="step", step=3, mu=0.25, rollouts=7, seconds=60), *rows(3, 0.25)]
    config = SimpleNamespace(steps=3, task="gp", method="amft", model="m", device="cpu")
    config = dataclasses.make_dataclass("C", [(k, Any, v) for k, v in vars(config).items()])()
    screen = Screen(tmp_path, config, 10 ** 6)
    for row in log:
        screen.show(row)
    screen.finish(log)
    printed = capsys.readouterr().out
    assert "after step 3, training problems: 50.0% [25, 100] of samples right, 30.0% at its best temperature, 0.1" in printed
    table_row = next(line for line in printed.splitlines() if line.startswith("training problems (id)"))
    assert table_row.split("(id)")[1].split() == ["5.0%", "[2,", "10]", "50", "50.0", "30.0%", "[28,", "35]", "50", "50.0"]
    assert "Right at its best temperature (0.1 before, 0.1 after), %: validation 35 -> 60, training problems 5 -> 30." in printed


def test_a_tables_columns_stand_under_their_headings():
    """A long split's name, which moves its row to the right."""
    rows = list(evaluation(looked([]), list(amft.TASKS["virl"].splits), 1, 16))
    heading, *lines, _ = table({"before": rows, "after": rows}).splitlines()
    assert len(lines) == 5 and len({len(line) for line in (heading, *lines)}) == 1


@pytest.mark.parametrize("name", list(amft.TASKS))
def test_a_conversation_is_printed_with_what_its_last_response_answered(tmp_path, capsys, name):
    """A walk that has arrived is asked for a stop that is not there, or the first question beside the last answer."""
    task = amft.make_task(amft.Config(task=name), amft.TASKS)
    solved, failed = task.sample("train", random.Random(0)), task.sample("train", random.Random(1))
    while not solved.success:
        shown = solved.demonstration()[0].shown  # of what is left
        solved.step(solved.expert)
    while failed.tries < failed.attempts:
        failed.step("no")
    Screen(tmp_path, amft.Config(task=name), 10 ** 6).samples([failed, solved])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 6 and lines[2].endswith("correct")
    assert lines[0].endswith(shown.split()[-1]) and lines[4].endswith("no")


def test_what_a_terminal_cannot_print_ends_no_run(tmp_path, monkeypatch):
    """A run that dies of an arrow in a response, at the same step again after --resume."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    deal = amft.TASKS["gp"]().sample("train", random.Random(0))
    deal.step("4 \u2192 24 \ud83d")
    Screen(tmp_path, amft.Config(task="gp"), 10 ** 6).samples([deal])
    out.flush()
    assert b"4 ? 24 ?" in out.buffer.getvalue()
