"""Stage I on a part of the pairs and tokens: unbiased, seeded by the step, independent of ranks and accumulation."""

import pytest
import torch
from plain import build, cut, make_batch, make_world, run_step

from ted_scale.config.method import Filters
from ted_scale.data.packing import Share
from ted_scale.distill.sampling import drawn_pairs, drawn_rows, times_of

PART = {"sample_tokens": 0.25, "sample_pairs": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("sampling"))


def test_every_token_and_pair_has_the_same_chance():
    filters, rows, pairs = Filters(sample_tokens=0.25, sample_pairs=2), torch.zeros(16), torch.zeros(5)
    for draw in range(2000):
        drawn = drawn_pairs(filters, 5, draw)
        pairs[drawn] += 1
        rows[drawn_rows(filters, drawn, drawn[0], draw, 1, 16, "cpu")] += 1
    assert rows.sum() == 2000 * 4 and pairs.sum() == 2000 * 2
    assert (rows / 2000 - 0.25).abs().max() < 0.05 and (pairs / 2000 - 0.4).abs().max() < 0.05


def test_a_draw_is_a_function_of_the_step_and_differs_between_pairs():
    filters = Filters(sample_tokens=0.25)
    first, again, other = (drawn_rows(filters, [0, 1], k, 7, 2, 64, "cpu").tolist() for k in (0, 0, 1))
    assert first == again != other
    assert [r + 64 for r in first[:16]] == first[16:]  # the same positions in every sequence
    assert drawn_rows(filters, [0], 1, 7, 2, 64, "cpu").tolist() == []
    assert drawn_rows(Filters(sample_tokens=1.0), [0], 0, 7, 2, 64, "cpu") is None


def test_ranks_that_share_rows_read_what_one_rank_would_read_as_often_as_it_would():
    filters, length = Filters(sample_tokens=0.3), 16
    whole = drawn_rows(filters, [0], 0, 7, 2, 4 * length, "cpu").tolist()
    found, times = [], set()
    for index in range(4):
        share = Share(index, 4, torch.empty(0))
        rows = drawn_rows(filters, [0], 0, 7, 2, length, "cpu", share).tolist()
        found += [row // length * 4 * length + index * length + row % length for row in rows]
        times.add(times_of(filters, length, share))
    assert sorted(found) == whole and len(whole) == 2 * 19
    assert times == {times_of(filters, 4 * length)} == {64 / 19}


def test_over_many_steps_the_sub_sample_s_gradient_is_the_whole_one(world):
    whole, part = (build(world, "filters", filters={"steps": 4, **f}) for f in ({}, PART))
    batch = make_batch()
    weights = whole.stage.weights(0)
    losses, grads = run_step(whole, [batch], weights)
    draws = 400
    total, sums = 0.0, {name: torch.zeros_like(g) for name, g in grads.items()}
    for draw in range(draws):
        found, own = run_step(part, [batch], weights._replace(sample_seed=draw))
        total += found[0].total.item() / draws
        for name, g in own.items():
            sums[name] += g / draws
    assert total == pytest.approx(losses[0].total.item(), rel=0.03)
    ours, theirs = (torch.cat([g.flatten() for g in x.values()]) for x in (sums, grads))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.98
    assert (ours.norm() / theirs.norm()).item() == pytest.approx(1, abs=0.05)


def test_accumulation_changes_nothing(world):
    part, batch = build(world, "filters", filters={"steps": 4, **PART}), make_batch()
    _, whole = run_step(part, [batch])
    _, parts = run_step(part, cut(batch))
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)


def test_only_drawn_pairs_are_logged(world):
    stage = build(world, "filters", filters={"steps": 4, **PART}).stage
    named = stage.name_losses([1.0, 0.0, 0.0, 0.0, 2.0, 3.0, 4.0, 5.0], stage.weights(1))
    (pair,) = drawn_pairs(stage.run.filters, 2, stage.weights(1).sample_seed)
    assert named == {
        "loss/total": 1.0,
        f"loss/filter_t/{pair}": [2.0, 3.0][pair],
        f"loss/filter_s/{pair}": [4.0, 5.0][pair],
    }
