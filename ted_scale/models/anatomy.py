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
    block_parameters: int  # parameters of the largest block
    in_blocks: int  # parameters of all blocks
    matrices: int  # elements of matrices that multiply a token's state before the output projection; only chosen experts count
    max_length: int | None
    attention: tuple[attention.Layer, ...]
    heads: tuple[tuple[int, int], ...]  # (query heads, key heads); layers that agree appear once
    scores: tuple[tuple[int, int | None], ...]  # for each layer: (width of all queries and values, window)
    blocks_apart: int  # blocks that can keep documents apart
    chunk: int  # torch pads its recurrences to a multiple of so many tokens; 0 without recurrences

    @property
    def recurs(self) -> bool:
        """Whether some blocks carry a state from token to token, with or without attention."""
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
        """Apply the tail without DeepSpeed's hooks, which belong to the forward of the engine that owns these modules."""
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
        """The keyword arguments of linear_kl_ce for one side ("s" or "t"). States and weight are positional arguments there."""
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
    """The output head of a network, with the norm before it and the family's changes of logits."""
    output = network.get_output_embeddings()
    tail = tuple(network.get_submodule(name) for name in anatomy.tail)
    return Head(tail, output.weight, output.bias, anatomy.softcap, anatomy.logit_scale)


class StateRecorder:
    """Forward hooks that keep the outputs of the chosen blocks while `recording`. With `keep`, its result for (block, output) is
    kept instead. When a checkpointed block is computed again in backward, nothing is recorded."""

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
    """The input of the output projection, [B, T, head_width]. With `packing`, each document sees only itself. With `share`, T is
    this rank's part of the rows, and other ranks run the other parts at the same time."""
    body = network.get_submodule(anatomy.body)
    return body(input_ids=tokens_BT, use_cache=False, **attention.packing_arguments(packing, share))[0]
