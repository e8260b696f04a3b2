"""The hunt for silent bugs: five of a pool, drawn from a student's id, and graded without reading code.

    python course/bughunt.py make --student ID --out FOLDER            # a folder to hand out; a minute or two
    python course/bughunt.py grade SUBMISSION --student ID --out results.json
    python course/bughunt.py check                                     # is every rule of the pool sound? many minutes
    python course/bughunt.py check --quick                             # one choice of each rule
    python course/bughunt.py check --quick --runs                      # and does the log of a run show it?

--private FILE (make, grade and check alike): a Python file with SECRET = "..." and, if wanted, RULES = [Rule(...), ...].
Without a secret everybody can draw everybody's bugs.

What is handed out holds all five bugs, and many changes that change nothing (a * b as b * a, a > b as b < a), so that
comparing it with the public file names no bug. A student's test is judged against files that hold one bug alone, and
against the right file, with and without the harmless changes. So bugs do not hide one another, whatever they do
together: a test must fail by its own bug. The five are in five functions, and no bug adds or removes a line: line numbers
are those of the handed-out file in all of them.
"""

import argparse
import ast
import fnmatch
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "bughunt"), str(HERE)]
import probes  # noqa: E402
import rules  # noqa: E402
import check as bodies  # noqa: E402
from grade import beside, facts  # noqa: E402

FILES = ("amft.py", "tasks.py")
BUGS, TEST, FIX, SYMPTOM = 5, 1.5, 1.0, 0.5  # how many; points for each part of one
LINES, SECONDS, MEMORY = 15, 60, 2 ** 30  # of a student's test; memory: beyond what importing takes
RUN = ("--task gp --steps 8 --warmup 2 --prompts 8 --samples 4 --sft-batch 16 --demos 200 --max-new-tokens 40 "
       "--meta-every 2 --eval-n 24")
# What a test may name besides what graded bodies may (check.py): attributes of policies and tokenizers, of errors.
MORE = set("value eos_token_id pad_token_id vocab_size decode encode pad input_ids attention_mask past_key_values get_input_embeddings "
           "position_ids chat_template backward numpy __init__".split())
MORE |= {name for name in dir(random.Random) if name[0] != "_"}
READS = set("load loads loadtxt genfromtxt fromfile fromregex memmap open_memmap save savez savez_compressed savetxt DataSource info "
            "show_config show_runtime get_include test lookfor source".split())
MAY_NOT_NAME = {"open", "exec", "eval", "compile", "globals", "locals", "vars", "getattr", "setattr", "delattr", "breakpoint",
                "input", "exit", "quit", "sys", "os", "inspect", "io", "Path", "importlib", "builtins", "subprocess"}  # in a fix
BUILT_IN = set("type object super property staticmethod classmethod".split())


# --- Bugs, and harmless changes ---


class Edit(NamedTuple):
    file: str
    line: int  # from 1
    start: int  # in bytes
    end: int
    text: str


class Bug(NamedTuple):
    rule: rules.Rule
    edit: Edit


@lru_cache(maxsize=None)
def source(file):
    return (ROOT / file).read_text()


@lru_cache(maxsize=None)
def tree(file):
    return ast.parse(source(file))


def edited(text, edits):
    """The text with edits that do not overlap; every line stays where it is."""
    lines = text.split("\n")
    for edit in sorted(edits, key=lambda edit: (edit.line, edit.start), reverse=True):
        line = lines[edit.line - 1].encode()
        lines[edit.line - 1] = (line[:edit.start] + edit.text.encode() + line[edit.end:]).decode()
    return "\n".join(lines)


