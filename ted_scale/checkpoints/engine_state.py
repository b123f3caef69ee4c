"""The engine's state to host memory and back: every rank its own pieces; the frozen teacher is never saved.

Where the pieces lie is DeepSpeed's: flat groups of fp32 masters, each with AdamW's moments. How they become files:
pieces.py; when, and by whom: saver.py; what stands beside them: folder.py. The surprise: DeepSpeed's own
save and load are not used (design note 16): they pickle, tie files to the number of ranks, and restore rates that a run
file has changed.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ted_scale.base import sealed
from ted_scale.base.errors import UserError
from ted_scale.checkpoints.pieces import KINDS, State, cut, key_of
from ted_scale.models.zero import shape_of


class Snapshot(NamedTuple):
    """This rank's part of a checkpoint, in host memory that nobody else writes to."""

    tensors: dict[str, torch.Tensor]
    about: dict  # what the manifest says of all ranks' parts


class Group(NamedTuple):
    """One of the engine's flat stretches of memory: parameters one after another, each with this rank's piece of it."""

    tensors: dict[str, torch.Tensor]  # by kind; flat
    members: list[tuple[str, int, torch.nn.Parameter]]  # name, where it begins, parameter
    step: torch.Tensor  # updates that were made


def groups_of(engine) -> list[Group]:
    optimizer, names = engine.optimizer, {p.ds_id: name for name, p in engine.module.named_parameters()}
    found = []
    for masters, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        members, begin = [], 0
        for parameter in parameters:
            members.append((names[parameter.ds_id], begin, parameter))
            begin += parameter.ds_tensor.ds_numel
        state = moments_of(optimizer.optimizer, masters)
        tensors = {"fp32": masters.detach(), **{kind: state[kind] for kind in KINDS[1:]}}
        found.append(Group(tensors, members, state["step"]))
    return found


def moments_of(adamw, masters: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """AdamW's state of a flat group, which it makes at its first step, as it makes it."""
    state = adamw.state[masters]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=masters.device)
        state |= {kind: torch.zeros_like(masters.detach()) for kind in KINDS[1:]}
    return state


def held(parameter) -> tuple[int, int]:
    return cut(parameter.ds_numel, dist.get_world_size(), dist.get_rank())


def kept_buffers(engine) -> list[dict[str, torch.Tensor]]:
    """Host memory for a copy of the state, touched once so that no save waits for it."""

    def like(tensor):
        pinned = tensor.device.type == "cuda"
        return torch.zeros(len(tensor), dtype=torch.float32, pin_memory=pinned).fill_(0)

    return [{kind: like(tensor) for kind, tensor in group.tensors.items()} for group in groups_of(engine)]


def snapshot(engine, buffers: list[dict[str, torch.Tensor]]) -> Snapshot:
    """Copy the state into `buffers`: all that a training step waits for."""
    tensors, shapes, updates = {}, {}, set()
    for group, kept in zip(groups_of(engine), buffers, strict=True):
        for kind, tensor in group.tensors.items():
            kept[kind].copy_(tensor, non_blocking=True)
        for name, begin, parameter in group.members:
            shapes[name] = list(shape_of(parameter))
            first, last = held(parameter)
            parts = {key_of(kind, name): kept[kind][begin : begin + last - first] for kind in KINDS}
            tensors |= parts if last > first else {}
        updates.add(int(group.step))
    if engine.device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    if len(updates) != 1:
        raise RuntimeError(f"every group must have made as many updates, but they made {sorted(updates)}")
    return Snapshot(tensors, {"ranks": dist.get_world_size(), "updates": updates.pop(), "shapes": shapes})


def load(engine, checkpoint: Path) -> None:
    """Masters, moments and the weights that follow from them, whatever ranks wrote them; rates stay the run file's."""
    manifest = sealed.read_manifest(checkpoint)
    state, optimizer = State(checkpoint, manifest), engine.optimizer
    for number, group in enumerate(groups_of(engine)):
        for name, begin, parameter in group.members:
            check_shape(state, name, parameter)
            first, last = held(parameter)
            for kind, tensor in group.tensors.items():
                piece = tensor[begin : begin + parameter.ds_tensor.ds_numel]
                piece[last - first :] = 0
                if last > first:
                    piece[: last - first].copy_(state.stretch(kind, name, first, last))
        group.step.fill_(manifest["updates"])
        optimizer._reassign_or_swap_out_partitioned_parameters(
            number
        )  # the weights in their own precision, as in a step
    if optimizer.persistent_parameters:  # the small ones that every rank has whole are gathered anew
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer._post_step(())


def check_shape(state: State, name: str, parameter) -> None:
    shape, theirs = shape_of(parameter), state.shapes.get(name)
    if theirs is None or tuple(theirs) != shape:
        has = "does not have it" if theirs is None else f"has shape {tuple(theirs)}"
        raise UserError(
            f"{state.checkpoint} must hold {name} of shape {shape}, but {has}; set the model and the filters back, or give "
            "the run another name"
        )
