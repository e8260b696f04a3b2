"""Sampling's decode step as a CUDA graph: captured once for a shape, then replayed, so that no launch is waited for.

A decode step writes into tensors that keep their shape and place: a Decoding, a static cache. It reads weights that
stay where they are and asks for no value, so the same function runs by itself (CPUs, MPS, models that cannot be
captured) or is replayed by a GPU."""

import sys
import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import StaticCache

from harness.cache import with_room

LOOK_EVERY = 8  # tokens between looks at whether all are done, each of which waits for the GPU
WIDTH = 64  # a captured conversation's columns are a multiple of it, so that a graph serves prompts of any length
KEPT = 12  # graphs of a model ...
KEPT_BYTES = 4 * 2 ** 30  # ... and what their caches may take together, the newest one's apart


class Decoding(NamedTuple):
    """Replies of B conversations in the making, W columns wide. A step changes these tensors in place."""
    input_ids: Tensor  # (B, W): what was said before, the reply so far, room
    attention_mask: Tensor  # (B, W), 1 on real tokens so far
    entropy: Tensor  # (B, W), nats, of the distribution at temperature 1 where a reply's token was drawn
    speaking: Tensor  # (B,), True up to a reply's end
    column: Tensor  # (1,), where the next token goes
    stops: Tensor  # ids that end a reply
    temperature: Tensor  # (1,), of the draws; a tensor, so that one recorded step serves all

    def append(self, token: Tensor, entropy: Tensor) -> None:
        """The next column: a token of each row, and the entropy there, (B,) each."""
        self.input_ids.index_copy_(1, self.column, token.unsqueeze(1))
        self.attention_mask.index_copy_(1, self.column, self.speaking.to(self.attention_mask.dtype).unsqueeze(1))
        self.entropy.index_copy_(1, self.column, entropy.unsqueeze(1))
        # Over is what an end came to, not what equals padding: that may be an end, or be sampled.
        self.speaking.logical_and_(~torch.isin(token, self.stops))
        self.column.add_(1)


def draw(logits: Tensor, temperature: Tensor) -> Tensor:
    """An index of each row, (B, V) -> (B,), from softmax(logits / temperature); the most likely one at temperature 0.

    It is what torch.multinomial draws, which would wait for the device."""
    probabilities = (logits / temperature.clamp(min=1e-6)).softmax(-1)
    drawn = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)
    return torch.where(temperature > 0, drawn, logits.argmax(-1))


def begin(input_ids: Tensor, attention_mask: Tensor, speaking: Tensor, stops: list, temperature: float,
          room: int) -> Decoding:
    """The Decoding of conversations (B, S), with room for so many tokens."""
    return Decoding(
        input_ids=pad(input_ids, (0, room)),
        attention_mask=pad(attention_mask, (0, room)),
        entropy=torch.zeros(len(input_ids), input_ids.shape[1] + room, device=input_ids.device),
        speaking=speaking.clone(),
        column=input_ids.new_tensor([input_ids.shape[1]]),
        stops=input_ids.new_tensor(stops),
        temperature=torch.tensor([temperature], dtype=torch.float, device=input_ids.device))


class Eager:
    """A decode step as it is, called for each token."""
    look_every = 1

    def __init__(self, step: Any, cache: Any, state: Decoding):
        self.step, self.cache, self.state = step, cache, state

    def advance(self, column: int) -> None:
        """The token of a column. Only the columns before it are shown: a cache that grows has no others."""
        self.step(self.cache, self.state, self.state.attention_mask[:, :column])


