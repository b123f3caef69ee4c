"""linear_kl_ce without whole logits in memory. It computes statistics in the forward and gradients in the backward, one slice of
the vocabulary at a time.

The forward keeps three normalizers for each token. The backward computes each slice's logits again and writes the slice's
∂/∂logits in the states' type. It multiplies them into ∂/∂h_s (an fp32 sum) and into the slice's rows of ∂/∂w_s. Those rows are
final after the last token, so there is no [V, d] sum in fp32. The matrix work is 1.6 times that of `chunked`.
"""

from collections.abc import Iterator, Sequence

import torch

from ted_scale.kernels.autograd import as_scalar
from ted_scale.kernels.formulas import logits
from ted_scale.kernels.formulas.logits import LogitLoss, Normalizers, Statistics
from ted_scale.kernels.products import add_matmul, chunks, live_rows, matmul_into, project

# A tile of fp32 logits has ROWS tokens and LOGITS columns. Smaller tiles would stay in a GPU's L2 cache, but then the host's time
# for a tile limits the speed (measured on an H100). The gradient is collected for SLICE columns, because its product with w_s
# reads and writes the fp32 ∂h_s once for each slice.
ROWS, LOGITS, SLICE = 8192, 768, 1536


def strict_kl_ce(student, teacher, labels, weight, denom, loss, backend: str, chunk_tokens: int, gather):
    """(total, kl, ce). The tensors of both sides are saved by reference. `gather` makes the teacher's weights whole in backward."""
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
    f, add = LogitLoss(*loss), statistics_of(backend)
    if not len(weight) or not (f.kl_weight or f.ce_weight):
        return weight.new_zeros(3), weight.new_zeros(3, len(weight))
    labels, tiles = labels.contiguous(), Tiles((h_s, w_s, b_s), (h_t, w_t, b_t), chunk_tokens)
    running = torch.stack(logits.of_nothing(weight))
    for rows in tiles.rows:
        for at, z_s, z_t in tiles.logits(rows, slice(0, len(w_s))):
            add(running[:, rows], z_s, z_t, labels[rows], at.start, f)
    kl, ce, normalizers = logits.finish(Statistics(*running), weight, f)
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
    f, tensors = LogitLoss(*loss), (h_s, w_s, b_s)
    if not len(weight) or not (f.kl_weight or f.ce_weight):
        return tuple(torch.zeros_like(t) if w else h_s.new_empty(0) for t, w in zip(tensors, wanted, strict=True))
    tiles = Tiles((h_s, w_s, b_s), (h_t, w_t, b_t), chunk_tokens)
    dh, dw, db = sums(tiles, labels.contiguous(), weight, normalizers, scale, wanted, f, slopes_of(backend))
    del tiles  # its memory is then used for ∂h_s in 16 bits
    return dh.mul_(scale).to(h_s.dtype), dw, db if b_s is None else db.mul_(scale).to(b_s.dtype)


def sums(tiles, labels, weight, normalizers, scale, wanted, f: LogitLoss, write):
    """(∂h_s in fp32, scale·∂w_s in its type, ∂b_s in fp32). Gradients that are not wanted are empty."""
    h_s, w_s, _ = tiles.student
    makers = (torch.empty_like, torch.float32), (torch.empty_like, w_s.dtype), (torch.zeros_like, torch.float32)
    dh, dw, db = (
        make(t, dtype=dtype) if wants else h_s.new_empty(0)
        for t, (make, dtype), wants in zip(tiles.student, makers, wanted, strict=True)
    )
    width = min(SLICE, len(w_s))
    slopes = h_s.new_empty(tiles.count * width)
    product = h_s.new_empty(width if wanted[1] else 0, h_s.shape[1], dtype=torch.float32)
    for at in chunks(len(w_s), SLICE):
        slice_dw = product[: at.stop - at.start]
        for rows in tiles.rows:
            live, dz = weight[rows], matrix(slopes, rows, at)
            for part, z_s, z_t in tiles.logits(rows, at):
                own = dz[:, part.start - at.start : part.stop - at.start]
                write(own, z_s, z_t, labels[rows], live, part.start, normalizers[:, rows], f)
            if wanted[0]:
                (add_matmul if at.start else matmul_into)(dh[rows], dz, w_s[at])
            if wanted[1]:
                (add_matmul if rows.start else matmul_into)(slice_dw, dz.t(), live_rows(h_s[rows], live))
            if wanted[2]:
                db[at] += dz.sum(dim=0, dtype=torch.float32)
        if wanted[1]:
            dw[at] = slice_dw.mul_(scale)  # before rounding, because a sum may exceed fp16
    return dh, dw, db


