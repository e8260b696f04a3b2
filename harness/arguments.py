"""The command line: a dataclass of flags in, one of values out. Nothing here knows of the algorithm, or imports torch."""

import argparse
import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

SMOKE = dict(steps=9, warmup=3, demos=200, prompts=8, samples=4, sft_batch=16, meta_every=2, eval_n=16, eval_samples=4)
EVALUATION = ("task model data data_test eval_n eval_samples temperature max_new_tokens device bf16 chat_template_kwargs "
              "smoke eval_only").split()


CONTROLLER = "controller eta_mu eta_h mu_min mu_max utility meta_every trace".split()
EXPLORATION = "prompts samples reward advantage clip ppo_epochs".split()


def flag(default: Any, help: str, low: float | None = None, high: float = math.inf,
         choices: tuple[str, ...] | None = None) -> Any:
    """A field of a configuration: a flag, its text for --help, and the range or the choices of its values."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclasses.dataclass
class RunConfig:
    """The flags of a run, whatever the algorithm."""
    task: str = flag("gp", "gp, gp-turns, gp-vl, virl, virl-vl or math")
    method: str = flag("amft", "what chooses mu")
    steps: int = flag(100, "in all, the warm-up's included", 1)
    seed: int = flag(0, "same seed, same CPU: same log", 0, 2 ** 62)
    model: str = flag("base", "checkpoint folder or hub name; base: the one here")
    data: str = flag("", "math: your problems, .jsonl (prompt, solution, answer) or .py")
    data_test: str = flag("", "math: more of them, only evaluated")
    eval_n: int = flag(400, "episodes of a split, at most", 1)
    eval_samples: int = flag(16, "samples of each, before and after training", 1)
    val_every: int = flag(0, "steps between evaluations on val; 0: none", 0)
    device: str = flag("auto", "auto: the first here of cuda, mps, cpu")
    micro_tokens: int = flag(4096, "tokens in a pass, a sequence at least: memory only (a small policy on a GPU: 32768)", 1)
    gradient_checkpointing: int = flag(0, "less memory, more time", 0, 1)
    bf16: int = flag(0, "the policy in bfloat16; theta and its sums in float32", 0, 1)
    chat_template_kwargs: str = flag("", "JSON that a checkpoint's chat template is told")


class MethodFlags(NamedTuple):
    """The flags that a method does not read, and those that it sets differently."""
    unused: list[str] = []
    defaults: dict[str, Any] = {}


METHOD_FLAGS = {
    "amft": MethodFlags(),
    "fixed": MethodFlags(CONTROLLER),
    "sft": MethodFlags(["mu", "warmup", *EXPLORATION, *CONTROLLER], dict(warmup=0)),
    "rl": MethodFlags(["mu", "warmup", "sft_batch", "imitation", *CONTROLLER], dict(mu=0.0, warmup=0)),
    "sft-rl": MethodFlags(["mu", *CONTROLLER], dict(mu=0.0)),
}


class Arguments(NamedTuple):
    config: Any
    folder: Path | None  # of the run; None: only evaluate
    new: bool  # False: the folder holds a run to go on with
    verbose: bool = False  # print every step


def program() -> str:
    return Path(sys.argv[0]).name


def stop_quietly(*_: Any) -> None:
    """For Ctrl-C while torch is imported: there is nothing to lose yet."""
    print(f"{program()}: stopped", file=sys.stderr)
    os._exit(130)


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(argv: list[str] | None, config_class: type, tasks: dict[str, Any],
          methods: dict[str, MethodFlags] = METHOD_FLAGS, description: str | None = None) -> Arguments:
    """The command line's Arguments; what is wrong ends the program with one line and exit code 2.

    tasks: classes whose `defaults` are flags that a task sets differently, and `smoke` those of --smoke."""
    early = argparse.ArgumentParser(prog=program(), add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    early.add_argument("--task", default=config_class.task)
    early.add_argument("--method", default=config_class.method)
    named, _ = early.parse_known_args(argv)
    of_method = methods.get(named.method, MethodFlags())
    of_task = tasks[named.task].defaults if named.task in tasks else {}
    of_smoke = {**SMOKE, **getattr(tasks.get(named.task), "smoke", {})}
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    choices = dict(task=list(tasks), method=list(methods))
    parser = make_parser(config_class, choices, {**defaults, **of_task, **of_method.defaults}, description)
    given = vars(parser.parse_args(argv))
    try:
        if "resume" in given:
            return resumed(given, config_class, choices, methods)
        refuse_unused(given, of_method.unused, named.method)
        settings = {**defaults, **of_task, **(of_smoke if "smoke" in given else {}), **of_method.defaults,
                    **implied(given), **given}
        if "warmup" not in given:  # of a run that is shorter than usual
            settings["warmup"] = min(settings["warmup"], settings["steps"] // 2)
        config = config_class(**{name: settings[name] for name in defaults})
        check(config, of_method.unused)
        if "eval_only" in given:
            return Arguments(config, None, False)
        return Arguments(config, new_folder(given.get("out"), config.task), True, "verbose" in given)
    except ValueError as error:
        parser.error(str(error))


def make_parser(config_class: type, named: dict[str, list], defaults: dict[str, Any],
                description: str | None) -> argparse.ArgumentParser:
    """A flag for each field. named: the choices of some; defaults: of the task and the method, for --help."""
    parser = argparse.ArgumentParser(
        prog=program(), description=description, usage=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
        epilog="Defaults are those of the --task and the --method that are named beside --help.")
    for field in dataclasses.fields(config_class):
        kind = type(field.default)
        limits = field.metadata
        switch = dict(nargs="?", const=1) if kind is int and limits.get("high") == 1 else {}  # alone, or with 0 or 1
        parser.add_argument(
            option(field.name), type=kind, **switch, choices=named.get(field.name, limits.get("choices")),
            help=f"{limits.get('help', '')} (default: {defaults[field.name]})".replace("%", "%%"))
    parser.add_argument("--out", type=Path, help="folder of the run, new or empty (default: runs/TASK)")
    parser.add_argument("--resume", type=Path, help="go on with the run in this folder; a finished one has an end")
    parser.add_argument("--eval-only", action="store_true", help="evaluate --model and stop")
    parser.add_argument("--verbose", action="store_true", help="print every step, not every tenth")
    parser.add_argument("--smoke", action="store_true", help="a very short run")
    return parser


def refuse_unused(given: dict[str, Any], unused: list[str], method: str) -> None:
    for name in given:
        if name in unused:
            raise ValueError(f"{option(name)}: is not used by --method {method}")
        if "eval_only" in given and name not in EVALUATION:
            raise ValueError(f"{option(name)}: is not used by --eval-only")


def implied(given: dict[str, Any]) -> dict[str, Any]:
    """Settings that follow from those given; ValueError where one that contradicts them is given, too."""
    result, why = {}, ""
    if given.get("reward") == "graded":  # success is what U counts; a step's own gradient is then one of points
        result, why = dict(utility="val"), "--reward graded"
    if given.get("controller") == "paper":
        result, why = dict(utility="val", trace=0.0), "--controller paper"
    for name, value in result.items():
        if given.get(name, value) != value:
            raise ValueError(f"{option(name)} {given[name]}: must be {value} with {why}")
    return result


def new_folder(path: Path | None, task: str) -> Path:
    """The folder of a new run; without a path the next free name. ValueError where the path holds anything."""
    if path is None:
        names = (Path(f"runs/{task}" + f"-{i}" * (i > 1)) for i in range(1, 10000))
        return next(name for name in names if not name.exists())
    try:
        taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    except OSError as error:  # too long a name, a folder that cannot be read
        raise ValueError(f"--out {path}: {error.strerror}")
    if taken:
        go_on = f"; --resume {path} goes on with the run that is there" if unfinished(path / "metrics.jsonl") else ""
        raise ValueError(f"--out {path}: must be a new or an empty folder{go_on}")
    return path


def unfinished(log: Path) -> bool:
    """Is it the log of a run that --resume would go on with?"""
    try:
        return [row["kind"] for row in read_log(log, "config", "final")] == ["config"]
    except ValueError:
        return False


def resumed(given: dict[str, Any], config_class: type, choices: dict[str, list],
            methods: dict[str, MethodFlags]) -> Arguments:
    """Arguments of --resume, from the first row of the run's log."""
    folder = given["resume"]
    rows = read_log(folder / "metrics.jsonl", "config", "final")
    if set(given) - {"resume", "verbose"} or not rows or rows[-1]["kind"] == "final":
        raise ValueError(f"--resume {folder}: takes an unfinished run, and no other flag")
    try:
        config = config_class(**{field.name: type(field.default)(rows[0][field.name])
                                 for field in dataclasses.fields(config_class)})
        for name, known in choices.items():
            if getattr(config, name) not in known:
                raise ValueError(f"{option(name)} {getattr(config, name)}")
        check(config, methods.get(config.method, MethodFlags()).unused)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--resume {folder}: its log does not begin with this program's configuration ({error})")
    return Arguments(config, folder, False, "verbose" in given)


