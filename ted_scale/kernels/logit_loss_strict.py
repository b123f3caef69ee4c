"""linear_kl_ce without logits in memory: statistics in forward, gradients in backward, one slice of the vocabulary at a time.

Forward keeps three normalizers a token. Backward computes each slice's logits again and writes that slice's ∂/∂logits in
the states' type. It multiplies them into ∂/∂h_s (an fp32 sum) and into the slice's rows of ∂/∂w_s. Those rows are final
at once, so there is no [V, d] sum in fp32. The matrix work is 1.6 times that of `chunked`.
"""

from collections.abc import Sequence

import torch

from ted_scale.kernels.autograd import as_scalar
from ted_scale.kernels.formulas import logits
from ted_scale.kernels.formulas.logits import LogitLoss, Normalizers, Statistics
from ted_scale.kernels.products import add_matmul, chunks, live_rows, matmul, project

SLICE = 4096  # columns of the vocabulary: backward holds one slice for all tokens


def strict_kl_ce(student, teacher, labels, weight, denom, loss, backend: str, chunk_tokens: int, gather):
    """(total, kl, ce). Both sides' tensors are saved by reference; `gather` makes the teacher's whole in backward."""
    denom = as_scalar(denom, weight.device)
    with torch.no_grad():
        values, normalizers = strict_losses(*student, *teacher, labels, weight, loss, backend, chunk_tokens)
        scale = torch.where(denom > 0, 1.0 / denom, 0.0)
        values = values * scale
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in student):
        code = (loss, backend, chunk_tokens)
        total = Strict.apply(values[0], scale, code, gather, *student, *teacher, labels, weight, normalizers)
        return total, values[1], values[2]
    return values.unbind()


class Strict(torch.autograd.Function):
    @staticmethod
    def forward(ctx, total, scale, code, gather, *tensors):
        ctx.code, ctx.gather = code, gather
        ctx.save_for_backward(scale, *tensors)
        return total.clone()

    @staticmethod
    def backward(ctx, g):
        scale, *tensors = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[4:7])
        with ctx.gather([t for t in tensors[4:6] if t is not None]):
            grads = strict_gradients(*tensors, g * scale, wanted, *ctx.code)
        grads = [grad if wants else None for grad, wants in zip(grads, wanted, strict=True)]
        return None, None, None, None, *grads, *[None] * 6


