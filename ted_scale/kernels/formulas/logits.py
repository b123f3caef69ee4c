"""The row formulas of the logit losses in plain torch: the CPU path, and the definition for the Triton kernels.

Notation: z are raw logits, y = soften(z), T the temperature; p and q are the teacher's and the student's softmax(y/T), q₁ the
student's softmax(y). A slice holds the columns [first, first + width) of the student's vocabulary. `u` is the teacher's y/T over
those of these columns that both vocabularies have, or None.
"""

from typing import NamedTuple

import torch

from ted_scale.kernels.formulas import divergences


class LogitLoss(NamedTuple):
    """ce_weight · CE + kl_weight · T² · divergence. A softcap of 0 means none. `covers` is 1 if the teacher's vocabulary contains
    the student's. `top_k` is explained in divergences.py; 0 means the whole vocabulary."""

    temperature: float
    kl_weight: float
    ce_weight: float
    softcap_s: float
    softcap_t: float
    scale_s: float
    scale_t: float
    covers: bool
    divergence: str = "forward"
    top_k: int = 0

    @property
    def numbers(self) -> list[float]:
        """The fields that an operation takes as a list. The other fields are separate arguments."""
        return [float(x) for x in self[:8]]

    @property
    def one_softmax(self) -> bool:
        """Whether the student's q and q₁ are the same."""
        return bool(self.ce_weight and self.covers) and self.temperature == 1.0


class Statistics(NamedTuple):
    """Numbers of one slice of each row, [N] in fp32. They are the largest exponent m and l = Σ e^(·−m) for the teacher at T, the
    student at T and the student at 1; `cross` = Σ e^(u − m_t)·(u − y_s/T); and the label's y, which is 0 if the label is outside
    the slice."""

    m_t: torch.Tensor
    l_t: torch.Tensor
    cross: torch.Tensor
    m_s: torch.Tensor
    l_s: torch.Tensor
    m_1: torch.Tensor
    l_1: torch.Tensor
    at_label: torch.Tensor


class Normalizers(NamedTuple):
    """log Σ e^· of whole rows: for the teacher at T, the student at T and the student at 1."""

    teacher: torch.Tensor
    student: torch.Tensor
    student_1: torch.Tensor


def soften(z, softcap: float | None, scale: float):
    """cap · tanh(scale · z / cap), which a family applies to its logits. `soften_`, `softcap_slope` and triton/rows.py must agree
    with it."""
    z = z if scale == 1.0 else z * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def soften_(z, softcap: float, scale: float):
    """`soften` in place."""
    z = z if scale == 1.0 else z.mul_(scale)
    return z.div_(softcap).tanh_().mul_(softcap) if softcap else z


def softcap_slope(y_s, f: LogitLoss):
    """∂y/∂(scale·z), computed from y. None without a softcap."""
    return torch.div(y_s, f.softcap_s).square_().neg_().add_(1) if f.softcap_s else None


def over_(y, temperature: float):
    return y if temperature == 1.0 else y.div_(temperature)


def of_nothing(weight) -> Statistics:
    """The statistics of rows without columns."""
    nothing, least = torch.zeros_like(weight), torch.full_like(weight, -torch.inf)
    return Statistics(least, nothing, nothing, least, nothing, least, nothing, nothing)


def statistics(y_s, u, labels, first: int, f: LogitLoss) -> Statistics:
    out = of_nothing(y_s[:, 0])
    if f.ce_weight:
        m_1, l_1 = exponents(y_s)
        out = out._replace(m_1=m_1, l_1=l_1, at_label=label_logit(y_s, labels, first))
    if u is None or u.shape[1] == 0:
        return out
    y_s = y_s[:, : u.shape[1]] if f.temperature == 1.0 else y_s[:, : u.shape[1]] / f.temperature
    m_s, l_s = (out.m_1, out.l_1) if f.one_softmax else exponents(y_s)
    m_t = u.amax(dim=1)
    e = torch.sub(u, m_t[:, None]).exp_()
    return out._replace(m_t=m_t, l_t=e.sum(dim=1), m_s=m_s, l_s=l_s, cross=row_dot(e, u - y_s))


def exponents(y):
    """(m, Σ e^(y − m)) with m = max y."""
    m = y.amax(dim=1)
    return m, torch.sub(y, m[:, None]).exp_().sum(dim=1)


def label_logit(y, labels, first: int):
    """The label's y, [N]. 0 if the label is outside the slice that begins at column `first`."""
    at, found = label_column(y, labels, first)
    return torch.where(found, y.gather(1, at)[:, 0], 0.0)


def label_column(y, labels, first: int):
    """([N, 1] column of the label in the slice, [N] whether the label is in the slice)"""
    at = labels - first
    return at.clamp(0, y.shape[1] - 1)[:, None], (at >= 0) & (at < y.shape[1])


def merge(parts: Statistics) -> Statistics:
    """The statistics of whole rows, from those of their slices, which are stacked along dimension 0."""
    (m_t, by_t), (m_s, by_s), (m_1, by_1) = (common(m) for m in (parts.m_t, parts.m_s, parts.m_1))
    sums = ((parts.l_t, by_t), (parts.cross, by_t), (parts.l_s, by_s), (parts.l_1, by_1))
    l_t, cross, l_s, l_1 = ((x * factor).sum(dim=0) for x, factor in sums)
    return Statistics(m_t, l_t, cross, m_s, l_s, m_1, l_1, parts.at_label.sum(dim=0))


