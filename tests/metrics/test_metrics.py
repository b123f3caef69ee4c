"""The rows of metrics.jsonl, what a resume removes from them, and what Weights & Biases gets, read from its own file."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from tiny import make_run
from wandb_file import read_config, read_records, read_rows

from ted_scale.checkpoints.progress import Progress
from ted_scale.data.stream import Batch
from ted_scale.distill.flops import Work
from ted_scale.metrics import console
from ted_scale.metrics.clock import Clock
from ted_scale.metrics.metrics import Metrics, mean_rows, shown
from ted_scale.metrics.rows import trim_rows
from ted_scale.metrics.tracking import has_key, open_wandb

CPU = torch.device("cpu")


def metrics(run, *, writes=True, step=0, wandb_run=None) -> Metrics:
    run.folder.mkdir(parents=True, exist_ok=True)
    return Metrics(run, writes=writes, total_steps=10, step=step, device=CPU, wandb_run=wandb_run)


def rows_of(run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def losses(step: int) -> dict[str, float]:
    return {"loss/total": float(step), "loss/ce": step / 2, "optim/lr": 0.1}


def take_steps(numbers: Metrics, first: int, last: int, end: int = 10) -> None:
    for step in range(first, last + 1):
        with numbers.clock.time("teacher_ms"):
            pass
        numbers.add(Progress(step, step * 256), losses(step), last=step == end)


def test_a_row_is_the_mean_of_the_steps_since_the_last_one(tmp_path):
    run = make_run(tmp_path, log_every=4)
    numbers = metrics(run)
    take_steps(numbers, 1, 10)
    numbers.close()
    rows = rows_of(run)
    assert [(r["step"], r["tokens"]) for r in rows] == [(4, 1024), (8, 2048), (10, 2560)]
    assert [r["loss/total"] for r in rows] == [2.5, 6.5, 9.5]
    assert [r["loss/ce"] for r in rows] == [1.25, 3.25, 4.75]


def test_a_row_has_every_key_that_a_reader_expects(tmp_path):
    run = make_run(tmp_path)
    numbers = metrics(run)
    take_steps(numbers, 1, 1)
    numbers.close()
    (row,) = rows_of(run)
    expected = {"step", "tokens", *losses(1), "perf/tokens_per_s", "perf/step_ms", "perf/teacher_ms", "memory/peak_gib"}
    assert row.keys() == expected  # no perf/mfu: a CPU has no known peak
    assert all(math.isfinite(v) and v >= 0 for v in row.values())
    assert row["memory/peak_gib"] > 0.05


def test_utilization_is_the_counted_work_divided_by_the_peak_of_the_device(tmp_path):
    run = make_run(tmp_path, log_every=2)
    numbers = metrics(run)
    numbers.peak = 1e9
    micros = [Batch(torch.zeros(2, 32, dtype=torch.long), *[None] * 3)]

    def work(step, keys):
        return Work(keys(None) * (1 + step), 8.0)

    for step, _ in enumerate(numbers.counted(enumerate([micros] * 4), work)):
        numbers.add(Progress(step + 1, (step + 1) * 256), losses(step), last=False)
    numbers.close()
    first, second = rows_of(run)
    assert first["perf/mfu"] == pytest.approx(first["perf/tokens_per_s"] * 16.5 * 1.5 / 1e9)
    assert second["perf/mfu"] == pytest.approx(second["perf/tokens_per_s"] * 16.5 * 3.5 / 1e9)
    assert first["perf/hfu"] == pytest.approx(first["perf/tokens_per_s"] * (16.5 * 1.5 + 8) / 1e9)


def test_a_term_that_was_on_for_part_of_a_row_is_averaged_where_it_was_on():
    assert mean_rows([{"a": 1.0, "b": 5.0}, {"a": 3.0}]) == {"a": 2.0, "b": 5.0}


def test_a_skipped_step_is_counted_and_not_part_of_any_mean(tmp_path):
    run = make_run(tmp_path, log_every=2)
    numbers = metrics(run)
    steps = [(losses(1), 0), ({"optim/lr": 0.3}, 1), ({"optim/lr": 0.1}, 2), ({"optim/lr": 0.1}, 3)]
    for step, (values, skipped) in enumerate(steps, 1):
        numbers.add(Progress(step, step * 256, skipped=skipped), values, last=False)
    numbers.close()
    first, second = rows_of(run)
    assert (first["loss/total"], first["optim/lr"], first["optim/skipped"]) == (1.0, 0.2, 1)
    assert "loss/total" not in second and second["optim/skipped"] == 3


def test_a_nonfinite_number_is_null_in_json(tmp_path):
    run = make_run(tmp_path)
    numbers = metrics(run)
    numbers.write(1, 256, {"val/loss": math.nan, "val/ppl": math.inf, "optim/lr": 0.1})
    numbers.close()
    (line,) = (run.folder / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=pytest.fail)
    assert row == {"step": 1, "tokens": 256, "val/loss": None, "val/ppl": None, "optim/lr": 0.1}


def test_a_rewind_removes_the_rows_after_its_checkpoint_and_writes_them_again(tmp_path):
    run = make_run(tmp_path, log_every=2)
    numbers = metrics(run)
    take_steps(numbers, 1, 5)
    numbers.write(4, 1024, {"val/loss": 1.5})
    numbers.go_back(Progress(4, 1024))
    numbers.write(4, 1024, {"val/loss": 1.5})
    take_steps(numbers, 5, 6)
    numbers.close()
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [2, 4, 4, 6]
    assert rows[-1]["loss/total"] == 5.5
    assert numbers.bar.n in (0, 6)  # it counts only on a terminal


def test_speed_counts_the_tokens_and_the_time_since_the_last_row(tmp_path):
    run = make_run(tmp_path, log_every=2)
    numbers = metrics(run)
    numbers.resume_from(5 * 256)
    start = time.perf_counter()
    time.sleep(0.05)
    take_steps(numbers, 6, 7)
    elapsed = time.perf_counter() - start
    numbers.close()
    take = rows_of(run)[0]  # step 6 is due, after one step
    assert 0.05e3 <= take["perf/step_ms"] <= elapsed * 1e3 + 1
    assert take["perf/tokens_per_s"] == pytest.approx(256 / (take["perf/step_ms"] / 1e3), rel=1e-6)


def test_a_clock_sums_by_name_and_starts_anew_after_a_reading():
    clock = Clock(CPU)
    for _ in range(2):
        with clock.time("a_ms"):
            time.sleep(0.01)
    assert 20 <= clock.read()["a_ms"] < 200
    assert clock.read() == {}


def test_waiting_for_data_is_timed_and_nothing_is_lost(tmp_path):
    run = make_run(tmp_path)
    numbers = metrics(run)

    def slow():
        for item in "ab":
            time.sleep(0.01)
            yield item

    assert list(numbers.timed(slow(), "data_wait_ms")) == ["a", "b"]
    take_steps(numbers, 1, 2)
    numbers.close()
    first, second = rows_of(run)
    assert first["perf/data_wait_ms"] >= 20
    assert "perf/data_wait_ms" not in second


def test_waiting_before_a_stage_does_not_count_in_the_stage(tmp_path):
    run = make_run(tmp_path)
    numbers = metrics(run)
    assert list(numbers.timed("ab", "data_wait_ms")) == ["a", "b"]
    numbers.resume_from(0)
    take_steps(numbers, 1, 1)
    numbers.close()
    assert "perf/data_wait_ms" not in rows_of(run)[0]


def test_a_full_disk_loses_lines_of_the_log_and_the_console_still_has_them(tmp_path, capfd, monkeypatch):
    for name, value in (("handlers", []), ("propagate", False), ("level", 0)):  # what open_log changes is put back
        monkeypatch.setattr(console.log, name, value)
    console.open_log(tmp_path, writes=True)
    monkeypatch.setattr(console.log.handlers[1], "stream", Path("/dev/full").open("a"))  # noqa: SIM115
    console.log.info("a step")
    said = capfd.readouterr().err
    assert "a step" in said and "Traceback" not in said


def test_a_full_disk_loses_rows_which_is_logged_once_and_the_run_goes_on(tmp_path, caplog):
    caplog.set_level("INFO", logger="ted_scale")
    run = make_run(tmp_path)
    numbers = metrics(run)
    take_steps(numbers, 1, 1)
    numbers.file = Path("/dev/full").open("a")  # noqa: SIM115
    take_steps(numbers, 2, 4)
    numbers.close()
    assert [row["step"] for row in rows_of(run)] == [1]
    numbers = metrics(run, step=4)
    take_steps(numbers, 5, 5)
    assert [row["step"] for row in rows_of(run)] == [1, 5]
    said = [record.message for record in caplog.records if "rows are lost" in record.message]
    assert said == [f"{numbers.path} must be writable, but is not (No space left on device): rows are lost until it is"]


def test_an_alert_contains_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-in-an-alert")
    told = []

    class Run:
        def alert(self, title, text, level):
            told.append(text)

    metrics(make_run(tmp_path), wandb_run=Run()).alert("a spike", "denied for planted-in-an-alert")
    assert told == ["denied for ***"]


def test_an_alert_is_logged_even_if_wandb_is_gone(tmp_path, caplog):
    class Gone:
        def alert(self, *arguments, **named):
            raise BrokenPipeError("its process has ended")

    caplog.set_level("INFO", logger="ted_scale")
    numbers = metrics(make_run(tmp_path), wandb_run=Gone())
    numbers.alert("a spike", "a loss spiked")
    numbers.alert("a spike", "another loss spiked")
    said = [record.message for record in caplog.records]
    assert said[0] == "a loss spiked" and said[2:] == ["another loss spiked"]
    assert said[1].startswith("W&B is lost until the next start (BrokenPipeError: its process has ended)")


def test_other_ranks_write_nothing(tmp_path):
    run = make_run(tmp_path)
    numbers = metrics(run, writes=False)
    take_steps(numbers, 1, 3)
    numbers.close()
    assert not (run.folder / "metrics.jsonl").exists()


def test_a_resume_removes_the_rows_after_its_checkpoint_and_broken_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss/total": 1.0}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join([*lines, '{"step": 5, "los']))
    trim_rows(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert path.read_text().endswith("\n")
    trim_rows(path, 0)
    assert path.read_text() == ""
    trim_rows(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


def test_rows_after_a_resume_are_appended_to_the_kept_ones(tmp_path):
    run = make_run(tmp_path)
    first = metrics(run)
    take_steps(first, 1, 4)
    first.close()
    trim_rows(run.folder / "metrics.jsonl", 2)
    second = metrics(run, step=2)
    take_steps(second, 3, 5)
    second.close()
    assert [r["step"] for r in rows_of(run)] == [1, 2, 3, 4, 5]


SECTION = {
    "project": "ted", "mode": "offline", "entity": "lab", "group": "arms", "tags": ["tiny", "cpu"], "notes": "Größe 😀",
}  # fmt: skip


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """(run, W&B ids, records) of two processes: one takes six steps and validates, the other resumes from step 6."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_API_KEY", raising=False)
        run = make_run(tmp_path_factory.mktemp("offline"), wandb=SECTION, log_every=2)
        run.folder.mkdir(parents=True)
        ids = []
        for first, last in ((1, 6), (7, 10)):
            wandb_run = open_wandb(run, ids[0] if ids else None)
            ids.append(wandb_run.id)
            numbers = metrics(run, step=first - 1, wandb_run=wandb_run)
            take_steps(numbers, first, last)
            numbers.write(last, last * 256, {"val/loss": 1.5})
            numbers.alert("loss spike", f"step {last}: loss/total is 9")
            numbers.close()
            time.sleep(1.1)  # W&B names its folders by the second
    files = sorted((run.folder / "wandb").glob("offline-run-*/*.wandb"))
    return run, ids, [list(read_records(file)) for file in files]


