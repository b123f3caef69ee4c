"""How ranks end together: pairs of real ranks, each pair with another fault, and the protocol between two watches."""

import contextlib
import inspect
import itertools
import json
import logging
import logging.handlers
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from places import HARNESS

from ted_scale.base import exits, progress
from ted_scale.base.errors import FAULT, GONE, HUNG, MEMORY, MISTAKE, RESUME, Gone, Preempted
from ted_scale.config.operation import Limits
from ted_scale.ranks import pulse, watch
from ted_scale.ranks import signals as stop

SCRIPT = HARNESS / "watched_ranks.py"


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """By fault: the exit codes of both ranks, the seconds from the fault to each exit, and what they printed."""
    folder = tmp_path_factory.mktemp("ends")
    command = [sys.executable, str(SCRIPT), str(folder), "deepspeed.launcher.none"]
    subprocess.run(command, check=True, timeout=400)
    found = {}
    for name, result in json.loads((folder / "results.json").read_text()).items():
        at = folder / f"{name}.at"
        began = float(at.read_text()) if at.exists() else 0.0
        took = [left and left - began for left in result["left"]]
        said = re.sub(r"^\[W\d.*\n", "", (folder / f"{name}.err").read_text(), flags=re.MULTILINE)  # torch's, of DNS
        found[name] = (result["codes"], took, said)
    return found, folder


def test_a_rank_that_fails_ends_all_and_its_traceback_is_printed_once_and_last(ends):
    codes, took, said = ends[0]["raise"]
    assert codes == [FAULT, FAULT]
    assert max(took) < 6
    assert said.count("Traceback") == said.count("what really went wrong\n") == 1
    assert said.startswith("rank 1: Traceback")
    assert said.rstrip().endswith("ValueError: what really went wrong")


def test_a_rank_s_sentence_ends_all_with_its_code(ends):
    codes, took, said = ends[0]["sentence"]
    assert codes == [MISTAKE, MISTAKE]
    assert max(took) < 6
    assert said == "rank 1: error: a file must be there, but is not\n"


def test_a_rank_that_runs_out_of_memory_alone_ends_all_with_that_cause_and_a_code_of_its_own(ends):
    codes, took, said = ends[0]["memory"]
    assert codes == [MEMORY, MEMORY]
    assert max(took) < 9
    assert said == (
        "rank 1: error: a rank's memory must hold step 10, but does not (DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 4611686018427387904 bytes. Error code 12 (Cannot allocate memory)); lower something\n"
    )


@pytest.mark.parametrize(("name", "rank"), [("die", 1), ("die0", 0)])
def test_a_rank_that_is_killed_is_named_and_all_end(ends, name, rank):
    codes, took, said = ends[0][name]
    assert sorted(codes) == [-9, GONE] and codes[rank] == -9
    assert max(took) < 15
    assert "Traceback" not in said
    assert (
        said.rstrip()
        .splitlines()[-1]
        .startswith(f"error: rank {rank} must send a heartbeat at least every limits.silence_s")
    )


def test_a_hang_shows_the_stacks_of_both_ranks_and_where_each_was(ends):
    codes, took, said = ends[0]["hang"]
    folder = ends[1] / "hang" / "stacks"
    assert codes == [HUNG, HUNG]
    assert max(took) < 4 + 6
    for rank, line in ((0, "all_reduce"), (1, "in fault")):
        assert any(text.startswith(f"rank {rank}| ") and line in text for text in said.splitlines()), said
        assert line in (folder / f"rank_{rank}.txt").read_text()
    last = said.rstrip().splitlines()[-1]
    assert last.startswith("error: step 10 must end within limits.step_s (4 s), but did not: rank")


def test_a_rank_that_keeps_python_s_lock_is_silent_to_the_others_and_the_alarm_ends_it(ends):
    codes, took, said = ends[0]["lock"]
    assert codes == [GONE, -14]
    assert took[0] < 30 and took[1] < 40
    assert "error: rank 1 must send a heartbeat" in said
    assert "in fault" in said  # its stack, written without the lock


def test_a_run_that_is_suspended_for_longer_than_any_limit_of_silence_goes_on(ends):
    codes, _, said = ends[0]["suspended"]
    assert codes == [0, 0], said
    assert "must send a heartbeat" not in said


