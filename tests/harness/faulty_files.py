"""A file system that fails: faulty_files.c between a process and libc, with rules drawn from a seed.

The calls are caught in the process (LD_PRELOAD) and not in the kernel (FUSE), because this works wherever there is a C
compiler, without root and in containers, and because a rule can then be about one rank. What it cannot see: reads of mapped
memory, io_uring, and calls that libc makes inside itself (fopen's). Note: rules count calls over all processes and starts of
a run, so a schedule is the same each time as far as its run makes the same calls.
"""

import atexit
import ctypes
import functools
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from places import HARNESS

MOST_RULES = 64  # as in faulty_files.c
FOR_EVER = 10**9
COUNTS = struct.Struct(f"{MOST_RULES + 1}q")
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


class Rule(NamedTuple):
    """Matching calls number `first` to `first + times - 1` are struck.

    call: open, read, write, fsync, close, truncate, rename, unlink (of files and folders), mkdir, link, stat or list
    action: fail (`value` is the errno), twice (done, but the answer is this errno), lost (a failed fsync, after which the
    content is gone), short (half of the bytes), stale (a listing without what is younger than `value` seconds), delay (of `value`
    seconds), kill (-9, before the call)
    """

    call: str
    path: str  # a glob of the absolute path, whose * also match /
    action: str
    value: float = 0
    first: int = 0
    times: int = 1
    rank: int = -1

    def line(self) -> str:
        return f"{self.call} {self.path} {self.rank} {self.first} {self.times} {self.action} {self.value:g}\n"


@functools.cache
def library() -> str:
    """What LD_PRELOAD must name; built once a process, which removes it at its exit."""
    folder = tempfile.mkdtemp(prefix="faulty_files_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    built = f"{folder}/faulty_files.so"
    subprocess.run(
        [COMPILER, "-O2", "-shared", "-fPIC", "-o", built, HARNESS / "faulty_files.c", "-ldl"], check=True, timeout=60
    )
    return built


class Faults:
    """The rules of some processes: those that were started with `environment`, and this one after `begin`."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "counts").write_bytes(bytes(COUNTS.size))
        with (folder / "counts").open("r+b") as file:
            self.counts = mmap.mmap(file.fileno(), COUNTS.size)
        self.arm([])

    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": library(), "FAULTY_FILES": str(self.folder)}

    def arm(self, rules: Iterable[Rule]) -> None:
        """From now on these rules, none of whose calls have been counted. Running processes notice at their next call."""
        written = self.folder / "rules.new"
        written.write_text("".join(rule.line() for rule in rules))
        written.rename(self.folder / "rules")
        generation = COUNTS.unpack(self.counts)[0] + 1
        self.counts[:] = COUNTS.pack(0, *[0] * MOST_RULES)
        self.counts[:8] = struct.pack("q", generation)

    def log(self) -> list[str]:
        """What was struck since the beginning: rank, call, path, action, value."""
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []

    def add_to_log(self, lines: list[str]) -> None:
        """What something else has struck, such as a store."""
        with (self.folder / "log").open("a") as file:
            file.writelines(f"{line}\n" for line in lines)


def is_loaded() -> bool:
    return "faulty_files" in os.environ.get("LD_PRELOAD", "")


def begin(folder: Path) -> None:
    """In a forked process: obey the rules in this folder, as the rank of its environment. The library must be loaded."""
    ctypes.CDLL(None).faulty_files_begin(str(folder).encode())
