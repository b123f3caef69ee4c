"""Both filters' projections of one tile of tokens and dimensions, and their difference, in registers.

One fp32 accumulator sums over the teacher's width, gives its part of ‖t‖², changes its sign and sums over the student's
width: thus the difference is never one of rounded states. Cosine also needs s and has a second accumulator.
"""

import torch
import triton
import triton.language as tl

from ted_scale.kernels.formulas.layers import Difference
from ted_scale.kernels.triton.shapes import COSINE, DIFFERENCE, pick
from ted_scale.kernels.triton.tiles import dense, load_tile, operand_of, precision, project_tile


@triton.jit
def difference_kernel(
    h_t, w_t, b_t, h_s, w_s, b_s, weight, d_out, s_out, sums, N, D, E_t, E_s, h_t_stride, w_t_stride, h_s_stride,
    w_s_stride, d_stride, FILTERED_T: tl.constexpr, FILTERED_S: tl.constexpr, BIAS_T: tl.constexpr,
    BIAS_S: tl.constexpr, TWO: tl.constexpr, STORE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d = s − t to d_out, s to s_out (cosine), and this tile's row sums: ‖d‖², ‖t‖², and for cosine ‖s‖², s·d."""
    tiles_n = tl.cdiv(D, BLOCK_N)
    n, m = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n  # neighbours share rows of h
    rows, columns = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    live = tl.load(weight + rows, mask=rows < N, other=0.0) > 0
    kept = live[:, None] & (columns < D)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if FILTERED_T:
        acc = project_tile(
            acc, h_t, w_t, m, n, N, D, E_t, h_t_stride, w_t_stride, DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        acc = load_tile(h_t, m * BLOCK_M, n * BLOCK_N, N, D, h_t_stride, DESCRIPTORS, BLOCK_M, BLOCK_N).to(tl.float32)
    if BIAS_T:
        acc += tl.load(b_t + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    t = tl.where(kept, acc, 0.0)
    out = n.to(tl.int64) * N + rows
    plane = tiles_n.to(tl.int64) * N
    tl.store(sums + plane + out, tl.sum(t * t, axis=1), mask=rows < N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if TWO else -t
    if FILTERED_S:
        acc = project_tile(
            acc, h_s, w_s, m, n, N, D, E_s, h_s_stride, w_s_stride, DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        acc += load_tile(h_s, m * BLOCK_M, n * BLOCK_N, N, D, h_s_stride, DESCRIPTORS, BLOCK_M, BLOCK_N).to(tl.float32)
    if BIAS_S:
        acc += tl.load(b_s + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    acc = tl.where(kept, acc, 0.0)
    at = rows.to(tl.int64)[:, None] * d_stride + columns[None, :]
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    d = acc
    if TWO:
        d = acc - t
        tl.store(sums + 2 * plane + out, tl.sum(acc * acc, axis=1), mask=rows < N)
        tl.store(sums + 3 * plane + out, tl.sum(acc * d, axis=1), mask=rows < N)
        if STORE:
            tl.store(s_out + at, acc.to(s_out.dtype.element_ty), mask=inside)
    tl.store(sums + out, tl.sum(d * d, axis=1), mask=rows < N)
    if STORE:
        tl.store(d_out + at, d.to(d_out.dtype.element_ty), mask=inside)


def launch_difference(h_t, w_t, b_t, h_s, w_s, b_s, weight, kind: str, wants_gradient: bool) -> Difference:
    two, rows = kind == "cosine", len(h_s)
    h_t, w_t, b_t, h_s, w_s, b_s = dense(h_t, w_t, b_t, h_s, w_s, b_s)
    width = h_s.shape[1] if w_s is None else len(w_s)
    tensors = [h_t, h_t if w_t is None else w_t, h_s, h_s if w_s is None else w_s]
    shape = pick(COSINE if two else DIFFERENCE, *tensors)
    if w_t is None or w_s is None:  # a side without a filter is read in tiles of another shape
        shape = shape.plain or shape
    m, n, k = shape.blocks.values()
    tiles_n = triton.cdiv(width, n)
    sums = weight.new_empty(4 if two else 2, tiles_n, rows)
    # Cosine's gradient subtracts a multiple of s from d. Both may be far larger than the result, which 16 bits would lose.
    dtype = torch.float32 if two else h_s.dtype
    d = torch.empty(rows if wants_gradient else 0, width, dtype=dtype, device=h_s.device)
    s = torch.empty_like(d) if two else d
    blocks = [(m, n if w_t is None else k), (n, k), (m, n if w_s is None else k), (n, k)]
    h_t, w_t_, h_s, w_s_ = (operand_of(x, block, shape.descriptors) for x, block in zip(tensors, blocks, strict=True))
    difference_kernel[(triton.cdiv(rows, m) * tiles_n,)](
        h_t, w_t_, weight if b_t is None else b_t, h_s, w_s_, weight if b_s is None else b_s, weight, d, s, sums,
        rows, width, tensors[0].shape[1], tensors[2].shape[1], *(x.stride(0) for x in tensors), width,
        FILTERED_T=w_t is not None, FILTERED_S=w_s is not None, BIAS_T=b_t is not None, BIAS_S=b_s is not None,
        TWO=two, STORE=wants_gradient, DESCRIPTORS=shape.descriptors, PRECISION=precision(*tensors),
        **shape.blocks, **shape.launch,
    )  # fmt: skip
    dd, tt, *more = sums.sum(dim=1).unbind()
    return Difference(d if wants_gradient else None, dd, tt, *([s, *more] if two else []))
