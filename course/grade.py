"""Grade a submission: the bodies of the ten exercises' functions, each alone in the reference solution.

    python course/grade.py SUBMISSION --out results.json                # a folder with amft.py and tasks.py
    python course/grade.py amft.py tasks.py --out results.json          # or the files
    python course/grade.py SUBMISSION --out results.json --student ID   # hidden seeds of this student
    python course/grade.py SUBMISSION --out results.json --only 4       # one exercise

A body is taken from the submission by its qualified name; signature, imports and everything else are the reference's. It
is checked (see `refusal`), put into the reference alone, so that exercise 2 can be right while exercise 1 is wrong, and
tested in a process of its own: 60 s, 700 MiB, one thread, no files, no processes, no network. It earns its exercise's
points if all tests pass with the visible seed and with three hidden ones, which follow from --student and from the text
in AMFT_COURSE_SECRET; all seeds are among those with which the reference was seen to pass. results.json is Gradescope's, and
is replaced as a whole after each exercise.

What this does not protect from. Python is no sandbox: student code runs in the process that judges it. It is kept from
modules but those in MODULES, from files, frames and names with two underscores, and the verdict goes through a pipe with a
word that it is not shown. A way around all of these, or a fault in torch's own C++ code, could still be used: so read a
submission that looks strange, and run the grader in a container, as Gradescope does. Files that C++ code opens are not
seen (they can be created, but nothing can be written); the network is off where `unshare -n` is permitted, and sockets
are refused in any case. A body can use as much of a core as it likes for 60 s. Nor does this tell a student's own work
from a copy of the public solution; see the instructor's notes.
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
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
import traceback
import types
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
REFERENCE = HERE.parent
VISIBLE, VERIFIED = 0, range(1, 200)  # seeds; the reference passes with all of them
SECONDS, MIB = 60, 700  # of one exercise
TOTAL = 540  # seconds of them all: Gradescope's own limit is 10 minutes
MESSAGE = 600  # characters of one test's message

MODULES = {"math", "itertools", "functools", "fractions", "collections", "json", "re", "torch", "torch.nn",
           "torch.nn.functional", "torch.nn.utils", "torch.func", "torch.linalg", "torch.autograd",
           "torch.autograd.functional", "torch.autograd.forward_ad", "torch.special"}
SAFE = ("abs all any bool bytes callable complex dict divmod enumerate filter float frozenset int isinstance issubclass iter len "
        "list map max min next pow range repr reversed round set slice sorted str sum tuple zip hash ord chr "
        "ArithmeticError AssertionError AttributeError BaseException Exception FloatingPointError IndexError KeyError "
        "LookupError NotImplementedError OverflowError RecursionError RuntimeError StopIteration TypeError ValueError ZeroDivisionError "
        "MemoryError SystemExit KeyboardInterrupt True False None Ellipsis NotImplemented").split()
CLOSED = set("main train evaluate show_task TASKS METHODS METHOD_FLAGS".split())  # they lead to what follows
ELSEWHERE = ("transformers", "harness.arguments", "harness.loading", "harness.run", "harness.screen")  # to files, to an exit
# Attributes that lead out of a value: to modules, frames, files, other processes, torch's settings.
OUT = (set(sys.stdlib_module_names) - {"copy", "select", "string", "numbers", "trace", "token", *MODULES}) | set(
    "load save tofile fromfile from_file dump memmap ctypes modules hub jit ops classes library compile get_device_module "
    "share_memory_ untyped_storage storage data_ptr gi_frame gi_code gi_yieldfrom f_back f_globals f_locals f_builtins f_code "
    "tb_frame tb_next cr_frame cr_code ag_frame ag_code mro utils overrides serialization multiprocessing distributed "
    "register_hook register_forward_hook register_forward_pre_hook set_num_threads".split())
SYSTEM = set("os sys io inspect time copy subprocess gc builtins importlib socket ctypes".split())
STORED = {"grad", "data", "requires_grad"}  # the only attributes that may be assigned
UNDERSCORED = {"_replace", "_asdict", "_fields", "_make", "_"}
NAMES = set("eval exec compile open input globals locals vars dir getattr setattr delattr breakpoint exit quit memoryview type "
            "super object classmethod staticmethod property help id".split())


class Refused(Exception):
    """Why a body is not run; one line."""


class Forbidden(BaseException):
    """What a body that was run must not do."""


# --- What is in a submission --------------------------------------------------------------------------------------


def exercises():
    return tomllib.loads((HERE / "exercises.toml").read_text())["exercise"]


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


def functions_in(tree, prefix=""):
    """{qualified name: its FunctionDef}; of two with one name the later, as in Python."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[prefix + node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= functions_in(node, f"{prefix}{node.name}.")
    return found


