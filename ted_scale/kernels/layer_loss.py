"""The layer loss of one pair straight from both blocks' states and both filters: no filtered state is kept.

formulas/layers.py has what is computed of each row; here it is done chunk by chunk, and the gradients with it.
"""

from collections.abc import Sequence

import torch

from ted_scale.kernels import arguments
from ted_scale.kernels.autograd import as_scalar, attach
from ted_scale.kernels.backend import choose, chunks, rows_per_chunk
from ted_scale.kernels.formulas.layers import KINDS, Difference, row_squares, row_values, scaled
from ted_scale.kernels.formulas.logits import row_dot
from ted_scale.kernels.logit_loss import add_gradients, empty_gradients
from ted_scale.kernels.products import all_count, live_rows, operand, project


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
    wanted = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in student]
    backend, weight = choose(backend, h_s.device), torch.where(token_weight > 0, token_weight, 0.0).float()
    form = layer_chunks if torch.compiler.is_compiling() else form_chunks  # an operation's call costs 0.3 ms, a pair
    with torch.no_grad():
        value, *grads = form(h_t, w_t, b_t, *student, weight, kind, wanted, backend, chunk_tokens or 0)
    trained = [t for t, wants in zip(student, wanted, strict=True) if wants]
    grads = [g for g, wants in zip(grads, wanted, strict=True) if wants]
    return attach(value, value[None], as_scalar(denom, h_s.device), trained, grads)[0]


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
    """(Σ of the rows' values, ∂/∂h_s, ∂/∂w_s, ∂/∂b_s); a gradient not wanted is empty."""
    difference, wants = difference_of(backend), any(wanted)
    dh, dw, db = gradients = empty_gradients(h_s, w_s, b_s, wanted)
    values = torch.zeros_like(weight)
    operand_type = h_s.dtype if backend == "triton" else torch.float32
    w_t, w_s = operand(w_t, backend), operand(w_s, backend)
    width = h_s.shape[1] if w_s is None else len(w_s)
    lends = wanted[0] and dh.dtype == torch.float32 and width <= dh.shape[1]
    chunk = rows_per_chunk(len(h_s), 12 * width, h_s.device, chunk_tokens or default_rows(weight, lends))
    for at in chunks(len(h_s), chunk):
        live, h = weight[at], live_rows(h_s[at], weight[at])
        room = lent(dh[at], width) if lends else None
        rows = difference(h_t[at], w_t, b_t, h, w_s, b_s, live, kind, wants, room)
        values[at], scale, tilt = row_values(rows, live, kind, width)
        if wants:
            add_gradients(scaled(rows, scale, tilt, operand_type), h, w_s, wanted, dh[at], dw, db)
        del h, rows  # before the next chunk's are made
    return values.sum(), *gradients


layer_chunks = torch.library.custom_op("ted_scale::layer_chunks", form_chunks, mutates_args=())


@layer_chunks.register_fake
def _(h_t, w_t, b_t, h_s, w_s, b_s, weight, kind, wanted, backend, chunk_tokens):
    return weight.new_empty(()), *empty_gradients(h_s, w_s, b_s, wanted)


def default_rows(weight, lends: bool) -> int | None:
    """Few rows stay in a CPU's cache, many make products fast: 768 in all buffers of [rows, width] together, which are
    t, s where no gradient lends its place, and copies of both states where some tokens do not count."""
    if not weight.is_cpu:
        return None
    return 768 // (3 if not all_count(weight) else 1 if lends else 2)


def lent(gradient, width: int):
    """The memory of a chunk's ∂/∂h_s, which is written last, as room for its s."""
    return gradient.view(-1)[: len(gradient) * width].view(-1, width)


def difference_of(backend: str):
    if backend == "triton":
        from ted_scale.kernels.triton.layers import launch_difference

        return launch_difference
    return difference


def difference(h_t, w_t, b_t, h_s, w_s, b_s, weight, kind: str, wants_gradient: bool, room=None) -> Difference:
    t, s = project(live_rows(h_t, weight), w_t, b_t), project(h_s, w_s, b_s, room)
    tt = None if kind == "mse" else row_squares(t)
    d = torch.sub(s, t, out=t)
    if kind != "cosine":
        return Difference(d, row_squares(d), tt)
    return Difference(d, row_squares(d), tt, s, row_squares(s), row_dot(s, d))
