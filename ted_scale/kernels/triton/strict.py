"""Strict mode's two kernels. They work on the logits of some rows and one slice of the vocabulary, and read them once.

The formulas are those of triton/rows.py. Here the statistics of a row are kept in memory from slice to slice.
"""

import triton
import triton.language as tl

from ted_scale.kernels.formulas.logits import LogitLoss
from ted_scale.kernels.triton.rows import add_columns, write_gradient
from ted_scale.kernels.triton.shapes import SHAPES


@triton.jit
def statistics_kernel(
    running, z_s, z_t, labels, N, plane, stride_s, stride_t, first, V, shared, temperature, cap_s, cap_t, scale_s,
    scale_t, KL: tl.constexpr, CE: tl.constexpr, CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the columns [first, first + V) to the `Statistics` [8, N] of all rows."""
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(own, N - 1).to(tl.int64)  # rows after the last read the last row, so no mask is needed
    label = tl.load(labels + rows)[:, None] - first
    z_s, z_t = z_s + rows[:, None] * stride_s, z_t + rows[:, None] * stride_t
    at = running + rows
    m_t, l_t, cross, m_s, l_s, m_1, l_1, y_label, _ = add_columns(
        tl.load(at), tl.load(at + plane), tl.load(at + 2 * plane), tl.load(at + 3 * plane), tl.load(at + 4 * plane),
        tl.load(at + 5 * plane), tl.load(at + 6 * plane), tl.load(at + 7 * plane), z_s, z_t, label, V, shared,
        temperature, cap_s, cap_t, scale_s, scale_t, KL, CE, CAPPED_S, CAPPED_T, BLOCK, "forward",
        0.0, False,
    )  # fmt: skip
    mask = own < N
    tl.store(at, m_t, mask=mask)
    tl.store(at + plane, l_t, mask=mask)
    tl.store(at + 2 * plane, cross, mask=mask)
    tl.store(at + 3 * plane, m_s, mask=mask)
    tl.store(at + 4 * plane, l_s, mask=mask)
    tl.store(at + 5 * plane, m_1, mask=mask)
    tl.store(at + 6 * plane, l_1, mask=mask)
    tl.store(at + 7 * plane, y_label, mask=mask)


@triton.jit
def slopes_kernel(
    dz, z_s, z_t, labels, weight, norms, N, plane, stride_d, stride_s, stride_t, first, V, shared, temperature,
    kl_weight, ce_weight, cap_s, cap_t, scale_s, scale_t, KL: tl.constexpr, CE: tl.constexpr, CAPPED_S: tl.constexpr,
    CAPPED_T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ∂/∂z_s of the columns [first, first + V) to dz."""
    rows = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), N - 1).to(tl.int64)[:, None]
    label = tl.load(labels + rows) - first
    n, w = (
        (tl.load(norms + rows), tl.load(norms + plane + rows), tl.load(norms + 2 * plane + rows)),
        tl.load(weight + rows),
    )
    write_gradient(
        z_s + rows * stride_s, z_t + rows * stride_t, dz + rows * stride_d, n, label, w, V, shared, temperature, kl_weight,
        ce_weight, cap_s, cap_t, scale_s, scale_t, KL, CE, CAPPED_S, CAPPED_T, BLOCK, w, 0.0,
        "forward",
    )  # fmt: skip


def launch_statistics(running, z_s, z_t, labels, first: int, f: LogitLoss) -> None:
    z_t, shared, options = prepare("statistics", z_s, z_t, f)
    rows, vocab = z_s.shape
    statistics_kernel[(triton.cdiv(rows, options["ROWS"]),)](
        running, z_s, z_t, labels, rows, running.stride(0), z_s.stride(0), z_t.stride(0), first, vocab, shared,
        f.temperature, f.softcap_s, f.softcap_t, f.scale_s, f.scale_t, **options,
    )  # fmt: skip


def launch_slopes(dz, z_s, z_t, labels, weight, first: int, normalizers, f: LogitLoss) -> None:
    z_t, shared, options = prepare("slopes", z_s, z_t, f)
    rows, vocab = z_s.shape
    slopes_kernel[(triton.cdiv(rows, options["ROWS"]),)](
        dz, z_s, z_t, labels, weight, normalizers, rows, normalizers.stride(0), dz.stride(0), z_s.stride(0),
        z_t.stride(0), first, vocab, shared, f.temperature, f.kl_weight, f.ce_weight, f.softcap_s, f.softcap_t,
        f.scale_s, f.scale_t, **options,
    )  # fmt: skip


def prepare(kernel: str, z_s, z_t, f: LogitLoss):
    """(the tensor to read as z_t, the number of columns that both sides have, the options of a launch)"""
    kl = z_t is not None
    z_t, shared = (z_t, z_t.shape[1]) if kl else (z_s, 0)
    flags = {"KL": kl, "CE": bool(f.ce_weight), "CAPPED_S": bool(f.softcap_s), "CAPPED_T": bool(f.softcap_t)}
    return z_t, shared, flags | SHAPES[kernel].launch