@torch.library.custom_op("ted_scale::strict_losses", mutates_args=())
def strict_losses(
    h_s: torch.Tensor, w_s: torch.Tensor, b_s: torch.Tensor | None, h_t: torch.Tensor | None,
    w_t: torch.Tensor | None, b_t: torch.Tensor | None, labels: torch.Tensor, weight: torch.Tensor,
    loss: Sequence[float], backend: str, chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """((total, kl, ce) summed over rows, the normalizers [3, N])"""
    f = LogitLoss(*loss)
    if not len(weight) or not (f.kl_weight or f.ce_weight):
        return weight.new_zeros(3), weight.new_zeros(3, len(weight))
    sides = (h_s, w_s, b_s), (h_t, w_t, b_t)
    kl, ce, normalizers = logits.finish(statistics_of(backend)(*sides, labels, weight, f, chunk_tokens), weight, f)
    kl, ce = kl.sum(), ce.sum()
    return torch.stack([f.ce_weight * ce + f.kl_weight * kl, kl, ce]), torch.stack(normalizers)


@strict_losses.register_fake
def _(h_s, w_s, b_s, h_t, w_t, b_t, labels, weight, loss, backend, chunk_tokens):
    return weight.new_empty(3), weight.new_empty(3, len(weight))


@torch.library.custom_op("ted_scale::strict_gradients", mutates_args=())
def strict_gradients(
    h_s: torch.Tensor, w_s: torch.Tensor, b_s: torch.Tensor | None, h_t: torch.Tensor | None,
    w_t: torch.Tensor | None, b_t: torch.Tensor | None, labels: torch.Tensor, weight: torch.Tensor,
    normalizers: torch.Tensor, scale: torch.Tensor, wanted: Sequence[bool], loss: Sequence[float], backend: str,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    f, n = LogitLoss(*loss), Normalizers(*normalizers)
    grads = [torch.zeros_like(t) if w else h_s.new_empty(0) for t, w in zip((h_s, w_s, b_s), wanted, strict=True)]
    if not len(weight) or not (f.kl_weight or f.ce_weight):
        return tuple(grads)
    slopes, live = slopes_of(backend), live_rows(h_s, weight)
    dh = torch.zeros_like(h_s, dtype=torch.float32) if wanted[0] else None
    for at in chunks(len(w_s), SLICE):
        dz = slopes((live, w_s, b_s), (h_t, w_t, b_t), labels, weight, n, at, f, chunk_tokens)
        if wanted[0]:
            add_matmul(dh, dz, w_s[at])
        if wanted[1]:
            grads[1][at] = matmul(dz.t(), live).mul_(scale)  # before rounding: a sum may exceed fp16
        if wanted[2]:
            grads[2][at] = dz.sum(dim=0, dtype=torch.float32) * scale
    if wanted[0]:
        torch.mul(dh, scale, out=grads[0]) if dh.dtype == grads[0].dtype else grads[0].copy_(dh.mul_(scale))
    return tuple(grads)


@strict_gradients.register_fake
def _(h_s, w_s, b_s, h_t, w_t, b_t, labels, weight, normalizers, scale, wanted, loss, backend, chunk_tokens):
    return tuple(torch.empty_like(t) if w else h_s.new_empty(0) for t, w in zip((h_s, w_s, b_s), wanted, strict=True))


def statistics_of(backend: str):
    """`f(student, teacher, labels, weight, loss, chunk_tokens) -> Statistics` of whole rows."""
    if backend == "triton":
        from ted_scale.kernels.triton.strict import launch_statistics

        return launch_statistics
    return sliced_statistics


def slopes_of(backend: str):
    """`f(student, teacher, labels, weight, normalizers, slice, loss, chunk_tokens) -> ∂/∂logits` of a slice."""
    if backend == "triton":
        from ted_scale.kernels.triton.strict import launch_slopes

        return launch_slopes
    return sliced_slopes


def sliced_statistics(student, teacher, labels, weight, f: LogitLoss, chunk_tokens: int) -> Statistics:
    whole = []
    for rows in chunks(len(weight), rows_of(student, chunk_tokens)):
        live = weight[rows]
        parts = []
        for at in chunks(len(student[1]), SLICE):
            y_s, u = logits_of(student, teacher, rows, live, at, f)
            parts.append(logits.statistics(y_s, u, labels[rows], at.start, f))
        whole.append(logits.merge(Statistics(*map(torch.stack, zip(*parts, strict=True)))))
    return Statistics(*map(torch.cat, zip(*whole, strict=True)))


def sliced_slopes(student, teacher, labels, weight, n: Normalizers, at: slice, f: LogitLoss, chunk_tokens: int):
    h_s = student[0]
    dz = torch.empty(len(h_s), at.stop - at.start, dtype=h_s.dtype, device=h_s.device)
    for rows in chunks(len(h_s), rows_of(student, chunk_tokens)):
        y_s, u = logits_of(student, teacher, rows, weight[rows], at, f)
        own = Normalizers(*(x[rows] for x in n))
        dz[rows] = logits.gradient(y_s, u, labels[rows], at.start, own, weight[rows], f)
    return dz


def logits_of(student, teacher, rows: slice, weight, at: slice, f: LogitLoss):
    """(the student's softened logits, the teacher's over T or None) of some rows and one slice of the vocabulary"""
    y_s = logits.soften_(part(student, rows, weight, at), f.softcap_s, f.scale_s)
    at = slice(at.start, min(at.stop, 0 if teacher[1] is None else len(teacher[1])))
    if at.stop <= at.start:
        return y_s, None
    y_t = logits.soften_(part(teacher, rows, weight, at), f.softcap_t, f.scale_t)
    return y_s, logits.over_(y_t, f.temperature)


def part(side, rows: slice, weight, at: slice):
    h, w, b = side
    return project(live_rows(h[rows], weight), w[at], None if b is None else b[at])


def rows_of(student, chunk_tokens: int) -> int:
    return chunk_tokens or max(1, min(1024, len(student[0])))
