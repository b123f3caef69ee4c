"""W&B online, against a local stand-in of its API: two starts of a run on different numbers of ranks are one W&B run, and an
API that has become slow holds up no step."""

import contextlib
import json
import time

import pytest
import wandb
from test_metrics import losses, metrics, rows_of, take_steps
from tiny import make_run
from wandb_server import serving

from ted_scale.checkpoints.life import Lost
from ted_scale.metrics import samples, wandb_connection
from ted_scale.metrics.rows import SAMPLES
from ted_scale.metrics.time_left import Ahead
from ted_scale.metrics.wandb_connection import add_facts, facts_of, open_wandb
from ted_scale.metrics.wandb_tables import HEAT_MAP, add_samples

KEY = "0123456789" * 4
WORLDS = (2, 4)


@contextlib.contextmanager
def stand_in(slow_s: float = 0.0):
    """W&B's process keeps the settings of its first run, so each stand-in gets a new one."""
    wandb.teardown()
    with pytest.MonkeyPatch.context() as patch, serving(KEY, slow_s) as server:
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("WANDB_BASE_URL", server.address)
        yield server
        wandb.teardown()


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    """(run, the ids of its starts, what the stand-in was told)"""
    run, ids = (
        make_run(tmp_path_factory.mktemp("online"), method="ted", filters={"steps": 2}, wandb={"project": "ted"}),
        [],
    )
    with stand_in() as server:
        for start, world in enumerate(WORLDS):
            wandb_run = open_wandb(run, ids[0] if ids else None)
            wandb_run.tell(lambda opened, world=world: add_facts(facts(world), opened))
            ids.append(wandb_run.id)
            one_start(run, 4 * start, wandb_run)
    return run, ids, server


def facts(world: int) -> dict:
    return facts_of({"world": world, "ds_config": {"zero_optimization": {"stage": 3}}, "width": 8})


def one_start(run, step: int, wandb_run) -> None:
    numbers = metrics(run, step=step, wandb_run=wandb_run)
    numbers.expect(lambda: Ahead("student", 2, 8, {}, 0.0, {}))
    if step:
        numbers.restarted(Lost(1, 30.0, 60.0, "it was killed"))
    take_steps(numbers, step + 1, step + 4)
    numbers.write(step + 4, 256 * (step + 4), {"loss/layer/0": 1.5, "loss/layer/10": 0.25, "loss/layer/2": 0.5})
    path = run.folder / SAMPLES
    samples.keep(path, [{"step": step + 4, "prompt": "Größe", "student": f"text {step}"}])
    numbers.call_wandb(lambda opened: add_samples(path, step + 4, opened))
    numbers.close()


def upserts(server) -> list[dict]:
    return server.said("UpsertBucket")


def test_starts_on_different_numbers_of_ranks_are_one_run_of_wandb(online):
    _, ids, server = online
    assert ids[0] == ids[1] and server.runs == {ids[0]}
    worlds = [json.loads(told["config"])["world"]["value"] for told in upserts(server) if '"world"' in told["config"]]
    assert list(dict.fromkeys(worlds)) == [2, 4]


def test_its_group_is_the_run_and_its_job_type_the_stages(online):
    run, _, server = online
    told = {(t["groupName"], t["jobType"]) for t in upserts(server) if t["groupName"]}
    assert told == {(run.name, "filters+student")}


def test_its_config_has_the_packages_the_commit_the_plan_and_the_ds_config(online):
    config = {key: kept["value"] for key, kept in json.loads(upserts(online[2])[-1]["config"]).items() if key[0] != "_"}
    assert (
        config["versions"]["wandb"] == wandb.__version__
        and {"torch", "deepspeed", "python"} <= config["versions"].keys()
    )
    assert config["plan"]["width"] == 8 and config["ds_config"] == {"zero_optimization": {"stage": 3}}
    assert config["git_commit"] == wandb_connection.git_facts().get("git_commit")


def test_every_row_of_the_file_comes_with_its_step_and_tokens(online):
    run, _, server = online
    told = [row for row in server.rows() if "perf/step_ms" in row]
    rows = [row for row in rows_of(run) if "perf/step_ms" in row]
    assert [(r["step"], r["tokens"], r["loss/total"]) for r in told] == [
        (r["step"], r["tokens"], r["loss/total"]) for r in rows
    ]
    assert len(told) == 8 and told[0]["loss/total"] == losses(1)["loss/total"]


def test_the_layer_losses_of_a_row_are_a_picture_s_column_in_the_order_of_the_pairs(online):
    pictures = [row[HEAT_MAP] for row in online[2].rows() if HEAT_MAP in row]
    assert [picture["values"] for picture in pictures] == 2 * [[1_500_000, 500_000, 250_000]]
    assert pictures[0]["_type"] == "histogram" and pictures[0]["bins"] == [0, 1, 2, 3]


def test_the_newest_table_of_samples_has_those_of_all_starts(online):
    tables = [json.loads(data) for name, data in online[2].files.items() if name.endswith(".table.json")]
    assert max((table["data"] for table in tables), key=len) == [[4, "Größe", "text 0", ""], [8, "Größe", "text 4", ""]]


def test_the_restart_and_both_ends_are_alerts(online):
    told = [(alert["title"], alert["severity"]) for alert in online[2].said("NotifyScriptableRunAlert")]
    assert told == [
        ("the run is finished", "INFO"), ("the run was restarted", "WARN"), ("the run is finished", "INFO"),
    ]  # fmt: skip


@pytest.mark.long  # waits for it
def test_an_api_that_has_become_slow_holds_up_no_step_and_the_end_only_for_so_long(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_connection, "CLOSE_S", 2.0)
    with stand_in(slow_s=5.0) as server:
        run = make_run(tmp_path, wandb={"project": "ted"})
        wandb_run = open_wandb(run, "our-id")
        until = time.monotonic() + 60
        while not upserts(server) and time.monotonic() < until:
            time.sleep(0.05)
        server.is_slow.set()
        numbers = metrics(run, wandb_run=wandb_run)
        began = time.monotonic()
        take_steps(numbers, 1, 10)
        numbers.alert("loss spike", "step 10")
        assert time.monotonic() - began < 2
        numbers.close()
        assert time.monotonic() - began < 10
        server.is_slow.clear()
    assert [row["step"] for row in rows_of(run)] == list(range(1, 11))


def test_a_slow_call_into_wandb_holds_up_no_step(tmp_path):
    told = []

    class Slow:
        def log(self, row):
            time.sleep(0.3)
            told.append(row["step"])

        def alert(self, *told, **level):
            pass

        def finish(self):
            pass

    numbers = metrics(make_run(tmp_path), wandb_run=wandb_connection.WandbRun("id", lambda closing: Slow()))
    began = time.monotonic()
    take_steps(numbers, 1, 10)
    took = time.monotonic() - began
    numbers.close()
    assert told == list(range(1, 11)) and took < 0.3 * 10 / 2


def test_a_run_that_switches_wandb_off_opens_nothing(tmp_path):
    assert open_wandb(make_run(tmp_path, wandb={"project": "ted", "mode": "disabled"}), None) is None
