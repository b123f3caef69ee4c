"""Shards on local disk: found by looking into their folder, and opened as the files that were found there.

remote.py finds shards in object storage, shards.py checks both. Note: links are followed once, when a corpus is listed. A link that
leads elsewhere from then on changes nothing, and the stamps that are taken then show whether a file is still the same.
"""

import os
import re
import stat
import struct
from pathlib import Path
from typing import NamedTuple

from ted_scale.base import progress
from ted_scale.base.errors import UserError, files_at
from ted_scale.storage.objects import Object

TOKENIZE = "write it with ted-scale tokenize"
SHARD_NUMBER = re.compile(r"-\d{5}$")
# Size and time of change. No inode: a restored file has another one, and after a remount some file systems number files anew.
STAMP = struct.Struct("<Qq")


class Files(NamedTuple):
    """The files of the shard called `prefix`: its .bin may be in object storage, the others are on local disk. A corpus may have a
    hundred thousand of these, so they share what is equal and keep nothing that follows from the rest."""

    prefix: str
    folder: str  # where the files are, without links; one string for all shards of a folder
    elsewhere: tuple[
        tuple[str, str], ...
    ] = ()  # (ending, path) of those that are not in `folder`: linked, or fetched copies
    stamps: bytes = b""  # of .idx, .bin and perhaps .json; a fetched copy has none, because its name has its version
    remote_bin: Object | None = None

    def path(self, ending: str) -> str:
        return dict(self.elsewhere).get(ending) or f"{self.folder}/{name_of(self.prefix)}{ending}"

    @property
    def bin_bytes(self) -> int:
        return self.remote_bin.size if self.remote_bin else STAMP.unpack_from(self.stamps, STAMP.size)[0]

    @property
    def have_sidecar(self) -> bool:
        return len(self.stamps) > 2 * STAMP.size or ".json" in dict(self.elsewhere)


class File:
    """A file that is open as long as somebody holds this object."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self, close=os.close):  # os is gone when the process ends
        close(self.descriptor)

    def read(self, start: int, count: int) -> bytes:
        content = os.pread(self.descriptor, count, start)
        while len(content) < count:
            more = os.pread(self.descriptor, count - len(content), start + len(content))
            if not more:
                raise OSError(f"it ends at byte {start + len(content)}, but was longer when this run began")
            content += more
        progress.took(count)
        return content

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    @property
    def stamp(self) -> bytes:
        return stamp_of(os.fstat(self.descriptor))


def open_file(path: str | os.PathLike) -> File:
    # Without O_NONBLOCK, what replaced a file could hold the run for ever: a FIFO waits for a writer.
    return File(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))


def expand(path: str | os.PathLike) -> list[str]:
    """The shards that `path` means: a prefix, one with .bin/.idx, a numbered family NAME-00001…, or a folder."""
    prefix = re.sub(r"\.(bin|idx)$", "", str(path))
    with files_at(prefix):
        is_shard = any(seen(prefix + ending) for ending in (".idx", ".bin"))
        is_folder = not is_shard and Path(prefix).is_dir()
    if is_shard:
        return [prefix]
    if is_folder:
        found = _prefixes(Path(prefix))
        if not found:
            raise UserError(f"corpus folder {prefix} must hold .bin/.idx pairs, but holds none; {TOKENIZE}")
        return found
    name = Path(prefix).name
    family = [p for p in _prefixes(Path(prefix).parent) if SHARD_NUMBER.sub("", name_of(p)) == name]
    return family or [prefix]


def _prefixes(folder: Path) -> list[str]:
    # A .bin without .idx counts: a set of shards that lost an index must be refused, not read in part.
    stems = {name[:-4] for name in names_in(folder, (".bin", ".idx")) if not name.startswith(".")}
    start = str(folder / "_")[:-1]
    return [start + stem for stem in sorted(stems)]


def names_in(folder: Path, endings: tuple[str, ...]) -> list[str]:
    with files_at(folder):
        if not folder.is_dir():
            return []
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.name.endswith(endings)]


def real_folder(prefix: str) -> str:
    """Where a shard's folder really is."""
    with files_at(prefix):
        try:
            return os.path.realpath(Path(prefix).parent)
        except ValueError:  # a name that no file can have
            return prefix


def files_of(prefix: str, folder: str) -> Files:
    """The files of one shard as they are now; its folder really is `folder`."""
    place = f"{folder}/{name_of(prefix)}"
    with files_at(prefix):
        idx, bin_file, sidecar = (seen(place + ending) for ending in (".idx", ".bin", ".json"))
        is_unfinished = idx is None and unfinished(prefix).exists()
    if is_unfinished:
        raise UserError(f"corpus {prefix} must be finished, but is not; run the command that began it again")
    if idx is None or bin_file is None:
        raise missing(prefix + (".idx" if idx is None else ".bin"))
    found = {".idx": idx, ".bin": bin_file} | ({".json": sidecar} if sidecar else {})
    elsewhere = tuple((ending, there) for ending, (_, there) in found.items() if there)
    return Files(prefix, folder, elsewhere, b"".join(stamp for stamp, _ in found.values()))


def seen(path: str) -> tuple[bytes, str] | None:
    """(stamp of a file, where a link leads or ""); None where there is no file."""
    there = ""
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            there = os.path.realpath(path)
            status = Path(there).stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        return None
    return (stamp_of(status), there) if stat.S_ISREG(status.st_mode) else None


def stamp_of(status: os.stat_result) -> bytes:
    return STAMP.pack(status.st_size, status.st_mtime_ns)


def name_of(prefix: str) -> str:
    return prefix.rpartition("/")[2]


def unfinished(prefix: str | os.PathLike) -> Path:
    """The folder of an output's shards until all are there. Nothing in it has a name that a corpus path could mean."""
    return Path(prefix).with_name(f".{Path(prefix).name}.unfinished")


def missing(path: str) -> UserError:
    return UserError(f"corpus file {path} must exist, but is missing; give a prefix, or {TOKENIZE}")
