"""A run's folder may come from a stranger. Before a run writes there, this checks that everything it writes to is its own.

`refuse` checks kinds and names, and may be called at any time. `refuse_others` checks owners and modes. Note: W&B itself makes
links in RUN/wandb, so a link there is allowed if it leads to a place in that folder.
"""

import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from ted_scale.base.beneath import is_there, several_names, strange
from ted_scale.base.errors import UserError, files_at
from ted_scale.base.paths import KINDS
from ted_scale.checkpoints.folder import FILTERS, checkpoints_of, key_of

FOLDERS = ("checkpoints", "stacks", "reports", "wandb")
APPENDED = ("log.txt", "metrics.jsonl", "samples.jsonl")
FILES = (".lock", "run.toml", FILTERS, *APPENDED)


def refuse(folder: Path) -> None:
    """Raise an error about the first name that is not what a run would have made there."""
    with files_at(folder):
        if not is_there(folder):
            return
        for path in standing(folder, FOLDERS):
            kind = kind_of(path)
            if kind != "a folder":
                raise strange(path, "a folder of its own", kind)
        for path in standing(folder, FILES):
            if (kind := kind_of(path)) != "a plain file":
                raise strange(path, "a plain file", kind)
        for path in standing(folder, APPENDED):
            if (names := path.lstat().st_nlink) > 1:
                raise several_names(path, names)
        for path in linked_checkpoints(folder):
            raise strange(path, "a folder of its own", kind_of(path))
        for path in leading_out(folder / "wandb"):
            raise strange(path, "in its own folder", "a link out of it")


def refuse_others(folder: Path, made: Path) -> None:
    """Refuse folders of other users: the owner of a folder, and whoever may write to it, can replace what is in it. `made` is a
    file that was just made with write permission for its owner alone. Its owner is what the file system makes of this user. If it
    is open to all, the file system keeps no modes."""
    mine, keeps_modes = made.stat().st_uid, not made.stat().st_mode & stat.S_IWOTH
    # Root may do anything. The owner of the folder above could replace the run's folder, for example outside of a container.
    trusted = {mine, 0, folder.resolve().parent.stat().st_uid}
    for path in (folder, *standing(folder, FOLDERS)):
        status = path.stat()
        if status.st_uid not in trusted:
            raise UserError(
                f"{path} must be yours, because its owner can exchange what is in it, but belongs to {user_name(status.st_uid)}; "
                f"copy {folder} with `cp -r`, which makes it yours, or give it to yourself with `chown -R {user_name(mine)}`"
            )
        if keeps_modes and status.st_mode & stat.S_IWOTH:
            raise UserError(
                f"{path} must not be writable by everybody, but is; look through what is in it, then `chmod -R o-w {folder}`"
            )


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def standing(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    return (folder / name for name in names if is_there(folder / name))


def kind_of(path: Path) -> str:
    return KINDS.get(stat.S_IFMT(path.lstat().st_mode), "a plain file")


def linked_checkpoints(folder: Path) -> Iterator[Path]:
    """Links with the name of a checkpoint. Unfinished checkpoints are removed at a start, whatever they are."""
    place = checkpoints_of(folder)
    return (path for path in (place.iterdir() if place.exists() else ()) if key_of(path.name) and path.is_symlink())


def leading_out(folder: Path) -> Iterator[Path]:
    """Links that lead out of the folder. Links in the folders of W&B's runs do not count. They are W&B's own (logs/debug-core.log
    leads to its cache), and nothing is written to them any more, because every start gets a new folder."""
    root = folder.resolve()
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
            yield path