def check(config: Any, unused: list[str]) -> None:
    """Raise ValueError, one line, where a value is out of its range, or does not fit another one."""
    for field in dataclasses.fields(config):
        low, high = field.metadata.get("low"), field.metadata.get("high")
        value = getattr(config, field.name)
        if low is not None and not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"{option(field.name)} {value}: must be finite, in [{low}, {high}]")
        choices = field.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{option(field.name)} {value}: must be one of {', '.join(choices)}")
    if config.warmup > config.steps:
        raise ValueError(f"--warmup {config.warmup}: at most --steps, {config.steps}")
    for name in ("prompts", "sft_batch"):
        if name not in unused and config.demos < getattr(config, name):
            raise ValueError(f"--demos {config.demos}: at least {option(name)}, {getattr(config, name)}")
    if "mu_min" in unused:
        return
    if config.mu_min > config.mu_max:
        raise ValueError(f"--mu-min {config.mu_min}: at most --mu-max, {config.mu_max}")
    if not config.mu_min <= config.mu <= config.mu_max:
        raise ValueError(f"--mu {config.mu}: must be in [{config.mu_min}, {config.mu_max}], from --mu-min to --mu-max")


def read_log(path: Path, *kinds: str) -> list[dict]:
    """The rows of these kinds of a run's log. ValueError where it is none."""
    try:  # half a line at the end, of a run that was killed, does not count
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        return [row for row in rows if row["kind"] in kinds]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not the log of a run ({error})")
