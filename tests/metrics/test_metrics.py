"""The rows of metrics.jsonl, and what a resume removes from them."""

import errno
import json
import math
import os
import time
from pathlib import Path

import pytest
import torch
from tiny import make_run

from ted_scale.base.errors import Gone
from ted_scale.checkpoints.life import PARTS
from ted_scale.checkpoints.progress import Progress
from ted_scale.data.stream import Batch
from ted_scale.distill.flops import Work
from ted_scale.metrics import console
from ted_scale.metrics.clock import Clock
from ted_scale.metrics.line import shown
from ted_scale.metrics.metrics import Metrics, mean_rows
from ted_scale.metrics.rows import trim_rows
from ted_scale.metrics.time_left import Ahead

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
    expected |= {"perf/goodput", *(f"perf/lost_{part}" for part in PARTS[1:])}
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
    assert numbers.teller.bar.n in (0, 6)  # it counts only on a terminal


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


def test_rows_that_a_file_system_fails_to_give_are_a_sentence(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 2}\n')

    def stale(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(run.folder / "metrics.jsonl"))

    monkeypatch.setattr("ted_scale.metrics.rows.open_file", stale)
    with pytest.raises(
        Gone, match=r"metrics.jsonl must be readable and writable, but the file system says Stale file handle"
    ):
        metrics(run, step=1)


def test_a_forecast_is_in_every_row_and_once_in_the_log(tmp_path, monkeypatch):
    """Past the first row, which has the start in it."""
    said = []
    for place in ("metrics", "console"):
        monkeypatch.setattr(f"ted_scale.metrics.{place}.log_line", said.append)
    numbers = metrics(make_run(tmp_path))
    numbers.expect(lambda: Ahead("student", 0, 10, {}, 0.0, {"memory/forecast_gib": 0.5, "perf/forecast_ms": 4.0}))
    take_steps(numbers, 1, 4)
    numbers.close()
    rows = rows_of(make_run(tmp_path))
    assert [row["perf/forecast_ms"] for row in rows] == [4.0] * 4
    [line] = [line for line in said if line.startswith("forecast beside measured: memory 0.5 GiB, ")]
    assert said.index(line) == 1
    took = rows[1]["perf/step_ms"]
    assert line.endswith(f"a step 4 ms, {took:.3g} ms measured ({took / 4:.2f} times)")
