"""What is measured in a step: the gradients that arrive, no other number changed, and nothing at all where it is off."""

import pytest
import torch
from plain import build, cut, make_batch, make_world, run_step

from ted_scale.distill.filters import keeps_filtered
from ted_scale.distill.normalization import count_valid
from ted_scale.distill.signal import Weights
from ted_scale.vitals import vitals
from ted_scale.vitals.vitals import OUTPUT, PARTS, Vitals, drawn, due_at

ON = Weights(ce=0.5, kl=2.0, layer=3.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def step_of(parts, batches, weights=ON, step: int = 0):
    """(losses, gradients, what was measured) of a step in which everything is due."""
    watch = parts.student.vitals
    watch.begin(step)
    losses, gradients = run_step(parts, batches, weights)
    watch.send()
    return losses, gradients, watch.read(step, True, lambda *_: None)


def everything(parts, batches, weights=ON) -> dict[str, float]:
    return step_of(parts, batches, weights)[2]


def gradients_at(parts, batch, weights) -> dict:
    """What arrives, from these terms, at each matched block's output and at the head's input."""
    student, found, hooks = parts.student, {}, []
    blocks = student.network.get_submodule(student.anatomy.blocks)

    def keep(name, tensor):
        tensor.register_hook(lambda gradient: found.__setitem__(name, gradient.flatten(0, -2).clone()))

    for k, block in enumerate(student.blocks):
        output = lambda m, i, o, k=k: keep(k, o[0] if isinstance(o, tuple) else o)  # noqa: E731
        hooks.append(blocks[block].register_forward_hook(output))
    hooks.append(student.head.register_forward_pre_hook(lambda m, i: keep("head", i[0])))
    run_step(parts, [batch], weights)
    for hook in hooks:
        hook.remove()
    return found


def cosine(a, b) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), 0))