@pytest.mark.parametrize("name", ["signal", "orphan"])
def test_a_signal_to_one_rank_or_the_end_of_the_launcher_stops_all_after_a_step(ends, name):
    codes, took, said = ends[0][name]
    assert codes == [RESUME, RESUME]
    assert max(took) < 8
    assert said == f"stopped: {Preempted.SENTENCE}\n"


def test_ctrl_c_prints_the_newest_checkpoint_and_stops_all_after_a_step_and_a_second_one_does_not_wait(ends):
    """It used to print a traceback under `deepspeed`, and not what was saved."""
    codes, took, said = ends[0]["interrupt"]
    assert codes == [RESUME, RESUME]
    assert max(took) < 8
    first, last = said.splitlines()
    assert re.match(
        r"interrupted in step 1\d of 1,000, which is finished and saved first: wait for the line 'stopped'; a second Ctrl-C",
        first,
    )
    assert first.endswith("then there is no checkpoint yet; the same command goes on")
    assert last == f"stopped: {Preempted.SENTENCE}"
    handle = stop.interrupt_at_the_second(itertools.count())
    handle(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        handle(signal.SIGINT, None)


def test_a_signal_before_the_first_step_ends_all_at_once(ends):
    codes, took, said = ends[0]["early"]
    assert codes == [RESUME, RESUME]
    assert max(took) < 6
    assert said == f"rank 1: stopped: {Preempted.BEFORE}\n"


def test_ranks_that_are_done_exit_and_print_nothing(ends):
    codes, _, said = ends[0]["none"]
    assert (codes, said) == ([0, 0], "")


class Left(SystemExit):
    """Ends a thread in the place of the process."""


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Two watches over one real store, what they print, and their exit codes."""
    monkeypatch.setattr(watch, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(watch, "GRACE_S", 0.5)
    monkeypatch.setattr(pulse, "now", pulse.Pulse("step 7", time.monotonic(), first=False, unsaved=True))
    monkeypatch.setattr(stop, "asked", threading.Event())
    server = dist.TCPStore("127.0.0.1", 0, 2, True, timeout=timedelta(seconds=10), wait_for_workers=False)
    left, said, watches = {}, [], []

    def leaver(rank):
        def leave(code):
            left[rank] = code
            raise Left(code)

        return leave

    for rank in (0, 1):
        client = dist.TCPStore(
            "127.0.0.1", server.port, 2, False, timeout=timedelta(seconds=10), wait_for_workers=False
        )
        limits = Limits.model_construct(step_s=30.0, start_s=60.0, silence_s=0.6)
        made = watch.Watch(client, rank, 2, limits, tmp_path, leave=leaver(rank), speak=said.append)
        made.store.set(f"heartbeat/{rank}", "0")
        watches.append(made)
    yield watches, left, said, server
    for made in watches:
        made.closed.set()


def meeting(made) -> threading.Thread:
    def until_it_leaves():
        with contextlib.suppress(Left):
            made.meet_others()

    thread = threading.Thread(target=until_it_leaves)
    thread.start()
    return thread


def watched(*watches) -> None:
    """Let them meet until all of them have exited."""
    for thread in [meeting(made) for made in watches]:
        thread.join(10)
        assert not thread.is_alive()


def test_only_a_silent_rank_is_named(pair):
    watches, left, said, _ = pair
    watched(watches[0])
    assert left == {0: GONE}
    assert len(said) == 1 and said[0].startswith("error: rank 1 must send a heartbeat")


def test_a_store_that_does_not_answer_is_silent_only_after_the_ranks_have_met(pair, monkeypatch):
    """Before, it may wait for DNS, once for each rank that comes: every rank took rank 0 for dead, and no start came to its end."""
    monkeypatch.setattr(watch, "set_alarm", lambda seconds: None)
    monkeypatch.setattr(watch.faulthandler, "dump_traceback_later", lambda seconds: None)
    watches, left, said, _ = pair

    def until_it_leaves():
        with contextlib.suppress(Left):
            watches[1].watch_itself()

    thread = threading.Thread(target=until_it_leaves)
    thread.start()
    thread.join(1.5)
    assert thread.is_alive() and not left and not said
    watches[1].all_have_met = True
    thread.join(5)
    assert left == {1: GONE}
    assert len(said) == 1 and said[0].startswith("error: rank 0 must send a heartbeat")


def test_a_rank_that_has_exited_is_not_silent(pair):
    watches, left, said, _ = pair
    watches[1].close()
    thread = meeting(watches[0])
    thread.join(1.5)
    assert thread.is_alive() and not left and not said
    watches[0].closed.set()
    thread.join(5)


def test_a_failure_while_a_rank_is_dead_is_reported_as_its_echo(pair):
    watches, left, said, _ = pair
    with pytest.raises(Left):
        watches[0].end("Traceback (most recent call last):\n  ...\nRuntimeError: Connection closed by peer\n", FAULT)
    assert left == {0: GONE}
    assert said[0].startswith(
        "rank 0 met: RuntimeError: Connection closed by peer\nerror: rank 1 must send a heartbeat"
    )


def test_a_rank_of_another_run_at_this_port_does_not_send_our_heartbeats(pair):
    watches, left, said, _ = pair
    watches[1].store.set("heartbeat/1", "another host 17")
    with pytest.raises(Gone, match=r"MASTER_PORT must be free on rank 0's node.*`deepspeed --master_port \d+ …`"):
        watch.patiently(watches[1].begin, 0.1)
    assert watches[0].store.get("heartbeat/1") == b"another host 17" and not left and not said


def test_the_first_claim_wins_and_the_other_rank_prints_nothing(pair):
    watches, left, said, _ = pair
    other = meeting(watches[0])
    with pytest.raises(Left):
        watches[1].end("Traceback ...\nValueError: first\n", FAULT)
    other.join(5)
    assert left == {0: FAULT, 1: FAULT}
    assert said == ["rank 1: Traceback ...\nValueError: first\n"]


def test_a_signal_that_is_the_echo_of_a_rank_that_died_names_the_rank(pair):
    """DeepSpeed's launcher sends SIGTERM to all ranks when one has died, and without unsaved steps they would exit at once."""
    watches, left, said, _ = pair
    pulse.put(pulse.Pulse("the build of stage student", time.monotonic(), first=True, unsaved=False))
    stop.asked.set()
    watched(watches[0])
    assert left == {0: GONE}
    assert said[0].startswith(f"rank 0 met: stopped: {Preempted.BEFORE}\nerror: rank 1 must send a heartbeat")


def test_a_reason_is_printed_before_deepspeed_s_launcher_kills_the_others():
    from deepspeed.launcher.launch import terminate_process_tree

    kills_after_s = float(re.search(r"timeout=(\d+)", inspect.getsource(terminate_process_tree))[1])
    looks = watch.HEARTBEATS_A_LOOK + watch.FRESH_LOOK
    assert Limits().silence_s + (looks + 3) * watch.HEARTBEAT_S < kills_after_s


def test_a_secret_in_a_traceback_is_in_no_log(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-in-a-traceback")
    watches, _, said, _ = pair
    handler = logging.FileHandler(tmp_path / "log.txt")
    monkeypatch.setattr(logging.getLogger("ted_scale"), "handlers", [handler])
    other = meeting(watches[0])
    with pytest.raises(Left):
        watches[1].end("Traceback ...\nValueError: denied for planted-in-a-traceback\n", FAULT)
    other.join(5)
    handler.close()
    assert said == ["rank 1: Traceback ...\nValueError: denied for ***\n"]
    assert (tmp_path / "log.txt").read_text().count("denied for ***") == 1


def test_a_log_file_that_does_not_answer_holds_up_no_exit(pair, monkeypatch):
    """A hang is often one of the file system that the log is on. Rank 0 stayed until the others called it silent."""
    watches, left, said, _ = pair
    answers = threading.Event()
    monkeypatch.setattr(exits, "at_end", lambda words: answers.wait(10))
    began = time.monotonic()
    with pytest.raises(Left):
        watches[0].end("error: step 7 must end within limits.step_s (30 s), but did not", HUNG, [1])
    answers.set()
    assert left == {0: HUNG} and len(said) == 2 and time.monotonic() - began < 3


def test_two_threads_of_a_rank_that_end_it_at_once_print_one_reason(pair):
    watches, left, said, _ = pair
    watches[1].close()
    stop.asked.set()
    pulse.building("stage II")
    with pytest.raises(Left):
        watches[0].end(f"stopped: {Preempted.SENTENCE}", RESUME)
    other = threading.Thread(target=watches[0].round)
    other.start()
    other.join(10)
    assert left == {0: RESUME} and len(said) == 1


@pytest.mark.parametrize(
    ("first", "key"),
    [(False, "end within limits.step_s (0.3 s)"), (True, "end or read on within limits.start_s (0.9 s)")],
)
def test_a_step_has_its_limit_and_a_first_step_a_longer_one(pair, first, key, monkeypatch):
    watches, left, said, _ = pair
    for made in watches:
        made.limits = Limits.model_construct(step_s=0.3, start_s=0.9, silence_s=10.0)
    monkeypatch.setattr(pulse, "now", pulse.Pulse("step 8", time.monotonic(), first=first, unsaved=True))
    began = time.monotonic()
    watched(*watches)
    assert left == {0: HUNG, 1: HUNG}
    assert time.monotonic() - began > (0.9 if first else 0.3)
    assert f"error: step 8 must {key}, but did not: ranks 0, 1 in no line of ted_scale" in said[-1]


def test_a_start_that_reads_on_goes_on_and_is_logged_and_one_that_stands_still_ends_and_names_what_is_read(
    pair, monkeypatch
):
    """By any rank: here it is rank 1, for which rank 0 waits. It ended after start_s, at each start again."""
    watches, left, said, _ = pair
    monkeypatch.setattr(watch, "TOLD_S", 0.5, raising=False)
    monkeypatch.setattr(progress, "total", 0)  # what earlier tests of this process have read
    lines = logging.handlers.BufferingHandler(1000)
    monkeypatch.setattr(logging.getLogger("ted_scale"), "handlers", [lines])
    monkeypatch.setattr(logging.getLogger("ted_scale"), "level", logging.INFO)
    watches[0].limits = Limits.model_construct(step_s=0.1, start_s=0.5, silence_s=10.0)
    pulse.building("start-up")
    thread = meeting(watches[0])

    def beat(total: int) -> None:
        time.sleep(0.1)
        beat.number += 1
        watches[1].store.set("heartbeat/1", json.dumps([beat.number, total, "/runs/a/rank_00001.safetensors"]))

    beat.number = 0
    for piece in range(20):
        beat(piece * 1_000_000)
    assert not left
    while thread.is_alive():
        beat(20_000_000)
    assert left == {0: HUNG}
    assert "start-up must end or read on within limits.start_s (0.5 s), but did not while rank 1 reads " in said[-1]
    assert "reads /runs/a/rank_00001.safetensors (20.0 MB so far): rank" in said[-1]
    told = [record.getMessage() for record in lines.buffer]
    assert re.fullmatch(
        r"start-up goes on: \d\.0 MB read, \d+\.\d MB/s; "
        r"rank 1 reads /runs/a/rank_00001.safetensors \(\d\.0 MB so far\), \d+\.\d MB/s",
        told[0],
    )


def rounds(count: int, *watches) -> None:
    """The ranks in turn, as if the others stood still."""
    for made in watches * count:
        time.sleep(0.02)
        made.round()


def test_a_pause_of_the_whole_run_is_nobody_s_silence(pair):
    watches, left, said, _ = pair
    rounds(8, *watches)
    rounds(6, watches[0])  # it has seen the other's last heartbeat
    time.sleep(2 * watches[0].limits.silence_s)
    rounds(6, watches[0])  # before the other has gone on
    rounds(8, *watches)
    assert not left and not said
    with pytest.raises(Left):
        rounds(100, watches[0])
    assert said[0].startswith("error: rank 1 must send a heartbeat")


def test_a_rank_that_looks_silent_is_looked_at_once_more(pair):
    watches, left, said, _ = pair
    rounds(8, *watches)
    while not watches[0].doubted:
        rounds(1, watches[0])
    rounds(1, *watches[::-1])
    assert not watches[0].doubted and not left and not said


def test_a_signal_ends_all_at_once_only_while_nothing_is_unsaved(pair):
    watches, left, said, _ = pair
    stop.asked.set()
    for made in watches:
        made.round()
    assert not left
    pulse.building("stage II")
    watched(*watches)
    assert left == {0: RESUME, 1: RESUME}
    assert len(said) == 1


def test_a_first_step_is_the_first_after_building():
    before = pulse.now
    pulse.building("stage I")
    seen = []
    for number in (1, 2):
        pulse.doing("a batch of validation")
        pulse.step(number)
        seen.append((pulse.now.first, pulse.now.unsaved))
    pulse.put(before)
    assert seen == [(True, True), (False, True)]
