"""The report of a running run: written in the background, also at the end, and never a reason to wait or to end."""

import subprocess
import threading
import time

import pytest
import torch
from tiny import make_run

from ted_scale.base.parsing import parse_toml
from ted_scale.checkpoints.progress import Progress
from ted_scale.config.run_file import to_toml
from ted_scale.metrics import live_report
from ted_scale.metrics import metrics as metrics_file
from ted_scale.metrics.live_report import LiveReport
from ted_scale.metrics.metrics import Metrics
from ted_scale.ranks import signals

CPU = torch.device("cpu")
WAIT_S = 120  # of a process beside others on few cores


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(live_report, "log_line", found.append)
    return found


class Told:
    """W&B's run, as far as Metrics calls it."""

    def __init__(self):
        self.rows, self.summary, self.closed = [], {}, False

    def tell(self, action) -> None:
        assert not self.closed
        action(self)

    def log(self, row: dict) -> None:
        self.rows.append(row)

    def alert(self, title: str, text: str, level: str) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def waited_for(what) -> bool:
    end = time.monotonic() + WAIT_S
    while not what() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(what())


def test_a_run_rewrites_its_report_and_gives_the_last_one_to_wandb(tmp_path, lines):
    run = make_run(tmp_path, report={"every_minutes": 0.02}, log_every=1)
    run.folder.mkdir(parents=True)
    (run.folder / "run.toml").write_text(to_toml(run))
    assert parse_toml(to_toml(run))["report"] == {"every_minutes": 0.02}
    told = Told()
    numbers = Metrics(run, writes=True, total_steps=2, step=0, device=CPU, wandb_run=told)
    page = run.folder / "report.html"
    numbers.add(Progress(1, 256), {"loss/total": 3.25}, last=False)
    assert waited_for(page.exists)
    numbers.add(Progress(2, 512), {"loss/total": 2.25}, last=True)
    numbers.close()
    assert "2.25" in page.read_text()
    last = told.rows[-1]
    assert last["step"] == 2 and type(last["report"]).__name__ == "Html" and told.closed
    assert lines == []


def test_a_report_that_cannot_be_written_is_said_once_and_nothing_else(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(live_report, "command", lambda folder: ["sh", "-c", "echo no paper left >&2; exit 1"])
    live = LiveReport(tmp_path, 0.001)
    assert waited_for(lambda: lines)
    time.sleep(0.5)
    assert live.close() is None
    assert lines == [
        f"{tmp_path / 'report.html'} must be written, but is not (no paper left); the run goes on without it"
    ]


def test_a_report_that_hangs_is_ended(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(live_report, "command", lambda folder: ["sleep", "600"])
    monkeypatch.setattr(live_report, "LAST_S", 0.2)
    live = LiveReport(tmp_path, 0.001)
    assert waited_for(lambda: live.process)
    first, began = live.process, time.monotonic()
    assert live.close() is None
    assert time.monotonic() - began < 30 and first.poll() is not None and live.process.poll() is not None


def test_after_an_error_nobody_waits_for_a_page(tmp_path, monkeypatch):
    """A launcher kills the process soon, and W&B and the folder's holder come after it."""
    run = make_run(tmp_path, report={"every_minutes": 60})
    run.folder.mkdir(parents=True)
    told = Told()
    numbers = Metrics(run, writes=True, total_steps=2, step=0, device=CPU, wandb_run=told)
    monkeypatch.setattr(live_report.subprocess, "Popen", lambda *_, **__: pytest.fail("a page was begun"))
    numbers.close(done=False)
    assert told.closed and told.rows == []


def test_a_process_that_is_being_started_at_the_end_is_ended_too(tmp_path, monkeypatch):
    """Two at once would write the same file."""
    begins, begun, real = threading.Event(), [], subprocess.Popen

    def slow(*words, **how):
        begins.set()
        time.sleep(0.5 if not begun else 0)
        begun.append(real(["sleep", "600"] if not begun else ["true"], **how))
        return begun[-1]

    monkeypatch.setattr(live_report.subprocess, "Popen", slow)
    live = LiveReport(tmp_path, 0.001)
    assert begins.wait(WAIT_S)
    try:
        assert live.close() == live.page
        assert len(begun) == 2 and begun[0].poll() is not None
        assert live.begun(last=False) is None
    finally:
        for process in begun:
            process.kill()


def test_a_run_that_was_asked_to_stop_does_not_wait_for_a_report(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(live_report, "command", lambda folder: started.append(folder) or ["true"])
    live = LiveReport(tmp_path, 60)
    began = len(started)
    monkeypatch.setattr(live, "write", lambda longest_s: pytest.fail("it was written"))
    signals.asked.set()
    try:
        assert live.close() is None
    finally:
        signals.asked.clear()
    assert len(started) == began


@pytest.mark.parametrize(("writes", "minutes"), [(True, 0.0), (False, 1.0)])
def test_only_rank_0_has_a_report_and_only_if_it_is_asked(tmp_path, monkeypatch, writes, minutes):
    monkeypatch.setattr(metrics_file, "LiveReport", lambda *_: pytest.fail("a report was begun"))
    run = make_run(tmp_path, report={"every_minutes": minutes})
    run.folder.mkdir(parents=True)
    Metrics(run, writes=writes, total_steps=2, step=0, device=CPU, wandb_run=None).close()


def test_its_process_does_not_take_itself_for_a_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert not {"WORLD_SIZE", "RANK"} & live_report.environment().keys()
