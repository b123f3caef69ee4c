"""The parts of a causal LM that distillation reads: body, matched blocks, output head.

Block k's state is the output of block k, counted from 0, before the tail (the modules after the last block). It is not
`hidden_states[k]`, whose last entry comes after the final norm in most families. inspection.py creates an Anatomy.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ted_scale.data.packing import Packing, Share
from ted_scale.models import attention


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The parts and sizes of a model; names are module paths inside the causal LM."""

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
    in_blocks: int  # of all blocks
    matrices: int  # elements of the matrices that multiply a token's state before the output projection; of experts, the chosen
    max_length: int | None
    attention: tuple[attention.Layer, ...]
    heads: tuple[tuple[int, int], ...]  # of queries and of keys
    scores: tuple[tuple[int, int | None], ...]  # of each layer: the width of all queries and values, and the window
    blocks_apart: int  # blocks that can keep documents apart
    chunk: int  # tokens that torch's form of its recurrences fills up to; 0 without recurrences

    @property
    def recurs(self) -> bool:
        """Has blocks that carry a state from token to token, beside attention or without it."""
        return self.chunk > 0


@dataclass(frozen=True)
class Head:
    """Everything that a model applies after its last block. Gather `parameters` before reading it (zero.gathered)."""

    tail: tuple
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    softcap: float | None
    logit_scale: float

    def norm(self, states):
        """The tail, without DeepSpeed's hooks: they belong to the forward of the engine that owns these modules."""
        for module in self.tail:
            states = module.forward(states)
        return states

    @property
    def filtered_ce_arguments(self) -> dict:
        return {
            "norm": self.norm, "head_w": self.weight, "head_b": self.bias,
            "softcap": self.softcap, "logit_scale": self.logit_scale,
        }  # fmt: skip

    def linear_kl_ce_arguments(self, side: str) -> dict:
        """`side` is "s" or "t"; states and weight are positional arguments there."""
        return {
            f"softcap_{side}": self.softcap,
            f"logit_scale_{side}": self.logit_scale,
            f"head_bias_{side}": self.bias,
        }

    @property
    def projection(self) -> list:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def parameters(self) -> list:
        return [p for module in self.tail for p in module.parameters()] + self.projection


def head_of(network, anatomy: Anatomy) -> Head:
    """The output head of a network, with the norm before it, and what the family does to logits."""
    output = network.get_output_embeddings()
    tail = tuple(network.get_submodule(name) for name in anatomy.tail)
    return Head(tail, output.weight, output.bias, anatomy.softcap, anatomy.logit_scale)


class StateRecorder:
    """Forward hooks that keep the chosen blocks' outputs while `recording`, or what `keep` makes of a block's number and its
    output. When a checkpointed block is computed again, in backward, nothing is recorded."""

    def __init__(self, network, anatomy: Anatomy, indices, keep=lambda index, state: state):
        self.states: dict[int, Any] = {}
        self.recording, self.keep = False, keep
        blocks = network.get_submodule(anatomy.blocks)
        for index in sorted(set(indices)):
            blocks[index].register_forward_hook(self.hook(index))

    def hook(self, index: int):
        def kept(module, inputs, output):
            if self.recording:
                self.states[index] = self.keep(index, output[0] if isinstance(output, tuple) else output)

        return kept

    @contextlib.contextmanager
    def record(self, wanted: bool):
        self.recording = wanted
        try:
            yield self.states
        finally:
            self.recording, self.states = False, {}


def run_body(network, anatomy: Anatomy, tokens_BT, packing: Packing | None = None, share: Share | None = None):
    """The input of the output projection, [B, T, head_width]; with `packing`, each document sees only itself. With `share`, T is
    this rank's part of rows whose other parts other ranks run at the same time."""
    body = network.get_submodule(anatomy.body)
    return body(input_ids=tokens_BT, use_cache=False, **attention.packing_arguments(packing, share))[0]
