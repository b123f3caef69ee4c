"""The width of filters and the share of tokens that stage I reads, if the run file says `auto`.

They are computed once, before anything starts, and written into the plan's run. So the rest of the program sees only numbers. At
full width and on all rows, stage I's heads would be most of the cost of a token. For a student that is an eighth of its teacher,
the filters would have 40 % of the student's parameters.
"""

from typing import NamedTuple

from ted_scale.base.counts import millions
from ted_scale.base.errors import UserError
from ted_scale.config.run import Run
from ted_scale.distill import flops
from ted_scale.distill.filters import has_lift
from ted_scale.models.anatomy import Anatomy

# Stage I trains at most this share of the student's parameters, lifts included; design note 26 has the evidence.
SHARE = 0.05
LEAST_ROWS = 32  # that a pair reads in a step, at least
TILE = 16  # widths are multiples of it


class Sides(NamedTuple):
    """The values from which the sizes follow. There is no plan yet."""

    run: Run
    student: Anatomy
    teacher: Anatomy
    pairs: list

    @property
    def width(self) -> int:
        return int(self.run.filters.width)


def resolved(run: Run, student: Anatomy, teacher: Anatomy, pairs: list) -> Run:
    """The run with numbers instead of `auto` and `full`."""
    run = with_filters(run, width=filter_width(run, student, teacher, len(pairs)))
    if run.filters.sample_tokens != "auto":
        return run
    return with_filters(run, sample_tokens=share_of_tokens(Sides(run, student, teacher, pairs)))


def with_filters(run: Run, **values) -> Run:
    return run.model_copy(update={"filters": run.filters.model_copy(update=values)})


def filter_width(run: Run, student: Anatomy, teacher: Anatomy, count: int) -> int:
    """The common width F; refuses a width that stage I's head cannot read."""
    width, head = run.filters.width, run.filters.head
    if width == "full" or (width == "auto" and run.method == "lwd"):
        width = teacher.width
    if width == "auto":
        width = auto_width(student, teacher, count)
    if run.method == "lwd":
        if width != teacher.width:
            raise UserError(f"filters.width must be the teacher's ({teacher.width}) for lwd, but is {width}")
        return width
    if head != "per_layer" and width > teacher.width:
        raise UserError(
            f"filters.width must be at most the teacher's ({teacher.width}) for filters.head = '{head}', but is {width}; "
            "leave it out or use head = 'per_layer'"
        )
    if head == "own" and learns_filters(run) and teacher.width != student.width:
        raise UserError(
            f"filters.head = 'own' must have student and teacher of one width, but they have {student.width} and "
            f"{teacher.width}; use 'shared' or 'per_layer'"
        )
    return width


def learns_filters(run: Run) -> bool:
    return run.method == "ted" and run.filters.steps > 0 and not run.filters.from_run


def auto_width(student: Anatomy, teacher: Anatomy, count: int) -> int:
    """The largest width for which stage I trains at most SHARE. The teacher's width is used if it fits, because it needs no
    lift."""
    budget = SHARE * student.parameters / count
    if teacher.width * (teacher.width + student.width + 2) <= budget:
        return teacher.width
    fit = int(budget / (2 * teacher.width + student.width + 2)) // TILE * TILE
    return min(max(fit, TILE), teacher.width)


def share_of_tokens(sides: Sides) -> float:
    """The largest share of tokens for which stage I's heads cost no more than the forward of both bodies, but at least
    LEAST_ROWS rows a step."""
    run, length, count = sides.run, sides.run.data.seq_len, len(sides.pairs)
    share = min(run.filters.sample_pairs or count, count) / count
    row = flops.stage_one_flops(sides, 1.0, share) - flops.stage_one_flops(sides, 0.0, share)
    fit = length * flops.bodies_flops(sides, flops.keys_of([length])) / row
    least = -(-LEAST_ROWS * length // run.train.tokens_per_step)
    return min(length, max(int(fit), least)) / length


def filter_parameters(plan) -> dict[str, int]:
    """Parameters of all pairs' filters by side, without own heads; stage I alone has lifts."""
    count, width, mlp = len(plan.pairs), plan.width, plan.run.filters.mlp
    ted, learns = plan.run.method == "ted", plan.stages[0].learns_filters

    def one(width_in: int) -> int:
        return width * (width_in + 1) + (mlp * (2 * width_in + 1) + width_in if mlp else 0)

    return {
        "student": count * one(plan.student.width),
        "teacher": count * one(plan.teacher.width) if count and ted else 0,
        "lifts": count * width * plan.teacher.width if learns and has_lift(plan.run, plan.teacher) else 0,
    }


def describe(plan) -> str:
    """The line for the dry run and the log: the filters' parameters, and what stage I reads."""
    counts, filters, count = filter_parameters(plan), plan.run.filters, len(plan.pairs)
    sides = " + ".join(f"{millions(number)} ({side})" for side, number in counts.items() if number)
    shares = [f"stage student {counts['student'] / plan.student.parameters:.2%}"]
    reads = ""
    if plan.stages[0].learns_filters:
        shares.insert(0, f"stage filters {sum(counts.values()) / plan.student.parameters:.2%}")
        rows, drawn = round(filters.sample_tokens * plan.run.train.tokens_per_step), filters.sample_pairs or count
        reads = (
            f"\nstage filters reads {rows:,} rows a step ({filters.sample_tokens:.3g} of the tokens) in {min(drawn, count)} of "
            f"{count} pairs"
        )
    elif plan.run.method == "ted" and not filters.from_run:
        reads = "\nno stage I, because filters.steps is 0: filters.head, sample_tokens and sample_pairs have no effect"
    trained = f"trained of the student's size: {', '.join(shares)}"
    return f"filters: width {plan.width}, {sides} parameters; {trained}{reads}"
