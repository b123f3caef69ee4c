"""How much memory a rank has: its device's, or its part of the host's.

In a container the host's memory is what the container may use, which only its control group knows.
"""

import os
from pathlib import Path

import psutil
import torch

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of control groups v2 and v1


def of_a_rank(ranks: int) -> tuple[str, float]:
    """(the device, its bytes), with so many ranks on this host."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0))).total_memory
    return "cpu", of_the_host() / ranks


def of_the_host() -> int:
    return min([psutil.virtual_memory().total, *(limit for file in LIMITS if (limit := limit_in(Path(file))))])


def limit_in(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
