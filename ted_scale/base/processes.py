"""Whether a process that a file names has ended.

Note: a pid says something only in its kernel, and only with the moment when the process began, because pids are given again.
"""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    kernel: str  # one boot of one machine, and in it one container's processes; empty if the system does not say
    pid: int
    began: int  # in ticks since the boot; psutil has a time of day, which may be set meanwhile


def this_process() -> Process:
    """This process. Its start is 0 if the system does not report one."""
    began = 0
    with contextlib.suppress(OSError):
        _, began = state_of(os.getpid())
    return Process(this_kernel(), os.getpid(), began)


def this_kernel() -> str:
    """A host's name would not do: machines of one image, and containers that move, share it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def is_gone(process: Process) -> bool:
    """False also where that cannot be seen from here."""
    if not process.kernel or process.kernel != this_kernel():
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    try:
        state, began = state_of(process.pid)
    except OSError:  # the system hides other users' processes
        return False
    return state in "ZX" or began != process.began


def state_of(pid: int) -> tuple[str, int]:
    """(its state, a letter; when it began)"""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])
