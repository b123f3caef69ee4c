"""Which checkpoints and filters a run may go on from, told from files alone, before anything starts."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from plain import make_shard, make_world
from safetensors.torch import save_file
from tiny import make_model, make_run, run_values, write_run

from ted_scale.base import durable, sealed
from ted_scale.base.errors import UserError
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.progress import PROGRESS, Progress, progress_as_bytes, read_progress
from ted_scale.config import changes
from ted_scale.config.run import Run
from ted_scale.config.run_file import load_run
from ted_scale.distill.stages import stages_of
from ted_scale.feed import open_feed
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


def blend_of(run) -> dict:
    """Where the data of a run stand in its checkpoints."""
    return open_feed(run, stages_of(run)[0], Progress(), 128)[1].blend


def leave_checkpoint(run, identity: dict, step: int = 4, written: dict | None = None) -> Path:
    part = files.checkpoints_of(run.folder) / (files.checkpoint_name(step) + files.PART)
    part.mkdir(parents=True)
    at = Progress(step, step * 256, blend=blend_of(run), wandb_id="wandb-id", identity=identity, run=written)
    entry = durable.write_file(part / PROGRESS, [progress_as_bytes(at)])
    sealed.seal(part, {PROGRESS: entry}, {"step": step, "forks": []})
    return durable.publish(part)


def test_the_run_s_own_checkpoint_is_accepted(world):
    run = make_run(world)
    checkpoint = leave_checkpoint(run, make_plan(run, 1).identity())
    assert make_plan(run, 1)
    assert files.newest_checkpoint(run.folder) == checkpoint
    assert read_progress(checkpoint).wandb_id == "wandb-id"


def test_a_run_of_epochs_keeps_the_steps_of_its_start_until_its_epochs_change(world):
    def plan_of(epochs):
        values = run_values(world)
        del values["train"]["steps"]
        return make_plan(Run.model_validate(values | {"train": {**values["train"], "epochs": epochs}}), 1)

    first = plan_of(3)
    leave_checkpoint(first.run, first.identity(), written=changes.as_written(first.run))
    make_shard(world / "corpus", documents=40)
    again, other = plan_of(3), plan_of(4)
    assert again.run.train.steps == first.run.train.steps < plan_of(3.5).run.train.steps < other.run.train.steps
    assert "the run keeps the" in again.resumes[-1] and "the run keeps the" not in other.resumes[-1]


def test_a_change_that_does_not_decide_the_result_is_accepted(world):
    run = make_run(world)
    leave_checkpoint(run, make_plan(run, 1).identity())
    assert make_plan(make_run(world, train={"steps": 9, "lr": 1e-4}, log_every=5, checkpoint={"every": 7}), 1)


CHANGES = {  # what differs: what is said of it; can it be allowed?
    "seed": ({"seed": 1}, "seed must be 0, but is 1", True),
    "method": ({"method": "kd"}, "method must be 'ted', but is 'kd'", False),
    "precision": ({"train": {"precision": "bf16"}}, "train.precision must be 'fp32', but is 'bf16'", True),
    "betas": ({"train": {"betas": [0.5, 0.6]}}, "train.betas must be [0.9, 0.95], but is [0.5, 0.6]", True),
    "eps": ({"train": {"eps": 1e-6}}, "train.eps must be 1e-08, but is 1e-06", True),
    "decay": ({"train": {"weight_decay": 0.0}}, "train.weight_decay must be 0.1, but is 0.0", True),
    "loss weight": ({"loss": {"layer": {"start": 1.0, "off_after": 0.5}}},
                    "loss.layer must be 1.0, but is {start = 1.0, shape = 'constant', off_after = 0.5}", True),
    "loss kind": ({"loss": {"kind": "mse"}}, "loss.kind must be 'nmse', but is 'mse'", True),
    "divergence": ({"loss": {"divergence": "jsd"}}, "loss.divergence must be 'forward', but is 'jsd'", True),
    "skipped tokens": (
        {"loss": {"skip_low_entropy": 0.15}}, "loss.skip_low_entropy must be 0.0, but is 0.15", True,
    ),
    "top k": ({"loss": {"top_k": 64}}, "loss.top_k must be 0, but is 64", True),
    "other pairs": ({"pairs": {"explicit": [[0, 1], [1, 2]]}}, "pairs must be [[0, 1], [1, 3]], but is [[0, 1], [1, 2]]", True),
    "fewer pairs": ({"pairs": {"skip_last": 1}}, "pairs must be [[0, 1], [1, 3]], but is [[0, 1]]", False),
    "mlp": ({"filters": {"mlp": 4}}, "filters.mlp must be 0, but is 4", False),
    "head": ({"filters": {"head": "per_layer"}}, "filters.head must be 'shared', but is 'per_layer'", False),
    "longer stage I": ({"filters": {"steps": 5}}, "filters.steps must be 4, but is 5", True),
    "shorter stage I": ({"filters": {"steps": 2}}, "filters.steps must be 4, but is 2", False),
}  # fmt: skip


@pytest.mark.parametrize("sections", [{"data": {"seq_len": 16}}, {"train": {"tokens_per_step": 512}}], ids=str)
def test_a_checkpoint_goes_on_with_another_seq_len_or_step_size(world, sections):
    leave_checkpoint(make_run(world), make_plan(make_run(world), 1).identity())
    assert make_plan(make_run(world, **sections), 1)


@pytest.mark.parametrize(("sections", "said", "allowed"), CHANGES.values(), ids=CHANGES)
def test_a_changed_key_that_decides_the_result_must_be_allowed_by_name(world, sections, said, allowed):
    run, key = make_run(world), said.partition(" ")[0]
    leave_checkpoint(run, make_plan(run, 1).identity(), step=3 if key == "filters.head" else 4)
    refused = refusal(world, **sections)
    step = "3" if key == "filters.head" else "4"
    assert refused.startswith(
        f"to resume from ROOT/runs/tiny/checkpoints/step_0000000{step}, {said}; set back what changed"
    )
    line = f"""by --set 'resume.allow=["{key}"]', in the run file the line allow = ["{key}"] below [resume]"""
    assert (line in refused) == allowed
    assert ("cannot be allowed" in refused) == (not allowed)
    sections = {**sections, "resume": {"allow": [key]}}
    if allowed:
        assert make_plan(make_run(world, **sections), 1)
    else:
        assert f"{key} cannot be allowed, because the tensors of the checkpoint would not fit" in refusal(
            world, **sections
        )


def test_one_sentence_has_every_difference_that_is_not_allowed(world):
    leave_checkpoint(make_run(world), make_plan(make_run(world), 1).identity())
    other = {"seed": 1, "train": {"eps": 1e-6, "steps": 9}, "filters": {"mlp": 4}}
    assert refusal(world, **other) == (
        "to resume from ROOT/runs/tiny/checkpoints/step_00000004, seed must be 0, but is 1, and train.eps must be 1e-08, but is "
        "1e-06, and filters.mlp must be 0, but is 4; set back what changed, or give the run another name, or accept it by "
        """--set 'resume.allow=["seed", "train.eps"]', in the run file the line allow = ["seed", "train.eps"] below [resume]; """
        "filters.mlp cannot be allowed, because the tensors of the checkpoint would not fit"
    )
    other["filters"] = {}
    said = refusal(world, **other, resume={"allow": ["seed"]})
    assert "seed must" not in said and said.endswith('allow = ["seed", "train.eps"] below [resume]')
    assert make_plan(make_run(world, **other, resume={"allow": ["train.eps", "seed"]}), 1)


def test_a_checkpoint_of_other_shapes_is_refused_and_one_of_other_ranks_is_not(world):
    run = make_run(world)
    leave_checkpoint(run, make_plan(run, 1).identity())
    assert make_plan(run, 2)
    make_model(world / "student", "gpt2", num_hidden_layers=2, hidden_size=64)
    said = refusal(world)
    assert "student.width must be 32, but is 64, and student.parameters must be " in said
    assert "student.width and student.parameters cannot be allowed" in said and "resume.allow" not in said


def test_adapters_take_no_other_base_alpha_or_rank_and_the_reasons_are_true():
    theirs = {"student.base": "a", "student.lora.alpha": 1.0, "student.lora.rank": 4}
    ours = {"student.base": "b", "student.lora.alpha": 2.0, "student.lora.rank": 8}
    with pytest.raises(UserError) as refused:
        changes.refuse_another_run("step 4", theirs, ours, [*theirs], 4)
    assert str(refused.value).endswith(
        "; student.lora.rank cannot be allowed, because the tensors of the checkpoint would not fit; student.base and "
        "student.lora.alpha cannot be allowed, because the adapters of the checkpoint were trained with what it was"
    )


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (
            {},
            {"student.lora.rank": 4},
            "student.lora must be left out, for that checkpoint is of a whole student, but is set;",
        ),
        (
            {"student.lora.rank": 4},
            {"student.lora.rank": 0},
            "student.lora must be set, for that checkpoint is of adapters alone, but is left out;",
        ),
    ],
)
def test_adapters_and_a_whole_student_are_no_ranks_of_one_another(theirs, ours, said):
    with pytest.raises(UserError) as refused:
        changes.refuse_another_run("step 4", theirs, ours, [], 4)
    assert str(refused.value).startswith(f"to resume from step 4, {said}")


def test_every_key_of_an_identity_can_be_allowed_by_name(world):
    for sections in ({}, {"method": "kd"}, {"method": "ce"}, {"method": "lwd"}):
        assert make_plan(make_run(world, **sections), 1).identity().keys() <= set(changes.DECISIVE)


def test_a_checkpoint_of_an_earlier_version_knows_fewer_keys_and_resumes(world):
    run = make_run(world)
    checkpoint = leave_checkpoint(run, {"method": "ted", "seed": 0, "data.seq_len": 16})
    values = json.loads((checkpoint / PROGRESS).read_text())
    del values["run"]
    entry = durable.write_file(checkpoint / PROGRESS, [json.dumps(values).encode()])
    sealed.seal(checkpoint, {PROGRESS: entry}, {"step": 4, "forks": []})
    assert make_plan(run, 1)
    assert "seed must be 0, but is 1" in refusal(world, seed=1)


def test_changes_are_reported_key_by_key(world):
    before = make_run(world, wandb={"project": "p"}, data={"corpora": [{"path": "a"}, {"path": "b", "weight": 2.0}]})
    after = make_run(
        world, log_every=5, seed=1, train={"steps": 9}, loss={"kl": {"start": 1.0, "end": 0.0, "shape": "linear"}},
        data={"corpora": [{"path": "x/b", "weight": 3.0}]},
    )  # fmt: skip
    written, ours = (json.loads(json.dumps(changes.as_written(run))) for run in (before, after))
    assert changes.changes({"seed": 0}, {"seed": 1}, written, ours, 7) == [
        f"{change} from step 7 on"
        for change in (
            "seed is 1 instead of 0",
            "data.corpora.a.path is not set instead of 'a'",
            "data.corpora.a.name is not set instead of 'a'",
            "data.corpora.a.weight is not set instead of 1.0",
            "data.corpora.a.repeat is not set instead of true",
            "data.corpora.a.validation is not set instead of 0.0",
            "data.corpora.b.path is 'x/b' instead of 'b'",
            "data.corpora.b.weight is 3.0 instead of 2.0",
            "loss.kl is not set instead of 1.0",
            "train.steps is 9 instead of 6",
            "log_every is 5 instead of 1",
            "wandb.project is not set instead of 'p'",
            "wandb.mode is not set instead of 'auto'",
            "wandb.tags is not set instead of []",
            "loss.kl.start is 1.0 instead of not set",
            "loss.kl.end is 0.0 instead of not set",
            "loss.kl.shape is 'linear' instead of not set",
        )
    ]
    assert changes.changes({"seed": 0}, {"seed": 0}, ours, ours, 7) == []
    earlier = {**ours, "data": {**ours["data"], "workers": 2}}  # a key of earlier versions
    assert changes.changes({"seed": 0}, {"seed": 0}, earlier, ours, 7) == []
    assert changes.changes({"seed": 0}, {"seed": 1}, None, ours, 7) == ["seed is 1 instead of 0 from step 7 on"]


def test_a_checkpoint_from_before_teachers_had_a_precision_had_one_of_16_bits():
    with pytest.raises(UserError, match=r"teacher.precision must be '16 bits or more', but is 'fp8'.*resume.allow"):
        changes.refuse_another_run("there", {"seed": 0}, {"seed": 0, "teacher.precision": "fp8"}, [], 7)
    changes.refuse_another_run("there", {"seed": 0}, {"seed": 0, "teacher.precision": "16 bits or more"}, [], 7)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(world):
    run = make_run(world)
    checkpoint = leave_checkpoint(run, make_plan(run, 1).identity())
    (checkpoint / "progress.json").write_text("{")
    assert refusal(world).startswith(
        "ROOT/runs/tiny/checkpoints must hold a whole checkpoint, but none of 1 is (step_00000004: progress.json has 1 bytes"
    )


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(world):
    run = make_run(world)
    identity = make_plan(run, 1).identity()
    first, second = leave_checkpoint(run, identity, 4), leave_checkpoint(run, identity, 5)
    assert files.newest_checkpoint(run.folder) == second
    (second / "manifest.json").unlink()
    assert files.newest_checkpoint(run.folder) == first
    assert make_plan(run, 1)


def test_an_unpublished_checkpoint_does_not_count(world):
    run = make_run(world)
    checkpoint = leave_checkpoint(run, {"seed": 99})
    checkpoint.rename(checkpoint.with_name(checkpoint.name + durable.PART))
    assert files.newest_checkpoint(run.folder) is None
    assert make_plan(run, 1)


def test_filters_of_another_shape_are_refused(world):
    (world / "other").mkdir()
    identity = {**make_plan(make_run(world), 1).filters_identity(), "filters.width": 32}
    save_file(
        {"x": torch.ones(1)}, world / "other" / "filters.safetensors", metadata={"identity": json.dumps(identity)}
    )
    said = refusal(world, filters={"from": str(world / "other")})
    assert said == (
        "to take filters from ROOT/other/filters.safetensors, filters.width must be 32, but is 48; set back what differs, or "
        "leave filters.from out"
    )


def test_a_damaged_name_in_the_run_file_of_a_checkpoint_is_a_change_like_any_other():
    written = {"data": {"corpora": [{"name": ["web"], "weight": 1.0}]}}
    ours = {"data": {"corpora": [{"name": "web", "weight": 1.0}]}}
    sentences = changes.changes({}, {}, written, ours, 4)
    assert "data.corpora.web.weight is 1.0 instead of not set from step 4 on" in sentences


def test_the_line_that_a_refusal_gives_is_accepted_on_the_command_line_and_in_the_run_file(world):
    run = make_run(world)
    leave_checkpoint(run, make_plan(run, 1).identity())
    said = refusal(world, seed=1)
    word, line = re.search(r"--set '(.+?)', in the run file the line (.+?) below \[resume\]", said).groups()
    file = write_run(world / "run.toml", make_run(world, seed=1))
    assert make_plan(load_run(file, [word]), 1)
    before = re.sub(r"(?ms)^\[resume\].*?(?=^\[)", "", file.read_text(encoding="utf-8"))
    file.write_text(f"{before}\n[resume]\n{line}\n", encoding="utf-8")
    assert make_plan(load_run(file), 1)
