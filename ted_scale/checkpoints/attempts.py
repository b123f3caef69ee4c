"""Retries of writes to disk and network, and the sentence about a write that has failed for good."""

import contextlib
import errno
import logging
import shutil
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from ted_scale.base.errors import SENTENCES, Gone, UserError
from ted_scale.base.sealed import Damaged

log = logging.getLogger("ted_scale")
PAUSES_S = (1, 5)  # before a retry: shared file systems have short outages
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Failure(NamedTuple):
    reason: str
    no_room: bool = False
    mistake: bool = False  # the user must correct this, as with no_room; other failures may pass


def attempt(action, *arguments):
    """(failure, result). One of them is None. Errors that may pass are retried."""
    for pause in (*PAUSES_S, None):
        try:
            return None, action(*arguments)
        except Exception as error:
            failure = failure_of(error)
            if pause is None or not isinstance(error, OSError) or failure.no_room:
                return failure, None
            log.warning(f"writing a checkpoint failed ({failure.reason}); trying again in {pause} s")
            time.sleep(pause)


def failure_of(error: Exception) -> Failure:
    text = str(error) if isinstance(error, (*SENTENCES, Damaged)) else repr(error)
    no_room = getattr(error, "errno", None) in NO_ROOM
    return Failure(getattr(error, "strerror", None) or text, no_room, isinstance(error, UserError))


def attempt_write(place: Path, action, *arguments):
    """Like `attempt`, but the failure is a sentence about `place` and this rank."""
    failure, result = attempt(action, *arguments)
    return failure and could_not_write(place, failure), result


def could_not_write(place: Path, failure: Failure) -> Failure:
    reason, must, out = failure.reason, "be a folder that all ranks can write", "look at its file system"
    if failure.no_room:
        must, out = "have room", "free space"
        with contextlib.suppress(OSError):
            reason += f" ({shutil.disk_usage(place.parent).free / 2**30:.1f} GiB free)"
    fault = f"rank {dist.get_rank()} could not write {place.name}: {reason}"
    way_out = f"what was saved before is intact: {out} and start the same command again"
    return failure._replace(reason=f"{place.parent} must {must}, but {fault}; {way_out}")


def give_up(failure: Failure) -> NoReturn:
    raise (UserError if failure.no_room or failure.mistake else Gone)(failure.reason)


def warn_of_old_ones(place, failure: Failure | None) -> None:
    if failure:
        log.warning(f"old checkpoints of {place} must be removable, but are not: {failure.reason}")
