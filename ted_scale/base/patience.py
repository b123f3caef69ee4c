"""Reads that a file server may answer wrongly for a while: what fails is tried again, and only what stays is believed.

"Not there" is such an answer, too: a client may remember an old listing of a folder. Note: every try opens the file anew, because
a handle that has gone stale stays stale.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ted_scale.base.errors import Gone

PATIENCE_S = 40.0  # for an error: by then a file server has mostly failed over, or is being looked at
MISSING_S = 2.0  # for "not there"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
ABSENT = (FileNotFoundError, NotADirectoryError)

Found = TypeVar("Found")


def patiently(read: Callable[[Path], Found], path: Path, way_out: str) -> Found:
    """`read(path)`. FileNotFoundError if the file is not there, Gone if an error stays; the sentence ends with `way_out`."""
    began, pause = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            return read(path)
        except OSError as error:
            absent, waited = isinstance(error, ABSENT), time.monotonic() - began
            if absent and waited >= MISSING_S:
                raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
            if waited >= PATIENCE_S:
                said = error.strerror or error
                raise Gone(f"{path} must be readable, but was not for {PATIENCE_S:g} s ({said}); {way_out}") from None
        time.sleep(min(pause, MISSING_S if absent else LONGEST_PAUSE_S))
        pause *= 2
        ask_anew(path.parent)


def ask_anew(folder: Path) -> None:
    """An NFS client asks the server for a folder when it is opened, and then knows its new names."""
    with contextlib.suppress(OSError), os.scandir(folder):
        pass
