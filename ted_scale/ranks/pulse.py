"""Where the main thread is: what it works at, since when, and whether a step is under way that no checkpoint holds.

The main thread only writes here, some nanoseconds a step; watch.py's threads read. A value is replaced whole, so that
nobody reads half of one.
"""

import time
from typing import NamedTuple


class Pulse(NamedTuple):
    what: str
    since: float
    first: bool  # start-up, or the first step of a stage, which loads and compiles
    unsaved: bool


now = Pulse("start-up", time.monotonic(), first=True, unsaved=False)


def building(what: str) -> None:
    """From here up to the next `step` there is nothing that a checkpoint does not hold."""
    put(Pulse(what, time.monotonic(), first=True, unsaved=False))


def step(number: int) -> None:
    put(Pulse(f"step {number}", time.monotonic(), first=not now.unsaved, unsaved=True))


def beat(what: str) -> None:
    """Something else that takes its time, with a limit of its own."""
    put(now._replace(what=what, since=time.monotonic()))


def put(pulse: Pulse) -> None:
    global now
    now = pulse
