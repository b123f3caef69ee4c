"""Strict mode's two kernels: logits of both sides are in registers, one tile at a time, and are never written.

The statistics kernel gives every program some tokens and some vocabulary tiles, so that there are programs enough for the
whole device; their partial sums are merged in a fixed order. The slopes kernel computes one slice's tiles again.
"""

import torch
import triton
import triton.language as tl

from ted_scale.kernels.formulas.logits import LogitLoss, Normalizers, Statistics, merge
from ted_scale.kernels.triton.rows import add_block, logit_gradient, soften, soften_backward
from ted_scale.kernels.triton.shapes import SLOPES, STATISTICS, pick
from ted_scale.kernels.triton.tiles import dense, operand_of, precision, project_tile

PROGRAMS = 1024  # enough for any device; it also limits the number of partial sums


@triton.jit
def logits_tile(
    h, w, b, m, n, N, V, E, h_stride, w_stride, cap, scale, BIAS: tl.constexpr, CAPPED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One side's softened logits of a tile, fp32."""
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    z = project_tile(z, h, w, m, n, N, V, E, h_stride, w_stride, DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    if BIAS:
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        z += tl.load(b + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    return soften(z, cap, scale, CAPPED)


@triton.jit
def statistics_kernel(
    h_s, w_s, b_s, h_t, w_t, b_t, labels, weight, out, N, V, shared, E_s, E_t, h_s_stride, w_s_stride, h_t_stride,
    w_t_stride, tiles_a_program, temperature, cap_s, cap_t, scale_s, scale_t, KL: tl.constexpr, CE: tl.constexpr,
    BIAS_S: tl.constexpr, BIAS_T: tl.constexpr, CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partial `Statistics` [8, programs of a row, N] of this program's tokens and columns."""
    m, part = tl.program_id(0), tl.program_id(1)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    label = tl.load(labels + rows, mask=rows < N, other=-1)
    live = (tl.load(weight + rows, mask=rows < N, other=0.0) > 0)[:, None]
    m_t = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_t = tl.zeros((BLOCK_M,), tl.float32)
    m_s, m_1, l_s, l_1, cross, y_label = m_t, m_t, l_t, l_t, l_t, l_t
    for n in range(part * tiles_a_program, tl.minimum((part + 1) * tiles_a_program, tl.cdiv(V, BLOCK_N))):
        at = (n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        if KL:
            u = logits_tile(h_t, w_t, b_t, m, n, N, shared, E_t, h_t_stride, w_t_stride, cap_t, scale_t, BIAS_T, CAPPED_T,
                            DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K) / temperature  # fmt: skip
            u = tl.where(live, u, 0.0)
        y = logits_tile(h_s, w_s, b_s, m, n, N, V, E_s, h_s_stride, w_s_stride, cap_s, scale_s, BIAS_S, CAPPED_S,
                        DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        y = tl.where(live, y, 0.0)
        if CE:
            m_1, l_1, _ = add_block(m_1, l_1, tl.where(at < V, y, float("-inf")))
            y_label += tl.sum(tl.where(at == label[:, None], y, 0.0), axis=1)
        if KL:
            m_s, l_s, _ = add_block(m_s, l_s, tl.where(at < shared, y / temperature, float("-inf")))
            m_t, l_t, factor = add_block(m_t, l_t, tl.where(at < shared, u, float("-inf")))
            e = tl.where(at < shared, tl.exp(u - tl.where(m_t == float("-inf"), 0.0, m_t)[:, None]), 0.0)
            cross = cross * factor + tl.sum(e * (u - y / temperature), axis=1)
    plane = tl.num_programs(1).to(tl.int64) * N
    out += part.to(tl.int64) * N + rows
    mask = rows < N
    tl.store(out, m_t, mask=mask)
    tl.store(out + plane, l_t, mask=mask)
    tl.store(out + 2 * plane, cross, mask=mask)
    tl.store(out + 3 * plane, m_s, mask=mask)
    tl.store(out + 4 * plane, l_s, mask=mask)
    tl.store(out + 5 * plane, m_1, mask=mask)
    tl.store(out + 6 * plane, l_1, mask=mask)
    tl.store(out + 7 * plane, y_label, mask=mask)


@triton.jit
def slopes_kernel(
    h_s, w_s, b_s, h_t, w_t, b_t, labels, weight, norms, dz, N, first, width, shared, E_s, E_t, h_s_stride,
    w_s_stride, h_t_stride, w_t_stride, dz_stride, temperature, kl_weight, ce_weight, cap_s, cap_t, scale_s, scale_t,
    KL: tl.constexpr, CE: tl.constexpr, BIAS_S: tl.constexpr, BIAS_T: tl.constexpr, CAPPED_S: tl.constexpr,
    CAPPED_T: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """∂/∂z_s of the slice [first, first + width), `shared` of whose columns the teacher has; operands are the slice's."""
    m, n = tl.program_id(0), tl.program_id(1)  # neighbours share the slice's rows of w
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    at = (n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    w = tl.load(weight + rows, mask=rows < N, other=0.0)[:, None]
    u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if KL:
        u = logits_tile(h_t, w_t, b_t, m, n, N, shared, E_t, h_t_stride, w_t_stride, cap_t, scale_t, BIAS_T, CAPPED_T,
                        DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K) / temperature  # fmt: skip
        u = tl.where(at < shared, u, float("-inf"))
    y = logits_tile(h_s, w_s, b_s, m, n, N, width, E_s, h_s_stride, w_s_stride, cap_s, scale_s, BIAS_S, CAPPED_S,
                    DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    mask = rows < N
    n_t = tl.load(norms + rows, mask=mask, other=0.0)[:, None]
    n_s = tl.load(norms + N + rows, mask=mask, other=0.0)[:, None]
    n_1 = tl.load(norms + 2 * N + rows, mask=mask, other=0.0)[:, None]
    label = tl.load(labels + rows, mask=mask, other=-1)[:, None] - first
    g = logit_gradient(
        y, u, (n_t, n_s, n_1), at == label, w * kl_weight * temperature, w * ce_weight, temperature, KL, CE
    )
    g = tl.where(w > 0, soften_backward(g, y, cap_s, scale_s, CAPPED_S), 0.0)
    out = dz + rows.to(tl.int64)[:, None] * dz_stride + at
    tl.store(out, g.to(dz.dtype.element_ty), mask=mask[:, None] & (at < width))


def launch_statistics(student, teacher, labels, weight, f: LogitLoss, chunk_tokens: int) -> Statistics:
    arguments, shape, shared = prepare(STATISTICS, student, teacher, f)
    m, n, _ = shape.blocks.values()
    rows, vocab = len(weight), len(student[1])
    row_tiles, tiles = triton.cdiv(rows, m), triton.cdiv(vocab, n)
    a_program = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // row_tiles)))
    out = weight.new_empty(8, triton.cdiv(tiles, a_program), rows)
    operands, sizes, options = arguments
    statistics_kernel[(row_tiles, out.shape[1])](
        *operands, labels.contiguous(), weight, out, rows, vocab, shared, *sizes, a_program, f.temperature, f.softcap_s,
        f.softcap_t, f.scale_s, f.scale_t, **options,
    )  # fmt: skip
    return merge(Statistics(*out))


def launch_slopes(student, teacher, labels, weight, n: Normalizers, at: slice, f: LogitLoss, chunk_tokens: int):
    own, rows = [cut(side, at) for side in (student, teacher)], len(weight)
    arguments, shape, shared = prepare(SLOPES, *own, f)
    width = at.stop - at.start
    h_s = student[0]
    dz = torch.empty(rows, width, dtype=h_s.dtype, device=h_s.device)
    operands, sizes, options = arguments
    grid = (triton.cdiv(rows, shape.blocks["BLOCK_M"]), triton.cdiv(width, shape.blocks["BLOCK_N"]))
    slopes_kernel[grid](
        *operands, labels.contiguous(), weight, torch.stack(n), dz, rows, at.start, width, shared, *sizes, width, f.temperature,
        f.kl_weight, f.ce_weight, f.softcap_s, f.softcap_t, f.scale_s, f.scale_t, **options,
    )  # fmt: skip
    return dz


def cut(side, at: slice):
    h, w, b = side
    return side if w is None else (h, w[at], None if b is None else b[at])


def prepare(table, student, teacher, f: LogitLoss):
    """((operands, sizes and strides, options) of a launch, its shape, the columns that both sides have)"""
    kl = teacher[1] is not None
    shared = min(len(student[1]), len(teacher[1])) if kl else 0
    kl = kl and shared > 0
    teacher = (teacher[0], teacher[1][:shared], teacher[2]) if kl else student
    student, teacher = dense(*student), dense(*teacher)
    tensors = [student[0], student[1], teacher[0], teacher[1]]
    shape = pick(table, *tensors)
    m, n, k = shape.blocks.values()
    blocks = [(m, k), (n, k), (m, k), (n, k)]
    h_s, w_s, h_t, w_t = (operand_of(x, block, shape.descriptors) for x, block in zip(tensors, blocks, strict=True))
    b_s, b_t = (student[0] if b is None else b for b in (student[2], teacher[2]))
    sizes = (tensors[0].shape[1], tensors[2].shape[1], *(x.stride(0) for x in tensors))
    options = {
        "KL": kl, "CE": bool(f.ce_weight), "BIAS_S": student[2] is not None, "BIAS_T": teacher[2] is not None,
        "CAPPED_S": bool(f.softcap_s), "CAPPED_T": bool(f.softcap_t), "DESCRIPTORS": shape.descriptors,
        "PRECISION": precision(*tensors), **shape.blocks, **shape.launch,
    }  # fmt: skip
    return ((h_s, w_s, b_s, h_t, w_t, b_t), sizes, options), shape, shared
