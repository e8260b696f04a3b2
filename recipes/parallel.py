"""amft.py on several GPUs, of one machine or of several (or several processes on a CPU), by torchrun.

    torchrun --nproc-per-node 8 recipes/parallel.py --task math --data my.jsonl --model hub/name
    torchrun --nproc-per-node 2 recipes/parallel.py --task gp --smoke --device cpu
    torchrun --nproc-per-node 8 recipes/parallel.py --resume runs/math  # or another number of them
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --rdzv-id 1 \
        recipes/parallel.py --task math --data my.jsonl --model hub/name    # on each of two machines

The flags are amft.py's. Every process, a rank, has the whole policy, theta and Adam's state. Shared
out are
    the episodes: a rank plays its share, with random numbers of its own, and all get all (rollout)
    the rows of both losses: a rank's share of the gradient, summed over ranks      (loss_gradient)
    the validation prompts' backward passes                                         (meta_gradient)
    the passes that read the value function's features                           (response_outputs)
The rest every rank computes alike, of the same numbers: all have one mu and one theta, bit for bit,
which is looked at after each step. Rank 0 alone reads and writes the run's folder, and prints; the
checkpoint and --data lie on every machine, in places of the same names. amft.py knows nothing of this:
it is told of a Run, and seven of its functions are replaced here. Samples differ from those of `python
amft.py` with the same seed, and with the number of ranks; the same command gives the same log, also
across a kill and a resume.
"""

import contextlib
import dataclasses
import datetime
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves, tree_map_only

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import amft  # noqa: E402
from harness.arguments import METHOD_FLAGS, program  # noqa: E402
from harness.loading import device_of  # noqa: E402

RANK, WORLD = 0, 1  # set by `start`

# --- What the ranks tell each other ---
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
        except (Exception, SystemExit) as error:
            box = [(None, error)]
    dist.broadcast_object_list(box, 0)
    value, error = box[0]
    if error:
        raise error
    return value

@dataclasses.dataclass
class Place:
    """What a tensor of rank 0's is like."""
    shape: tuple
    dtype: torch.dtype
    on_cpu: bool

def from_first(tree, device):
    """Rank 0's tensors, in whatever lists, tuples and dicts they are, on every rank."""
    places = first(lambda: tree_map_only(
        torch.Tensor, lambda x: Place(tuple(x.shape), x.dtype, x.device.type == "cpu"), tree))
    if RANK:
        tree = tree_map_only(Place, lambda place: torch.empty(
            place.shape, dtype=place.dtype, device="cpu" if place.on_cpu else device), places)
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            dist.broadcast(leaf, 0)
    return tree

def share(rows):
    """A rank's own of some rows, every WORLD-th: neighbours are alike, so all have like work."""
    return rows[RANK::WORLD]

# --- What replaces a function of amft.py: `alone` is the function itself ---
def rollout(alone, model, tokenizer, episodes, *how, **more):
    """amft.rollout of everyone's share of the episodes, together again in the episodes' order."""
    seed = torch.randint(2 ** 62, ()).item()  # one for all: ranks are still in step
    devices = [torch.cuda.current_device()] if model.device.type == "cuda" else []
    own, part = share(episodes), None
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + RANK)  # the same numbers would make the ranks' samples alike
        if own:
            part = moved(alone(model, tokenizer, own, *how, **more), "cpu")
    parts = [part for part in everyones(part) if part]
    indices = list(range(len(episodes)))
    place = sum((indices[rank::WORLD] for rank in range(WORLD)), [])  # of each one that was played
    return moved(joined(parts, place, tokenizer.pad_token_id), model.device)

def moved(rollouts, device):
    batch = rollouts.batch._replace(
        input_ids=rollouts.batch.input_ids.to(device),
        attention_mask=rollouts.batch.attention_mask.to(device),
        response_mask=rollouts.batch.response_mask.to(device))
    return rollouts._replace(
        batch=batch, success=rollouts.success.to(device), rewards=rollouts.rewards.to(device))