def replacement(file, where, node, text):
    """The Edit that puts text in a node's place, in brackets if it would be read differently without them."""
    inside = rules.function(tree(file), where)
    lines = source(file).split("\n")[inside.lineno - 1:inside.end_lineno]
    lines[:0] = ["if 1:"]  # whatever the function's indentation is
    new = ast.parse(text).body[0]

    class Put(ast.NodeTransformer):
        def visit(self, at):
            if type(at) is type(node) and (at.lineno + inside.lineno - 2, at.col_offset, at.end_col_offset) == (
                    node.lineno, node.col_offset, node.end_col_offset):
                return new if isinstance(node, ast.stmt) else new.value
            return self.generic_visit(at)
    if not lines[1].startswith(" "):
        lines[0] = "pass"
    wanted = ast.dump(Put().visit(ast.parse("\n".join(lines))))
    for said in (text, f"({text})"):
        edit = Edit(file, node.lineno, node.col_offset, node.end_col_offset, said)
        try:
            if ast.dump(ast.parse(edited("\n".join(lines), [edit._replace(line=node.lineno - inside.lineno + 2)]))) == wanted:
                return edit
        except SyntaxError:
            pass
    raise ValueError(f"{file}:{node.lineno}: cannot put {text!r} there")


def choices(rule, rng=None):
    """Every Bug that a rule can make; with rng one of them."""
    file, where = rule.where.split(":")
    pairs = list(itertools.product(rules.places(rule, tree(file)), rules.variants(rule)))
    return [Bug(rule, replacement(file, where, *pair)) for pair in (pairs if rng is None else rng.sample(pairs, min(1, len(pairs))))]


def atom(text, node):
    simple = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant)
    return text if isinstance(node, simple) else f"({text})"


def harmless(file):
    """Edits that change how an expression is written, and not what it is."""
    text, found = source(file), []
    lines = text.split("\n")
    flips = {ast.Gt: "<", ast.Lt: ">", ast.GtE: "<=", ast.LtE: ">=", ast.Eq: "==", ast.NotEq: "!="}

    def said(node):
        line = lines[node.lineno - 1].encode()
        return atom(line[node.col_offset:node.end_col_offset].decode(), node)

    def look(node):
        if isinstance(node, ast.JoinedStr):  # places inside are not told rightly
            return
        new = None
        if getattr(node, "lineno", 0) == getattr(node, "end_lineno", -1) and "\n" not in ast.unparse(node):
            held = [type(x) for x in ast.walk(node)]
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                new = f"{said(node.right)} * {said(node.left)}"
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and not {ast.List, ast.Tuple, ast.JoinedStr} & set(held) and any(
                    isinstance(side, ast.BinOp) and isinstance(side.op, (ast.Mult, ast.Div, ast.Pow)) or
                    isinstance(side, ast.Constant) and isinstance(side.value, (int, float)) for side in (node.left, node.right)) and not any(
                    isinstance(x, ast.Constant) and isinstance(x.value, str) for x in ast.walk(node)):
                new = f"{said(node.right)} + {said(node.left)}"
            elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in flips:
                new = f"{said(node.comparators[0])} {flips[type(node.ops[0])]} {said(node.left)}"
            elif isinstance(node, ast.IfExp):
                new = f"{said(node.orelse)} if not {said(node.test)} else {said(node.body)}"
        if new and ast.NamedExpr not in held:
            try:
                ast.parse(new)
                found.append(Edit(file, node.lineno, node.col_offset, node.end_col_offset, new))
            except SyntaxError:
                pass
        for child in ast.iter_child_nodes(node):
            look(child)
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef):
            for statement in node.body:
                if not isinstance(statement, ast.FunctionDef):
                    look(statement)
    return sorted(set(found))


def decoys(rng, bugs, share=0.7):
    """A drawn part of the harmless edits, none on a bug's line, none inside another."""
    taken, out = {(bug.edit.file, bug.edit.line) for bug in bugs}, []
    for file in FILES:
        edits = harmless(file)
        rng.shuffle(edits)
        for edit in edits:
            apart = all(other.file != file or other.line != edit.line or other.end <= edit.start or edit.end <= other.start for other in out)
            if apart and (file, edit.line) not in taken and rng.random() < share:
                out.append(edit)
    return out


