"""How ranks agree: a value of rank 0, the first sentence of any rank, or what every rank has, the same on all of them.

Every function here is a collective: all ranks must call it, and in the same order.
"""

from datetime import timedelta

import torch
import torch.distributed as dist

from ted_scale.base.errors import UserError

LONGEST_WRITE = timedelta(hours=12)


def of_all_ranks(ours: torch.Tensor) -> torch.Tensor:
    """[ranks, *shape]; one collective. A process without ranks is one."""
    if not dist.is_initialized() or not ours.numel():
        return ours[None]
    rows = ours.new_empty(dist.get_world_size() * ours.numel())  # gloo gathers flat tensors only
    dist.all_gather_into_tensor(rows, ours.flatten())
    return rows.view(-1, *ours.shape)


def new_group():
    """For a thread, because the trainer's collectives go on meanwhile."""
    return dist.new_group(backend="gloo", timeout=LONGEST_WRITE)


def gather(mine, group) -> list:
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def share() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def refuse_together(sentence: str | None, kind=UserError) -> None:
    """Every rank leaves with the first sentence, so that none waits for another."""
    if first := first_of_all(sentence):
        raise kind(first)


def first_of_all(sentence: str | None) -> str | None:
    """The first sentence that any rank has, on all of them."""
    sentences = [None] * dist.get_world_size()
    dist.all_gather_object(sentences, sentence)
    return next((s for s in sentences if s), None)


def broadcast(value):
    """Rank 0's, for a shared file system may show each node another moment."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