def joined(parts, place, padding):
    """One Rollouts of several, as wide as the longest prompt (on the left) and rest (on the right).

    place: which episode each one is, in the order of the parts."""
    batches = [part.batch for part in parts]
    G = parts[0].success.shape[1]
    T = max(batch.response_mask.shape[1] for batch in batches)
    prompt = max(batch.input_ids.shape[1] - batch.response_mask.shape[1] for batch in batches)
    order = torch.tensor(place).argsort()
    rows = (order.unsqueeze(1) * G + torch.arange(G)).flatten()  # those episodes' conversations

    def responses(tensors):  # (b, its T) each -> (B, T)
        wide = [pad(x, (0, T - x.shape[1])) for x in tensors]
        return torch.cat(wide)[rows]

    def wholes(tensors, value=0):  # (b, its S) each -> (B, S)
        wide = []
        for batch, x in zip(batches, tensors):
            right = T - batch.response_mask.shape[1]
            left = prompt + T - right - x.shape[1]
            wide.append(pad(x, (left, right), value=value))
        return torch.cat(wide)[rows]

    def rearranged(lists):
        whole = sum(lists, [])
        return [whole[i] for i in rows.tolist()]

    def mean(values, weights):
        return sum(value * weight for value, weight in zip(values, weights)) / sum(weights)
    masks = [batch.response_mask for batch in batches]
    tokens = [mask.sum().item() for mask in masks]
    turns = [(pad(mask, (1, 0)).diff(dim=1) > 0).sum().item() for mask in masks]  # their beginnings
    batch = amft.Batch(
        input_ids=wholes([batch.input_ids for batch in batches], padding),
        attention_mask=wholes([batch.attention_mask for batch in batches]),
        response_mask=responses(masks),
        images=rearranged([batch.images for batch in batches]))
    return amft.Rollouts(
        episodes=rearranged([part.episodes for part in parts]),
        batch=batch,
        success=torch.cat([part.success for part in parts])[order],
        rewards=responses([part.rewards for part in parts]),
        entropy=mean([part.entropy for part in parts], tokens),
        truncated=mean([part.truncated for part in parts], turns))

def loss_gradient(alone, model, batch, used, *rest, **more):
    """Each rank's rows of those used; sums over rows add up, and so do the parts of logps."""
    own = share((used != 0).any(1).nonzero().squeeze(1))
    mine = torch.zeros_like(used)
    mine[own] = used[own]
    grad, logps, value = alone(model, batch, mine, *rest, **more)
    value = total(torch.tensor(value, dtype=torch.float64)).item()
    return total(grad), total(logps), value

def meta_gradient(alone, model, d_theta, rollouts, config, advantages=None):
    """Each rank's prompts of P; of the others its slopes are 0, since their advantages are.

    From the mean and the standard error of a rank's P slopes follow their sum and their sum of
    squares, and from all ranks' those of all slopes."""
    if advantages is None:
        advantages = amft.group_advantages(rollouts.success)
    values, scale = advantages
    P, mine = len(values), torch.zeros_like(values)
    share(mine).copy_(share(values))
    shared = amft.loss_gradient
    amft.loss_gradient = shared.args[0]  # amft's own: a prompt's rows stay together
    try:
        mean, error = alone(model, d_theta, rollouts, config, (mine, scale))
    finally:
        amft.loss_gradient = shared
    sums = torch.tensor(
        [P * mean, P * (P - 1) * error ** 2 + P * mean ** 2], dtype=torch.float64)
    slopes, squares = total(sums).tolist()
    variance = max(squares - slopes ** 2 / P, 0.0) / (P - 1)
    return slopes / P, math.sqrt(variance / P)

def response_outputs(alone, model, batch, hidden=False):
    """Hidden states, which the value function alone reads: each rank's rows. Logits as ever."""
    if not hidden:
        return alone(model, batch)
    B, T = batch.response_mask.shape
    width = model.get_input_embeddings().weight.shape[1]
    dtype = torch.promote_types(model.dtype, torch.float32)
    states = torch.zeros(B, T, width, dtype=dtype, device=model.device)
    own = share(torch.arange(B, device=model.device))
    if len(own):
        states[own] = alone(model, batch.rows(own), hidden=True)[1]
    return None, total(states)

def set_theta(alone, model, theta):
    """theta's bits are kept beside it, for Run to compare those of all ranks."""
    alone(model, theta)
    whole = torch.int32 if theta.dtype == torch.float32 else torch.int64
    model.bits_of_theta = theta.view(whole).sum(dtype=torch.int64).item()

