"""Saving off the critical path: a step waits for the copy to host memory, a thread writes, all ranks agree, rank 0
publishes.

One save at a time; the next one waits for it, but not for its copy to object storage. A save that fails is said at once and
does not end the run: the last checkpoint is intact and the next save comes, but `finish`, at the end of a stage, insists.
The surprise: the ranks' threads talk over process groups of their own, because the trainer's collectives go on meanwhile.
"""

import contextlib
import errno
import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from ted_scale.base import sealed
from ted_scale.base.errors import Gone, UserError
from ted_scale.base.sealed import PART, Entry
from ted_scale.checkpoints import engine_state
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.attempts import Failure, attempt, first_failure, warn_of_old_ones
from ted_scale.checkpoints.copier import Copier
from ted_scale.checkpoints.folder import FILTERS
from ted_scale.checkpoints.pieces import as_bytes, rank_file
from ted_scale.checkpoints.progress import PROGRESS, Progress, progress_as_bytes
from ted_scale.ranks.agree import gather, new_group

LAST_PAUSES_S = (5, 15, 45)  # before the last save is


class Outcome(NamedTuple):
    """Of one save, the same on all ranks but for the time."""

    place: Path
    failure: Failure | None
    copying: bool = False  # an earlier one, on some rank
    write_ms: float = 0.0


class Saver:
    """`alert(title, text)` tells the user."""

    def __init__(self, run, filters_files: list[Path], alert):
        self.alert = alert
        self.folder, self.settings, self.copier = run.folder, run.checkpoint, Copier(run, alert)
        self.origins, self.taken, self.filters_entry = filters_files, [], None  # `taken` are the last checkpoints'
        self.group, self.settled, self.failed = new_group(), threading.Event(), 0
        self.engine = self.buffers = None
        self.thread: threading.Thread | None = None
        self.outcome: Outcome | None = None

    def save(self, engine, progress: Progress, *, with_filters: bool) -> dict[str, float]:
        """Begin to write a checkpoint of this step; what it cost the step, and what the one before took."""
        began = time.perf_counter()
        row = self.wait()
        insists = self.failed >= self.settings.max_failed
        self.prepare(engine)
        place = files.checkpoints_of(self.folder) / files.checkpoint_name(progress.step, len(progress.forks))
        self.begin((place, engine_state.snapshot(engine, self.buffers), progress, with_filters))
        if insists:
            row |= self.finish()
        elif not self.settings.background:
            row |= self.wait()
        return row | {"checkpoint/stall_ms": (time.perf_counter() - began) * 1e3}

    def prepare(self, engine) -> None:
        """Memory for its copies, before a step would wait for it."""
        if self.engine is not engine:
            self.engine, self.buffers = engine, engine_state.kept_buffers(engine)

    def begin(self, what: tuple) -> None:
        self.what, place = what, what[0]
        self.settled.clear()
        self.outcome = Outcome(place, Failure("its thread broke off"))
        self.thread = threading.Thread(target=self.write_quietly, args=what, daemon=True, name="checkpoint")
        self.thread.start()

    def wait(self, *, leaving: bool = False) -> dict[str, float]:
        """Until no save is under way, and what it took, if that was not told yet. Who leaves does not wait until old ones are
        removed."""
        if self.thread is None:
            return {}
        self.settled.wait()
        if not leaving:
            self.thread.join()
            self.thread = None
        self.failed = self.failed + 1 if self.outcome.failure else 0
        failed, self.copier.failed = bool(self.outcome.failure) + self.copier.failed, 0
        return {"checkpoint/write_ms": self.outcome.write_ms, "checkpoint/failed": float(failed)}

    def finish(self, *, leaving: bool = False) -> dict[str, float]:
        """The last save must succeed: what it holds stands nowhere else."""
        row = self.wait(leaving=leaving)
        for pause in LAST_PAUSES_S:
            if not self.failed:
                return row
            time.sleep(pause)
            self.begin(self.what)
            row = self.wait(leaving=leaving)
        if self.failed:
            give_up(self.outcome.failure)
        return row

    def take_filters_from(self, path: Path) -> None:
        """Stage I has learnt them, perhaps for longer than those in an earlier checkpoint."""
        self.origins, self.taken, self.filters_entry = [path], [], None

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
        everyone = gather((failure, mine, self.copier.is_at_work()), self.group)
        rank, failure = first_failure(failure for failure, _, _ in everyone)
        if not failure and dist.get_rank() == 0:
            entries = {name: entry for _, theirs, _ in everyone for name, entry in theirs.items()}
            about = {"step": progress.step, "forks": list(progress.forks), "validation": progress.validation}
            failure, _ = attempt(seal_and_publish, part, entries, {**about, **snapshot.about})
        if failure and dist.get_rank() == 0:  # while the others wait: they may begin to write it again
            shutil.rmtree(part, ignore_errors=True)
        _, failure = first_failure(gather(failure and sentence(place, rank, failure), self.group))
        copying = any(copying for _, _, copying in everyone)
        self.outcome = Outcome(place, failure, copying, (time.perf_counter() - began) * 1e3)
        if with_filters and not failure:
            self.taken = [place / FILTERS, *self.taken[:1]]
        if failure and dist.get_rank() == 0:
            most = self.settings.max_failed
            self.alert(
                "a checkpoint was not written", f"{failure.said}; the run ends after more than {most} such in a row"
            )
        return list(mine or ())

    def after(self, place: Path, names: list[str]) -> None:
        """What a published checkpoint does not wait for: the end of those that need not stay, and its copy."""
        if dist.get_rank() == 0:
            spared = {self.copier.name} if self.outcome.copying else set()
            failure, _ = attempt(files.prune, self.folder, self.settings, spared)
            warn_of_old_ones(self.folder, failure)
        if self.copier.place and self.outcome.copying:
            self.copier.say(place, Failure(f"the copy of {self.copier.name} is still on its way"))
        elif self.copier.place:
            self.copier.begin(place, names)

    def write_files(self, part: Path, snapshot, progress: Progress, with_filters: bool) -> dict[str, Entry]:
        """This rank's file; rank 0 writes what is one for all."""
        part.mkdir(parents=True, exist_ok=True)
        name = rank_file(dist.get_rank())
        entries = {name: sealed.write_file(part / name, as_bytes(snapshot.tensors))}
        if dist.get_rank() == 0:
            entries[PROGRESS] = sealed.write_file(part / PROGRESS, [progress_as_bytes(progress)])
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
        sources = [path for path in (*taken, *self.origins) if path.exists()]
        for source in sources:
            entry = sealed.write_file(target, sealed.read_pieces(source))
            self.filters_entry = self.filters_entry or entry
            if entry == self.filters_entry:
                return entry
        raise OSError(errno.EIO, f"none of {', '.join(map(str, sources or self.origins))} is as it was read before")

    @property
    def filters_file(self) -> Path | None:
        """For a stage that is built now."""
        return next(iter((*self.taken, *self.origins)), None)


def give_up(failure: Failure) -> NoReturn:
    raise (UserError if failure.no_room else Gone)(failure.said)


def seal_and_publish(part: Path, entries: dict[str, Entry], about: dict) -> None:
    if part.exists():  # it has its name already where only the last sync had to be tried again
        sealed.seal(part, entries, about)
        sealed.check(part)
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
