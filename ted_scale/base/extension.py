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
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = f"py{sys.version_info.major}{sys.version_info.minor}_"
    return [*cache.glob(f"torch_extensions/{python}*/{NAME}")]


def wait_for_lock() -> None:
    """Wait while another process compiles, and remove a lock that is too old for that. Rank 0 logs it."""
    say = log.warning if os.environ.get("RANK", "0") == "0" else log.debug
    for lock in [folder / "lock" for folder in folders()]:
        began = time.monotonic()
        while (age := age_of(lock)) is not None:
            if age > COMPILES_S:
                lock.unlink(missing_ok=True)
                say("%s was removed: it was %.0f minutes old, so a process was killed that held it", lock, age / 60)
            elif began is not None and time.monotonic() - began > TOLD_S:
                say(
                    "the start waits for %s: another process compiles, or was killed while it did; if none compiles, remove "
                    "the file, or wait until it is %.0f minutes old", lock, COMPILES_S / 60
                )  # fmt: skip
                began = None
            time.sleep(0.1)


def age_of(lock: Path) -> float | None:
    """In seconds; None if there is none."""
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None
