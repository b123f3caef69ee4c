"""Tiles of row-major operands, through pointers or Hopper's descriptors, and their products."""

import torch
import triton
import triton.language as tl


@triton.jit
def load_tile(
    x, row, column, rows, columns, stride, DESCRIPTORS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """x[row : row + BLOCK_R, column : column + BLOCK_C], 0 outside."""
    if DESCRIPTORS:
        return x.load([row, column])
    else:
        r, c = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
        at = r.to(tl.int64)[:, None] * stride + c[None, :]
        return tl.load(x + at, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)


@triton.jit
def project_tile(
    acc, h, w, m, n, N, D, E, h_stride, w_stride, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + h[tile m]·w[tile n]ᵀ in fp32."""
    for k in range(0, E, BLOCK_K):
        a = load_tile(h, m * BLOCK_M, k, N, E, h_stride, DESCRIPTORS, BLOCK_M, BLOCK_K)
        b = load_tile(w, n * BLOCK_N, k, D, E, w_stride, DESCRIPTORS, BLOCK_N, BLOCK_K)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


def dense(*tensors):
    """As kernels read them: the entries of a row are next to each other in memory."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]


def operand_of(tensor, block: tuple[int, int], descriptors: bool):
    """The kernel's argument for `tensor`: the tensor, or a descriptor of it in tiles of `block`."""
    if not descriptors:
        return tensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, list(block))


def precision(*operands) -> str:
    """fp32 operands are multiplied exactly, not as TF32."""
    return "ieee" if any(x.dtype == torch.float32 for x in operands) else "tf32"
