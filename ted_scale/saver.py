"""Saving off the critical path: a step waits for the copy to host memory, a thread writes, all ranks agree, rank 0
publishes.

One save at a time; the next one waits for it. A save that fails is said at once and does not end the run: the last
checkpoint is intact and the next save comes, but `finish`, at the end of a stage, insists. The surprise: the ranks'
threads talk over a process group of their own, because the trainer's collectives go on meanwhile.
"""

import contextlib
import errno
import logging
import shutil
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from ted_scale import checkpoint, sealed
from ted_scale import checkpoint_copies as copies
from ted_scale import checkpoint_files as files
from ted_scale.checkpoint_files import FILTERS, PROGRESS, Progress
from ted_scale.errors import SENTENCES, UserError
from ted_scale.sealed import MANIFEST, PART, Entry
from ted_scale.state_files import as_bytes, rank_file

log = logging.getLogger("ted_scale")
PAUSES_S = (1, 5)  # before a write is tried again: a shared file system hiccups
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LONGEST_WRITE = timedelta(hours=12)


class Outcome(NamedTuple):
    """Of one save, the same on all ranks but for the time."""

    place: Path
    failure: str | None
    not_copied: str | None
    write_ms: float


class Saver:
    """`alert(title, text)` tells the user."""

    def __init__(self, run, filters_file: Path | None, alert):
        self.alert = alert
        self.folder, self.settings, self.copies = run.folder, run.checkpoint, copies.place_of(run)
        self.source, self.filters_entry = filters_file, None  # from where the next checkpoint has its filters
        self.peers = dist.new_group(backend="gloo", timeout=LONGEST_WRITE)
        self.engine = self.buffers = self.thread = self.outcome = None

    def save(self, engine, progress: Progress, *, with_filters: bool) -> dict[str, float]:
        """Begin to write a checkpoint of this step; what it cost the step, and what the one before took."""
        began = time.perf_counter()
        row = self.wait()
        if self.engine is not engine:
            self.engine, self.buffers = engine, checkpoint.kept_buffers(engine)
        place = files.checkpoints_of(self.folder) / files.checkpoint_name(progress.step)
        arguments = (place, checkpoint.snapshot(engine, self.buffers), progress, with_filters)
        self.outcome = Outcome(place, f"{place.name} must be written, but its thread broke off", None, 0.0)
        self.thread = threading.Thread(target=self.write_quietly, args=arguments, daemon=True, name="checkpoint")
        self.thread.start()
        if not self.settings.background:
            row |= self.wait()
        return row | {"checkpoint/stall_ms": (time.perf_counter() - began) * 1e3}

    def wait(self) -> dict[str, float]:
        """Until no save is under way: what it took, if it had not been told yet."""
        if self.thread is None:
            return {}
        self.thread.join()
        self.thread = None
        failed = bool(self.outcome.failure) + bool(self.outcome.not_copied)
        return {"checkpoint/write_ms": self.outcome.write_ms, "checkpoint/failed": float(failed)}

    def finish(self) -> dict[str, float]:
        row = self.wait()
        if self.outcome and self.outcome.failure:
            raise UserError(self.outcome.failure)
        return row

    def forget(self) -> None:
        """Let go of an engine that is done with, and of the memory kept for it."""
        self.engine = self.buffers = None

    def write_quietly(self, place: Path, *arguments) -> None:
        """A rank that died breaks the talk of all threads, which is no news: watch.py tells of it."""
        try:
            self.write(place, *arguments)
        except Exception as error:
            self.outcome = self.outcome._replace(failure=f"{place.name} must be written, but was not: {error!r}")

    def write(self, place: Path, snapshot, progress: Progress, with_filters: bool) -> None:
        """The thread's part; every rank ends with the same outcome."""
        began, part = time.perf_counter(), place.with_name(place.name + PART)
        failure, mine = attempt(self.write_files, part, snapshot, progress, with_filters)
        everyone = self.gather((failure, mine))
        rank, failure = first_failure(failure for failure, _ in everyone)
        if not failure and dist.get_rank() == 0:
            entries = {name: entry for _, theirs in everyone for name, entry in theirs.items()}
            about = {"step": progress.step, "validation": progress.validation, **snapshot.about}
            failure, _ = attempt(seal_and_publish, part, entries, about)
        _, failure = first_failure(self.gather(failure and sentence(place, rank, failure)))
        not_copied = None if failure or not self.copies else self.copy(place, list(mine))
        if with_filters and not failure:
            self.source = place / FILTERS
        self.outcome = Outcome(place, failure, not_copied, (time.perf_counter() - began) * 1e3)
        if dist.get_rank() == 0:
            self.conclude(part)

    def gather(self, mine) -> list:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=self.peers)
        return everyone

    def copy(self, place: Path, names: list[str]) -> str | None:
        """To object storage, the manifest last; what kept it from there."""
        failure, _ = attempt(copies.send, place, self.copies, names)
        _, failure = first_failure(self.gather(failure))
        if not failure and dist.get_rank() == 0:
            failure, _ = attempt(copies.send, place, self.copies, [MANIFEST])
        return failure

    def write_files(self, part: Path, snapshot, progress: Progress, with_filters: bool) -> dict[str, Entry]:
        """This rank's file; rank 0 writes what is one for all."""
        part.mkdir(parents=True, exist_ok=True)
        name = rank_file(dist.get_rank())
        entries = {name: sealed.write_file(part / name, as_bytes(snapshot.tensors))}
        if dist.get_rank() == 0:
            entries[PROGRESS] = sealed.write_file(part / PROGRESS, [files.progress_as_bytes(progress)])
            if with_filters:
                entries[FILTERS] = self.take_filters(part / FILTERS)
        return entries

    def take_filters(self, target: Path) -> Entry:
        """A copy in the first checkpoint of a process, so that one bad block on a disk is never in all there are; later ones
        are its names."""
        if self.filters_entry is None or not self.source.exists():
            self.filters_entry = sealed.write_file(target, sealed.read_pieces(self.source))
        else:
            target.unlink(missing_ok=True)
            sealed.link_or_copy(self.source, target)
        return self.filters_entry

    def conclude(self, part: Path) -> None:
        """Rank 0: what must be said, and what need not stay."""
        if self.outcome.failure:
            self.alert("a checkpoint was not written", f"{self.outcome.failure}; the run goes on")
            shutil.rmtree(part, ignore_errors=True)
            return
        if self.outcome.not_copied:
            said = f"{self.outcome.place.name} has no copy; the run goes on: {self.outcome.not_copied}"
            self.alert("a checkpoint was not copied", said)
        failure, gone = attempt(files.prune, self.folder, self.settings)
        for path in gone or () if self.copies and not self.outcome.not_copied else ():
            failure = attempt(copies.remove, self.copies, path.name)[0] or failure
        if failure:
            log.warning(f"old checkpoints of {self.folder} must be removable, but are not: {failure}")


