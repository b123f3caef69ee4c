"""A validation: the losses of student and teacher on each corpus's held-out text, and the student's scores in a suite."""

import difflib
import logging
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist

from ted_scale.base.errors import UserError
from ted_scale.data.stream import Stream, validation_batches
from ted_scale.distill.normalization import count_valid
from ted_scale.distill.signal import Weights
from ted_scale.evaluation.scores import promised
from ted_scale.metrics.console import log_line
from ted_scale.ranks import pulse, signals
from ted_scale.ranks.agree import anywhere, broadcast
from ted_scale.vitals import alarms

SUITE = "val/suite/"
UNTAUGHT = "val/tokens"  # written as 0 in place of a loss: the validation was finished, but none of its tokens counts


class Loss(NamedTuple):
    """Sums over the valid tokens of a corpus, on all ranks. Without such tokens there is no mean."""

    total: float
    tokens: float

    @property
    def mean(self) -> float:
        return self.total / self.tokens


def validate(plan, teacher, metrics, held_out: dict[str, Stream], student, progress, *, with_teacher: bool = False):
    """Write the losses of this step, and the scores of validation.suite if they are due. Returns (progress with the loss,
    whether a signal asks to stop). After a signal, the resumed run measures what is missing."""
    progress, stopping = write_losses(plan, teacher, metrics, held_out, student, progress, with_teacher)
    if not stopping and plan.stages[-1].asks_suite(progress.step):
        progress, stopping = write_scores(plan, metrics, student, progress)
    return progress, stopping


def missing(plan, metrics, stage, progress) -> bool:
    """On rank 0: whether this step's validation was not finished, or lacks the number by which checkpoints are compared."""
    step = progress.step
    written = any(metrics.has_already(step, key) for key in ("val/loss", UNTAUGHT))
    losses = stage.validates(step) and holds_out(plan.run) and not written
    unjudged = lacks_best(plan.run, stage, progress) and not metrics.has_already(step, UNTAUGHT)
    return losses or unjudged or (stage.asks_suite(step) and not metrics.has_already(step, SUITE))


def lacks_best(run, stage, progress) -> bool:
    """Whether the number of checkpoint.best is due at this step but not known. The run stopped before, or the key is new."""
    best, step = run.checkpoint.best, progress.step
    due = stage.asks_suite(step) if best.startswith(SUITE) else stage.validates(step)
    return bool(best) and due and step > stage.first_step and best not in progress.scores


def judged(run, progress, row: dict[str, float]):
    """The progress with the number of checkpoint.best, if the row has it."""
    number = row.get(run.checkpoint.best, math.nan)
    return replace(progress, scores={run.checkpoint.best: number}) if math.isfinite(number) else progress


def write_scores(plan, metrics, student, progress):
    """val/suite/TASK/METRIC; nothing if an earlier process wrote them. Returns (progress, whether a signal asks to stop)."""
    needed = lacks_best(plan.run, plan.stages[-1], progress) and plan.run.checkpoint.best.startswith(SUITE)
    if not needed and broadcast(metrics.has_already(progress.step, SUITE)):
        return progress, False
    from ted_scale.evaluation import live  # lm-eval is an extra

    with metrics.aside():
        scores = live.ask(plan.suite, student, plan.student, plan.tokenizer, plan.run.validation)
    row = {f"{SUITE}{score.key}": score.value for score in scores or ()}
    metrics.write(progress.step, progress.tokens, row)
    if scores is not None:
        refuse_unknown(plan.run.checkpoint.best, row)
    return judged(plan.run, progress, row), scores is None


def refuse_unpromised(best: str, suite: dict) -> None:
    """Refuse a checkpoint.best that the suite does not have, before anything starts. A task that does not name its numbers is
    checked after its first answers, before stage II."""
    tasks, name = suite["tasks"], best.removeprefix(SUITE).partition("/")[0]
    if name in suite.get("groups", {}) or (name in tasks and not promised(name, tasks[name])):
        return
    refuse_unknown(best, [f"{SUITE}{key}" for task in tasks for key in promised(task, tasks[task])])


def refuse_unknown(best: str, row: Collection[str]) -> None:
    if best.startswith(SUITE) and best not in row:
        close = difflib.get_close_matches(best, row, n=4, cutoff=0.0)
        raise UserError(
            f"checkpoint.best must be a number of validation.suite, but is '{best}'; the nearest are {', '.join(close) or 'none'}"
        )


