"""Every rank watches itself and the others. When one hangs, dies or fails, all exit soon, and the reason is the last line.

Each rank has two daemon threads for this. They use the store in which the ranks meet. train.py only writes what it works on
(pulse.py). Every run ends in the same way. One rank claims the end. The others acknowledge the claim and write where they were.
The claimant prints the reason. All exit with its code. docs/design/0021-heartbeats-over-the-store.md says why heartbeats go over
the store. Note: the main thread may hang anywhere, even while it holds Python's lock. Then no thread of the process runs, and the
kernel's alarm ends the process.
"""

import contextlib
import faulthandler
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path

from ted_scale.base import exits, redact
from ted_scale.base.errors import FAULT, GONE, HUNG, RESUME, Preempted
from ted_scale.base.exits import leave, speak
from ted_scale.ranks import pulse, signals
from ted_scale.ranks.headway import Headway, beat, heard
from ted_scale.ranks.lived import Clock, set_alarm, stop_alarm
from ted_scale.ranks.stacks import aside, place, stacks, write_stacks
from ted_scale.ranks.store import MEETING_S, open_store, patiently, taken

HEARTBEAT_S = 1.0
HEARTBEATS_A_LOOK = 4  # rank 0 reads the heartbeats of all ranks after this many of its own
FRESH_LOOK = 2  # and again after this many, before it decides that a rank is silent
LONGEST_ROUND = 1.5  # heartbeats; a longer round means that this process stood still, not that ranks are silent
TOLD_S = 60.0  # between lines about the progress of a start
GRACE_S = 10.0  # for what a rank still does after a rank has claimed the end

log = logging.getLogger("ted_scale")
current: "Watch | None" = None


def start(limits, folder: Path) -> None:
    """Start to watch. Call this before the process group is made, so that making it is watched, too. The environment says where
    the store is."""
    global current
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    watch = patiently(lambda: begun(rank, world, limits, folder), 2 * limits.silence_s + 2 * GRACE_S)
    current = watch  # only now: until `begin` the store may be another run's
    exits.end_together = watch.end
    signals.watched.set()


def begun(rank: int, world: int, limits, folder: Path) -> "Watch":
    watch = Watch(open_store(rank, world, folder), rank, world, limits, folder)
    watch.begin()
    return watch


def all_have_met() -> None:
    """Say that the process group is made, so no more ranks come to the store."""
    if current is not None:
        current.meetings += 1  # silence counts from here
        current.all_have_met = True


def close() -> None:
    """Stop to watch: the run is done on all ranks, and they may fall silent."""
    global current
    if current is not None:
        current.close()
    current = exits.end_together = None


