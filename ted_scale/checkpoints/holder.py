"""Which process has a run: it renews a numbered file in the run's folder, so that starts on other nodes see it.

flock answers at once, but on some shared file systems it works within one node only. Here the process with the highest number has
the run. A start makes the next number when the process of the last number has left, is dead, or has not renewed its file for the
length of a lease. Note: no number is used twice, and no process writes another's file. So a start that is late always finds that
it has lost. Clocks of different machines are never compared.
"""

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import NamedTuple

from ted_scale.base import exits, processes
from ted_scale.base.errors import GONE, Gone, UserError
from ted_scale.base.parsing import fits, parse_json
from ted_scale.base.paths import NoFile, open_file
from ted_scale.base.patience import patiently
from ted_scale.base.processes import Process

log = logging.getLogger("ted_scale")
RENEWAL_S = 5.0
LEASE_S = 20.0  # four renewals, as in owner.py
NAME = re.compile(r"holder_([0-9]{8}|[1-9][0-9]{8,})\.json")
LENGTH = 512  # bytes of each record; with a fixed length a renewal needs no new room on the disk


class Holder(NamedTuple):
    host: str
    kernel: str
    pid: int
    began: int
    token: str
    renewals: int = 0
    left: bool = False

    @property
    def process(self) -> Process:
        return Process(self.kernel, self.pid, self.began)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Found(NamedTuple):
    number: int  # 0 if there is no file
    holder: Holder | None  # None if its file is still empty


held: dict[Path, Found] = {}  # the runs of this process
writing = threading.Lock()


# At a start


def take(folder: Path) -> None:
    """Take the run, until `leave` or the end of this process. Gone if another process has it."""
    if folder in held:  # an earlier run of this process has taken it
        return
    last = when_free(folder, look(folder))
    me = Holder(socket.gethostname(), *processes.this_process(), secrets.token_hex(8))
    mine = Found(last.number + 1, me)
    try:
        make(path_of(folder, mine.number), mine.holder)
    except FileExistsError:
        raise in_use(folder, look(folder).holder) from None
    if (later := look(folder)).number > mine.number:  # this process was suspended since its first look
        path_of(folder, mine.number).unlink(missing_ok=True)
        raise in_use(folder, later.holder)
    for number in (number for number in numbers(folder) if number < mine.number):
        with contextlib.suppress(OSError):  # the next start removes it
            path_of(folder, number).unlink(missing_ok=True)
    held[folder] = mine
    threading.Thread(target=keep, args=(folder, mine), daemon=True, name="holder").start()


def when_free(folder: Path, found: Found) -> Found:
    """What the folder holds when no process has the run any more."""
    holder = found.holder
    if found.number == 0 or (holder and (holder.left or processes.is_gone(holder.process))):
        return found
    return unrenewed(folder, found)


def unrenewed(folder: Path, found: Found) -> Found:
    """Wait until the lease has ended. A live process on this machine must renew, too, because this folder may be a copy of the
    one that it uses. Note: every look opens the file again, because an NFS client then asks the server. If a look takes long, the
    file server has paused, also for the other process, or this process was suspended. Then the lease begins again."""
    log.warning(f"waiting for up to {LEASE_S:g} s: {found.holder or 'another process'} used {folder} and may go on")
    pause, waited = RENEWAL_S / 4, 0.0
    while waited < LEASE_S:
        began = time.monotonic()
        time.sleep(pause)
        again = look(folder)
        if again.number == 0 or (again.holder and again.holder.left):
            return again
        if again != found:
            raise in_use(folder, again.holder)
        waited = waited + pause if time.monotonic() - began < 2 * RENEWAL_S else 0.0
    return found


def in_use(folder: Path, holder: Holder | None) -> Gone:
    return Gone(
        f"runs must be used by one process at a time, but {holder or 'another process'} is using {folder}; wait for it, or give "
        "this run another name"
    )


# While the process has the run


