"""Saves in the background. A step waits only for the copy to host memory. Then a thread writes, all ranks agree, rank 0 publishes.

There is one save at a time. The next save waits for it, but not for its copy to object storage. A failed save is reported at once
and does not end the run, because the last checkpoint is intact and the next save will come. Only `finish`, at the end of a stage,
raises an error. Note: the threads of all ranks use process groups of their own, because training uses the default group at the
same time.
"""

import errno
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from ted_scale.base import beneath, durable, sealed
from ted_scale.base.durable import PART, Entry
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints import holder, state
from ted_scale.checkpoints.attempts import (
    Failure,
    attempt,
    attempt_write,
    could_not_write,
    give_up,
    warn_of_old_ones,
)
from ted_scale.checkpoints.copier import Copier
from ted_scale.checkpoints.folder import FILTERS
from ted_scale.checkpoints.progress import PROGRESS, Progress, progress_as_bytes
from ted_scale.ranks.agree import first_of_all, gather, new_group
from ted_scale.storage.tensor_file import as_bytes

LAST_PAUSES_S = (5, 15, 45)  # before the retries of a stage's last save


class Save(NamedTuple):
    """Everything that is needed to write a checkpoint."""

    place: Path
    snapshot: state.Snapshot
    progress: Progress
    with_filters: bool


class Outcome(NamedTuple):
    """The result of a save. It is the same on all ranks, except for the time."""

    failure: Failure | None
    write_ms: float = 0.0


