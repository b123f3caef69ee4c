"""The view that is sent to W&B, as the package serializes it, and the mistakes that a user makes."""

import importlib.metadata
import json
import re
import sys

import pytest
import wandb
from tiny import make_run
from wandb_server import serving

from ted_scale.base import shipped
from ted_scale.base.errors import UserError
from ted_scale.commands.wandb_workspace import main, workspace
from ted_scale.config.run_file import to_toml


def sections_of(run, x: str) -> dict[str, list[dict]]:
    pytest.importorskip("wandb_workspaces")
    view = workspace(run, "lab", "view", x)._to_model()
    spec = json.loads(view.model_dump_json(by_alias=True))["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: [panel["config"] for panel in section["panels"]] for section in spec}


@pytest.mark.parametrize("x", ["step", "tokens"])
def test_losses_pairs_and_samples_have_a_section_over_the_axis_that_is_asked_for(tmp_path, x):
    found = sections_of(make_run(tmp_path, wandb={"project": "p"}), x)
    assert list(found)[:2] == ["loss", "layers"] and "samples" in found
    assert {panel["xAxis"] for panel in found["loss"]} == {x}
    (pairs,) = [panel["metricRegex"] for panel in found["layers"] if panel.get("metricRegex")]
    assert re.search(pairs, "loss/layer/3") and not re.search(pairs, "loss/layer")


def test_a_run_without_a_project_and_a_missing_package_are_one_sentence(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / "run.toml").write_text(to_toml(run))
    with pytest.raises(UserError, match=r"wandb\.project must be set"):
        main([str(run.folder)])
    (run.folder / "run.toml").write_text(to_toml(make_run(tmp_path, wandb={"project": "p"})))
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(UserError, match="wandb-workspaces must be installed"):
        main([str(run.folder)])
    monkeypatch.setattr(shipped, "PROJECT", tmp_path / "pyproject.toml")
    asked = ['wandb-workspaces>=0.4; extra == "wandb-workspaces"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: asked)
    with pytest.raises(UserError, match='is not; pip install "wandb-workspaces>='):
        main([str(run.folder)])


KEY = "0123456789" * 4


@pytest.mark.parametrize("key", [KEY, KEY[::-1]], ids=["the key", "a wrong key"])
def test_the_view_is_saved_in_the_project_of_the_run_file(tmp_path, monkeypatch, capsys, key):
    """For the entity of the key, by the stand-in of W&B's API."""
    pytest.importorskip("wandb_workspaces")
    wandb.teardown()  # W&B's process keeps the address of its first run
    run = make_run(tmp_path, wandb={"project": "ted"})
    run.folder.mkdir(parents=True)
    (run.folder / "run.toml").write_text(to_toml(run))
    with serving(KEY) as server:
        monkeypatch.setenv("WANDB_API_KEY", key)
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        if key == KEY:
            main([str(run.folder), "--name", "of losses"])
            assert f"of losses of ted: {server.address}/lab/ted?nw=" in capsys.readouterr().out
        else:
            with pytest.raises(UserError, match=r"W&B must take the view, but does not: .*check WANDB_API_KEY"):
                main([str(run.folder)])
        saved = [(view["entityName"], view["projectName"], view["displayName"]) for view in server.said("UpsertView2")]
        assert saved == ([("lab", "ted", "of losses")] if key == KEY else [])
    wandb.teardown()
