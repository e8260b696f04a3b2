"""What an exercise's function is asked, what it answered in plain data, and what that answer is worth.

A case is a call: a function's name, its arguments, and checks of what comes back. `perform` makes the call, where
student code is; `judged` compares, where none has run: all that passes from the one to the other is JSON, in which a
tensor is its dtype, its shape and its bytes. Nothing in this file knows how a right answer is computed.
"""

import base64
import binascii
import json
import math
import traceback
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
TEXT, NUMBERS, DEEP = 20_000, 100_000, 12  # the most characters, numbers of a tensor, nested tuples


class Made(NamedTuple):
    """A value of a class of amft.py, tasks.py or this file, which is made where the call is made."""
    name: str
    fields: tuple


class Check(NamedTuple):
    """One comparison. `mistakes` names a hint for each value that a typical mistake would give."""
    what: str
    expected: Any  # a tensor, a number or a text
    path: tuple = ()  # where in the answer: (1, 0) is the second part's first
    mistakes: dict = {}  # hint: values; of a text {outcome or "*": hint}
    rtol: float = 1e-9
    scale: Any = None  # what rtol is a share of; None: the largest entry
    axes: tuple = ("row", "token")
    lost: str = ""  # hint where the answer is not finite, or one number everywhere
    nearly: tuple = ()  # (hint, share): right in its first digits only
    masked: tuple = ()  # (hint, mask): right where the mask is 1
    share: float = 0.0  # how near to a mistake, as a share of its own size
    nothing: str = ""  # hint where no gradient reaches the argument


class Case(NamedTuple):
    function: str
    args: tuple
    kwargs: dict
    checks: tuple
    parts: tuple = ()  # (how many, their names) where the answer is a tuple
    slope: tuple = ()  # ("gradient", argument, weights) or ("tangent", a tangent for each argument)
    errors: dict = {}  # an exception's name: the hint
    weight: float = 0.0  # of the answer's first number in a sum over cases
    total: Any = None  # the Check of that sum, at its last case
    relations: Any = None  # the grader's: says what is wrong with a whole answer, or raises Wrong


class Wrong(AssertionError):
    """A verdict; its text is what a student reads."""


class Other(NamedTuple):
    """What came back and is no plain data: the name of its type."""
    name: str


def hints(folder=HERE):
    """{name: the question at the end of a message}"""
    table = tomllib.loads((folder / "exercises.toml").read_text())["exercise"]
    return {name: text for each in table for name, text in each["hints"].items()}


# --- Plain data ---------------------------------------------------------------------------------------------------


def dtypes():
    import torch
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"
    return {name: getattr(torch, name) for name in names.split()}


def is_tensor(value):
    return type(value).__name__ in ("Tensor", "Parameter") and hasattr(value, "untyped_storage")


def packed(value, deep=0):
    """A value as JSON can hold it. What is neither number, text, tensor nor tuple is told by its type's name."""
    kind = type(value)
    if deep > DEEP:
        return {"other": "too deep"}
    if value is None or kind in (bool, float) or kind is int and abs(value) < 2 ** 63:
        return value
    if kind is str:
        return value[:TEXT]
    if is_tensor(value):
        import torch
        value = value.detach().cpu().contiguous()
        name = str(value.dtype).removeprefix("torch.")
        if name not in dtypes() or value.numel() > NUMBERS or value.layout is not torch.strided:
            return {"other": f"Tensor of {value.numel()} {name}"}
        raw = value.reshape(-1).view(torch.uint8) if value.numel() else value.new_zeros(0, dtype=torch.uint8)
        text = base64.b64encode(bytes(raw.tolist())).decode()
        return {"tensor": [name, list(value.shape), text]}
    if hasattr(kind, "_fields"):
        return {"made": [kind.__name__, [packed(part, deep + 1) for part in value]]}
    if kind in (tuple, list):
        return {kind.__name__: [packed(part, deep + 1) for part in value[:1000]]}
    if kind is dict:
        return {"dict": [[packed(k, deep + 1), packed(v, deep + 1)] for k, v in list(value.items())[:100]]}
    return {"other": kind.__name__[:80]}


