"""A run's goodput: steps that count, as a share of all time since the run first began. docs/goodput.md defines the parts.

Note: watch.py's thread may read the ledger while the main thread hangs. Then the hang counts as what the main thread did last.
"""

import contextlib
import dataclasses
import time

from ted_scale.checkpoints.life import PARTS, Spent


class Ledger:
    """Adds up the time by parts. Each moment belongs to the part that `turn` named last."""

    def __init__(self, spent: Spent):
        self.known, self.part = spent, "start"
        self.since = time.monotonic() - max(0.0, time.time() - (spent.at or time.time()))

    def spent(self) -> Spent:
        """The time spent until now."""
        now = time.monotonic()
        passed = {self.part: getattr(self.known, self.part) + now - self.since}
        self.known, self.since = dataclasses.replace(self.known, at=time.time(), **passed), now
        return self.known

    def turn(self, part: str) -> None:
        self.spent()
        self.part = part

    @contextlib.contextmanager
    def within(self, part: str):
        before = self.part
        self.turn(part)
        try:
            yield
        finally:
            self.turn(before)

    def undo(self, saved: Spent | None) -> None:
        """Count the steps since a checkpoint as repeated. `saved` is None for an early version's checkpoint, which has no times."""
        now = self.spent()
        lost = max(0.0, now.steps - saved.steps) if saved else 0.0
        self.known = dataclasses.replace(now, steps=now.steps - lost, repeated=now.repeated + lost)

    def shares(self) -> dict[str, float]:
        """Goodput, and the shares of the other parts."""
        spent = self.spent()
        whole = spent.total or 1.0
        return {"perf/goodput": spent.steps / whole} | {
            f"perf/lost_{part}": getattr(spent, part) / whole for part in PARTS[1:]
        }
