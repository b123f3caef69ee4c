"""Stage I's loss: the next-token cross-entropy that a head gives for filtered states. A row is a (layer, token) pair.

A narrow filter has a map back to the head's width, `lift_w`, which both sides of a pair share. One chunk at a time goes forward
through filter, lift, norm and head, and then backward. So the filtered states of all tokens are never kept.
"""

from collections.abc import Callable, Sequence

import torch

from ted_scale.kernels import arguments
from ted_scale.kernels.autograd import attach, wants_gradient
from ted_scale.kernels.backend import choose
from ted_scale.kernels.formulas.logits import LogitLoss
from ted_scale.kernels.logit_loss import row_losses_of
from ted_scale.kernels.products import (
    add_gradients,
    chunks,
    empty_gradients,
    live_rows,
    matmul,
    operand,
    project,
    rows_per_chunk,
)
from ted_scale.kernels.tokens import valid_weights


def filtered_ce(
    h, filter_w, filter_b, norm: Callable, head_w, head_b, labels, token_weight, *, denom, lift_w=None, softcap=None,
    logit_scale=1.0, rows=None, times=None, backend="auto", chunk_tokens=None,
):  # fmt: skip
    """The weighted CE of soften(head_w·norm(lift_w·(filter_w·h + filter_b)) + head_b), divided by denom. lift_w may be None.

    Gradients go to h, filter_w, filter_b, lift_w, head_w and head_b. `norm` is any differentiable function of rows. With `rows`
    (int64) only these rows are read, and each counts `times` times. The default, len(h)/len(rows), is unbiased if rows are drawn
    uniformly.
    """
    check(h, filter_w, filter_b, lift_w, head_w, head_b, labels, token_weight, rows)
    arguments.check_positive("chunk_tokens", chunk_tokens)
    weight = valid_weights(labels, token_weight)
    operands = (h, filter_w, filter_b, lift_w, head_w, head_b)
    wanted, backend = wants_gradient(operands), choose(backend, h.device)
    f = LogitLoss(1.0, 0.0, 1.0, softcap or 0.0, 0.0, logit_scale, 1.0, False)
    with torch.no_grad():
        value, gradients = filter_chunks(*operands, norm, labels, weight, rows, f, wanted, backend, chunk_tokens)
    if rows is not None and len(rows):
        scale = len(h) / len(rows) if times is None else times
        value, gradients = value * scale, [g.mul_(scale) for g in gradients]
    return attach(value, value[None], denom, operands, wanted, gradients)[0]


def check(h, filter_w, filter_b, lift_w, head_w, head_b, labels, token_weight, rows) -> None:
    arguments.check_states("h", h, None, None)
    arguments.check_given("head_w", head_w)
    arguments.check_weight("filter_w", filter_w, h.shape[1], "filter_b", filter_b)
    arguments.check_weight("lift_w", lift_w, len(filter_w), "lift_b", None)
    arguments.check_weight("head_w", head_w, None, "head_b", head_b)
    arguments.check_type("filter_w", filter_w, "h", h)
    arguments.check_type("lift_w", lift_w, "h", h)
    arguments.check_type("head_w", head_w, "h", h)
    arguments.check_vector("token_weight", token_weight, len(h))
    arguments.check_labels(labels, len(h), len(head_w), token_weight)
    arguments.check_rows("rows", rows)
    tensors = {"h": h, "filter_w": filter_w, "filter_b": filter_b, "lift_w": lift_w, "head_w": head_w, "head_b": head_b}
    tensors |= {"labels": labels, "token_weight": token_weight, "rows": rows}
    arguments.check_common("h", tensors, ("token_weight",))


