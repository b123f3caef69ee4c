"""A clock that does not count the time in which this process stood still, and an alarm that counts in the same way.

A process stands still if it is suspended, if its container is paused, or if the machine has no free core. When it continues,
every other clock has jumped, and all other ranks look silent. Note: the alarm must work while a thread holds Python's lock for
ever. So it runs no Python.
"""

import ctypes
import signal
import time

LIBC = ctypes.CDLL(None)


class Clock:
    """Each tick adds the time since the tick before, at most `longest_s`. So a pause counts as one slow round. The owner ticks
    once a round."""

    def __init__(self, longest_s: float):
        self.longest_s, self.now, self.last = longest_s, 0.0, time.monotonic()

    def tick(self) -> float:
        last, self.last = self.last, time.monotonic()
        self.now += min(self.last - last, self.longest_s)
        return self.now


def set_alarm(seconds: float) -> None:
    """SIGALRM ends this process, unless the alarm is set again before. It needs two signals. The kernel's timer also counts while
    a process is stopped, so one signal comes when the process continues. The handler of the first signal is a harmless function
    of libc, not Python. It is used once, and the second signal has the default effect."""
    LIBC.sysv_signal(signal.SIGALRM, LIBC.abs)
    signal.siginterrupt(signal.SIGALRM, False)
    signal.setitimer(signal.ITIMER_REAL, seconds / 2, seconds / 2)


def stop_alarm() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
