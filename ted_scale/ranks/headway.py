"""How far a start has come: what all ranks read, as their heartbeats say. Rank 0 keeps it, and judges by it.

Note: the ranks wait for the slowest one in a collective and read nothing meanwhile. So a start stands still only if no rank
reads on.
"""

import json
from collections.abc import Iterable
from typing import NamedTuple

from ted_scale.base import progress

LONGEST = 300  # characters of a name: heartbeats of thousands of ranks are read by one


class Beat(NamedTuple):
    """A heartbeat: its number, the bytes that the rank has read since it began, and what it reads, or ""."""

    number: int
    total: int
    what: str


def beat(number: int) -> str:
    total, what = progress.now()
    return json.dumps(Beat(number, total, what[-LONGEST:]))


def heard(value: bytes) -> Beat:
    """A rank that has just come has said its host and process."""
    try:
        return Beat(*json.loads(value))
    except (ValueError, TypeError):
        return Beat(0, 0, "")


class Headway:
    """`moved` is when a rank was last seen to have read on."""

    def __init__(self):
        self.beats: dict[int, Beat] = {}
        self.moved = 0.0
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """What is told next counts from here."""
        self.told, self.totals_told = now, {rank: beat.total for rank, beat in self.beats.items()}

    def hear(self, rank: int, beat: Beat, now: float) -> None:
        if rank in self.beats and beat.total != self.beats[rank].total:
            self.moved = now
        self.beats[rank] = beat

    def line(self, what: str, now: float) -> str | None:
        """In one line what was read since the line before, None if it was nothing. The slowest of the ranks that read is the
        one that all wait for."""
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
        """For the sentence that ends a start: what is being read."""
        readers = [rank for rank, beat in self.beats.items() if beat.what]
        more = f" and {len(readers) - 3} more" if len(readers) > 3 else ""
        return f" while {self.at(readers[:3])}{more}" if readers else ""

    def at(self, ranks: Iterable[int]) -> str:
        found = ((rank, self.beats[rank]) for rank in ranks)
        return ", ".join(f"rank {rank} reads {beat.what} ({mega(beat.total)} so far)" for rank, beat in found)


def mega(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"
