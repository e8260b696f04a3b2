"""Make the folder that students get, from the solution.

    python course/make_student.py --out FOLDER                 # all exercises to be done
    python course/make_student.py --out FOLDER --upto 4        # exercises 1 to 3 are solved
    python course/make_student.py --out FOLDER --exercises 4 7 11    # only these to be done
    python course/make_student.py --out FOLDER --year 2027     # with another visible seed: the grader's AMFT_COURSE_YEAR
    python course/make_student.py --out FOLDER --check         # and prove it: every test fails here, and passes on the solution
    python course/make_student.py --out FOLDER --autograder    # not for students: what goes into Gradescope's zip

An exercise's function keeps its signature, docstring and types; its body, with the comments in it, becomes the
exercise's text and an error that names it. The folder runs as it is: amft.py, tasks.py, what they import (harness/, some
of recipes/), the policies to start from, the tests that students see, the handout, check.py. The tests' numbers are
frozen: visible.json holds what is asked and what must come back, and nothing that computes it. The folder holds no
history, no recorded runs, no test of the repository, no answers.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import xml.etree.ElementTree as ElementTree
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads that share a busy core wait for each other
import cases  # noqa: E402
import verdict  # noqa: E402
from check import body_of, exercises, functions_in  # noqa: E402
from grade import FILES, beside, facts, visible_seed  # noqa: E402

HERE = Path(__file__).resolve().parent
SOLUTION = HERE.parent
WIDTH = 100
POLICY = "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json".split()
COPIED = ["requirements.txt", "LICENSE", "base/README.md",
          *(f"{folder}/{name}" for folder in ("base", "base/worn", "base-vl") for name in POLICY)]
HANDED_OUT = "handout.md written.md conftest.py test_exercises.py verdict.py check.py".split()  # of this folder, where they are; and the handout's figures


def stub(exercise, name, indent):
    """The lines of an emptied body."""
    said = ("Exercise {id}, {points} points, about {minutes} minutes and {lines} lines: ".format(**exercise)
            .replace(" 1 lines", " 1 line") + " ".join(exercise["text"].split()))
    comment = textwrap.wrap(said, WIDTH - indent - 2)
    return [f"{' ' * indent}# {line}\n" for line in comment] + [
        f'{" " * indent}raise NotImplementedError("Exercise {exercise["id"]}: {name}; python -m pytest -q test_exercises.py '
        f'--exercise {exercise["id"]}")\n']


def emptied(source, exercise_of):
    """The source with the bodies of {qualified name: exercise} emptied."""
    lines, functions = source.splitlines(keepends=True), functions_in(ast.parse(source))
    for name, exercise in sorted(exercise_of.items(), key=lambda item: -functions[item[0]].lineno):
        node = functions[name]
        first = body_of(node)[0]
        # Comments above the first statement go, too: begin after the docstring, or after the signature.
        signature = max([node.lineno] + [part.end_lineno for part in ast.walk(node.args) if hasattr(part, "end_lineno")]
                        + ([node.returns.end_lineno] if node.returns else []))
        start = node.body[0].end_lineno if first is not node.body[0] else signature
        end = node.end_lineno
        for i in range(end, len(lines)):  # and comments below the last one
            text = lines[i].strip()
            if text and not (text.startswith("#") and lines[i].index("#") >= first.col_offset):
                break
            end = i + 1 if text else end
        lines[start:end] = stub(exercise, name, first.col_offset)
    return "".join(lines)


def frozen(listed, year):
    """The text of visible.json: the cases of the tests that students see, and what check.py must know."""
    tests = {name: [verdict.packed_case(case) for case in cases.cases(name, visible_seed(year))]
             for e in listed for name in e["tests"] if name not in e["hidden"]}
    return json.dumps(dict(tests=tests, facts=facts()))


def visible_table(text, hidden):
    """exercises.toml without the names of hidden tests."""
    for name in hidden:
        text = re.sub(rf'(, )?"{name}"', "", text).replace("[, ", "[")
    return text


def copy(names, out):
    """Files of the solution, into a folder."""
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SOLUTION / name, out / name)


def to_do(exercise, upto, only):
    return exercise["id"] in only if only else exercise["id"] >= upto


def make(out, upto=1, only=(), year=None):
    """Write the folder; it must be new or empty. only: the exercises to be done, if not all from upto on."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is there, and not empty")
    listed = exercises()
    out.mkdir(parents=True, exist_ok=True)
    for module, path in FILES.items():
        undone = {name: e for e in listed if e["module"] == module and to_do(e, upto, only) for name in e["functions"]}
        (out / f"{module}.py").write_text(emptied(path.read_text(), undone))
    copy([name for name in COPIED if (SOLUTION / name).exists()], out)
    copy(beside(), out)
    hidden = [name for e in listed for name in e["hidden"]]
    (out / "visible.json").write_text(frozen(listed, year))
    (out / "exercises.toml").write_text(visible_table((HERE / "exercises.toml").read_text(), hidden))
    for path in [*(HERE / name for name in HANDED_OUT), *HERE.glob("*.png")]:
        shutil.copyfile(path, out / path.name)


