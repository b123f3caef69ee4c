"""When checkpoints are copied: no save waits, the newest one waits for its turn, and the end of a run waits for the last."""

import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import test_saver
from test_copies import copied, saver_of, write
from test_saver import Run, one_rank  # noqa: F401 - a fixture of this module, too

from ted_scale.base import progress, sealed
from ted_scale.base.errors import Gone, UserError
from ted_scale.checkpoints import copier, copies, owner
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints import saver as saving
from ted_scale.checkpoints.progress import Progress
from ted_scale.ranks import pulse


@pytest.fixture
def slow(monkeypatch):
    """A network that sends nothing until this is set."""
    free, send = threading.Event(), copies.send

    def slowly(*arguments):
        assert free.wait(60)
        send(*arguments)

    monkeypatch.setattr(copies, "send", slowly)
    return free


def test_while_a_copy_is_under_way_the_newest_checkpoint_waits_for_its_turn_and_stays(
    endpoint, run, tmp_path, slow, caplog
):
    """And no save waits. The checkpoints between get no copy, which is reported."""
    saver = saver_of(run, tmp_path)
    for step in (4, 8, 12, 16):
        assert test_saver.write(saver, step) is None
    assert sorted(s.step for s in files.published(run.folder)) == [4, 12, 16]
    slow.set()
    saver.finish()
    saver.copier.copy_newest_or_fail()
    assert copied(endpoint, run).keys() == {"step_00000004", "step_00000016"}
    for step in (8, 12):
        assert caplog.text.count(f"step_{step:08d} has no copy; the run goes on: a newer checkpoint came") == 1
    assert write(saver, 20) is None
    assert sorted(s.step for s in files.published(run.folder)) == [16, 20]
    assert copied(endpoint, run).keys() == {"step_00000016", "step_00000020"}


def test_a_run_that_leaves_waits_for_a_copy_but_not_for_long(run, tmp_path, slow, monkeypatch):
    monkeypatch.setattr(copier, "LEAVING_S", 0.2)
    saver = saver_of(run, tmp_path)
    assert test_saver.write(saver, 4) is None
    saver.copier.finish(leaving=True)
    assert saver.copier.is_copying()
    slow.set()
    # A busy machine copies slowly; a copy that is done ends the wait at once.
    monkeypatch.setattr(copier, "LEAVING_S", 60.0)
    saver.copier.finish(leaving=True)
    assert not saver.copier.is_copying()