def packed_made(value):
    """The same, of arguments: a Made keeps its name."""
    if type(value) is Made:
        return {"made": [value.name, [packed_made(part) for part in value.fields]]}
    if type(value) in (tuple, list):
        return {type(value).__name__: [packed_made(part) for part in value]}
    if type(value) is dict:
        return {"dict": [[packed_made(k), packed_made(v)] for k, v in value.items()]}
    return packed(value)


def unpacked_tensor(said):
    import torch
    name, shape, text = said
    dtype, size = dtypes()[name], 1
    if not isinstance(shape, list) or len(shape) > 8 or not isinstance(text, str):
        raise ValueError("no tensor")
    for n in shape:
        if type(n) is not int or not 0 <= n <= NUMBERS:
            raise ValueError("no shape")
        size *= n
    raw = base64.b64decode(text, validate=True) if size <= NUMBERS else b""
    if size > NUMBERS or len(raw) != size * torch.empty(0, dtype=dtype).element_size():
        raise ValueError("its bytes are not those of its shape")
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def unpacked(data, deep=0):
    """The value of what packed() wrote; ValueError for anything else."""
    if data is None or type(data) in (bool, int, float, str):
        return data
    if type(data) is not dict or len(data) != 1 or deep > 2 * DEEP:
        raise ValueError("not what packed() writes")
    (kind, said), = data.items()
    try:
        if kind == "other" and type(said) is str:
            return Other(said[:80])
        if type(said) is not list:
            raise ValueError(kind)
        if kind == "tensor":
            return unpacked_tensor(said)
        if kind == "made":
            name, fields = said
            return Made(str(name)[:80], tuple(unpacked(part, deep + 1) for part in fields))
        if kind in ("tuple", "list"):
            parts = [unpacked(part, deep + 1) for part in said]
            return tuple(parts) if kind == "tuple" else parts
        if kind == "dict":
            return {unpacked(k, deep + 1): unpacked(v, deep + 1) for k, v in said}
    except (KeyError, TypeError, binascii.Error) as error:
        raise ValueError(str(error))
    raise ValueError(f"{kind}?")


def request_of(case):
    """What the side with student code is told: the call, and no check."""
    return packed_made([case.function, case.args, case.kwargs, case.slope])


def packed_case(case):
    """A whole case; its checks are expected values, not how to get them."""
    return packed_made([*case._replace(relations=None, checks=[list(c) for c in case.checks],
                                       total=case.total and list(case.total))])


def unpacked_case(data):
    case = Case(*unpacked(data))
    return case._replace(checks=tuple(Check(*c) for c in case.checks), total=case.total and Check(*case.total))


# --- The call -----------------------------------------------------------------------------------------------------


def policy_class():
    """As much of a policy as exercise 8 asks for; a class that needs torch is made when it is used."""
    import torch

    class Policy(torch.nn.Module):
        """Logits from the mean of the tokens so far: small, causal, in float64, called as a policy of amft.py is."""

        def __init__(self, embedding, head):
            super().__init__()
            self.embedding, self.head = torch.nn.Parameter(embedding.clone()), torch.nn.Parameter(head.clone())

        def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=slice(None), use_cache=None,
                    output_hidden_states=False):
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            real = real.unsqueeze(-1).to(self.embedding.dtype)
            seen = (self.embedding[input_ids] * real).cumsum(1) / real.cumsum(1).clamp(min=1)
            return SimpleNamespace(logits=(torch.tanh(seen) @ self.head)[:, logits_to_keep], hidden_states=None)
    return Policy


def made(value, module):
    """Arguments with each Made as what it stands for."""
    if type(value) is Made:
        fields = [made(part, module) for part in value.fields]
        if value.name == "SimpleNamespace":
            return SimpleNamespace(**fields[0])
        if value.name == "settings":
            return module.settings(**fields[0])
        return (policy_class() if value.name == "Policy" else getattr(module, value.name))(*fields)
    if type(value) in (tuple, list):
        return type(value)(made(part, module) for part in value)
    return {k: made(v, module) for k, v in value.items()} if type(value) is dict else value