def parse(alone, *args):
    """Rank 0's arguments: the next free name is another one once it has made its folder."""
    return first(alone, *args)

def load_policy(alone, config, *rest):
    config.device = device_of(config.device)
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device not in ("cpu", "cuda"):
        raise ValueError(f"--device {config.device}: here cpu, or cuda, where each has its own")
    own = int(os.environ["LOCAL_WORLD_SIZE"])
    if config.device == "cuda" and own > here:
        raise ValueError(f"--nproc-per-node {own}: there are {here} GPUs here")
    return alone(config, *rest)

class Run(amft.Run):
    """Rank 0's, which has the folder, and the others', which may be on other machines."""

    def __init__(self, arguments, model):
        self.model, self.asked = model, False
        vars(self).update(first(self.take, arguments, model))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.interrupt)

    def take(self, arguments, model):
        """The folder is rank 0's; the others get what it knows, without the lock and the screen."""
        super().__init__(arguments, model)
        own = ("model", "lock", "screen")
        return {name: value for name, value in vars(self).items() if name not in own}

    def write(self, *args, **fields):
        if RANK == 0:
            super().write(*args, **fields)

    def restore(self, theta, adam, modules):
        """What rank 0 reads of its state, on every rank."""
        made, restore = [], super().restore

        def read():
            made.append(restore(theta, adam, modules))
            return self.t, self.rollouts, self.seconds, self.saved
        self.t, self.rollouts, self.seconds, self.saved = first(read)
        if self.saved is None:  # all begin alike
            return theta, adam
        states = [module and module.state_dict() for module in modules]
        (theta, adam), states = from_first((made[0], states) if RANK == 0 else None, theta.device)
        if RANK:
            for module, state in zip(modules, states):
                if module:
                    module.load_state_dict(state)
        return theta, adam

    def save(self, *args):
        if RANK == 0:
            super().save(*args)

    def interrupt(self, *_):
        """As alone, but a signal that reaches a rank counts once all ranks know of it."""
        if self.asked or not self.in_step:
            raise KeyboardInterrupt
        self.asked = True

    def log_step(self, step, theta):
        bits, mu, asked = zip(*everyones((self.model.bits_of_theta, step.mu, self.asked)))
        if len(set(bits)) > 1 or len(set(mu)) > 1:
            raise ValueError(f"step {step.t}: the ranks no longer have one theta and one mu")
        first(super().log_step, step, theta)
        self.t = step.t
        self.stopping = any(asked)

    def finish(self, *args):
        first(super().finish, *args)

# --- The processes ---
class Last:
    """In place of a rank's output: its end is kept."""
    text = ""

    def write(self, text):
        self.text = (self.text + text)[-4000:]

    def flush(self):
        pass

def start():
    """Find the other ranks, and share amft's work with them. The store is theirs in common."""
    global RANK, WORLD
    gpu = torch.cuda.is_available()
    if gpu and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, RANK, WORLD = next(dist.rendezvous("env://"))
    # Rank 0 may take long to write a state or the policy, while the others wait.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=store, rank=RANK, world_size=WORLD, timeout=datetime.timedelta(hours=2))
    for function in (rollout, loss_gradient, meta_gradient, response_outputs, set_theta, parse,
                     load_policy):
        name = function.__name__
        setattr(amft, name, partial(function, getattr(amft, name)))
    return store

def main(argv=None, methods=amft.METHODS, config_class=amft.Config, method_flags=METHOD_FLAGS):
    """amft.main on every rank; where one fails, all end."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        how = f"torchrun --nproc-per-node N {sys.argv[0]}"
        print(f"{program()}: is started by {how}", file=sys.stderr)
        sys.exit(2)
    store, last, line = start(), Last(), ""
    try:
        with contextlib.ExitStack() as quiet:
            if RANK:
                quiet.enter_context(contextlib.redirect_stdout(Last()))
                quiet.enter_context(contextlib.redirect_stderr(last))
            amft.main(argv, methods, config_class, method_flags, run_class=Run)
        code = 0
    except SystemExit as stop:  # rank 0 has said why, if it was its own error too
        code, line = stop.code or 0, last.text.strip().split("\n")[-1]
    except Exception as error:  # of the machine, or because another rank has stopped
        text = (str(error).splitlines() or [""])[0]
        code, line = 1, f"{program()}: {type(error).__name__}: {text}"
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
