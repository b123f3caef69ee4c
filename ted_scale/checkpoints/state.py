"""The trained state: it is copied from the engine to host memory, written as one file for each rank, and read on any number of
ranks.

DeepSpeed keeps flat groups of fp32 master weights, with AdamW's moments for each. ZeRO-3 flattens every tensor and cuts it into
equal pieces, one for each rank. A rank's file holds its pieces, without the padding of the last one. A reader on other ranks goes
through the files and takes what it needs from each. The manifest holds the names and shapes of the tensors (sealed.py). The
frozen teacher is never saved. Note: DeepSpeed's own save and load are not used (design note 16). They pickle, they need the same
number of ranks again, and they restore learning rates that the run file has changed.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ted_scale.base import sealed
from ted_scale.base.errors import UserError
from ted_scale.base.parsing import fits, is_count
from ted_scale.storage import tensor_file
from ted_scale.storage.tensor_file import Stretch

KINDS = ("fp32", "exp_avg", "exp_avg_sq")  # the master weight and AdamW's moments, all in fp32


class Snapshot(NamedTuple):
    """This rank's part of a checkpoint, in host memory to which nothing else writes."""

    tensors: dict[str, torch.Tensor]
    about: dict  # what the manifest says about the parts of all ranks


class Member(NamedTuple):
    """A parameter of a group. This rank holds its elements [first, last). They are at the start of `place` in the group's memory,
    and the rest of `place` is padding."""

    name: str
    shape: tuple[int, ...]
    place: slice
    first: int
    last: int


class Group(NamedTuple):
    """A flat stretch of the engine's memory: this rank's pieces of some parameters, one after another."""

    tensors: dict[str, torch.Tensor]  # flat tensors, by kind
    members: list[Member]
    step: torch.Tensor  # the number of updates


# Engine to host memory


def groups_of(engine) -> list[Group]:
    """DeepSpeed's flat groups, by reference: a write to their tensors changes the optimizer's state."""
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
    """AdamW's state of a flat group. AdamW makes it at its first step. Before that step, this makes it in the same way."""
    state = adamw.state[masters]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=masters.device)
        state |= {kind: torch.zeros_like(masters.detach()) for kind in KINDS[1:]}
    return state


def kept_buffers(engine) -> list[dict[str, torch.Tensor]]:
    """Host memory for a copy of the state. It is written once now, so that no save waits until the system maps it."""

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
            if last > first:  # a piece of padding alone is not written
                tensors |= {key_of(kind, name): kept[kind][place][: last - first] for kind in KINDS}
        updates.add(int(group.step))
    if engine.device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    if len(updates) != 1:
        raise RuntimeError(f"all groups must have the same number of updates, but have {sorted(updates)}")
    return Snapshot(tensors, {"ranks": dist.get_world_size(), "updates": updates.pop(), "shapes": shapes})


# The file of each rank


def key_of(kind: str, name: str) -> str:
    return f"{kind}/{name}"


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


# Files to tensors, and to an engine


def cut(numel: int, ranks: int, rank: int) -> tuple[int, int]:
    """The elements [first, last) of a flattened tensor that `rank` of `ranks` holds."""
    piece = -(-numel // ranks)
    return min(rank * piece, numel), min((rank + 1) * piece, numel)


def is_valid(manifest: dict) -> bool:
    shapes = manifest["shapes"].values()
    sizes = [math.prod(shape) if isinstance(shape, list) and all(map(is_count, shape)) else 0 for shape in shapes]
    return manifest["ranks"] > 0 and all(size > 0 and is_count(size) for size in sizes)


class Part(NamedTuple):
    """Elements of a flattened tensor: those from `first` on that fill `target`."""

    kind: str
    name: str
    first: int
    target: torch.Tensor  # flat


class State:
    """The tensors of a checkpoint, in the files of the ranks that wrote it."""

    def __init__(self, checkpoint: Path, manifest: dict):
        if not fits(manifest, {"ranks": int, "updates": int, "shapes": dict}) or not is_valid(manifest):
            raise UserError(
                f"{checkpoint / sealed.MANIFEST} must hold ranks, updates and shapes, but does not; copy it again"
            )
        self.checkpoint, self.ranks, self.shapes = checkpoint, manifest["ranks"], manifest["shapes"]

    def fill(self, parts: list[Part]) -> None:
        """Read all parts, file by file. Each file with some of them is opened once."""
        for rank in sorted(set().union(*map(self.holders, parts))):
            tensor_file.fill(self.checkpoint / rank_file(rank), partial(self.held_by, rank, parts))

    def holders(self, part: Part) -> range:
        """The ranks whose files hold elements of a part."""
        each = max(1, -(-math.prod(self.shapes[part.name]) // self.ranks))
        return range(part.first // each, -(-(part.first + part.target.numel()) // each))

    def held_by(self, rank: int, parts: list[Part], entries) -> Iterator[Stretch]:
        """The elements of the parts that the file of `rank` holds."""
        for kind, name, first, target in parts:
            begin, end = cut(math.prod(self.shapes[name]), self.ranks, rank)
            low, high = max(first, begin), min(first + target.numel(), end)
            if low < high:
                yield Stretch(key_of(kind, name), low - begin, target[low - first : high - first])


def load(engine, checkpoint: Path) -> None:
    """Load masters and moments, which any number of ranks may have written. The weights follow from the masters. Learning rates
    stay those of the run file."""
    manifest = sealed.read_manifest(checkpoint)
    state, optimizer, groups = State(checkpoint, manifest), engine.optimizer, groups_of(engine)
    state.fill([part for group in groups for member in group.members for part in parts_of(state, group, member)])
    for number, group in enumerate(groups):
        group.step.fill_(manifest["updates"])
        optimizer._reassign_or_swap_out_partitioned_parameters(number)  # copies masters to weights, as a step does
    if optimizer.persistent_parameters:  # small tensors, which every rank has whole: gather them again
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer._post_step(())


def parts_of(state: State, group: Group, member: Member) -> list[Part]:
    """The parts of a parameter that belong into a group. The padding after them becomes zero."""
    name, shape, place, first, last = member
    check_shape(state, name, shape)
    for tensor in group.tensors.values():
        tensor[place][last - first :] = 0
    return [Part(kind, name, first, tensor[place][: last - first]) for kind, tensor in group.tensors.items()]


def check_shape(state: State, name: str, shape: tuple[int, ...]) -> None:
    theirs = state.shapes.get(name)
    if theirs is None or tuple(theirs) != shape:
        has = "does not have it" if theirs is None else f"has shape {tuple(theirs)}"
        raise UserError(
            f"{state.checkpoint} must hold {name} of shape {shape}, but {has}; set the model and the filters back, or give "
            "the run another name"
        )
