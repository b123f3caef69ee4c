"""Which checkpoints and filters a run may go on from, told from files alone, before anything starts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from plain import make_world
from safetensors.torch import save_file
from tiny import make_model, make_run

from ted_scale import checkpoint_files as files
from ted_scale import sealed
from ted_scale.checkpoint_files import Progress
from ted_scale.errors import UserError
from ted_scale.plan import make_plan


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(original, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(original, tmp_path / "world")


def tree(root: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in root.rglob("*")}


def refusal(root: Path, ranks: int = 1, **sections) -> str:
    """The sentence that make_plan refuses a run with, having written nothing."""
    run, before = make_run(root, **sections), tree(root)
    with pytest.raises(UserError) as caught:
        make_plan(run, ranks)
    assert tree(root) == before
    said = str(caught.value)
    assert "\n" not in said
    return said.replace(str(root), "ROOT")


def leave_checkpoint(run, identity: dict, step: int = 4) -> Path:
    part = files.checkpoints_of(run.folder) / (files.checkpoint_name(step) + files.PART)
    part.mkdir(parents=True)
    progress = files.progress_as_bytes(Progress(step, step * 256, wandb_id="wandb-id", identity=identity))
    sealed.seal(part, {files.PROGRESS: sealed.write_file(part / files.PROGRESS, [progress])}, {"step": step})
    return sealed.publish(part)


def test_the_run_s_own_checkpoint_is_accepted(world):
    run = make_run(world)
    checkpoint = leave_checkpoint(run, make_plan(run, 1).identity())
    assert make_plan(run, 1)
    assert files.newest_checkpoint(run.folder) == checkpoint
    assert files.read_progress(checkpoint).wandb_id == "wandb-id"


def test_what_may_change_over_a_resume_is_accepted(world):
    run = make_run(world)
    leave_checkpoint(run, make_plan(run, 1).identity())
    assert make_plan(make_run(world, train={"steps": 9, "lr": 1e-4}, log_every=5, checkpoint={"every": 7}), 1)


CHANGES = {
    "seed": ({"seed": 1}, "seed must be 0"),
    "method": ({"method": "kd"}, "method must be 'ted'"),
    "precision": ({"train": {"precision": "bf16"}}, "train.precision must be 'fp32'"),
    "pairs": ({"pairs": {"explicit": [[0, 1], [1, 2]]}}, "pairs must be [[0, 1], [1, 3]]"),
    "mlp": ({"filters": {"mlp": 4}}, "filters.mlp must be 0"),
    "filter steps": ({"filters": {"steps": 5}}, "filters.steps must be 4"),
}  # fmt: skip


@pytest.mark.parametrize("sections", [{"data": {"seq_len": 16}}, {"train": {"tokens_per_step": 512}}], ids=str)
def test_a_checkpoint_goes_on_with_another_seq_len_or_step_size(world, sections):
    leave_checkpoint(make_run(world), make_plan(make_run(world), 1).identity())
    assert make_plan(make_run(world, **sections), 1)


@pytest.mark.parametrize(("sections", "said"), CHANGES.values(), ids=CHANGES)
def test_a_checkpoint_of_another_run_is_refused(world, sections, said):
    run = make_run(world)
    leave_checkpoint(run, make_plan(run, 1).identity())
    assert refusal(world, **sections).startswith(
        f"{said} to resume from ROOT/runs/tiny/checkpoints/step_00000004, but is "
    )


def test_a_checkpoint_of_other_shapes_is_refused_and_one_of_other_ranks_is_not(world):
    run = make_run(world)
    leave_checkpoint(run, make_plan(run, 1).identity())
    assert make_plan(run, 2)
    make_model(world / "student", "gpt2", num_hidden_layers=2, hidden_size=64)
    assert refusal(world).startswith("student.width must be 32 to resume")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(world):
    run = make_run(world)
    checkpoint = leave_checkpoint(run, make_plan(run, 1).identity())
    (checkpoint / "progress.json").write_text("{")
    assert refusal(world).startswith(
        "ROOT/runs/tiny/checkpoints must hold a whole checkpoint, but none of 1 is (step_00000004: progress.json has 1 bytes"
    )


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(world):
    run = make_run(world)
    identity = make_plan(run, 1).identity()
    first, second = leave_checkpoint(run, identity, 4), leave_checkpoint(run, identity, 5)
    assert files.newest_checkpoint(run.folder) == second
    (second / "manifest.json").unlink()
    assert files.newest_checkpoint(run.folder) == first
    assert make_plan(run, 1)


def test_a_checkpoint_that_was_not_published_does_not_count(world):
    run = make_run(world)
    checkpoint = leave_checkpoint(run, {"seed": 99})
    checkpoint.rename(checkpoint.with_name(checkpoint.name + sealed.PART))
    assert files.newest_checkpoint(run.folder) is None
    assert make_plan(run, 1)


def test_filters_of_another_shape_are_refused(world):
    (world / "other").mkdir()
    identity = {**make_plan(make_run(world), 1).filters_identity(), "filters.width": 32}
    save_file(
        {"x": torch.ones(1)}, world / "other" / "filters.safetensors", metadata={"identity": json.dumps(identity)}
    )
    said = refusal(world, filters={"from": str(world / "other")})
    assert said.startswith("filters.width must be 32 to resume from ROOT/other/filters.safetensors, but is 48")
