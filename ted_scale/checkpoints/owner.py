"""Which run owns the copies: one run owns a place in object storage, and renews a lease there while it runs.

The record `owner.json` is beside the copies and in the run's folder, so a run recognizes its own record after a restart. A run
that has lost its disk has no record and looks like another run. It waits until the lease has ended, and takes over then. Note:
clocks of machines are not compared. The store says how old a lease is. A lease has also ended if this process sees no renewal for
as long as a lease lasts.
"""

import contextlib
import getpass
import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ted_scale.base import sealed
from ted_scale.base.durable import write_durably
from ted_scale.base.errors import SENTENCES, Gone, UserError, files_at
from ted_scale.base.parsing import fits, parse_json
from ted_scale.base.paths import NoFile
from ted_scale.base.patience import patiently
from ted_scale.base.sealed import Damaged
from ted_scale.checkpoints import copies
from ted_scale.checkpoints import folder as files
from ted_scale.storage import objects
from ted_scale.storage.objects import Note
from ted_scale.storage.retries import Changed

log = logging.getLogger("ted_scale")
OWNER = "owner.json"
RENEWAL_S = 30
# Four renewals. A lost node is noticed and replaced in about this time, so the process that replaces it hardly waits.
LEASE_S = 120
LEAVING_S = 5


class Taken(UserError):
    """Another run owns the place."""


@dataclass(frozen=True)
class Owner:
    id: str  # the same in the run's folder
    start: str  # one for each process: two processes may have copies of one folder
    host: str
    user: str
    renewals: int = 0
    left: bool = False

    def __str__(self) -> str:
        return f"the run of {self.user} on {self.host}"

    def is_same(self, other: "Owner | None") -> bool:
        return other is not None and (self.id, self.start) == (other.id, other.start)


def url_of(run) -> str:
    return f"{copies.place_of(run).removesuffix('/checkpoints')}/{OWNER}"


# At a start


def claim(run) -> None:
    """Become the owner of the copies. UserError if another run owns them, Gone if another run may own them."""
    if not copies.place_of(run):
        return
    for _ in range(3):
        mine, found = recorded(run.folder), look(run)
        if found and not (mine and mine.id == parsed(found).id):
            found = taken_over(run, mine, found)
        try:
            return own(run, mine, found)
        except Changed:
            continue
    raise Gone(f"{begin(run)}, but several runs want to have it; start again, or give this run another name")


def own(run, mine: Owner | None, found: Note | None) -> None:
    """Write both records. If nobody owns the place, the folder's record is written first, else last: with a record of its own, a
    folder does not take over another run's place. So an exit between the two writes does not stop the next start."""
    new = Owner(mine.id if mine else secrets.token_hex(8), secrets.token_hex(8), socket.gethostname(), user())
    if found is None:
        record(run.folder, new)
        if copies.names(copies.place_of(run)):
            log.info(f"{copies.place_of(run)} had no owner; this run has it now")
    put(run, new, found)
    record(run.folder, new)


def taken_over(run, mine: Owner | None, found: Note) -> Note | None:
    """The record in the store, after its owner is gone. Refuses if this folder has a record or checkpoints of its own."""
    theirs = parsed(found)
    if mine or files.listed(run.folder):
        raise UserError(
            f"{begin(run)}, but holds the copies of {theirs}; give this run another name or another copy_to, or remove "
            f"{url_of(run)} if nobody needs that run any more"
        )
    found = wait_for_end(run, found)
    log.warning(
        f"the copies in {copies.place_of(run)} were of {theirs}; this run has no checkpoint and goes on from them"
    )
    return found