def filter_chunks(
    h, filter_w, filter_b, lift_w, head_w, head_b, norm, labels, weight, rows, f, wanted, backend, chunk_tokens
):  # fmt: skip
    """(Σ weight·CE, gradients for h, filter_w, filter_b, lift_w, head_w, head_b)"""
    dh, dw, db = empty_gradients(h, filter_w, filter_b, wanted[:3])
    dh.zero_()  # for rows that are not drawn
    dlift = empty_gradients(h, lift_w, None, [False, wanted[3], False])[1]
    dhead_w, dhead_b = empty_gradients(h, head_w, head_b, [False, *wanted[4:]])[1:]
    filter_w, lift_w, head_w = (operand(w, backend) for w in (filter_w, lift_w, head_w))
    count = len(h) if rows is None else len(rows)
    bytes_a_row = len(head_w) * (4 + h.element_size())
    total = weight.new_zeros(())
    for at in chunks(count, rows_per_chunk(count, bytes_a_row, h.device, chunk_tokens)):
        at = at if rows is None else rows[at]
        states = live_rows(h[at], weight[at])
        narrow = project(states, filter_w, filter_b).to(h.dtype)
        filtered = narrow if lift_w is None else project(narrow, lift_w, None).to(h.dtype)
        y, norm_backward = apply_norm(norm, filtered, any(wanted[:4]))
        arguments.check_states("norm's result", y, head_w.shape[1], len(filtered))  # OPT's tail changes the width
        wants = [any(wanted[:4]), *wanted[4:]]
        value, dy = head_chunk(y, head_w, head_b, labels[at], weight[at], dhead_w, dhead_b, f.numbers, wants, backend)
        total += value
        if wants[0]:
            dy = lift_backward(norm_backward(dy), narrow, lift_w, wanted[3], dlift)
            part = torch.empty_like(states) if wanted[0] else None
            add_gradients(dy, states, filter_w, wanted, part, dw, db)
            if wanted[0] and rows is not None:
                dh.index_add_(0, at, part)  # a row may be drawn twice
            elif wanted[0]:
                dh[at] = part
    return total, [dh, dw, db, dlift, dhead_w, dhead_b]


def lift_backward(dfiltered, narrow, lift_w, wants_lift: bool, dlift):
    """∂/∂narrow from ∂/∂(lift_w·narrow). ∂/∂lift_w is added to dlift if wanted."""
    if lift_w is None:
        return dfiltered
    dnarrow = torch.empty_like(narrow)
    add_gradients(dfiltered, narrow, lift_w, [True, wants_lift, False], dnarrow, dlift, None)
    return dnarrow


def apply_norm(norm: Callable, filtered, wants_gradient: bool):
    """(norm(filtered), its backward: a function from ∂/∂norm(filtered) to ∂/∂filtered)"""
    if not wants_gradient:
        return norm(filtered), None
    if torch.compiler.is_compiling():  # autograd.grad cannot be traced; vjp fails with some norms
        y, backward = torch.func.vjp(norm, filtered)
        return y, lambda dy: backward(dy.to(y.dtype))[0]
    with torch.enable_grad():
        leaf = filtered.detach().requires_grad_()
        y = norm(leaf)
    return y.detach(), lambda dy: torch.autograd.grad(y, leaf, dy.to(y.dtype))[0]


@torch.library.custom_op("ted_scale::head_chunk", mutates_args=("dw", "db"))
def head_chunk(
    y: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, labels: torch.Tensor, weight: torch.Tensor,
    dw: torch.Tensor, db: torch.Tensor, loss: Sequence[float], wanted: Sequence[bool], backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(Σ weight·CE, ∂/∂y or an empty tensor if not wanted). The head's gradients are added to dw and db if wanted."""
    y = y.to(w.dtype)
    apart = backend == "triton" and w.dtype != torch.float32 and any(wanted)
    room = y.new_empty(len(y), len(w)) if apart else None
    _, ce, dz, _ = row_losses_of(backend)(project(y, w, b), None, labels, weight, LogitLoss(*loss), any(wanted), room)
    dy = matmul(dz, w) if wanted[0] else y.new_empty(0, dtype=torch.float32)
    if any(wanted[1:]):
        add_gradients(dz, y, w, [False, *wanted[1:]], None, dw, db)
    return ce.sum(), dy


@head_chunk.register_fake
def _(y, w, b, labels, weight, dw, db, loss, wanted, backend):
    return weight.new_empty(()), torch.empty(y.shape if wanted[0] else 0, dtype=torch.float32, device=y.device)
