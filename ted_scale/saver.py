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
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from ted_scale import checkpoint, sealed
from ted_scale import checkpoint_copies as copies
from ted_scale import checkpoint_files as files
from ted_scale.checkpoint_files import FILTERS, PROGRESS, Progress
from ted_scale.errors import SENTENCES, Gone, UserError
from ted_scale.sealed import MANIFEST, PART, Entry
from ted_scale.state_files import as_bytes, rank_file

log = logging.getLogger("ted_scale")
PAUSES_S = (1, 5)  # before a write is tried again: a shared file system hiccups
LAST_PAUSES_S = (5, 15, 45)  # before the last save is
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LONGEST_WRITE = timedelta(hours=12)


class Failure(NamedTuple):
    said: str
    no_room: bool = False  # a mistake to correct, where others may pass by themselves


class Outcome(NamedTuple):
    """Of one save, the same on all ranks but for the time."""

    place: Path
    failure: Failure | None
    not_copied: Failure | None
    write_ms: float


class Saver:
    """`alert(title, text)` tells the user."""

    def __init__(self, run, filters_files: list[Path], alert):
        self.alert = alert
        self.folder, self.settings, self.copies = run.folder, run.checkpoint, copies.place_of(run)
        self.origins, self.taken, self.filters_entry = filters_files, [], None  # `taken` are the last checkpoints'
        self.peers = dist.new_group(backend="gloo", timeout=LONGEST_WRITE)
        self.engine = self.buffers = self.thread = self.outcome = None
        self.settled, self.failed, self.manifests = threading.Event(), 0, {}

    def save(self, engine, progress: Progress, *, with_filters: bool) -> dict[str, float]:
        """Begin to write a checkpoint of this step; what it cost the step, and what the one before took."""
        began = time.perf_counter()
        row = self.wait()
        insists = self.failed >= self.settings.max_failed
        if self.engine is not engine:
            self.engine, self.buffers = engine, checkpoint.kept_buffers(engine)
        place = files.checkpoints_of(self.folder) / files.checkpoint_name(progress.step, len(progress.forks))
        self.begin((place, checkpoint.snapshot(engine, self.buffers), progress, with_filters))
        if insists:
            row |= self.finish()
        elif not self.settings.background:
            row |= self.wait()
        return row | {"checkpoint/stall_ms": (time.perf_counter() - began) * 1e3}

    def begin(self, what: tuple) -> None:
        self.what, place = what, what[0]
        self.settled.clear()
        self.outcome = Outcome(place, Failure("its thread broke off"), None, 0.0)
        self.thread = threading.Thread(target=self.write_quietly, args=what, daemon=True, name="checkpoint")
        self.thread.start()

    def wait(self, *, copied: bool = True) -> dict[str, float]:
        """Until no save is under way, but for its copy where that does not matter: what it took, if that was not told yet."""
        if self.thread is None:
            return {}
        if copied:
            self.thread.join()
            self.thread = None
        self.settled.wait()
        self.failed = self.failed + 1 if self.outcome.failure else 0
        failed = bool(self.outcome.failure) + bool(self.outcome.not_copied)
        return {"checkpoint/write_ms": self.outcome.write_ms, "checkpoint/failed": float(failed)}

    def finish(self, *, copied: bool = True) -> dict[str, float]:
        """The last save must succeed: what it holds stands nowhere else."""
        row = self.wait(copied=copied)
        for pause in LAST_PAUSES_S:
            if not self.failed:
                return row
            time.sleep(pause)
            self.begin(self.what)
            row = self.wait(copied=copied)
        if self.failed:
            give_up(self.outcome.failure)
        return row

    def forget(self) -> None:
        """Let go of an engine that is done with, and of the memory kept for it."""
        self.engine = self.buffers = self.what = None

    def write_quietly(self, place: Path, *arguments) -> None:
        """A rank that died breaks the talk of all threads, which is no news: watch.py tells of it."""
        try:
            names = self.write(place, *arguments)
        except Exception as error:
            names = []
            self.outcome = self.outcome._replace(failure=sentence(place, dist.get_rank(), Failure(repr(error))))
        self.settled.set()
        if not self.outcome.failure:
            with contextlib.suppress(Exception):
                self.after(place, names)

    def write(self, place: Path, snapshot, progress: Progress, with_filters: bool) -> list[str]:
        """The thread's part; every rank ends with the same outcome. Returns the files that this rank wrote."""
        began, part = time.perf_counter(), place.with_name(place.name + PART)
        failure, mine = attempt(self.write_files, part, snapshot, progress, with_filters)
        everyone = self.gather((failure, mine))
        rank, failure = first_failure(failure for failure, _ in everyone)
        if not failure and dist.get_rank() == 0:
            entries = {name: entry for _, theirs in everyone for name, entry in theirs.items()}
            about = {"step": progress.step, "forks": list(progress.forks), "validation": progress.validation}
            failure, _ = attempt(seal_and_publish, part, entries, {**about, **snapshot.about})
        _, failure = first_failure(self.gather(failure and sentence(place, rank, failure)))
        self.outcome = Outcome(place, failure, None, (time.perf_counter() - began) * 1e3)
        if with_filters and not failure:
            self.taken = [place / FILTERS, *self.taken[:1]]
        if failure and dist.get_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            most = self.settings.max_failed
            self.alert(
                "a checkpoint was not written", f"{failure.said}; the run ends after more than {most} such in a row"
            )
        return list(mine or ())

    def after(self, place: Path, names: list[str]) -> None:
        """What a published checkpoint does not wait for: its copy, and the end of those that need not stay."""
        not_copied = self.copy(place, names) if self.copies else None
        self.outcome = self.outcome._replace(not_copied=not_copied)
        if dist.get_rank():
            return
        failure, _ = attempt(files.prune, self.folder, self.settings)
        if self.copies and not not_copied:
            failure = attempt(copies.prune, self.copies, self.manifests, self.settings)[0] or failure
        if not_copied:
            said = f"{place.name} has no copy; the run goes on: {not_copied.said}"
            self.alert("a checkpoint was not copied", said)
        if failure:
            log.warning(f"old checkpoints of {self.folder} must be removable, but are not: {failure.said}")

    def gather(self, mine) -> list:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=self.peers)
        return everyone

    def copy(self, place: Path, names: list[str]) -> Failure | None:
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
        """The file of the checkpoint before the last under another name; a copy where there are no two yet. So the last two
        checkpoints never share one, in which a bad block would end both."""
        taken = [path for path in self.taken if path.exists()]
        if len(taken) == 2:
            sealed.link_or_copy(taken[1], target)
            return self.filters_entry
        source = next((path for path in (*taken, *self.origins) if path.exists()), self.origins[-1])
        entry = sealed.write_file(target, sealed.read_pieces(source))
        if self.filters_entry not in (None, entry):
            raise OSError(errno.EIO, f"{source} is not as it was read before")
        self.filters_entry = entry
        return entry

    @property
    def filters_file(self) -> Path | None:
        """For a stage that is built now."""
        return next(iter((*self.taken, *self.origins)), None)


