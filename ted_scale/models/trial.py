"""Runs a body on the meta device over a few tokens. This shows what its operations keep, read and write, without weights.

Note: torch's attention has no kernel there and would compute whole scores, which no real device does. A stand-in keeps what the
fused kernels keep: queries, keys, values and the result.
"""

import contextlib

import torch
from transformers import AttentionInterface

from ted_scale.models import attention, experts
from ted_scale.models.anatomy import Anatomy, run_body
from ted_scale.models.inspection import empty_model, read_config


class FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        rows, heads, length, _ = query.shape
        out = query.new_empty(rows, length, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, _):
        return tuple(tensor.new_empty(tensor.shape) for tensor in ctx.saved_tensors[:3])


def stand_in(module, query, key, value, attention_mask, **_):
    return FusedAttention.apply(query, key, value), None


@contextlib.contextmanager
def fused_attention():
    AttentionInterface.register(attention.NAME, stand_in)
    try:
        yield
    finally:
        AttentionInterface.register(attention.NAME, attention.causal_attention)


def least_tokens(anatomy: Anatomy) -> int:
    """The least number of tokens for a trial: a whole chunk of the model's recurrences."""
    return anatomy.chunk or 8


def hollow(anatomy: Anatomy, dtype):
    """The network on the meta device."""
    with torch.device("meta"):
        return empty_model(read_config("model", anatomy.folder), dtype)


def run_hollow(network, anatomy: Anatomy, tokens: int, rows: int = 1):
    """The input of the network's head, for `rows` rows of `tokens` tokens."""
    with fused_attention(), experts.as_one():
        return run_body(network, anatomy, torch.zeros(rows, tokens, dtype=torch.long, device="meta"))
