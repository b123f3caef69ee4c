"""The trained state: from the engine to host memory, as one safetensors file a rank, and back on any number of ranks.

DeepSpeed keeps flat groups of fp32 master weights, with AdamW's moments for each. ZeRO-3 cuts every tensor, flattened, into
equal pieces, one a rank. A rank's file holds its pieces, without the padding of the last one; a reader on other ranks takes
what it needs from the files that have it. The manifest holds the names and shapes of the tensors (sealed.py). The frozen teacher
is never saved. Note: DeepSpeed's own save and load are not used (design note 16): they pickle, they need the same number of
ranks again, and they restore learning rates that the run file has changed.
"""

import json
import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from ted_scale.base import sealed
from ted_scale.base.errors import UserError
from ted_scale.base.parsing import fits, is_count

KINDS = ("fp32", "exp_avg", "exp_avg_sq")  # the master weight and AdamW's moments, all in fp32
BYTES = 4


class Snapshot(NamedTuple):
    """This rank's part of a checkpoint, in host memory that nothing else writes to."""

    tensors: dict[str, torch.Tensor]
    about: dict  # what the manifest holds about the parts of all ranks


class Member(NamedTuple):
    """A parameter of a group. This rank holds its elements [first, last), at the start of a `place` in the group's memory; the
    rest of the place is padding."""

    name: str
    shape: tuple[int, ...]
    place: slice
    first: int
    last: int


class Group(NamedTuple):
    """A flat stretch of the engine's memory: this rank's pieces of some parameters, one after another."""

    tensors: dict[str, torch.Tensor]  # by kind; flat
    members: list[Member]
    step: torch.Tensor  # the number of updates


# Engine to host memory


def groups_of(engine) -> list[Group]:
    optimizer, names = engine.optimizer, {p.ds_id: name for name, p in engine.module.named_parameters()}
    found = []
    for masters, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        members, begin = [], 0
        for parameter in parameters:
            place = slice(begin, begin + parameter.ds_tensor.ds_numel)
            held = cut(parameter.ds_numel, dist.get_world_size(), dist.get_rank())
            members.append(Member(names[parameter.ds_id], tuple(parameter.ds_shape), place, *held))
            begin = place.stop
        state = moments_of(optimizer.optimizer, masters)
        tensors = {"fp32": masters.detach(), **{kind: state[kind] for kind in KINDS[1:]}}
        found.append(Group(tensors, members, state["step"]))
    return found


def moments_of(adamw, masters: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """AdamW's state of a flat group. AdamW makes it at its first step; before that, it is made here in the same way."""
    state = adamw.state[masters]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=masters.device)
        state |= {kind: torch.zeros_like(masters.detach()) for kind in KINDS[1:]}
    return state


def kept_buffers(engine) -> list[dict[str, torch.Tensor]]:
    """Host memory for a copy of the state, written once now so that no save waits for the system to map it."""

    def like(tensor):
        pinned = tensor.device.type == "cuda"
        return torch.zeros(len(tensor), dtype=torch.float32, pin_memory=pinned).fill_(0)

    return [{kind: like(tensor) for kind, tensor in group.tensors.items()} for group in groups_of(engine)]


def snapshot(engine, buffers: list[dict[str, torch.Tensor]]) -> Snapshot:
    """Copy the state into `buffers`. A training step waits for this and for no other part of a save."""
    tensors, shapes, updates = {}, {}, set()
    for group, kept in zip(groups_of(engine), buffers, strict=True):
        for kind, tensor in group.tensors.items():
            kept[kind].copy_(tensor, non_blocking=True)
        for name, shape, place, first, last in group.members:
            shapes[name] = list(shape)
            if last > first:  # a piece that is all padding is in no file
                tensors |= {key_of(kind, name): kept[kind][place][: last - first] for kind in KINDS}
        updates.add(int(group.step))
    if engine.device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    if len(updates) != 1:
        raise RuntimeError(f"every group must have made as many updates, but they made {sorted(updates)}")
    return Snapshot(tensors, {"ranks": dist.get_world_size(), "updates": updates.pop(), "shapes": shapes})


# Host memory to a file


