"""Where a causal LM keeps what distillation needs, and how it is read there: body, matched blocks, output head.

Block k's state is the output of block k, counted from 0, before the tail (what is applied after the last block): not
`hidden_states[k]`, whose last entry is behind the final norm in most families. inspection.py fills an Anatomy.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ted_scale.data.packing import Packing
from ted_scale.models import attention


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Where a family keeps what distillation needs; names are module paths inside the causal LM."""

    folder: Path
    family: str
    body: str
    blocks: str
    tail: tuple[str, ...]
    layers: int
    width: int
    head_width: int
    vocab_size: int
    softcap: float | None
    logit_scale: float
    parameters: int
    block_parameters: int  # of the largest block
    matrices: int  # elements that a token's state is multiplied by, before the output projection
    max_length: int | None
    attention: tuple[attention.Layer, ...]
    scores: tuple[tuple[int, int | None], ...]  # a layer's width of all queries and values together, and its window
    blocks_apart: int


@dataclass(frozen=True)
class Head:
    """Everything a model applies after its last block. Whoever reads it gathers `parameters` first (see
    zero.gathered)."""

    tail: tuple
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    softcap: float | None
    logit_scale: float

    def norm(self, states):
        """The tail, past DeepSpeed's hooks: they belong to the forward of the engine that owns these modules."""
        for module in self.tail:
            states = module.forward(states)
        return states

    @property
    def reading(self) -> dict:
        """What `filtered_ce` is told of a head."""
        return {
            "norm": self.norm, "head_w": self.weight, "head_b": self.bias,
            "softcap": self.softcap, "logit_scale": self.logit_scale,
        }  # fmt: skip

    @property
    def projection(self) -> list:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def parameters(self) -> list:
        return [p for module in self.tail for p in module.parameters()] + self.projection


def head_of(network, anatomy: Anatomy) -> Head:
    output = network.get_output_embeddings()
    tail = tuple(network.get_submodule(name) for name in anatomy.tail)
    return Head(tail, output.weight, output.bias, anatomy.softcap, anatomy.logit_scale)


class Taps:
    """Forward hooks that keep the chosen blocks' outputs while `recording`; a recompute of a checkpointed block is
    not."""

    def __init__(self, network, anatomy: Anatomy, indices):
        self.states: dict[int, torch.Tensor] = {}
        self.recording = False
        blocks = network.get_submodule(anatomy.blocks)
        for index in sorted(set(indices)):
            blocks[index].register_forward_hook(self.keeper(index))

    def keeper(self, index: int):
        def keep(module, inputs, output):
            if self.recording:
                self.states[index] = output[0] if isinstance(output, tuple) else output

        return keep

    @contextlib.contextmanager
    def record(self, wanted: bool):
        self.recording = wanted
        try:
            yield self.states
        finally:
            self.recording, self.states = False, {}


def run_body(network, anatomy: Anatomy, tokens_BT, packing: Packing | None = None):
    """The input of the output projection, [B, T, head_width]; documents see only themselves where `packing` names
    them."""
    body = network.get_submodule(anatomy.body)
    return body(input_ids=tokens_BT, use_cache=False, **attention.told_of(packing))[0]
