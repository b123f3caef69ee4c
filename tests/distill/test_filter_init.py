"""Initial weights of filters: principal directions for the teacher, a regression for the student."""

from types import SimpleNamespace

import pytest
import torch

from ted_scale.distill.filter_init import add_moments, directions, start_of
from ted_scale.kernels.tokens import IGNORED

TOKENS, WIDTH_T, WIDTH_S, NARROW = 400, 12, 9, 5


def batch_of(count: int, ignored: int = 0):
    labels = torch.zeros(1, count, dtype=torch.long)
    labels[:, :ignored] = IGNORED
    return SimpleNamespace(labels_BT=labels, weights_BT=torch.ones(1, count))


def states(seed: int = 0, width: int = WIDTH_T):
    """Each dimension is smaller than the one before, in a rotated basis."""
    g = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
    return torch.randn(TOKENS, width, generator=g) * torch.logspace(0, -2, width) @ turned


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def moments(t, s=None, ignored: int = 0):
    return add_moments(None, batch_of(len(t), ignored), [t], [] if s is None else [s])[0]


def test_a_teacher_s_filter_is_the_best_projection_of_its_states_directions():
    t = states()
    rows = directions(moments(t).tt, NARROW)
    assert torch.allclose(rows @ rows.T, torch.eye(NARROW), atol=1e-5)
    kept = torch.linalg.svdvals(unit(t))[:NARROW].square().sum()
    assert (unit(t) @ rows.T).square().sum().item() == pytest.approx(kept.item(), rel=1e-4)
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()


def test_neither_long_states_nor_ignored_ones_change_the_directions():
    t = states()
    sinks = t.clone()
    sinks[7:9] *= 1000
    sinks[:3] = float("nan")
    assert torch.allclose(moments(sinks, ignored=3).tt, moments(t, ignored=3).tt, rtol=1e-4, atol=1e-4)


def test_sums_over_micro_batches_are_those_of_all_tokens():
    t, s = states(), states(1, WIDTH_S)
    half = TOKENS // 2
    sums = add_moments(None, batch_of(half), [t[:half]], [s[:half]])
    (both,) = add_moments(sums, batch_of(half), [t[half:]], [s[half:]])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(both, moments(t, s), strict=True))


def test_a_rotated_copy_of_the_teacher_starts_with_the_same_filtered_states():
    t = states()
    turned = torch.linalg.qr(torch.randn(WIDTH_T, WIDTH_T, generator=torch.Generator().manual_seed(5)))[0]
    start = start_of(moments(t, 3 * t @ turned), NARROW)
    there, here = unit(t) @ start.teacher.T, unit(t) @ (3 * turned) @ start.student.T
    assert (here - there).square().sum() < 1e-3 * there.square().sum()


def test_a_student_of_another_width_starts_as_near_as_a_linear_map_can():
    g = torch.Generator().manual_seed(5)
    t = states()
    s = t @ torch.randn(WIDTH_T, WIDTH_S, generator=g) + 0.01 * torch.randn(TOKENS, WIDTH_S, generator=g)
    start = start_of(moments(t, s), NARROW)
    scale = 1 / t.norm(dim=1, keepdim=True)
    target, read = (scale * t) @ start.teacher.T, scale * s
    best = torch.linalg.lstsq(read, target).solution
    error, least = ((read @ w - target).square().sum().item() for w in (start.student.T, best))
    assert least < error < 1.1 * least + 1e-3 * target.square().sum().item() < 0.5 * target.square().sum().item()


def test_at_the_teacher_s_width_its_filter_stays_the_identity():
    t, s = states(), states(1, WIDTH_S)
    assert start_of(moments(t, s), WIDTH_T).teacher is None
    assert start_of(moments(t, s), WIDTH_T).student.shape == (WIDTH_T, WIDTH_S)
    assert start_of(moments(t), NARROW).student is None
