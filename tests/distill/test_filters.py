"""Initial filters, checks of a filters file, and equal models get no gradient."""

import json

import pytest
import torch
from plain import build, make_batch, make_shard, make_world, run_step
from safetensors.torch import save_file
from tiny import make_model

from ted_scale.base.errors import UserError
from ted_scale.checkpoints.filters_file import check_filters
from ted_scale.distill.filters import Filter
from ted_scale.distill.signal import Weights


def apply(filter: Filter, states):
    return filter(states, lambda h, w, b, *_: h @ w.T + b)


@pytest.mark.parametrize("mlp", [0, 24], ids=["linear", "mlp"])
def test_a_square_filter_starts_as_exactly_the_identity(mlp):
    states = torch.randn(5, 8)
    assert torch.equal(apply(Filter(8, 8, mlp=mlp), states), states)


def test_the_mlp_of_a_filter_learns_although_it_starts_at_0():
    torch.manual_seed(0)
    filter, states, target = Filter(8, 8, mlp=24), torch.randn(64, 8), torch.randn(64, 8)
    optimizer = torch.optim.Adam(filter.parameters(), lr=0.02)
    values = []
    for _ in range(30):
        loss = (apply(filter, states) - target.relu()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.7 * values[0]
    assert filter.up.weight.grad.abs().max() > 0 and filter.down.weight.abs().max() > 0


def test_a_filter_between_widths_keeps_the_size_of_its_states():
    states = torch.randn(256, 64, generator=torch.Generator().manual_seed(99))
    assert apply(Filter(64, 200), states).std().item() == pytest.approx(1.0, abs=0.1)


def test_a_filter_s_initial_weights_follow_its_seed_alone():
    torch.manual_seed(1)
    first = Filter(8, 12, mlp=16, vocab=5, seed=7).state_dict()
    torch.manual_seed(2)
    again, other = (Filter(8, 12, mlp=16, vocab=5, seed=seed).state_dict() for seed in (7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in ("weight", "up.weight", "head_weight"))


IDENTITY = {"pairs": [[0, 1], [1, 3]], "filters.width": 48, "filters.mlp": 0}


def test_a_filters_file_of_the_same_pairs_is_accepted(tmp_path):
    file = tmp_path / "filters.safetensors"
    save_file({"x": torch.ones(1)}, file, metadata={"identity": json.dumps(IDENTITY)})
    check_filters(file, IDENTITY)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pairs": [[0, 1]]}, r"to take filters from .*, pairs must be \[\[0, 1\], \[1, 3\]\], but is \[\[0, 1\]\]; "),
        ({"filters.width": 32}, r"to take filters from .*, filters.width must be 48, but is 32; "),
        ({"filters.mlp": 8}, r"to take filters from .*, filters.mlp must be 0, but is 8; "),
    ],
    ids=["pairs", "width", "mlp"],
)
def test_a_filters_file_of_another_shape_is_refused(tmp_path, change, said):
    file = tmp_path / "filters.safetensors"
    save_file({"x": torch.ones(1)}, file, metadata={"identity": json.dumps(IDENTITY)})
    with pytest.raises(UserError, match=said):
        check_filters(file, {**IDENTITY, **change})


def test_a_file_that_holds_no_filters_is_refused(tmp_path):
    file = tmp_path / "filters.safetensors"
    with pytest.raises(
        UserError, match=r"filters.from must name a run folder whose stage I is done, but .* does not exist"
    ):
        check_filters(file, IDENTITY)
    save_file({"x": torch.ones(1)}, file)
    with pytest.raises(UserError, match=r"filters.from must name filters that this project wrote, but .* is not"):
        check_filters(file, IDENTITY)
    file.write_bytes(b"not a safetensors file")
    with pytest.raises(
        UserError, match=r"filters.safetensors must be a whole safetensors file, but is not: .*; copy it"
    ):
        check_filters(file, IDENTITY)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A teacher and a student that are the same model."""
    root = tmp_path_factory.mktemp("twins")
    for side in ("teacher", "student"):
        make_model(root / side, "llama", seed=4)
    make_shard(root / "corpus")
    return root


@pytest.mark.parametrize("kind", ["nmse", "mse", "cosine"])
@pytest.mark.parametrize("mlp", [0, 16], ids=["linear", "mlp"])
def test_a_student_that_is_its_teacher_has_no_distance_and_no_gradient(twins, kind, mlp):
    parts = build(twins, loss={"kind": kind}, filters={"mlp": mlp})
    parts.student.filters_s.load_state_dict(parts.student.filters_t.state_dict())
    losses, gradients = run_step(parts, [make_batch(documents=True)], Weights(ce=0.0, kl=1.0, layer=1.0))
    bound = 1e-6 if kind == "cosine" else 0.0
    assert losses[0].kl == 0
    assert losses[0].layers.abs().max() <= bound
    assert len(gradients) > 20
    assert max(g.abs().max().item() for g in gradients.values()) <= 10 * bound


def test_a_student_that_differs_has_a_distance_and_a_gradient(tmp_path):
    losses, gradients = run_step(build(make_world(tmp_path)), [make_batch()], Weights(ce=0.0, kl=1.0, layer=1.0))
    assert losses[0].kl > 0.1 and losses[0].layers.min() > 0.1
    assert max(g.abs().max().item() for g in gradients.values()) > 0.01