def tensors_in(value):
    if is_tensor(value):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


def function_of(module, name):
    for part in name.split("."):
        module = getattr(module, part)
    return module


def perform(request, module):
    """{"answer": plain data, "changed": was an argument changed in place?} of a request; what it raises, it raises."""
    name, args, kwargs, slope = unpacked(request)
    function = function_of(module, name)
    if module.__name__ == "tasks":
        return dict(answer=packed(function(*made(args, module), **kwargs)), changed=False)
    import torch
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    args, kwargs = made(args, module), made(kwargs, module)
    if slope and slope[0] == "tangent":
        chosen = [i for i, tangent in enumerate(slope[1]) if tangent is not None]

        def moved(*some):
            return function(*[some[chosen.index(i)] if i in chosen else arg for i, arg in enumerate(args)], **kwargs)
        answer = torch.func.jvp(moved, tuple(args[i] for i in chosen), tuple(slope[1][i] for i in chosen))[1]
        return dict(answer=packed(answer), changed=False)
    if slope:
        args = list(args)
        args[slope[1]] = x = args[slope[1]].clone().requires_grad_()
    given = list(tensors_in([*args, *kwargs.values()]))
    before = [tensor.detach().clone() for tensor in given]
    answer = function(*args, **kwargs)
    changed = any(not torch.equal(tensor.detach(), copy) for tensor, copy in zip(given, before))
    if slope:
        if not is_tensor(answer) or not answer.requires_grad:
            return dict(answer={"other": "no gradient"}, changed=changed)
        whole = answer.sum() if slope[2] is None else (answer * slope[2]).sum()
        answer, = torch.autograd.grad(whole, x, allow_unused=True)
        answer = torch.zeros_like(x) if answer is None else answer
    return dict(answer=packed(answer), changed=changed)


