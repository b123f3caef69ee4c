"""Time, memory and disk of what reads one input: no hang, nothing by the gigabyte."""

import resource
import signal
from contextlib import contextmanager
from pathlib import Path

LONGEST_S = 20  # a first import is in it
MEMORY = 4 << 30
LARGEST_FILE = 1 << 28  # that may be written


class TooLong(BaseException):
    """No OSError, which what is tested may take for one of a file."""


@contextmanager
def bounds(memory: int = MEMORY):
    def late(*_):
        raise TooLong(f"longer than {LONGEST_S} s")

    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    files = resource.getrlimit(resource.RLIMIT_FSIZE)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, files[1]))
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        resource.setrlimit(resource.RLIMIT_FSIZE, files)
