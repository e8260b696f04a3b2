"""Tests of recipes/answers.py, how a reader's answers are compared, and of what a file of own
problems may hold and is refused for.

    python -m pytest -q recipes/test_answers.py    # the rows of algebra need math-verify
"""

import importlib
import itertools
import json
import pickle
import random
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
answers = importlib.import_module("recipes.answers")
problems = importlib.import_module("recipes.problems")
tasks = importlib.import_module("tasks")
needs_math_verify = pytest.mark.skipif(
    not answers.ALGEBRA.here(), reason="math-verify is not installed (pip install math-verify)")


def brief(value):
    """Of a parameter, for the test's name."""
    return ascii(value)[:40]


@pytest.fixture
def by_spelling(monkeypatch):
    """As if math-verify were not installed."""
    monkeypatch.setattr(answers.Algebra, "here", lambda self: False)
    answers.same_in_any_spelling.cache_clear()
    yield
    answers.same_in_any_spelling.cache_clear()


@pytest.fixture
def algebra(monkeypatch):
    """A fresh process for math-verify, and none of what others have found."""
    answers.same_in_any_spelling.cache_clear()
    fresh = answers.Algebra()
    monkeypatch.setattr(answers, "ALGEBRA", fresh)
    yield fresh
    fresh.close()
    answers.same_in_any_spelling.cache_clear()


# --- Right answers, as people write them ---

LISTED = [  # (reference, answer), of the reports: each of them was marked wrong
    ("1/2", r"\tfrac{1}{2}"),
    ("1/2", r"\frac12"),
    ("-1/2", r"\frac{-1}{2}"),
    ("3/2", r"1\frac{1}{2}"),
    ("1/2", "(1/2)"),
    ("1/2", ".5"),
    ("70000", "70{,}000"),
    ("70000", r"7\times10^4"),
    ("18", "18."),
    ("18", r"\$18"),
    ("18%", r"18\%"),
    ("18", r"\text{18}"),
    ("18", "{18}"),
    ("18", "\n18\n"),
    ("-3", "\u22123"),
    ("-3", "- 3"),
    ("(2, 3)", "(2,3)"),
    ("x^2 + 1", "x^2+1"),
    ("Evelyn", r"\text{Evelyn}"),
    ("A", "(A)"),
]
ALIKE = [
    ("1/2", "0.50"),
    ("1/2", r"\dfrac{1}{2}"),
    ("-1/2", r"-\frac{1}{2}"),
    ("-1/2", "-(1/2)"),
    ("3/2", "1 1/2"),
    ("3/2", r"1 \tfrac12"),
    ("-3/2", r"-1\frac12"),
    ("1000", "1,000"),
    ("70000", r"70\,000"),
    ("70000", r"70,\!000"),
    ("1234567", "1{,}234{,}567"),
    ("70000", r"7 \cdot 10^{4}"),
    ("0.07", "7 \u00d7 10^{-2}"),
    ("-70000", "-7 * 10^4"),
    ("18", "$18$"),
    ("-18", r"-\$18"),
    ("-18", "$-$18"),
    ("x^2 + 1", "x$^2$ + $1$"),
    ("(2, 3)", "(2$,$ 3)"),
    ("18", r"\(18\)"),
    ("18", r"x = 18"),
    ("x = 18", "18"),
    ("18", r"\mathbf{18.0}"),
    ("+3", "3"),
    ("18 cm", r"18\text{ cm}"),
    ("18 cm", r"18\,\mathrm{cm}"),
    ("18 cm", "18.0cm"),
    ("18 cm^2", "18 cm\u00b2"),
    ("18%", "18 percent"),
    ("18%", "18.0 \\%"),
    ("45\u00b0", r"45^\circ"),
    ("45\u00b0", r"45^{\circ}"),
    ("(1/2, 3)", r"\left(\frac12, 3.0\right)"),
    ("(1, 234)", "(1,234)"),
    ("[1/2, \u221e)", r"\left[0.5,\infty\right)"),
    (r"(-\infty,1)\cup(2,\infty)", "(\u2212\u221e, 1) U (2, \u221e)"),
    (r"\{1, 2, 10\}", r"\left\{10, 1, \frac{4}{2}\right\}"),
    ("1, 2", "1,2"),
    ("((1, 2), 3)", "((1.0,2),3)"),
    (r"\frac{\pi}{2}", r"\pi/2"),
    ("x/2", r"\tfrac x2"),
    (r"\sqrt{2}", r"\sqrt2"),
    ("x^{10}", "x^10"),
    ("y = 2x + 1", "y=2x+1"),
    ("2x + 1 = y", "y = 2x+1"),
    ("x < 2", "2>x"),
    (r"1 \leq x < 5", "5 > x >= 1"),
    ("B", r"\textbf{(B)}"),
    ("yes", "Yes"),
    ("a long answer", "a  long\nanswer."),
    ("1011_2", "1011_{2}"),
    (r"\mathbb R", r"\mathbb{R}"),
]


