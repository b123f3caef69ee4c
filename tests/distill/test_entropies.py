"""The floor of the teacher's entropy: a quantile over all ranks' tokens, from counts in fixed bins."""

import numpy
import pytest
import torch
from plain import build, make_batch, make_world, run_step

from ted_scale.distill import entropies
from ted_scale.kernels.tokens import valid_weights


def drawn(kind: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    spread = {"even": torch.rand(4000, generator=g) * 11, "sure": torch.randn(4000, generator=g).exp() * 0.02}
    return spread[kind]


@pytest.mark.parametrize("kind", ["even", "sure"])
@pytest.mark.parametrize("share", [0.05, 0.15, 0.6])
def test_the_floor_is_the_quantile_of_valid_tokens_and_that_of_ranks_together_is_that_of_one(kind, share):
    each, weights = drawn(kind), torch.ones(4000)
    weights[::3], each[1] = 0.0, float("nan")
    weights[1] = 0.0
    whole = entropies.tally(each, weights, floor=0.0)
    parts = [entropies.tally(*part, floor=0.0) for part in zip(each.split(1000), weights.split(1000), strict=True)]
    assert torch.equal(whole, torch.stack(parts).sum(0))
    floor = entropies.floor_of(whole.tolist(), share)
    below = (each[weights > 0] < floor).float().mean().item()
    assert below == pytest.approx(share, abs=0.01)
    assert floor == numpy.float32(floor)
    assert entropies.kept_share(whole.tolist()) == 1.0


def test_without_a_token_there_is_no_floor_and_with_a_share_of_0_it_is_0():
    none = entropies.nothing(torch.ones(1)).tolist()
    assert entropies.floor_of(none, 0.15) is None and entropies.kept_share(none) is None
    assert entropies.floor_of(entropies.tally(torch.tensor([0.0]), torch.ones(1), 0.0).tolist(), 0.0) == 0.0


def test_a_student_leaves_out_the_kl_of_tokens_below_the_floor_and_counts_all_of_them(tmp_path):
    parts = build(make_world(tmp_path), method="kd", loss={"skip_low_entropy": 0.5})
    batch, weights = make_batch(), parts.stage.weights(0)
    valid = (valid_weights(batch.labels_BT, batch.weights_BT) > 0).sum().item()
    (every,), _ = run_step(parts, [batch], weights)
    floor = entropies.floor_of(every.tally.tolist(), 0.5)
    (half,), _ = run_step(parts, [batch], weights._replace(floor=floor))
    (none,), gradients = run_step(parts, [batch], weights._replace(floor=9.0))
    (ce,), of_ce = run_step(parts, [batch], weights._replace(kl=0.0))
    kept = [losses.tally[0].item() for losses in (every, half, none, ce)]
    assert kept[0] == valid and kept[1] == pytest.approx(valid / 2, abs=2) and kept[2:] == [0, 0]
    assert [losses.tally[1:].sum().item() for losses in (every, half, none, ce)] == [valid, valid, valid, 0]
    assert every.kl > half.kl > none.kl == 0 and every.ce == half.ce == none.ce
    assert none.total == ce.total and all(torch.allclose(gradients[name], of_ce[name]) for name in of_ce)
