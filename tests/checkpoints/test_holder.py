"""One process has a run, also where flock holds on one node only."""

import errno
import os
import random
import signal
import threading
import time

import nodes
import pytest
from nodes import LEASE_S, start

from ted_scale.base import processes
from ted_scale.base.errors import GONE, Gone, UserError
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints import holder
from ted_scale.commands import checkpoints as tool


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(holder, "RENEWAL_S", nodes.RENEWAL_S)
    monkeypatch.setattr(holder, "LEASE_S", LEASE_S)
    monkeypatch.setattr(holder, "held", {})  # which ends the threads of other tests, and at the end its own
    files.checkpoints_of(tmp_path / "run").mkdir(parents=True)
    return tmp_path / "run"


def test_of_two_starts_on_two_nodes_the_second_is_refused_until_the_first_has_left(folder):
    first = start(folder, "one")
    assert first.said == "held"
    second = start(folder, "two")
    assert second.said == (
        f"runs must be used by one process at a time, but process {first.pid} on one is using {folder}; wait for it, or give "
        "this run another name"
    )
    assert second.code() == GONE
    assert first.leave() == 0
    third = start(folder, "two", lease_s=60)
    assert third.said == "held"
    assert "waiting" not in third.err.read_text()
    third.kill()


def test_a_process_that_was_killed_on_this_node_is_replaced_at_once(folder):
    first = start(folder, "one")
    assert first.said == "held"
    first.kill()
    second = start(folder, "one", lease_s=60)
    assert second.said == "held"
    assert "waiting" not in second.err.read_text()
    second.kill()


def test_a_process_that_died_with_its_node_is_replaced_when_its_lease_has_ended(folder):
    first = start(folder, "one")
    assert first.said == "held"
    first.kill()
    began, second = time.monotonic(), start(folder, "two")
    assert second.said == "held"
    assert LEASE_S <= time.monotonic() - began < 3 * LEASE_S + 2
    said = f"waiting for up to {LEASE_S:g} s: process {first.pid} on one used {folder} and may go on"
    assert second.err.read_text().count(said) == 1
    second.kill()


def test_a_process_that_slept_and_was_replaced_ends_with_a_sentence(folder):
    first = start(folder, "one")
    assert first.said == "held"
    first.send(signal.SIGSTOP)
    second = start(folder, "two")
    assert second.said == "held"
    first.send(signal.SIGCONT)
    assert first.code() == GONE
    assert f"process {second.pid} on two has taken {folder} over, because this one gave no" in first.err.read_text()
    assert second.leave() == 0


@pytest.mark.long  # starts many processes
@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.soak)])
@pytest.mark.parametrize("last", ["none", "dead", "left"])
def test_of_many_starts_at_once_exactly_one_has_the_run(folder, last, rounds):
    for seed in range(rounds):
        if last != "none":
            before = start(folder, "one")
            assert before.said == "held"
            before.kill() if last == "dead" else before.leave()
        rngs = [random.Random(seed * 10 + number) for number in range(4)]
        starts = [start(folder, "one", lease_s=5, slow=lambda rng=rng: time.sleep(rng.random() * 0.01)) for rng in rngs]
        said = [one.said for one in starts]
        assert said.count("held") == 1, said
        time.sleep(3 * nodes.RENEWAL_S)  # for one that was replaced to notice
        starts[said.index("held")].kill()  # it lives until now
        for one, words in zip(starts, said, strict=True):
            assert words == "held" or one.code() == GONE


def test_a_start_that_slept_after_its_look_does_not_disturb_those_that_came_meanwhile(folder, monkeypatch):
    dead = start(folder, "one")
    assert dead.said == "held"
    dead.kill()
    when_free, came = holder.when_free, []

    def late(*arguments):
        found = when_free(*arguments)
        monkeypatch.setattr(holder, "when_free", when_free)
        for _ in range(2):
            came.append(start(folder, "one"))
            assert came[-1].said == "held"
            if len(came) == 1:
                came[-1].leave()
        return found

    monkeypatch.setattr(holder, "when_free", late)
    monkeypatch.setattr(processes, "this_kernel", lambda: "one")
    with pytest.raises(Gone) as refused:
        holder.take(folder)
    assert f"process {came[1].pid} on one is using {folder}" in str(refused.value)
    assert holder.numbers(folder) == [3]
    time.sleep(3 * nodes.RENEWAL_S)
    assert came[-1].leave() == 0


