"""Logit losses of rows from their logits. There is one program for each row. It reads the row once for the losses and once for
the gradient. The Jensen-Shannon divergence needs another read in between, because both softmaxes must be known before their mean.

The formulas are those of formulas/logits.py and formulas/divergences.py. Everything is fp32.
"""

import torch
import triton
import triton.language as tl

from ted_scale.kernels.formulas.logits import LogitLoss
from ted_scale.kernels.triton.shapes import SHAPES


@triton.jit
def soften(z, cap, scale, CAPPED: tl.constexpr):
    """cap·tanh(scale·z/cap). tanh is computed from the sigmoid, because every target has a sigmoid."""
    y = z * scale
    if CAPPED:
        y = cap * (2.0 * tl.sigmoid(2.0 * y / cap) - 1.0)
    return y


@triton.jit
def add_block(m, total, y):
    """The running (max, Σ e^(y − max)) of rows, with one more block of columns. y is −inf outside the vocabulary."""
    larger = tl.maximum(m, tl.max(y, axis=-1))
    safe = tl.where(larger == float("-inf"), 0.0, larger)
    factor = tl.exp(m - safe)
    return larger, total * factor + tl.sum(tl.exp(y - tl.expand_dims(safe, -1)), axis=-1), factor


@triton.jit
def over_log_means(log_q, log_p):
    """(log m − log q, log m − log p) with m = ½·(p + q). Both are exactly 0 if p and q are equal."""
    gap = log_p - log_q
    least = tl.log(0.5 * (1.0 + tl.exp(-tl.abs(gap))))  # log m − log max(p, q)
    return tl.maximum(gap, 0.0) + least, tl.maximum(-gap, 0.0) + least


@triton.jit
def other_slope(log_q, log_p, of_q, DIVERGENCE: tl.constexpr):
    """The slope of a divergence other than the forward KL. `of_q` is the row's KL from q to p, or from q to the mean."""
    if DIVERGENCE == "reverse":
        g = log_q - log_p - of_q
    else:
        over_q, _ = over_log_means(log_q, log_p)
        g = -0.5 * (over_q + of_q)
    return tl.exp(log_q) * g


