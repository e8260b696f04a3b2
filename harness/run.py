"""A run's folder: metrics.jsonl (the log, an object a line), state.pt (for --resume), final/ (the policy), curves.png.

How a run is kept whole across kills, interrupts, full disks and second processes; what is in it is the algorithm's."""

import contextlib
import io
import json
import math
import os
import signal
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from harness.arguments import program, read_log
from harness.evaluation import evaluation, short_evaluation
from harness.screen import Screen

SAVE_SECONDS = 30  # between states


class Run:
    lock = None  # the log, opened; of another rank, which does not write, none
    wait = 0.0  # seconds between states of a large policy: writing them takes no more than a twentieth of the time

    def __init__(self, arguments: Any, model: Any):
        """Take the folder. ValueError where another process is writing there."""
        config, folder, new, verbose = arguments
        self.config = config
        self.folder = folder
        self.log = folder / "metrics.jsonl"
        self.state = folder / "state.pt"
        self.t = 0  # steps done
        self.rollouts = 0  # responses sampled
        self.seconds = 0.0
        self.clock = time.time()  # when the last state was saved
        self.saved = None  # how many steps that one has
        self.in_step = self.stopping = False
        signal.signal(signal.SIGINT, self.interrupt)
        signal.signal(signal.SIGTERM, self.interrupt)
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.log, "a")
        if not locked(self.lock):
            raise ValueError(f"{folder}: another process is writing this run")
        self.screen = Screen(folder, config, model.num_parameters(), verbose)
        if new:
            self.write("config", **vars(config), torch=torch.__version__, threads=torch.get_num_threads())

    def write(self, kind: str, **fields: Any) -> None:
        """A row of the log; the screen shows what a person needs of it."""
        row = dict(kind=kind, **fields)
        with open(self.log, "a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self.screen.show(row)

    def rows(self, *kinds: str) -> list[dict]:
        return read_log(self.log, *kinds)

    # --- What is saved

    def save(self, theta: Any, adam: Any, modules: list) -> None:
        """Keep all that the next step needs: theta, Adam's state, and the state_dict of modules (None: there is none)."""
        self.seconds += time.time() - self.clock
        self.clock = time.time()
        own = dict(t=self.t, rollouts=self.rollouts, seconds=self.seconds, log=self.log.stat().st_size)
        buffer = io.BytesIO()  # so that a full disk is an OSError
        states = [module and module.state_dict() for module in modules]
        torch.save(dict(own=own, theta=theta, adam=tuple(adam), modules=states), buffer)
        # Atomic: a run killed in here still has its last state.
        (self.folder / "state.tmp").write_bytes(buffer.getbuffer())
        os.replace(self.folder / "state.tmp", self.state)
        self.saved = self.t
        took = time.time() - self.clock
        self.wait = 20 * took if took > 1 else 0.0

    def restore(self, theta: Any, adam: Any, modules: list) -> tuple:
        """(theta, Adam's state) as saved last, or as given where nothing was; so become the modules and the log."""
        if not self.state.exists():
            if self.rows("step"):
                raise ValueError(f"{self.state}: is gone, and without it the run cannot go on")
            with open(self.log, "rb") as file:
                first = file.readline()
            os.truncate(self.log, len(first))
            return theta, adam
        try:
            saved = torch.load(self.state, map_location=theta.device, weights_only=True)
            own = saved["own"]
            if saved["theta"].shape != theta.shape or own["log"] > self.log.stat().st_size:
                raise ValueError("it belongs to another model or log")
            for module, state in zip(modules, saved["modules"], strict=True):
                if module:
                    module.load_state_dict(state)
            self.t, self.rollouts, self.seconds = own["t"], own["rollouts"], own["seconds"]
            theta, adam = saved["theta"], type(adam)(*saved["adam"])
            os.truncate(self.log, own["log"])
        except Exception as error:  # garbage, empty, cut off: each has its own
            raise ValueError(f"{self.state}: is not the state of this run ({str(error).strip()[:80] or 'it is empty'})")
        self.saved = self.t
        return theta, adam

    # --- Steps

    def steps(self, n: int) -> Any:
        """The numbers of the steps to do, with a bar; within one Ctrl-C and SIGTERM wait for its end."""
        for t in tqdm(range(self.t + 1, n + 1), initial=self.t, total=n, leave=False, disable=None):
            self.in_step = True
            yield t
            self.in_step = False
            if self.stopping:
                raise KeyboardInterrupt

    def interrupt(self, *_: Any) -> None:
        """A step is finished first, so that none is lost; the second time it is not waited for."""
        if self.stopping or not self.in_step:
            raise KeyboardInterrupt
        self.stopping = True

    def log_step(self, step: Any, theta: Any) -> None:
        """A row of an amft.Step, and sometimes a conversation of the policy."""
        # What is still a tensor was not waited for until now.
        row = dict(step=step.t, mu=step.mu, **{name: float(value) for name, value in step.metrics.items()})
        rollouts = step.rollouts
        if rollouts:
            silent = rollouts.success.std(1) == 0
            row.update(success=rollouts.success.mean().item(), entropy=rollouts.entropy, truncated=rollouts.truncated,
                       zero_adv=silent.float().mean().item(),
                       response_len=rollouts.batch.response_mask.sum(1).mean().item())
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if not theta.isfinite().all():
            bad.append("theta")
        if bad:
            raise FloatingPointError(f"step {step.t}: {', '.join(bad)} not finite; start again with a lower --lr")
        self.t = step.t
        self.rollouts += step.n_sampled
        seconds = self.seconds + time.time() - self.clock
        self.write("step", **row, rollouts=self.rollouts, seconds=round(seconds, 2))
        if rollouts and (step.t == 1 or step.t % 100 == 0):
            self.screen.samples(rollouts.episodes)

    def due(self) -> bool:
        """Is it time to save?"""
        since = time.time() - self.clock
        return self.stopping or since > SAVE_SECONDS and since >= self.wait

    def evaluate(self, evaluate: Any, splits: Any, whole: bool = True) -> None:
        """A row of the log for each split; whole: at every policy's best temperature, too (harness.evaluation)."""
        if whole:
            rows = evaluation(evaluate, splits, self.config.temperature, self.config.eval_samples)
        else:
            rows = short_evaluation(evaluate, splits, self.config.temperature)
        for row in tqdm(rows, desc="evaluation", total=len(splits), leave=False, disable=None):
            self.write("eval", step=self.t, whole=whole, **row)

    def finish(self, model: Any, tokenizer: Any) -> None:
        """Leave the policy, the figure and the table, and last the row that says so."""
        model.save_pretrained(self.folder / "final")
        tokenizer.save_pretrained(self.folder / "final")
        self.screen.finish(self.rows("step", "eval"))
        self.write("final", rollouts=self.rollouts, seconds=round(self.seconds, 1))


def locked(file: io.TextIOBase) -> bool:
    """Make the file this process's, while it lives; False if it is another's."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not on Windows
        pass
    except BlockingIOError:
        return False
    return True


class Ending:
    """What the end of a run is told with: the Run, once there is one."""
    run = None

    def goes_on(self) -> str:
        if self.run is None or self.run.saved is None:
            return ""
        return f"; --resume {self.run.folder} goes on after step {self.run.saved}"


@contextlib.contextmanager
def one_line_errors() -> Any:
    """What can go wrong without a bug ends the program with one line: exit code 2; 130 for Ctrl-C and SIGTERM."""
    ending = Ending()
    try:
        yield ending
    except KeyboardInterrupt:
        leave(f"stopped{ending.goes_on()}", 130)
    except BrokenPipeError as error:  # | head: the interpreter's last flush must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(f"{error}{ending.goes_on()}", 2)
    except OSError as error:
        leave(f"{error}{ending.goes_on()}", 2)
    except (ValueError, FloatingPointError) as error:
        leave(str(error), 2)
    finally:
        if ending.run and ending.run.lock:  # who keeps the exception, as a notebook does, keeps the Run
            ending.run.lock.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def leave(text: str, code: int) -> None:
    print(f"{program()}: {text}", file=sys.stderr)
    sys.exit(code)
