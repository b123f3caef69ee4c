"""What filters may cost: how wide they are and how many rows stage I reads where the run file says `auto`.

Worked out once, before anything starts, and written into the plan's run, so that the rest of the program knows numbers
alone. The surprise: at full width and on all rows stage I's heads would be most of what a token costs, and its filters
40 % of a student that is an eighth of its teacher.
"""

from typing import NamedTuple

from ted_scale.base.errors import UserError
from ted_scale.config.run import Run
from ted_scale.distill import flops
from ted_scale.distill.filters import has_lift
from ted_scale.models.anatomy import Anatomy

SHARE = 0.05  # of the student's parameters: what stage I trains, both sides and the lifts; docs/design has the evidence
LEAST_ROWS = 32  # of a pair, a step
TILE = 16  # a width is a multiple of it


class Sides(NamedTuple):
    """What of a plan its price is worked out from, before there is one."""

    run: Run
    student: Anatomy
    teacher: Anatomy
    pairs: list

    @property
    def width(self) -> int:
        return int(self.run.filters.width)


def resolved(run: Run, student: Anatomy, teacher: Anatomy, pairs: list) -> Run:
    """The run with its filters' numbers in the place of words."""
    run = with_filters(run, width=filter_width(run, student, teacher, len(pairs)))
    if run.filters.sample_tokens != "auto":
        return run
    return with_filters(run, sample_tokens=share_of_tokens(Sides(run, student, teacher, pairs)))


def with_filters(run: Run, **values) -> Run:
    return run.model_copy(update={"filters": run.filters.model_copy(update=values)})


def filter_width(run: Run, student: Anatomy, teacher: Anatomy, count: int) -> int:
    """The common width D, and which heads can read a state of that width in stage I."""
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
    """The widest of which stage I trains no more than SHARE: the teacher's where that fits, for it needs no lift."""
    budget = SHARE * student.parameters / count
    if teacher.width * (teacher.width + student.width + 2) <= budget:
        return teacher.width
    fit = int(budget / (2 * teacher.width + student.width + 2)) // TILE * TILE
    return min(max(fit, TILE), teacher.width)


def share_of_tokens(sides: Sides) -> float:
    """Whole positions of a sequence: as many as cost no more than both bodies' forward, but LEAST_ROWS a step."""
    run, length, count = sides.run, sides.run.data.seq_len, len(sides.pairs)
    drawn = min(run.filters.sample_pairs or count, count) / count
    row = flops.stage_one_flops(sides, 1.0, drawn) - flops.stage_one_flops(sides, 0.0, drawn)
    fit = length * flops.bodies_flops(sides, flops.keys_of([length])) / row
    least = -(-LEAST_ROWS * length // run.train.tokens_per_step)
    return min(length, max(int(fit), least)) / length


def filter_parameters(plan) -> dict[str, int]:
    """Of all pairs, by what they belong to, heads of their own apart; stage I alone has lifts."""
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
    """What is trained beside the student, and what stage I reads."""
    counts, filters, count = filter_parameters(plan), plan.run.filters, len(plan.pairs)
    sides = " + ".join(f"{number / 1e6:,.2f} M ({side})" for side, number in counts.items() if number)
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
        reads = "\nno stage I, for filters.steps is 0: filters.head, sample_tokens and sample_pairs decide nothing"
    trained = f"trained of the student's size: {', '.join(shares)}"
    return f"filters: width {plan.width}, {sides} parameters; {trained}{reads}"
