"""Alerts on how a run goes: which ends have one, and that a stall has one before its limit ends the run."""

import time

import pytest
from test_metrics import metrics, take_steps
from tiny import make_run

from ted_scale.base.errors import NOT_FINITE, Preempted, RunStopped
from ted_scale.checkpoints.life import Lost
from ted_scale.metrics import alerts, wandb_connection
from ted_scale.metrics.wandb_connection import WandbRun
from ted_scale.ranks import pulse, signals


class Told:
    """A W&B run that keeps what it is told."""

    def __init__(self):
        self.alerts, self.summary = [], {}

    def alert(self, title, text, level):
        self.alerts.append((title, text, level))

    def log(self, row):
        pass

    def finish(self):
        pass


def opened(told: Told, step_s: float = 1e9) -> WandbRun:
    return WandbRun("id", lambda closing: told, step_s)


FAULT = "step 3: loss/ce of rank 0 must be finite, but is nan"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, [("the run is finished", "it is at step 2", "INFO")]),
        (
            RunStopped(FAULT, NOT_FINITE),
            [("the run stopped: a number is not finite", f"step 2: {FAULT}", "ERROR")],
        ),
        (RunStopped("all are damaged"), [("the run stopped", "step 2: all are damaged", "ERROR")]),
        (MemoryError(), [("the run stopped", "step 2: MemoryError", "ERROR")]),
        (Preempted(), []),
    ],
    ids=["done", "not finite", "another reason", "no words", "a signal"],
)
def test_the_end_of_a_run_is_an_alert_but_not_that_of_a_start_that_is_to_go_on(tmp_path, error, said):
    numbers = metrics(make_run(tmp_path), wandb_run=opened(told := Told()))
    take_steps(numbers, 1, 2)
    ended(numbers, error)
    assert told.alerts == said


def ended(numbers, error) -> None:
    """As run.py closes them, where the exception is still on its way."""
    try:
        try:
            if error:
                raise error
        finally:
            numbers.close(done=error is None)
    except BaseException as raised:
        assert raised is error


def test_a_restart_is_an_alert_with_what_it_cost(tmp_path):
    numbers = metrics(make_run(tmp_path), step=4, wandb_run=opened(told := Told()))
    numbers.restarted(Lost(3, 60.0, 120.0, "it was killed"))
    numbers.close()
    text = (
        "the run was down for 2.0 min, and 3 steps after step 4 (1.0 min) must be taken again; its end: it was killed"
    )
    assert told.alerts[0] == ("the run was restarted", text, "WARN")


def test_a_hang_and_the_death_of_another_rank_are_alerts_unless_a_signal_was_first(tmp_path, monkeypatch):
    """exits.at_end calls `write_last_words` with the last words."""
    for is_asked, said in ((False, [("the run stopped", "error: step 4 must end", "ERROR")]), (True, [])):
        monkeypatch.setattr(signals.asked, "is_set", lambda is_asked=is_asked: is_asked)
        numbers = metrics(make_run(tmp_path), wandb_run=opened(told := Told()))
        numbers.write_last_words("error: step 4 must end")
        numbers.wandb_run.close()
        assert told.alerts == said


def test_a_step_that_takes_half_of_its_limit_is_one_alert(monkeypatch):
    monkeypatch.setattr(wandb_connection, "LOOK_S", 0.01)
    told = Told()
    monkeypatch.setattr(pulse, "now", pulse.Pulse("step 7", time.monotonic() - 61, first=False, unsaved=True))
    wandb_run = opened(told, 120.0)
    until = time.monotonic() + 30
    while not told.alerts and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    wandb_run.close()
    assert told.alerts == [
        ("the run stalls", "step 7 has taken 1.0 min; limits.step_s ends the run after 2.0", "WARN"),
    ]


def test_neither_a_young_step_nor_a_start_stalls():
    step = pulse.Pulse("step 7", 0.0, first=False, unsaved=True)
    assert alerts.stalled(step, 59.0, 120.0) is None
    assert alerts.stalled(step, 60.0, 120.0)
    assert alerts.stalled(step._replace(first=True), 1e9, 120.0) is None