@triton.jit
def logit_gradient(
    y_s, u, norms, of_q, is_label, factor_kl, factor_ce, temperature, KL: tl.constexpr, CE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """∂/∂y_s = factor_kl·slope + factor_ce·(q₁ − onehot). The forward KL's slope is q − p. Outside the shared vocabulary u is
    −inf and the slope is 0."""
    g = tl.zeros_like(y_s)
    if KL and DIVERGENCE == "forward":
        q = tl.where(u == float("-inf"), 0.0, tl.exp(y_s / temperature - norms[1]))
        g += factor_kl * (q - tl.exp(u - norms[0]))
    if KL and DIVERGENCE != "forward":
        log_p = tl.where(u == float("-inf"), 0.0, u) - norms[0]
        slope = other_slope(y_s / temperature - norms[1], log_p, of_q, DIVERGENCE)
        g += factor_kl * tl.where(u == float("-inf"), 0.0, slope)
    if CE:
        g += factor_ce * (tl.exp(y_s - norms[2]) - is_label.to(tl.float32))
    return g


@triton.jit
def soften_backward(g, y, cap, scale, CAPPED: tl.constexpr):
    """∂/∂z from ∂/∂y."""
    if CAPPED:
        g *= 1.0 - (y / cap) * (y / cap)
    return g * scale


@triton.jit
def add_columns(
    m_t, l_t, cross, m_s, l_s, m_1, l_1, y_label, z_s, z_t, label, V, shared, temperature, cap_s, cap_t, scale_s,
    scale_t, KL: tl.constexpr, CE: tl.constexpr, CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, BLOCK: tl.constexpr,
    DIVERGENCE: tl.constexpr, moment, ENTROPY: tl.constexpr,
):  # fmt: skip
    """The running `Statistics` of rows with V more columns. The teacher has the first `shared` of them. For the reverse KL,
    `cross` is Σ e^(y_s/T − m_s)·(y_s/T − u). For an entropy, `moment` is Σ e^(u − m_t)·(u − m_t)."""
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        y = soften(tl.load(z_s + at, mask=at < V, other=0.0), cap_s, scale_s, CAPPED_S)
        if CE:
            m_1, l_1, _ = add_block(m_1, l_1, tl.where(at < V, y, float("-inf")))
            y_label += tl.sum(tl.where(at == label, y, 0.0), axis=1)
        if KL:
            u = soften(tl.load(z_t + at, mask=at < shared, other=0.0), cap_t, scale_t, CAPPED_T) / temperature
            m_s, l_s, factor_s = add_block(m_s, l_s, tl.where(at < shared, y / temperature, float("-inf")))
            m_before, l_before = m_t, l_t
            m_t, l_t, factor = add_block(m_t, l_t, tl.where(at < shared, u, float("-inf")))
            if ENTROPY:
                shift = tl.where(m_before == float("-inf"), 0.0, m_before - m_t)
                e = tl.where(at < shared, tl.exp(u - m_t[:, None]), 0.0)
                moment = (moment + shift * l_before) * factor + tl.sum(e * (u - m_t[:, None]), axis=1)
            if DIVERGENCE == "forward":
                e = tl.where(at < shared, tl.exp(u - m_t[:, None]), 0.0)
                cross = cross * factor + tl.sum(e * (u - y / temperature), axis=1)
            if DIVERGENCE == "reverse":
                e = tl.where(at < shared, tl.exp(y / temperature - m_s[:, None]), 0.0)
                cross = cross * factor_s + tl.sum(e * (y / temperature - u), axis=1)
    return m_t, l_t, cross, m_s, l_s, m_1, l_1, y_label, moment


@triton.jit
def means(z_s, z_t, n_t, n_s, shared, temperature, cap_s, cap_t, scale_s, scale_t, CAPPED_S: tl.constexpr,
          CAPPED_T: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(KL(p ‖ m), KL(q ‖ m)) of a row with these normalizers."""
    of_p, of_q = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    for start in range(0, shared, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        y = soften(tl.load(z_s + at, mask=at < shared, other=0.0), cap_s, scale_s, CAPPED_S)
        u = soften(tl.load(z_t + at, mask=at < shared, other=0.0), cap_t, scale_t, CAPPED_T) / temperature
        log_q, log_p = y / temperature - n_s[:, None], u - n_t[:, None]
        over_q, over_p = over_log_means(log_q, log_p)
        of_p -= tl.sum(tl.where(at < shared, tl.exp(log_p) * over_p, 0.0), axis=1)
        of_q -= tl.sum(tl.where(at < shared, tl.exp(log_q) * over_q, 0.0), axis=1)
    return of_p, of_q


@triton.jit
def write_gradient(
    z_s, z_t, dz, norms, label, w, V, shared, temperature, kl_weight, ce_weight, cap_s, cap_t, scale_s, scale_t,
    KL: tl.constexpr, CE: tl.constexpr, CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, BLOCK: tl.constexpr, of_kl, of_q,
    DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """Write ∂/∂z_s of these columns to dz, which may be z_s itself. It is 0 for a token that does not count, even if its logits
    are NaN."""
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        y = soften(tl.load(z_s + at, mask=at < V, other=0.0), cap_s, scale_s, CAPPED_S)
        u = y
        if KL:
            u = soften(tl.load(z_t + at, mask=at < shared, other=0.0), cap_t, scale_t, CAPPED_T) / temperature
            u = tl.where(at < shared, u, float("-inf"))
        g = logit_gradient(
            y,
            u,
            norms,
            of_q,
            at == label,
            of_kl * kl_weight * temperature,
            w * ce_weight,
            temperature,
            KL,
            CE,
            DIVERGENCE,
        )
        g = tl.where(w > 0, soften_backward(g, y, cap_s, scale_s, CAPPED_S), 0.0)
        tl.store(dz + at, g.to(dz.dtype.element_ty), mask=at < V)


@triton.jit
def rows_kernel(
    z_s, z_t, dz, labels, weight, kl_out, ce_out, stride_s, stride_t, stride_d, V, shared, temperature, kl_weight,
    ce_weight, cap_s, cap_t, scale_s, scale_t, KL: tl.constexpr, CE: tl.constexpr, CAPPED_S: tl.constexpr,
    CAPPED_T: tl.constexpr, DIVERGENCE: tl.constexpr, WANTS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
    floor, entropy_out, ENTROPY: tl.constexpr,
):  # fmt: skip
    """A row's weighted T²·divergence and CE, and in dz its gradient for the raw z_s. dz may be z_s itself. With ENTROPY also the
    teacher's entropy. A row with an entropy below the floor has no divergence."""
    row = tl.program_id(0).to(tl.int64)
    z_s += row * stride_s
    z_t += row * stride_t
    dz += row * stride_d
    w, label = tl.load(weight + row), tl.load(labels + row)

    m_t = tl.full((1,), float("-inf"), tl.float32)
    l_t = tl.zeros((1,), tl.float32)
    m_t, l_t, cross, m_s, l_s, m_1, l_1, y_label, moment = add_columns(
        m_t, l_t, l_t, m_t, l_t, m_t, l_t, l_t, z_s, z_t, label, V, shared, temperature, cap_s, cap_t, scale_s, scale_t,
        KL, CE, CAPPED_S, CAPPED_T, BLOCK, DIVERGENCE, l_t, ENTROPY,
    )  # fmt: skip

    n_t, n_s, n_1 = m_t + tl.log(l_t), m_s + tl.log(l_s), m_1 + tl.log(l_1)
    only = tl.arange(0, 1)
    of_q, of_kl = l_t, w
    if ENTROPY:
        entropy = tl.maximum(tl.log(l_t) - moment / l_t, 0.0)
        tl.store(entropy_out + row + only, entropy)
        of_kl = tl.where(tl.sum(entropy) < tl.load(floor), 0.0, w)
    if KL:
        if DIVERGENCE == "forward":
            kl = cross / l_t - n_t + n_s
        if DIVERGENCE == "reverse":
            of_q = cross / l_s - n_s + n_t
            kl = of_q
        if DIVERGENCE == "jsd":
            of_p, of_q = means(
                z_s, z_t, n_t, n_s, shared, temperature, cap_s, cap_t, scale_s, scale_t, CAPPED_S, CAPPED_T, BLOCK
            )
            kl = 0.5 * (of_p + of_q)
        kl = temperature * temperature * kl
        tl.store(kl_out + row + only, tl.where(of_kl > 0, of_kl * kl, 0.0))
    if CE:
        tl.store(ce_out + row + only, tl.where(w > 0, w * (n_1 - y_label), 0.0))

    if WANTS_GRADIENT:
        norms = n_t[:, None], n_s[:, None], n_1[:, None]
        write_gradient(
            z_s, z_t, dz, norms, label, w, V, shared, temperature, kl_weight, ce_weight, cap_s, cap_t, scale_s, scale_t,
            KL, CE, CAPPED_S, CAPPED_T, BLOCK, of_kl, of_q[:, None], DIVERGENCE,
        )  # fmt: skip


def launch_rows(z_s, z_t, labels, weight, f: LogitLoss, wants_gradient: bool, room, floor=None):
    """(weight·T²·divergence, weight·CE, ∂/∂z_s or None, the teacher's entropies or None). The gradient is in `room`, or in z_s if
    `room` is None."""
    rows, vocab = z_s.shape
    kl, ce = weight.new_zeros(2, rows).unbind()
    dz, entropy = z_s if room is None else room, None if floor is None else torch.empty_like(weight)
    z_t, shared = (z_s, 0) if z_t is None else (z_t, z_t.shape[1])
    shape = SHAPES["rows_jsd" if f.divergence == "jsd" else "rows"]
    rows_kernel[(rows,)](
        z_s, z_t, dz, labels.contiguous(), weight, kl, ce, z_s.stride(0), z_t.stride(0), dz.stride(0), vocab, shared,
        f.temperature, f.kl_weight, f.ce_weight, f.softcap_s, f.softcap_t, f.scale_s, f.scale_t,
        KL=bool(f.kl_weight), CE=bool(f.ce_weight), CAPPED_S=bool(f.softcap_s), CAPPED_T=bool(f.softcap_t),
        DIVERGENCE=f.divergence, WANTS_GRADIENT=wants_gradient, floor=weight if floor is None else floor,
        entropy_out=kl if entropy is None else entropy, ENTROPY=entropy is not None, **shape.launch,
    )  # fmt: skip
    return kl, ce, dz if wants_gradient else None, entropy