@functools.lru_cache
def functions_of(path):
    return functions_in(ast.parse(Path(path).read_text()))


def body_of(node):
    """A function's statements without its docstring."""
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def parsed(source):
    with warnings.catch_warnings():  # "\d" and the like: the student's affair
        warnings.simplefilter("ignore")
        return ast.parse(source)


def find(source, file, name):
    """The FunctionDef of a qualified name in a file's text; also in one that Python cannot read elsewhere."""
    try:
        try:
            node = functions_in(parsed(source)).get(name)
        except SyntaxError as error:
            lines, owner = source.splitlines(), name.rpartition(".")[2]
            start = next((i for i, line in enumerate(lines) if re.match(rf"\s*def {owner}\(", line)
                          and line.startswith(" ") == ("." in name)), None)
            if start is None:
                raise error
            indent = len(lines[start]) - len(lines[start].lstrip())
            end = next((i for i in range(start + 1, len(lines)) if lines[i].strip() and not lines[i].lstrip().startswith(")")
                        and len(lines[i]) - len(lines[i].lstrip()) <= indent), len(lines))
            tree = parsed(textwrap.dedent("\n".join(lines[start:end])))
            node = functions_in(ast.increment_lineno(tree, start))[owner]
    except SyntaxError as error:
        raise Refused(f"{file}, line {error.lineno}: Python cannot read this ({error.msg})")
    except (ValueError, RecursionError, MemoryError, KeyError) as error:
        raise Refused(f"{file}: Python cannot read this ({str(error)[:80]})")
    if node is None:
        raise Refused(f"{file}: there is no function {name}")
    return node


def is_stub(node):
    return all(isinstance(statement, ast.Pass)
               or isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
               or isinstance(statement, ast.Raise) and "NotImplementedError" in ast.dump(statement)
               for statement in body_of(node))


def dotted(node):
    """["torch", "func", "jvp"] of torch.func.jvp; None where a chain does not begin with a name."""
    names = []
    while isinstance(node, ast.Attribute):
        names, node = [node.attr, *names], node.value
    return [node.id, *names] if isinstance(node, ast.Name) else None


