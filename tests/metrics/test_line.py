"""The line of a row, the time left in it, and what a quiet console shows."""

import logging

import pytest

from ted_scale.checkpoints.life import Spent
from ted_scale.metrics import console
from ted_scale.metrics.goodput import Ledger
from ted_scale.metrics.line import before_and_after, duration, line_of, time_left
from ted_scale.metrics.teller import Teller
from ted_scale.metrics.time_left import Ahead, Left, TimeLeft, times

ROW = {
    "loss/total": 8.0471, "loss/ce": 5.4, "loss/kl": 1.2, "loss/layer": 1.45, "loss/layer/0": 1.0, "optim/grad_norm": 2.123,
    "optim/grad_norm_student": 2.0, "optim/lr": 6.5e-4, "perf/tokens_per_s": 54321.0, "perf/step_ms": 3.76e4,
    "perf/mfu": 0.412, "memory/peak_gib": 61.234, "perf/goodput": 0.9,
}  # fmt: skip


def test_a_row_of_training_is_one_line_for_people():
    line = line_of(25, 30_000, "student", ROW, validated=(20, 5.508), left="3 h left")
    assert line == (
        "step 25 of 30,000 (student)  loss 8.047 (ce 5.4, kl 1.2, layer 1.45)  val 5.508 at 20  gradient 2.12  lr 0.00065  "
        "54,321 tokens/s, 37.6 s a step  MFU 41%  61.2 GiB  3 h left"
    )


def test_a_validation_has_a_line_and_a_row_without_anything_to_show_has_none():
    both = {"val/loss": 5.5, "val/ppl": 244.7, "val/cats/loss": 5.0, "val/teacher_loss": 5.25, "val/teacher_ppl": 190.6}
    line = line_of(20, 40, "", both, validated=(10, 6.0), left="")
    assert line == "step 20 of 40  validation 5.5, perplexity 244.7, the teacher's 5.25"
    assert "suite/piqa/acc 0.5" in line_of(20, 40, "", {"val/suite/piqa/acc": 0.5}, validated=None, left="")
    assert line_of(20, 40, "", {"checkpoint/stall_ms": 3.0}, validated=(10, 6.0), left="") is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0441, "44.1 ms"), (0.9996, "1 s"), (37.6, "37.6 s"), (59.97, "1 min"), (125, "2 min 5 s"), (3599.9, "1 h"),
        (3700, "1 h 2 min"), (50_000, "13 h 53 min"), (100_000, "1 d 4 h"), (2e6, "23 d 4 h"),
    ],
)  # fmt: skip
def test_a_time_is_in_units_that_people_use(seconds, words):
    assert duration(seconds) == words


def spent(**parts: float) -> Spent:
    return Spent(**{key: float(value) for key, value in parts.items()})


def simulated(ahead: Ahead, every: int, cost: dict[str, float], step_s: float) -> list[tuple[int, Left, float]]:
    """(step, the time left by its row, what was left in truth), for a run that begins with a first step of 100 s."""
    now, found, clock = spent(steps=100, validation=50), [], [100.0]
    left = TimeLeft(ahead)
    for step in range(ahead.first + 1, ahead.last + 1):
        if step > ahead.first + 1:
            now = spent(**{**vars(now), "steps": now.steps + step_s})
            clock.append(clock[-1] + step_s)
        if step == ahead.first + 1:
            left.begin(step, now)
        if step % every == 0 or step == ahead.last:
            found.append((step, left.row(step, now), clock[-1]))
        for part, n in ahead.each.items():
            if times(n, step, step + 1, ahead.last):
                now = spent(**{**vars(now), part: getattr(now, part) + cost[part]})
                clock[-1] += cost[part]
    return [(step, told, clock[-1] - at) for step, told, at in found]


def test_the_time_left_is_that_of_the_steps_and_of_what_is_still_due():
    """Also in a row whose step is due itself, and at the end, which validates and saves off the calendar."""
    ahead = Ahead("student", 40, 500, {"validation": 100, "checkpoints": 70}, 0.0, {})
    told = simulated(ahead, 10, {"validation": 30.0, "checkpoints": 9.0}, 2.0)
    assert [step for step, left, _ in told if left and left.is_guess] == list(range(50, 101, 10))
    sure = [(left.stage, truth) for step, left, truth in told if step > 100]
    assert len(sure) == 40
    assert all(told == pytest.approx(truth, abs=1e-6) for told, truth in sure)


