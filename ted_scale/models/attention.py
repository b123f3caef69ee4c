"""The attention of every Hugging Face family: causal, and where asked in windows, soft-capped, apart by document.

Transformers' own path asks the device whether a batch holds packed sequences (`.all()` in every forward); a name it has
no mask function for skips that question. `path` is the one rule of who computes a layer, attention_paths.py has the
ways. The surprise: documents reach a layer as a keyword that the family's own modules hand down without knowing it, so
that a block computed again for its gradient is given the same ones; inspection.py finds the families that lose it.

`sdpa`    nothing but causal: torch's fused kernels, every device
`varlen`  a window or documents in 16 bits on CUDA from sm_80 on: flash attention over the documents' borders
`flex`    what is left on a GPU (soft-capped scores, fp32, ROCm, other head widths): flex attention, compiled by Triton
`tiled`   what is left: document by document, tile by tile, in torch
"""

import contextlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ted_scale.data.packing import Packing, whole_rows
from ted_scale.kernels.triton.device import device_name, runs_triton
from ted_scale.models.attention_paths import flex, tiled, varlen

NAME = "ted_scale"
PATHS = {"varlen": varlen, "flex": flex, "tiled": tiled}
# What `causal_attention` does as told, and what asks nothing of it: positions are in the states, a cache is never there.
UNDERSTOOD = {
    "scaling", "dropout", "sliding_window", "softcap", "is_causal", "position_ids", "cache_position", "packing",
}  # fmt: skip


class Layer(NamedTuple):
    """What decides who computes a layer's attention."""

    width: int  # of a query and a key
    value_width: int
    window: int | None
    softcap: float | None


class Call(NamedTuple):
    """What a module asked of `causal_attention`."""

    module: torch.nn.Module
    layer: Layer
    heads: int  # of the queries
    causal: bool
    foreign: set[str]  # arguments that are set and would be ignored
    packed: bool  # told of documents


def path(layer: Layer, length: int, packed: bool, dtype: torch.dtype, device: torch.device) -> str:
    windowed = layer.window is not None and layer.window < length
    if not packed and not windowed and layer.softcap is None:
        return "sdpa"
    if not runs_triton(device):
        return "tiled"
    flash = layer.width == layer.value_width <= 256 and layer.width % 8 == 0 and dtype != torch.float32
    if flash and layer.softcap is None and torch.version.hip is None:
        return "varlen"
    return "flex" if min(layer.width, layer.value_width) >= 16 else "tiled"  # what its matrix products need


def causal_attention(
    module, query, key, value, attention_mask, sliding_window=None, softcap=None, packing=None, scaling=None, **kwargs
):
    """`packing` is None where a row is one text."""
    assert attention_mask is None, "transformers has no mask function for our name, and made a mask"
    rows, _, length, width = query.shape
    layer = Layer(width, value.shape[-1], sliding_window, softcap)
    way = path(layer, length, packing is not None, query.dtype, query.device)
    if way == "sdpa":
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)
    packing = packing or whole_rows(rows, length, query.device)
    window = sliding_window if sliding_window is not None and sliding_window < length else None
    return PATHS[way](query, key, value, packing, window, scaling, softcap), None


def told_of(packing: Packing | None) -> dict:
    """What a body's forward is given, so that its positions restart and its attention knows why."""
    return {} if packing is None else {"position_ids": packing.positions_BT, "packing": packing}


def describe(mode: str, models: Mapping[str, Iterable[Layer]], length: int, dtype: torch.dtype, device) -> str:
    """The log's line."""
    ways = {
        side: sorted({path(layer, length, mode == "document", dtype, device) for layer in layers})
        for side, layers in models.items()
    }
    return f"attention: {mode} on {device_name(device)}, " + ", ".join(
        f"{s} by {' and '.join(w)}" for s, w in ways.items()
    )


@contextlib.contextmanager
def watched():
    """The calls of `causal_attention` while a model is tried; outside, nothing stands between it and the layers."""
    calls: list[Call] = []

    def note(module, query, key, value, attention_mask, **kwargs):
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        given |= {"attention_mask"} if attention_mask is not None else set()
        asked = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if asked is None else asked
        layer = Layer(query.shape[-1], value.shape[-1], kwargs.get("sliding_window"), kwargs.get("softcap"))
        calls.append(Call(module, layer, query.shape[1], bool(causal), given - UNDERSTOOD, "packing" in given))
        return causal_attention(module, query, key, value, None, **kwargs)

    AttentionInterface.register(NAME, note)
    try:
        yield calls
    finally:
        AttentionInterface.register(NAME, causal_attention)


AttentionInterface.register(NAME, causal_attention)