def refusal(body, file, modules, names=()):
    """Raise Refused at the first thing that no exercise needs and that could reach the grader.

    modules: {name: the module that it means, or None where torch is not loaded} of the file's own imports; names: what
    this exercise may not use, since it is the answer."""
    # Other modules are not there when the body runs, so their names are a body's own to use.
    modules = {name: module for name, module in modules.items() if name in MODULES}
    nodes = [node for statement in body for node in ast.walk(statement)]
    def refuse(node, what):
        raise Refused(f"refused: {file}, line {getattr(node, 'lineno', '?')}: {what} is not allowed in a graded body")
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                name = alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
                whole = name if isinstance(node, ast.Import) else node.module
                if whole not in MODULES or alias.name in OUT or alias.name[0] in "*_" or getattr(node, "level", 0):
                    refuse(node, f"import of {name}")
                if isinstance(node, ast.Import) or name in MODULES:
                    modules[alias.asname or alias.name.partition(".")[0]] = sys.modules.get(
                        name if alias.asname or isinstance(node, ast.ImportFrom) else name.partition(".")[0])
    roots = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)} | {
        node.arg for node in nodes if isinstance(node, ast.arg)}  # the body's variables, whatever they are called
    for node in nodes:
        if isinstance(node, (ast.ClassDef, ast.Global, ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)):
            refuse(node, {ast.ClassDef: "a class", ast.Global: "global"}.get(type(node), "async"))
        said = [getattr(node, field, None) for field in ("name", "id", "attr", "arg", "rest")]
        for name in said + getattr(node, "kwd_attrs", []):
            if isinstance(name, str) and (name.startswith("__") or name in names):
                refuse(node, name)
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)) and "__" in str(node.value):
            refuse(node, "a text with two underscores")
        if isinstance(node, ast.Name):
            if node.id in NAMES and node.id not in own:
                refuse(node, node.id)
            if node.id in modules and (id(node) not in roots or not isinstance(node.ctx, ast.Load)):
                refuse(node, f"the module {node.id} as a value")
            if node.id in SYSTEM and node.id not in own:
                refuse(node, f"the module {node.id}")
        if isinstance(node, ast.Attribute):
            if node.attr in OUT or node.attr.startswith("set_default") or (
                    node.attr.startswith("_") and node.attr not in UNDERSCORED):
                refuse(node, f".{node.attr}")
            if not isinstance(node.ctx, ast.Load) and node.attr not in STORED:
                refuse(node, f"assigning to .{node.attr}")
            chain = dotted(node)
            value = modules.get(chain[0]) if chain else None
            for name in chain[1:] if chain else ():
                if not isinstance(value, types.ModuleType):
                    break
                value = getattr(value, name, None)
                if isinstance(value, types.ModuleType) and value.__name__ not in MODULES:
                    refuse(node, f"the module {'.'.join(chain)}")
            if isinstance(value, types.ModuleType) and id(node) not in roots:  # from a variable it could not be followed
                refuse(node, f"the module {'.'.join(chain)} as a value")


# --- In the process of one exercise -------------------------------------------------------------------------------


def allowed_import(name, globals=None, locals=None, fromlist=(), level=0):
    if name not in MODULES or level:
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


def spliced(node, reference, module, printer):
    """The function with the reference's signature and the student's body, over names that lead nowhere else."""
    names = {name: value for name, value in vars(module).items()
             if not name.startswith("__") and name not in CLOSED
             and not str(getattr(value, "__module__", "")).startswith(ELSEWHERE)
             and (not isinstance(value, types.ModuleType) or value.__name__ in MODULES)}
    names["__builtins__"] = {name: getattr(builtins, name) for name in SAFE if hasattr(builtins, name)} | {
        "print": printer, "__import__": allowed_import}
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
def replaced(module, functions):
    """The module with these functions, {qualified name: function}, in place of its own."""
    true = []
    for name, function in functions.items():
        *owners, last = name.split(".")
        owner = module
        for part in owners:
            owner = getattr(owner, part)
        true.append((owner, last, vars(owner)[last]))
        setattr(owner, last, function)
    if not any("." in name for name in functions):
        for function in functions.values():  # functions of one exercise see each other
            function.__globals__.update(functions)
    try:
        yield
    finally:
        for owner, last, function in true:
            setattr(owner, last, function)


def explained(error, file):
    """One line of what went wrong in a test."""
    if type(error).__name__ == "Wrong":
        return str(error)[:MESSAGE]
    if isinstance(error, Forbidden):
        return f"refused: {error}"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"asked for more than {MIB} MiB of memory"
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == f"submission {file}"]
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    text = "".join(c if c.isprintable() else " " for c in text)[:MESSAGE]
    if isinstance(error, NameError):
        text += "; only the bodies of the listed functions are graded: put helpers and imports inside them"
    return (f"{file}, line {lines[-1]}: " if lines else "") + text


