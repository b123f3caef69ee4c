"""What a stranger may have put into a folder in place of a file, and a victim's folder beside it that must stay as it is."""

import os
import stat
from pathlib import Path


def victim(folder: Path) -> Path:
    """A home: a shell's start-up file, work, and a web application with a manifest of its own."""
    (folder / "app").mkdir(parents=True)
    (folder / ".bashrc").write_text("# mine\n")
    (folder / "thesis.tex").write_text("ten years of work\n" * 10)
    (folder / "app" / "manifest.json").write_text('{"my": "web app"}')
    return folder


def state_of(folder: Path) -> dict:
    """Everything about every name in it that a write, a removal or a chmod would change."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[path] = (status.st_mode, status.st_uid, status.st_mtime_ns, status.st_size, content)
    return found


def link_to_file(path: Path, home: Path) -> None:
    path.symlink_to(home / ".bashrc")


def link_to_folder(path: Path, home: Path) -> None:
    path.symlink_to(home / "app")


def link_to_nothing(path: Path, home: Path) -> None:
    path.symlink_to(home / "new")


def link_to_itself(path: Path, home: Path) -> None:
    path.symlink_to(path.name)


def second_name(path: Path, home: Path) -> None:
    os.link(home / "thesis.tex", path)


def pipe(path: Path, home: Path) -> None:
    os.mkfifo(path)


def socket(path: Path, home: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def device(path: Path, home: Path) -> None:
    """The zeros without an end; a user who is not root gets a link to them."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        path.symlink_to("/dev/zero")


def folder(path: Path, home: Path) -> None:
    path.mkdir()


def plain_file(path: Path, home: Path) -> None:
    path.write_text("x")


LINKS = (link_to_file, link_to_folder, link_to_nothing, link_to_itself)
NO_FILES = (*LINKS, pipe, socket, device, folder)
KINDS = (*NO_FILES, second_name, plain_file)