class Captured:
    """A decode step recorded for B conversations of up to W columns, with tensors and a cache of its own."""
    look_every = LOOK_EVERY

    def __init__(self, step: Any, model: Any, cache: Any, state: Decoding, record: Any):
        columns = state.input_ids.shape[1]
        width = width_of(state)
        wide = [pad(x, (0, width - columns)) if x.dim() == 2 else x.clone() for x in state]
        self.state = Decoding(*wide)
        self.cache = with_room(model, cache, width)

        def once():
            step(self.cache, self.state, self.state.attention_mask)
        self.replay = record(once, lambda: self.take(cache, state))

    def take(self, cache: Any, state: Decoding) -> None:
        """Become the conversations of a state, as far as `cache` has read them."""
        columns = state.input_ids.shape[1]
        for own, given in zip(self.state, state):
            (own[:, :columns] if own.dim() == 2 else own).copy_(given)
        self.state.attention_mask[:, columns:] = 0
        places, tensors = [], []
        known = int(cache.get_seq_length())
        for layer, before in zip(self.cache.layers, cache.layers):
            layer.cumulative_length.fill_(known)  # a layer counts its columns by itself, on the device
            places += [layer.keys[:, :, :known], layer.values[:, :, :known]]
            tensors += [before.keys[:, :, :known], before.values[:, :, :known]]
        torch._foreach_copy_(places, tensors)

    def advance(self, column: int) -> None:
        """The token of the next column."""
        self.replay()

    @property
    def n_bytes(self) -> int:
        """Of its cache."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def width_of(state: Decoding) -> int:
    """A state's columns, rounded up."""
    return -(-state.input_ids.shape[1] // WIDTH) * WIDTH


class CudaGraph:
    """record(once, reset): what calls `once` by replaying its kernels. An exception where that cannot be done."""
    alive = weakref.WeakSet()  # no two are replayed at once: memory for what comes and goes in a step is shared by all

    def __init__(self, once: Any, reset: Any):
        self.graph = torch.cuda.CUDAGraph()
        pool = next((other.graph.pool() for other in CudaGraph.alive), None)  # it goes with the last one
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # The random numbers of warming up are nobody's: a resumed run captures at another step, and repeats.
        with torch.random.fork_rng([torch.cuda.current_device()]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            with torch.cuda.stream(stream):
                for call in range(3):
                    reset()
                    if call:  # libraries have been set up: what asks for a value now would do so in the graph
                        torch.cuda.set_sync_debug_mode("error")
                    try:
                        once()
                    finally:
                        torch.cuda.set_sync_debug_mode("default")
                reset()
            torch.cuda.current_stream().wait_stream(stream)
            # Only this thread's calls may not disturb: with several GPUs another one watches their messages.
            with torch.cuda.graph(self.graph, pool, stream, capture_error_mode="thread_local"):
                once()
        CudaGraph.alive.add(self)

    def __call__(self) -> None:
        self.graph.replay()


RECORD = {"cuda": CudaGraph}  # by the kind of device; without it a step runs by itself
RECORDINGS = weakref.WeakKeyDictionary()  # of each model


class Recordings:
    """A model's captured steps, and where they find its weights, which training makes anew at other places."""

    def __init__(self, model: Any):
        self.of_shape = {}  # {(B, W): its Captured}, the last one used last
        self.refused = False  # it cannot be captured
        self.weights = [weight.data.clone() for weight in model.parameters()]

    def make_room(self) -> None:
        """Forget what was not used for longest."""
        while len(self.of_shape) >= KEPT or sum(one.n_bytes for one in self.of_shape.values()) > KEPT_BYTES:
            del self.of_shape[next(iter(self.of_shape))]

    def fit(self, model: Any) -> bool:
        """Is the model still of the kind and on the device that it was?"""
        weights = [weight.data for weight in model.parameters()]
        return [(x.dtype, x.device, x.shape) for x in weights] == [(x.dtype, x.device, x.shape) for x in self.weights]

    def bring_home(self, model: Any) -> None:
        """Put the model's weights where its captured steps read them."""
        away = [(weight, home) for weight, home in zip(model.parameters(), self.weights)
                if weight.data_ptr() != home.data_ptr()]
        if away:
            torch._foreach_copy_([home for _, home in away], [weight.data for weight, _ in away])
        for weight, home in away:
            weight.data = home


def decoding(step: Any, model: Any, cache: Any, state: Decoding) -> Any:
    """What makes a reply's tokens one by one: Captured where that can be done, else Eager.

    step(cache, state, attention mask): one token of each conversation; cache: of all columns but the last."""
    record = RECORD.get(state.input_ids.device.type)
    if record is None or type(cache) is not StaticCache:
        return Eager(step, cache, state)
    made = RECORDINGS.get(model)
    if made is None or not made.fit(model):
        made = RECORDINGS[model] = Recordings(model)
    if made.refused:
        return Eager(step, cache, state)
    made.bring_home(model)
    shape = (len(state.input_ids), width_of(state))
    captured = made.of_shape.pop(shape, None)
    try:
        if captured is None:
            made.make_room()
            captured = Captured(step, model, cache, state, record)
    except Exception as error:  # each library and device has its own
        made.refused = True
        made.of_shape.clear()
        text = (str(error).splitlines() or ["no reason given"])[0][:100]
        print(f"a decode step of this model cannot be captured in a CUDA graph ({text}): sampling is slower",
              file=sys.stderr)
        return Eager(step, cache, state)
    made.of_shape[shape] = captured
    captured.take(cache, state)
    return captured
