"""Tests of recipes/problems.py, a reader's own problems: --data and --data-test, in JSON lines.

    python -m pytest -q recipes/test_problems.py
"""

import importlib
import itertools
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
amft = importlib.import_module("amft")
tasks = importlib.import_module("tasks")
loading = importlib.import_module("harness.loading")
problems = importlib.import_module("recipes.problems")
ROLES = ("train", "val", "heldout")


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", ["amft.py"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a small random Llama of 512 positions that reads bytes: it knows every text."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    return str(folder)


def write(path, rows, start="", end="\n"):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes((start + end.join(lines) + end).encode())
    return str(path)


def sums(n, start=0):
    """n rows that differ."""
    rows = []
    for i in range(start, start + n):
        j = i % 7
        rows.append(dict(
            prompt=f"What is {i} plus {j}?", solution=f"{i} + {j} = {i + j}", answer=str(i + j)))
    return rows


def example():
    """The rows of recipes/example.jsonl."""
    return [json.loads(line) for line in (HERE / "example.jsonl").read_text().splitlines()]


def brief(value):
    """Of a parameter, for the test's name."""
    return ascii(value)[:40]


def sources(drawn):
    return [problem.source for problem in drawn]


def fails(capsys, *argv):
    """The one line with which amft.py refuses these words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as info:
        amft.main(["--task", "math", "--device", "cpu", *map(str, argv)])
    error = capsys.readouterr().err.strip().split("\r")[-1]  # what progress bars left
    assert info.value.code == 2, error
    assert len(error.splitlines()) == 1 and error.startswith("amft.py: "), error
    return error


# --- A run on a file ---

def test_the_example_runs_as_it_is(tmp_path):
    """recipes/example.jsonl, with the policy that lies here: a file that cannot be trained on."""
    rows = example()
    assert len(rows) == 20 and all(set(row) == {"prompt", "solution", "answer"} for row in rows)
    out = tmp_path / "run"
    amft.main(["--task", "math", "--data", str(HERE / "example.jsonl"), "--smoke", "--steps", "4",
               "--device", "cpu", "--out", str(out)])
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["kind"] == "final"
    last = {row["split"]: row for row in log if row["kind"] == "eval" and row["step"] == 4}
    assert set(last) == {"val", "id", "heldout"}
    assert sum(row["n"] for row in last.values()) == 20
    assert all(row["success"] > 0.3 for row in last.values())


def test_a_file_falls_into_disjoint_roles(tmp_path):
    """A problem that is left out, that is in two roles, or shares that are not as asked."""
    rng = random.Random(0)
    chains = [tasks.chain(rng, 2) for _ in range(400)]
    rows = [dict(prompt=p.prompt, solution=p.solution, answer=p.answer) for p in chains]
    rows[0]["solution"] = rows[0]["solution"].split("Answer")[0]  # as GSM8K's: a box is added
    file = write(tmp_path / "own.jsonl", rows, end="\n\n")
    task = problems.OwnProblems(data=file, heldout=0.25)
    prompts = {}
    for split in ["train", *task.splits]:
        prompts[split] = {task.sample(split, rng).prompt for _ in range(6000)}
    assert prompts["train"] == prompts["id"]
    assert set.union(*prompts.values()) == {row["prompt"] for row in rows}
    for a, b in itertools.combinations(ROLES, 2):
        assert not prompts[a] & prompts[b]
    assert 65 <= len(prompts["heldout"]) <= 135 and 65 <= len(prompts["val"]) <= 135


def test_a_file_is_gone_through_without_replacement(tmp_path):
    """Problems that an epoch repeats or leaves out, or epochs in one order."""
    task = problems.OwnProblems(data=write(tmp_path / "own.jsonl", sums(500)))
    n = len(task.problems["train"])
    few = sources(task.training(n // 2, random.Random(0)))
    assert len(set(few)) == n // 2
    many = sources(task.training(2 * n + 9, random.Random(0)))
    assert len(many) == 2 * n + 9
    for epoch in (many[:n], many[n:2 * n]):
        assert len(set(epoch)) == n
    assert many[:n] != many[n:2 * n] and many[:n // 2] == few
    assert many[:n] != sources(task.training(n, random.Random(1)))


def test_near_duplicates_have_one_role(tmp_path):
    """A problem in other case, spaces or composed characters, trained on and asked for as new."""
    rows = sums(150)
    twins = []
    for i, row in enumerate(rows):
        shout = row["prompt"].upper().replace(" ", "  ")
        spaced = "  " + row["prompt"].replace(" ", "\u00a0")
        twins.append(dict(row, prompt=shout if i % 2 else spaced))
    cafes = [dict(rows[0], prompt=text) for text in
             ("Caf\u00e9, how many?", "Cafe\u0301, how  many?")]
    task = problems.OwnProblems(data=write(tmp_path / "own.jsonl", rows + twins + cafes))
    roles = {}
    for role, own in task.problems.items():
        for problem in own:
            line = int(problem.source.rsplit(" ")[-1])
            roles.setdefault(line - 1, set()).add(role)
    assert all(roles[i] == roles[i + 150] for i in range(150)) and roles[300] == roles[301]
    assert set(roles) == set(range(302)) and all(len(own) == 1 for own in roles.values())
    units = {problem.unit for own in task.problems.values() for problem in own}
    assert len(units) == 151


def test_a_file_that_is_only_evaluated(tmp_path, capsys):
    """A problem of --data-test that is trained on, or that evaluations leave out or draw anew."""
    rows = sums(100)
    rows[90]["solution"] = "long " * 500 + rows[90]["solution"]  # not a demonstration
    data = write(tmp_path / "own.jsonl", rows[:70])
    rows[65]["prompt"] = rows[65]["prompt"].upper()
    test = write(tmp_path / "test.jsonl", rows[60:])
    task = problems.OwnProblems(data=data, data_test=test)
    assert "10 of 70 problems" in capsys.readouterr().err
    assert list(task.splits) == ["val", "id", "heldout", "test"]
    units = {role: {problem.unit for problem in own} for role, own in task.problems.items()}
    assert len(units["test"]) == 40
    assert not units["test"] & (units["train"] | units["val"] | units["heldout"])
    episodes = task.episodes("test", 400)
    assert len(episodes) == 40 and {episode.unit for episode in episodes} == units["test"]
    assert sources(task.episodes("test", 7)) == sources(task.episodes("test", 7))
    assert all(problem.exam for problem in task.problems["test"])
    assert not any(problem.exam for problem in task.problems["train"])


def test_a_file_that_is_only_evaluated_alone(tmp_path, capsys):
    """--data-test without --data that has no training problems, or that another task takes."""
    test = write(tmp_path / "test.jsonl", sums(40))
    task = problems.OwnProblems(data_test=test)
    assert "test" in task.splits and task.sample("train", random.Random(0)).source == ""
    for flag in ("--data", "--data-test"):
        error = fails(capsys, "--task", "gp", flag, test, "--out", tmp_path / "run")
        assert f"{flag} {test}: only --task math takes a file" in error


# --- What a line may hold ---

@pytest.mark.parametrize("start, end", [("", "\n"), ("\ufeff", "\n"), ("", "\r\n")])
def test_lines_end_at_newlines_alone(tmp_path, start, end):
    """A line cut where JSON goes on, a mark or a return that is taken for text, a wrong number."""
    rows = sums(60)
    rows[3]["solution"] += " \u2028and \u0085so \u000b on"
    read = problems.read_problems(write(tmp_path / "own.jsonl", rows, start, end))
    assert len(read) == 60 and read[3].solution.startswith(rows[3]["solution"])
    assert [problem.answer for problem in read] == [row["answer"] for row in rows]
    assert read[7].source.endswith("line 8")


def test_prompts_ask_for_the_form_of_the_answer(tmp_path):
    """A solution in another form than its prompt asks for, or a prompt that asks for none."""
    row = dict(prompt="What is 6 times 7?", solution="6 * 7 = 42\n#### 42", answer="42")
    box = dict(row, prompt="What is 6 times 7? Put it in \\boxed{}.", solution="It is \\boxed{42}")
    end = dict(row, prompt="What is 6 times 7? End with #### and the number.")
    bare = dict(row, prompt="End with #### and 6 times 7", solution="6 * 7 = 42")
    file = write(tmp_path / "own.jsonl", [row, box, end, bare])
    asked, boxed, hashes, unsaid = problems.read_problems(file)
    assert asked.prompt == f"What is 6 times 7? {tasks.REQUEST}"
    assert asked.solution == row["solution"] + "\nAnswer: \\boxed{42}"
    assert (boxed.prompt, boxed.solution) == (box["prompt"], box["solution"])
    assert (hashes.prompt, hashes.solution) == (end["prompt"], row["solution"])
    assert unsaid.grade(unsaid.solution) == "correct"


@pytest.mark.parametrize("response, outcome", [
    ("6 * 7 = 42\n#### 42", "correct"),
    ("#### 42", "correct"),
    ("so #### 42\n ", "correct"),
    ("#### 42.0", "correct"),
    ("#### 41", "wrong_answer"),
    ("#### 42\nor so", "no_answer"),
    ("#### Step\n42", "no_answer"),
    ("### 42", "no_answer"),
    ("#### 42 apples", "no_answer"),
    ("\\boxed{41}\n#### 42", "wrong_answer"),
    ("#### 41 #### 42", "correct"),
    ("#### 9" + "9" * 10 ** 6, "no_answer"),
    ("####" * 10 ** 6, "no_answer"),
    (" " * 10 ** 6 + "#### 42", "no_answer"),
    ("#### 6*7", "no_answer"),
    ("####", "no_answer"),
], ids=brief)
def test_an_answer_after_four_hashes(response, outcome):
    """An answer that is read off another place than the end, or another text than a number."""
    assert tasks.Problem("", "", "42").grade(response) == outcome


# --- What is refused, with the file, the line and the fault ---

GOOD = dict(prompt="What is 6 times 7?", solution="6 * 7 = 42", answer="42")


@pytest.mark.parametrize("line, says", [
    ("{", "is not JSON"),
    ("[" * 10 ** 5, "is not JSON"),
    (json.dumps(GOOD)[:-1] + ', "x": NaN}', "is not JSON"),
    ("[1]", '"prompt" must be a text'),
    ('{"prompt": "x"}', '"solution" must be a text'),
    (json.dumps(dict(GOOD, answer=7)), '"answer" must be a text'),
    (json.dumps(dict(GOOD, answer=" ")), '"answer" must be a text that is not empty'),
    (json.dumps(dict(GOOD, prompt="<image> 6 * 7?")), "<image> stands for a picture"),
    (json.dumps(dict(GOOD, solution="<image> 42")), "<image> stands for a picture"),
    (json.dumps(dict(GOOD, answer="4{2")), '"answer" cannot stand in a box'),
    (json.dumps(dict(GOOD, solution="6 * 7 = 41\n#### 41")),
     '"solution" ends in another answer than "answer", 42'),
    (json.dumps(dict(GOOD, solution="\\boxed{41}")),
     '"solution" ends in another answer than "answer", 42'),
    (json.dumps(dict(GOOD, solution="\\boxed{41}", answer="4\n2")),
     '"solution" ends in another answer than "answer", 4 2'),
    (json.dumps(dict(GOOD, prompt="\ud83d?")), '"prompt" holds half a character'),
    (json.dumps(dict(GOOD, solution="\udc00")), '"solution" holds half a character'),
    (json.dumps(dict(GOOD, answer="4\ud83d")), '"answer" holds half a character'),
], ids=brief)
@pytest.mark.parametrize("flag", ["--data", "--data-test"])
def test_a_bad_line_is_named(flag, line, says, tmp_path, capsys):
    """A fault that passes, ends in a traceback, or is told without its file and line."""
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    error = fails(capsys, flag, file, "--out", tmp_path / "run")
    assert f"{file}, line 2: {says}" in error and not (tmp_path / "run").exists()


def test_a_whole_character_of_two_halves_is_taken(tmp_path):
    """A text refused for a character that JSON writes as two surrogates."""
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(dict(GOOD, prompt="\U0001f600?")) + "\n")
    assert "\\ud83d" in file.read_text()
    assert problems.read_problems(file)[0].prompt.startswith("\U0001f600?")


@pytest.mark.parametrize("content, says", [
    (None, "cannot be read"),
    (b"\xed\xa0\xbd\n", "cannot be read"),  # no UTF-8
    (b"", "too few problems"),
    (json.dumps(GOOD).encode(), "too few problems"),
])
def test_a_bad_file_is_named(content, says, tmp_path, capsys):
    """A file that is missing, no text, or too small, and a traceback instead of its name."""
    file = tmp_path / "own.jsonl"
    if content is not None:
        file.write_bytes(content)
    assert f"{file}: {says}" in fails(capsys, "--data", file, "--out", tmp_path / "run")
    if content == b"":
        assert f"{file}: holds no problem" in fails(capsys, "--data-test", file, "--out", tmp_path / "run")


def test_every_length_is_checked(checkpoint, tmp_path, capsys):
    """A solution or a prompt in the middle of a file that is longer than responses or the model."""
    rows = sums(60)
    for i in (17, 40):
        rows[i]["solution"] = "so " * i + rows[i]["solution"]
    file = write(tmp_path / "own.jsonl", rows)
    lengths = [len(p.solution.encode()) + 1 for p in problems.read_problems(file)]
    usual = sorted(lengths)[-3]
    assert sorted(lengths)[-2] > usual

    def refused(most):
        return fails(capsys, "--smoke", "--model", checkpoint, "--data", file,
                     "--max-new-tokens", most, "--out", tmp_path / "run")
    error = refused(usual)
    assert "2 of 60 demonstrations are longer" in error
    assert "line 18;" in error or "line 41;" in error
    assert f"the longest has {max(lengths)} tokens" in error
    assert "the model has room for 512" in refused(500)
    rows[5]["prompt"] = "What? " * 400
    write(tmp_path / "own.jsonl", rows)
    error = refused(max(lengths))
    assert "line 6; the model has room for 512" in error


def test_a_text_with_unknown_parts_is_refused(tmp_path, capsys):
    """A word of a later line that the tokenizer of the policy here does not know, read as <unk>."""
    rows = example()
    rows[11]["prompt"] = rows[11]["prompt"].replace("How many", "How many blue")
    file = write(tmp_path / "own.jsonl", rows)
    assert "line 12" in fails(capsys, "--data", file, "--out", tmp_path / "run")


def test_the_longest_solution_need_not_fit_where_it_is_only_evaluated(checkpoint, tmp_path):
    """A file refused for a long solution that is no demonstration: answers may be shorter."""
    rows = sums(40)
    rows[39]["solution"] = "long " * 60 + rows[39]["solution"]
    task = problems.OwnProblems(data_test=write(tmp_path / "test.jsonl", rows))
    config = amft.Config(device="cpu", model=checkpoint, task="math", max_new_tokens=120)
    loading.load_policy(config, task, amft)


# --- reasoning-gym --------------------------------------------------------------------------------


def test_reasoning_gyms_verifiers_judge(monkeypatch):
    """A right answer in another form that is lost, a copied question that counts, text that is run."""
    pytest.importorskip("reasoning_gym", reason="wants the package reasoning-gym")
    from recipes import gym
    monkeypatch.setattr(gym, "SIZE", 20)
    gym.dataset.cache_clear()
    for name in gym.KINDS:
        monkeypatch.setattr(gym, "NAMES", [name])
        rows = gym.problems()
        assert rows == gym.problems() and len(rows) == 20
        for row in rows:
            assert gym.grade(row, row["solution"]), row
            assert not gym.grade(row, row["prompt"])
            assert not gym.grade(row, "Answer: \\boxed{__import__('os').getcwd()}")
            assert not gym.grade(row, "Answer: \\boxed{9**9**9**9}")
    fraction = dict(name="fraction_simplification", index=0)
    data = gym.dataset("fraction_simplification")[0]["metadata"]
    assert not gym.grade(fraction, f"\\boxed{{{data['numerator']}/{data['denominator']}}}")
    countdown = dict(name="countdown", index=0)
    formula = gym.dataset("countdown")[0]["answer"]
    assert gym.grade(countdown, f"\\boxed{{({formula})}}")
    assert not gym.grade(countdown, f"\\boxed{{{gym.dataset('countdown')[0]['metadata']['target']}}}")
    gym.dataset.cache_clear()
    monkeypatch.setattr(gym, "NAMES", ["chain_sum", "gsm_symbolic"])
    task = problems.OwnProblems(data=str(HERE / "gym.py"))
    episode = task.sample("val", random.Random(0))
    assert episode.demonstration()[-1].response == episode.expert


def test_what_reasoning_gym_needs_is_named(monkeypatch):
    """A traceback where the package is missing."""
    from recipes import gym
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    gym.dataset.cache_clear()
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        gym.problems()