def test_a_resumed_run_keeps_its_wandb_id(offline):
    run, ids, lives = offline
    assert ids[0] == ids[1] and len(lives) == 2
    headers = [r.run for records in lives for r in records if r.WhichOneof("record_type") == "run"]
    assert {h.run_id for h in headers} == {ids[0]}
    assert all((run.folder / "wandb").glob(f"offline-run-*-{ids[0]}"))


def test_wandb_has_the_settings_of_the_run_file(offline):
    run, _, (records, _) = offline
    header = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (header.project, header.entity, header.run_group, header.display_name) == ("ted", "lab", "arms", "tiny")
    assert (list(header.tags), header.notes) == (["tiny", "cpu"], "Größe 😀")
    config = read_config(records)
    assert config["train"] == run.model_dump(mode="json")["train"]
    assert config["filters"]["from"] is None and config["method"] == "ted"


def test_the_end_of_a_run_waits_for_wandb_at_most_30_s(offline):
    """W&B records its settings."""
    for records in offline[2]:
        features = [r.telemetry.feature for r in records if r.WhichOneof("record_type") == "telemetry"]
        assert any(f.finish_timeout for f in features) and any(f.finish_timeout_raises for f in features)


def test_wandb_gets_the_rows_of_the_file(offline):
    run, _, lives = offline
    told = [{k: v for k, v in row.items() if not k.startswith("_")} for records in lives for row in read_rows(records)]
    assert told == rows_of(run)
    assert [row["step"] for row in told] == [2, 4, 6, 6, 8, 10, 10]
    assert {"val/loss": 1.5, "step": 6, "tokens": 1536} in told


