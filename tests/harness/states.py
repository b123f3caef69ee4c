"""A checkpoint's tensors, whole, whatever number of ranks wrote it."""

from pathlib import Path

import torch

from ted_scale.base import sealed
from ted_scale.checkpoints.state import Part, State


def state_of(checkpoint: Path) -> State:
    return State(checkpoint, sealed.read_manifest(checkpoint))


def whole(state: State, name: str, kind: str = "fp32") -> torch.Tensor:
    tensor = torch.empty(state.shapes[name])
    state.fill([Part(kind, name, 0, tensor.view(-1))])
    return tensor
