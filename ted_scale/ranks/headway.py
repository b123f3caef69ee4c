"""The progress of a start: how much each rank has read, as its heartbeats say. Rank 0 keeps it and decides by it.

Note: the ranks wait for the slowest one in a collective and read nothing meanwhile. So a start hangs only if no rank reads.
"""

import json
from collections.abc import Iterable
from typing import NamedTuple

from ted_scale.base import progress

LONGEST = 300  # characters of a name: rank 0 reads the heartbeats of thousands of ranks


class Beat(NamedTuple):
    """A heartbeat: its number, the bytes that the rank has read so far, and the name of what it reads, or ""."""

    number: int
    total: int
    what: str


def beat(number: int) -> str:
    total, what = progress.now()
    return json.dumps(Beat(number, total, what[-LONGEST:]))


def heard(value: bytes) -> Beat:
    """Parse a heartbeat. The first value that a rank sends is no heartbeat but its host and process."""
    try:
        return Beat(*json.loads(value))
    except (ValueError, TypeError):
        return Beat(0, 0, "")


class Headway:
    """`moved` is the last time at which a rank was seen to have read more."""

    def __init__(self):
        self.beats: dict[int, Beat] = {}
        self.moved = 0.0
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """The next line reports what is read from here on."""
        self.told, self.totals_told = now, {rank: beat.total for rank, beat in self.beats.items()}

    def hear(self, rank: int, beat: Beat, now: float) -> None:
        if rank in self.beats and beat.total != self.beats[rank].total:
            self.moved = now
        self.beats[rank] = beat

    def line(self, what: str, now: float) -> str | None:
        """One line about what was read since the line before; None if nothing was read. It shows the slowest of the ranks that
        read, because all wait for it."""
        seconds, before = max(now - self.told, 1e-9), self.totals_told
        self.begin(now)
        rates = {rank: (beat.total - before.get(rank, 0)) / seconds for rank, beat in self.beats.items()}
        readers = [rank for rank, beat in self.beats.items() if beat.what]
        if not readers and not any(rates.values()):
            return None
        said = f"{what} goes on: {mega(sum(self.totals_told.values()))} read, {mega(sum(rates.values()))}/s"
        if not readers:
            return said
        slowest = min(readers, key=rates.__getitem__)
        others = f" and {len(readers) - 1} more" if len(readers) > 1 else ""
        return f"{said}; {self.at([slowest])}, {mega(rates[slowest])}/s{others}"

    def stands(self) -> str:
        """What is being read, for the sentence that ends a start."""
        readers = [rank for rank, beat in self.beats.items() if beat.what]
        more = f" and {len(readers) - 3} more" if len(readers) > 3 else ""
        return f" while {self.at(readers[:3])}{more}" if readers else ""

    def at(self, ranks: Iterable[int]) -> str:
        found = ((rank, self.beats[rank]) for rank in ranks)
        return ", ".join(f"rank {rank} reads {beat.what} ({mega(beat.total)} so far)" for rank, beat in found)


def mega(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"
