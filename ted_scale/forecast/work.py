"""What a pass of a body reads and writes beside its products, and how many operations it is: counted on the meta device.

FLOPs are flops.py's. Note: two trials of different length are compared, so that what does not grow with the tokens (weights, rotary
tables, gradients of weights) does not count here.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ted_scale.models.anatomy import Anatomy
from ted_scale.models.trial import hollow, least_tokens, run_hollow

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
FREE = ("empty", "new_empty", "empty_like", "detach", "arange")


class Pass(NamedTuple):
    """Of one token through a body, forward or backward; `calls` are those of a whole micro-batch."""

    eager: float  # bytes that all operations but products and attention read and write
    fused: float  # bytes where such operations are one kernel between two products: what products read and write, once more
    calls: int


class Passes(NamedTuple):
    forward: Pass
    backward: Pass


class Count(TorchDispatchMode):
    """Bytes and calls of the operations inside."""

    def __init__(self):
        super().__init__()
        self.eager, self.fused, self.calls = 0, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        name = operation._schema.name.partition("::")[2]
        if operation.is_view or name in FREE:
            return out
        size = sum(tensor.nbytes for tensor in tensors_of((args, kwargs or {}, out)))
        self.calls += 1
        self.fused += size if name in PRODUCTS else 0
        self.eager += 0 if name in PRODUCTS else size
        return out


def tensors_of(tree) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@cache
def passes(anatomy: Anatomy, dtype) -> Passes:
    """What a token costs in a forward and a backward, from trials on the meta device of one and of two lengths."""
    network = hollow(anatomy, dtype)
    tokens = least_tokens(anatomy)
    short, long = (trial(network, anatomy, times * tokens) for times in (1, 2))
    return Passes(*(a_token(*pair, tokens) for pair in zip(short, long, strict=True)))


def trial(network, anatomy: Anatomy, tokens: int) -> tuple[Count, Count]:
    network.zero_grad(set_to_none=True)  # or else the second trial would add to the gradients of the first
    forward, backward = Count(), Count()
    with torch.enable_grad():
        with forward:
            out = run_hollow(network, anatomy, tokens)
        with backward:
            out.backward(torch.empty_like(out))
    return forward, backward


def a_token(short: Count, long: Count, tokens: int) -> Pass:
    return Pass((long.eager - short.eager) / tokens, (long.fused - short.fused) / tokens, long.calls)
