"""Every rank watches itself and the others, and all end together: hung, dead or failed, soon and with the reason last.

Two daemon threads and the store that the ranks meet in; train.py only says where it is (pulse.py). There is one way to
end: a rank claims the end, the others note that they have seen it and where they were, the claimant speaks, all leave with
its code. Why heartbeats over the store: docs/design/0021-heartbeats-over-the-store.md. The surprise: the main thread may
be stuck anywhere, with Python's lock in its hand, so the kernel's alarm ends a process whose threads do not run at all.
"""

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

from ted_scale.base import exits, redact
from ted_scale.base.errors import FAULT, GONE, HUNG, RESUME, Gone, Preempted
from ted_scale.base.exits import leave, speak
from ted_scale.ranks import pulse, signals

BEAT_S = 1.0
ROUNDS_A_LOOK = 5  # rank 0 reads everyone's beat every so many of its own
GRACE_S = 10.0  # for what every rank still has to do when the end is claimed
MEETING_S = 600.0  # nodes do not start at the same moment
HERE = f"{Path(__file__).parents[1]}{os.sep}"

current: "Watch | None" = None


def start(limits, folder: Path) -> None:
    """Before the process group, so that its making is watched too. The ranks' environment says where the store is."""
    global current
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    watch = patiently(lambda: begun(rank, world, limits, folder), 2 * limits.silence_s + 2 * GRACE_S)
    current = watch  # not before: it would speak over another run's store
    exits.end_together = watch.end
    signals.watched.set()


def begun(rank: int, world: int, limits, folder: Path) -> "Watch":
    watch = Watch(open_store(rank, world, folder), rank, world, limits, folder)
    watch.begin()
    return watch


def patiently(action, patience_s: float):
    """A node that starts again at once finds its last life's store until the others have noticed the end, too."""
    until = time.monotonic() + patience_s
    while True:
        try:
            return action()
        except Gone:
            if time.monotonic() > until:
                raise
            time.sleep(BEAT_S)


def close() -> None:
    """The run is done and everyone knows: this rank's silence means nothing from here on."""
    global current
    if current is not None:
        current.close()
    current = exits.end_together = None


def open_store(rank: int, world: int, folder: Path):
    """A connection of our own to the store at the ranks' meeting place: the group's is locked while somebody waits in it.
    Rank 0 is its server, which torch then finds and uses as well."""
    import torch.distributed as dist

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    settings = {"timeout": timedelta(seconds=MEETING_S), "wait_for_workers": False, "multi_tenant": True}
    try:
        store = dist.TCPStore(host, port, world, rank == 0, **settings)
    except RuntimeError as error:
        if rank:
            raise Gone(f"rank 0 must be at {host}:{port} within {MEETING_S:g} s, but is not: {error}") from None
        raise taken(port) from None
    return dist.PrefixStore(f"ted_scale/{world}/{folder}", store)


def taken(port) -> Gone:
    """Often by this run's last life, which is about to notice that it has ended."""
    return Gone(f"MASTER_PORT must be free on rank 0's node, but {port} is not: wait, or set another, or --master_port")


