"""The layer loss of one pair, straight from both blocks' states and both filters: no filtered state is kept.

formulas/layers.py has the formula of a row. This file applies it chunk by chunk and computes the gradients with it.
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
    rows_per_chunk,
)


def filtered_mse(
    h_t, w_t, b_t, h_s, w_s, b_s, token_weight, *, denom, kind="nmse", backend="auto", chunk_tokens=None
):  # fmt: skip
    """Σ token_weight · (the kind's value) / denom; states are [N, width], filters [D, width], or None: the identity.

    Gradients go to h_s, w_s and b_s. A token counts where its weight is > 0. The teacher's state may be freed at once.
    """
    check(h_t, w_t, b_t, h_s, w_s, b_s, token_weight)
    arguments.check_choice("kind", kind, KINDS)
    arguments.check_positive("chunk_tokens", chunk_tokens)
    student = (h_s, w_s, b_s)
    wanted, backend = wants_gradient(student), choose(backend, h_s.device)
    weight = torch.where(token_weight > 0, token_weight, 0.0).float()
    # Only a trace needs the registered operation: its call costs 0.3 ms a pair.
    form = layer_chunks if torch.compiler.is_compiling() else form_chunks
    with torch.no_grad():
        value, *gradients = form(h_t, w_t, b_t, *student, weight, kind, wanted, backend, chunk_tokens or 0)
    return attach(value, value[None], denom, student, wanted, gradients)[0]


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
    """(Σ of the rows' values, ∂/∂h_s, ∂/∂w_s, ∂/∂b_s); a gradient that is not wanted is empty."""
    if backend == "triton":
        from ted_scale.kernels.triton.layers import launch_difference
    width, wants = h_s.shape[1] if w_s is None else len(w_s), any(wanted)
    # A chunk's ∂/∂h_s is written last: until then its memory holds the filtered states s, where they fit.
    reuses = wanted[0] and h_s.dtype == torch.float32 and width <= h_s.shape[1]
    chunk = rows_per_chunk(len(h_s), 12 * width, h_s.device, chunk_tokens or default_rows(weight, reuses))
    dh, dw, db = gradients = empty_gradients(h_s, w_s, b_s, wanted)
    w_t, w_s = operand(w_t, backend), operand(w_s, backend)
    operand_type = h_s.dtype if backend == "triton" else torch.float32
    values = torch.zeros_like(weight)
    for at in chunks(len(h_s), chunk):
        live, h = weight[at], live_rows(h_s[at], weight[at])
        if backend == "triton":
            rows = launch_difference(h_t[at], w_t, b_t, h, w_s, b_s, live, kind, wants)
        else:
            room = dh[at].view(-1)[: len(h) * width].view(-1, width) if reuses else None
            rows = difference(project(live_rows(h_t[at], live), w_t, b_t), project(h, w_s, b_s, room), kind)
        values[at], scale, along_s = row_values(rows, live, kind, width)
        if wants:
            add_gradients(row_gradients(rows, scale, along_s, operand_type), h, w_s, wanted, dh[at], dw, db)
        del h, rows  # freed before the next chunk allocates
    return values.sum(), *gradients


layer_chunks = torch.library.custom_op("ted_scale::layer_chunks", form_chunks, mutates_args=())


@layer_chunks.register_fake
def _(h_t, w_t, b_t, h_s, w_s, b_s, weight, kind, wanted, backend, chunk_tokens):
    return weight.new_empty(()), *empty_gradients(h_s, w_s, b_s, wanted)


def default_rows(weight, reuses: bool) -> int | None:
    """Few rows stay in a CPU's cache, many make products fast: 768 in all [rows, width] buffers together. These are t, s
    unless it lies in its gradient's memory, and copies of both states where some tokens do not count."""
    if not weight.is_cpu:
        return None
    return 768 // (3 if not all_count(weight) else 1 if reuses else 2)