def key_of(kind: str, name: str) -> str:
    return f"{kind}/{name}"


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def as_bytes(tensors: dict[str, torch.Tensor], about: dict[str, str] | None = None) -> Iterable:
    """A safetensors file of fp32 tensors in host memory, in pieces, without a copy of the tensors."""
    header, end = {"__metadata__": about} if about else {}, 0
    for key, tensor in tensors.items():
        first, end = end, end + BYTES * tensor.numel()
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        if tensor.numel():
            yield memoryview(tensor.flatten().numpy())


# Files to tensors, and to an engine


def cut(numel: int, ranks: int, rank: int) -> tuple[int, int]:
    """The elements [first, last) of a flattened tensor that `rank` of `ranks` holds."""
    piece = -(-numel // ranks)
    return min(rank * piece, numel), min((rank + 1) * piece, numel)


def is_valid(manifest: dict) -> bool:
    shapes = manifest["shapes"].values()
    sizes = [math.prod(shape) if isinstance(shape, list) and all(map(is_count, shape)) else 0 for shape in shapes]
    return manifest["ranks"] > 0 and all(size > 0 and is_count(size) for size in sizes)


class State:
    """The tensors of a checkpoint, memory-mapped. A file is opened when it is first needed."""

    def __init__(self, checkpoint: Path, manifest: dict):
        if not fits(manifest, {"ranks": int, "updates": int, "shapes": dict}) or not is_valid(manifest):
            raise UserError(
                f"{checkpoint / sealed.MANIFEST} must hold ranks, updates and shapes, but does not; copy it again"
            )
        self.checkpoint, self.ranks, self.shapes = checkpoint, manifest["ranks"], manifest["shapes"]
        self.opened = lru_cache(maxsize=64)(lambda rank: safe_open(checkpoint / rank_file(rank), framework="pt"))

    def stretch(self, kind: str, name: str, first: int, last: int) -> torch.Tensor:
        """The elements [first, last) of a flattened tensor."""
        numel = torch.Size(self.shapes[name]).numel()
        parts, each = [], max(1, -(-numel // self.ranks))
        for rank in range(first // each, -(-last // each)):
            begin, end = cut(numel, self.ranks, rank)
            part = self.read(rank, key_of(kind, name))
            parts.append(part[max(first, begin) - begin : min(last, end) - begin])
        found = torch.cat(parts) if len(parts) != 1 else parts[0]
        if len(found) != last - first:
            raise UserError(
                f"{self.checkpoint} must hold {numel} numbers of {kind} of {name}, but does not; copy it again"
            )
        return found

    def read(self, rank: int, key: str):
        try:
            return self.opened(rank).get_slice(key)
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.checkpoint / rank_file(rank)} must hold {key}, but does not ({reason}); copy it again"
            ) from None

    def whole(self, name: str, kind: str = "fp32") -> torch.Tensor:
        shape = torch.Size(self.shapes[name])
        return self.stretch(kind, name, 0, shape.numel()).view(shape)


def load(engine, checkpoint: Path) -> None:
    """Load masters and moments, whatever number of ranks wrote them, and the weights that follow from the masters. Learning
    rates stay those of the run file."""
    manifest = sealed.read_manifest(checkpoint)
    state, optimizer = State(checkpoint, manifest), engine.optimizer
    for number, group in enumerate(groups_of(engine)):
        for member in group.members:
            load_member(state, group, member)
        group.step.fill_(manifest["updates"])
        optimizer._reassign_or_swap_out_partitioned_parameters(number)  # masters to weights, as after a step
    if optimizer.persistent_parameters:  # small tensors, which every rank has whole: gather them again
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer._post_step(())


def load_member(state: State, group: Group, member: Member) -> None:
    name, shape, place, first, last = member
    check_shape(state, name, shape)
    for kind, tensor in group.tensors.items():
        piece = tensor[place]
        piece[last - first :] = 0
        if last > first:
            piece[: last - first].copy_(state.stretch(kind, name, first, last))


def check_shape(state: State, name: str, shape: tuple[int, ...]) -> None:
    theirs = state.shapes.get(name)
    if theirs is None or tuple(theirs) != shape:
        has = "does not have it" if theirs is None else f"has shape {tuple(theirs)}"
        raise UserError(
            f"{state.checkpoint} must hold {name} of shape {shape}, but {has}; set the model and the filters back, or give "
            "the run another name"
        )
