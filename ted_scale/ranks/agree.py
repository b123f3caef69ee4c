"""How ranks agree: on a value of rank 0, on the first sentence of any rank, or on what every rank has.

Every function here is a collective: all ranks must call it, in the same order. All ranks get the same answer.
"""

from datetime import timedelta

import torch
import torch.distributed as dist

from ted_scale.base.errors import SENTENCES

LONGEST_WRITE = timedelta(hours=12)


def broadcast(value):
    """Rank 0's value, on all ranks. A shared file system may show nodes different states, so only rank 0 looks."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(mine, group=None) -> list:
    """The value of every rank, by rank."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def first_of_all(fault, group=None):
    """The fault of the first rank that has one; None if no rank has one."""
    return next(filter(None, gather(fault, group)), None)


def verdict(look, *arguments):
    """The fault that `look` returns on the first rank with a fault; None if no rank has one. `look` may raise on a rank while no
    rank has a fault. Then all ranks raise its error, because a rank that raised alone would leave the others waiting."""
    fault, error = caught(look, arguments)
    everyone = gather((fault, error))
    found = next((fault for fault, _ in everyone if fault), None)
    if found is None and (met := next((error for _, error in everyone if error), None)):
        raise met
    return found


def of_rank_0(look, *arguments):
    """What `look` returns on rank 0, on all ranks. If it raises on rank 0, all ranks raise the same error."""
    found, error = broadcast(caught(look, arguments) if dist.get_rank() == 0 else None)
    if error:
        raise error
    return found


def caught(look, arguments):
    """(what `look` returns, the error that it raises). One of them is None."""
    try:
        return look(*arguments), None
    except SENTENCES as error:
        return None, error


def anywhere(flag: bool, device) -> bool:
    """Whether `flag` is true on any rank. The host waits for the device."""
    count = torch.full((1,), float(flag), device=device)
    if dist.is_initialized():
        dist.all_reduce(count)
    return count.item() > 0


def of_all_ranks(ours: torch.Tensor) -> torch.Tensor:
    """The tensors of all ranks, [ranks, *shape], in one collective. A process without a group is one rank."""
    if not dist.is_initialized() or not ours.numel():
        return ours[None]
    rows = ours.new_empty(dist.get_world_size() * ours.numel())  # gloo gathers flat tensors only
    dist.all_gather_into_tensor(rows, ours.flatten())
    return rows.view(-1, *ours.shape)


def share() -> tuple[int, int]:
    """(this rank, number of ranks n). This rank takes every n-th item of a list."""
    return dist.get_rank(), dist.get_world_size()


def new_group():
    """A process group for a background thread, because training uses the default group at the same time."""
    return dist.new_group(backend="gloo", timeout=LONGEST_WRITE)
