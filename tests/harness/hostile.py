"""What a stranger may have put into a folder in place of a file, and a victim's folder beside it that must stay as it is."""

import contextlib
import os
import shutil
import stat
from functools import partial
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


# Strikes: each puts one hostile thing into a folder that was sound


def replaced(rng, folder: Path, home: Path) -> None:
    """One of KINDS in place of a file or a folder."""
    path = any_in(rng, folder)
    remove(path)
    rng.choice(KINDS)(path, home)


def beside(rng, folder: Path, home: Path) -> None:
    """One of KINDS under a name that is looked for, or like one that is there."""
    path = any_in(rng, folder)
    name = rng.choice((*LOOKED_FOR, path.name + ".part", path.stem + "_1" + path.suffix, path.stem + ".json"))
    path = path.with_name(name)
    if not os.path.lexists(path):
        rng.choice(KINDS)(path, home)


def giant(rng, folder: Path, home: Path) -> None:
    """A file, or a new name, of 1 TB that takes no room: its end, or all of it, is zeros."""
    path = any_in(rng, folder)
    path = path / rng.choice(LOOKED_FOR) if path.is_dir() and not path.is_symlink() else path
    if path.suffix == ".gz":  # zeros may follow, and are read to their end
        return
    if os.path.lexists(path) and not (stat.S_ISREG(path.lstat().st_mode) and path.lstat().st_nlink == 1):
        return
    with contextlib.suppress(OSError), path.open("ab") as file:
        file.truncate(TB)


def named(rng, folder: Path, home: Path) -> None:
    """A name that moves a cursor, begins a line, turns the direction of writing, is no text, or is as long as names get."""
    path = any_in(rng, folder)
    strange = os.fsencode(path.stem)[:40] + rng.choice(NAMES) + os.fsencode(path.suffix)
    with contextlib.suppress(OSError):  # the name may be taken
        twice(rng, path, path.with_name(os.fsdecode(strange[:255])))


def other_case(rng, folder: Path, home: Path) -> None:
    """A name that differs only in its case."""
    path = any_in(rng, folder)
    with contextlib.suppress(OSError):
        twice(rng, path, path.with_name(rng.choice((path.name.upper(), path.name.title(), path.name.swapcase()))))


def twice(rng, path: Path, new: Path) -> None:
    """Under another name: in its place, or as well."""
    if rng.random() < 0.5:
        path.rename(new)
    elif path.is_dir():
        shutil.copytree(path, new, symlinks=True)
    else:
        shutil.copyfile(path, new)


def deep(rng, folder: Path, home: Path) -> None:
    """Folders in folders, deeper than a path can be long, and than Python's stack."""
    path = any_in(rng, folder)
    at = os.open(folder_at(path), os.O_RDONLY | os.O_DIRECTORY)
    for name in (rng.choice(("x.part", "step_00000009.part", "d", "x" * 200)), *["d"] * rng.choice((30, 30, 30, 1100))):
        try:
            os.mkdir(name, dir_fd=at)
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
        except OSError:  # the name is taken
            break
        os.close(at)
        at = inner
    os.close(at)


def round_about(rng, folder: Path, home: Path) -> None:
    """A link to a folder above it: every walk that follows links goes on for ever."""
    path = any_in(rng, folder)
    target = rng.choice((".", "..", str(folder), "../.."))
    with contextlib.suppress(OSError):
        folder_at(path).joinpath(rng.choice(("loop", "loop.part", "step_00000008"))).symlink_to(target)


def closed(rng, folder: Path, home: Path) -> None:
    """A mode that lets nobody read it; root can, all the same."""
    path = any_in(rng, folder)
    if not path.is_symlink() and (path.is_dir() or path.lstat().st_nlink == 1):
        path.chmod(rng.choice((0o000, 0o111, 0o444, 0o7777, 0o200)))


# In this order: what copies comes before what has no end.
STRIKES = (
    named, named, other_case, replaced, replaced, replaced, beside, beside, round_about, giant, giant, closed, deep,
)  # fmt: skip
TB = 1 << 40
LOOKED_FOR = (
    "holder_00000001.json", "holder_00000002.json",
    "log.txt", ".lock", "metrics.jsonl", "run.toml.part", "life.json.part", "manifest.json", "manifest.json.part",
    "step_00000009", "step_00000008_1", "step_00000006.part", "step_00000004.old.part", "x.part", "stacks", "reports",
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "added_tokens.json", "generation_config.json", "model.safetensors.index.json", "zz.safetensors", "vocab.json",
    "tokenizer.model", "a.jsonl", "a.parquet", "a.txt", "a.json", "a.jsonl.gz", "zz.bin", "zz.idx", "filters_start.safetensors",
)  # fmt: skip
NAMES = (
    b"\n12:00:00 FORGED", b"\r\x1b[2J\x1b]0;x\x07", "\u202egpj\u2066".encode(), b"\xff\xfe", b"\x7f\x08", b" ", b"-rf", b"'\"`$(x)",
    b"%s{0}", "\u2028\u00ad".encode(), b"x" * 255, b"\x9b2J",
)  # fmt: skip


def any_in(rng, folder: Path) -> Path:
    found, places = [], [folder]
    for place in filter(partial(os.access, mode=os.R_OK | os.X_OK, effective_ids=True), places):
        inner = sorted(place.iterdir()) if len(place.parts) < len(folder.parts) + 10 else []
        found += inner
        places += [path for path in inner if path.is_dir() and not path.is_symlink()]
    return rng.choice(found or [folder])


def folder_at(path: Path) -> Path:
    return path if path.is_dir() and not path.is_symlink() else path.parent


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