@pytest.mark.parametrize("fails", [False, True], ids=["pauses", "fails"])
def test_a_file_system_that_pauses_or_fails_ends_no_run(folder, monkeypatch, caplog, fails):
    passes, met, write = threading.Event(), threading.Event(), holder.write

    def trouble(*arguments, **named):
        met.set()
        if fails and not passes.is_set():
            raise OSError(errno.EIO, "Input/output error")
        passes.wait()
        write(*arguments, **named)

    holder.take(folder)
    monkeypatch.setattr(holder, "write", trouble)
    assert met.wait(5)
    time.sleep(2 * LEASE_S)
    passes.set()
    renewed = holder.newest(folder)
    time.sleep(4 * nodes.RENEWAL_S)
    assert holder.newest(folder).holder.renewals > renewed.holder.renewals
    assert caplog.text.count("was not renewed, and is tried again: [Errno 5]") == fails
    holder.confirm(folder)
    assert "is using" in start(folder, "two").said


def test_a_look_that_takes_long_begins_the_lease_anew(folder, monkeypatch):
    """The file server paused; perhaps the other process could not renew."""
    looks, found = [], holder.Found(1, None)

    def look(_):
        looks.append(time.monotonic())
        if len(looks) == 3:
            time.sleep(LEASE_S)
        return found

    monkeypatch.setattr(holder, "look", look)
    assert holder.unrenewed(folder, found) == found
    assert time.monotonic() - looks[2] >= 2 * LEASE_S


@pytest.mark.parametrize("kind", ["junk", "long", "a link", "a pipe", "a folder"])
def test_what_is_no_record_is_one_sentence(folder, tmp_path, kind):
    path, other = folder / "holder_00000007.json", tmp_path / "other"
    other.write_text("mine")
    makers = {"a link": lambda: path.symlink_to(other), "a pipe": lambda: os.mkfifo(path), "a folder": path.mkdir}
    texts = {"junk": '{"pid": 1}', "long": "[" * 10**6}
    makers.get(kind, lambda: path.write_text(texts[kind]))()
    what = kind if kind in makers else "not one"
    with pytest.raises(UserError, match=f"{path} must be the record of the process .* but is {what}; remove it if no"):
        holder.take(folder)
    assert other.read_text() == "mine"


def test_a_record_whose_process_was_killed_before_it_wrote_it_is_passed_over(folder):
    (folder / "holder_00000007.json").touch()
    holder.take(folder)
    assert holder.numbers(folder) == [8]


def test_a_run_s_folder_that_was_copied_is_not_in_use(folder, tmp_path):
    first = start(folder, "one")
    assert first.said == "held"
    copy = tmp_path / "copy"
    files.checkpoints_of(copy).mkdir(parents=True)
    (copy / "holder_00000001.json").write_bytes((folder / "holder_00000001.json").read_bytes())
    second = start(copy, "one")
    assert second.said == "held"
    second.kill()
    assert first.leave() == 0


def test_nothing_is_pruned_while_a_process_on_another_node_has_the_run(folder):
    (files.checkpoints_of(folder) / "step_00000004.part").mkdir()
    first = start(folder, "one")
    assert first.said == "held"
    with pytest.raises(Gone, match=f"but process {first.pid} on one is using {folder}; wait for it"):
        tool.main([str(folder), "prune", "--yes"])
    assert len(list(files.checkpoints_of(folder).glob("*.part"))) == 1
    assert first.leave() == 0
    tool.main([str(folder), "prune", "--yes"])
    assert not list(files.checkpoints_of(folder).glob("*.part"))


def test_the_kernel_s_word_on_processes_is_believed():
    me = processes.this_process()
    assert not processes.is_gone(me)
    assert processes.is_gone(me._replace(began=me.began + 1))  # its pid was given again
    assert not processes.is_gone(me._replace(kernel="another", pid=2**31 - 1))
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    dead = me._replace(pid=child, began=processes.state_of(child)[1])
    assert processes.is_gone(dead)  # a zombie
    os.waitpid(child, 0)
    assert processes.is_gone(dead)


def test_a_record_that_is_gone_since_the_listing_is_listed_anew(folder, monkeypatch):
    """A start that loses a race removes its number while others look."""
    listings = iter(([1, 2], [1]))
    monkeypatch.setattr(holder, "numbers", lambda _: next(listings))
    holder.make(holder.path_of(folder, 1), holder.Holder("one", "kernel", 1, 1, "token"))
    assert holder.newest(folder).number == 1
