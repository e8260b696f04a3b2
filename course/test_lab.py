"""Tests of the laboratory part of the course kit: the bug hunt, the enumerated world, the written questions' commands.

    python -m pytest -q course/test_lab.py
    AMFT_SLOW=1 python -m pytest -q course/test_lab.py     # and every choice of every rule; many minutes
"""

import ast
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import bughunt  # noqa: E402
import leaderboard  # noqa: E402
import toy  # noqa: E402
rules = bughunt.rules

slow = pytest.mark.skipif(not os.environ.get("AMFT_SLOW"), reason="takes longer: AMFT_SLOW=1 runs it")


@pytest.fixture(autouse=True)
def plain():
    yield
    torch.set_default_dtype(torch.float32)


# --- the enumerated world -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", ["", "a", "b"])
def test_the_exact_meta_gradient_is_the_finite_difference_of_u(student):
    """An enumeration that is not of the policy, or a tangent that is not of the step."""
    world = toy.World(student)
    step, tangent = toy.curve(world)
    at, h = 0.35, 1e-5
    here = step(at)
    expected = ((world.utility(step(at + h)) - world.utility(step(at - h))) / (2 * h)).item()
    slope = world.utility_gradient(here)
    assert (slope @ tangent(at)).item() == pytest.approx(expected, rel=1e-5, abs=1e-7 * (slope.norm() * tangent(at).norm()).item())
    # And the enumeration is of the policy that amft.py sees.
    rollouts = world.rollouts(here, 6, 2)
    logps = toy.amft.logps_of(world.model, rollouts.batch)
    row = world.token_logps(here)[(world.prompts == rollouts.batch.input_ids[0, :3]).all(1).nonzero()[0, 0]]
    torch.testing.assert_close(row[(toy.RESPONSES == rollouts.batch.responses[0]).all(1)][0], logps[0])


def test_the_figures_of_the_written_questions():
    """The short form of each command, and what answers.md says of it."""
    world = toy.World
    found = toy.bias(world(), True)
    assert all(found["amft.group_advantages", G] == pytest.approx(1) for G in (2, 4, 8, 16))
    ratios = [found["own_deviation", G] for G in (2, 4, 8, 16)]
    assert ratios[0] == pytest.approx(1, abs=1e-4) and ratios == sorted(ratios) and 1.4 < ratios[1] < 1.8 and 1.9 < ratios[3] < 2.5
    found = toy.shift(world(), True)
    with_baseline, without = ([found[name, c] for c in (0.0, 5.0)] for name in ("others of the prompt", "none"))
    assert with_baseline[1] == pytest.approx(with_baseline[0], rel=0.01) and 5 < without[1] / without[0] < 12
    found = toy.adam(world(), True)
    assert found["noise", 0] < 0.1 and found["noise", 30] > 0.97 and found["noise", 30] > found["own", 30] > found["own", 1]
    found = toy.signal(world(), True)
    assert found[32]["ratio"] > found[8]["ratio"] and 0.8 < found[32]["inside"] <= 1
    found = toy.lam(world(), True)
    assert abs(found["all 1", 1.0]) < 1e-9 and abs(found["the world's", 1.0]) < 1e-9
    assert abs(found["all 1", 0.0]) > abs(found["all 1", 0.8]) > 1e-3
    found = toy.starts(world(), True)
    assert all(0.05 <= mu <= 0.95 for start in (0.1, 0.5, 0.9) for mu in found["mu", start])


