"""The attention of every Hugging Face family: causal, and optionally in windows, soft-capped, or within documents.

With its own attention, transformers reads from the device whether a batch holds packed sequences (`.all()` in every forward).
With an attention that has no mask function it does not. `choose_path` selects the code for a layer; attention_paths.py has the
code. Documents reach a layer as a keyword argument, which the family's modules pass on. So a block that is computed again for its
gradient gets the same documents. inspection.py finds the families that drop the keyword.

`sdpa`    only causal: torch's fused kernels, every device
`varlen`  a window or documents in 16 bits on CUDA from sm_80 on: flash attention over the documents' borders
`flex`    other cases on a GPU (soft-capped scores, sinks, fp32, ROCm, other head widths): flex attention, compiled by Triton
`tiled`   all other cases: document by document, tile by tile, in torch

If ranks share rows (`data.sequence_parallel`), ulysses.py exchanges tokens for heads before one of these, and back after it.
"""

import contextlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ted_scale.data.packing import Packing, Share, whole_rows
from ted_scale.kernels.triton.device import device_name, runs_triton
from ted_scale.models.attention_paths import flex, tiled, varlen
from ted_scale.models.ulysses import LocalHeads, Shared, heads_for_tokens, tokens_for_heads

NAME = "ted_scale"
SEALED = "ted_scale_sealed"  # for compiled blocks that keep documents apart
PATHS = {"varlen": varlen, "flex": flex, "tiled": tiled}
# Keywords that `causal_attention` uses or may ignore: positions are in the states already, and there is never a cache.
SINKS = "s_aux"  # a number a head, in the softmax's sum like a key without a value; only where it is not trained
KNOWN = {
    "scaling", "dropout", "sliding_window", "softcap", "is_causal", "position_ids", "cache_position", "packing",
}  # fmt: skip


class Layer(NamedTuple):
    """The properties of a layer's attention that select its path."""

    width: int  # width of a query and a key
    value_width: int
    window: int | None
    softcap: float | None
    sinks: bool = False


class Call(NamedTuple):
    """A module's call of `causal_attention`."""

    module: torch.nn.Module
    layer: Layer
    heads: int  # query heads
    key_heads: int
    causal: bool
    unknown: set[str]  # arguments that are set but would be ignored
    packed: bool  # whether it got documents


def choose_path(layer: Layer, length: int, packed: bool, dtype: torch.dtype, device: torch.device) -> str:
    """The fastest code that computes this layer exactly: "sdpa", "varlen", "flex", or "tiled", which runs everywhere."""
    windowed = layer.window is not None and layer.window < length
    plain = layer.softcap is None and not layer.sinks
    if not packed and not windowed and plain:
        return "sdpa"
    if not runs_triton(device):
        return "tiled"
    flash = layer.width == layer.value_width <= 256 and layer.width % 8 == 0 and dtype != torch.float32
    if flash and plain and torch.version.hip is None:
        return "varlen"
    return "flex" if min(layer.width, layer.value_width) >= 16 else "tiled"  # flex needs this width


def causal_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    sliding_window=None,
    softcap=None,
    packing=None,
    scaling=None,
    s_aux=None,
    **kwargs,
):
    """The attention of one layer. `packing` is None if a row is one text, and Shared if this rank has a part of each row. `s_aux`
    has the heads' sinks."""
    assert attention_mask is None, "transformers has no mask function for our name, but made a mask"
    if isinstance(packing, Shared):
        named = {"sliding_window": sliding_window, "softcap": softcap, "scaling": scaling, **kwargs}
        return shared_attention(query, key, value, packing, **named)
    rows, _, length, width = query.shape
    layer = Layer(width, value.shape[-1], sliding_window, softcap, s_aux is not None)
    path = choose_path(layer, length, packing is not None, query.dtype, query.device)
    if path == "sdpa":
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)
    packing = packing or whole_rows(rows, length, query.device)
    window = sliding_window if sliding_window is not None and sliding_window < length else None
    return PATHS[path](query, key, value, packing, window, scaling, softcap, s_aux), None


def shared_attention(query, key, value, shared: Shared, **named):
    """Attention if ranks share rows: each rank computes some heads of whole rows, in place of all heads of its parts of rows."""
    query, key, value = (heads_for_tokens(t, shared.ranks) for t in (query, key, value))
    heads = LocalHeads(query.shape[1] // key.shape[1])
    out_BTHD, _ = causal_attention(heads, query, key, value, None, packing=shared.packing, **named)
    return tokens_for_heads(out_BTHD, shared.ranks), None


class Sealed:
    """A wrapper for documents, which a compiled block passes on unread. If its graph depended on them, it would hold for one
    batch only."""

    def __init__(self, packing: Packing | None):
        self.packing = packing


@torch.compiler.disable
def sealed_attention(module, query, key, value, attention_mask, *, packing: Sealed, **named):
    return causal_attention(module, query, key, value, attention_mask, packing=packing.packing, **named)


def seal(block, arguments: tuple, named: dict) -> tuple[tuple, dict]:
    """A hook before a block's forward that wraps its documents."""
    return arguments, {**named, "packing": Sealed(named.get("packing"))}


def packing_arguments(packing: Packing | None, share: Share | None = None) -> dict:
    """The keywords of a body's forward: the positions of this rank's tokens, and for its attention the documents and the ranks
    that share rows."""
    if share is not None:
        return {"position_ids": share.positions_BT, "packing": Shared(packing, share.of)}
    return {} if packing is None else {"position_ids": packing.positions_BT, "packing": packing}


def paths_of(data, layers: Iterable[Layer], dtype: torch.dtype, device) -> list[str]:
    """The paths that these layers take under a run file's data section, with the exchange before and after them if ranks share
    rows."""
    packed = data.attention == "document"
    paths = {choose_path(layer, data.seq_len, packed, dtype, device) for layer in layers}
    return sorted(paths | ({"ulysses"} if data.sequence_parallel > 1 else set()))


def describe(data, models: Mapping[str, Iterable[Layer]], dtype: torch.dtype, device) -> str:
    """The line for the log."""
    paths = {side: paths_of(data, layers, dtype, device) for side, layers in models.items()}
    return f"attention: {data.attention} on {device_name(device)}, " + ", ".join(
        f"{s} by {' and '.join(p) or 'recurrences alone'}" for s, p in paths.items()
    )


@contextlib.contextmanager
def recorded_calls():
    """A context that records the calls of `causal_attention`, for a trial run of a model."""
    calls: list[Call] = []

    def record(module, query, key, value, attention_mask, **kwargs):
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        given |= {"attention_mask"} if attention_mask is not None else set()
        asked = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if asked is None else asked
        kinds = kwargs.get("sliding_window"), kwargs.get("softcap"), kwargs.get(SINKS) is not None
        layer = Layer(query.shape[-1], value.shape[-1], *kinds)
        heads = query.shape[1], key.shape[1]
        calls.append(Call(module, layer, *heads, bool(causal), given - KNOWN, "packing" in given))
        return causal_attention(module, query, key, value, None, **kwargs)

    AttentionInterface.register(NAME, record)
    try:
        yield calls
    finally:
        AttentionInterface.register(NAME, causal_attention)


AttentionInterface.register(NAME, causal_attention)
AttentionInterface.register(SEALED, sealed_attention)