def common(m):
    """(m of all parts, the factor e^(m_part − m) of each part)"""
    largest = m.amax(dim=0)
    return largest, torch.where(m == -torch.inf, 0.0, (m - largest).exp())


def finish(s: Statistics, weight, f: LogitLoss) -> tuple[torch.Tensor, torch.Tensor, Normalizers]:
    """(weight · T² · KL, weight · CE, normalizers) of each row."""
    n = Normalizers(s.m_t + s.l_t.log(), s.m_s + s.l_s.log(), s.m_1 + s.l_1.log())
    zero = torch.zeros_like(weight)
    kl = f.temperature**2 * (s.cross / s.l_t - n.teacher + n.student) if f.kl_weight else zero
    ce = n.student_1 - s.at_label if f.ce_weight else zero
    return counted(weight, kl), counted(weight, ce), n


def gradient(y_s, u, labels, first: int, n: Normalizers, weight, f: LogitLoss):
    """∂ Σ weight·(ce_weight·CE + kl_weight·T²·KL) / ∂z_s of one slice. It is written to y_s. u is overwritten, too."""
    slope, q, p, gap = softcap_slope(y_s, f), None, None, None
    if u is not None and u.shape[1]:
        p = u.sub_(n.teacher[:, None]).exp_()
    if p is not None and not f.one_softmax:
        q = torch.div(y_s[:, : p.shape[1]], f.temperature).sub_(n.student[:, None]).exp_()
    q_1 = y_s.sub_(n.student_1[:, None]).exp_() if f.ce_weight else y_s.zero_()
    if p is not None:
        gap = torch.sub(q_1[:, : p.shape[1]] if q is None else q, p, out=p)
    return from_slopes(q_1, gap, slope, labels, first, weight, weight, f)


def from_slopes(q_1, gap, slope, labels, first: int, weight, of_kl, f: LogitLoss):
    """The gradient, from the student's softmax and the divergence's slope. It is written to q_1, which is zeros if CE has no
    weight. `of_kl` has the rows' weights for the divergence.

    The slope (q − p for KL) is computed before it is multiplied by a factor, so it is exactly 0 if student and teacher agree.
    """
    if f.ce_weight:
        at, found = label_column(q_1, labels, first)
        q_1.scatter_add_(1, at, -found.to(q_1.dtype)[:, None]).mul_((weight * f.ce_weight)[:, None])
    if gap is not None:
        q_1[:, : gap.shape[1]].addcmul_(gap, (of_kl * f.kl_weight * f.temperature)[:, None])
    out = q_1 if slope is None else q_1.mul_(slope)
    return out if f.scale_s == 1.0 else out.mul_(f.scale_s)


def whole_rows(z_s, z_t, labels, weight, f: LogitLoss, wants_gradient: bool, floor=None):
    """(weight·T²·divergence, weight·CE, ∂/∂z_s or None, the teacher's entropies or None) for rows with all their raw logits. The
    logits are overwritten. With a `floor` there are entropies, and a row with a lower entropy has no divergence."""
    y_s = soften_(z_s, f.softcap_s, f.scale_s)
    slope = softcap_slope(y_s, f) if wants_gradient else None
    # It uses the memory of y_s if nothing reads y_s again, because a new matrix would cost a CPU more than the arithmetic.
    log_q_1 = torch.log_softmax(y_s, dim=1, out=y_s if z_t is None else None) if f.ce_weight else None
    zero = torch.zeros_like(weight)
    ce = counted(weight, -label_logit(log_q_1, labels, 0)) if f.ce_weight else zero
    u = None if z_t is None else over_(soften_(z_t, f.softcap_t, f.scale_t), f.temperature)
    of_teacher = (zero, None, None) if u is None else divergence(y_s, u, log_q_1, f, wants_gradient, floor is not None)
    kl, gap, entropy = of_teacher
    of_kl = weight if entropy is None else torch.where(entropy < floor, 0.0, weight)
    kl = counted(of_kl, kl)
    if not wants_gradient:
        return kl, ce, None, entropy
    q_1 = torch.zeros_like(y_s) if log_q_1 is None else log_q_1 if f.one_softmax else log_q_1.exp_()
    return kl, ce, from_slopes(q_1, gap, slope, labels, 0, weight, of_kl, f), entropy


def divergence(y_s, u, log_q_1, f: LogitLoss, wants_slope: bool, wants_entropy: bool):
    """(T²·divergence, its slope, the entropy of p). y_s and u are overwritten. If the two softmaxes are the same, log_q_1 is q_1
    afterwards."""
    log_q = log_q_1 if f.one_softmax else over_(y_s[:, : u.shape[1]], f.temperature).log_softmax(dim=1)
    log_p = torch.log_softmax(u, dim=1, out=y_s.view(-1)[: u.numel()].view_as(u))
    entropy = torch.exp(log_p, out=u).mul_(log_p).sum(dim=1).neg_().clamp_(min=0) if wants_entropy else None
    value, slope = divergences.between(log_p, log_q, u, f.divergence, f.top_k, wants_slope)
    return f.temperature**2 * value, slope, entropy


def counted(weight, x):
    """weight·x, or 0 for a token that does not count, even if x is NaN there."""
    return torch.where(weight > 0, weight * x, 0.0)


def row_dot(a, b):
    """Σ a·b of each row. No tensor of products is made."""
    return torch.bmm(a[:, None, :], b[:, :, None])[:, 0, 0]
