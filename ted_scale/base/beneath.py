"""What a run writes stays in its folder: on the way down from the folder's root, no name may be a link.

The root itself may be reached by links, because a user named it. Functions here work on descriptors of folders, so that nothing
changes between a look and a write. Note: only folders that `keep_inside` was told are guarded; an output of a tool goes where
its path leads.
"""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ted_scale.base.errors import UserError
from ted_scale.base.paths import NoFile, open_file

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
roots: set[Path] = set()  # folders of runs in which this process writes


def keep_inside(folder: Path) -> None:
    roots.add(folder.absolute())


@contextlib.contextmanager
def opened(folder: Path, *, makes: bool = False) -> Iterator[int]:
    """A descriptor of the folder. With `makes`, what is missing on the way is made."""
    folder = folder.absolute()
    root = next((root for root in roots if folder.is_relative_to(root)), folder)
    if makes:
        root.mkdir(mode=0o775, parents=True, exist_ok=True)
    at = os.open(root, FOLDER)
    try:
        for name in folder.relative_to(root).parts:
            if makes:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o775, dir_fd=at)
            inner = os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = inner
        yield at
    finally:
        os.close(at)


def make_folder(folder: Path) -> None:
    with opened(folder, makes=True):
        pass


def open_plain(path: Path, flags: int) -> int:
    """A descriptor of a plain file, which is made where there is none."""
    with opened(path.parent) as at, as_sentence(path):
        return open_file(path.name, flags | os.O_CREAT, dir_fd=at)


def append_to(path: Path) -> TextIO:
    """The file, open for more text. A file of several names is refused: the other name may be anybody's file."""
    file = os.fdopen(open_plain(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")
    if (names := os.fstat(file.fileno()).st_nlink) > 1:
        file.close()
        raise several_names(path, names)
    return file


def make_new(path: Path, mode: int = 0o644) -> int:
    """A descriptor of a new file. An older one goes first: it may be a second name of another folder's file."""
    unlink(path)
    with opened(path.parent) as at:
        return os.open(path.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=at)


def rename(path: Path, new: Path) -> None:
    """Within its folder."""
    with opened(path.parent) as at:
        os.rename(path.name, new.name, src_dir_fd=at, dst_dir_fd=at)


def unlink(path: Path) -> None:
    with opened(path.parent) as at, contextlib.suppress(FileNotFoundError):
        os.unlink(path.name, dir_fd=at)


def is_there(path: Path) -> bool:
    """Also a link that leads nowhere."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def discard(path: Path) -> None:
    """Remove it and what is in it, as far as that works: a link, and not what it leads to. Folders in folders may be deeper than
    Python's stack."""
    with contextlib.suppress(OSError, RecursionError), opened(path.parent) as at:
        if stat.S_ISDIR(os.stat(path.name, dir_fd=at, follow_symlinks=False).st_mode):
            shutil.rmtree(path.name, ignore_errors=True, dir_fd=at)
        else:
            os.unlink(path.name, dir_fd=at)


@contextlib.contextmanager
def as_sentence(path: Path):
    """What is no plain file becomes a UserError, and an OSError names the path: the system names the last part alone."""
    try:
        yield
    except NoFile as error:
        raise strange(path, "a plain file", str(error)) from None
    except OSError as error:
        error.filename = str(path)  # and not its name alone
        raise


def strange(path: Path, must: str, stands: str) -> UserError:
    return UserError(
        f"{path} must be {must}, because a run writes there, but is {stands}; remove it, or give the run another name"
    )


def several_names(path: Path, names: int) -> UserError:
    return UserError(
        f"{path} must be a file of one name, because a run writes to it, but has {names} (hard links); remove this one, or make "
        "it a copy"
    )
