"""An export as an artifact, read back from W&B's own file."""

import pytest
from tiny import make_run
from wandb_file import finished

from ted_scale.base.errors import UserError
from ted_scale.checkpoints import holder
from ted_scale.checkpoints.progress import Progress
from ted_scale.metrics.wandb_export import add, check


def test_an_export_is_an_artifact_of_the_run_s_own_wandb_run(tmp_path):
    run = make_run(tmp_path, wandb={"project": "p", "mode": "offline"})
    folder = tmp_path / "moved" / "tiny"  # and not run.folder
    export = folder / "export"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    assert "`wandb sync" in add(run, Progress(step=6, tokens=1536, wandb_id="our-id"), folder, export)
    (file,) = (folder / "wandb").glob("offline-run-*-our-id/*.wandb")
    records = finished(file)
    kept = [r.request.log_artifact.artifact for r in records if r.WhichOneof("record_type") == "request"]
    kept += [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    found = {artifact.name: artifact for artifact in kept if artifact.type == "model"}
    assert [entry.path for entry in found["tiny-export"].manifest.contents] == ["config.json"]
    assert "step-6" in found["tiny-export"].aliases and '"tokens":1536' in found["tiny-export"].metadata.replace(
        " ", ""
    )


def test_a_run_without_a_wandb_run_is_refused_before_the_export(tmp_path):
    with pytest.raises(UserError, match="must have a run that W&B knows"):
        check(make_run(tmp_path, wandb={"project": "p"}), Progress(), tmp_path)
    with pytest.raises(UserError, match="must have a run that W&B knows"):
        check(make_run(tmp_path), Progress(wandb_id="our-id"), tmp_path)


def test_a_run_that_still_trains_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(holder, "RENEWAL_S", 0.2)
    run, progress = make_run(tmp_path, wandb={"project": "p"}), Progress(wandb_id="our-id")
    holder.take(tmp_path)
    try:
        with pytest.raises(UserError, match="must have a run that no process uses"):
            check(run, progress, tmp_path)
    finally:
        holder.leave(tmp_path)
    check(run, progress, tmp_path)
