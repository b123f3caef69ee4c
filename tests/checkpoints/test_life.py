"""life.json: where a run's time went, what a start finds of the one before, and that nothing in the file can hurt."""

import dataclasses
import json
import os

import pytest

from ted_scale.base import exits
from ted_scale.checkpoints import life
from ted_scale.checkpoints.life import PARTS, Life, Spent, add_up, read, write
from ted_scale.metrics.goodput import Ledger

SAVED = Spent(at=1000.0, steps=600.0, start=60.0, validation=10.0, checkpoints=5.0, repeated=20.0, down=30.0)
DIED = Life(137, dataclasses.replace(SAVED, at=1500.0, steps=1080.0, checkpoints=7.0, validation=28.0))


def test_a_start_after_a_kill_counts_the_steps_that_were_not_saved_and_the_time_until_it():
    spent, lost = add_up(100, SAVED, DIED, began=1620.0)
    assert (lost.steps, lost.seconds, lost.down) == (37, 480.0, 120.0)
    assert spent == Spent(1620.0, 600.0, 60.0, 28.0, 7.0, 500.0, 150.0)
    assert spent.total == DIED.spent.total + 120.0
    assert lost.sentence(100) == (
        "the run was down for 2.0 min, and at least 37 steps after step 100 (8.0 min) must be taken again; its end: it was killed, "
        "or its machine is gone"
    )


def test_a_start_after_a_stop_with_a_save_repeats_nothing_and_knows_why():
    stopped = Life(100, dataclasses.replace(SAVED, at=1003.0, checkpoints=8.0), "stopped: asked to (exit code 75)")
    spent, lost = add_up(100, SAVED, stopped, began=1063.0)
    assert lost.sentence(100) == (
        "the run was down for 1.0 min, and no step must be taken again; its end: stopped: asked to (exit code 75)"
    )
    assert (spent.steps, spent.repeated, spent.down) == (600.0, 20.0, 90.0)


def test_a_start_of_a_run_that_was_done_loses_nothing_and_was_not_down():
    spent, lost = add_up(137, SAVED, dataclasses.replace(DIED, words=life.DONE), began=9000.0)
    assert lost is None and spent == dataclasses.replace(DIED.spent, at=9000.0)


def test_the_first_start_and_one_from_a_checkpoint_of_an_early_version_begin_to_count():
    assert add_up(0, None, None, began=5.0) == (Spent(at=5.0), None)


def test_a_run_that_lost_its_folder_counts_on_from_its_checkpoint():
    for last in (None, Life(0, Spent(at=900.0, steps=3.0))):
        spent, lost = add_up(100, SAVED, last, began=1100.0)
        assert (lost.steps, lost.seconds, lost.down, spent.steps) == (0, 0.0, 100.0, 600.0)


def test_a_clock_that_was_set_back_takes_no_time_away():
    spent, lost = add_up(100, SAVED, DIED, began=10.0)
    assert lost.down == 0.0 and spent.total == DIED.spent.total and spent.at == DIED.spent.at


def test_what_a_failed_start_repeated_is_counted_once(tmp_path):
    write(tmp_path, DIED)
    first, lost = life.take_up(tmp_path, 100, SAVED)
    second, again = life.take_up(tmp_path, 100, SAVED)  # the first failed before its first step
    assert (lost.steps, lost.seconds, again.steps, again.seconds) == (37, 480.0, 0, 0.0)
    assert second.repeated == first.repeated == 500.0


def test_a_start_that_is_stopped_before_its_metrics_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(exits, "at_end", None)
    life.take_up(tmp_path, 0, None)
    exits.write_last_words("stopped: asked by a signal", 75)
    assert life.take_up(tmp_path, 0, None)[1].words == "stopped: asked by a signal (exit code 75)"


def test_what_is_written_is_read_back_and_the_last_words_are_one_line(tmp_path):
    write(tmp_path, dataclasses.replace(DIED, words="Traceback:\n  a file\nValueError: \x1b[2J"))
    assert read(tmp_path) == dataclasses.replace(DIED, words="ValueError: \\x1b[2J")
    assert [path.name for path in tmp_path.iterdir()] == ["life.json"]


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 70_000, '{"step": -1}', '{"step": 1, "spent": {"steps": NaN}}'])
def test_a_damaged_file_is_none(tmp_path, text):
    (tmp_path / "life.json").write_text(text)
    assert read(tmp_path) is None


def test_no_link_is_followed_and_a_fifo_is_not_waited_for(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text(json.dumps(dataclasses.asdict(DIED)))
    (tmp_path / "run").mkdir()
    for name in ("life.json", "life.json.part"):
        (tmp_path / "run" / name).symlink_to(outside)
    assert read(tmp_path / "run") is None
    write(tmp_path / "run", Life(1, SAVED))
    assert json.loads(outside.read_text())["step"] == 137 and read(tmp_path / "run").step == 1
    (tmp_path / "run" / "life.json").unlink()
    os.mkfifo(tmp_path / "run" / "life.json")
    assert read(tmp_path / "run") is None


def test_a_full_disk_stops_no_run(tmp_path):
    write(tmp_path / "is not there", DIED)


def test_every_second_belongs_to_one_part(monkeypatch):
    now = [50.0]
    monkeypatch.setattr("ted_scale.metrics.goodput.time.monotonic", lambda: now[0])
    monkeypatch.setattr("ted_scale.metrics.goodput.time.time", lambda: 1000.0 + now[0])
    ledger = Ledger(dataclasses.replace(SAVED, at=1045.0))  # the process began 5 s ago

    def pass_(seconds):
        now[0] += seconds

    pass_(10), ledger.turn("steps"), pass_(100)
    with ledger.within("checkpoints"):
        pass_(1)
        at_save = ledger.spent()
    pass_(40)
    with ledger.within("validation"):
        pass_(3)
    ledger.undo(at_save)  # a loss spike: back to the checkpoint
    pass_(20)
    spent = ledger.spent()
    assert [getattr(spent, part) for part in PARTS] == [720.0, 75.0, 13.0, 6.0, 60.0, 30.0, 0.0]
    assert spent.total == SAVED.total + 5 + 10 + 100 + 1 + 40 + 3 + 20
    assert sum(ledger.shares().values()) == pytest.approx(1.0)


def test_times_that_no_run_can_have_are_no_times(tmp_path):
    """A sum of them was infinite, and a checkpoint with it could not be resumed."""
    huge = dataclasses.asdict(Life(1, dataclasses.replace(SAVED, steps=1.7e308, repeated=1.7e308)))
    (tmp_path / life.NAME).write_text(json.dumps(huge))
    assert read(tmp_path) is None


def test_a_kill_in_the_first_steps_after_a_save_is_not_said_to_cost_nothing():
    """life.json is written every ten seconds, so what was taken since is not known."""
    killed = life.Lost(0, 0.0, 0.0, life.KILLED).sentence(10)
    assert "what it took in its last 10 s must be taken again" in killed and "no step" not in killed