def keep(folder: Path, mine: Found) -> None:
    """Renew until the process leaves the run, or until a later start has it. Then all ranks end, because nothing that they do is
    saved any more. An error of the file system does not end the run: only another start needs the renewals."""
    trouble = None
    while held.get(folder) is mine:
        time.sleep(RENEWAL_S)
        before, trouble = trouble, None
        try:
            renew(folder, mine)
        except Gone as gone:
            exits.at_end = None  # the folder's last words now belong to the other process
            return exits.end(f"error: {gone}", GONE)
        except (OSError, UserError) as error:
            trouble = error
            if not before:
                log.warning(f"{path_of(folder, mine.number)} was not renewed, and is tried again: {error}")


def renew(folder: Path, mine: Found) -> None:
    confirm(folder)
    with writing:
        if held.get(folder) is mine:
            write(folder, mine)


def confirm(folder: Path) -> None:
    """Raise Gone if a later start has the run that this process took. If it took none, do nothing."""
    if (mine := held.get(folder)) is None:
        return
    number, holder = newest(folder)
    if number > mine.number or (number == mine.number and holder and holder.token != mine.holder.token):
        raise Gone(
            f"runs must be used by one process at a time, but {holder or 'another process'} has taken {folder} over, because "
            f"this one gave no sign for {LEASE_S:g} s; let it go on, or end it and start the same command again"
        )


def leave(folder: Path) -> None:
    """Give the run back, so that the next start need not wait. Call this when nothing is written to the folder any more."""
    with writing, contextlib.suppress(OSError, UserError):
        if mine := held.pop(folder, None):
            write(folder, mine, left=True)


# The files


def path_of(folder: Path, number: int) -> Path:
    return folder / f"holder_{number:08}.json"


def numbers(folder: Path) -> list[int]:
    return sorted(int(name[1]) for name in (NAME.fullmatch(path.name) for path in folder.iterdir()) if name)


def look(folder: Path) -> Found:
    return patiently(newest, folder, "look at its file system and start again")


def newest(folder: Path) -> Found:
    """The highest number and its holder. A start that loses removes its file, and one that wins removes the earlier ones. If a
    file has vanished since the listing, the folder is listed again."""
    for _ in range(100):
        number = max(numbers(folder), default=0)
        with contextlib.suppress(FileNotFoundError):
            return Found(number, read(path_of(folder, number)) if number else None)
        time.sleep(0.01)
    raise OSError(errno.ESTALE, "its listing is not up to date", str(folder))


def read(path: Path) -> Holder | None:
    """The holder in a file. None if the file is empty: its process is about to write it, or was killed before."""
    for _ in range(3):
        try:
            with os.fdopen(open_file(path), "rb", buffering=0) as file:
                text = file.read(LENGTH + 1)
        except NoFile as error:
            raise strange(path, str(error)) from None
        if holder := parsed(text):
            return holder
        if not text.strip(b"\0"):
            return None
        time.sleep(RENEWAL_S / 50)  # a renewal may have been under way
    raise strange(path, "not one")


def parsed(text: bytes) -> Holder | None:
    kinds = Holder.__annotations__
    try:
        values = parse_json(text)
    except ValueError:
        return None
    if not fits(values, kinds) or not 0 < values["pid"] < 2**31:
        return None
    return Holder(**{key: values[key] for key in kinds})


def as_bytes(holder: Holder) -> bytes:
    return json.dumps(holder._asdict()).encode().ljust(LENGTH)


def strange(path: Path, stands: str) -> UserError:
    return UserError(
        f"{path} must be the record of the process that uses this run, but is {stands}; remove it if no process does"
    )


def make(path: Path, holder: Holder) -> None:
    """Make the file. FileExistsError if another start has made it: of several starts one succeeds, on every shared file system."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(file, as_bytes(holder), 0)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(file)


def write(folder: Path, mine: Found, *, left: bool = False) -> None:
    """Write a record in place. It goes only to the file that this process has made, even if that file has another name now."""
    path = path_of(folder, mine.number)
    try:
        file = open_file(path, os.O_RDWR)
    except NoFile as error:
        raise strange(path, str(error)) from None
    except FileNotFoundError:  # the file was removed, but no later start has the run
        return make(path, mine.holder._replace(left=left))
    try:
        found = parsed(os.read(file, LENGTH + 1))
        if found and found.token == mine.holder.token:
            os.pwrite(file, as_bytes(found._replace(renewals=found.renewals + 1, left=left)), 0)
    finally:
        os.close(file)
