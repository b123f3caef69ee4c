"""What one check found, and how a check is kept within its time.

Note: a disk, a driver or a name server may hang in the kernel, where no exception and no signal arrives. So a check runs in a
thread that is left behind, or in processes that are killed and not waited for.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ted_scale.base.packages import install

OK, NOTE, MISSING = "ok", "note", "missing"  # what is missing is needed; a note is not
POLL_S, KILLED_S = 0.05, 1
ROOT = Path(__file__).resolve().parents[2]


class Finding(NamedTuple):
    """`way` is the way out, or empty."""

    what: str
    state: str
    said: str
    way: str = ""


class Ended(NamedTuple):
    """Exit codes, None for a process that took too long, and what all of them said together."""

    codes: list[int | None]
    said: str


def bounded(what: str, check: Callable[[], list[Finding]], seconds: float) -> list[Finding]:
    """The findings of a check, or that it took too long or broke."""
    found: list[Finding] = []

    def work() -> None:
        try:
            found.extend(check())
        except Exception as error:
            module = (error.name or "") if isinstance(error, ImportError) else ""
            way = install(module.partition(".")[0]) if module else "put that right, or report it with this line"
            found.append(Finding(what, MISSING, f"the check failed: {type(error).__name__}: {error}", way))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return [
            Finding(
                what,
                MISSING,
                f"no answer within {seconds:g} s",
                "look at what it waits for: a disk, a network or a driver",
            )
        ]
    return found


def run(commands: list[list[str]], seconds: float, environments: list[dict[str, str]] | None = None) -> Ended:
    """All commands at once, to their end or for so long. One that fails ends the others soon, and nothing of them is left."""
    with tempfile.TemporaryFile() as said:
        processes = [
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True, env=environment
            )
            for command, environment in zip(commands, environments or [None] * len(commands), strict=True)
        ]
        try:
            wait_for(processes, seconds)
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                end(process)
        said.seek(0)
        return Ended(codes, said.read().decode(errors="replace"))


def wait_for(processes: list[subprocess.Popen], seconds: float) -> None:
    until = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        if any(process.poll() for process in processes):
            until = min(until, time.monotonic() + KILLED_S)
        time.sleep(POLL_S)


def end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILLED_S)


def last_error(said: str) -> str:
    """The line that says most of what a process said: the last that names an error, else the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["it said nothing"])[-1]


def size(bytes_: float) -> str:
    return f"{bytes_ / 2**30:,.1f} GiB"
