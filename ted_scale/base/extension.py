"""DeepSpeed's operation for CPU ranks, which torch compiles at the first start on a machine.

Note: torch's lock is a file that names no owner. A process that is killed while it compiles or loads leaves the file, and every
later start would wait for it without end.
"""

import logging
import os
import sys
import time
from pathlib import Path

NAME = "deepspeed_shm_comm"
COMPILES_S = 600.0  # longer than any compilation takes
TOLD_S = 5.0

log = logging.getLogger("ted_scale")


def compiled() -> list[Path]:
    return [file for folder in folders() if (file := folder / f"{NAME}.so").is_file()]


def folders() -> list[Path]:
    """Where torch compiles for this version of Python."""
    if own := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return [Path(own) / NAME]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME", "/")) / ".cache")
    python = f"py{sys.version_info.major}{sys.version_info.minor}_"
    return [*cache.glob(f"torch_extensions/{python}*/{NAME}")]


def wait_for_lock() -> None:
    """Wait while another process compiles. A lock that is too old for that is removed. On each node one rank removes and logs."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    for lock in [folder / "lock" for folder in folders()]:
        began, told = time.monotonic(), not is_first
        while (age := age_of(lock)) is not None:
            if age > COMPILES_S and is_first and removed(lock):
                log.warning("%s was removed: it was %.0f minutes old, so its process was killed", lock, age / 60)
            elif not told and time.monotonic() - began > TOLD_S:
                log.warning(
                    "the start waits for %s: another process compiles, or was killed while it did; if none compiles, remove "
                    "the file, or wait until it is %.0f minutes old", lock, COMPILES_S / 60
                )  # fmt: skip
                told = True
            time.sleep(0.1)


def removed(lock: Path) -> bool:
    try:
        lock.unlink()
    except OSError:  # another node was faster, or it is another user's: the start waits on
        return False
    return True


def age_of(lock: Path) -> float | None:
    """In seconds; None if there is none that this process can see."""
    try:
        return time.time() - lock.stat().st_mtime
    except OSError:
        return None
