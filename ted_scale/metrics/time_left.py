"""The time left in a stage and in its run: steps at the speed of the last rows, plus validations, samples and saves.

Each of the latter is expected to take its average time in this stage, which the run's ledger has. Note: the first step of a stage
compiles and loads, so the measurement begins after it.
"""

from collections import deque
from typing import NamedTuple

from ted_scale.checkpoints.life import Spent

ROWS = 20  # rows that give the speed: loss terms, and so a step's work, may change within a stage
BESIDE = ("validation", "samples", "checkpoints")  # parts of the ledger for which steps wait


class Ahead(NamedTuple):
    """A stage that begins, and what its run still has to do."""

    name: str
    first: int
    last: int
    each: dict[str, int]  # a part of BESIDE in this stage → steps between two of it; 0: only at the stage's end
    later_s: float | None  # the forecast of the stages after this one; None if unknown
    forecast: dict[str, float]  # the forecast of its steps, for the rows


class Left(NamedTuple):
    """Seconds left. They are a guess if a part of them was not measured."""

    stage: float
    is_guess: bool
    run: float | None  # None if the time of the stages after this one is unknown


class TimeLeft:
    def __init__(self, ahead: Ahead):
        self.ahead = ahead
        self.began: tuple[int, Spent] | None = None
        self.rows: deque[tuple[int, float]] = deque(maxlen=ROWS)

    def begin(self, step: int, spent: Spent) -> None:
        """Start to measure. Called after the first step, and after the run went back."""
        self.began = (step, spent)
        self.rows = deque([(step, spent.steps)], maxlen=ROWS)

    def row(self, step: int, spent: Spent) -> Left | None:
        """The time left after this step, including the work that is due at this step. None while nothing is measured yet."""
        if self.began is None or step <= self.rows[0][0]:
            return None
        before, then = self.rows[0]
        pace = (spent.steps - then) / (step - before)
        self.rows.append((step, spent.steps))
        beside, is_guess = self.beside(step, spent)
        stage = (self.ahead.last - step) * pace + beside
        later = self.ahead.later_s
        return Left(stage, is_guess, None if later is None else stage + later)

    def beside(self, step: int, spent: Spent) -> tuple[float, bool]:
        """(seconds for work beside steps, whether a coming part was never measured)"""
        first, then = self.began
        total, unseen, last = 0.0, False, self.ahead.last
        for part in BESIDE:
            cost, every = getattr(spent, part) - getattr(then, part), self.ahead.each.get(part)
            seen, due = (
                (0, 0) if every is None else (times(every, first, step, last), times(every, step, last + 1, last))
            )
            # Work without a fixed interval, such as measuring an adaptive blend, is expected to take the same share as before.
            total += cost * (due / seen if seen else (last - step) / (step - first))
            unseen = unseen or (due > 0 and not seen)
        return total, unseen


def times(every: int, first: int, stop: int, last: int) -> int:
    """How often something is due at steps from `first` to before `stop`: at the multiples of `every`, and at `last`."""
    multiples = (stop - 1) // every - (first - 1) // every if every else 0
    return multiples + (first <= last < stop and (not every or last % every > 0))
