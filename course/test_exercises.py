"""The tests of the exercises: what a function is asked, and what must come back. See conftest.py for one exercise's.

What is expected are numbers, drawn and worked out beforehand with the visible seed: they lie in visible.json. A failure
says where, what came and what was expected, and if the value is a typical mistake's own, which mistake. Each exercise
needs its own function, and those before it that it builds on: 7 needs 6, and 8 needs 1 and 3.
"""

import importlib
import json
import sys
import tomllib
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE if (HERE / "amft.py").exists() else HERE.parent)]
import verdict  # noqa: E402

EXERCISES = tomllib.loads((HERE / "exercises.toml").read_text())["exercise"]
HINTS = verdict.hints(HERE)
FROZEN = HERE / "visible.json"  # what make_student.py writes; in the repository the cases are made anew
TESTS = [pytest.param(e["module"], name, id=name, marks=pytest.mark.exercise(e["id"]))
         for e in EXERCISES for name in e["tests"]]


def cases_of(name, seed):
    if FROZEN.exists():
        return verdict.frozen(FROZEN)[name]
    import cases
    return cases.cases(name, seed)


@pytest.mark.parametrize("module, name", TESTS)
def test_exercise(module, name, seed):
    """Call by call, so that the first one that is wrong is what pytest shows."""
    __tracebackhide__ = True
    module = importlib.import_module(module)
    # Through JSON, as the grader does it.
    asked = [verdict.unpacked_case(json.loads(json.dumps(verdict.packed_case(case)))) for case in cases_of(name, seed)]
    replies = []
    for case in asked:
        try:
            replies.append(json.loads(json.dumps(verdict.perform(verdict.request_of(case), module))))
        except Exception as error:
            if hint := case.errors.get(type(error).__name__):
                pytest.fail(f"{verdict.explained(error, module.__name__ + '.py')}; {HINTS[hint]}", pytrace=False)
            raise
    if wrong := verdict.judged(asked, replies, HINTS):
        pytest.fail(wrong, pytrace=False)
