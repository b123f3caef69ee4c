"""How much memory a rank has: the memory of its device, or its part of the host's, which the ranks of a node share.

In a container or a scheduler's job, less than the host's memory may be used. Only control groups have this limit: the group of
this process and the groups above it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

GROUPS, PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def of_a_rank(ranks: int) -> tuple[str, float]:
    """(the device, its bytes for one rank), if this host has `ranks` ranks."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cuda":
        return "cuda", torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0))).total_memory
    return "cpu", of_the_host() / ranks


def local_ranks(world: int) -> int:
    """The number of ranks on this node, from the environment of torchrun or DeepSpeed's launcher. Without a launcher all are
    here."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)


def of_the_host() -> int:
    return min([psutil.virtual_memory().total, *(limit for file in limits() if (limit := limit_in(file)))])


def limits() -> Iterator[Path]:
    """The files that may hold a limit. A line of PROCESS is "number:controllers:group", without controllers in version 2."""
    lines = PROCESS.read_text().splitlines() if PROCESS.exists() else []
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if not controllers or "memory" in controllers.split(","):
            root, file = (GROUPS / "memory", "memory.limit_in_bytes") if controllers else (GROUPS, "memory.max")
            inside = Path(group.lstrip("/"))
            yield from (root / folder / file for folder in (inside, *inside.parents))


def limit_in(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