def test_the_picture_shows_the_estimate_beside_the_truth(tmp_path):
    """A picture whose estimate is far from the exact slope."""
    pytest.importorskip("matplotlib")
    slope, estimate, error = toy.plot(toy.World(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size < 100_000 and abs(estimate - slope) < 4 * error


# --- the bug hunt -------------------------------------------------------------------------------------------------


def test_the_same_id_draws_the_same_five_bugs_and_another_id_others():
    """Bugs that a student cannot be graded on again; edits that overlap or move lines."""
    first, again, other = (bughunt.hunt_of(student) for student in ("ada", "ada", "emmy"))
    assert first == again and len(first[0]) == 5 and len({bug.rule.where for bug in first[0]}) == 5
    assert {bug.edit for bug in first[0]} != {bug.edit for bug in other[0]} and first[1] != other[1] and len(first[1]) > 60
    # No edit shares its place with another, and no line moves.
    for file in bughunt.FILES:
        edits = [edit for edit in (*first[1], *(bug.edit for bug in first[0])) if edit.file == file]
        text = bughunt.edited(bughunt.source(file), edits)
        assert text.count("\n") == bughunt.source(file).count("\n")
        changed = sum(a != b for a, b in zip(text.split("\n"), bughunt.source(file).split("\n")))
        assert ast.parse(text) and changed > 30


def test_every_rule_applies_and_no_bug_is_already_known():
    """A rule whose text is no longer in the code, or whose bug is published."""
    assert len(rules.RULES) >= 30 and sum(len(list(rules.variants(rule))) for rule in rules.RULES) >= 150
    known, rng = bughunt.mutants(), random.Random(1)
    for rule in rules.RULES:
        (bug,) = bughunt.choices(rule, rng)
        assert not bughunt.is_known(bug, known), rule


def command(*argv):
    return subprocess.run([sys.executable, str(HERE / "bughunt.py"), *map(str, argv)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)


@slow
def test_bugs_are_told_from_the_right_file():
    """A check of the pool that does not work, by one rule."""
    done = command("check", "--quick", "--only", "amft.py:gae (adv*")
    assert done.returncode == 0 and "1 rules, 1 bugs, 0 faults" in done.stdout, done.stdout + done.stderr


@slow
def test_every_choice_of_every_rule():
    """A rule with a choice that behaves as the right file does."""
    done = subprocess.run([sys.executable, str(HERE / "bughunt.py"), "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


PRIVATE = '''
from rules import Rule
SECRET, ALONE = "a word", True
RULES = [
    Rule("amft.py:sft_loss", "mask.sum()", ("len(mask)",), "per row"),
    Rule("amft.py:ppo_loss", "(logps - old_logps).exp()", ("(old_logps - logps).exp()",), "turned round"),
    Rule("amft.py:update_mu", "fade * evidence[0]", ("evidence[0]",), "no fading"),
    Rule("amft.py:gae", "(advantages + values) * mask", ("advantages * mask",), "no values"),
    Rule("tasks.py:Deal.grade", "value == self.target", ("value != self.target",), "wrong is right"),
]
'''
TESTS = {  # function -> a test of at most 15 lines
    "sft_loss": "import torch, amft\ndef test_mean():\n    assert amft.sft_loss(-torch.ones(2, 3), torch.ones(2, 3)) == 1",
    "ppo_loss": ("import torch, amft\ndef test_direction():\n    x = torch.zeros(1, 1, requires_grad=True)\n    one = torch.ones(1, 1)\n"
                 "    amft.ppo_loss(x, x.detach(), one, one).backward()\n    assert x.grad < 0  # more of what was good"),
    "update_mu": ("import amft\ndef test_old_evidence_fades():\n    config = amft.Config(device='cpu')\n"
                  "    assert amft.update_mu(0.5, 1.0, 1.0, [(0.0, 1.0)], (1.0, 1.0), config, 0.5)[1][0] == 0.5"),
    "gae": ("import torch, amft\ndef test_returns():\n    one = torch.ones(1, 2)\n    rewards = torch.tensor([[0.0, 3.0]])\n"
            "    assert amft.gae(rewards, one, one)[1].tolist() == [[3.0, 3.0]]"),
    "grade": ("import tasks\ndef test_24():\n    deal = tasks.Deal(('8', '4', '3', 'A'), {}, (8, 4, 3, 1), '')\n"
              "    assert deal.grade('{\"formula\": \"8*(4-1)*3\"}') == 'wrong_result'\n"
              "    assert deal.grade('{\"formula\": \"8+4*(3+1)\"}') == 'correct'"),
}


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hunt")
    (folder / "private.py").write_text(PRIVATE)
    done = command("make", "--student", "ada", "--out", folder / "ada", "--private", folder / "private.py", "--no-logs")
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder


def test_a_hunts_folder_runs_by_itself(handed_out):
    """A folder whose amft.py does not find what it imports, or finds it in the repository only."""
    assert all((handed_out / "ada" / name).exists() for name in bughunt.beside())
    words = "import amft, harness.memory; from recipes import large; print(amft.by_slices.__code__.co_filename, large.__file__)"
    done = subprocess.run([sys.executable, "-c", words], cwd=handed_out / "ada", capture_output=True, text=True,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.stdout.split() == [str(handed_out / "ada" / name) for name in ("harness/memory.py", "recipes/large.py")], done


def graded(folder, *flags):
    done = command("grade", folder / "ada", "--student", "ada", "--private", folder / "private.py", "--out", folder / "results.json", *flags)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


def test_a_right_submission_has_all_points_whichever_number_a_bug_was_given(handed_out):
    """A right test or fix that is not paid, or only under the bug's own number."""
    bugs, changes = bughunt.hunt_of("ada", handed_out / "private.py")
    for number, bug in enumerate(reversed(bugs), 1):
        name = bug.rule.where.split(".")[-1].split(":")[-1]
        whole = bughunt.edited(bughunt.source(bug.edit.file), [e for e in changes if e.file == bug.edit.file])
        line = whole.split("\n")[bug.edit.line - 1]
        (handed_out / "ada" / "answers" / f"test_bug{number}.py").write_text(TESTS[name])
        (handed_out / "ada" / "answers" / f"bug{number}.txt").write_text(
            f"file: {bug.edit.file}\nline: {bug.edit.line}\nfix: {line.strip()}  # as it should be\nsymptom: the log tells something odd about it\n")
    found = graded(handed_out)
    assert found["score"] == 15 and [test["score"] for test in found["tests"]] == [3.0] * 5, found


def test_wrong_submissions_have_none(handed_out):
    """What was handed out, filled in with nothing; then a test that fails on both files, one that passes on both, one
    that hangs, one that reads files, and a fix that mends nothing."""
    answers = handed_out / "ada" / "answers"
    bugs, _ = bughunt.hunt_of("ada", handed_out / "private.py")
    for number in range(1, 6):
        (answers / f"test_bug{number}.py").write_text("# nothing\n")
        (answers / f"bug{number}.txt").write_text(bughunt.ANSWER)
    found = bughunt.grade(handed_out / "ada", "ada", handed_out / "private.py")
    assert found["score"] == 0 and all("no test" in test["output"] for test in found["tests"])
    words = ("def test():\n    assert False", "def test():\n    assert True", "def test():\n    while True:\n        pass",
             "import os\ndef test():\n    assert os", "x = 1\n" * 16 + "def test():\n    assert False")
    for number, text in enumerate(words, 1):
        (answers / f"test_bug{number}.py").write_text(text)
    bug = next(bug for bug in bugs if "gae" in bug.rule.where)
    (answers / "bug1.txt").write_text(f"file: amft.py\nline: {bug.edit.line}\nfix: return advantages, values * mask\nsymptom: one two three four five six\n")
    found = bughunt.grade(handed_out / "ada", "ada", handed_out / "private.py", seconds=3)
    assert found["score"] == 0, found
    for test, said in zip(found["tests"], ("does not pass on the right", "passes on the right file, and on", "timed out", "may not", "at most 15")):
        assert said in test["output"], test


TELLTALE = [  # what could tell two files apart without knowing a bug
    "assert '{0.__code__.co_names}'.format(amft.gae) == 'x'", "assert ('{0._' + '_code_' + '_}').format(amft.gae)",
    "assert amft.gae.__code__.co_code", "assert f'{amft.gae.__code__}'", "assert pytest.importorskip('inspect').getsource(amft.gae)",
    "assert numpy.fromfile('amft.py', 'uint8').sum() == 3", "assert numpy.loadtxt('amft.py')", "assert random._os.listdir()",
    "with pytest.raises(ValueError) as e:\n        amft.gae()\n    assert e.traceback[0].frame", "assert torch.load('amft.py')",
    "assert functools.update_wrapper(types.SimpleNamespace(), amft.gae)", "assert amft.sys.modules", "assert json.codecs.open('amft.py')",
    "def f(*, a=amft.gae): pass\n    assert f.co_names", "assert types.FunctionType(amft.gae)", "assert amft.Path('amft.py')",
    "assert itertools.sys", "assert torch.package", "assert getattr(amft, 'gae')", "assert numpy.lib.npyio", "assert dataclasses.inspect",
]


@pytest.mark.parametrize("line", TELLTALE)
def test_a_test_cannot_look_at_the_code(line):
    """A text that compares a function's own code scored three bugs of five without knowing them."""
    text = f"import amft, tasks, torch, numpy, pytest, random, json, itertools, functools, types, dataclasses\ndef test():\n    {line}\n"
    assert "may not" in bughunt.refused(text, 15), line


def test_a_leaderboard_entry_sets_the_algorithm_alone(tmp_path):
    """An entry with a task, a start or a folder of its own; the shipped file."""
    most, entries = leaderboard.read(HERE / "leaderboard.toml")
    assert most == 8000 and len(entries) >= 2 and entries[0]["flags"] == ""
    for flags in ("--model x", "--out /tmp/x", "--task virl", "--data x.py", "steps 3", "--steps", "--lr 1;2", "--device cuda", "--seed 3"):
        text = f'responses = 1\n[[entry]]\nname = "a"\nflags = "{flags}"\nseed = 1\nclaim = 0.5\nat = 0.1\n'
        (tmp_path / "l.toml").write_text(text)
        with pytest.raises(ValueError, match="no flag"):
            leaderboard.read(tmp_path / "l.toml")


@slow
def test_a_leaderboard_entry_is_run_again():
    """A claim that is taken at its word, or more responses than are allowed."""
    entry = dict(name="a", flags="--steps 2 --prompts 2 --samples 2 --sft-batch 4 --demos 9 --warmup 0", seed=1, claim=0.999, at=0.1)
    success, temperature, responses, wrong = leaderboard.check(entry, 99, eval_n=5)
    assert temperature in leaderboard.TEMPERATURES and responses >= 8 and wrong == "claims 0.999" and 0 <= success < 1
    assert "at most 1" in leaderboard.check({**entry, "claim": success}, 1, eval_n=5)[3]


HONEST = [
    "model, tokenizer = amft.load_policy(amft.Config(device='cpu'), tasks.GeneralPoints(), amft)\n    assert model.config.vocab_size > 3",
    "torch.manual_seed(0)\n    assert torch.allclose(amft.gae(*[torch.ones(1, 2)] * 3)[0], torch.zeros(1, 2))",
    "rng = random.Random(3)\n    assert numpy.mean([rng.random() for _ in range(9)]) == pytest.approx(0.5, abs=0.4)",
    "amft.rollout = lambda *a, **k: None\n    assert amft.rollout() is None", "with pytest.raises(ValueError):\n        tasks.parse('1+')",
    "class Fake(torch.nn.Module):\n        def __init__(self):\n            super().__init__()\n            self.seen = 3\n    assert Fake().seen == 3",
    "c = types.SimpleNamespace(eta_mu=1.0, odd=2)\n    assert c.odd == 2 and dataclasses.replace(amft.Config(), mu=0.1).mu == 0.1",
    "x = torch.zeros(3, requires_grad=True)\n    x.sum().backward()\n    torch.testing.assert_close(x.grad, torch.ones(3))",
]


@pytest.mark.parametrize("line", HONEST)
def test_honest_tests_are_not_refused(line):
    text = f"import amft, tasks, torch, numpy, pytest, random, types, dataclasses\ndef test():\n    {line}\n"
    assert bughunt.refused(text, 15) is None, bughunt.refused(text, 15)


def test_a_folder_without_logs_speaks_of_none(handed_out):
    """A README that describes logs which --no-logs does not make."""
    text = (handed_out / "ada" / "README.md").read_text()
    assert "logs" not in text and not (handed_out / "ada" / "logs").exists()
    assert "logs/right1.jsonl" in bughunt.ABOUT.format(student="ada", logs=bughunt.LOGS)


def test_git_does_not_see_what_is_secret():
    """A public fork that publishes the grader's secret, or an instructor's own bugs."""
    for name in ("course/gradescope/secret", "course/private.py"):
        assert subprocess.run(["git", "check-ignore", "-q", name], cwd=HERE.parent).returncode in (0, 128), name


def test_every_command_in_the_texts_names_a_file_and_a_flag_that_are_there():
    """A text that names a question, a file or a folder that students do not have."""
    for name in ("written.md", "answers.md", "handout.md"):
        text = (HERE / name).read_text()
        for question in re.findall(r"python (?:course/)?toy\.py ([a-z]+)", text):
            assert question in toy.QUESTIONS, (name, question)
    for question in toy.QUESTIONS:
        assert f"python toy.py {question}" in (HERE / "written.md").read_text()
    for name in ("written.md", "handout.md"):  # what students read names no folder that they do not have
        text = (HERE / name).read_text()
        assert "course/" not in text and set(re.findall(r"python ([\w/]+\.py)", text)) <= {"toy.py", "amft.py", "check.py"}