def write_losses(plan, teacher, metrics, held_out: dict[str, Stream], student, progress, with_teacher: bool):
    """Write val/loss and val/ppl, for all corpora together and for each. Corpora without tokens that count are left out.
    Nothing is written if no text is held out, or if a signal asks to stop."""
    if not held_out:
        return progress, False
    with metrics.aside():
        losses = measure_both(plan, student, held_out, teacher, held_out if with_teacher and plan.teacher else {})
    if losses is None:
        return progress, True
    of_student, of_teacher = losses
    if (untaught := untaught_of(of_student)) and metrics.writes:
        say_untaught(untaught, tokens_of_each(plan.run))
    row = as_row("", of_student) | as_row("teacher_", of_teacher)
    metrics.write(progress.step, progress.tokens, row or {UNTAUGHT: 0.0})
    if "val/teacher_loss" in row:
        judge_teacher(metrics, progress.step, row, math.log(plan.teacher.vocab_size))
    loss, progress = row.get("val/loss", math.nan), judged(plan.run, progress, row)
    return replace(progress, validation=loss if math.isfinite(loss) else None), False


def judge_teacher(metrics, step: int, row: dict[str, float], uniform: float) -> None:
    """Alert the user to a teacher that has nothing to teach. This comes before stage II, which may take days."""
    if found := alarms.of_teacher(row["val/teacher_loss"], row["val/loss"], uniform):
        cause, sentence = found
        metrics.alert(f"validation: {cause}", f"step {step}: {sentence}")


def untaught_of(losses: dict[str, Loss]) -> tuple[str, ...]:
    """The corpora without a loss, because none of the tokens that were read is a target."""
    return tuple(name for name, loss in losses.items() if not loss.tokens)


@cache  # log it once
def say_untaught(names: tuple[str, ...], tokens: int) -> None:
    log_line(
        f"corpus {', '.join(names)} has no val/loss: the first {tokens:,} tokens that it holds out have no target; raise "
        "validation.tokens, or set data.packing = 'examples'",
        logging.WARNING,
    )


def holds_out(run) -> bool:
    return any(corpus.validation for corpus in run.data.corpora)


def measure_both(plan, student, streams: dict[str, Stream], teacher, teacher_streams: dict[str, Stream]):
    """(the student's losses on `streams`, the teacher's on `teacher_streams`), by corpus. None if a signal asks to stop."""
    one = torch.ones((), device=student.device)
    student.eval()
    of_student = measure(plan, streams, lambda batch: student(batch, None, Weights(1.0, 0.0, 0.0), one).ce, one.device)
    student.train()
    if of_student is None:
        return None
    of_teacher = measure(plan, teacher_streams, lambda batch: teacher.ce(batch, one), one.device)
    return None if of_teacher is None else (of_student, of_teacher)


@torch.no_grad()
def measure(plan, streams: dict[str, Stream], summed_loss: Callable, device) -> dict[str, Loss] | None:
    """The losses by corpus. They are equal on every rank to the last bit, because decisions follow from them. The host waits
    for the device at every batch, so that a signal stops the validation."""
    if not streams:
        return {}
    sums = torch.zeros(2, len(streams), dtype=torch.float64, device=device)
    for k, stream in enumerate(streams.values()):
        for batch in batches(plan, stream, device):
            pulse.doing("a batch of validation")
            if anywhere(signals.asked.is_set(), device):
                return None
            sums[0, k] += summed_loss(batch)
            sums[1, k] += count_valid([batch])
    dist.all_reduce(sums[0])
    dist.broadcast(sums, src=0)
    return {name: Loss(*column) for name, column in zip(streams, sums.T.tolist(), strict=True)}


def batches(plan, stream: Stream, device):
    return validation_batches(
        stream, tokens=tokens_of_each(plan.run), micro_batch=plan.run.train.micro_batch,
        rank=dist.get_rank(), world=dist.get_world_size(), sequence_parallel=plan.run.data.sequence_parallel, device=device,
    )  # fmt: skip


def tokens_of_each(run) -> int:
    """validation.tokens divided by the number of corpora that hold text out."""
    return -(-run.validation.tokens // sum(corpus.validation > 0 for corpus in run.data.corpora))


def as_row(side: str, losses: dict[str, Loss]) -> dict[str, float]:
    every = Loss(math.fsum(x.total for x in losses.values()), math.fsum(x.tokens for x in losses.values()))
    of_each = {f"{name}/": loss for name, loss in losses.items()} if len(losses) > 1 else {}
    row = {}
    for name, loss in {"": every, **of_each}.items():
        if loss.tokens:
            row |= {f"val/{name}{side}loss": loss.mean, f"val/{name}{side}ppl": perplexity(loss.mean)}
    return row


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # JSON has no infinity
