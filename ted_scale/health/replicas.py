"""Finds silent errors of memory and devices. A rank's part of the frozen teacher must not change after it was loaded. Tensors
that every rank has whole must be equal on all ranks: small tensors under ZeRO-3, and all tensors of a teacher that is not
sharded.

Digests are integers over the bits, computed on the device of the tensors. A sum of floats would miss a flipped low bit and
would depend on the order. Note: only tensors that do not change or that exist twice can be checked. The student's shards,
masters and moments change and exist once, so they are not checked.
"""

import socket
from collections import Counter
from typing import NamedTuple

import torch
import torch.distributed as dist

from ted_scale.base.errors import RunStopped
from ted_scale.models.zero import is_sharded, without_padding
from ted_scale.ranks.agree import gather, of_all_ranks

AS_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
GOLDEN = -7046029254386353131  # 2^64 divided by the golden ratio, as a signed number; it spreads places far apart
ROUNDS = ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1))  # splitmix64's


class Fault(NamedTuple):
    tensor: str
    rank: int
    must: str


def digest(values: torch.Tensor) -> torch.Tensor:
    """64 bits that depend on every bit of a tensor and its place. One changed entry always changes the digest; several changed
    entries go unnoticed with a chance of 2^-64."""
    bits = values.detach().flatten().view(AS_INTEGERS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    chunk = 1 << (15 if bits.device.type == "cpu" else 22)  # fits into a CPU's cache, or keeps a GPU busy
    for start in range(0, len(bits), chunk):
        total += mixed(bits[start : start + chunk], start).sum()
    return total


def mixed(bits: torch.Tensor, start: int) -> torch.Tensor:
    """Mix each entry with its place by a permutation of 64 bits. int64 wraps around. The mask removes the copied sign bits."""
    x = torch.arange(start + 1, start + 1 + len(bits), device=bits.device).mul_(GOLDEN).add_(bits)
    for shift, odd in ROUNDS:
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(odd)
    return x


def parts_of(module) -> dict[str, torch.Tensor]:
    """This rank's part of every parameter: its shard, or all of it. A parameter in 8 bits gives its numbers and their scales."""
    parts = {}
    for name, p in module.named_parameters():
        inner = p.__tensor_flatten__()[0] if hasattr(p, "__tensor_flatten__") else ()
        parts |= {f"{name}.{key}": getattr(p, key) for key in inner}
        parts |= {} if inner else {name: without_padding(p, p.ds_tensor) if is_sharded(p) else p}
    return parts


def frozen_of(teacher) -> dict[str, torch.Tensor]:
    """The teacher's parameters, and those of the filters that it was given."""
    lent = {} if teacher.filters is None else parts_of(teacher.filters)
    return parts_of(teacher.body) | {f"filters.{name}": tensor for name, tensor in lent.items()}


def copies_of(module) -> dict[str, torch.Tensor]:
    """The parameters that are whole on this rank. Between two steps a parameter is whole on all ranks or on none. A single rank
    has nothing to compare with, so it gets none."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if dist.get_world_size() == 1:
        return {}
    whole = ((n, p) for n, p in module.named_parameters() if is_sharded(p) and p.ds_status == ZeroParamStatus.AVAILABLE)
    return {name: p.data for name, p in whole}


def digests(tensors: dict[str, torch.Tensor], device) -> torch.Tensor:
    """One number for each tensor, from all its bits."""
    found = [digest(tensor).to(device) for tensor in tensors.values()]
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.int64, device=device)


def verify(teacher, student, progress) -> None:
    """Compare the replicas. Call it on all ranks at the same step. A difference stops all ranks with the same error."""
    at_load = getattr(teacher, "at_load", None)  # without a teacher, `teacher` is a plain function
    sides = {"student": student.module} | ({} if at_load is None else {"teacher": teacher.body})
    frozen = {} if at_load is None else frozen_of(teacher)
    copies = {f"{side}'s {name}": copy for side, module in sides.items() for name, copy in copies_of(module).items()}
    ours, names = digests(copies, student.device), list(copies)
    if frozen:
        now = digests(frozen, student.device)
        if teacher.is_bare:  # every rank has read all of it
            ours, names = torch.cat([ours, now]), names + [f"teacher's {name}" for name in frozen]
        ours = torch.cat([(now != at_load).long(), ours])
    rows = of_all_ranks(ours).tolist()
    fault = first_changed(list(frozen), rows) or first_alone(names, [row[len(frozen) :] for row in rows])
    if fault:
        stop(progress.step, fault)


def first_changed(names: list[str], rows: list[list[int]]) -> Fault | None:
    """The first part of the teacher whose digest differs from the one at load."""
    found = ((k, rank) for rank, row in enumerate(rows) for k in range(len(names)) if row[k])
    which = min(found, default=None)
    return which and Fault(f"the teacher's {names[which[0]]}", which[1], "the bits that were loaded")


def first_alone(names: list[str], rows: list[list[int]]) -> Fault | None:
    """The first tensor that differs between ranks, and the rank that differs from most ranks; of two ranks, the second."""
    for name, found in zip(names, zip(*rows, strict=True), strict=True):
        (most, _), *others = Counter(found).most_common()
        if others:
            rank = next(rank for rank, one in enumerate(found) if one != most)
            return Fault(f"the {name}", rank, f"the bits of rank {found.index(most)}")
    return None


def stop(step: int, fault: Fault) -> None:
    nodes = gather(socket.gethostname())
    raise RunStopped(
        f"step {step}: {fault.tensor} must hold {fault.must} on rank {fault.rank} ({nodes[fault.rank]}), but holds others; the "
        "last checkpoint was written before: look at that node's memory and device, then start the same command again"
    )
