"""amft.py on several GPUs of one machine (or several processes on its CPU): the same flags, started by torchrun.

    torchrun --nproc-per-node 8 recipes/parallel.py --task math --data my.jsonl --model hub/name
    torchrun --nproc-per-node 2 recipes/parallel.py --task gp --smoke --device cpu
    torchrun --nproc-per-node 8 recipes/parallel.py --resume runs/math      # also with another number of processes

Every process, a rank, has the whole policy, theta and Adam's state. Shared out are
    the episodes: a rank plays its share, with random numbers of its own, and all get all conversations   (rollout)
    the rows of both losses: a rank's share of the gradient, summed over ranks                      (loss_gradient)
    the validation prompts' backward passes                                                         (meta_gradient)
    the passes that read the value function's features                                                    (outputs)
The rest every rank computes alike, of the same numbers: all have one mu, one theta and one log, bit for bit, which is
looked at after each step. Rank 0 alone writes the run's folder and prints. amft.py knows nothing of this: its functions
are replaced here, one by one. Samples differ from those of `python amft.py` with the same seed, and with the number of
ranks; the same command gives the same log, also across a kill and a resume.
"""

import contextlib
import datetime
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import pad

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import amft  # noqa: E402

RANK, WORLD = 0, 1  # set by `start`


def everyones(thing):
    """[thing of rank 0, of rank 1, ...], on every rank. Also a barrier."""
    things = [None] * WORLD
    dist.all_gather_object(things, thing)
    return things


def total(x):
    """The sum over ranks, in place: of a tensor, on its own device."""
    dist.all_reduce(x)
    return x


def first(function, *args):
    """What rank 0 gets by it, or its error, on every rank; the others do not call it."""
    box = [None]
    if RANK == 0:
        try:
            box = [(function(*args), None)]
        except Exception as error:
            box = [(None, error)]
    dist.broadcast_object_list(box, 0)
    value, error = box[0]
    if error:
        raise error
    return value


def share(rows):
    """A rank's own of some rows, every WORLD-th: neighbours are alike, so that all have like work."""
    return rows[RANK::WORLD]


# --- What replaces a function of amft.py: `alone` is the function itself ---


def rollout(alone, model, tokenizer, episodes, *how, **more):
    """amft.rollout of everyone's share of the episodes, put together again in the order of the episodes."""
    seed, cuda = torch.randint(2 ** 62, ()).item(), model.device.type == "cuda"  # one seed: ranks are still in step
    with torch.random.fork_rng([torch.cuda.current_device()] if cuda else []):
        torch.manual_seed(seed + RANK)  # the same numbers on all ranks would make their samples alike
        mine = alone(model, tokenizer, share(episodes), *how, **more) if share(episodes) else None
    parts = [part for part in everyones(mine and moved(mine, "cpu")) if part]
    place = sum((list(range(len(episodes)))[rank::WORLD] for rank in range(WORLD)), [])  # of each one played
    return moved(joined(parts, place, tokenizer.pad_token_id), model.device)


def moved(rollouts, device):
    batch = rollouts.batch
    batch = batch._replace(ids=batch.ids.to(device), attention=batch.attention.to(device), mask=batch.mask.to(device),
                           pixels=[pixels.to(device) for pixels in batch.pixels])
    return rollouts._replace(batch=batch, success=rollouts.success.to(device), graded=rollouts.graded.to(device))


def joined(parts, place, padding):
    """One Rollouts of several: widened to the longest prompt (on the left) and the longest rest (on the right).

    place: which episode each one is, in the order of the parts."""
    G, T = parts[0].success.shape[1], max(part.batch.mask.shape[1] for part in parts)
    S = T + max(part.batch.ids.shape[1] - part.batch.mask.shape[1] for part in parts)
    order = torch.tensor(place).argsort()
    rows = (order.unsqueeze(1) * G + torch.arange(G)).flatten()  # conversations of those episodes

    def widened(values, value=0):  # (b, its S or T) each -> (B, S or T)
        wide = []
        for part, x in zip(parts, values):
            right = T - part.batch.mask.shape[1]
            left = S - right - x.shape[1] if x.shape[1] == part.batch.ids.shape[1] else 0
            wide.append(pad(x, (left, right), value=value))
        return torch.cat(wide)[rows]

    def mean(values, weights):
        return sum(value * weight for value, weight in zip(values, weights)) / sum(weights)
    pixels, played = (sum((list(x) for x in lists), []) for lists in
                      ([part.batch.pixels for part in parts], [part.episodes for part in parts]))
    batch = amft.Batch(widened([part.batch.ids for part in parts], padding),
                       widened([part.batch.attention for part in parts]),
                       widened([part.batch.mask for part in parts]), [pixels[i] for i in rows.tolist()])
    tokens = [part.batch.mask.sum().item() for part in parts]
    turns = [(pad(part.batch.mask, (1, 0)).diff(dim=1) > 0).sum().item() for part in parts]  # where a response begins
    return parts[0]._replace(
        episodes=[played[i] for i in rows.tolist()], batch=batch, success=torch.cat([part.success for part in parts])[order],
        graded=widened([part.graded for part in parts]), entropy=mean([part.entropy for part in parts], tokens),
        truncated=mean([part.truncated for part in parts], turns))


def loss_gradient(alone, model, batch, used, *rest, **more):
    """Each rank's rows of those used; a sum over rows, so that the ranks' sums add up, and so do its parts of logps."""
    own = share((used != 0).any(1).nonzero().squeeze(1))
    mine = torch.zeros_like(used)
    mine[own] = used[own]
    grad, logps, value = alone(model, batch, mine, *rest, **more)
    return total(grad), total(logps), total(torch.tensor(value, dtype=torch.float64)).item()