def wait_for_end(run, found: Note) -> Note | None:
    """Wait until the lease has ended. Returns the record then."""
    theirs, end = parsed(found), time.monotonic() + LEASE_S - found.age_s
    if not theirs.left and time.monotonic() < end:
        log.warning(
            f"waiting for up to {LEASE_S - found.age_s:.0f} s: {theirs} has written to {url_of(run)} and may go on"
        )
    while not theirs.left and time.monotonic() < end:
        time.sleep(min(RENEWAL_S / 4, max(0, end - time.monotonic())))
        again = look(run)
        if again is None or parsed(again).left:
            return again
        if again.version != found.version:
            raise Gone(f"{begin(run)}, but {theirs} is using it; wait for its end, or give this run another name")
    return found


# While the run lives


def hold(run) -> None:
    """Renew the lease in a thread, until the process exits or another run owns the place."""
    if copies.place_of(run):
        threading.Thread(target=keep, args=(run,), daemon=True, name="lease").start()


def keep(run) -> None:
    warned = False
    while True:
        time.sleep(RENEWAL_S)
        try:
            renew(run)
            warned = False
        except Taken as error:
            log.error(f"nothing is copied any more: {error}")
            return
        except SENTENCES as error:
            if not warned:
                log.warning(f"{url_of(run)} was not renewed, and is tried again: {error}")
            warned = True


def renew(run, *, left: bool = False, patience_s: float | None = None) -> None:
    """Renew the lease once. Taken if another run owns the place."""
    mine, found = recorded(run.folder), look(run, patience_s)
    if mine is None:
        return claim(run)
    theirs = parsed(found) if found else mine
    if not theirs.is_same(mine):
        raise Taken(f"{begin(run)}, but {theirs} has it now; give one of the two another name or another copy_to")
    if theirs.left:  # this run has given the copies back
        return
    try:
        put(run, replace(theirs, renewals=theirs.renewals + 1, left=left), found, patience_s)
    except Changed:  # perhaps by another thread of this process, which renews, too
        if (found := look(run, patience_s)) is None or not parsed(found).is_same(mine):
            raise


def leave(run) -> None:
    """Give the lease back, so that the next start need not wait for its end."""
    with contextlib.suppress(*SENTENCES):
        if copies.place_of(run):
            renew(run, left=True, patience_s=LEAVING_S)


# The record


def begin(run) -> str:
    return f"checkpoint.copy_to {copies.place_of(run)} must be of this run alone"


def look(run, patience_s: float | None = None) -> Note | None:
    url = url_of(run)
    return objects.note(url, f"{url} must be readable", patience_s or objects.OPENING_S)


def put(run, owner: Owner, before: Note | None, patience_s: float | None = None) -> None:
    """Write the record to the store. Raises Changed if the store has another record afterwards."""
    url, patience_s = url_of(run), patience_s or objects.OPENING_S
    what = f"{url} must be writable"
    with contextlib.suppress(Changed):  # the record may be there: an earlier try may have lost only its answer
        objects.put_note(url, json.dumps(asdict(owner)), before and before.version, what, patience_s)
    found = look(run, patience_s)
    if found is None or parsed(found) != owner:
        raise Changed(f"{what}, but is another run's by now")


def parsed(note: Note) -> Owner:
    return owner_of(note.text) or Owner("", "", "an unknown host", "an unknown user")


def owner_of(text: str) -> Owner | None:
    kinds = {"id": str, "start": str, "host": str, "user": str, "renewals": int, "left": bool}
    try:
        values = parse_json(text)
    except ValueError:
        return None
    return Owner(**{key: values[key] for key in kinds}) if fits(values, kinds) else None


def recorded(folder: Path) -> Owner | None:
    """The record in the folder. None if there is none, or if it cannot be parsed."""
    with files_at(folder):
        if not folder.is_dir() or all(path.name != OWNER for path in folder.iterdir()):
            return None
    try:
        return owner_of(patiently(sealed.read_text, folder / OWNER, sealed.WAY_OUT))
    except (FileNotFoundError, NoFile, Damaged, UnicodeDecodeError):
        return None


def record(folder: Path, owner: Owner) -> None:
    with files_at(folder):
        write_durably(folder / OWNER, json.dumps(asdict(owner)))


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"user {os.getuid()}"
