"""What the main thread is doing, since when, and whether a step of this stage has begun.

The main thread only writes here, which takes nanoseconds. The threads of watch.py read. A write replaces the whole value, so a
reader never sees half of one.
"""

import time
from typing import NamedTuple


class Pulse(NamedTuple):
    what: str
    since: float
    first: bool  # start-up, or the first step of a stage, which loads and compiles
    unsaved: bool
    stepped: bool = False  # a step of this process has begun


now = Pulse("start-up", time.monotonic(), first=True, unsaved=False)


def building(what: str) -> None:
    """Say that the main thread builds `what`. Until the next `step` there is nothing to save."""
    put(now._replace(what=what, since=time.monotonic(), first=True, unsaved=False))


def step(number: int) -> None:
    put(Pulse(f"step {number}", time.monotonic(), first=not now.unsaved, unsaved=True, stepped=True))


def doing(what: str) -> None:
    """Say that the main thread does other work that takes time. Its time limit starts now."""
    put(now._replace(what=what, since=time.monotonic()))


def reading(what: str) -> None:
    """Say that the main thread does work that reads, as a start does, so its end depends on reading. A signal waits for it."""
    put(now._replace(what=what, since=time.monotonic(), first=True))


def put(pulse: Pulse) -> None:
    global now
    now = pulse