def attempt(action, *arguments):
    """(what went wrong, what came of it); tried again where a failure may pass."""
    for pause in (*PAUSES_S, None):
        try:
            return None, action(*arguments)
        except Exception as error:
            reason = getattr(error, "strerror", None) or (str(error) if isinstance(error, SENTENCES) else repr(error))
            if pause is None or not isinstance(error, OSError) or error.errno in NO_ROOM:
                return reason, None
            log.warning(f"writing a checkpoint failed ({reason}); trying again in {pause} s")
            time.sleep(pause)


def first_failure(failures) -> tuple[int, str | None]:
    """(rank, what it says) of the first rank that has a failure."""
    return next(((rank, said) for rank, said in enumerate(failures) if said), (0, None))


def seal_and_publish(part: Path, entries: dict[str, Entry], about: dict) -> None:
    if part.exists():  # it has its name already where only the last sync had to be tried again
        sealed.seal(part, entries, about)
    sealed.publish(part)


def sentence(place: Path, rank: int, said: str) -> str:
    with contextlib.suppress(OSError):
        said += f" ({shutil.disk_usage(place.parent).free / 2**30:.1f} GiB free)"
    return (
        f"{place.parent} must have room for a checkpoint, but rank {rank} could not write {place.name}: {said}; the previous "
        "checkpoint is intact: free space and start the same command again"
    )
