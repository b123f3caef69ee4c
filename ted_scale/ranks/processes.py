"""Processes of this machine as /proc shows them: who started whom, and with which words."""

from pathlib import Path

PROC = Path("/proc")


def parent_of(pid: int) -> int | None:
    """None where there is no such process, or nothing but its entry is left."""
    try:
        stat = (PROC / str(pid) / "stat").read_bytes()  # a process's name is any bytes
        state, parent = stat.rpartition(b")")[2].decode().split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else int(parent)


def words_of(pid: int) -> list[str]:
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def descendants_of(pid: int) -> list[int]:
    """Parents before their children."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (parent := parent_of(int(entry.name))) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def ranks_below(pid: int) -> list[int]:
    """The ranks that a DeepSpeed launcher under `pid` has started: it tells them --local_rank."""
    return [p for p in descendants_of(pid) if any(word.startswith("--local_rank") for word in words_of(p))]
