"""The row formulas of the layer loss: the value of each kind, and its gradient.

With s the student's filtered state, t the teacher's and d = s − t, of each token:
    mse = ‖d‖² / D      nmse = ‖d‖² / (‖t‖² + ε)      cosine = 1 − cos(s, t)
Everything is computed from d and its sums, which are exactly 0 if both sides agree. 1 − s·t/(‖s‖‖t‖) would not be exactly 0.
If one side has norm 0, cosine is 1 and its gradient is 0.
"""

from typing import NamedTuple

import torch

from ted_scale.kernels.formulas.logits import row_dot

KINDS = ("nmse", "mse", "cosine")
EPSILON = 1e-6  # nmse: the divisor for a teacher's state of norm 0; cosine: the smallest norm that has a direction


class Difference(NamedTuple):
    """d = s − t of a chunk of rows, and row sums in fp32: dd = ‖d‖², tt = ‖t‖², ss = ‖s‖², sd = s·d."""

    d: torch.Tensor | None  # None if no gradient is wanted
    dd: torch.Tensor
    tt: torch.Tensor | None  # None for mse
    s: torch.Tensor | None = None  # this and the rest: only for cosine
    ss: torch.Tensor | None = None
    sd: torch.Tensor | None = None


def difference(t, s, kind: str) -> Difference:
    """The difference of the filtered states of both sides. d is written to t's memory."""
    tt = None if kind == "mse" else row_squares(t)
    d = torch.sub(s, t, out=t)
    if kind != "cosine":
        return Difference(d, row_squares(d), tt)
    return Difference(d, row_squares(d), tt, s, row_squares(s), row_dot(s, d))


def row_squares(x):
    """Σ x² of each row. No tensor of squares is made."""
    return torch.linalg.vector_norm(x, dim=1).square()


def row_values(rows: Difference, weight, kind: str, width: int):
    """(weight·value, scale, along_s) of each row. The gradient of the weighted value is scale·(d − along_s·s)."""
    if kind == "mse":
        return weight * rows.dd / width, weight * (2.0 / width), None
    if kind == "nmse":
        share = weight / (rows.tt + EPSILON)
        return share * rows.dd, 2.0 * share, None
    norm_s, norm_t = rows.ss.sqrt().clamp(min=EPSILON), rows.tt.sqrt().clamp(min=EPSILON)
    has_angle = torch.minimum(rows.ss, rows.tt) > EPSILON**2
    # ‖s‖ − ‖t‖ = (‖s‖² − ‖t‖²) / (‖s‖ + ‖t‖) and ‖s‖² − ‖t‖² = 2 s·d − ‖d‖²
    gap = (2 * rows.sd - rows.dd) / (norm_s + norm_t)
    share = torch.where(has_angle, weight / (norm_s * norm_t), 0.0)
    value = torch.where(has_angle, share * (rows.dd - gap * gap) / 2, weight * (rows.dd > 0))
    return value, share, rows.sd / (norm_s * norm_s)


def row_gradients(rows: Difference, scale, along_s, dtype):
    """scale·(d − along_s·s) in d's memory, in the type of the products that follow."""
    d = rows.d
    if along_s is not None:
        d = d.addcmul_(rows.s, along_s[:, None], value=-1)
    return torch.mul(d, scale[:, None], out=d).to(dtype)
