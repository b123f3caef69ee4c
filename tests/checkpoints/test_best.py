"""The best checkpoint: the one that stays, that the tools show, and that an export takes."""

from types import SimpleNamespace

import pytest

from ted_scale import run
from ted_scale.base import durable, sealed
from ted_scale.base.errors import UserError
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.progress import Progress
from ted_scale.commands import checkpoints, export_hf
from ted_scale.config.operation import Checkpoint
from ted_scale.config.run_file import load_run
from ted_scale.distill.stages import Stage

ACCURACY = "val/suite/boolq/acc"


def leave(run, step, of=None, forks=()):
    part = files.checkpoints_of(run) / (files.checkpoint_name(step, len(forks)) + durable.PART)
    part.mkdir(parents=True)
    entries = {"progress.json": durable.write_file(part / "progress.json", [b"{}"])}
    sealed.seal(part, entries, {"step": step, "forks": list(forks)} | ({"scores": of} if of else {}))
    return durable.publish(part)


def best(run, settings):
    name = files.best_of({c.path.name: c.manifest for c in files.published(run) if c.fault is None}, settings)
    return name and files.key_of(name)[1]


def test_the_best_by_its_own_direction_stays_and_of_equals_the_first(tmp_path):
    for step, accuracy in ((2, 0.5), (4, 0.75), (6, 0.75), (8, 0.6)):
        leave(tmp_path, step, {ACCURACY: accuracy})
    leave(tmp_path, 9)  # a stop: nothing was measured
    highest, lowest = (Checkpoint(keep=1, best=ACCURACY, best_is=best_is) for best_is in (None, "lowest"))
    assert (best(tmp_path, highest), best(tmp_path, lowest)) == (4, 2)
    assert best(tmp_path, Checkpoint(best="val/ppl")) is None  # values of another number do not count
    files.prune(tmp_path, highest)
    assert [path.name[-1] for path in files.listed(tmp_path)] == ["9", "4"]


def test_the_best_so_far_stays_until_a_better_one_is_whole(tmp_path):
    settings = Checkpoint(keep=1, best=ACCURACY)
    leave(tmp_path, 2, {ACCURACY: 0.5})
    damaged = leave(tmp_path, 4, {ACCURACY: 0.9})
    (damaged / "progress.json").unlink()
    leave(tmp_path, 6, {ACCURACY: 0.4})
    files.prune(tmp_path, settings)
    assert best(tmp_path, settings) == 2


@pytest.mark.parametrize("scores", [None, 0.5, [0.5], {ACCURACY: None}, {ACCURACY: "0.5"}], ids=str)
def test_scores_that_are_not_numbers_by_name_are_damage(scores):
    manifest = {"step": 2, "forks": [], "scores": {ACCURACY: 0.5}}
    assert files.checked(manifest, "step_00000002") is manifest
    with pytest.raises(sealed.Damaged, match="is not of step_00000002"):
        files.checked(manifest | {"scores": scores}, "step_00000002")


def test_a_value_of_a_step_that_was_undone_is_forgotten(tmp_path):
    settings = Checkpoint(best=ACCURACY)
    for step, accuracy in ((2, 0.5), (4, 0.6), (6, 0.9)):
        leave(tmp_path, step, {ACCURACY: accuracy})
    leave(tmp_path, 5, {ACCURACY: 0.55}, forks=(4,))
    assert best(tmp_path, settings) == 4


@pytest.mark.parametrize(("known", "saves"), [({}, 1), ({ACCURACY: 0.5}, 0)], ids=["lacks", "has"])
def test_a_resume_saves_its_step_again_only_where_the_checkpoint_lacks_the_number(tmp_path, monkeypatch, known, saves):
    """What else a signal cut short, as the rest of a suite, is measured without a save: that would first remove a good copy."""
    (tmp_path / "run.toml").write_text(RUN_FILE)
    settings, saved = load_run(tmp_path / "run.toml"), []
    saver = SimpleNamespace(copier=SimpleNamespace(finish=lambda: None))
    parts = run.Parts(SimpleNamespace(run=settings), None, None, None, saver)
    monkeypatch.setattr(run, "validation_is_missing", lambda *_: True)
    monkeypatch.setattr(run, "save_checkpoint", lambda *arguments: saved.append(arguments[-1].step))
    found = Progress(2, scores={ACCURACY: 0.5})
    monkeypatch.setattr(run.validation, "validate", lambda *_, **named: (found, False))
    stage, stream = Stage("student", 0, 4, settings), SimpleNamespace(held_out={})
    assert run.validate_first(parts, stage, None, stream, Progress(2, scores=known), tmp_path) is found
    assert saved == [2] * saves


def test_the_tools_find_it(tmp_path, capsys):
    run = tmp_path / "run"
    for step, accuracy in ((2, 0.75), (4, 0.5)):
        leave(run, step, {ACCURACY: accuracy})
    (run / "run.toml").write_text(RUN_FILE)
    checkpoints.main([str(run), "list"])
    assert [("best" in line, "acc 0." in line) for line in capsys.readouterr().out.splitlines()] == [
        (False, True),
        (True, True),
    ]
    assert export_hf.find_checkpoint(run)[0].name == "step_00000004"
    assert export_hf.find_checkpoint(run, "best")[0].name == "step_00000002"
    (run / "run.toml").write_text(RUN_FILE.partition("[checkpoint]")[0])
    with pytest.raises(
        UserError, match=r"checkpoint\.best must be set for --checkpoint best, but is not in .*run\.toml"
    ):
        export_hf.find_checkpoint(run, "best")


RUN_FILE = f"""
name = "run"
method = "ce"
student.path = "student"
data = {{ seq_len = 8, corpora = [{{ path = "corpus", validation = 0.1 }}] }}
train = {{ steps = 4, tokens_per_step = 8, micro_batch = 1, lr = 1e-3 }}
validation = {{ every = 2, suite = "boolq" }}
[checkpoint]
every = 2
best = "{ACCURACY}"
"""


def test_the_tools_name_a_checkpoint_that_was_renamed(tmp_path, capsys):
    """It is not the newest one any more, so an export takes another step: that was not said."""
    run = tmp_path / "run"
    for step in (2, 4):
        leave(run, step)
    (run / "run.toml").write_text(RUN_FILE)
    (run / "checkpoints" / "step_00000004").rename(run / "checkpoints" / "mine")
    line = "mine is not used, because its name is not step_00000004"
    assert export_hf.find_checkpoint(run)[0].name == "step_00000002" and line in capsys.readouterr().err
    checkpoints.main([str(run), "list"])
    assert line in capsys.readouterr().out
    with pytest.raises(sealed.Damaged, match="its folder is named mine, which is no checkpoint's name: rename it back"):
        files.checked({"step": 4, "forks": []}, "mine")
