"""What a first run should be, from the models' sizes, the text's tokens and this machine: each value with its reason.

Note: these are starting points by rule, not results; memory is the dry run's own estimate.
"""

import dataclasses
from typing import Any, NamedTuple

from ted_scale.base.counts import millions
from ted_scale.base.errors import UserError
from ted_scale.config.run import Run
from ted_scale.forecast.placement import Rank, place, usable
from ted_scale.forecast.placement import needed as bytes_needed
from ted_scale.plan import Plan, plan_of_models

WINDOWS = 64  # a text must have as many rows, so that it is more than a few batches
SHORTEST_ROW = 16
ROWS = {"cpu": 512, "cuda": 4096}  # usual lengths: attention costs more than it teaches beyond
MICRO_BATCHES = {"cpu": 8, "cuda": 32}  # more rows at once gain nothing
STEP_TOKENS = {"cpu": 2**14, "cuda": 2**19}
STEPS, FEWEST_STEPS = 1000, 20  # of a first run; below, nothing is learned
EPOCHS, TOKENS_PER_PARAMETER = 4, 20  # docs/data.md: up to 4 repetitions are worth nearly as much as new text
HELD_OUT, MOST_HELD_OUT, HELD_OUT_ROWS = 0.02, 0.1, 8
RATES = ((100e6, 5e-4), (1e9, 2e-4), (float("inf"), 3e-5))  # of students with fewer parameters, as launch/runs has them


class Choice(NamedTuple):
    value: Any  # of a key of the run file
    why: str


class Given(NamedTuple):
    """`length` is the shorter context of both models, None for no limit; `tokens` those of the text."""

    tokens: int
    length: int | None
    parameters: int  # of the student
    rank: Rank
    world: int


def of_text(given: Given) -> dict[str, Choice]:
    """What follows without the memory: a row's length and what is held out."""
    device, limit = given.rank.device, given.length or ROWS[given.rank.device]
    seq_len = power_of_two(min(limit, ROWS[device], given.tokens // WINDOWS))
    if seq_len < SHORTEST_ROW:
        raise UserError(
            f"--text must have at least {WINDOWS * SHORTEST_ROW:,} tokens, but has {given.tokens:,}; add text"
        )
    share = round(min(max(HELD_OUT, HELD_OUT_ROWS * seq_len / given.tokens), MOST_HELD_OUT), 3)
    held = max(seq_len, int(share * given.tokens) // seq_len * seq_len)
    context = f"{given.length:,} is the models' context" if given.length else "the models have no limit"
    return {
        "data.seq_len": Choice(
            seq_len,
            f"tokens of a row: {context}, {ROWS[device]} is usual on {device}, and the text has {given.tokens:,} tokens",
        ),
        "validation": Choice(share, f"share of the text that is held out, at its end: {held:,} tokens to judge by"),
        "validation.tokens": Choice(min(held, 2**16), "read at each validation: what is held out, at most 65,536"),
    }


def of_memory(plan: Plan, given: Given) -> dict[str, Choice]:
    """The largest micro-batch that fits, without checkpointing where that leaves one."""
    device, budget = given.rank.device, budget_of(given)
    most = min(MICRO_BATCHES[device], budget // (FEWEST_STEPS * plan.run.data.seq_len * given.world))
    sizes = [2**n for n in range(most.bit_length() - 1, -1, -1)] or [1]
    for checkpointing in (False, True):
        for size in sizes:
            gib = needs(plan, given.rank, size, checkpointing)
            if gib <= usable(given.rank) / 2**30 or (checkpointing and size == 1):
                return said_of_memory(size, checkpointing, gib, given.rank)
    raise AssertionError("the last pair is always taken")


def said_of_memory(size: int, checkpointing: bool, gib: float, rank: Rank) -> dict[str, Choice]:
    has = f"{gib:.1f} GiB by the estimate of the dry run, {rank.memory / 2**30:.0f} a rank here"
    fits = "the most that fits and helps" if gib <= usable(rank) / 2**30 else "NONE FITS, this needs least"
    again = (
        "the activations do not fit otherwise"
        if checkpointing
        else "the activations fit; true computes them again in backward"
    )
    return {
        "train.micro_batch": Choice(size, f"rows of a rank at once, {fits}: {has}"),
        "student.gradient_checkpointing": Choice(checkpointing, again),
    }


def needs(plan: Plan, rank: Rank, micro_batch: int, checkpointing: bool) -> float:
    """GiB of a rank."""
    run = plan.run
    train = run.train.model_copy(update={"micro_batch": micro_batch})
    student = run.student.model_copy(update={"gradient_checkpointing": checkpointing})
    plan = dataclasses.replace(plan, run=run.model_copy(update={"train": train, "student": student}))
    plan = dataclasses.replace(plan, placement=place(plan, rank))
    return bytes_needed(plan, rank.device) / 2**30


def of_budget(given: Given, seq_len: int, micro_batch: int) -> dict[str, Choice]:
    """Steps, and what a step reads."""
    device, budget, unit = given.rank.device, budget_of(given), micro_batch * seq_len * given.world
    step = unit * power_of_two(max(1, min(budget // STEPS, STEP_TOKENS[device]) // unit))
    once, most = max(1, given.tokens // step), max(1, budget // step)
    steps = max(2, min(STEPS, most))
    ranks = f"{micro_batch} rows of {seq_len} on {given.world} rank{'s' if given.world > 1 else ''}"
    return {
        "train.tokens_per_step": Choice(step, f"a multiple of {unit:,}: {ranks}; over all ranks"),
        "train.steps": Choice(
            steps, f"{once:,} steps read the text once, {most:,} as often as pays; a first run takes at most {STEPS:,}"
        ),
        "train.warmup_steps": Choice(max(1, steps // 20), "a twentieth of the steps"),
        "validation.every": Choice(max(1, steps // 5), "five points on the curve, beside start and end"),
        "checkpoint.every": Choice(max(1, steps // 5), "what a crash may cost at most"),
        "log_every": Choice(max(1, min(10, steps // 20)), "steps"),
    }


def of_model(given: Given) -> dict[str, Choice]:
    rate = next(rate for most, rate in RATES if given.parameters < most)
    size = f"{millions(given.parameters, 1)} parameters"
    precision, why = (
        ("fp32", "16 bits are slow on most CPUs") if given.rank.device == "cpu" else ("bf16", "half the bytes of fp32")
    )
    return {
        "train.lr": Choice(
            rate, f"as run files in launch/runs have it for a student of about {size}; halve it if the loss jumps"
        ),
        "train.min_lr": Choice(rate / 10, "a tenth, at the end of the schedule"),
        "train.precision": Choice(precision, why),
    }


def budget_of(given: Given) -> int:
    """Tokens to read: one pass over much text, up to four over little."""
    return max(given.tokens, min(EPOCHS * given.tokens, TOKENS_PER_PARAMETER * given.parameters))


def power_of_two(number: int) -> int:
    """The largest that is not above it; 0 for 0."""
    return 2 ** (number.bit_length() - 1) if number > 0 else 0


def plan_to_size(values: dict, world: int) -> Plan:
    """A plan whose sizes are still the smallest; the configs of the models are looked at once."""
    return plan_of_models(Run.model_validate(values), world, needs_weights=False)
