"""How many micro-batches each rank computes in a step. Note: a row that is longer than a model's context also breaks this
arithmetic. Then the row is the mistake that is named.
"""

from ted_scale.base.errors import UserError
from ted_scale.config.run import Run
from ted_scale.models import ulysses
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.inspection import inspect


def derive_accumulation(run: Run, world: int) -> int:
    """Micro-batches of a step on each rank."""
    train, seq_len, readers = run.train, run.data.seq_len, ulysses.groups_of(run, world)
    micro_step = train.micro_batch * seq_len * readers
    if train.tokens_per_step % micro_step:
        check_length_by_config(run)
        nearest = micro_step * max(1, round(train.tokens_per_step / micro_step))
        ranks = "ranks" if readers == world else "ranks / data.sequence_parallel"
        raise UserError(
            f"train.tokens_per_step must be a multiple of micro_batch * seq_len * {ranks} "
            f"({train.micro_batch} * {seq_len} * {readers} = {micro_step}), but is {train.tokens_per_step}; set {nearest}"
        )
    return train.tokens_per_step // micro_step


def check_length_by_config(run: Run) -> None:
    """Only where a step is refused anyway: no weights are fetched for it."""
    teacher = (
        run.teacher
        and run.method != "ce"
        and inspect("teacher.path", run.teacher.path, needs_weights=False, is_frozen=True)
    )
    check_length(run, inspect("student.path", run.student.path, needs_weights=False), teacher or None)


def check_length(run: Run, *models: Anatomy | None) -> None:
    for side, anatomy in zip(("student", "teacher"), models, strict=True):
        if anatomy and anatomy.max_length and run.data.seq_len > anatomy.max_length:
            limit = anatomy.max_length
            raise UserError(
                f"data.seq_len must be at most the {side}'s context ({limit}), but is {run.data.seq_len}; lower it"
            )
