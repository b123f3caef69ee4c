"""The default sizes of filters: width by the student's parameters, rows of stage I by the cost of the bodies."""

from types import SimpleNamespace

import pytest
import transformers
from plain import make_world
from tiny import make_model, make_run

from ted_scale.distill import flops
from ted_scale.distill.filter_sizes import LEAST_ROWS, SHARE, TILE, auto_width, filter_parameters, resolved
from ted_scale.distill.stages import stages_of
from ted_scale.models.inspection import inspect
from ted_scale.plan import describe, make_plan

PAIRS = {  # teacher's width and parameters, student's width and parameters, pairs
    "70B to 8B": (8192, 70.6e9, 4096, 8.03e9, 32),
    "8B to 1.5B": (4096, 8.03e9, 1536, 1.54e9, 28),
    "SmolLM2-135M to 10 of its 30 blocks": (576, 134.5e6, 576, 63.7e6, 10),
}


@pytest.mark.parametrize(("teacher", "large", "student", "small", "count"), PAIRS.values(), ids=PAIRS)
def test_filters_are_by_default_a_twentieth_of_the_student_and_of_a_step_at_most(teacher, large, student, small, count):
    width = auto_width(SimpleNamespace(width=student, parameters=small), SimpleNamespace(width=teacher), count)
    shares = [count * w * (2 * teacher + student + 2) / small for w in (width, width + TILE)]
    assert shares[0] <= SHARE < shares[1]
    assert width % TILE == 0 and 128 <= width < teacher
    assert count * width * (6 * student + 2 * teacher) <= SHARE * (6 * small + 2 * large)  # the layer loss


def test_few_pairs_of_a_large_student_keep_the_teacher_s_width():
    assert auto_width(SimpleNamespace(width=512, parameters=1e9), SimpleNamespace(width=1024), 2) == 1024


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Small bodies under large heads."""
    root = make_world(tmp_path_factory.mktemp("world"))
    make_model(root / "teacher", "llama", hidden_size=48, vocab_size=4096)
    make_model(root / "student", "gpt2", num_hidden_layers=2, vocab_size=4096)
    return root


AUTO = {"width": "auto", "sample_tokens": "auto"}


def test_by_default_stage_one_s_heads_cost_no_more_than_both_bodies(world):
    data, train = {"seq_len": 100}, {"tokens_per_step": 100_000, "micro_batch": 10}
    plan = make_plan(make_run(world, filters=AUTO, data=data, train=train), 1)
    share, bodies = plan.run.filters.sample_tokens, flops.bodies_flops(plan, flops.keys_of([100]))
    assert 0.02 < share < 0.9 and (share * 100) % 1 == pytest.approx(0, abs=1e-9)
    assert flops.stage_one_flops(plan, share, 1.0) <= bodies < flops.stage_one_flops(plan, share + 0.01, 1.0)
    one = make_plan(make_run(world, filters={**AUTO, "sample_pairs": 1}, data=data, train=train), 1)
    assert one.run.filters.sample_tokens == pytest.approx(2 * share, abs=0.02)


def test_stage_one_costs_no_more_than_three_fifths_of_stage_two_also_under_the_largest_vocabulary(tmp_path):
    """Gemma-3-270m's shape: on all rows, its 18 pairs would cost eleven times stage II."""
    shape = {
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
    }
    transformers.LlamaConfig(
        vocab_size=262144, num_hidden_layers=18, tie_word_embeddings=True, **shape
    ).save_pretrained(tmp_path)
    anatomy = inspect("student.path", str(tmp_path), needs_weights=False)
    pairs = [(block, block) for block in range(18)]
    for tokens in (1024, 65536):
        data, train = {"seq_len": 256}, {"tokens_per_step": tokens}
        run = resolved(make_run(tmp_path, filters=AUTO, data=data, train=train), anatomy, anatomy, pairs)
        sides = SimpleNamespace(run=run, student=anatomy, teacher=anatomy, pairs=pairs, width=run.filters.width)
        keys = flops.keys_of([256])
        first, second = (flops.step_flops(sides, stage, stage.first_step, keys).model for stage in stages_of(run))
        assert first <= 0.6 * second
    assert flops.bodies_flops(sides, keys) + flops.stage_one_flops(sides, 1.0, 1.0) > 11 * second


def test_a_pair_reads_by_default_at_least_the_minimum_of_rows(world):
    train = {"tokens_per_step": 64, "micro_batch": 1}
    plan = make_plan(make_run(world, filters=AUTO, train=train), 1)
    assert plan.run.filters.sample_tokens * 64 == LEAST_ROWS


def test_numbers_in_the_run_file_are_kept(world):
    plan = make_plan(make_run(world, filters={"width": 20, "sample_tokens": 0.37}), 1)
    assert (plan.width, plan.run.filters.width, plan.run.filters.sample_tokens) == (20, 20, 0.37)
    assert make_plan(make_run(world), 1).width == 48


def test_the_dry_run_shows_the_filters_parameters_and_what_stage_one_reads(world):
    plan = make_plan(make_run(world, filters={"width": 16, "sample_tokens": 0.25}), 1)
    counts, size = filter_parameters(plan), plan.student.parameters
    first, second = sum(counts.values()) / size, counts["student"] / size
    said = describe(plan)
    assert f"trained of the student's size: stage filters {first:.2%}, stage student {second:.2%}\n" in said
    assert "stage filters reads 64 rows a step (0.25 of the tokens) in 2 of 2 pairs\n" in said


def test_no_stage_one_is_a_run_of_one_stage_that_reads_its_own_folder_s_filters(world):
    plan = make_plan(make_run(world, filters={"steps": 0}), 1)
    assert [(stage.name, stage.first_step, stage.steps) for stage in plan.stages] == [("student", 0, 6)]
    assert plan.filters_file == plan.run.folder / "filters.safetensors"
    assert plan.identity()["filters.steps"] == 0
    assert "stage filters" not in describe(plan)
    narrow = make_plan(make_run(world, filters={"steps": 0, "width": 16}), 1)
    assert filter_parameters(narrow)["lifts"] == 0 and "lifts" not in describe(narrow)
    assert "no stage I, because filters.steps is 0: filters.head" in describe(narrow)
