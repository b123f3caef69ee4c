"""What each dimension of a teacher's tensors counts: hidden channels, FFN channels, or the channels of heads.

Only dimensions that differ between teacher and student are cut. Their sizes tell hidden and FFN channels apart. Heads are found by
a trial, because many families have as many channels in their heads as in their states, and some have queries, keys and
values in one projection: in one token's forward the gradient of each head's query, key and value says which outputs of a
projection it reads. Nothing is guessed from a family's name. Note: a head's channels keep their order, so cutting heads out
of any layout gives the same layout with fewer heads.
"""

import contextlib
from typing import NamedTuple

import torch
from transformers import AttentionInterface

from ted_scale.base.errors import UserError
from ted_scale.models import attention
from ted_scale.models.anatomy import Anatomy, run_body


class Reader(NamedTuple):
    """Who reads the outputs of a projection: for each channel the number of a query head, or of a key head, or -1."""

    query: torch.Tensor
    key: torch.Tensor


class Heads(NamedTuple):
    """The attention of one block, by names of modules."""

    name: str
    before: dict[str, Reader]  # projections to queries, keys and values
    after: str  # the projection of what the heads found


def is_matrix(module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 2 and not isinstance(module, torch.nn.Embedding)


def input_dim(module) -> int:
    """Of a matrix' weight: transformers' Conv1D has it the other way round."""
    return 1 if isinstance(module, torch.nn.Linear) else 0


class Seen(NamedTuple):
    """A call of attention in a trial."""

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@contextlib.contextmanager
def watched_attention():
    calls: list[Seen] = []

    def watch(module, query, key, value, attention_mask, **kwargs):
        calls.append(Seen(module, query, key, value))
        return attention.causal_attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(attention.NAME, watch)
    try:
        yield calls
    finally:
        AttentionInterface.register(attention.NAME, attention.causal_attention)


def find_heads(network, anatomy: Anatomy, heads: int) -> list[Heads]:
    """Of each block, in order."""
    names = {module: name for name, module in network.named_modules()}
    parts = parts_of_attention(network, anatomy)
    with torch.enable_grad(), watched_attention() as calls:
        before, after = trial(network, anatomy, heads, parts, calls)
    found = []
    for number, call in enumerate(calls):
        inside = set(call.module.modules())
        outputs = {names[m]: leaf for m, leaf in before.get(number, {}).items() if m in inside}
        last = [names[m] for m in after.get(number, ()) if m in inside]
        readers = {name: reader_of(name, leaf, call, anatomy) for name, leaf in outputs.items()}
        if len(last) != 1 or not readers:
            raise cannot_cut(anatomy, names[call.module])
        found.append(Heads(names[call.module], readers, last[0]))
    if len(found) != anatomy.layers:
        raise cannot_cut(anatomy, anatomy.blocks)
    return found


def cannot_cut(anatomy: Anatomy, name: str) -> UserError:
    return UserError(
        f"TEACHER must have heads that can be told apart to be cut in width, but {anatomy.family} has none in {name}; cut it "
        "in depth only"
    )


def trial(network, anatomy: Anatomy, heads: int, parts: set, calls: list):
    """One token in as many rows as there are heads. (the outputs of the projections before each call, replaced by leaves of a
    graph; the matrices after each call). Other modules inside of attention pass on what they get: a norm would mix channels."""
    before, after, handles = {}, {}, []

    def at_matrix(module, inputs, output):
        leaf = torch.ones_like(output, requires_grad=True)
        before.setdefault(len(calls), {})[module] = leaf
        after.setdefault(len(calls) - 1, []).append(module)
        return leaf

    def pass_on(module, inputs, output):
        same = isinstance(output, torch.Tensor) and output.shape == inputs[0].shape
        return inputs[0] if same else None

    for module in parts:
        handles.append(module.register_forward_hook(at_matrix if is_matrix(module) else pass_on))
    try:
        device = network.get_input_embeddings().weight.device
        run_body(network, anatomy, torch.zeros(heads, 1, dtype=torch.long, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return before, after


def parts_of_attention(network, anatomy: Anatomy) -> set:
    """The modules without children inside the modules that call attention."""
    device = network.get_input_embeddings().weight.device
    with torch.no_grad(), watched_attention() as calls:
        run_body(network, anatomy, torch.zeros(1, 1, dtype=torch.long, device=device))
    return {part for call in calls for part in call.module.modules() if not list(part.children())}


def reader_of(name: str, leaf: torch.Tensor, call: Seen, anatomy: Anatomy) -> Reader:
    query, key, value = (owners(read, leaf) for read in call[1:])
    shared = torch.maximum(key, value)
    if ((query >= 0).int() + (key >= 0).int() + (value >= 0).int() != 1).any():
        raise cannot_cut(anatomy, name)
    return Reader(query, shared)


def owners(read: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    """For each channel of `leaf` [rows, 1, channels] the head of `read` [rows, heads, 1, width] that reads it, or -1."""
    nobody = torch.full((leaf.shape[-1],), -1)
    if not read.requires_grad:
        return nobody
    each = torch.arange(read.shape[1], device=read.device)
    (slope,) = torch.autograd.grad(read[each, each].sum(), leaf, retain_graph=True, allow_unused=True)
    if slope is None:
        return nobody
    reads = slope[: len(each), 0].ne(0).cpu()
    return torch.where(reads.any(0), reads.int().argmax(0), nobody)
