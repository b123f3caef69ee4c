"""Three ways to attend to a part of the past; none holds a [T, T] tensor. attention.py selects one.

A query sees the tokens of its own document up to itself, and only the `window` newest of them. All three take [B, H, T, D] and
return [B, T, H, D]. Several query heads may share a key head.
"""

import functools
import inspect
from collections.abc import Iterator

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import repeat_kv

from ted_scale.data.packing import Packing

BLOCK = 128  # side of a block of flex attention, in tokens
TILE = 256  # queries that `tiled` computes at once if it needs a mask or whole scores
# torch after 2.11 needs a flag for shared key heads.
SHARED_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def varlen(query, key, value, packing: Packing, window=None, scaling=None, softcap=None, sinks=None):
    """Flash attention over all documents of a batch at once. It supports no soft-cap and no sinks."""
    assert softcap is None and sinks is None
    rows, _, length, _ = query.shape
    flat = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    borders, longest = packing.borders, packing.longest
    sides = (-1 if window is None else window - 1, 0)  # tokens before the query, tokens after it
    out = varlen_attn(*flat, borders, borders, longest, longest, scale=scaling, window_size=sides, **SHARED_HEADS)
    return out.unflatten(0, (rows, length))


def flex(query, key, value, packing: Packing, window=None, scaling=None, softcap=None, sinks=None):
    """Compiled flex attention. Blocks of 128 x 128 in which no query sees a key are never computed. A sink takes its share after
    the softmax, whose sum is known."""

    def capped(score, *_):
        return torch.tanh(score / softcap) * softcap

    mask = block_mask(packing.positions_BT, window)
    shared = query.shape[1] != key.shape[1]
    score = None if softcap is None else capped
    settings = {"scale": scaling, "enable_gqa": shared}
    if sinks is None:
        out = compiled_flex()(query, key, value, score, mask, **settings)
    else:
        out, aux = compiled_flex()(query, key, value, score, mask, **settings, return_aux=AuxRequest(lse=True))
        out = out * torch.sigmoid(aux.lse - sinks.float()[:, None])[..., None].to(out.dtype)
    return out.transpose(1, 2).contiguous()


@functools.cache
def compiled_flex():
    """Flex attention with a higher limit of compilations. Each shape, cap and gradient mode needs one. Two models with two kinds
    of layers, trained and validated, need more than dynamo's limit of 8. Beyond the limit flex attention would run unfused or,
    with fullgraph, raise an error."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@functools.lru_cache(maxsize=4)  # all layers of both models share one or two masks of a micro-batch
def block_mask(positions_BT: torch.Tensor, window: int | None) -> BlockMask:
    """The same result as torch's create_block_mask, without its [T, T] mask. The mask follows from the oldest token that each
    query sees. This token never decreases along a row of documents, so a block of queries sees one range of blocks. It sees all
    of a block that begins at or after the oldest token of its last query."""
    length = positions_BT.shape[1]
    token = torch.arange(length, device=positions_BT.device)
    oldest_BT = token - positions_BT
    if window is not None:
        oldest_BT = torch.maximum(oldest_BT, token - (window - 1))
    count = -(-length // BLOCK)
    number = torch.arange(count, device=token.device)
    first, last = number * BLOCK, (number * BLOCK + BLOCK - 1).clamp(max=length - 1)
    nearest = (oldest_BT[:, first] // BLOCK)[:, None, :, None]
    whole_from = ((oldest_BT[:, last] + BLOCK - 1) // BLOCK)[:, None, :, None]
    complete = first + BLOCK <= length  # as in torch: a cut-off block does not count as whole
    whole = (number >= whole_from) & (number < number[:, None]) & complete[:, None]
    part = (number >= nearest) & (number <= number[:, None]) & ~whole

    def visible(row, head, query, key):
        return (key <= query) & (key >= oldest_BT[row, query])

    return BlockMask.from_kv_blocks(
        *in_order(part), *in_order(whole), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def in_order(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(number of blocks that each block of queries sees, all block numbers with these first), from a bool [B, 1, blocks, blocks]"""
    numbers = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), numbers.to(torch.int32)


def tiled(query, key, value, packing: Packing, window=None, scaling=None, softcap=None, sinks=None):
    """Attention document by document. It is SDPA if a query sees all tokens before it. Else it is tiles of queries against the
    keys that they see."""
    assert sinks is None or not (sinks.requires_grad and torch.is_grad_enabled()), "sinks get no gradient here"
    tiles = list(tiles_of(packing, query.shape[2], window, needs_scores=softcap is not None or sinks is not None))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return Tiled.apply(query, key, value, tiles, (window, scaling, softcap, sinks)).transpose(1, 2).contiguous()


def tiles_of(packing: Packing, row_length: int, window, needs_scores: bool) -> Iterator[tuple[int, int, int, int]]:
    """For each tile: (row, first query, one past the last query, first key that one of these queries sees)"""
    begin = 0
    for length in packing.lengths:
        row, start = divmod(begin, row_length)
        end = start + length
        whole = not needs_scores and (window is None or length <= window)
        for first in (start,) if whole else range(start, end, TILE):
            oldest = start if window is None else max(start, first - window + 1)
            yield row, first, end if whole else min(first + TILE, end), oldest
        begin += length


class Tiled(torch.autograd.Function):
    """Computes each tile again for its gradient, so scores and slices can be freed after the forward."""

    @staticmethod
    def forward(ctx, query, key, value, tiles, settings):
        ctx.save_for_backward(query, key, value)
        ctx.work = tiles, settings
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        for tile in tiles:
            queries, keys = slices(tile)
            out[queries] = attend(query[queries], key[keys], value[keys], *settings)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        (tiles, settings), saved = ctx.work, ctx.saved_tensors  # a checkpointed block allows only one read
        gradients = [torch.zeros_like(t) for t in saved]
        for tile in tiles:
            queries, keys = slices(tile)
            places = queries, keys, keys
            parts = [t[p].detach().requires_grad_() for t, p in zip(saved, places, strict=True)]
            with torch.enable_grad():
                out = attend(*parts, *settings)
            for gradient, place, part in zip(
                gradients, places, torch.autograd.grad(out, parts, slope[queries]), strict=True
            ):
                gradient[place] += part
        return *gradients, None, None


def slices(tile):
    row, first, end, oldest = tile
    one = slice(row, row + 1)
    return (one, slice(None), slice(first, end)), (one, slice(None), slice(oldest, end))


def attend(query, key, value, window, scaling, softcap, sinks):
    """Attention of [1, H, Q, D] over [1, G, K, D]. The queries belong to the last Q keys."""
    groups, count, total = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    plain = softcap is None and sinks is None
    if plain and count == total and (window is None or total <= window):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    age = torch.arange(total - count, total, device=query.device)[:, None] - torch.arange(total, device=query.device)
    visible = (age >= 0) if window is None else (age >= 0) & (age < window)
    if plain:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, visible, scale=scaling)
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    return torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :total].to(query.dtype) @ value
