"""Lives of a run without engines: forked ranks, which meet over gloo and obey the rules of faulty_files.py, and how they end.

The process that forks has neither threads nor a process group. Note: a rank that fails leaves the others waiting in a
collective. In a run watch.py ends them; here `live` does.
"""

import errno
import faulthandler
import os
import signal
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import faulty_files
import torch.distributed as dist

from ted_scale.base import patience
from ted_scale.base.errors import FAULT, MISTAKE, SENTENCES

LONGEST_S = 30.0  # then a rank hangs
AFTER_A_FAILURE_S = 1.0  # for ranks that are about to end by themselves
ECHOES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)  # what gloo says when another rank has died


class End(NamedTuple):
    """done, mistake or sentence (which ask to correct something, and not), traceback, killed (by a rule), hung, or left (alone by
    a rank that failed); and what was said."""

    kind: str
    words: str = ""


def live(ranks: int, place: Path, faults: Path, action, *arguments) -> list[End]:
    """`action(*arguments)` on each rank, all at once."""
    place.mkdir(parents=True)
    pids = [start_rank(rank, ranks, place, faults, action, arguments) for rank in range(ranks)]
    statuses, end = {}, time.monotonic() + LONGEST_S
    while len(statuses) < ranks and time.monotonic() < end:
        for rank, pid in enumerate(pids):
            if rank not in statuses and (found := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[rank] = found[1]
                end = min(end, time.monotonic() + AFTER_A_FAILURE_S) if found[1] else end
        time.sleep(0.0005)
    left = "left" if any(statuses.values()) else "hung"
    for pid in (pid for rank, pid in enumerate(pids) if rank not in statuses):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [
        end_of(place, rank, statuses[rank]) if rank in statuses else End(left, said(place, rank))
        for rank in range(ranks)
    ]


def shorten_patience() -> None:
    """That of a program for which nobody waits."""
    patience.PATIENCE_S, patience.MISSING_S, patience.FIRST_PAUSE_S = 0.3, 0.05, 0.001


def start_rank(rank: int, ranks: int, place: Path, faults: Path, action, arguments) -> int:
    if pid := os.fork():
        return pid
    with (place / f"said.{rank}").open("w", buffering=1) as out:
        faulthandler.dump_traceback_later(LONGEST_S - 2, file=out)
        try:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
            store = dist.FileStore(str(place / "store"), ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
            faulty_files.begin(faults)
            action(*arguments)
        except BaseException as error:
            known = isinstance(error, SENTENCES)
            out.write(str(error) if known else f"Traceback: {traceback.format_exc()}")
            out.flush()
            os._exit(error.exit_code if known else FAULT)
    os._exit(0)


def end_of(place: Path, rank: int, status: int) -> End:
    if status == 0:
        return End("done")
    words = said(place, rank).strip()
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return End("killed")
    if any(echo in words.rpartition("\n")[2] for echo in ECHOES):
        return End("left", words)
    code = os.waitstatus_to_exitcode(status)
    if code == FAULT:
        return End("traceback", words)
    return End("mistake" if code == MISTAKE else "sentence", words)


def said(place: Path, rank: int) -> str:
    path = place / f"said.{rank}"
    return path.read_text() if path.exists() else ""


def wrong_end(ended: list[End], struck: list[str]) -> str | None:
    """How a rank must not end. A disk without room and a file that is not listed ask for a correction; a fault that may pass
    does not."""
    for end in ended:
        may_correct = any(
            line.endswith((f" {errno.ENOSPC}", f" {errno.EDQUOT}")) or " stale " in line for line in struck
        )
        if end.kind in ("traceback", "hung") or (end.kind == "mistake" and not may_correct):
            return f"{end.kind}: {end.words}"
    return None
