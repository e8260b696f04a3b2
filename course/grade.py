"""Grade a submission: the bodies of the exercises' functions, each alone in the reference solution.

    python course/grade.py SUBMISSION --out results.json                # a folder with amft.py, tasks.py and toy.py
    python course/grade.py amft.py tasks.py --out results.json          # or the files
    python course/grade.py SUBMISSION --out results.json --student ID   # hidden seeds of this student
    python course/grade.py SUBMISSION --out results.json --only 4       # one exercise

A body is taken from the submission by its qualified name; signature, imports and everything else are the reference's. It
is checked against a list of what bodies may name (check.py), and put into the reference alone, so that exercise 2 can be
right while exercise 1 is wrong. There it answers the cases of cases.py in a process of its own: 60 s, 700 MiB, one
thread, no files, no processes, no network. A function earns its points if all of its tests pass with the visible seed and
with three hidden ones, which follow from --student and from the text in AMFT_COURSE_SECRET (the visible one is AMFT_COURSE_YEAR's, or 0); all
seeds are among those with which the reference was seen to pass. results.json is Gradescope's, and is replaced as a whole after each exercise.

Where a verdict is made. The process with student code knows the questions and not the answers: the exercise's own
functions are emptied in its amft.py, and cases.py is not loaded. What it says is JSON of numbers and of tensors' bytes,
read with their shapes and types checked, and compared in this process, in which no student code has run. So whatever a
body does to its own process, to torch or to pytest, it has still to name the right numbers.

What this does not protect from. Python is no sandbox, and a fault in torch's C++ code could be used: run the grader in a
container, as Gradescope does. Files that C++ code opens are not seen (they can be created, but nothing can be written);
the network is off where `unshare -n` is permitted, and sockets are refused in any case. Nor does this tell a student's
own work from a copy of the public solution; see the instructor's notes.
"""

import argparse
import ast
import builtins
import contextlib
import functools
import hashlib
import importlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import types
import warnings
from pathlib import Path

import check
import verdict
from check import Refused, body_of, exercises, find, functions_in, is_stub, parsed

HERE = Path(__file__).resolve().parent
REFERENCE = HERE.parent
FILES = {"amft": REFERENCE / "amft.py", "tasks": REFERENCE / "tasks.py", "toy": HERE / "toy.py"}
VISIBLE, VERIFIED = 0, range(1, 200)  # seeds; the reference passes with all of them
SECONDS, MIB = 60, 700  # of one function
TOTAL = 540  # seconds of them all: Gradescope's own limit is 10 minutes
MESSAGE, REPLIES = 600, 2 ** 24  # characters of one test's message; bytes that a process may say
SIZE = 2 ** 20  # of a file that is handed in


class Forbidden(BaseException):
    """What a body that was run must not do."""


# --- What is in a submission --------------------------------------------------------------------------------------


@functools.lru_cache
def facts():
    """What check.py must know of the right files."""
    around = [(REFERENCE / name).read_text() for name in beside() if name.startswith("harness/")]
    return check.facts_of({module: path.read_text() for module, path in FILES.items()}, around)


