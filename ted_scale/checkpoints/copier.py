"""Decides which checkpoint is copied to object storage, and copies it in the background: one at a time, the newest first.

A checkpoint that is published during a copy waits. If a newer one is published meanwhile, the newer one waits instead. A run is
done only when its last checkpoint is copied. Note: rank 0 chooses, because it also removes old checkpoints from disk and must
keep the one that is copied next. A slower rank may not know this checkpoint yet, but it soon will: all ranks publish the same
checkpoints in the same order.
"""

import logging
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from ted_scale.base import sealed
from ted_scale.checkpoints import copies, owner
from ted_scale.checkpoints.attempts import Failure, attempt, give_up, warn_of_old_ones
from ted_scale.ranks import pulse, signals
from ted_scale.ranks.agree import first_of_all, gather, new_group, share

log = logging.getLogger("ted_scale")
# A run that is asked to stop waits this long for a copy. Spot machines, Kubernetes and launch.py give 30 s in all, and the step
# and the save come first. The next start copies what is missing, unless the machine is gone.
LEAVING_S = 20
INTERRUPTED = "its copy was interrupted"


class Task(NamedTuple):
    checkpoint: Path
    names: list[str]  # the files that this rank sends


class Copier:
    """Copies in a thread, on every rank. `alert(title, text)` alerts the user."""

    def __init__(self, run, alert):
        self.run, self.place, self.alert = run, copies.place_of(run), alert
        self.rank, self.group, self.changed = dist.get_rank(), new_group(), threading.Condition()
        self.waiting: dict[int, Task] = {}  # by number, which is the same on all ranks
        self.number, self.under_way, self.thread = 0, "", None
        self.failed, self.failure = 0, None  # failed copies since the last question; the last copy's failure

    # Called by the saver and the trainer

    def begin(self, checkpoint: Path, names: list[str]) -> None:
        """Begin to copy a checkpoint. All ranks call this for the same checkpoints in the same order. Every rank sends its own
        files."""
        if not self.place:
            return
        with self.changed:
            self.number += 1
            self.waiting[self.number] = Task(checkpoint, names)
            self.changed.notify()
            if not self.is_copying():
                self.thread = threading.Thread(target=self.run_thread, daemon=True, name="copy")
                self.thread.start()

    def begin_again(self, checkpoint: Path | None) -> None:
        """At a start, copy the checkpoint that the run resumes from: it may have no copy, or only a part of one."""
        if self.place and checkpoint:
            rank, ranks = share()
            self.begin(checkpoint, list(sealed.read_manifest(checkpoint)["files"])[rank::ranks])

    def is_copying(self) -> bool:
        thread = self.thread  # the thread sets it to None when it ends
        return thread is not None and thread.is_alive()

    def needed(self) -> set[str]:
        """The names of the checkpoints that must stay on disk. Only rank 0 calls this, because it chooses the next copy."""
        with self.changed:
            return {self.under_way, *(task.checkpoint.name for task in list(self.waiting.values())[-1:])}

    def finish(self, *, leaving: bool = False) -> None:
        """Wait for the copies. The wait always ends: requests have time limits, the death of another rank ends this one, and
        watch.py ends all ranks if none makes progress."""
        end, said = time.monotonic() + LEAVING_S if leaving else None, None
        while (thread := self.thread) is not None and thread.is_alive() and (end is None or time.monotonic() < end):
            if (under_way := self.under_way) and said != under_way:  # the thread sets it a moment after its start
                said = under_way
                log.info(f"waiting for the copy of {said}")
                pulse.reading(f"the copy of {said}")
            thread.join(1)
            if signals.asked.is_set() and end is None:
                end = time.monotonic() + LEAVING_S

    def copy_newest_or_fail(self) -> None:
        """Wait for the copies, and fail if the last checkpoint has none. The run is then not done, and the next start copies it."""
        self.finish()
        if self.waiting and not self.failure:  # the thread ended too early
            self.failure = Failure(INTERRUPTED)
        if self.failure:
            sentence = f"checkpoint.copy_to must hold the run's last checkpoint, but does not: {self.failure.reason}"
            give_up(self.failure._replace(reason=f"{sentence}; it is whole on disk, and the same command copies it"))

    # The thread's part; every rank has such a thread

    def run_thread(self) -> None:
        """The thread. If a rank has died, the collectives of all others fail, and watch.py reports the death. A copy that was
        under way then counts as failed."""
        try:
            while (task := self.next()) is not None:
                self.failure = self.copy(task)
                if self.failure:
                    self.alert_no_copy(task.checkpoint, self.failure)
                elif self.rank == 0:
                    failure, _ = attempt(self.as_owner, copies.prune, self.place, self.run.checkpoint)
                    warn_of_old_ones(self.place, failure)
        except Exception as error:
            log.warning(f"nothing is copied until the next checkpoint: {error!r}")

    def next(self) -> Task | None:
        """The newest task that rank 0 knows. Older tasks are dropped."""
        with self.changed:
            if not self.waiting:
                self.under_way, self.thread = "", None
                return None
            self.failure = Failure(INTERRUPTED)  # until the copy is complete
            newest = max(self.waiting)
            self.under_way = self.waiting[newest].checkpoint.name
        chosen = gather(newest, self.group)[0]
        with self.changed:
            self.changed.wait_for(lambda: chosen in self.waiting)
            for number in sorted(number for number in self.waiting if number < chosen):
                late = Failure("a newer checkpoint came before the copy of an earlier one was done")
                self.alert_no_copy(self.waiting.pop(number).checkpoint, late)
            task = self.waiting.pop(chosen)
            self.under_way = task.checkpoint.name
            return task

    def copy(self, task: Task) -> Failure | None:
        """Copy a checkpoint: first the files of all ranks, then the manifest. All ranks get the same failure."""
        begun = attempt(self.as_owner, copies.make_way, task.checkpoint, self.place) if self.rank == 0 else None
        failure, is_needed = gather(begun, self.group)[0]
        if failure or not is_needed:
            return failure
        failure, _ = attempt(copies.send, task.checkpoint, self.place, task.names)
        failure = first_of_all(failure, self.group)
        if not failure and self.rank == 0:
            failure, _ = attempt(self.as_owner, copies.send, task.checkpoint, self.place, [sealed.MANIFEST])
        return first_of_all(failure, self.group)

    def as_owner(self, action, *arguments):
        """Call an action that changes the copies, if they still belong to this run."""
        owner.renew(self.run)
        return action(*arguments)

    def alert_no_copy(self, checkpoint: Path, failure: Failure) -> None:
        self.failed += 1
        if self.rank == 0:
            self.alert(
                "a checkpoint was not copied", f"{checkpoint.name} has no copy; the run goes on: {failure.reason}"
            )
