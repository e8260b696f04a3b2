"""What a large policy needs: the same numbers in parts, since all between them takes memory, too.

Called by harness/memory.py where a tensor is large; imports nothing of amft.
"""

from typing import Any, Callable

import torch


class InParts(torch.autograd.Function):
    """function(logits (B, T, V), ids (B, T)) -> (B, T), without what it keeps.

    V is large: log_softmax keeps a copy of (B, T, V), and its gradient makes two more. Here the
    logits stay as they are and their gradient is the only copy: both go a few rows at a time."""
    at_once = 2 ** 24  # logits

    @staticmethod
    def few(*tensors):
        rows = max(1, InParts.at_once // tensors[0][0].numel())
        return zip(*(tensor.split(rows) for tensor in tensors))

    @staticmethod
    def forward(ctx, function, logits, ids):
        ctx.function = function
        ctx.save_for_backward(logits, ids)
        return torch.cat([function(x, i) for x, i in InParts.few(logits, ids)])

    @staticmethod
    def backward(ctx, grad):
        logits, ids = ctx.saved_tensors
        slope = torch.empty_like(logits)
        with torch.enable_grad():
            for out, x, i, g in InParts.few(slope, logits, ids, grad):
                x = x.detach().requires_grad_()
                out.copy_(torch.autograd.grad(ctx.function(x, i), x, g)[0])
        return None, slope, None


def in_slices(step: Callable, *vectors: torch.Tensor, size: int = 2 ** 22) -> Any:
    """What step makes of vectors (N,), entry by entry, three vectors (N,), in slices of a size."""
    made = [torch.empty_like(vectors[0]) for _ in range(3)]
    for start in range(0, len(vectors[0]), size):
        # Cloned: in forward mode the tangent of a view takes as much memory as the whole.
        parts = step(*(vector[start:start + size].clone() for vector in vectors))
        for whole, part in zip(made, parts):
            whole[start:start + size] = part
        del part, parts  # memory: while the next slice is made
    return made