def test_a_spike_is_a_wandb_alert(offline):
    _, _, lives = offline
    alerts = [[r.alert for r in records if r.WhichOneof("record_type") == "alert"] for records in lives]
    assert [[(a.title, a.text, a.level) for a in life] for life in alerts] == [
        [("loss spike", f"step {step}: loss/total is 9", "WARN")] for step in (6, 10)
    ]


def test_wandb_plots_over_steps_and_has_tokens_as_another_axis(offline):
    _, _, (records, _) = offline
    axes = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    assert {m.name for m in axes} >= {"step", "tokens"}
    assert {m.step_metric for m in axes if m.glob_name == "*" or m.name.startswith("loss/")} == {"step"}
    assert all("tokens" in row and "step" in row for row in read_rows(records))


def test_without_a_wandb_section_nothing_is_opened(tmp_path):
    assert open_wandb(make_run(tmp_path), None) is None


def test_a_key_is_found_in_the_environment_or_in_netrc(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not has_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert has_key()
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert has_key()


def test_the_console_shows_totals_and_the_weights_of_an_adaptive_blend():
    keys = (
        "loss/ce",
        "loss/layer/3",
        "loss/filter_t/0",
        "val/loss",
        "val/code/loss",
        "blend/code/weight",
        "blend/code/ppl",
    )
    assert [key for key in keys if shown(key)] == ["loss/ce", "val/loss", "blend/code/weight"]


class Lost:
    """A W&B run whose process was killed."""

    def log(self, row):
        raise ConnectionResetError("Connection lost")

    finish = log


def test_a_run_whose_wandb_process_is_killed_keeps_its_numbers_and_logs_it_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("ted_scale.metrics.metrics.log_line", said.append)
    run = make_run(tmp_path, log_every=1)
    numbers = metrics(run, wandb_run=Lost())
    take_steps(numbers, 1, 4)
    numbers.close()
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4]
    lost = "W&B is lost until the next start (ConnectionResetError: Connection lost); metrics.jsonl has every number"
    assert said.count(lost) == 1
