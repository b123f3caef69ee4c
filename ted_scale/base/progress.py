"""What this process reads, and how many bytes it has read: the sign of life of a start, which may read for hours.

Whatever reads much says so here, a piece at a time; ranks/watch.py passes it on with each heartbeat. Note: several threads read,
and none of them waits here.
"""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

total = 0  # bytes
under_way: dict[int, str] = {}  # by thread: what it reads
one_writes = threading.Lock()


@contextlib.contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Note what this thread reads, so that a hang can name it. Enter before the first byte is asked for."""
    thread = threading.get_ident()
    around = under_way.get(thread)
    under_way[thread] = str(what)
    try:
        yield
    finally:
        under_way.pop(thread)
        if around is not None:
            under_way[thread] = around


def took(count: int) -> None:
    global total
    with one_writes:
        total += count


def now() -> tuple[int, str]:
    """(bytes read since the process began, what has been read for longest, or "")."""
    return total, next(iter(list(under_way.values())), "")