def test_the_pace_is_that_of_the_last_rows():
    """A term that ends makes steps cheaper."""
    left = TimeLeft(Ahead("student", 0, 1000, {}, 0.0, {}))
    left.begin(1, spent(steps=5))
    seconds = 5.0
    for step in range(10, 801, 10):
        seconds += 100 if step <= 500 else 10
        told = left.row(step, spent(steps=seconds))
    assert told.stage == pytest.approx(200.0)


def test_what_is_on_no_calendar_goes_on_as_it_was():
    left = TimeLeft(Ahead("student", 0, 101, {}, 0.0, {}))
    left.begin(1, spent(steps=1))
    assert left.row(51, spent(steps=51, validation=25)).stage == pytest.approx(50 + 25)


def test_nothing_is_left_to_say_before_a_step_was_measured():
    left = TimeLeft(Ahead("student", 0, 10, {}, 0.0, {}))
    assert left.row(1, spent(steps=1)) is None
    left.begin(1, spent(steps=1))
    assert left.row(1, spent(steps=1)) is None


def test_the_time_of_a_later_stage_is_the_forecast_s_and_marked_as_a_guess_or_left_out():
    def told(later: float | None) -> str:
        left = TimeLeft(Ahead("filters", 0, 100, {}, later, {}))
        left.begin(1, spent(steps=9))
        return time_left(left.row(41, spent(steps=9 + 40 * 5)), "filters")

    assert told(7200.0) == "4 min 55 s left of filters, ~2 h 5 min of the run"
    assert told(None) == "4 min 55 s left of filters"
    assert told(0.0) == "4 min 55 s left"
    assert time_left(Left(5.0, True, 5.0), "") == "~5 s left"


def test_the_end_compares_the_student_before_and_after_with_its_teacher():
    rows = [
        {"step": 1, "loss/total": 9.0},
        {"step": 4, "val/loss": 6.0, "val/teacher_loss": 4.0},
        {"step": 9, "val/loss": 5.0},
    ]
    assert before_and_after(rows) == "held-out loss 6 before, 5 after, the teacher's 4"
    assert (
        before_and_after([{"val/loss": 6.0}, {"val/loss": None}, {"val/loss": 5.5}])
        == "held-out loss 6 before, 5.5 after"
    )
    assert before_and_after(rows[:1]) is None


@pytest.mark.parametrize(
    ("level", "seen"), [("info", ["row", "alert", "done"]), ("warning", ["alert", "done"]), ("error", ["done"])]
)
def test_a_quiet_console_leaves_out_rows_and_the_log_file_does_not(tmp_path, capfd, monkeypatch, level, seen):
    for name, value in (("handlers", []), ("propagate", False), ("level", 0)):
        monkeypatch.setattr(console.log, name, value)
    monkeypatch.setattr(console, "level", console.level)
    console.choose_level(level)
    console.open_log(tmp_path, writes=True)
    for words, importance in (("row", logging.INFO), ("alert", logging.WARNING), ("done", logging.CRITICAL)):
        console.log_line(words, importance)
    assert [line.split()[-1] for line in capfd.readouterr().err.splitlines()] == seen
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["row", "alert", "done"]


@pytest.mark.parametrize(
    ("terminal", "level", "bar"), [(True, "INFO", True), (True, "WARNING", False), (False, "INFO", False)]
)
def test_there_is_a_bar_on_a_terminal_that_is_not_quiet(monkeypatch, terminal, level, bar):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(console, "level", logging.getLevelNamesMapping()[level])
    teller = Teller(40, 0, writes=True)
    shows = not teller.bar.disable
    teller.close()
    assert shows is bar


def test_the_bar_and_the_lines_know_the_stage_and_the_last_validation(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(console, "log_line", said.append)
    teller, ledger = Teller(40, 10, writes=True), Ledger(Spent())
    ledger.turn("steps")
    teller.begin(Ahead("student", 10, 40, {}, 0.0, {}))
    teller.row(10, {"val/loss": 5.5, "val/ppl": 244.7}, ledger)
    for step in (11, 12):
        teller.step(step, ledger)
        teller.row(step, ROW, ledger)
    teller.close()
    assert said[0].startswith("step 10 of 40 (student)  validation 5.5")
    assert "val 5.5 at 10" in said[1] and said[2].startswith("step 12 of 40 (student)  loss 8.047 (")


def test_deepspeed_s_line_about_a_machine_without_a_gpu_is_dropped_and_no_other():
    """Every command wrote it that imports DeepSpeed; the log says on which device a run is."""
    first, *_ = logging.getLogger("DeepSpeed").filters  # console.py adds others while a run goes
    lines = (
        "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.",
        "an error",
    )
    records = [logging.LogRecord("DeepSpeed", logging.WARNING, "", 1, line, (), None) for line in lines]
    assert [bool(first(record)) for record in records] == [False, True]
