"""Names that were read from files, made paths: they lead into one folder and nowhere else.

A path in a run file or on a command line is the user's own and is not checked here. A name from a manifest or a listing
may come from anyone. Note: a link in the folder is followed only if its target is in the folder, too, so that no name can
leave the folder through a link that was copied with it.
"""

import contextlib
import os
import stat
import unicodedata
from pathlib import Path

from ted_scale.base.errors import UserError

LONGEST = 255  # bytes of one part of a path, on every common file system
KINDS = {
    stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


class NoFile(Exception):
    """What stands where a file should be: "a link", "a pipe"."""


def open_file(path: Path | str, flags: int = os.O_RDONLY, **where) -> int:
    """A descriptor of a plain file. Nothing else is opened: a link leads elsewhere, a pipe blocks, a device may act."""
    with contextlib.suppress(FileNotFoundError):
        refuse_no_file(os.lstat(path, **where))
    opened = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o664, **where)
    try:
        refuse_no_file(os.fstat(opened))
    except NoFile:
        os.close(opened)
        raise
    return opened


def refuse_no_file(status: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(status.st_mode):
        raise NoFile(KINDS.get(stat.S_IFMT(status.st_mode), "no file"))
    return status


def inside(folder: Path, name: str, source: str | Path) -> Path:
    """The path of `name` in `folder`, or one sentence about `source`, the file that the name was read from."""
    path = Path(folder) / checked_name(name, source)
    try:
        stays = path.resolve().is_relative_to(Path(folder).resolve())
    except (OSError, RuntimeError):  # a loop of links: RuntimeError before Python 3.13, OSError since
        stays = False
    if not stays:
        raise outside(name, source)
    return path


def checked_name(name: str, source: str | Path) -> str:
    """The name, if it leads down from its folder. Also for names that are no files, like keys in object storage."""
    if not isinstance(name, str) or "\\" in name or any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise outside(name, source)
    if any(part in ("", ".", "..") or len(part.encode()) > LONGEST for part in name.split("/")):
        raise outside(name, source)
    return name


def own_folder(folder: Path, key: str) -> None:
    """Make a folder in a place that all users write to. Another user may have made something of this name before."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise UserError(f"{key} must be set where its default is another user's, but is not, and {folder} is; set it")
    folder.chmod(0o700)


def outside(name, source: str | Path) -> UserError:
    shown = ascii(name)
    shown = shown if len(shown) <= 100 else shown[:100] + "…"
    return UserError(
        f"{source} must name files of its own folder, but names {shown}; copy it again from where it was made"
    )