class Watch:
    """A rank's two threads. Tests that watch two ranks in one process give their own `leave` and `speak`."""

    def __init__(self, store, rank: int, world: int, limits, folder: Path, *, leave=leave, speak=speak):
        self.store, self.rank, self.world, self.limits, self.folder = store, rank, world, limits, folder
        self.leave, self.speak = leave, speak
        self.clock, self.heartbeats, self.meetings = Clock(LONGEST_ROUND * HEARTBEAT_S), 0, 0
        self.heard: dict[int, tuple[bytes, float]] = {}  # each rank's last new heartbeat, and when it was seen
        self.doubted: dict[int, int] = {}  # ranks that look silent → this rank's heartbeat at which they did
        self.stands, self.since, self.headway, self.teller = pulse.now, 0.0, Headway(), None
        self.closed, self.alone, self.all_have_met = threading.Event(), threading.Lock(), False
        self.threads = [threading.Thread(target=loop, daemon=True) for loop in (self.meet_others, self.watch_itself)]

    def begin(self) -> None:
        """Start the threads. If another run uses this port, this rank must not send heartbeats in place of that run's rank."""
        mine = f"{socket.gethostname()} {os.getpid()}"
        if self.store.compare_set(f"heartbeat/{self.rank}", "", mine) != mine.encode():
            raise taken(os.environ.get("MASTER_PORT"))
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """Rank 0 is the store's server, so it waits until the other ranks have left."""
        self.closed.set()
        for thread in filter(threading.Thread.is_alive, self.threads):
            thread.join(GRACE_S)
        faulthandler.cancel_dump_traceback_later()
        stop_alarm()
        with contextlib.suppress(RuntimeError):  # rank 0 has not waited
            self.store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                self.unset("left", range(self.world), GRACE_S)

    # The loops of the two threads

    def watch_itself(self) -> None:
        """The checks that need no other rank: the launcher is alive, rank 0 answers, and the own alarm is set again. If the main
        thread holds Python's lock for ever, this loop stops. Then a thread without Python writes the stack, the other ranks find
        this one silent, and the alarm ends it. While ranks come, torch's store asks DNS for the name of each and answers nobody
        meanwhile. If DNS does not answer, this takes 5 seconds or more for each rank."""
        silence_s, clock, closed = self.limits.silence_s, Clock(LONGEST_ROUND * HEARTBEAT_S), False
        met, since = self.meetings, clock.now
        while not closed:
            faulthandler.dump_traceback_later(silence_s)
            set_alarm(3 * silence_s)
            if signals.launcher_is_gone():
                signals.asked.set()
            if met != self.meetings:
                met, since = self.meetings, clock.now
            if clock.tick() - since > (silence_s if self.all_have_met else max(silence_s, MEETING_S)):
                self.end_without_rank_0()
            closed = self.closed.wait(HEARTBEAT_S)

    def meet_others(self) -> None:
        """The checks that use the store."""
        while not self.closed.wait(HEARTBEAT_S):
            try:
                self.round()
            except RuntimeError:  # torch raises it when the store does not answer
                if not self.closed.wait(HEARTBEAT_S):
                    self.end_without_rank_0()
                return
            self.meetings += 1

    def round(self) -> None:
        self.heartbeats += 1
        self.store.set(f"heartbeat/{self.rank}", beat(self.heartbeats))
        if self.store.check(["claim"]):
            self.follow()
        now, lived = pulse.now, self.clock.tick()
        if now != self.stands:
            self.stands, self.since = now, lived
            self.headway.begin(lived)
        if not now.first and lived - self.since > (limit := self.limits.step_s):
            self.end(f"error: {now.what} must end within limits.step_s ({limit:g} s), but did not", HUNG)
        if now.first and self.rank == 0:
            self.look_at_start(now.what, lived)
        if signals.asked.is_set() and not now.unsaved:
            self.end(f"stopped: {Preempted(now.stepped)}", RESUME)
        if self.rank == 0 and (self.doubted or self.heartbeats % HEARTBEATS_A_LOOK == 0):
            self.look_for_silence()

    def look_at_start(self, what: str, lived: float) -> None:
        """Check a start, on rank 0 for all ranks. A start may read for hours, as long as one rank still reads. The other ranks
        wait for it, so each of them alone would look hung."""
        limit, headway = self.limits.longest_s, self.headway
        if lived - max(self.since, headway.moved) > limit:
            words = (
                f"error: {what} must end or read on within limits.start_s ({limit:g} s), but did not{headway.stands()}"
            )
            self.end(words, HUNG)
        is_told = self.teller is None or not self.teller.is_alive()
        if is_told and lived - headway.told > TOLD_S and (line := headway.line(what, lived)):
            self.teller = aside(0, log.info, line)

    def look_for_silence(self) -> None:
        """On rank 0: find ranks whose heartbeat has not changed for too long by rank 0's own clock (lived.py). Look at them again
        before they count as silent. A rank that has not come yet is not silent: the limit of start-up covers it."""
        came = [r for r in range(self.world) if r in self.heard or self.store.check([f"heartbeat/{r}"])]
        for rank, heartbeat in zip(came, self.store.multi_get([f"heartbeat/{r}" for r in came]), strict=True):
            if self.heard.get(rank, (None,))[0] != heartbeat:
                self.heard[rank] = heartbeat, self.clock.now
                self.headway.hear(rank, heard(heartbeat), self.clock.now)
        silent = [r for r in came if self.clock.now - self.heard[r][1] > self.limits.silence_s]
        silent = [r for r in silent if not self.store.check([f"left/{r}"])]
        self.doubted = {r: self.doubted.get(r, self.heartbeats) for r in silent}
        if dead := [r for r, first in self.doubted.items() if self.heartbeats - first >= FRESH_LOOK]:
            self.end(self.silence_of(dead), GONE, dead)

    # How all ranks exit

    def end(self, words: str, code: int, silent=()) -> None:
        """End this rank and all others with `code`. `words` are printed last, unless another rank was first or has died."""
        in_main = threading.current_thread() is threading.main_thread()
        if self.rank and in_main and code != FAULT:
            time.sleep(3 * HEARTBEAT_S)  # rank 0 should print what all ranks have to print
        claim = json.dumps({"rank": self.rank, "code": code, "thread": threading.get_ident()})  # one thread wins
        try:
            if self.store.compare_set("claim", "", claim) == claim.encode():
                self.carry_out(words, code, silent)
            elif not in_main:
                return  # the next round follows the claim
            time.sleep(2 * self.limits.silence_s + GRACE_S)  # the other thread follows the claim and exits
        except RuntimeError:
            self.end_without_rank_0()
        self.leave(code)

    def carry_out(self, words: str, code: int, silent) -> None:
        """What the claimant does. Its failure may be the cause, or only a consequence of the death of another rank."""
        # Wait until the other ranks acknowledge the claim.
        others = [r for r in range(self.world) if r != self.rank and r not in silent]
        came = [r for r in others if self.store.check([f"heartbeat/{r}"]) and not self.store.check([f"left/{r}"])]
        if code == HUNG:
            self.show_stacks()
        may_be_an_echo = code in (FAULT, RESUME)  # the launcher also sends a signal to the others when a rank has died
        unseen = self.unset("seen", came, self.limits.silence_s if may_be_an_echo else GRACE_S)
        # Find the reason to print: a rank that did not answer has died, and its death is the reason.
        if code == HUNG:
            where = self.where_they_were(set(came) - set(unseen))
            words = f"{words}: {where}; every stack is above and in {self.folder}/stacks"
        elif may_be_an_echo and unseen:
            met = words.rstrip().rpartition("\n")[2]
            words, code = f"rank {self.rank} met: {met}\n{self.silence_of(unseen)}", GONE
        elif code == FAULT or (self.rank and code != GONE):
            words = f"rank {self.rank}: {words}"
        # Print it and pass it to the others, then exit.
        words = redact.redact(words)
        self.speak(words)
        self.store.set(f"reason/{self.rank}", json.dumps({"words": words, "code": code}))
        self.log_and_leave(words, code)

    def follow(self) -> None:
        """What all other ranks do: acknowledge the claim, print nothing, and exit after the claimant has printed."""
        claim = json.loads(self.store.get("claim"))
        if claim["rank"] == self.rank:
            return  # the main thread carries it out
        last = {"words": "", "code": claim["code"]}
        try:
            where = place()
            if claim["code"] == HUNG:
                self.show_stacks()
            self.store.set(f"seen/{self.rank}", where)
            if not self.unset("reason", [claim["rank"]], 2 * self.limits.silence_s):
                last = json.loads(self.store.get(f"reason/{claim['rank']}"))
        except RuntimeError:
            pass  # rank 0 has exited, so the reason is printed
        self.log_and_leave(last["words"], last["code"])

    def log_and_leave(self, words: str, code: int) -> None:
        """Log the end and exit. Rank 0 serves the store until all ranks have read it."""
        if self.rank == 0:
            aside(GRACE_S / 2, exits.write_last_words, words, code)
            time.sleep(HEARTBEAT_S if self.world > 1 else 0)
        self.leave(code)

    def end_without_rank_0(self) -> None:
        """End without the store. The ranks cannot agree any more, so the first rank of every node prints, in one of its threads."""
        self.alone.acquire()
        if self.rank == 1 or os.environ.get("LOCAL_RANK") == "0":
            self.speak(self.silence_of([0]))
        self.leave(GONE)

    def unset(self, key: str, ranks, patience_s: float) -> list[int]:
        """Wait at most `patience_s` for `ranks` to set their `key`. Returns the ranks that have not."""
        keys, end = {r: f"{key}/{r}" for r in ranks}, time.monotonic() + patience_s
        while keys and not self.store.check(list(keys.values())):
            self.meetings += 1
            if time.monotonic() > end:
                return [r for r, name in keys.items() if not self.store.check([name])]
            time.sleep(HEARTBEAT_S / 5)
        return []

    def silence_of(self, ranks: list[int]) -> str:
        return (
            f"error: {spell(ranks)} must send a heartbeat at least every limits.silence_s ({self.limits.silence_s:g} s), but did "
            "not: killed, or the machine is gone; start the same command again"
        )

    def where_they_were(self, answered: set[int]) -> str:
        """The lines at which ranks were, the smallest group first. A rank that is not where most ranks wait is the likely cause."""
        where: dict[str, list[int]] = {}
        for rank in range(self.world):
            at = place() if rank == self.rank else "silent"
            if rank in answered:
                at = self.store.get(f"seen/{rank}").decode()
            where.setdefault(at, []).append(rank)
        return "; ".join(f"{spell(ranks)} {at}" for at, ranks in sorted(where.items(), key=lambda w: len(w[1])))

    def show_stacks(self) -> None:
        text = f"{socket.gethostname()}: {pulse.now.what}\n{stacks()}"
        self.speak("\n".join(f"rank {self.rank}| {line}" for line in text.splitlines()))
        aside(GRACE_S / 2, write_stacks, self.folder / "stacks", self.rank, text)


def spell(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