@pytest.mark.parametrize("error", [Gone, UserError])
def test_a_run_whose_last_checkpoint_has_no_copy_is_not_done(run, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error("checkpoint x must be written, but is not")

    saver = saver_of(run, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(copies, "send", fail)
        assert write(saver, 4) is None
        with pytest.raises(
            error, match=r"copy_to must hold the run's last checkpoint, but does not: checkpoint x must"
        ):
            saver.copier.copy_newest_or_fail()
    assert write(saver, 8) is None
    saver.copier.copy_newest_or_fail()


def test_a_start_copies_its_checkpoint_if_it_has_no_whole_copy_of_the_same_bytes(endpoint, run, tmp_path, monkeypatch):
    saver = saver_of(run, tmp_path)
    place, saver.copier.place = saver.copier.place, ""
    assert write(saver, 4) is None
    newest = files.newest_checkpoint(run.folder)
    for harm in ("none is there", "an object is lost", "it is of other bytes"):
        if harm == "an object is lost":
            key = f"{place.removeprefix('s3://bucket/')}/{newest.name}/rank_00000.safetensors"
            endpoint.client().delete_object(Bucket="bucket", Key=key)
        if harm == "it is of other bytes":
            other = Run(tmp_path / "other" / run.name, copy_to="s3://bucket/runs/")
            other.folder.mkdir(parents=True)
            shutil.copy(run.folder / owner.OWNER, other.folder)  # the same run
            saver = saver_of(other, tmp_path)
            place_of, saver.copier.place = saver.copier.place, ""
            saver.begin(saving.Save(other.folder / "checkpoints" / newest.name, test_saver.state(5), Progress(4), True))
            saver.wait()
            saver.copier.place = place_of
            saver.copier.begin_again(files.newest_checkpoint(other.folder))
            saver.copier.copy_newest_or_fail()
        saver = saver_of(run, tmp_path)
        saver.copier.begin_again(newest)
        saver.copier.copy_newest_or_fail()
        there = copies.copy_of(place, newest.name)
        assert there.is_whole and there.manifest == sealed.read_manifest(newest), harm
    monkeypatch.setattr(copies, "send", None)  # nothing is missing
    saver.copier.begin_again(newest)
    saver.copier.copy_newest_or_fail()


class Meeting:
    """Stands for the collectives of ranks that are threads: a group is a rank's number."""

    def __init__(self, ranks: int):
        self.barrier, self.values = threading.Barrier(ranks), [None] * ranks

    def gather(self, mine, rank: int) -> list:
        self.values[rank] = mine
        self.barrier.wait(20)
        everyone = list(self.values)
        self.barrier.wait(20)
        return everyone


def test_ranks_copy_the_same_checkpoints_in_the_same_order_whoever_is_slow(run, tmp_path, monkeypatch):
    meeting, rng, sent = Meeting(3), random.Random(0), [[], [], []]
    monkeypatch.setattr(copier, "gather", meeting.gather)
    monkeypatch.setattr(
        copier, "first_of_all", lambda fault, rank: next(filter(None, meeting.gather(fault, rank)), None)
    )
    monkeypatch.setattr(owner, "renew", lambda run: None)
    monkeypatch.setattr(copies, "make_way", lambda *_: True)
    monkeypatch.setattr(copies, "prune", lambda *_: None)
    monkeypatch.setattr(copies, "send", lambda at, place, names: time.sleep(rng.random() / 50))
    ranks = []
    for rank in range(3):
        monkeypatch.setattr(copier.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(copier, "new_group", lambda rank=rank: rank)
        ranks.append(copier.Copier(run, lambda *_: None))
        copy = ranks[-1].copy
        ranks[-1].copy = lambda task, copy=copy, rank=rank: (sent[rank].append(task.checkpoint.name), copy(task))[1]
    for step in range(40):
        for rank in rng.sample(ranks, 3):
            rank.begin(Path(f"step_{step:08d}"), ["a"])
            time.sleep(rng.random() / 100)
        assert f"step_{step:08d}" in ranks[0].needed() or sent[0][-1] == f"step_{step:08d}"
    for rank in ranks:
        rank.copy_newest_or_fail()
    assert sent[0] == sent[1] == sent[2] and sent[0][-1] == "step_00000039" and 10 < len(sent[0]) < 40


def test_a_copy_whose_thread_ended_before_it_began_is_none(endpoint, run, tmp_path, monkeypatch, caplog):
    """After one that succeeded: a connection between ranks is reset, and no rank has died."""
    saver = saver_of(run, tmp_path)
    assert write(saver, 4) is None

    def reset(*_):
        raise RuntimeError("Connection reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(copier, "gather", reset)
        assert write(saver, 8) is None
        with pytest.raises(
            Gone, match=r"must hold the run's last checkpoint, but does not: its copy was interrupted; it is"
        ):
            saver.copier.copy_newest_or_fail()
    assert "nothing is copied until the next checkpoint: RuntimeError('Connection reset" in caplog.text
    assert write(saver, 12) is None
    saver.copier.copy_newest_or_fail()
    assert "step_00000012" in copied(endpoint, run)


def test_who_waits_for_a_copy_is_judged_by_what_the_ranks_read(run, tmp_path, slow):
    """It gave a new sign of life each second, so that no limit ended a copy that stood still."""
    saver = saver_of(run, tmp_path)
    assert test_saver.write(saver, 4) is None
    waiting = threading.Thread(target=saver.copier.finish)
    waiting.start()
    end = time.monotonic() + 10
    while (stands := pulse.now).what != "the copy of step_00000004" and time.monotonic() < end:
        time.sleep(0.05)
    assert (stands.what, stands.first) == ("the copy of step_00000004", True)
    time.sleep(1.2)
    assert pulse.now is stands
    before = progress.total
    slow.set()
    waiting.join(20)
    assert progress.total - before >= (run.folder / "checkpoints/step_00000004/rank_00000.safetensors").stat().st_size
