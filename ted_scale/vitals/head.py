"""Numbers of the output, from the logits of a sample of tokens: how teacher and student agree, what the teacher knows of the
text, and KL's gradient against CE's at the head's input.

The gradients are by the formulas of the losses themselves, on the sampled rows alone and without autograd. Note: sums of samples of
several steps may be added; the numbers are theirs.
"""

from typing import NamedTuple

import torch

from ted_scale.kernels.formulas.logits import LogitLoss, label_logit, soften, whole_rows
from ted_scale.kernels.products import chunks, matmul, operand, project, rows_per_chunk

COPIES = 6  # of a chunk's logits, at most at a time: 3.5 for KL, 5.5 were counted for a divergence and a softcap
SURE = 0.99  # the probability of one token from which on it is a saturated one


class Side(NamedTuple):
    """Sampled inputs of a head, and its weights."""

    states: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    scale: float


def sums(student: Side, teacher: Side, labels, counted, f: LogitLoss, floor=None) -> torch.Tensor:
    """Over the tokens that count, in the order of `numbers`. `f` has the temperature and the divergence."""
    student, teacher = (side._replace(weight=operand(side.weight, "torch")) for side in (student, teacher))
    each = bytes_a_row(len(student.weight) + len(teacher.weight))
    parts = []
    for at in chunks(len(labels), rows_per_chunk(len(labels), each, labels.device, None)):
        ours, theirs = (side._replace(states=side.states[at]) for side in (student, teacher))
        parts.append(of_rows(ours, theirs, labels[at], counted[at].float(), f, floor))
    return torch.stack(parts).sum(0)


def bytes_a_row(vocabularies: int) -> int:
    """Of scratch, for the columns of both sides together."""
    return 4 * COPIES * vocabularies


def numbers(sums, f: LogitLoss) -> dict[str, float]:
    """Means over tokens. `kl_to_ce` is the ratio of the gradients' norms with the weights of both terms that `f` has, and not there
    where CE has none."""
    tokens, agree, kl, ce_s, ce_t, known, sure_s, sure_t, squares_ce, squares_kl, product = sums.unbind()
    norm_ce, norm_kl = squares_ce.sqrt(), squares_kl.sqrt()
    found = {
        "agreement": agree / tokens, "kl_1": kl / tokens, "student_ce": ce_s / tokens, "teacher_ce": ce_t / known,
        "saturated_s": sure_s / tokens, "saturated_t": sure_t / tokens, "kl_ce_cosine": product / (norm_ce * norm_kl),
    }  # fmt: skip
    found |= {"kl_to_ce": f.kl_weight * norm_kl / (f.ce_weight * norm_ce)} if f.ce_weight else {}
    return {key: float(value) for key, value in found.items()}


def of_rows(student: Side, teacher: Side, labels, weight, f: LogitLoss, floor) -> torch.Tensor:
    """Sums over a chunk of tokens, in the order of `numbers`."""
    z_s, z_t = (project(side.states, side.weight, side.bias) for side in (student, teacher))
    shared = min(z_s.shape[1], z_t.shape[1])
    y_s, y_t = soften(z_s, student.softcap, student.scale), soften(z_t, teacher.softcap, teacher.scale)
    log_q, log_p = y_s[:, :shared].log_softmax(1), y_t[:, :shared].log_softmax(1)
    known = weight * (labels < z_t.shape[1])  # tokens that the teacher's vocabulary has
    sums = [
        weight,
        weight * (y_s[:, :shared].argmax(1) == y_t[:, :shared].argmax(1)),
        weight * (log_p.exp() * (log_p - log_q)).sum(1),
        weight * surprise(y_s, labels),
        known * surprise(y_t, labels),
        known,
        *(weight * (y.log_softmax(1).amax(1).exp() >= SURE) for y in (y_s, y_t)),
    ]
    ce, kl = gradients(z_s, z_t[:, :shared].contiguous(), student.weight, labels, weight, f, floor)
    return torch.stack([*(x.sum() for x in sums), ce.square().sum(), kl.square().sum(), (ce * kl).sum()])


def surprise(y, labels) -> torch.Tensor:
    """−log softmax(y) at the label."""
    return y.logsumexp(1) - label_logit(y, labels, 0)


def gradients(z_s, z_t, weight_s, labels, weight, f: LogitLoss, floor) -> tuple[torch.Tensor, torch.Tensor]:
    """(of CE, of the divergence) at the head's input, each with a weight of 1. Logits are overwritten."""
    only_ce = f._replace(ce_weight=1.0, kl_weight=0.0, covers=False)  # it shares its softmax with no divergence
    only_kl = f._replace(ce_weight=0.0, kl_weight=1.0)
    of_ce = whole_rows(z_s.clone(), None, labels, weight, only_ce, True)[2]
    of_kl = whole_rows(z_s, z_t, labels, weight, only_kl, True, floor)[2]
    return matmul(of_ce, weight_s), matmul(of_kl, weight_s)