def failures(exercise, tests, seeds, file, hurt=()):
    """[(test, seed, message)] of the functions that now stand in the module; hidden seeds only if the visible one passes."""
    import torch
    found = []
    for seed in seeds:
        for name in exercise["tests"]:
            torch.set_default_dtype(torch.float32)
            torch.set_grad_enabled(True)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    getattr(tests, name)(seed)
            except BaseException as error:  # SystemExit, too
                found.append((name, seed, explained(error, file)))
            if hurt:
                return [(name, seed, f"refused: {hurt[0]}")]
        if found:
            break
    return found


def judge(exercise, sources, seeds, tests=None, check=True, before=lambda: (), hurt=()):
    """(passed, message) of one exercise; sources: {"amft": text, "tasks": text} of the submission.

    before() is called when all is loaded and student code has not run; hurt: what a guard then found."""
    file = f"{exercise['module']}.py"
    module = importlib.import_module(exercise["module"])
    tests = tests or importlib.import_module("test_exercises")
    theirs = functions_of(module.__file__)
    imports = {name: value for name, value in vars(module).items() if isinstance(value, types.ModuleType)}
    printer, functions = Printer(), {}
    try:
        for name in exercise["functions"]:
            node = find(sources[exercise["module"]], file, name)
            if check:
                refusal(body_of(node), file, imports, exercise.get("refused", ()))
            functions[name] = spliced(node, theirs[name], module, printer)
    except Refused as error:
        return False, str(error)
    except (SyntaxError, ValueError, RecursionError) as error:
        return False, f"{file}, line {getattr(error, 'lineno', '?')}: {str(error)[:MESSAGE]}"
    except Exception as error:  # a name that the signature needs
        return False, explained(error, file)
    before()
    with replaced(module, functions):
        found = failures(exercise, tests, seeds, file, hurt)
    if not found:
        return True, f"{len(exercise['tests'])} tests passed with {len(seeds)} seeds"
    hidden = " (a hidden seed)" if found[0][1] != VISIBLE else ""
    return False, "\n".join(f"{name}{hidden}: {message}" for name, _, message in found[:3])


def memory(key):
    """MiB of this process."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def guard(caught):
    """From now on this process cannot start another, open a file but a library's, or grow. What it tried is in caught."""
    import resource
    import sysconfig
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
    """One exercise: the job from stdin, the verdict to a pipe, behind the job's own word."""
    job = json.loads(sys.stdin.buffer.read())
    out = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    sys.path[:0] = [str(REFERENCE), str(HERE)]
    import torch
    torch.set_num_threads(1)
    exercise = next(e for e in exercises() if e["id"] == job["exercise"])
    importlib.import_module("amft")
    tests = importlib.import_module("test_exercises")
    if broken := failures(exercise, tests, [VISIBLE], f"{exercise['module']}.py"):  # also loads what torch loads late
        verdict = [None, f"the grader's own reference fails: {broken[0][2]}"]
    else:
        caught = []
        verdict = judge(exercise, job["sources"], job["seeds"], tests, job["check"], lambda: guard(caught), caught)
    os.write(out, (job["word"] + json.dumps(verdict)).encode()[:60000])
    os._exit(0)  # what student code left behind does not get to run


# --- The grader's side --------------------------------------------------------------------------------------------


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


def in_process(exercise, sources, seeds, seconds=SECONDS, check=True, prefix=()):
    """(passed, message, {seconds, cpu, mib}) of one exercise, in a process that cannot outlive this call."""
    word = secrets.token_hex(16)
    module = exercise["module"]
    job = dict(exercise=exercise["id"], sources={module: sources[module]}, seeds=list(seeds), check=check, word=word)
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
                if not chunk or len(said) > 200_000:
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
        _, status, usage = os.wait4(process.pid, 0) if process.returncode is None else (0, process.returncode, None)
        process.returncode = process.returncode if process.returncode is not None else os.waitstatus_to_exitcode(status)
        process.stdout.close()
    measured = dict(seconds=round(time.monotonic() - start, 1), mib=round(most))
    if why is None:
        try:
            text = said.decode()
            assert text.startswith(word)
            passed, why = json.loads(text.removeprefix(word))
            return passed, why, measured
        except (ValueError, AssertionError, TypeError):
            why = f"the process ended (exit status {process.returncode}) before there was a verdict"
    return False, why, measured


