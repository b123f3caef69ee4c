"""Rows that several ranks share (DeepSpeed's Ulysses): attention gives tokens for heads, and everything else stays as it is.

A rank has a part of every row. Before attention it gets all tokens of some heads, and gives its tokens of the others; after it,
back. Note: this is the algorithm of DeepSpeed's UlyssesSPAttentionHF and not the class, which fits one model with one size of
batches; docs/design/0046-rows-that-ranks-share.md has the reasons.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from ted_scale.base.errors import UserError
from ted_scale.data.packing import Packing
from ted_scale.ranks.group import group_of_node


class Shared(NamedTuple):
    """Given to a layer instead of a Packing if ranks share rows. The packing inside is that of whole rows."""

    packing: Packing | None
    ranks: int


class LocalHeads(NamedTuple):
    """In the place of a layer's module, from which torch's attention reads how many query heads share a key head."""

    num_key_value_groups: int
    is_causal: bool = True


class Exchange(torch.autograd.Function):
    """Slice i of the first dimension goes to rank i of those that share rows, and comes from it. Its gradient goes back the same
    way."""

    @staticmethod
    def forward(ctx, slices, ranks: int):
        ctx.ranks = ranks
        return exchanged(slices, ranks)

    @staticmethod
    def backward(ctx, slope):
        return exchanged(slope, ctx.ranks), None


def exchanged(slices: torch.Tensor, ranks: int) -> torch.Tensor:
    """Their group is made at the first call, which all ranks make together; sequence ranks follow each other, as a node's do."""
    out = torch.empty_like(slices, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, slices.contiguous(), group=group_of_node(ranks))
    return out


def heads_for_tokens(states_BHTD: torch.Tensor, ranks: int) -> torch.Tensor:
    """All heads of this rank's tokens → this rank's heads of all tokens. Where there are fewer heads than ranks, several ranks get
    the same one."""
    heads = states_BHTD.shape[1]
    if heads < ranks:
        states_BHTD = states_BHTD.repeat_interleave(ranks // heads, dim=1)
    slices = states_BHTD.unflatten(1, (ranks, -1)).movedim(1, 0)
    return Exchange.apply(slices, ranks).movedim(0, 2).flatten(2, 3)


def tokens_for_heads(states_BTHD: torch.Tensor, ranks: int) -> torch.Tensor:
    """This rank's heads of all tokens → all heads of this rank's tokens."""
    slices = states_BTHD.unflatten(1, (ranks, -1)).movedim(1, 0)
    return Exchange.apply(slices, ranks).movedim(0, 2).flatten(2, 3)


def groups_of(run, world: int) -> int:
    """How many groups of ranks read different text; a group is one rank where rows are not shared."""
    ranks = run.data.sequence_parallel
    if world % ranks:
        raise UserError(
            f"data.sequence_parallel must divide the ranks ({world}), but is {ranks}; change it or their number"
        )
    return world // ranks


def check(run, models: dict) -> None:
    """Refuses a number of ranks that cannot share a row of these models (name: anatomy or None), before any rank starts."""
    ranks = run.data.sequence_parallel
    if ranks == 1:
        return
    if run.fused_blocks == "compile":
        raise UserError(
            "fused_blocks must be auto, liger or off where data.sequence_parallel is above 1, but is 'compile': a graph of a "
            "block would have to hold what ranks send each other; leave it out"
        )
    for side, anatomy in models.items():
        if anatomy:
            check_model(side, anatomy, ranks)


def check_model(side: str, anatomy, ranks: int) -> None:
    """A block takes part if it can keep documents apart: no other part of it mixes tokens, and its attention gets the keyword."""
    if anatomy.blocks_apart < anatomy.layers:
        raise UserError(
            f"data.sequence_parallel must be 1 where not all blocks take part in it, but is {ranks} for a {side} of family "
            f"{anatomy.family}, where {anatomy.blocks_apart} of {anatomy.layers} blocks can; leave it out"
        )
    if any(layer.sinks for layer in anatomy.attention):
        raise UserError(
            f"data.sequence_parallel must be 1 for a {side} with attention sinks, but is {ranks} for family {anatomy.family}; "
            "leave it out"
        )
    for queries, keys in anatomy.heads:
        if queries % ranks:
            raise UserError(
                f"data.sequence_parallel must divide the query heads of the {side} ({queries}), but is {ranks}; change it"
            )
        if keys % ranks and ranks % keys:
            raise UserError(
                f"data.sequence_parallel must divide the key heads of the {side} ({keys}) or be a multiple of them, but is "
                f"{ranks}; change it"
            )
