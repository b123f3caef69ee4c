"""Causal attention for every Hugging Face family, without a host read and without a mask where none is needed.

Transformers' own path asks the device whether a batch holds packed sequences (`.all()` in every forward); a name it has
no mask function for skips that question. What a layer adds to "causal" (a sliding window, soft-capped scores, documents
that must not see each other) is put together here, where the layer's own arguments are known.
"""

import contextlib
from typing import NamedTuple

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

NAME = "ted_scale"
# What `causal_attention` does as told, and what asks nothing of it: positions are in the states, a cache is never there.
UNDERSTOOD = {"scaling", "dropout", "sliding_window", "softcap", "is_causal", "position_ids", "cache_position"}


class Call(NamedTuple):
    """What a layer asked of `causal_attention`."""

    causal: bool
    foreign: set[str]  # arguments that are set and would be ignored


def causal_attention(module, query, key, value, attention_mask, sliding_window=None, softcap=None, **kwargs):
    """`attention_mask` is None (causal) or bool [B, 1, T, T], True where a query may look."""
    length = query.shape[2]
    banded = sliding_window is not None and sliding_window < length
    if attention_mask is None and (banded or softcap is not None):
        attention_mask = band(length, length, query.device)
    if banded:
        attention_mask = attention_mask & band(length, sliding_window, query.device)
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return softcapped_attention(module, query, key, value, attention_mask, softcap, **kwargs)


def softcapped_attention(module, query, key, value, attention_mask, softcap, scaling=None, **_):
    """cap * tanh(scores / cap): no fused kernel of torch has it."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ repeat_kv(key, groups).transpose(2, 3)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (probabilities @ repeat_kv(value, groups)).transpose(1, 2).contiguous(), None


def band(length: int, window: int, device) -> torch.Tensor:
    """bool [1, 1, T, T]: the `window` newest tokens up to the query itself."""
    age = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return ((age >= 0) & (age < window))[None, None]


def document_mask(positions_BT: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, T, T]: causal within a document; positions restart at 0 where a document starts."""
    document_BT = (positions_BT == 0).cumsum(dim=1)
    same = document_BT[:, None, :, None] == document_BT[:, None, None, :]
    return same & band(positions_BT.shape[1], positions_BT.shape[1], positions_BT.device)


@contextlib.contextmanager
def watched():
    """The calls of `causal_attention` while a model is tried; outside, nothing stands between it and the layers."""
    calls: list[Call] = []

    def note(module, *tensors, **kwargs):
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        asked = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if asked is None else asked
        calls.append(Call(bool(causal), given - UNDERSTOOD))
        return causal_attention(module, *tensors, **kwargs)

    AttentionInterface.register(NAME, note)
    try:
        yield calls
    finally:
        AttentionInterface.register(NAME, causal_attention)


AttentionInterface.register(NAME, causal_attention)