def explained(error, file, signature=""):
    """One line of what went wrong in student code, with the line of the file where it did."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "asked for more memory than an exercise may use"
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__)
             if Path(frame.f_code.co_filename).name in (file, f"submission {file}")]
    text = f"{type(error).__name__}: {str(error)[:600]}".removesuffix(": ")
    text = "".join(c if c.isprintable() else " " for c in text)
    if isinstance(error, NameError):
        text += f"; the signature is the reference's{signature}, and helpers and imports go inside the body"
    return (f"{file}, line {lines[-1]}: " if lines else "") + text


# --- The verdict --------------------------------------------------------------------------------------------------


def near(a, b, rtol, scale):
    return bool(((a - b).abs() <= rtol * scale).all())  # False for nan


def at_path(case, answer):
    """The answer's parts, as the checks' paths count them."""
    if not case.parts or case.slope:
        return answer
    n, names = case.parts
    if not isinstance(answer, tuple) or type(answer) is not tuple or len(answer) != n:
        size = f" of {len(answer)}" if type(answer) in (tuple, list) else ""
        raise Wrong(f"{case.function}: expected a tuple of {n}, {names}; got a {kind_of(answer)}{size}")
    return answer


def kind_of(value):
    return value.name if type(value) in (Other, Made) else "NoneType" if value is None else type(value).__name__


def part_of(check, answer):
    for i in check.path:
        fields = answer.fields if type(answer) is Made else answer
        if type(fields) not in (tuple, list) or i >= len(fields):
            raise Wrong(f"{check.what}: is not there; the answer holds a {kind_of(answer)} in its place")
        answer = fields[i]
    return answer


def fail(text, hint, known):
    raise Wrong(f"{text}; {known[hint]}" if hint else text)


def compare(check, actual, known):
    """Raise Wrong unless `actual` is what the check expects."""
    import torch
    expected, what = check.expected, check.what
    if type(expected) is str:
        if type(actual) is not str:
            raise Wrong(f"{what}: a {kind_of(actual)}, expected the name of an outcome")
        if actual != expected:
            hint = check.mistakes.get(actual, check.mistakes.get("*"))
            fail(f"{what}: {actual[:40]!r}, expected {expected!r}", hint, known)
        return
    if type(expected) is Made:  # a class
        if kind_of(actual) != expected.name:
            raise Wrong(f"{what}: a {kind_of(actual)}, expected an {expected.name}")
        return
    if not is_tensor(expected):
        if type(actual) is not float and type(actual) is not int:
            raise Wrong(f"{what}: a {kind_of(actual)}, expected a Python float")
        actual, expected = (torch.tensor(float(x), dtype=torch.float64) for x in (actual, expected))
    if type(actual) is Other and actual.name == "no gradient":
        fail(f"{what}: there is none", check.nothing, known)
    if not is_tensor(actual):
        raise Wrong(f"{what}: a {kind_of(actual)}, expected a tensor of shape {tuple(expected.shape)}")
    if actual.shape != expected.shape:
        raise Wrong(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if actual.dtype != expected.dtype:
        raise Wrong(f"{what}: {actual.dtype}, expected {expected.dtype}; see what the docstring says of it, or the arguments have")
    scale = expected.abs().max().item() if check.scale is None else check.scale
    if near(actual, expected, check.rtol, scale):
        return
    hint = hint_of(check, actual, expected, scale)
    bad = ~((actual - expected).abs() <= check.rtol * scale)
    place = bad.nonzero()[0].tolist() if expected.dim() else []
    at = ", ".join(f"{axis} {i}" for axis, i in zip(check.axes, place))
    got, wanted = actual[tuple(place)].item(), expected[tuple(place)].item()
    digits = 4 if not math.isfinite(got) or abs(got - wanted) > 1e-3 * abs(wanted) else 10
    fail(f"{what}{', ' if at else ''}{at}: {got:.{digits}g}, expected {wanted:.{digits}g}", hint, known)


def hint_of(check, actual, expected, scale):
    """The name of the mistake that gives this value, if it is a typical one's."""
    import torch
    if check.lost and (not actual.isfinite().all() or len(actual.unique()) == 1 < len(expected.unique())):
        return check.lost
    if check.masked and near(actual * check.masked[1], expected * check.masked[1], 1e-7, scale):
        return check.masked[0]
    for name, forms in check.mistakes.items():
        for wrong in forms if isinstance(forms, (list, tuple)) else [forms]:
            wrong = torch.as_tensor(wrong, dtype=expected.dtype)
            size = max(check.rtol, 1e-7) * scale if not check.share else check.share * wrong.abs().max().item()
            if wrong.shape == actual.shape and near(actual, wrong, 1.0, size):
                return name
    if check.nearly and near(actual, expected, check.nearly[1], scale):
        return check.nearly[0]
    return None


def judged(cases, replies, known):
    """None, or what is wrong with the replies to these cases: one line. A reply is {"answer": ..., "changed": ...} or
    {"error": text}."""
    total = 0.0
    for case, reply in zip(cases, replies):
        if "error" in reply:
            text = str(reply["error"])[:800]
            hint = next((hint for name, hint in case.errors.items() if name in text), None)
            return f"{text}; {known[hint]}" if hint else text
        try:
            answer = at_path(case, unpacked(reply["answer"]))
            if reply.get("changed") is True:
                raise Wrong(f"{case.function}: an argument was changed in place; work on a new tensor")
            for check in case.checks:
                compare(check, part_of(check, answer), known)
            if case.weight:
                first = part_of(Check(case.function, 0.0, (0,)), answer)
                if type(first) is not float:
                    raise Wrong(f"{case.function}: a {kind_of(first)}, expected a Python float")
                total += case.weight * first
            if case.relations:
                case.relations(answer)
            if case.total:
                compare(case.total, total, known)
        except Wrong as error:
            return "".join(c if c.isprintable() else " " for c in str(error))
        except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, OverflowError) as error:
            return f"{case.function}: the answer could not be read ({type(error).__name__})"
    if len(replies) < len(cases):
        return "there was no answer to every case"
    return None


def frozen(path):
    """{test: its cases} of the file that make_student.py writes."""
    return {name: [unpacked_case(case) for case in cases] for name, cases in json.loads(path.read_text())["tests"].items()}
