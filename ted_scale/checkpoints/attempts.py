"""What may fail on one rank's disk or network: tried again, and then known to all ranks."""

import errno
import logging
import time
from typing import NamedTuple

from ted_scale.base.errors import SENTENCES
from ted_scale.base.sealed import Damaged

log = logging.getLogger("ted_scale")
PAUSES_S = (1, 5)  # before a write is tried again: a shared file system hiccups
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Failure(NamedTuple):
    said: str
    no_room: bool = False  # a mistake to correct, where others may pass by themselves


def attempt(action, *arguments):
    """(what went wrong, what came of it); tried again where a failure may pass."""
    for pause in (*PAUSES_S, None):
        try:
            return None, action(*arguments)
        except Exception as error:
            said = getattr(error, "strerror", None) or (
                str(error) if isinstance(error, (*SENTENCES, Damaged)) else repr(error)
            )
            failure = Failure(said, getattr(error, "errno", None) in NO_ROOM)
            if pause is None or not isinstance(error, OSError) or failure.no_room:
                return failure, None
            log.warning(f"writing a checkpoint failed ({said}); trying again in {pause} s")
            time.sleep(pause)


def first_failure(failures) -> tuple[int, Failure | None]:
    """(rank, what it says) of the first rank that has a failure."""
    return next(((rank, failure) for rank, failure in enumerate(failures) if failure), (0, None))


def warn_of_old_ones(place, failure: Failure | None) -> None:
    if failure:
        log.warning(f"old checkpoints of {place} must be removable, but are not: {failure.said}")