def private_of(file):
    """(secret, the pool) of an instructor's file: its rules are added to the pool, or are all of it (ALONE = True)."""
    if not file:
        return "", rules.RULES
    spec = importlib.util.spec_from_file_location("private", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, "SECRET", ""), [*rules.RULES * (not getattr(module, "ALONE", False)), *getattr(module, "RULES", [])]


def hunt_of(student, private=None):
    """(five Bugs, the harmless edits) of a student."""
    secret, pool = private_of(private)
    rng = random.Random(int.from_bytes(hashlib.sha256(f"hunt {secret} {student}".encode()).digest(), "big"))
    bugs = []
    for rule in rng.sample(pool, len(pool)):
        functions = {other.rule.where for other in bugs}
        in_tasks = sum(name.startswith("tasks.py") for name in functions)
        if rule.where not in functions and (in_tasks < 2 or not rule.where.startswith("tasks.py")):
            bugs += choices(rule, rng)
        if len(bugs) == BUGS:
            return bugs, decoys(rng, bugs)
    raise ValueError("the pool is too small")


def render(folder, edits):
    """The two files with edits, and what they need beside them."""
    folder.mkdir(parents=True)
    for file in FILES:
        (folder / file).write_text(edited(source(file), [edit for edit in edits if edit.file == file]))
    furnish(folder)
    for name in ("base", "base-vl"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def furnish(folder):
    """What the two files import, as it is."""
    for name in beside():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)


# --- A process of its own for whatever runs ---


def warm_up(policy=True):
    """Import what every file imports, once: children are forks. Nothing of the project is imported here."""
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", TOKENIZERS_PARALLELISM="false")
    sys.dont_write_bytecode = True
    for name in ("fractions", "torch", "torch.utils.checkpoint", "torch.nn.utils.rnn", "numpy", "tqdm",
                 "transformers.cache_utils", "transformers.modeling_utils", "transformers.modeling_layers",
                 "transformers.tokenization_utils_base", "transformers.models.auto.modeling_auto",
                 "transformers.models.auto.tokenization_auto", "transformers.generation.configuration_utils",
                 *("transformers.models.llama.modeling_llama", "transformers.generation.utils") * policy):
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)


def apart(folder, work, seconds=SECONDS, memory=None):
    """(how it ended, value or message) of work() in a fork that sees `folder` as the project."""
    result, output = folder.with_name(folder.name + ".result"), folder.with_name(folder.name + ".output")
    result.unlink(missing_ok=True)
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.setsid()
            os.chdir(folder)
            sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.argv = ["amft.py"]
            for name in list(sys.modules):
                if name.partition(".")[0] in ("amft", "tasks", "toy", "harness", "recipes"):
                    del sys.modules[name]
            sys.path[:] = [str(folder), str(HERE), str(HERE / "bughunt")] + [
                p for p in sys.path if not Path(p or ".").resolve().is_relative_to(ROOT)]
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 26, 2 ** 26))
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
            if memory and Path("/proc/self/statm").exists():
                now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
            value = work()
            result.write_text(json.dumps(value))
            code = 0
        except BaseException as error:  # also SystemExit: whatever ends a test early is no pass
            try:
                result.write_text(json.dumps(f"{type(error).__name__}: {error}"[:500]))
            except BaseException:
                pass
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timed out", f"was cut after {seconds} s"
        time.sleep(0.01)
    try:
        os.killpg(child, signal.SIGKILL)  # what it left behind
    except ProcessLookupError:
        pass
    code = os.waitstatus_to_exitcode(done[1])
    value = json.loads(result.read_text()) if result.exists() and result.stat().st_size else ""
    return "ok" if code == 0 else "failed" if code == 1 else "died", value


def probe(rule):
    """What the rule's function gives: work for apart()."""
    import amft
    import tasks
    return probes.flat(probes.of(rule)(amft, tasks))


