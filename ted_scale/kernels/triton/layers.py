"""The layer loss of rows from both sides' filtered states. There is one program for each row. It reads the row once for the sums
and once for the gradient.

The formulas are those of formulas/layers.py. Everything is fp32. The gradient is rounded once, when it is stored.
"""

import triton
import triton.language as tl

from ted_scale.kernels.formulas.layers import EPSILON
from ted_scale.kernels.triton.shapes import SHAPES

SMALLEST = tl.constexpr(EPSILON)


@triton.jit
def load_state(x, bias, at, inside, BIAS: tl.constexpr):
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def row_value(dd, tt, ss, sd, weight, D, KIND: tl.constexpr):
    """(weight·value, scale, along_s). The gradient of the weighted value is scale·(d − along_s·s)."""
    if KIND == "mse":
        return weight * dd / D, weight * 2.0 / D, 0.0
    elif KIND == "nmse":
        share = weight / (tt + SMALLEST)
        return share * dd, 2.0 * share, 0.0
    else:
        norm_s = tl.maximum(tl.sqrt(ss), SMALLEST)
        norm_t = tl.maximum(tl.sqrt(tt), SMALLEST)
        no_angle = (ss <= SMALLEST * SMALLEST) | (tt <= SMALLEST * SMALLEST)
        gap = (2.0 * sd - dd) / (norm_s + norm_t)
        share = tl.where(no_angle, 0.0, weight / (norm_s * norm_t))
        value = tl.where(no_angle, weight * (dd > 0).to(tl.float32), share * (dd - gap * gap) / 2.0)
        return value, share, sd / (norm_s * norm_s)


@triton.jit
def layers_kernel(
    t, b_t, s, b_s, h, weight, values, dy, kept, t_stride, s_stride, h_stride, D, E, KIND: tl.constexpr,
    BIAS_T: tl.constexpr, BIAS_S: tl.constexpr, WANTS_GRADIENT: tl.constexpr, KEEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's weighted value, and in dy its gradient for the filtered s. `kept` gets the rows of h that count, and 0 for the
    others."""
    row = tl.program_id(0).to(tl.int64)
    only = row + tl.arange(0, 1)  # the interpreter can only broadcast a condition that is a tensor
    w = tl.load(weight + only)
    live = w > 0
    w = tl.where(live, w, 0.0)
    columns = tl.arange(0, BLOCK)
    t += row * t_stride
    s += row * s_stride

    dd = tl.zeros((1,), tl.float32)
    tt, ss, sd = dd, dd, dd
    for start in range(0, D, BLOCK):
        at = start + columns
        inside = (at < D) & live
        y_t, y_s = load_state(t, b_t, at, inside, BIAS_T), load_state(s, b_s, at, inside, BIAS_S)
        d = y_s - y_t
        dd += tl.sum(d * d)
        if KIND != "mse":
            tt += tl.sum(y_t * y_t)
        if KIND == "cosine":
            ss += tl.sum(y_s * y_s)
            sd += tl.sum(y_s * d)
    value, scale, along_s = row_value(dd, tt, ss, sd, w, D, KIND)
    tl.store(values + only, value)

    if WANTS_GRADIENT:
        for start in range(0, D, BLOCK):
            at = start + columns
            inside = (at < D) & live
            y_t, y_s = load_state(t, b_t, at, inside, BIAS_T), load_state(s, b_s, at, inside, BIAS_S)
            g = scale * (y_s - y_t - along_s * y_s)
            tl.store(dy + row * D + at, g.to(dy.dtype.element_ty), mask=at < D)
    if KEEPS:
        for start in range(0, E, BLOCK):
            at = start + columns
            x = tl.load(h + row * h_stride + at, mask=(at < E) & live, other=0.0)
            tl.store(kept + row * E + at, x, mask=at < E)


def launch_layers(t, b_t, s, b_s, h, weight, values, dy, kept, kind: str) -> None:
    """Write `values`, and dy and kept if they have entries. t and s are filtered, but their biases are not added yet."""
    layers_kernel[(len(s),)](
        t, weight if b_t is None else b_t, s, weight if b_s is None else b_s, h, weight, values, dy, kept, t.stride(0),
        s.stride(0), h.stride(0), s.shape[1], h.shape[1], KIND=kind, BIAS_T=b_t is not None, BIAS_S=b_s is not None,
        WANTS_GRADIENT=dy.numel() > 0, KEEPS=kept.numel() > 0, **SHAPES["layers"].launch,
    )  # fmt: skip