def attempt(action, *arguments):
    """(what went wrong, what came of it); tried again where a failure may pass."""
    for pause in (*PAUSES_S, None):
        try:
            return None, action(*arguments)
        except Exception as error:
            said = getattr(error, "strerror", None) or (str(error) if isinstance(error, SENTENCES) else repr(error))
            failure = Failure(said, getattr(error, "errno", None) in NO_ROOM)
            if pause is None or not isinstance(error, OSError) or failure.no_room:
                return failure, None
            log.warning(f"writing a checkpoint failed ({said}); trying again in {pause} s")
            time.sleep(pause)


def first_failure(failures) -> tuple[int, Failure | None]:
    """(rank, what it says) of the first rank that has a failure."""
    return next(((rank, failure) for rank, failure in enumerate(failures) if failure), (0, None))


def give_up(failure: Failure) -> NoReturn:
    raise (UserError if failure.no_room else Gone)(failure.said)


def seal_and_publish(part: Path, entries: dict[str, Entry], about: dict) -> None:
    if part.exists():  # it has its name already where only the last sync had to be tried again
        sealed.seal(part, entries, about)
    sealed.publish(part)


def sentence(place: Path, rank: int, failure: Failure) -> Failure:
    said, must, out = failure.said, "be a folder that all ranks can write", "look at its file system"
    if failure.no_room:
        must, out = "have room", "free space"
        with contextlib.suppress(OSError):
            said += f" ({shutil.disk_usage(place.parent).free / 2**30:.1f} GiB free)"
    return failure._replace(
        said=f"{place.parent} must {must}, but rank {rank} could not write {place.name}: {said}; what was saved before is "
        f"intact: {out} and start the same command again"
    )
