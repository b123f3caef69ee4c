"""Time as a process has lived it, and an alarm that counts in the same way.

A process may stand still: suspended, with a container that is paused, or on a machine without free cores. When it goes on, every
other clock has jumped, and all others look silent. Note: the alarm must work while a thread holds Python's lock for ever, so
no Python runs when it rings.
"""

import ctypes
import signal
import time

LIBC = ctypes.CDLL(None)


class Clock:
    """Goes on by what a round took, at most by `longest_s`: a pause counts as one slow round. The owner ticks every round."""

    def __init__(self, longest_s: float):
        self.longest_s, self.now, self.last = longest_s, 0.0, time.monotonic()

    def tick(self) -> float:
        last, self.last = self.last, time.monotonic()
        self.now += min(self.last - last, self.longest_s)
        return self.now


def set_alarm(seconds: float) -> None:
    """SIGALRM ends this process, unless the alarm is set again before. It rings twice: the kernel's timer also counts while a
    process is stopped, and then rings once when the process goes on. The first time runs a harmless function of libc, in
    place of a handler in Python, and is not repeated; the second time has the default effect."""
    LIBC.sysv_signal(signal.SIGALRM, LIBC.abs)
    signal.siginterrupt(signal.SIGALRM, False)
    signal.setitimer(signal.ITIMER_REAL, seconds / 2, seconds / 2)


def stop_alarm() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