@strict_gradients.register_fake
def _(h_s, w_s, b_s, h_t, w_t, b_t, labels, weight, normalizers, scale, wanted, loss, backend, chunk_tokens):
    return tuple(torch.empty_like(t) if w else h_s.new_empty(0) for t, w in zip((h_s, w_s, b_s), wanted, strict=True))


class Tiles:
    """Both sides' logits for some tokens and columns. Every tile reuses the memory of the one before."""

    def __init__(self, student, teacher, chunk_tokens: int):
        self.student, self.teacher, h_s = student, teacher, student[0]
        self.rows = chunks(len(h_s), chunk_tokens or ROWS)
        self.count = self.rows[0].stop
        sides, columns = 1 if teacher[1] is None else 2, min(LOGITS, len(student[1]))
        self.room = h_s.new_empty(sides, self.count * columns, dtype=torch.float32)

    def logits(self, rows: slice, columns: slice) -> Iterator[tuple]:
        """Yields (columns, the student's raw logits, the teacher's or None), LOGITS columns at a time."""
        for part in chunks(columns.stop - columns.start, LOGITS):
            at = slice(columns.start + part.start, columns.start + part.stop)
            yield at, tile(self.student, rows, at, self.room[0]), tile(self.teacher, rows, at, self.room[-1])


def tile(side, rows: slice, at: slice, room):
    """The raw logits of these columns, or of those that this side has. Tokens that do not count have logits, too, perhaps NaN."""
    h, w, b = side
    at = slice(at.start, min(at.stop, 0 if w is None else len(w)))
    if at.stop <= at.start:
        return None
    return project(h[rows], w[at], None if b is None else b[at], matrix(room, rows, at))


def matrix(room, rows: slice, at: slice):
    """The first entries of `room` as a dense matrix."""
    shape = rows.stop - rows.start, at.stop - at.start
    return room[: shape[0] * shape[1]].view(shape)


def statistics_of(backend: str):
    """A function `f(running, z_s, z_t, labels, first, loss)` that adds a slice's raw logits to the statistics [8, N]. It may
    overwrite the logits."""
    if backend == "triton":
        from ted_scale.kernels.triton.strict import launch_statistics

        return launch_statistics
    return add_statistics


def slopes_of(backend: str):
    """A function `f(dz, z_s, z_t, labels, weight, first, normalizers, loss)` that writes ∂/∂z_s to dz: 0 for a token that does
    not count."""
    if backend == "triton":
        from ted_scale.kernels.triton.strict import launch_slopes

        return launch_slopes
    return write_slopes


def add_statistics(running, z_s, z_t, labels, first: int, f: LogitLoss) -> None:
    y_s, u = softened(z_s, z_t, f)
    pairs = zip(running, logits.statistics(y_s, u, labels, first, f), strict=True)
    running.copy_(torch.stack(logits.merge(Statistics(*map(torch.stack, pairs)))))


def write_slopes(dz, z_s, z_t, labels, weight, first: int, normalizers, f: LogitLoss) -> None:
    y_s, u = softened(z_s, z_t, f)
    dz.copy_(live_rows(logits.gradient(y_s, u, labels, first, Normalizers(*normalizers), weight, f), weight))


def softened(z_s, z_t, f: LogitLoss):
    """(y_s, the teacher's y/T or None). They use the memory of the logits."""
    y_s = logits.soften_(z_s, f.softcap_s, f.scale_s)
    return y_s, None if z_t is None else logits.over_(logits.soften_(z_t, f.softcap_t, f.scale_t), f.temperature)