def short_run(flags):
    """The log of a short run: work for apart()."""
    import amft
    import tasks
    splits = tasks.GeneralPoints.splits
    tasks.GeneralPoints.splits = {name: splits[name] for name in ("val", "ood_rule")}
    try:
        return probes.log(amft, flags)
    except SystemExit:
        raise ValueError("the run stopped with an error")


class Workshop:
    """Folders with files, made as they are asked for, in one that goes away."""
    def __init__(self, folder):
        self.folder, self.numbers, self.made, self.known = Path(folder), itertools.count(), {}, {}

    def files(self, *edits):
        if edits not in self.made:
            # The name says nothing to a test that looks.
            self.made[edits] = render(self.folder / f"{next(self.numbers)}" / "project", edits)
        return self.made[edits]

    def probed(self, rule, *edits):
        key = probes.of(rule).__name__, edits
        if key not in self.known:
            self.known[key] = apart(self.files(*edits), lambda: probe(rule))
        return self.known[key]


# --- make ---

ABOUT = """# Bug hunt of {student}

`amft.py` and `tasks.py` here hold five silent bugs, each in one line of another function. They run. Many other lines look
different from the published file and do the same: comparing files names no bug. What they import, `harness/` and
`recipes/`, holds none.

{logs}For each bug fill in two files in `answers/`, whichever number you give it:

- `test_bug1.py`: at most 15 lines (empty ones and comments do not count) with functions `test_...()` without arguments. It
  passes on the right files and fails on files with this one bug. It may import amft, tasks, torch, numpy, pytest, math,
  random, json, itertools, functools, fractions, collections, copy, types, dataclasses, and name of them what works on
  numbers: nothing that reads a file or a function's own code, no text with two underscores, no `.format` (an f-string
  does it). It runs alone, at most a minute.
- `bug1.txt`: the file, the number of the line, that line as it should be (its indentation may be left out), and what a
  user would see, in words.

    python -m pytest -q answers        # here all your tests should fail, and after all five fixes pass

Points for each: test 1.5, fix 1, symptom 0.5. Your test meets files with one bug alone, not this one with five.
"""
LOGS = """`logs/bug1.jsonl` is the log of a short run with one of the bugs alone, `logs/right1.jsonl` of the same run of the right
files; the run's flags are its first row. So for 2 to 5. A log shows what to ask, the paper and the docstrings what is right.

"""
ANSWER = "file: \nline: \nfix: \nsymptom: \n"


def make(student, out, private=None, logs=True):
    """The folder that a student gets."""
    out = Path(out)
    if out.exists():
        raise ValueError(f"--out {out}: is there already")
    bugs, changes = hunt_of(student, private)
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(folder)
        (out / "answers").mkdir(parents=True)
        for file in FILES:
            edits = [edit for edit in [*changes, *(bug.edit for bug in bugs)] if edit.file == file]
            (out / file).write_text(edited(source(file), edits))
        furnish(out)
        shutil.copytree(ROOT / "base", out / "base", ignore=shutil.ignore_patterns("early", "*.py", "__pycache__"))
        (out / "README.md").write_text(ABOUT.format(student=student, logs=LOGS * logs))
        (out / "answers" / "conftest.py").write_text("import sys\nsys.path.insert(0, '.')\n")
        for i, bug in enumerate(bugs, 1):
            (out / "answers" / f"test_bug{i}.py").write_text("# at most 15 lines; imports amft, or tasks\n")
            (out / "answers" / f"bug{i}.txt").write_text(ANSWER)
            if logs:
                (out / "logs").mkdir(exist_ok=True)
                flags = f"{RUN} {bug.rule.flags}"
                for name, edits in (("right", ()), ("bug", (bug.edit,))):
                    end, rows = apart(shop.files(*edits), lambda: short_run(flags), 300)
                    rows = rows if end == "ok" else [dict(kind="error", text=f"{end}: {rows}")]
                    rows = [dict(kind="run", flags=flags), *rows]
                    (out / "logs" / f"{name}{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return bugs, changes


# --- grade ---


@lru_cache(maxsize=None)
def allowed():
    """{module: what of it a test may name}."""
    import numpy
    import torch

    def of(file):
        names = set()
        for node in tree(file).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.ImportFrom):
                names |= {alias.asname or alias.name for alias in node.names} - {"Path"}
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
        return names
    arrays = {name for name in vars(numpy) if name[0] != "_" and not isinstance(getattr(numpy, name), type(numpy))} - READS
    more = {"amft": of("amft.py"), "tasks": of("tasks.py"), "pytest": {"approx", "raises", "fail"}, "numpy": arrays,
            "numpy.random": {"default_rng", "seed", "rand", "randn", "random", "randint", "normal"},
            "numpy.linalg": bodies.public(numpy.linalg, callable), "types": {"SimpleNamespace"},
            "random": set("Random seed random randint choice sample shuffle gauss uniform".split()),
            "dataclasses": {"replace", "dataclass", "field", "asdict", "astuple"}, "copy": {"copy", "deepcopy"}}
    found = {**bodies.modules(), **more}
    return {**found, "torch": found["torch"] | {"manual_seed", "get_rng_state", "set_rng_state", "allclose"}, "torch.optim": bodies.public(torch.optim, lambda x: isinstance(x, type)),
        "torch.testing": {"assert_close"}, "torch.nn": found["torch.nn"] | {"Module"}}


