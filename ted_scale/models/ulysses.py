"""Rows that several ranks share (DeepSpeed's Ulysses): for attention, ranks exchange tokens for heads. Nothing else changes.

A rank has a part of every row. Before attention it receives all tokens of some heads, and sends its tokens of the other heads.
After attention the exchange is reversed. Note: this is the algorithm of DeepSpeed's UlyssesSPAttentionHF, but not that class,
which fits only one model with one batch size. docs/design/0046-rows-that-ranks-share.md has the reasons.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from ted_scale.base.errors import UserError
from ted_scale.data.packing import Packing
from ted_scale.ranks.group import group_of_node


class Shared(NamedTuple):
    """A layer gets this instead of a Packing if ranks share rows. The packing inside describes whole rows."""

    packing: Packing | None
    ranks: int


class LocalHeads(NamedTuple):
    """Replaces a layer's module for torch's attention, which reads there how many query heads share a key head."""

    num_key_value_groups: int
    is_causal: bool = True


class Exchange(torch.autograd.Function):
    """Sends slice i of the first dimension to rank i of those that share rows, and receives slice i from it. Gradients go the
    same way back."""

    @staticmethod
    def forward(ctx, slices, ranks: int):
        ctx.ranks = ranks
        return exchanged(slices, ranks)

    @staticmethod
    def backward(ctx, slope):
        return exchanged(slope, ctx.ranks), None


def exchanged(slices: torch.Tensor, ranks: int) -> torch.Tensor:
    """The slices after the exchange. The group is made at the first call, which all ranks make together. Ranks that share rows
    have consecutive numbers, like the ranks of a node."""
    out = torch.empty_like(slices, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, slices.contiguous(), group=group_of_node(ranks))
    return out


def heads_for_tokens(states_BHTD: torch.Tensor, ranks: int) -> torch.Tensor:
    """All heads of this rank's tokens → this rank's heads of all tokens. If there are fewer heads than ranks, several ranks get
    the same head."""
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
    """How many groups of ranks read different text. If rows are not shared, a group is one rank."""
    ranks = run.data.sequence_parallel
    if world % ranks:
        raise UserError(
            f"data.sequence_parallel must divide the ranks ({world}), but is {ranks}; change it or their number"
        )
    return world // ranks


def check(run, models: dict) -> None:
    """Refuse a number of ranks that cannot share a row of these models (name: anatomy or None), before any rank starts."""
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
    """Refuse a model with blocks that cannot keep documents apart. In a block that can, only attention mixes tokens, and it gets
    the keyword."""
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