@functools.lru_cache
def beside():
    """The files that amft.py and tasks.py import, at once or on demand, and those that these import: names of files
    within the repository."""
    found, left = set(), {"amft.py", "tasks.py"}
    while left:
        name = left.pop()
        found.add(name)
        for node in ast.walk(ast.parse((REFERENCE / name).read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:  # of a module, or of a folder of them
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            files = {f"{module.replace('.', '/')}.py" for module in modules}
            left |= {file for file in files if (REFERENCE / file).exists()} - found
    return sorted(found - {"amft.py", "tasks.py"})


@functools.lru_cache
def functions_of(path):
    return functions_in(ast.parse(Path(path).read_text()))


# --- In the process of one function -------------------------------------------------------------------------------


def allowed_import(name, globals=None, locals=None, fromlist=(), level=0):
    """import, for a body. A list asks for torch's own C++ code, which imports in the name of the body that called it; a
    statement of Python has a tuple there."""
    if type(fromlist) is not list and (name not in check.modules() or level):
        raise Forbidden(f"import of {name}")
    return importlib.__import__(name, globals, locals, fromlist, level)


class Printer:
    """print for student code: it goes nowhere, and not for ever."""

    def __init__(self, most=64 * 1024):
        self.left = most

    def __call__(self, *values, sep=" ", end="\n", file=None, flush=False):
        self.left -= sum(len(str(value)) + 1 for value in values) + 1
        if self.left < 0:
            raise Forbidden("printing without end")


def spliced(node, reference, module, name, printer):
    """The function with the reference's signature and the student's body, over the names that check.py lists."""
    known = facts()["names"][module.__name__]
    names = {name: vars(module)[name] for name in known if name in vars(module)}
    names |= {name: vars(module)[name] for name in facts()["names"][f"{module.__name__}'s modules"] if name in check.modules()}
    names["__builtins__"] = {name: getattr(builtins, name) for name in check.SAFE} | {
        "print": printer, "type": lambda value: type(value), "__import__": allowed_import}
    new = ast.FunctionDef(name=reference.name, args=reference.args, body=body_of(node), decorator_list=[], returns=None)
    rest = [arg for arg in (new.args.vararg, new.args.kwarg) if arg]
    for arg in [*new.args.posonlyargs, *new.args.args, *new.args.kwonlyargs, *rest]:
        arg.annotation = None
    tree = ast.fix_missing_locations(ast.Module([ast.copy_location(new, node)], []))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(tree, f"submission {module.__name__}.py", "exec", dont_inherit=True), names)
    return names[reference.name]


@contextlib.contextmanager
def replaced(module, name, function):
    """The module with this function in place of its own; name is qualified."""
    *owners, last = name.split(".")
    owner = functools.reduce(getattr, owners, module)
    true = vars(owner)[last]
    setattr(owner, last, function)
    try:
        yield
    finally:
        setattr(owner, last, true)


def emptied(module, functions):
    """The module of the reference, loaded with these functions' bodies gone: they are what is asked."""
    tree = ast.parse(FILES[module].read_text())
    for name, node in functions_in(tree).items():
        if name in functions:
            node.body = ast.parse("raise NotImplementedError").body
    new = types.ModuleType(module)
    new.__file__ = str(FILES[module])
    sys.modules[module] = new
    exec(compile(tree, new.__file__, "exec"), vars(new))
    return new


class Blank(types.ModuleType):
    """What stands for transformers: amft.py names its classes, and no exercise uses one."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def answers(requests, module, file, signature, say):
    """Say the reply to each request, as a line of JSON, until one raises."""
    for request in requests:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reply = verdict.perform(request, module)
        except Forbidden as error:
            reply = dict(error=f"refused: {error}")
        except BaseException as error:  # SystemExit, too
            reply = dict(error=verdict.explained(error, file, signature))
        say(reply)
        if "error" in reply:
            return


def memory(key):
    """MiB of this process."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def guard(caught):
    """From now on this process cannot start another, open a file but a library's, or grow. What it tried is in caught."""
    import resource
    libraries = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    closed = tuple(f"{name}." for name in "os socket subprocess ctypes shutil tempfile urllib gc pty mmap signal syslog".split())
    harmless = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")

    def hook(event, args):
        if event == "open":
            path, mode = str(args[0]), str(args[1] or "r")
            bad = not path.startswith(libraries) or set(mode) & set("wax+") or (
                args[2] and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            bad = event.startswith(closed) and event not in harmless or event in ("sys.settrace", "sys.setprofile")
        if bad:
            caught.append(f"opening {Path(str(args[0])).name[:60]}" if event == "open" else event)
            raise Forbidden(caught[-1])

    with contextlib.suppress(OSError, AttributeError, TypeError):  # Linux; elsewhere the watch on the process must do
        room = max(64, MIB - memory("VmRSS"))
        limit = int((memory("VmData") + room) * 2 ** 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for name, most in (("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        resource.setrlimit(getattr(resource, name), (most, most))
    sys.addaudithook(hook)


def worker():
    """One function: the job from stdin, a line for each answer to stdout."""
    job = json.loads(sys.stdin.buffer.read())
    out = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    sys.path[:0] = [str(REFERENCE), str(HERE)]
    caught, name = [], job["function"]

    def say(reply):
        if caught:  # also where the body went on after it
            reply = dict(error=f"refused: {caught[0]}")
        left = json.dumps(reply).encode() + b"\n"
        while left:
            left = left[os.write(out, left):]
    for hidden in ("transformers", "huggingface_hub"):
        sys.modules[hidden] = Blank(hidden)
    import torch
    torch.set_num_threads(1)
    check.modules(), check.attributes()
    module = emptied(job["module"], job["emptied"])
    file, functions = f"{job['module']}.py", functions_of(FILES[job["module"]])
    signature = facts()["signatures"][name]
    try:
        node = find(job["source"], file, name)
        if job["check"]:
            check.refusal(node, file, job["module"], name)
        function = spliced(node, functions[name], module, name, Printer())
        said = "".join(job["source"].splitlines()[node.lineno - 1:node.end_lineno])
        if job["forward"] or re.search(r"func|[jv][vj]p|forward_ad|jac|vmap", said):
            importlib.import_module("torch._dynamo")  # torch loads it late, and it wants files that are then closed
    except Refused as error:
        say(dict(error=str(error)))
    except Exception as error:
        say(dict(error=f"{file}, line {getattr(error, 'lineno', '?')}: {str(error)[:MESSAGE]}"))
    else:
        guard(caught)
        with replaced(module, name, function):
            answers(job["requests"], module, file, signature, say)
    os._exit(0)  # what student code left behind does not get to run


# --- The grader's side --------------------------------------------------------------------------------------------


def asked(exercise, function, seeds):
    """[(test, seed, its cases)] of a function, the visible seed first."""
    import cases
    names = [name for name in exercise["tests"] if cases.TESTS[name][1] == function]
    return [(name, seed, cases.cases(name, seed)) for seed in seeds for name in names]


def told(tests, replies, ended=""):
    """(passed, message) of a function whose process gave these replies; ended: why there are no more of them."""
    known, found, at = verdict.hints(), [], 0
    for name, seed, some in tests:
        if found and seed != tests[0][1]:
            break
        mine = replies[at:at + len(some)]
        at += len(some)
        wrong = verdict.judged(some[:len(mine)], mine, known)
        if wrong is None and len(mine) < len(some):
            wrong = ended or "there was no answer"
        if wrong:
            where = name if seed == tests[0][1] else f"{name} (a hidden seed)"
            found.append(wrong if wrong.startswith("refused") else f"{where}: {wrong}")
            if len(mine) < len(some) or mine and "error" in mine[-1]:
                break  # the process has gone no further
    if found:
        return False, "\n".join(found[:3])
    seeds = len({seed for _, seed, _ in tests})
    return True, f"{len({name for name, *_ in tests})} tests passed with {seeds} seed{'s' * (seeds > 1)}"


def judge(exercise, sources, seeds):
    """(passed, message) of an exercise in this process: for tests of the kit, not for students' code."""
    file, module = f"{exercise['module']}.py", importlib.import_module(exercise["module"])
    for name in exercise["functions"]:
        try:
            node = find(sources[exercise["module"]], file, name)
            check.refusal(node, file, exercise["module"], name)
            function = spliced(node, functions_of(FILES[exercise["module"]])[name], module, name, Printer())
        except Refused as error:
            return False, str(error)
        tests = asked(exercise, name, seeds)
        for test in tests:  # to the first that fails
            replies = []
            requests = [json.loads(json.dumps(verdict.request_of(case))) for case in test[2]]
            with replaced(module, name, function):
                answers(requests, module, file, facts()["signatures"][name],
                        lambda reply: replies.append(json.loads(json.dumps(reply))))
            passed, message = told([test], replies)
            if not passed:
                return False, message
    return True, f"{len(tests)} tests passed"


def without_network():
    """What to put before a command so that it has no network; nothing where the system does not let us."""
    command = ["unshare", "-n"]
    if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
        return command
    return []


def resident(pid):
    try:
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 1024
    except (OSError, TypeError):
        return 0.0


def replies_of(said):
    """The replies in what a process said: whole lines that are JSON objects."""
    found = []
    for line in said.split(b"\n")[:-1]:
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(reply, dict) or not {"answer", "error"} & set(reply):
            break
        found.append(reply)
    return found


def in_process(exercise, function, source, tests, seconds=SECONDS, checked=True, prefix=()):
    """(passed, message, {seconds, mib}) of one function, whose body runs in a process that cannot outlive this call."""
    requests = [verdict.request_of(case) for _, _, some in tests for case in some]
    job = dict(module=exercise["module"], forward=exercise["id"] in (6, 7, 11), function=function, source=source, requests=requests, check=checked,
               emptied=list(exercise["functions"]) if function == list(exercise["functions"])[0] else [function])
    keep = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG") if name in os.environ}
    start, most, said, why = time.monotonic(), 0.0, b"", None
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile() as given:
        given.write(json.dumps(job).encode())
        given.seek(0)
        process = subprocess.Popen(
            [*prefix, sys.executable, str(HERE / "grade.py"), "--worker"], stdin=given, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, cwd=empty, start_new_session=True,
            env={**keep, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HOME": empty, "PYTHONHASHSEED": "0"})
        given.close()
        while why is None:
            if select.select([process.stdout], [], [], 0.05)[0]:
                chunk = os.read(process.stdout.fileno(), 65536)
                said += chunk
                if not chunk or len(said) > REPLIES:
                    break
            most = max(most, resident(process.pid))
            if time.monotonic() - start > seconds:
                why = f"took longer than {seconds:.0f} s, and was stopped"
            elif most > MIB:
                why = f"used more than {MIB} MiB of memory, and was stopped"
        if why is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what it may have started
        process.wait()
        process.stdout.close()
    measured = dict(seconds=round(time.monotonic() - start, 1), mib=round(most))
    ended = why or f"the process ended (exit status {process.returncode}) before there was an answer"
    if why:  # what it said before does not count: an answer has its time
        return False, why, measured
    return *told(tests, replies_of(said), ended), measured


def visible_seed(year=None):
    """The seed whose numbers students get: 0, or AMFT_COURSE_YEAR's own."""
    year = os.environ.get("AMFT_COURSE_YEAR", "") if year is None else year
    return random.Random(hashlib.sha256(f"year {year}".encode()).hexdigest()).choice(VERIFIED) if year else VISIBLE


def hidden_seeds(student):
    text = os.environ.get("AMFT_COURSE_SECRET", "") + "\n" + student
    seeds = [seed for seed in VERIFIED if seed != visible_seed()]
    return sorted(random.Random(hashlib.sha256(text.encode()).hexdigest()).sample(seeds, 3))


def candidates(path, name):
    """Files of this name in a folder, or the file itself; those in the fewest folders first."""
    found = path.rglob(name) if path.is_dir() else [path] * (path.name == name)
    return sorted(found, key=lambda p: (len(p.parts), p))


def read_submission(paths):
    """{"amft": text, "tasks": text} of what is there, [notes]. Of several files with one name the only one that lies at
    the top is read; of others none is, and all are named."""
    sources, notes = {}, []
    for module in FILES:
        name, found = f"{module}.py", []
        for path in map(Path, paths):
            root = path if path.is_dir() else path.parent
            for candidate in candidates(path, name):
                said = candidate.relative_to(root) if path.is_dir() else name
                if candidate.is_symlink() or root.resolve() not in candidate.resolve().parents:
                    notes.append(f"{said}: a link, not read")
                elif not candidate.is_file():
                    notes.append(f"{said}: not a file")
                elif candidate.stat().st_size > SIZE:
                    notes.append(f"{said}: larger than 1 MiB, not read")
                else:
                    found.append((candidate, str(said)))
        at_top = [(path, said) for path, said in found if "/" not in said]
        if len(found) > 1 and len(at_top) != 1:
            notes.append(f"{name}: there are {len(found)}, and none was read: {', '.join(said for _, said in found[:5])}")
            continue
        if len(found) > 1:
            others = ", ".join(said for _, said in found if "/" in said)
            notes.append(f"{name}: the one at the top was read, not {others[:200]}")
        for path, said in (at_top or found)[:1]:
            try:
                sources[module] = path.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError):
                notes.append(f"{said}: is not a text in UTF-8")
    return sources, notes


def surroundings(source, names):
    """A dump of a file without the bodies and signatures of the exercises."""
    tree = parsed(source)
    for name, node in functions_in(tree).items():
        if name in names:
            node.body, node.args, node.returns, node.decorator_list = [], None, None, []
    return ast.dump(tree)


def remarks(sources, listed):
    """What a student should know and what earns nothing: changes that were not looked at."""
    notes = []
    for module, source in sources.items():
        names = [name for e in listed if e["module"] == module for name in e["functions"]]
        try:
            if surroundings(source, names) != surroundings(FILES[module].read_text(), names):
                notes.append(f"{module}.py: what is changed outside of the exercises' bodies was not used")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            notes.append(f"{module}.py: Python cannot read the whole file; each function was read alone")
    return notes


def write(path, results):
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, path)


def graded(e, name, sources, seeds, seconds, prefix):
    """(points, message, measured) of one function of an exercise."""
    file = f"{e['module']}.py"
    if e["module"] not in sources:
        return 0, f"no {file} was read", {}
    try:
        node = find(sources[e["module"]], file, name)
        check.refusal(node, file, e["module"], name)
        if is_stub(node):
            raise Refused(f"not done: {name}")
        if seconds < 5:
            raise Refused("not graded: the exercises before took too long")
    except Refused as error:
        return 0, str(error), {}
    passed, message, measured = in_process(e, name, sources[e["module"]], asked(e, name, seeds), seconds, prefix=prefix)
    return e["functions"][name] * passed, message, measured


def grade(paths, out, student="", only=None, total=TOTAL, say=print):
    """Write results.json after each exercise; returns it."""
    listed, start = [e for e in exercises() if not only or e["id"] in only], time.monotonic()
    sources, notes = read_submission(paths)
    notes += remarks(sources, listed)
    seeds, prefix = [visible_seed(), *hidden_seeds(student)], without_network()
    tests = [dict(name=f"Exercise {e['id']}: {e['title']}", score=0, max_score=e["points"], status="failed", visibility="visible",
                  output="not graded: the grader was cut off before") for e in listed]
    results = dict(score=0, max_score=sum(e["points"] for e in listed), output="\n".join(notes), output_format="text",
                   stdout_visibility="hidden", tests=tests)
    write(out, results)
    for e, row in zip(listed, tests):
        points, said, seconds, most = 0, [], 0.0, 0
        for name in e["functions"]:
            left = min(e.get("seconds", SECONDS), total - (time.monotonic() - start))
            earned, message, measured = graded(e, name, sources, seeds, left, prefix)
            points += earned
            several = f"{name} ({earned} of {e['functions'][name]}): " if len(e["functions"]) > 1 else ""
            said.append(several + message)
            seconds, most = seconds + measured.get("seconds", 0), max(most, measured.get("mib", 0))
        row.update(score=points, status="passed" if points == e["points"] else "failed", output="\n".join(said))
        results.update(score=sum(row["score"] for row in tests), execution_time=round(time.monotonic() - start))
        write(out, results)
        say(f"{row['score']:3d} of {row['max_score']}  {row['name']}: {said[0].splitlines()[0]}"
            + (f"  [{seconds:.1f} s, {most} MiB]" if seconds else ""), flush=True)
    say(f"{results['score']} of {results['max_score']} in {time.monotonic() - start:.0f} s; see {out}")
    return results


def main():
    sys.modules.setdefault("grade", sys.modules[__name__])  # check.py asks it for facts()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: threads that share a busy core wait for each other
    if sys.argv[1:] == ["--worker"]:
        return worker()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("submission", nargs="+", type=Path, help="a folder, or amft.py and tasks.py")
    parser.add_argument("--out", type=Path, default=Path("results.json"), help="where to write (default: results.json)")
    parser.add_argument("--student", default="", help="whose hidden seeds")
    parser.add_argument("--only", type=int, nargs="+", help="these exercises alone")
    given = parser.parse_args()
    if missing := [path for path in given.submission if not path.exists()]:
        parser.error(f"{missing[0]}: there is no such file or folder")
    grade(given.submission, given.out, given.student, given.only)


if __name__ == "__main__":
    main()