def imported(path):
    """Names that a file's own `import x` lines bind."""
    return [alias.asname or alias.name.partition(".")[0] for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import) for alias in node.names]


def hidden_seeds(student):
    text = os.environ.get("AMFT_COURSE_SECRET", "") + "\n" + student
    return sorted(random.Random(hashlib.sha256(text.encode()).hexdigest()).sample(VERIFIED, 3))


def read_submission(paths):
    """{"amft": text, "tasks": text} of what is there, [notes]."""
    sources, notes = {}, []
    for module in ("amft", "tasks"):
        name, found = f"{module}.py", []
        for path in map(Path, paths):
            root = path if path.is_dir() else path.parent
            candidates = path.rglob(name) if path.is_dir() else [path] * (path.name == name)
            for candidate in sorted(candidates, key=lambda p: (len(p.parts), p)):
                if candidate.is_symlink() or root.resolve() not in candidate.resolve().parents:
                    notes.append(f"{name}: a link, not read")
                elif not candidate.is_file():
                    notes.append(f"{name}: not a file")
                elif candidate.stat().st_size > 2 ** 20:
                    notes.append(f"{name}: larger than 1 MiB, not read")
                else:
                    found.append(candidate)
        if found:
            try:
                sources[module] = found[0].read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError):
                notes.append(f"{name}: is not a text in UTF-8")
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
            if surroundings(source, names) != surroundings((REFERENCE / f"{module}.py").read_text(), names):
                notes.append(f"{module}.py: what is changed outside of the exercises' bodies was not used")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            notes.append(f"{module}.py: Python cannot read the whole file; each function was read alone")
    return notes


def write(path, results):
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, path)


def grade(paths, out, student="", only=None, total=TOTAL, say=print):
    """Write results.json after each exercise; returns it."""
    listed, start = [e for e in exercises() if not only or e["id"] in only], time.monotonic()
    sources, notes = read_submission(paths)
    notes += remarks(sources, listed)
    seeds, prefix = [VISIBLE, *hidden_seeds(student)], without_network()
    tests = [dict(name=f"Exercise {e['id']}: {e['title']}", score=0, max_score=e["points"], status="failed", visibility="visible",
                  output="not graded: the grader was cut off before") for e in listed]
    results = dict(score=0, max_score=sum(e["points"] for e in listed), output="\n".join(notes), output_format="text",
                   stdout_visibility="hidden", tests=tests)
    write(out, results)
    for e, row in zip(listed, tests):
        file, measured = f"{e['module']}.py", {}
        try:
            if e["module"] not in sources:
                raise Refused(f"there is no {file} in the submission")
            nodes = [find(sources[e["module"]], file, name) for name in e["functions"]]
            for node in nodes:
                refusal(body_of(node), file, dict.fromkeys(imported(REFERENCE / file)), e.get("refused", ()))
            if undone := [name for name, node in zip(e["functions"], nodes) if is_stub(node)]:
                raise Refused(f"not done: {' and '.join(undone)}")
            left = min(SECONDS, total - (time.monotonic() - start))
            if left < 5:
                raise Refused(f"not graded: the exercises before took {total} s in all")
            passed, message, measured = in_process(e, sources, seeds, left, prefix=prefix)
        except Refused as error:
            passed, message = False, str(error)
        row.update(score=e["points"] if passed else 0, status="passed" if passed else "failed", output=message)
        results.update(score=sum(row["score"] for row in tests), execution_time=round(time.monotonic() - start))
        write(out, results)
        say(f"{row['score']:3d} of {row['max_score']}  {row['name']}: {message.splitlines()[0] if message else ''}"
            + (f"  [{measured['seconds']} s, {measured['mib']} MiB]" if measured else ""), flush=True)
    say(f"{results['score']} of {results['max_score']} in {time.monotonic() - start:.0f} s; see {out}")
    return results


def main():
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
