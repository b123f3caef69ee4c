"""Find where a run resumes, before anything starts: its newest whole checkpoint, in the run's folder or among its copies. Also
find what else in the folder the user should know.

run_folder.py looks again when the ranks have started, and reads every byte.
"""

import os
import tempfile
from pathlib import Path

from ted_scale.base import sealed
from ted_scale.base.errors import CORRECTABLE, UserError, files_at
from ted_scale.base.patience import patiently
from ted_scale.checkpoints import copies, strangers
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.progress import PROGRESS, Progress, read_progress
from ted_scale.config import changes
from ted_scale.storage.objects import check_package


def find(run, identity: dict) -> tuple[str, Progress]:
    """(newest checkpoint, its progress). Refuses a folder that cannot be written and a checkpoint of another run."""
    folder = run.folder
    existing = nearest_writable(folder)
    strangers.refuse(folder)
    try_to_write(folder, existing)
    where, progress = newest_progress(run)
    if where:
        changes.refuse_another_run(where, progress.identity, identity, run.resume.allow, progress.step)
    return where, progress


def written_before(run) -> dict | None:
    """The run file of the checkpoint that the run resumes from, if the number of steps may follow from it."""
    if not run.train.epochs:
        return None
    strangers.refuse(run.folder)
    return newest_progress(run)[1].run


def nearest_writable(folder: Path) -> Path:
    """The folder, or the nearest existing one above it. os.access returns False for every error, also for one that may pass, so
    it is called again."""
    for _ in range(2):
        with files_at(folder):
            existing, is_writable = patiently(nearest, folder, sealed.WAY_OUT)
        if is_writable:
            return existing
    raise UserError(f"runs must be a folder this user can write, but {existing} is not; set runs or change its mode")


def nearest(folder: Path) -> tuple[Path, bool]:
    """(the folder, or the nearest existing one above it; whether this user can write there)"""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return existing, existing.is_dir() and os.access(existing, os.W_OK)


def try_to_write(folder: Path, existing: Path) -> None:
    """Modes say nothing of an immutable folder in the run's, nor of a file server that has rights of its own. So rank 0 makes a
    file without a name where the run makes files, and opens those that the run goes on with. Nothing is left of it."""
    if os.environ.get("RANK", "0") != "0":
        return
    for place in (existing, *strangers.standing(folder, ("checkpoints",))):
        refuse_unwritable(place, lambda place: tempfile.TemporaryFile(dir=place).close())
    for file in strangers.standing(folder, strangers.APPENDED):
        refuse_unwritable(file, lambda file: file.open("ab").close())


def refuse_unwritable(place: Path, attempt) -> None:
    """An error that may pass is no mistake: the start tries again."""
    try:
        attempt(place)
    except OSError as error:
        if error.errno in CORRECTABLE:
            raise UserError(
                f"runs must be a folder this user can write, but {place} is not: {error.strerror}; set runs, make room, or "
                "change its mode"
            ) from None


def newest_progress(run) -> tuple[str, Progress]:
    """(newest whole checkpoint, its progress), in the run's folder or among its copies."""
    is_first = os.environ.get("RANK", "0") == "0"
    whole, passed = files.first_whole(run.folder, sealed.check if is_first else check_progress)
    local, damaged = whole and whole.path, [(c.path, c.fault) for c in passed]
    if place := copies.place_of(run):
        check_package(place, "checkpoint.copy_to")
        names = copies.names(place)
        for name in (name for name in names if local is None or files.key_of(name) > files.key_of(local.name)):
            copy = copies.copy_of(place, name)
            if copy.is_whole:
                return f"{place}/{name}", copies.progress_of(copy)
            if copy.fault:
                damaged.append((Path(f"{place}/{name}"), copy.fault))
    if damaged and local is None:
        raise files.none_is_whole(run.folder, damaged)
    return (str(local), read_progress(local)) if local else ("", Progress())


def check_progress(checkpoint: Path) -> dict:
    """The manifest, if the only file that is read here has the right size. The other sizes are not checked here: if a thousand
    ranks start, each would ask a file server for a thousand sizes. One rank checks them, and later all ranks share the check of
    the bytes."""
    content = sealed.read_manifest(checkpoint)
    for name in content["files"].keys() & {PROGRESS}:
        sealed.check_size(checkpoint, name, content["files"][name])
    return content


def describe(run, where: str, progress: Progress, total_steps: int, last_row: int) -> list[str]:
    """Lines about the resume. They warn if a run begins again although rows of an earlier one exist: its checkpoint may have been
    renamed or moved."""
    if where:
        lines = [f"resumes at step {progress.step:,} of {total_steps:,} from {where}"]
    else:
        lines = [f"starts at step 0 of {total_steps:,}"]
        if last_row:
            lines += [
                f"no checkpoint is in {files.checkpoints_of(run.folder)}: metrics.jsonl, now up to step {last_row:,}, starts again"
            ]
    return lines + files.renamed(run.folder)