def refused(text, lines):
    """Why a test may not run, or None. Whatever could tell two files apart by more than what they do is on no list."""
    try:
        whole = ast.parse(text)
        nodes = list(ast.walk(whole))
        bodies.measured(whole.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"is not Python: {error}"
    except bodies.Refused as error:
        return f"has more than a test may have: {error}"
    said = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    if len(said) > lines or any(len(line) > 160 for line in said) or ";" in text:
        return f"has {len(said)} lines; at most {lines}, none longer than 160, no ';'"

    def refuse(part, what, why=""):
        raise bodies.Refused(f"names {what} in line {getattr(part, 'lineno', '?')}, which it may not")
    try:
        as_modules, things = bodies.imports_of(nodes, allowed(), refuse)
        known = bodies.attributes() | MORE | of_arrays() | of_classes() | own_attributes(nodes)
        named = things | set(bodies.SAFE) | BUILT_IN
        for part in nodes:
            bodies.listed(part, nodes, allowed(), as_modules, named, known, refuse, lambda part: refuse(part, part.id),
                          ("amft", "tasks"))
    except bodies.Refused as error:
        return str(error)
    return None


@lru_cache(maxsize=None)
def of_arrays():
    import numpy
    return {name for name in dir(numpy.ndarray) if name[0] != "_"} - {"tofile", "dump", "dumps", "ctypes", "data", "setfield"}


@lru_cache(maxsize=None)
def of_classes():
    return frozenset(facts()["fields"]) - bodies.OUT


def own_attributes(nodes):
    """What the test's own classes and stand-ins are given: names that it sets itself."""
    functions = {part.name for part in nodes if isinstance(part, ast.FunctionDef)}
    stored = {part.attr for part in nodes if isinstance(part, ast.Attribute) and not isinstance(part.ctx, ast.Load)}
    keywords = {part.arg for part in nodes if isinstance(part, ast.keyword) and part.arg}
    return {name for name in functions | stored | keywords if not name.startswith("_")} - bodies.OUT - {
        name for name in functions | stored | keywords if name.startswith(("co_", "f_", "tb_", "gi_"))}


def run_test(text):
    """Every test_ function of a text: work for apart()."""
    space = {"__name__": "test"}
    exec(compile(text, "test", "exec"), space)
    tests = [value for name, value in space.items() if name.startswith("test") and callable(value)]
    if not tests:
        raise ValueError("no function test_...")
    for test in tests:
        test()
    return "passed"


def tested(shop, text, bugs, changes, seconds=SECONDS):
    """(which bugs the test tells from the right file, what happened, in words)."""
    if why := refused(text, LINES):
        return set(), f"the test {why}"
    if not any(isinstance(node, ast.FunctionDef) and node.name.startswith("test") for node in ast.walk(ast.parse(text))):
        return set(), "no test"

    def run(*edits):
        return apart(shop.files(*edits), lambda: run_test(text), seconds, MEMORY)
    for edits in ((), changes, ()):  # thrice: chance is no test
        end, said = run(*edits)
        if end != "ok":
            return set(), f"the test does not pass on the right file: {end}, {said}"
    found = set()
    for i, bug in enumerate(bugs):
        if all(run(*edits)[0] == "failed" for edits in ((bug.edit,), (*changes, bug.edit))):
            found.add(i)
    return found, "" if found else "the test passes on the right file, and on (or was cut on) every file with a bug"


def answer_of(file):
    """{"file", "line", "fix", "symptom"} of a bugN.txt."""
    fields = {}
    for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
        name, colon, value = line.partition(":")
        if colon and name.strip() in ("file", "line", "fix", "symptom") and name.strip() not in fields:
            fields[name.strip()] = value.strip()
        elif "symptom" in fields:
            fields["symptom"] += " " + line.strip()
    return fields


def fixed(shop, answer, bugs, changes):
    """(which bugs the fix mends, what happened, in words)."""
    file, number, fix = answer.get("file", ""), answer.get("line", ""), answer.get("fix", "")
    if not fix:
        return set(), "no fix"
    if file not in FILES or not number.isdigit() or not 1 <= int(number) <= source(file).count("\n"):
        return set(), "file is amft.py or tasks.py, line is a number"
    number, found = int(number), set()
    for i, bug in enumerate(bugs):
        if bug.edit.file != file:
            continue
        lines = edited(source(file), [e for e in (*changes, bug.edit) if e.file == file]).split("\n")
        whole = edited(source(file), [e for e in changes if e.file == file])
        line = lines[number - 1]
        edit = Edit(file, number, len(line) - len(line.lstrip()), len(line.encode()), fix)
        text = edited("\n".join(lines), [edit])
        try:
            if ast.dump(ast.parse(text)) == ast.dump(ast.parse(whole)):
                found.add(i)
                continue
        except (SyntaxError, ValueError):
            return set(), f"line {number} of {file} is not Python with this fix"
        node = rules.function(tree(file), bug.rule.where.split(":")[1])
        before = set(x for n in ast.walk(ast.parse("\n".join(lines))) for x in (getattr(n, "id", ""), getattr(n, "attr", "")))
        after = set(x for n in ast.walk(ast.parse(text)) for x in (getattr(n, "id", ""), getattr(n, "attr", "")))
        new = {name for name in after - before if name in MAY_NOT_NAME or name.startswith("__")}
        if new or "import" in fix.split() or "__" in fix or "format" in fix:
            return set(), "the fix names something that it may not"
        if not node.lineno <= number <= node.end_lineno:
            continue
        folder = render(shop.folder / f"{next(shop.numbers)}" / "project", [*changes, bug.edit])
        (folder / file).write_text(text)
        end, values = apart(folder, lambda: probe(bug.rule), SECONDS, MEMORY)
        right = shop.probed(bug.rule)
        if end == "ok" == right[0] and not probes.differs(values, right[1]):
            found.add(i)
    return found, "" if found else f"line {number} of {file} with this fix does not give the right behaviour"


def grade(submission, student, private=None, seconds=SECONDS):
    """Gradescope's results of a submission: a folder with answers, or those themselves."""
    folder = Path(submission) / "answers" if (Path(submission) / "answers").is_dir() else Path(submission)
    bugs, changes = hunt_of(student, private)
    changes, seen = tuple(changes), []
    with tempfile.TemporaryDirectory() as work:
        shop = Workshop(work)
        for number in range(1, BUGS + 1):
            file, answer = folder / f"test_bug{number}.py", answer_of(folder / f"bug{number}.txt")
            text = file.read_text(errors="replace") if file.exists() else ""
            seen.append((tested(shop, text, bugs, changes, seconds), fixed(shop, answer, bugs, changes), answer))

    def points(seen, i):
        test, fix = TEST * (i in seen[0][0]), FIX * (i in seen[1][0])
        words = len(seen[2].get("symptom", "").split()) >= 6
        return test, fix, SYMPTOM * (words and test + fix > 0)
    # Whichever number a student gave a bug: each bug counts once, the best way round.
    best = max(itertools.permutations(range(BUGS)), key=lambda order: sum(sum(points(s, i)) for s, i in zip(seen, order)))
    tests = []
    for number, (answer, i) in enumerate(zip(seen, best), 1):
        test, fix, symptom = points(answer, i)
        said = [f"test {test} of {TEST}" + (f" ({answer[0][1]})" if answer[0][1] else "" if test else " (finds a bug that another of your tests finds)"),
                f"fix {fix} of {FIX}" + (f" ({answer[1][1]})" if answer[1][1] else "" if fix else " (mends another bug than the test finds)"),
                f"symptom {symptom} of {SYMPTOM}" + (f": {answer[2]['symptom']}" if symptom else "" if answer[2].get("symptom") else " (none)")]
        tests.append(dict(name=f"Bug hunt {number}", score=test + fix + symptom, max_score=TEST + FIX + SYMPTOM, output="\n".join(said)))
    return dict(score=sum(test["score"] for test in tests), tests=tests)


# --- check ---


def mutants():
    """[(file, text with the bug, line where it begins, lines that it changes)] of the rows of benchmarks/mutants.py."""
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "benchmarks" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = []
    for file, old, new, *_ in module.MUTANTS:
        if file in FILES and source(file).count(old) == 1:
            line = source(file)[:source(file).index(old)].count("\n") + 1
            text = source(file).replace(old, new)
            pairs = itertools.zip_longest(text.split("\n"), source(file).split("\n"))
            out.append((file, text, line, [i for i, (a, b) in enumerate(pairs, 1) if a != b]))
    return out


def is_known(bug, known):
    """Is it one of these mutants?"""
    near = [text for file, text, _, lines in known if file == bug.edit.file and lines == [bug.edit.line]]
    text = edited(source(bug.edit.file), [bug.edit])
    return any(ast.dump(ast.parse(text)) == ast.dump(ast.parse(other)) for other in near)


def check(only="*", quick=False, private=None, runs=False, seed=""):
    """Every rule applies, gives files that compile and another behaviour, also than the known bugs'. Returns the faults."""
    rng, faults, made = random.Random(f"check {seed}"), [], 0
    known = mutants()
    pool = [rule for rule in private_of(private)[1] if fnmatch.fnmatchcase(f"{rule.where} {rule.old}", only)]
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(folder)
        _, changes = hunt_of("check")
        changes = tuple(changes)
        for rule in pool:
            began, wrong = time.monotonic(), []
            try:
                bugs = choices(rule, rng if quick else None)
                if not bugs:
                    raise ValueError("applies nowhere")
            except (ValueError, SyntaxError, StopIteration) as error:
                faults.append(f"{rule.where}: {rule.old}: {error}")
                print(faults[-1], flush=True)
                continue
            total = len(rules.places(rule, tree(rule.where.split(":")[0]))) * len(list(rules.variants(rule)))
            right = shop.probed(rule)
            if right[0] != "ok":
                wrong.append(f"the right file fails its own test: {right}")
            if not quick:
                end = shop.probed(rule, *changes)
                if end[0] != "ok" or probes.differs(end[1], right[1], 0):
                    wrong.append(f"the harmless changes change something: {end[0]} {str(end[1])[:200]}")
            node = rules.function(tree(rule.where.split(":")[0]), rule.where.split(":")[1])
            near = [] if quick else [(file, text) for file, text, line, _ in known
                                     if file == rule.where.split(":")[0] and node.lineno <= line <= node.end_lineno]
            theirs = []
            for file, text in near:
                key = probes.of(rule).__name__, text
                if key not in shop.known:
                    other = render(shop.folder / f"{next(shop.numbers)}" / "project", [])
                    (other / file).write_text(text)
                    shop.known[key] = apart(other, lambda: probe(rule))
                theirs.append(shop.known[key])
            for bug in bugs:
                made += 1
                if is_known(bug, known):
                    wrong.append(f"{bug.edit.text}: is in benchmarks/mutants.py")
                end, values = shop.probed(rule, bug.edit)
                if end == "ok" and right[0] == "ok" and not probes.differs(values, right[1]):
                    wrong.append(f"{bug.edit.text}: behaves as the right file does")
                if end not in ("ok", "failed"):
                    wrong.append(f"{bug.edit.text}: {end}")
                if end == "failed":
                    print(f"    {bug.edit.text}: fails visibly: {values[:100]}")
                for other in theirs:
                    if end == other[0] == "ok" and not probes.differs(values, other[1]):
                        wrong.append(f"{bug.edit.text}: behaves as a bug of benchmarks/mutants.py")
            if runs:  # the log of one choice shows it
                bug = rng.choice(bugs)
                flags = f"{RUN} {rule.flags}"
                if ("log", flags) not in shop.known:
                    shop.known["log", flags] = apart(shop.files(), lambda: short_run(flags), 300)
                ends = shop.known["log", flags], apart(shop.files(bug.edit), lambda: short_run(flags), 300)
                logs = [probes.flat(end[1]) for end in ends]
                if ends[0][0] != "ok":
                    wrong.append(f"the right file's run: {ends[0]}")
                if ends[1][0] == "timed out" or not probes.differs(*logs):
                    wrong.append(f"{bug.edit.text}: the log does not show it ({ends[1][0]})")
            faults += [f"{rule.where}: {fault}" for fault in wrong]
            print(f"{'ok' if not wrong else 'FAULT':6}{rule.where}  {rule.old}  {len(bugs)} of {total} choices  {time.monotonic() - began:.1f} s",
                  *wrong, sep="\n      ", flush=True)
    print(f"{len(pool)} rules, {made} bugs, {len(faults)} faults")
    return faults


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("make", "grade", "check"):
        command = commands.add_parser(name)
        command.add_argument("--private", help="a file with SECRET and RULES")
        if name == "check":
            command.add_argument("--only", default="*", metavar="GLOB", help="rules whose 'file:function expression' matches")
            command.add_argument("--quick", action="store_true", help="one choice of each rule, not compared with mutants")
            command.add_argument("--runs", action="store_true", help="and a short run of one choice of each, whose log must show it")
        else:
            command.add_argument("--student", required=True, help="the id that draws the bugs")
            command.add_argument("--out", required=True, help="the folder (make) or results.json (grade)")
        if name == "make":
            command.add_argument("--no-logs", action="store_true", help="make no runs")
        if name == "grade":
            command.add_argument("submission", help="the student's folder, or its answers")
            command.add_argument("--seconds", type=int, default=SECONDS, help="that a test may take")
    given = parser.parse_args(argv)
    warm_up(given.command == "check" or given.command == "make" and not given.no_logs)
    if given.command == "check":
        sys.exit(bool(check(given.only, given.quick, given.private, given.runs)))
    if given.command == "make":
        if not private_of(given.private)[0]:
            print("bughunt.py: no SECRET: whoever has this repository and the id can draw these bugs", file=sys.stderr)
        _, changes = make(given.student, given.out, given.private, not given.no_logs)
        return print(f"{BUGS} bugs and {len(changes)} harmless changes in {given.out}")
    results = grade(given.submission, given.student, given.private, given.seconds)
    Path(given.out).write_text(json.dumps(results, indent=1) + "\n")
    print(f"{results['score']} of {BUGS * (TEST + FIX + SYMPTOM)}; see {given.out}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        print(f"bughunt.py: {error}", file=sys.stderr)
        sys.exit(2)
