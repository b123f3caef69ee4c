"""The number of steps that train.epochs means, computed from the number of rows of the corpus.

A row is a window of data.seq_len tokens, or the examples packed into one. Held-out text does not count. The rows are rounded up
to whole steps, so the last step may begin the next epoch. For a corpus that must not repeat they are rounded down. With several
corpora, the corpus of train.epochs_of is counted, and the others are read by their shares. Note: a resumed run keeps the number
of steps of its start.
"""

import math
from fractions import Fraction

from pydantic import ValidationError

from ted_scale.base.errors import UserError
from ted_scale.config.run import Run
from ted_scale.config.run_file import sentence
from ted_scale.data import blend, order
from ted_scale.data.stream import open_stream

ANY = 1 << 31  # a vocabulary that any token fits, because no token is read


def resolved(run: Run, before: dict | None = None) -> Run:
    """The run with a number of steps. `before` is the run file in the checkpoint that it resumes from. It has the steps of its
    start."""
    if run.train.steps:
        return run
    return with_steps(run, steps_before(run, before or {}) or counted(run))


def steps_before(run: Run, before: dict) -> int:
    """The steps in `before`. 0 if it had no train.epochs, or a different number of them."""
    train, keys = before.get("train", {}), ("epochs", "epochs_of")
    return train["steps"] if all(train.get(key) == getattr(run.train, key) for key in keys) else 0


def counted(run: Run) -> int:
    """The steps, counted from the corpora as they are now."""
    stream = open_stream(run.data, run.seed, ANY)
    names = [domain.name for domain in stream.interval.domains]
    which = names.index(run.train.epochs_of or names[0])
    rows = blend.units(stream.interval.domains[which].tokens, run.data.seq_len)
    # Fraction(repr(0.1)) is a tenth; the float 0.1 is a little more.
    samples = math.ceil(Fraction(repr(run.train.epochs)) * rows)
    end = order.until(samples, which, stream.interval.shares, stream.interval.key)
    steps = Fraction(end * run.data.seq_len, run.train.tokens_per_step)
    may_repeat = next(corpus.repeat for corpus in run.data.corpora if corpus.name == names[which])
    return math.ceil(steps) if may_repeat else max(1, math.floor(steps))


def with_steps(run: Run, steps: int) -> Run:
    """The run with `steps` steps. All rules of the run file are checked again, because warm-up and schedules must fit the steps."""
    values = run.model_dump(by_alias=True, exclude_none=True)
    kept = {key: values["train"].pop(key) for key in ("epochs", "epochs_of") if key in values["train"]}
    values["train"]["steps"] = steps
    try:
        known = Run.model_validate(values)
    except ValidationError as error:
        raise UserError(f"train.epochs = {run.train.epochs:g} is {steps} steps: {sentence(error)}") from None
    return known.model_copy(update={"train": known.train.model_copy(update=kept)})


def describe(run: Run) -> list[str]:
    """A warning if train.epochs would mean another number of steps now than when the run began."""
    if not run.train.epochs or (now := counted(run)) == run.train.steps:
        return []
    return [
        f"train.epochs = {run.train.epochs:g} would be {now:,} steps of what the corpora hold now: the run keeps the "
        f"{run.train.steps:,} of its start; set train.steps = {now} for the others"
    ]
