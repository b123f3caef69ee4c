"""The layer loss of one pair, computed from both blocks' states and both filters. No filtered state is kept.

formulas/layers.py has the formula for a row. This file applies it chunk by chunk and computes the gradients at the same time.
"""

from collections.abc import Sequence

import torch

from ted_scale.kernels import arguments
from ted_scale.kernels.autograd import attach, wants_gradient
from ted_scale.kernels.backend import choose
from ted_scale.kernels.formulas.layers import KINDS, difference, row_gradients, row_values
from ted_scale.kernels.products import (
    add_gradients,
    all_count,
    chunks,
    empty_gradients,
    live_rows,
    operand,
    project,
)

# On a device, one fp32 product of a chunk has this many entries, 64 MiB. A quarter of that would stay in an H100's cache until
# the row kernel reads it, but the host's time for more chunks costs more (measured for 16 pairs: 25 ms instead of 16).
CHUNK_ENTRIES = 1 << 24
# Entries of a chunk in all its [rows, width] buffers together. With few they stay in the cache; with many the products are fast.
ROWS_ON_A_CPU = 768
SPAN = 4  # chunks whose 16-bit gradients are collected, so that one product for each operand covers all of them


def filtered_mse(
    h_t, w_t, b_t, h_s, w_s, b_s, token_weight, *, denom, kind="nmse", backend="auto", chunk_tokens=None
):  # fmt: skip
    """Σ token_weight · (the kind's value) / denom. States are [N, width]. Filters are [D, width], or None for the identity.

    Gradients go to h_s, w_s and b_s. A token counts if its weight is > 0. The teacher's state may be freed after the call.
    """
    check(h_t, w_t, b_t, h_s, w_s, b_s, token_weight)
    arguments.check_choice("kind", kind, KINDS)
    arguments.check_positive("chunk_tokens", chunk_tokens)
    student = (h_s, w_s, b_s)
    wanted, backend = wants_gradient(student), choose(backend, h_s.device)
    weight = token_weight.float().contiguous()
    # Only a trace needs the registered operation, whose call costs 0.3 ms for each pair.
    form = layer_chunks if torch.compiler.is_compiling() else form_chunks
    with torch.no_grad():
        value, *gradients = form(h_t, w_t, b_t, *student, weight, kind, wanted, backend, chunk_tokens or 0)
    return attach(value, value[None], denom, student, wanted, gradients)[0]


@torch.no_grad()
def filtered_states(h, weight, bias) -> torch.Tensor:
    """weight·h + bias of every row, in fp32. Given to the loss as h_t, without a filter, it gives the same numbers as h, weight
    and bias. If the filter is narrow, it is smaller than h, which may then be freed."""
    arguments.check_states("h", h, None, None)
    arguments.check_weight("weight", weight, h.shape[1], "bias", bias)
    arguments.check_type("weight", weight, "h", h)
    filtered, weight = h.new_empty(len(h), len(weight), dtype=torch.float32), operand(weight, "torch")
    for at in chunks(len(h), ROWS_ON_A_CPU if h.is_cpu else max(len(h), 1)):
        project(h[at], weight, bias, filtered[at])
    return filtered


def check(h_t, w_t, b_t, h_s, w_s, b_s, token_weight) -> None:
    arguments.check_states("h_t", h_t, None, None)
    arguments.check_states("h_s", h_s, None, len(h_t))
    arguments.check_weight("w_t", w_t, h_t.shape[1], "b_t", b_t)
    arguments.check_weight("w_s", w_s, h_s.shape[1], "b_s", b_s)
    width_t, width_s = (h.shape[1] if w is None else len(w) for h, w in ((h_t, w_t), (h_s, w_s)))
    if width_t != width_s:
        raise ValueError(
            f"{'h_s' if w_s is None else 'w_s'} must give the teacher's {width_t} filtered dimensions, but gives {width_s}"
        )
    arguments.check_type("w_t", w_t, "h_t", h_t)
    arguments.check_type("w_s", w_s, "h_s", h_s)
    arguments.check_vector("token_weight", token_weight, len(h_t))
    tensors = {"h_s": h_s, "w_s": w_s, "b_s": b_s, "h_t": h_t, "w_t": w_t, "b_t": b_t, "token_weight": token_weight}
    arguments.check_common("h_s", tensors, ("h_t", "w_t", "b_t", "token_weight"))