def test_the_split_of_a_state_s_gradient_is_that_of_backwards_of_single_terms(world):
    parts, batch = build(world, vitals={"every": 1}), make_batch()
    found = everything(parts, [batch])
    # At the last pair nothing of the other pairs' layer losses arrives.
    own = gradients_at(parts, batch, ON._replace(ce=0.0, kl=0.0))
    rest = gradients_at(parts, batch, ON._replace(layer=0.0))
    valid = batch.weights_BT.flatten() > 0
    a, b = own[1][valid], rest[1][valid]
    assert found["vitals/pull/1"] == pytest.approx(float(a.norm() / b.norm()), rel=1e-3)
    assert found["vitals/pull_cosine/1"] == pytest.approx(cosine(a, b), abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_against_ce_is_that_of_backwards_of_single_terms(world, temperature):
    parts, batch = build(world, vitals={"every": 1}, loss={"temperature": temperature}), make_batch()
    found = everything(parts, [batch])
    kl, ce = (gradients_at(parts, batch, Weights(*w))["head"] for w in ((0.0, 2.0, 0.0), (0.5, 0.0, 0.0)))
    assert found["vitals/kl_to_ce"] == pytest.approx(float(kl.norm() / ce.norm()), rel=1e-3)
    assert found["vitals/kl_ce_cosine"] == pytest.approx(cosine(kl, ce), abs=1e-4)


@pytest.mark.parametrize("method", ["ted", "lwd", "kd"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_the_same_to_the_last_bit(world, method, checkpointing):
    batches, found = cut(make_batch()), []
    for every in (1, 0):
        parts = build(world, method=method, vitals={"every": every})
        if checkpointing:
            parts.student.network.gradient_checkpointing_enable({"use_reentrant": False})
        state = torch.get_rng_state()
        losses, gradients, numbers = step_of(parts, batches, parts.stage.weights(parts.stage.first_step))
        assert bool(numbers) == bool(every) and torch.equal(torch.get_rng_state(), state)
        found.append(([loss.total for loss in losses], gradients))
    (losses, gradients), (others, plain) = found
    assert losses == others and gradients.keys() == plain.keys()
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("method", "stage", "every"), [("ted", "student", 0), ("ted", "filters", 1), ("ce", "student", 1)]
)
def test_where_it_is_off_nothing_is_run(world, monkeypatch, method, stage, every):
    def fails(*_, **__):
        raise AssertionError("it measures")

    for name in ("drawn", "project", "Sample"):
        monkeypatch.setattr(vitals, name, fails)
    parts = build(world, stage, method=method, vitals={"every": every})
    assert not step_of(parts, [make_batch()], parts.stage.weights(parts.stage.first_step))[2]


def test_only_the_first_rank_measures(world, monkeypatch):
    run = build(world).plan.run
    assert Vitals(run, 2, learns_filters=False).items == [*OUTPUT, 0, 1]
    monkeypatch.setattr(vitals.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(vitals.dist, "get_rank", lambda: 1)
    assert Vitals(run, 2, learns_filters=False).items == []


def test_a_step_that_is_validated_or_has_no_teacher_puts_off_what_is_due(world):
    parts, batch = build(world, vitals={"every": 1}), make_batch()
    assert everything(parts, [batch], Weights(1.0, 0.0, 0.0)) == {}
    with torch.no_grad():
        parts.student(batch, parts.teacher(batch, ON), ON, count_valid([batch]))
    assert len(parts.student.vitals.waiting) == PARTS + 2
    assert {"vitals/error/0", "vitals/error/1", "vitals/kl_1"} <= everything(parts, [batch]).keys()


def test_where_the_teacher_s_states_are_kept_filtered_the_numbers_are_the_same(world):
    parts = build(world, vitals={"every": 1}, filters={"steps": 0, "width": 8}, teacher={"placement": "replicated"})
    assert keeps_filtered(parts.plan, parts.stage)
    batch = make_batch()
    whole = everything(parts, [batch])
    parts.teacher.keep_filtered(parts.student.filters_t)
    parts.student.filters_t = None
    assert everything(parts, [batch]) == whole


def test_a_token_that_does_not_count_reaches_no_number(world):
    numbers = []
    for fill in (0.0, float("nan")):
        parts, batch = build(world, vitals={"every": 1}), make_batch()
        signal = parts.teacher(batch, ON)
        ignored = batch.weights_BT.flatten() == 0
        for states in (*signal.layers_NE, signal.last_NE):
            states[ignored] = fill
        watch = parts.student.vitals
        watch.begin(0)
        parts.student(batch, signal, ON, count_valid([batch])).total.backward()
        watch.send()
        numbers.append(watch.read(0, True, lambda *_: None))
    assert len(numbers[0]) == 8 + 2 * 8 and numbers[0] == numbers[1]


def test_a_dropped_step_has_no_numbers_and_is_measured_again(world):
    parts = build(world, vitals={"every": 1000})
    watch = parts.student.vitals
    watch.begin(999)
    run_step(parts, [make_batch()], ON)
    watch.send()
    assert watch.read(999, False, lambda *_: None) == {} and not watch.history
    assert "vitals/error/1" in step_of(parts, [make_batch()], step=1000)[2]


def test_the_output_s_numbers_are_means_over_its_parts_in_the_row_of_the_last(world, monkeypatch):
    """Each part reads all tokens of its step here, and no weight changes."""
    monkeypatch.setattr(vitals, "TOKENS_OF_PART", 64)
    parts, batches = build(world, vitals={"every": PARTS + 2}), [make_batch(seed=seed) for seed in (0, 1)]
    rows = [step_of(parts, [batches[step % 2]], step=step)[2] for step in range(2 * (PARTS + 2))]
    assert [step for step, row in enumerate(rows) if "vitals/kl_1" in row] == [PARTS - 1, 2 * PARTS + 1]
    assert not any(rows[: PARTS - 1])
    one, other = (everything(build(world, vitals={"every": 1}), [batch]) for batch in batches)
    for key in ("agreement", "kl_1", "student_ce", "teacher_ce"):
        key = f"vitals/{key}"
        assert one[key] != other[key]
        assert rows[PARTS - 1][key] == pytest.approx((one[key] + other[key]) / 2, rel=1e-5)
    assert min(one[k := "vitals/kl_to_ce"], other[k]) < rows[PARTS - 1][k] < max(one[k], other[k])


def test_a_start_within_an_interval_waits_for_a_whole_one(world):
    parts, batch = build(world, vitals={"every": PARTS + 2}), make_batch()
    rows = {step: step_of(parts, [batch], step=step)[2] for step in range(5, 2 * (PARTS + 2))}
    assert [step for step, row in rows.items() if "vitals/kl_1" in row] == [2 * PARTS + 1]


@pytest.mark.parametrize("every", [1, 3, 7, 100])
def test_each_is_due_once_in_so_many_steps_and_evenly(every):
    items = [-1, *range(6)]
    found = [due_at(step, every, items) for step in range(2 * every)]
    assert [item for due in found for item in due] == items * 2
    assert max(map(len, found)) == -(-len(items) // every)


def test_drawn_tokens_are_those_that_count_before_others_and_by_the_seed_alone():
    valid = torch.arange(100) % 10 == 3
    rows = drawn(valid, 20, 1)
    assert valid[rows[:10]].all() and not valid[rows[10:]].any() and len(set(rows.tolist())) == 20
    assert torch.equal(drawn(valid, 20, 1), rows) and not torch.equal(drawn(valid, 20, 2), rows)
    assert len(drawn(valid, 512, 1)) == 100
