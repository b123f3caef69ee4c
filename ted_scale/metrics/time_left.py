"""The time that is left of a stage and of its run: steps at the pace of the last rows, and the validations, samples and saves.

Each of these costs what it cost on average in this stage; that is in the run's ledger. Note: the first step of a stage compiles and
loads, so measuring begins after it.
"""

from collections import deque
from typing import NamedTuple

from ted_scale.checkpoints.life import Spent

ROWS = 20  # that the pace is taken from: the terms of the loss, and so a step's work, may change within a stage
BESIDE = ("validation", "samples", "checkpoints")  # what steps wait for, by the ledger's names


class Ahead(NamedTuple):
    """A stage that begins, and what its run still has to do."""

    name: str
    first: int
    last: int
    each: dict[str, int]  # a part of BESIDE that this stage has → its steps; 0: at the stage's end alone
    later_s: float | None  # of the stages after this one by the forecast; None if nobody knows
    forecast: dict[str, float]  # of its steps, for the rows


class Left(NamedTuple):
    """Seconds. A guess if a part of it was not measured."""

    stage: float
    is_guess: bool
    run: float | None  # None if nobody knows how long the stages after this one take


class TimeLeft:
    def __init__(self, ahead: Ahead):
        self.ahead = ahead
        self.began: tuple[int, Spent] | None = None
        self.rows: deque[tuple[int, float]] = deque(maxlen=ROWS)

    def begin(self, step: int, spent: Spent) -> None:
        """After the first step, and after the run went back."""
        self.began = (step, spent)
        self.rows = deque([(step, spent.steps)], maxlen=ROWS)

    def row(self, step: int, spent: Spent) -> Left | None:
        """What is left after this step, before what is due at it. None before there is something to measure by."""
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
        """(seconds beside steps, whether something to come has not been seen yet)"""
        first, then = self.began
        total, unseen, last = 0.0, False, self.ahead.last
        for part in BESIDE:
            cost, every = getattr(spent, part) - getattr(then, part), self.ahead.each.get(part)
            seen, due = (
                (0, 0) if every is None else (times(every, first, step, last), times(every, step, last + 1, last))
            )
            # What follows another calendar, an adaptive blend for instance, goes on as it was.
            total += cost * (due / seen if seen else (last - step) / (step - first))
            unseen = unseen or (due > 0 and not seen)
        return total, unseen


def times(every: int, first: int, stop: int, last: int) -> int:
    """How often something is due at steps from `first` to before `stop`: at the multiples of `every`, and at `last`."""
    multiples = (stop - 1) // every - (first - 1) // every if every else 0
    return multiples + (first <= last < stop and (not every or last % every > 0))