def form_chunks(
    h_t: torch.Tensor, w_t: torch.Tensor | None, b_t: torch.Tensor | None, h_s: torch.Tensor,
    w_s: torch.Tensor | None, b_s: torch.Tensor | None, weight: torch.Tensor, kind: str, wanted: Sequence[bool],
    backend: str, chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(Σ of the rows' values, ∂/∂h_s, ∂/∂w_s, ∂/∂b_s). A gradient that is not wanted is empty."""
    width = h_s.shape[1] if w_s is None else len(w_s)
    # A chunk's ∂/∂h_s is written last. Until then its memory holds the filtered states s, if they fit.
    reuses = wanted[0] and h_s.dtype == torch.float32 and width <= h_s.shape[1]
    chunk = min(chunk_tokens or default_rows(weight, reuses, width), max(len(h_s), 1))
    if backend == "triton":
        return form_by_rows(h_t, w_t, b_t, h_s, w_s, b_s, weight, kind, wanted, chunk, width)
    dh, dw, db = gradients = empty_gradients(h_s, w_s, b_s, wanted)
    w_t, w_s = operand(w_t, backend), operand(w_s, backend)
    operand_type = h_s.dtype if h_s.is_cuda else torch.float32
    values, weight = torch.empty_like(weight), torch.where(weight > 0, weight, 0.0)
    for at in chunks(len(h_s), chunk):
        live, h = weight[at], live_rows(h_s[at], weight[at])
        room = dh[at].view(-1)[: len(h) * width].view(-1, width) if reuses else None
        rows = difference(project(live_rows(h_t[at], live), w_t, b_t), project(h, w_s, b_s, room), kind)
        values[at], scale, along_s = row_values(rows, live, kind, width)
        if any(wanted):
            add_gradients(row_gradients(rows, scale, along_s, operand_type), h, w_s, wanted, dh[at], dw, db)
        del h, rows  # freed before the next chunk allocates
    return values.sum(), *gradients


def form_by_rows(h_t, w_t, b_t, h_s, w_s, b_s, weight, kind, wanted, chunk: int, width: int):
    """Like form_chunks, with the vendor's products and one row kernel. Rows that do not count are projected and then left out."""
    from ted_scale.kernels.triton.layers import launch_layers

    dh, dw, db = gradients = empty_gradients(h_s, w_s, b_s, wanted, torch.empty if len(h_s) else torch.zeros)
    h_t, h_s, b_t, b_s = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (h_t, h_s, b_t, b_s))
    room_t, room_s = (None if w is None else weight.new_empty(chunk, width) for w in (w_t, w_s))
    span, values = min(SPAN * chunk, len(h_s)), torch.empty_like(weight)
    slopes = h_s.new_empty(span if any(wanted) and w_s is not None else 0, width)
    copies = h_s.new_empty(span if wanted[1] and not wanted[0] else 0, h_s.shape[1])
    for at in chunks(len(h_s), SPAN * chunk):
        h, t, live, value = h_s[at], h_t[at], weight[at], values[at]
        dy = dh[at] if w_s is None else slopes[: len(h)]
        # The product for the filter's gradient reads `counted`. After it, ∂/∂h_s uses this memory.
        counted = dh[at] if wanted[0] and wanted[1] else copies[: len(h)]
        for part in chunks(len(h), chunk):
            y_t = t[part] if w_t is None else project(t[part], w_t, None, room_t[: len(t[part])])
            y_s = h[part] if w_s is None else project(h[part], w_s, None, room_s[: len(h[part])])
            launch_layers(y_t, b_t, y_s, b_s, h[part], live[part], value[part], dy[part], counted[part], kind)
        if any(wanted) and w_s is not None:
            add_gradients(dy, counted, w_s, wanted, dh[at], dw, db, first=at.start == 0)
    return values.sum(), *gradients


layer_chunks = torch.library.custom_op("ted_scale::layer_chunks", form_chunks, mutates_args=())


@layer_chunks.register_fake
def _(h_t, w_t, b_t, h_s, w_s, b_s, weight, kind, wanted, backend, chunk_tokens):
    return weight.new_empty(()), *empty_gradients(h_s, w_s, b_s, wanted)


def default_rows(weight, reuses: bool, width: int) -> int:
    """The rows of a chunk. A device has CHUNK_ENTRIES in one product, a CPU ROWS_ON_A_CPU in all its buffers. The buffers are t,
    s (unless it uses its gradient's memory), and copies of both states if some tokens do not count."""
    if not weight.is_cpu:
        return max(CHUNK_ENTRIES // width // 128 * 128, 128)
    return ROWS_ON_A_CPU // (3 if not all_count(weight) else 1 if reuses else 2)
