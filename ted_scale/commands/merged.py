"""The student of a run with adapters as one model: W + alpha / rank · B·A, computed in fp32 and rounded once.

A checkpoint has the adapters alone, so the frozen weights are read from the folder the run started from, which must be the same.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from ted_scale.base.errors import UserError
from ted_scale.checkpoints.progress import read_progress
from ted_scale.checkpoints.state import Part, State
from ted_scale.config.models import Lora
from ted_scale.models import fingerprint, lora
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.inspection import inspect
from ted_scale.models.trial import hollow
from ted_scale.models.weights import load_weights


class Base(NamedTuple):
    """The frozen student, its weights in its folder's files."""

    anatomy: Anatomy
    settings: Lora
    inside: str  # what a checkpoint puts before the network's names


def open_base(checkpoint: Path, student: Path, settings: Lora, inside: str) -> Base:
    theirs, ours = read_progress(checkpoint).identity.get("student.base"), fingerprint.sampled(student)
    if theirs != ours:
        raise UserError(
            f"--student must be the folder whose weights {checkpoint.name} has adapters for ({theirs}), but {student} has others "
            f"({ours}); name that folder"
        )
    return Base(inspect("student.path", str(student)), settings, inside)


def read(base: Base, state: State, tensors: dict) -> None:
    """Fill the tensors of an output shard."""
    network = hollow(base.anatomy, torch.float32)
    whole = {name: torch.empty(t.shape, dtype=to_sum(t.dtype)) for name, t in tensors.items()}
    load_weights(network, base.anatomy.folder, under_all_names(network, whole))
    for name, matrix in lora.matrices(base.anatomy, base.settings.targets).items():
        if (weight := f"{name}.weight") in whole:
            whole[weight] += lora.delta(matrix, base.settings, *adapter(state, base, name))
    for name, tensor in tensors.items():
        tensor.copy_(whole[name])


def to_sum(dtype):
    return torch.float32 if dtype.is_floating_point else dtype


def under_all_names(network, tensors: dict) -> dict:
    """A tied tensor may have any of its names in the files."""
    first = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), name)
    every = {name: first[id(tensor)] for name, tensor in network.state_dict(keep_vars=True).items()}
    return {name: tensors[own] for name, own in every.items() if own in tensors}


def adapter(state: State, base: Base, name: str) -> list[torch.Tensor]:
    """A and B of a module, in fp32."""
    matrix, rank = lora.matrices(base.anatomy, base.settings.targets)[name], base.settings.rank
    both = torch.empty(rank, matrix.inputs), torch.empty(matrix.outputs, rank)
    names = [f"{base.inside}{name}.{own}" for own in lora.NAMES]
    state.fill([Part("fp32", key, 0, tensor.view(-1)) for key, tensor in zip(names, both, strict=True)])
    return list(both)


def write_adapters(folder: Path, state: State, base: Base) -> None:
    """Beside the merged model, in fp32: PeftModel.from_pretrained(STUDENT, FOLDER)."""
    tensors = {}
    for name in lora.matrices(base.anatomy, base.settings.targets):
        for side, tensor in zip("AB", adapter(state, base, name), strict=True):
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = tensor
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    lora.settings(base.anatomy, base.settings).save_pretrained(folder)