@pytest.mark.parametrize("reference, answer", LISTED)
def test_an_answer_of_the_reports_is_right(reference, answer, by_spelling):
    """A right answer in a usual spelling marked wrong, even without math-verify."""
    problem = problems.OwnProblem("?", "", reference)
    assert problem.grade(f"So it is \\boxed{{{answer}}}.") == "correct"
    assert answers.same(answer, reference)


@pytest.mark.parametrize("reference, answer", ALIKE)
def test_a_usual_spelling_is_right(reference, answer, by_spelling):
    """A further spelling of a right answer marked wrong, or a comparison that is not symmetric."""
    assert answers.same(reference, answer) and answers.same(answer, reference)


STATED = [  # (response, what it states)
    ("so #### 18", "18"),
    ("#### 18\nThat is all.", "18"),
    ("#### 18.", "18."),
    ("#### 17\n#### 18\n", "18"),
    ("#### $1{,}800$\nDone", "$1{,}800$"),
    ("#### Evelyn", "Evelyn"),
    ("#### Step 2\nWe add.", None),
    ("#### 18 apples\nor so", None),
    ("####", ""),
    ("#### " + "9" * 300, None),
    (r"\boxed {18}", "18"),
    (r"\boxed 18", "18"),
    (r"\boxed 18.", "18"),
    (r"$\boxed 1{,}8$", "1"),
    (r"\boxed -3 and so", "-3"),
    (r"\boxed" + "\n{18}", "18"),
    (r"\fbox{18}", "18"),
    (r"\boxed{17} or \fbox{18}", "18"),
    (r"\fbox{17} or \boxed{18}", "18"),
    (r"\boxed{18} #### 17", "18"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{18", None),
    (r"\boxed{18\}", None),
    (r"\boxedx", None),
    (r"\boxed", None),
    (r"boxed{18}", None),
    ("18", None),
]


@pytest.mark.parametrize("response, answer", STATED, ids=brief)
def test_where_an_answer_is_stated(response, answer):
    """A box or a line of #### that is not found, or a heading that is taken for one."""
    assert answers.stated(response) == answer


@needs_math_verify
@pytest.mark.parametrize("reference, answer", [
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"2\sqrt[3]{2}", r"\sqrt[3]{16}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt3}"),
    (r"\frac{3\pi}{4}", r"0.75\pi"),
    (r"3\sqrt{2} - 1", r"-1+3\cdot\sqrt2"),
    (r"1+\sqrt{2}", r"\sqrt{3+2\sqrt{2}}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x(y+1)", "xy+x"),
    ("x/2", "0.5x"),
    ("y = 2x + 1", "y = 1 + 2x"),
    (r"(2\sqrt{2}, 2)", r"(\sqrt8,2)"),
    (r"(-\infty, 2\sqrt{2}]", r"(-\infty,\sqrt8]"),
    (r"2\ln 2", r"\ln 4"),
    ("1-i", "1+i-2i"),
    (r"x\sin^2 x", r"x - x\cos^2 x"),
])
def test_what_algebra_finds_equal_is_right(reference, answer):
    """An expression in another form marked wrong where math-verify is installed."""
    assert answers.same(reference, answer)


# --- Wrong answers ---

DIFFERENT = [
    ("1/3", "0.3333333333"),
    (r"\frac{x}{3}", "0.333333333x"),
    (r"\pi", "3.141592653589793"),
    (r"\pi + 1", "4.141592653589793 + 0"),
    ("18 cm", "18 m"),
    ("18 m", "18 M"),
    ("18", "18 cm"),
    ("18 cm", "18"),
    ("5", "5%"),
    ("5%", "5"),
    ("5%", "0.05"),
    ("5 mg", "5 gm"),
    ("5", "5 thousand"),
    ("1011_2", "1011"),
    ("1011", "1011_2"),
    ("1011_2", "11"),
    ("11", "1011_2"),
    ("1011_2", "1011_3"),
    ("42", "6*7"),
    ("42", "6 * 7"),
    ("42", "40+2"),
    ("2", r"\sqrt{4}"),
    ("8", "2^3"),
    ("12", "1 2"),
    ("123", "12 3"),
    ("18", "1$8"),
    ("18", r"1\$8"),
    ("3/2", r"1 + \frac12"),
    ("5/2", r"1\frac{3}{2}"),
    ("18", "-18"),
    ("18", "18.5"),
    ("18", "17, 18"),
    ("18", "17 or 18"),
    ("18", "18 or 17"),
    ("18", "x=17=18"),
    ("1234", "(1, 234)"),
    ("1234", "1, 234"),
    ("1,000", "1.000"),
    ("1000", "(1,000)"),
    ("2.5", "2,5"),
    ("(1, 2)", r"\{1, 2\}"),
    ("(1, 2)", "[1, 2]"),
    ("(1, 2)", "(2, 1)"),
    ("1, 2", "2, 1"),
    ("(1, 2)", "(1, 2, 2)"),
    (r"\{1, 2\}", r"\{1, 2, 2\}"),
    ("((1, 2), 3)", "(1, (2, 3))"),
    (r"(1,2)\cup(3,4)", r"(1,2)\cup[3,4)"),
    ("x < 2", "x > 2"),
    ("x < 2", r"x \le 2"),
    ("x = 5", "y = 5"),
    ("x - 1 = y", "y - 1 = x"),
    ("A", "B"),
    ("A", "a"),
    ("A + 1", "a + 1"),
    ("aA^2", "Aa^2"),
    ("listen", "silent"),
    ("Evelyn", "Eve lyn"),
    ("not 5", "5 not"),
    ("x^2", "x2"),
    ("x^{10}", "x^{1}0"),
    ("x^2", "x_2"),
    (r"\frac{x+1}{2}", r"x+\frac12"),
    (r"\sqrt{2}x", r"\sqrt{2x}"),
    (r"\sqrt[3]{8}x", r"\sqrt[3]{8x}"),
    (r"\binom{12}{3}", r"\binom{1}{23}"),
    (r"\overline{AB}C", r"\overline{A}BC"),
    (r"\ln 10", r"\log 10"),
    (r"1/2x", r"\frac{1}{2}"),
    ("x + (10^{-20})^{20}", "x"),
    ("x + 9^{99}", "x + 9^{98}"),
    ("1/2", r"\frac{1}{0}"),
    ("1/2", r"\frac12\frac12"),
    ("18", ""),
    ("18", "."),
    ("18", "{18"),
    ("18", "18}{"),
]


@pytest.mark.parametrize("reference, answer", DIFFERENT)
def test_a_wrong_answer_stays_wrong(reference, answer, by_spelling):
    """A wrong answer marked right: another value, unit, order or bracket, or a sum."""
    assert not answers.same(reference, answer)


@needs_math_verify
@pytest.mark.parametrize("reference, answer", DIFFERENT)
def test_algebra_does_not_make_it_right(reference, answer):
    """A wrong answer that math-verify alone would take, as it rounds and drops units and cases."""
    assert not answers.same(reference, answer)


def spellings(value):
    """A number as people write it, some ways."""
    sign = "-" if value < 0 else ""
    top, bottom = abs(value.numerator), value.denominator
    yield f"{sign}\\frac{{{top}}}{{{bottom}}}"
    yield f"\\dfrac{{{sign}{top * 3}}}{{{bottom * 3}}}"
    yield f"{sign} {top}/{bottom}"
    yield f"$({sign}{top} / {bottom})$"
    if top > bottom > 1:
        yield f"{sign}{top // bottom}\\tfrac{{{top % bottom}}}{{{bottom}}}"
        yield f"{sign}{top // bottom} {top % bottom}/{bottom}"
    if 1000 % bottom == 0:
        whole, rest = divmod(top * 1000 // bottom, 1000)
        yield f"\\text{{{sign}{whole:,}.{rest:03}}}"
        yield f"{sign}{whole}.{rest:03}".replace("-", "\u2212")
        yield f"{sign}{top * 1000 // bottom} \\times 10^{{-3}}"


def test_numbers_are_equal_where_their_values_are(by_spelling):
    """Any two spellings whose verdict is not that of the fractions that they were made of."""
    rng = random.Random(0)
    values = [Fraction(rng.randint(-60, 60) * rng.choice((1, 1, 1001)), rng.randint(1, 12))
              for _ in range(30)]
    written = [(value, text) for value in values for text in spellings(value)]
    right = 0
    for (value, text), (other, twin) in itertools.product(written, written[::5]):
        right += value == other
        assert answers.same(text, twin) == (value == other), (text, twin)
    assert right > 100


# --- Hostile texts ---

@pytest.mark.parametrize("text", [
    "{" * 1000,
    "}" * 1000,
    "{" * 500 + "}" * 500,
    "(" * 500 + "18" + ")" * 499,
    "((" * 200 + "1,2" + "),3)" * 200,
    "\\frac" * 200,
    "\\frac1" * 160,
    "\\sqrt[" * 160,
    "^" * 1000,
    "x^" * 500,
    "{,}" * 333,
    "1," * 500,
    ("1," * 500)[:-1],
    "1 " * 500,
    "\\" * 999,
    "\\text{" * 160,
    "-" * 1000,
    "=" * 1000,
    "<>" * 500,
    "\\{" * 500,
    "$" * 1000,
    "9" * 1000,
    "9" * 1000 + "%",
    "1/" * 500,
    "\u2212" * 1000,
    "\\cup" * 250,
    "\\frac{1" + ",000" * 18 + "}{3}",
    "\\frac{1}{3" + ",000" * 18 + "}",
    "1 1" + ",000" * 18 + "/3",
    "9" * 20 + "\\times10^99",
    "\u0663/\u00b2",
    "\u00bd",
    "\\sqrt[" * 160 + "]" * 160,
    "a" * 999 + "%",
    " " * 999,
], ids=brief)
def test_a_hostile_answer_is_wrong_at_once(text, by_spelling):
    """A text that takes seconds, overflows the stack, raises, or is taken for a number."""
    start = time.process_time()
    for reference in ("18", "(1, 2)", r"\frac{\pi}{2}", "x = 5", text + "x"):
        assert not answers.same(reference, text)
        assert not answers.same(text, reference)
    assert answers.same(text, text)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("text", [
    "\\boxed" * 10 ** 6,
    "\\boxed{" * 10 ** 6,
    "{" * 10 ** 6 + "\\boxed{18}",
    "####" * 10 ** 6,
    "#" * 10 ** 6 + " " * 10 ** 6,
    "#### " + " " * 19000 + "\n",
    "\\boxed" + " " * 19000,
    "\\boxed{" + "{}" * 9000,
    "\\boxed{" + "x" * 1001 + "}",
    "####\n" * 3900 + "x",
], ids=brief)
def test_a_hostile_response_states_nothing_at_once(text):
    """A response of a million characters, or of half boxes, that takes long or states an answer."""
    start = time.process_time()
    assert not answers.stated(text)
    assert time.process_time() - start < 0.5


def test_the_time_grows_with_the_length(by_spelling):
    """A comparison that takes much more than ten times as long for ten times the text."""
    def seconds(n):
        text = "(" + ", ".join(f"\\frac{{{i}}}{{7}} x^{{{i}}}" for i in range(n)) + ")"
        start = time.process_time()
        for _ in range(3):
            assert answers.plain(text) and answers.unproven(text, text + "x") is None
        return time.process_time() - start
    seconds(40)
    assert seconds(400) < 40 * seconds(40) + 0.1


@pytest.mark.parametrize("text", [
    "9^{9^{9}}+x", "9^{9^9}+x", "((9))!+x", r"\int x", r"\sum x", "x^{100}+1", "import os", "a.b+1",
    "(x+1)^{2}" * 7, "9" * 16 + "x+1", "x+" * 61 + "1", "x+1\\text{;}", "__x__+1", r"\input{f}+1"])
def test_math_verify_is_not_shown_what_may_hang_it(text):
    """A tower of powers, a sum, an integral, a name or a long text that gets to sympy."""
    shown = answers.plain(text)
    assert not answers.comparable(shown, shown + "+1")


STUB = """
import sys, time
print("ready", flush=True)
for line in sys.stdin:
    if "slow" in line:
        time.sleep(60)
    if "die" in line:
        sys.exit()
    print("equal" if "yes" in line else "different", flush=True)
"""


@pytest.fixture
def stub(monkeypatch):
    """A process in math-verify's place."""
    monkeypatch.setattr(answers.Algebra, "here", lambda self: True)
    monkeypatch.setattr(answers, "SECONDS", -1.5)  # half a second
    algebra = answers.Algebra([sys.executable, "-c", STUB])
    yield algebra
    algebra.close()


def test_a_process_that_takes_too_long_is_ended(stub, monkeypatch, capsys):
    """A run that waits for a hostile answer, an answer read off the one before, or no end of it."""
    monkeypatch.setattr(answers, "MAX_STOPPED", 3)
    assert stub.proves([("yes", "")]) and not stub.proves([("no", "")])
    process = stub.process
    start = time.monotonic()
    assert not stub.proves([("slow", "yes")])
    assert time.monotonic() - start < 20 and process.poll() is not None
    assert stub.proves([("yes", "")]) and not stub.proves([("no", "")])
    assert not stub.proves([("die", "yes")]) and stub.proves([("yes", "")])
    assert "spelling alone" not in capsys.readouterr().err
    stub.process.kill()
    stub.process.wait()
    assert not stub.proves([("yes", "")])
    assert "spelling alone" in capsys.readouterr().err
    assert stub.process is None and not stub.proves([("yes", "")])  # asked no more


def test_a_process_that_does_not_start_is_told_once(monkeypatch, capsys):
    """A run that waits for a process that is not there at every answer, or says nothing."""
    monkeypatch.setattr(answers.Algebra, "here", lambda self: True)
    algebra = answers.Algebra([sys.executable, "-c", "print('broken')"])
    assert not algebra.proves([("x", "x")]) and not algebra.proves([("x", "x")])
    assert capsys.readouterr().err.count("math-verify does not start") == 1


@needs_math_verify
def test_what_hangs_sympy_is_ended(algebra, monkeypatch):
    """A power that the gate lets through and that runs on: the run with it, and what comes next."""
    assert answers.same("x^2+2x+1", "(x+1)^2")
    start = time.monotonic()
    assert not answers.same("(a+b+c+d+f)^{60}", "(b+a)^{60}+c+d+f")
    assert time.monotonic() - start < answers.SECONDS + 10
    assert algebra.stopped == 1 and answers.same("x^2+2x+2", "(x+1)^2+1")


# --- Files: what is right ---

GOOD = dict(prompt="What is 6 times 7?", solution="6 * 7 = 42", answer="42")


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path, *rows):
    return problems.read_problems(write(path, *rows))


def refusal(path, *rows):
    """What a file of these rows is refused with, behind its own name."""
    with pytest.raises(ValueError) as info:
        read(path, *rows)
    text = str(info.value)
    assert text.startswith(f"{path}, ") and "\n" not in text
    return text.removeprefix(f"{path}, ")


@pytest.mark.parametrize("solution, answer", [
    (r"\boxed{\frac12}", "1/2"),
    (r"\boxed{1{,}000}", "1000"),
    (r"\boxed{1{,}000}", "1,000"),
    (r"\boxed{\$5}", "5"),
    (r"\boxed{(2, 3)}", "(2,3)"),
    (r"\boxed{5\text{ apples}}", "5"),
    (r"\boxed{5\text{ apples}}", "5 apples"),
    (r"\boxed{5\text{ m}}", "5"),
    (r"\boxed{5 cm}", "5"),
    (r"\boxed{5\%}", "5"),
    (r"\boxed{45^\circ}", "45"),
    (r"\boxed{x = 5}", "5"),
    ("#### 18.", "18"),
    ("### Sum\n#### Step 1\nWe add.", "18"),
])
def test_a_line_is_taken_whose_solution_says_its_answer(solution, answer, tmp_path, by_spelling):
    """A line refused because its two spellings differ, or whose solution then counts as wrong."""
    [problem] = read(tmp_path / "own.jsonl", dict(GOOD, solution=solution, answer=answer))
    assert problem.grade(problem.solution) == "correct"
    assert problem.grade(f"\\boxed{{{answer}}}") == "correct"
    assert problem.grade(r"\boxed{77}") == "wrong_answer"


@pytest.mark.parametrize("prompt, answer, response, right", [
    ("How many apples has he?", "5", r"5\text{ apples}", True),
    ("How many apples has he?", "5 apples", "5", True),
    ("How many apples has he?", "5", "5 pears", False),
    ("How many m are 180 cm?", "1.8", "1.8 m", True),
    ("How many m are 180 cm?", "1.8", "1.8 cm", False),
    ("What is 180 cm in m?", "1.8", "1.8 cm", False),
    ("What does it cost?", "5", "5 thousand", False),
])
def test_a_unit_counts_where_the_prompt_asks_for_it(prompt, answer, response, right, tmp_path,
                                                     by_spelling):
    """A right number with the unit that is asked for marked wrong, or with another one right."""
    [problem] = read(tmp_path / "own.jsonl", dict(prompt=prompt, solution="Easy.", answer=answer))
    assert (problem.grade(f"\\boxed{{{response}}}") == "correct") == right


@pytest.mark.parametrize("response, outcome", [
    (r"\boxed{41}", "wrong_answer"),
    (r"\boxed{apples}", "no_answer"),
    (r"\boxed{}", "no_answer"),
    ("42", "no_answer"),
    (r"\boxed{42} " + "x" * 20000, "no_answer"),
    ("#### 42\nor so", "correct"),
])
def test_what_a_response_counts_as(response, outcome):
    """A log in which what is no number counts as a wrong one, or the other way round."""
    assert problems.OwnProblem("?", "", "42").grade(response) == outcome


@pytest.mark.parametrize("prompt, form", [
    ("Put your answer in \\boxed{}.", "\\boxed"),
    ("Put your final answer within $\\boxed{}$.", "\\boxed"),
    ("What is 3 + 4? Use \\boxed{} for it.", "\\boxed"),
    ("Solve it.\nAnswer: \\boxed{your answer}", "\\boxed"),
    ("Solve it.\n\\boxed{answer}", "\\boxed"),
    ("End with #### and the number.", "####"),
    ("Write the result after `####`.", "####"),
    ("The last line is\n#### <answer>", "####"),
    ("The last line is\n#### the final answer", "####"),
    ("Which number belongs here: 3 + \\boxed{} = 8?", ""),
    ("Given \\boxed{3} and 4. Give their sum.", ""),
    ("What is \\boxed{3} + 4?", ""),
    ("#### Problem\nWhat is 3 + 4?", ""),
    ("#### Write a number\nWhat is 3 + 4?", ""),
    ("#### 3 + 4", ""),
    ("What is 3 + 4?", ""),
])
def test_which_form_a_prompt_asks_for(prompt, form, tmp_path):
    """A prompt that only uses \\boxed or #### and gets no request, or that asks twice."""
    assert problems.form_asked_for(prompt) == form
    [problem] = read(tmp_path / "own.jsonl", dict(GOOD, prompt=prompt))
    assert problem.prompt.endswith(tasks.REQUEST) == (form == "")


def test_answers_that_are_no_numbers_are_told(tmp_path, capsys, monkeypatch, by_spelling):
    """A file whose answers are compared by their spelling, and nobody says so."""
    rows = [dict(GOOD, prompt=f"Who is {i}?", answer=answer)
            for i, answer in enumerate(("1", "Evelyn", r"\frac12", "x+1"))]
    file = write(tmp_path / "own.jsonl", *rows)
    problems.read_problems(file)
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert '2 of 4 answers are no numbers (first line 2: "Evelyn")' in told
    assert "math-verify is not installed" in told
    monkeypatch.setattr(answers.Algebra, "here", lambda self: True)
    problems.read_problems(file)
    told = capsys.readouterr().err
    assert "compared with math-verify" in told and "not installed" not in told
    read(tmp_path / "own.jsonl", *rows[::2])
    assert capsys.readouterr().err == ""


# --- Files: what is refused ---

@pytest.mark.parametrize("row, says", [
    (dict(question="6 * 7?", solution="42", answer="42"), 'but "question" is: call it "prompt"'),
    (dict(problem="6 * 7?", solution="42", answer="42"), 'but "problem" is: call it "prompt"'),
    (dict(question="6 * 7?", answer="6 * 7 = 42\n#### 42"), 'As in GSM8K, "answer" holds'),
    (dict(prompt="6 * 7?", answer="42"), '"solution" must be a text that is not empty: it is not '
                                         'there, of "prompt", "answer"'),
    (dict(GOOD, answer=42), 'it is the number 42, write "42"'),
    (dict(GOOD, answer=4.5), 'it is the number 4.5, write "4.5"'),
    (dict(GOOD, answer=True), "it is true or false"),
    (dict(GOOD, answer=None), "it is null"),
    (dict(GOOD, answer=["42"]), "it is a list"),
    (dict(GOOD, answer=""), 'it is ""'),
    ([GOOD], "the line is a list, no object"),
    ({}, "an empty object"),
    (dict(GOOD, solution="x" * 20001), '"solution" has 20001 characters, at most 20000 are read'),
    (dict(GOOD, answer="4" * 1001), "has 1001 characters, or braces that do not fit"),
    (dict(GOOD, answer="4}{2"), "braces that do not fit"),
    (dict(GOOD, solution=r"\boxed{41}"), 'another answer than "answer", 42: it states "41"'),
    (dict(GOOD, solution=r"\boxed{42x}"), 'it states "42x"'),
    (dict(GOOD, solution=r"\boxed{42 - 3}"), 'it states "42 - 3"'),
    (dict(GOOD, solution=r"\boxed{42\pi}"), 'it states "42\\pi"'),
    (dict(GOOD, solution=r"\boxed{41\text{ m}}"), 'it states "41\\text{ m}"'),
    (dict(GOOD, solution="6 * 7\n#### 41"), 'it states "41"'),
], ids=brief)
def test_a_refusal_says_what_was_found(row, says, tmp_path):
    """A refusal with a false reason, or without what would be right."""
    text = refusal(tmp_path / "own.jsonl", GOOD, row)
    assert text.startswith("line 2: ") and says in text


def test_all_bad_lines_are_named(tmp_path):
    """A file whose faults are told one a run."""
    rows = [dict(GOOD, prompt=f"{i} * 1?", answer=i if i % 2 else str(i), solution="So.")
            for i in range(20)]
    text = refusal(tmp_path / "own.jsonl", *rows)
    assert all(f'line {i + 1}: "answer" must' in text for i in (1, 3, 5, 7, 9))
    assert "line 12" not in text and text.endswith("bad are 10 of 20")
    one = refusal(tmp_path / "own.jsonl", dict(question="?"))
    assert all(f'"{key}" must' in one for key in ("prompt", "solution", "answer"))


def test_one_prompt_has_one_answer(tmp_path):
    """Two lines that contradict each other, of which a policy can satisfy one."""
    same = dict(GOOD, answer="42.0", prompt="What is  6 times 7?")
    assert len(read(tmp_path / "own.jsonl", GOOD, same)) == 2
    text = refusal(tmp_path / "own.jsonl", GOOD, same, dict(GOOD, answer="41", solution="Hm."))
    assert text.startswith('line 3: asks what line 1 asks, but its answer is "41", there "42"')


# --- Programs ---

COUNTDOWN = """
import re
from collections import Counter
from fractions import Fraction

def problems():
    for i in range(40):
        numbers = [i + 2, i % 5 + 3, 7]
        target = numbers[0] * numbers[1] + 7
        yield dict(prompt=f"Make {target} of {numbers}. End with = {target}.", numbers=numbers,
                   target=target, solution=f"{numbers[0]} * {numbers[1]} + 7 = {target}")

def grade(problem, response):
    formula = response.rpartition("=")[0]
    if not re.fullmatch(r"[0-9]+( [*+-] [0-9]+)*", formula.strip()):
        return False
    used = Counter(int(number) for number in re.findall("[0-9]+", formula))
    if used != Counter(problem["numbers"]):
        return False
    return sum(product(term) for term in re.split(r" [+] ", formula.strip())) == problem["target"]

def product(term):
    value = 1
    for factor in term.split(" * "):
        value *= int(factor)
    return value
"""


def program(path, text):
    path.write_text(text)
    return str(path)


def test_a_program_grades_its_own_problems(tmp_path):
    """A task with many right answers, countdown, of which only the solution's counts; or a box
    that is asked for where the program wants none; or an episode that cannot be sent to a rank."""
    task = problems.OwnProblems(data=program(tmp_path / "countdown.py", COUNTDOWN))
    assert sum(len(task.problems[role]) for role in ("train", "val", "heldout")) == 40
    problem = task.sample("train", random.Random(0))
    assert problem.prompt.startswith("Make ") and "boxed" not in problem.prompt
    a, b, c = problem.row["numbers"]
    total = problem.row["target"]
    for response in (f"{a} * {b} + {c} = {total}", f"{c} + {b} * {a} = {total}"):
        assert problem.grade(response) == "correct"
    for response in (f"{total} = {total}", f"{a} * {b} = {total}", "", "9" * 10 ** 5):
        assert problem.grade(response) == "wrong_answer"
    [turn] = problem.demonstration()
    assert turn.response == problem.solution
    assert pickle.loads(pickle.dumps(problem)).grade(problem.solution) == "correct"
    assert problem.source.endswith(f"problem {problem.row['numbers'][0] - 1}")


def test_a_grade_that_fails_in_a_run_is_told_once(tmp_path, capsys):
    """A run that ends after hours for a response that a program's author did not think of."""
    text = COUNTDOWN.replace("def grade(problem, response):",
                             "def grade(problem, response):\n    int(response[0])")
    [problem, *_] = problems.read_problems(program(tmp_path / "failing.py", text))
    assert [problem.grade(text) for text in ("x", "y", problem.solution)] == [
        "wrong_answer", "wrong_answer", "correct"]
    assert capsys.readouterr().err.count("grade fails, which counts as wrong (ValueError") == 1


@pytest.mark.parametrize("name, text, says", [
    ("a", None, "cannot be read"),
    ("b", "def problems(:", "does not run (SyntaxError"),
    ("c", "import no_such_module", "does not run (ModuleNotFoundError"),
    ("d", "def problems(): return []", "has no function grade"),
    ("e", "grade = 1\ndef problems(): return []", "has no function grade"),
    ("f", "def grade(p, r): return 1\ndef problems(): return 1 / 0", "problems() fails (Zero"),
    ("g", "import itertools\nn = itertools.count()\ndef grade(p, r): return 1\n"
          "def problems(): return [next(n)]", "the same each time"),
    ("h", "def grade(p, r): return r == '7'\n"
          "def problems(): return [dict(prompt='?', solution='8')]",
     'problem 1: grade finds its "solution" wrong'),
    ("i", "def grade(p, r): return p['x']\n"
          "def problems(): return [dict(prompt='?', solution='8')]",
     'problem 1: grade fails on its "solution" (KeyError'),
    ("j", "def grade(p, r): return 1\ndef problems(): return [dict(prompt='?')]",
     'problem 1: "solution" must be a text'),
])
def test_a_bad_program_is_named(name, text, says, tmp_path):
    """A program whose fault passes, or ends in a traceback."""
    file = tmp_path / f"{name}.py"
    if text is not None:
        program(file, text)
    with pytest.raises(ValueError) as info:
        problems.read_problems(file)
    assert str(info.value).startswith(str(file)) and says in str(info.value)
    assert "\n" not in str(info.value)