def meta_gradient(alone, model, tangent, rollouts, *rest, **more):
    """Each rank's prompts of P. To it the others' have no success, so that their slopes are exactly 0: from the mean and
    the standard error of its P slopes follow their sum and sum of squares, and from all ranks' those of all slopes."""
    P, mine = len(rollouts.success), torch.zeros_like(rollouts.success)
    share(mine).copy_(share(rollouts.success))
    shared, amft.loss_gradient = amft.loss_gradient, amft.loss_gradient.args[0]  # here a prompt's rows stay together
    try:
        mean, error = alone(model, tangent, rollouts._replace(success=mine), *rest, **more)
    finally:
        amft.loss_gradient = shared
    sums = torch.tensor([P * mean, P * (P - 1) * error ** 2 + P * mean ** 2], dtype=torch.float64)
    slopes, squares = total(sums).tolist()
    variance = max(squares - slopes ** 2 / P, 0.0) / (P - 1)
    return slopes / P, math.sqrt(variance / P)


def outputs(alone, model, batch, *rest, hidden=False, **more):
    """Hidden states, which only the value function reads, and without a gradient: each rank's rows. Logits as ever."""
    if not hidden:
        return alone(model, batch, *rest, **more)
    (B, T), width = batch.mask.shape, model.get_input_embeddings().weight.shape[1]
    states, own = torch.zeros(B, T, width, device=model.device), share(torch.arange(B, device=model.device))
    if len(own):
        states[own] = alone(model, batch.rows(own), *rest, hidden=True, **more)[1].float()
    return None, total(states)


def parse(alone, *args):
    config, folder, new = alone(*args)
    return config, first(lambda: folder), new  # the next free name is another one once rank 0 has made its folder


def check(alone, config, *rest):
    alone(config, *rest)
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device not in ("cpu", "cuda"):
        raise ValueError(f"--device {config.device}: here cpu, or cuda, of which each process takes its own")
    if config.device == "cuda" and WORLD > here:
        raise ValueError(f"--nproc-per-node {WORLD}: there are {here} GPUs here")


def load_policy(alone, *args):
    model, tokenizer = alone(*args)
    if RANK:
        model.save_pretrained = tokenizer.save_pretrained = lambda *_: None
    return model, tokenizer


class Run(amft.Run):
    """Rank 0's, which writes the folder, and the others', which read it."""

    def __init__(self, folder, config=None):
        super().__init__(folder)
        first(super().__init__, folder, config)

    def write(self, *args, **fields):
        if RANK == 0:
            super().write(*args, **fields)

    def rows(self, *kinds):
        return first(super().rows, *kinds)

    def restore(self, *args):
        everyones(None)  # rank 0 has written the folder's first line
        result = super().restore(*args)
        everyones(None)  # and writes no other before all have read what there is
        return result

    def save(self, *args):
        if RANK == 0:
            start = time.time()
            super().save(*args)
            # A state has 24 bytes a parameter: no more than a twentieth of the time goes there.
            amft.SAVE_SECONDS = max(amft.SAVE_SECONDS, 20 * (time.time() - start))

    def log_step(self, s):
        bits = s.theta.view(torch.int32 if s.theta.dtype == torch.float32 else torch.int64).sum(dtype=torch.int64).item()
        if len(set(everyones((bits, s.mu)))) > 1:
            raise ValueError(f"step {s.t}: the ranks no longer have one theta and one mu")
        super().log_step(s)


# --- The processes ---


class Last:
    """In place of a rank's output: its end is kept."""
    text = ""

    def write(self, text):
        self.text = (self.text + text)[-4000:]

    def flush(self):
        pass


def start():
    """Find the other ranks, and share amft's work with them from here on. The store is theirs in common."""
    global RANK, WORLD
    gpu = torch.cuda.is_available()
    if gpu and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, RANK, WORLD = next(dist.rendezvous("env://"))
    # Rank 0 may take long to write a state or the policy, while the others wait.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=RANK, world_size=WORLD,
                            timeout=datetime.timedelta(hours=2))
    for function in (rollout, loss_gradient, meta_gradient, outputs, parse, check, load_policy):
        setattr(amft, function.__name__, partial(function, getattr(amft, function.__name__)))
    amft.Run = Run
    return store


def main(argv=None, methods=amft.METHODS, config_class=amft.Config):
    name = Path(sys.argv[0]).name
    if "LOCAL_WORLD_SIZE" not in os.environ or os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        print(f"{name}: is started by torchrun --nproc-per-node N {sys.argv[0]}, on one machine", file=sys.stderr)
        sys.exit(2)
    store, last, line = start(), Last(), ""
    try:
        with contextlib.ExitStack() as quiet:
            if RANK:
                quiet.enter_context(contextlib.redirect_stdout(Last()))
                quiet.enter_context(contextlib.redirect_stderr(last))
            amft.main(argv, methods, config_class)
        code = 0
    except SystemExit as stop:  # rank 0 has said why, if it was its own error too
        code, line = stop.code or 0, last.text.strip().split("\n")[-1]
    except Exception as error:  # of the machine, or because another rank has stopped
        text = (str(error).splitlines() or [""])[0]
        code, line = 1, f"{name}: {type(error).__name__}: {text}"
    if code == 0:
        dist.destroy_process_group()
        return
    # One line in all: that of the first rank to fail, and of rank 0 where all fail alike.
    time.sleep(3 if RANK else 0)
    with contextlib.suppress(RuntimeError):  # the store is gone with rank 0, which has said it
        if store.add("said", 1) == 1 and line:
            print(f"{line} (rank {RANK})", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # without waiting for the others


if __name__ == "__main__":
    main()