class Saver:
    """`alert(title, text)` alerts the user. `filters_files` are the files from which stage II's filters may be read, best first."""

    def __init__(self, run, filters_files: list[Path], alert):
        self.alert = alert
        self.folder, self.settings, self.copier = run.folder, run.checkpoint, Copier(run, alert)
        self.sources, self.last_filters, self.filters_entry = filters_files, [], None
        self.group, self.written, self.failed = new_group(), threading.Event(), 0
        self.engine = self.buffers = self.saved_step = self.under_way = None
        self.thread: threading.Thread | None = None
        self.outcome: Outcome | None = None

    # Called by the training loop

    def prepare(self, engine, step: int) -> None:
        """Allocate host memory now, so that no step waits for it. The engine's state at `step` needs no
        save: it is the start, or it is in a checkpoint."""
        if self.engine is not engine:
            self.engine, self.buffers = engine, state.kept_buffers(engine)
        self.saved_step = step

    def save(self, engine, progress: Progress, *, with_filters: bool) -> dict[str, float]:
        """Begin to write a checkpoint. Returns how long the step waited, and how long the previous save took."""
        began = time.perf_counter()
        row = self.wait()  # for the previous save, which uses the same buffers
        must_succeed = self.failed >= self.settings.max_failed
        self.prepare(engine, progress.step)
        place = files.checkpoints_of(self.folder) / files.checkpoint_name(progress.step, len(progress.forks))
        self.begin(Save(place, state.snapshot(engine, self.buffers), progress, with_filters))
        if must_succeed:
            row |= self.finish()
        elif not self.settings.background:
            row |= self.wait()
        return row | {"checkpoint/stall_ms": (time.perf_counter() - began) * 1e3}

    def begin(self, save: Save) -> None:
        self.under_way = save
        self.written.clear()
        self.outcome = Outcome(Failure("its thread was interrupted"))
        self.thread = threading.Thread(target=self.run_thread, args=(save,), daemon=True, name="checkpoint")
        self.thread.start()

    def wait(self, *, leaving: bool = False) -> dict[str, float]:
        """Wait until no save is under way. The first call after a save returns how long that save took. A run that is `leaving`
        does not wait until old checkpoints are removed."""
        if self.thread is None:
            return {}
        self.written.wait()
        if not leaving:
            self.thread.join()
            self.thread = None
        self.failed = self.failed + 1 if self.outcome.failure else 0
        failed, self.copier.failed = bool(self.outcome.failure) + self.copier.failed, 0
        return {"checkpoint/write_ms": self.outcome.write_ms, "checkpoint/failed": float(failed)}

    def is_writing(self) -> bool:
        return self.under_way is not None and not self.written.is_set()

    def finish(self, *, leaving: bool = False) -> dict[str, float]:
        """Wait, and retry if the save has failed, because the last state of a stage exists nowhere else."""
        row = self.wait(leaving=leaving)
        for pause in LAST_PAUSES_S:
            if not self.failed:
                return row
            time.sleep(pause)
            self.begin(self.under_way)
            row = self.wait(leaving=leaving)
        if self.failed:
            give_up(self.outcome.failure)
        return row

    def forget(self) -> None:
        """Free the memory that was allocated for a finished engine."""
        self.engine = self.buffers = self.under_way = None

    # Runs in the thread; every rank has one

    def run_thread(self, save: Save) -> None:
        """The thread. If a rank has died, the collectives of all others fail. watch.py reports the death; this only sets the
        outcome."""
        try:
            names = self.write(save)
            if not self.outcome.failure:
                self.copier.begin(save.place, names)
        except Exception as error:
            self.outcome = self.outcome._replace(failure=could_not_write(save.place, Failure(repr(error))))
        self.written.set()
        if not self.outcome.failure and dist.get_rank() == 0:  # the next save does not wait for this
            failure, _ = attempt(files.prune, self.folder, self.settings, self.copier.needed())
            warn_of_old_ones(self.folder, failure)

    def write(self, save: Save) -> list[str]:
        """Write and publish a checkpoint. All ranks get the same outcome. Returns the names of the files that this rank wrote."""
        began, place, is_first = time.perf_counter(), save.place, dist.get_rank() == 0
        part = place.with_name(place.name + PART)
        # Every rank writes its files. Then all ranks learn what was written, and whether a rank has failed.
        failure, mine = attempt_write(place, self.write_files, part, save)
        everyone = gather((failure, mine), self.group)
        failure = next((failed for failed, _ in everyone if failed), None)
        # Rank 0 publishes the checkpoint, or removes its files before any rank may write them again.
        if is_first and not failure:
            failure, _ = attempt_write(place, seal_and_publish, part, [entries for _, entries in everyone], save)
        if is_first and failure:
            beneath.discard(part)
        # All ranks learn whether it is published.
        failure = first_of_all(failure, self.group)
        self.outcome = Outcome(failure, (time.perf_counter() - began) * 1e3)
        if save.with_filters and not failure:
            self.last_filters = [place / FILTERS, *self.last_filters[:1]]
        if is_first and failure:
            self.alert_failure(failure)
        return list(mine or ())

    def alert_failure(self, failure: Failure) -> None:
        most = self.settings.max_failed
        self.alert(
            "a checkpoint was not written",
            f"{failure.reason}; the run stops after more than {most} such failures in a row",
        )

    def write_files(self, part: Path, save: Save) -> dict[str, Entry]:
        """Write this rank's file. Rank 0 also writes the files that exist once for all ranks."""
        beneath.make_folder(part)
        name = state.rank_file(dist.get_rank())
        entries = {name: durable.write_file(part / name, as_bytes(save.snapshot.tensors))}
        if dist.get_rank() == 0:
            entries[PROGRESS] = durable.write_file(part / PROGRESS, [progress_as_bytes(save.progress)])
            if save.with_filters:
                entries[FILTERS] = self.add_filters(part / FILTERS)
        return entries

    # Stage II's filters, which are in every checkpoint of stage II

    def add_filters(self, target: Path) -> Entry:
        """Hard-link the file of the checkpoint before the last. Copy it while there are fewer than two. So the last two
        checkpoints never share one file, and one bad block cannot damage both."""
        last = [path for path in self.last_filters if path.exists()]
        if len(last) == 2:
            durable.link_or_copy(last[1], target)
            return self.filters_entry
        sources = [path for path in (*last, *self.sources) if path.exists()]
        for source in sources:
            entry = durable.write_file(target, durable.read_pieces(source))
            self.filters_entry = self.filters_entry or entry
            if entry == self.filters_entry:
                return entry
        raise OSError(errno.EIO, f"none of {', '.join(map(str, sources or self.sources))} is as it was read before")

    def use_filters(self, path: Path) -> None:
        """Use this file from now on: stage I has just learned these filters. An earlier checkpoint may hold older ones."""
        self.sources, self.last_filters, self.filters_entry = [path], [], None

    @property
    def filters_file(self) -> Path | None:
        """The file from which a stage reads its filters when it is built."""
        return next(iter((*self.last_filters, *self.sources)), None)


def seal_and_publish(part: Path, of_ranks: list[dict[str, Entry]], save: Save) -> None:
    """Seal and publish, on rank 0. It can be repeated after any error: a folder that has its final name is not sealed again."""
    progress = save.progress
    about = {"step": progress.step, "forks": list(progress.forks), "validation": progress.validation}
    about |= {"scores": progress.scores} if progress.scores else {}
    if part.exists():  # if only the last sync failed, the folder is renamed already
        entries = {name: entry for entries in of_ranks for name, entry in entries.items()}
        sealed.seal(part, entries, {**about, **save.snapshot.about})
        sealed.check(part)
    holder.confirm(save.place.parents[1])
    durable.publish(part)