def make_autograder(out):
    """Write what Gradescope's zip holds: the solution, this folder, and gradescope/ at the top."""
    if out.exists():
        raise ValueError(f"{out}: is there")
    shutil.copytree(HERE / "gradescope", out)
    shutil.copytree(HERE, out / "course", ignore=shutil.ignore_patterns("__pycache__", "gradescope"))
    copy(["amft.py", "tasks.py", "requirements.txt", *beside()], out)


def outcomes(folder):
    """{test: None where it passed, or its failure's text} of a folder's tests, by pytest in a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "test_exercises.py"]
        subprocess.run(command, cwd=folder, capture_output=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return {re.sub(r".*\[\d+-(\w+)\]", r"\1", case.get("name")): None if (bad := case.find("failure")) is None else bad.get("message")
                for case in cases if case.find("error") is None}


def check(out, upto=1, solution=True, only=()):
    """Problems of a folder that was made, as lines; none: every test of a stub fails for being one, and all pass when solved."""
    problems, listed = [], exercises()
    visible = {name: e for e in listed for name in e["tests"] if name not in e["hidden"]}
    seen = outcomes(out)
    if seen.keys() != visible.keys():
        problems.append(f"tests that did not run, or are not listed: {', '.join(sorted(seen.keys() ^ visible.keys()))}")
    for name, e in visible.items():
        message = seen.get(name)
        if to_do(e, upto, only) and f"Exercise {e['id']}: " not in (message or ""):
            problems.append(f"{name}: {'fails otherwise than as a stub' if message else 'passes'} without exercise {e['id']}")
        if not only and e["id"] < upto and message:
            problems.append(f"{name}: fails although exercise {e['id']} is solved")
    if not solution:
        return problems
    with tempfile.TemporaryDirectory() as work:
        for name in "test_exercises.py exercises.toml conftest.py cases.py verdict.py toy.py".split():  # also what students do not see
            shutil.copyfile(HERE / name, Path(work) / name)
        copy(["amft.py", "tasks.py", *beside()], Path(work))
        solved = outcomes(work)
    problems += [f"{name}: fails on the solution ({message[:200]})" for name, message in solved.items() if message]
    every = {name for e in listed for name in e["tests"]}
    if solved.keys() != every:
        problems.append(f"tests that did not run, or are not listed: {', '.join(sorted(solved.keys() ^ every))}")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder, new or empty")
    parser.add_argument("--autograder", action="store_true", help="make the autograder's folder, not the students'")
    parser.add_argument("--upto", type=int, default=1, help="exercises before this one are solved (default: 1, none)")
    parser.add_argument("--exercises", type=int, nargs="+", default=(), help="these are to be done, the others are solved")
    parser.add_argument("--year", help="a text that draws the visible seed; give the grader the same as AMFT_COURSE_YEAR")
    parser.add_argument("--check", action="store_true", help="prove that its tests fail, and pass on the solution")
    given = parser.parse_args()
    try:
        if given.autograder:
            make_autograder(given.out)
            return print(f"{given.out}: zip what is in it")
        make(given.out, given.upto, given.exercises, given.year)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    numbers = [str(e["id"]) for e in exercises() if to_do(e, given.upto, given.exercises)]
    print(f"{given.out}: exercises {', '.join(numbers)} to be done")
    if given.check:
        problems = check(given.out, given.upto, only=given.exercises)
        print("\n".join(problems) or "checked: each visible test fails on its stub, every test passes on the solution")
        sys.exit(bool(problems))


if __name__ == "__main__":
    main()