class Watch:
    """`leave` and `speak` are the process's own unless a test watches two ranks in one."""

    def __init__(self, store, rank: int, world: int, limits, folder: Path, *, leave=leave, speak=speak):
        self.store, self.rank, self.world, self.limits, self.folder = store, rank, world, limits, folder
        self.leave, self.speak = leave, speak
        self.beats, self.heard, self.met = 0, {}, time.monotonic()
        self.closed, self.alone = threading.Event(), threading.Lock()
        self.threads = [threading.Thread(target=loop, daemon=True) for loop in (self.meet, self.tend)]

    def begin(self) -> None:
        """Where another run stands at this port, a rank must not speak for one of its ranks."""
        mine = f"{socket.gethostname()} {os.getpid()}"
        if self.store.compare_set(f"beat/{self.rank}", "", mine) != mine.encode():
            raise taken(os.environ.get("MASTER_PORT"))
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """Rank 0 is the store: it waits for the others, so that none of them misses it."""
        self.closed.set()
        for thread in filter(threading.Thread.is_alive, self.threads):
            thread.join(GRACE_S)
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        with contextlib.suppress(RuntimeError):  # rank 0 has not waited
            self.store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                self.unset("left", range(self.world), GRACE_S)

    # What the two threads do

    def tend(self) -> None:
        """What needs nobody else. A main thread that holds Python's lock for ever stops this loop: its stack is then written
        by a thread without Python, the others find this rank silent, and the alarm ends it."""
        silence_s, closed = self.limits.silence_s, False
        while not closed:
            faulthandler.dump_traceback_later(silence_s)
            signal.setitimer(signal.ITIMER_REAL, 3 * silence_s)
            if signals.launcher_is_gone():
                signals.asked.set()
            if time.monotonic() - self.met > silence_s:
                self.without_rank_0()
            closed = self.closed.wait(BEAT_S)

    def meet(self) -> None:
        """What goes over the store."""
        while not self.closed.wait(BEAT_S):
            try:
                self.round()
            except RuntimeError:  # torch's, of a store that does not answer
                if not self.closed.wait(BEAT_S):
                    self.without_rank_0()
                return
            self.met = time.monotonic()

    def round(self) -> None:
        self.beats += 1
        self.store.set(f"beat/{self.rank}", str(self.beats))
        if self.store.check(["claim"]):
            self.follow()
        now = pulse.now
        limit, key = self.limit_of(now)
        if time.monotonic() - now.since > limit:
            self.end(f"error: {now.what} must end within limits.{key} ({limit:g} s), but did not", HUNG)
        if signals.asked.is_set() and not now.unsaved:
            self.end(f"stopped: {Preempted.SENTENCE}", RESUME)
        if self.rank == 0 and self.beats % ROUNDS_A_LOOK == 0:
            self.look_for_silence()

    def limit_of(self, now: pulse.Pulse) -> tuple[float, str]:
        if now.first:
            return self.limits.longest_s, "start_s"
        return self.limits.step_s, "step_s"

    def look_for_silence(self) -> None:
        """Rank 0: whose beat has not changed for too long by this clock. Who has not come yet is start-up's to wait for."""
        came = [r for r in range(self.world) if r in self.heard or self.store.check([f"beat/{r}"])]
        beats = self.store.multi_get([f"beat/{r}" for r in came])
        now = time.monotonic()
        for rank, beat in zip(came, beats, strict=True):
            if self.heard.get(rank, (None,))[0] != beat:
                self.heard[rank] = beat, now
        silent = [r for r in came if now - self.heard[r][1] > self.limits.silence_s]
        silent = [r for r in silent if not self.store.check([f"left/{r}"])]
        if silent:
            self.end(self.silence_of(silent), GONE, silent)

    # How all end

    def end(self, words: str, code: int, silent=()) -> None:
        """End this rank and all others with `code`; `words` are the last ones, unless another rank was first or has died."""
        in_main, words = threading.current_thread() is threading.main_thread(), redact.redact(words)
        if self.rank and in_main and code != FAULT:
            time.sleep(3 * BEAT_S)  # what all ranks have to say is rank 0's to say
        claim = json.dumps({"rank": self.rank, "code": code, "thread": threading.get_ident()})  # one of two has it
        try:
            if self.store.compare_set("claim", "", claim) == claim.encode():
                self.wind_up(words, code, silent)
            elif not in_main:
                return  # the next round follows
            time.sleep(2 * self.limits.silence_s + GRACE_S)  # the other thread follows, and leaves
        except RuntimeError:
            self.without_rank_0()
        self.leave(code)

    def wind_up(self, words: str, code: int, silent) -> None:
        """The claimant's part. Of a failure nobody knows yet whether it is the cause or the echo of a rank that died."""
        others = [r for r in range(self.world) if r != self.rank and r not in silent]
        came = [r for r in others if self.store.check([f"beat/{r}"]) and not self.store.check([f"left/{r}"])]
        if code == HUNG:
            self.write_stacks()
        may_be_an_echo = code in (FAULT, RESUME)  # the launcher, too, signals the others when a rank has died
        unseen = self.unset("seen", came, self.limits.silence_s if may_be_an_echo else GRACE_S)
        if code == HUNG:
            where = self.where_they_were(set(came) - set(unseen))
            words = f"{words}: {where}; every stack is above and in {self.folder}/stacks"
        elif may_be_an_echo and unseen:
            met = words.rstrip().rpartition("\n")[2]
            words, code = f"rank {self.rank} met: {met}\n{self.silence_of(unseen)}", GONE
        elif code == FAULT or (self.rank and code != GONE):
            words = f"rank {self.rank}: {words}"
        self.speak(words)
        self.store.set(f"said/{self.rank}", json.dumps({"words": words, "code": code}))
        self.leave_last(words, code)

    def follow(self) -> None:
        """The part of all others: say that they live and where, be silent, leave after the claimant has spoken."""
        claim = json.loads(self.store.get("claim"))
        if claim["rank"] == self.rank:
            return  # the main thread's
        said = {"words": "", "code": claim["code"]}
        try:
            where = place()
            if claim["code"] == HUNG:
                self.write_stacks()
            self.store.set(f"seen/{self.rank}", where)
            if not self.unset("said", [claim["rank"]], 2 * self.limits.silence_s):
                said = json.loads(self.store.get(f"said/{claim['rank']}"))
        except RuntimeError:
            pass  # rank 0 has left: all is said
        self.leave_last(said["words"], said["code"])

    def leave_last(self, words: str, code: int) -> None:
        """Rank 0 keeps the log, and the store until all have read it."""
        if self.rank == 0:
            for handler in logging.getLogger("ted_scale").handlers:
                if isinstance(handler, logging.FileHandler):
                    handler.handle(logging.makeLogRecord({"msg": words}))
            time.sleep(BEAT_S if self.world > 1 else 0)
        self.leave(code)

    def without_rank_0(self) -> None:
        """Nobody is left to agree with, so the first rank of every node speaks; one of its threads, once."""
        self.alone.acquire()
        if self.rank == 1 or os.environ.get("LOCAL_RANK") == "0":
            self.speak(self.silence_of([0]))
        self.leave(GONE)

    def unset(self, key: str, ranks, patience_s: float) -> list[int]:
        """Which of `ranks` have not set their `key` after that long."""
        keys, end = {r: f"{key}/{r}" for r in ranks}, time.monotonic() + patience_s
        while keys and not self.store.check(list(keys.values())):
            self.met = time.monotonic()
            if time.monotonic() > end:
                return [r for r, name in keys.items() if not self.store.check([name])]
            time.sleep(BEAT_S / 5)
        return []

    def silence_of(self, ranks: list[int]) -> str:
        return (
            f"error: {spell(ranks)} must give a sign at least every limits.silence_s ({self.limits.silence_s:g} s), but did "
            "not: killed, or the machine is gone; start the same command again"
        )

    def where_they_were(self, told: set[int]) -> str:
        """The few first: who is not where the others wait has most to tell."""
        where: dict[str, list[int]] = {}
        for rank in range(self.world):
            at = place() if rank == self.rank else "silent"
            if rank in told:
                at = self.store.get(f"seen/{rank}").decode()
            where.setdefault(at, []).append(rank)
        return "; ".join(f"{spell(ranks)} {at}" for at, ranks in sorted(where.items(), key=lambda w: len(w[1])))

    def write_stacks(self) -> None:
        """To the log first, and for the file in a thread of its own: the file system may be what hangs."""
        text = f"{socket.gethostname()}: {pulse.now.what}\n{stacks()}"
        self.speak("\n".join(f"rank {self.rank}| {line}" for line in text.splitlines()))
        writer = threading.Thread(target=write_file, args=(self.folder / "stacks", self.rank, text), daemon=True)
        writer.start()
        writer.join(GRACE_S / 2)


def write_file(folder: Path, rank: int, text: str) -> None:
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
        (folder / f"rank_{rank}.txt").write_text(text, encoding="utf-8")


def spell(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def stacks() -> str:
    """Of every thread, through a file in memory, because they are written to a descriptor."""
    with os.fdopen(os.memfd_create("stacks"), "w+", encoding="utf-8", errors="replace") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


def place() -> str:
    """In which line of this package the main thread is."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None and not frame.f_code.co_filename.startswith(HERE):
        frame = frame.f_back
    if frame is None:
        return "in no line of ted_scale"
    return f"in {Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"
