"""Numbers of a pair against numpy, on tokens of which some do not count."""

import numpy
import pytest
import torch

from ted_scale.vitals import pairs

COUNTED = torch.tensor([True] * 20 + [False] * 4)


def states(width: int, seed: int) -> torch.Tensor:
    made = torch.randn(24, width, generator=torch.Generator().manual_seed(seed))
    made[20:] = 1e6  # tokens that do not count
    return made


def directions(x) -> numpy.ndarray:
    x = x[COUNTED].double().numpy()
    x = x / numpy.linalg.norm(x, axis=1, keepdims=True)
    return x - x.mean(0)


def test_closeness_is_the_mean_over_tokens_that_count():
    s, t = states(6, 0), states(6, 1)
    found = pairs.closeness(s, t, COUNTED)
    one, other = s[COUNTED].numpy(), t[COUNTED].numpy()
    lengths = numpy.linalg.norm(other, axis=1)
    assert float(found["error"]) == pytest.approx((numpy.linalg.norm(one - other, axis=1) / lengths).mean(), rel=1e-5)
    cosines = (one * other).sum(1) / lengths / numpy.linalg.norm(one, axis=1)
    assert float(found["cosine"]) == pytest.approx(cosines.mean(), rel=1e-4)


def test_cka_is_that_of_features():
    s, t = states(6, 0), states(9, 1)
    a, b = directions(s), directions(t)
    expected = numpy.linalg.norm(a.T @ b) ** 2 / (numpy.linalg.norm(a.T @ a) * numpy.linalg.norm(b.T @ b))
    one, other = pairs.gram(s, COUNTED), pairs.gram(t, COUNTED)
    assert pairs.cka(one, other) == pytest.approx(expected, rel=1e-4)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2))).Q
    assert pairs.cka(one, pairs.gram(3 * s @ turn, COUNTED)) == pytest.approx(1, abs=1e-5)


def test_effective_rank_is_that_of_the_singular_values():
    s = states(6, 0)
    share = numpy.linalg.svd(directions(s), compute_uv=False) ** 2
    share = share / share.sum()
    expected = numpy.exp(-(share * numpy.log(share)).sum())
    assert pairs.effective_rank(pairs.gram(s, COUNTED)) == pytest.approx(expected, rel=1e-4)


def test_effective_rank_counts_directions():
    four = torch.eye(4).repeat(5, 1)
    four = torch.cat([four, -four])
    counted = torch.ones(40, dtype=torch.bool)
    assert pairs.effective_rank(pairs.gram(four, counted)) == pytest.approx(4, rel=1e-4)
    one = torch.arange(-20.0, 20.0)[:, None] + 0.5
    assert pairs.effective_rank(pairs.gram(one @ torch.ones(1, 4), counted)) == pytest.approx(1, rel=1e-4)
    assert pairs.effective_rank(pairs.gram(torch.full((40, 4), 0.3), counted)) == 0


def test_a_token_a_thousand_times_as_long_as_the_others_does_not_hide_them():
    s = states(6, 0)
    rank = pairs.effective_rank(pairs.gram(s, COUNTED))
    s[0] *= 1000
    assert pairs.effective_rank(pairs.gram(s, COUNTED)) == pytest.approx(rank, rel=1e-4)


def test_pull_compares_the_own_gradient_with_the_rest():
    own, rest = states(6, 0), states(6, 1)
    found = pairs.pull(own, own + rest, COUNTED)
    a, b = own[COUNTED].flatten(), rest[COUNTED].flatten()
    assert float(found["pull"]) == pytest.approx(float(a.norm() / b.norm()), rel=1e-4)
    assert float(found["pull_cosine"]) == pytest.approx(float(torch.cosine_similarity(a, b, 0)), rel=1e-4)
