"""Next-token loss on text that is never trained on: of every corpus that holds some out, by the student and by the teacher."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from ted_scale.base.errors import Preempted
from ted_scale.data.stream import Stream, open_held_out, validation_batches
from ted_scale.distill.normalization import count_valid
from ted_scale.distill.signal import Weights
from ted_scale.ranks import pulse, signals


class Loss(NamedTuple):
    """Sums over the valid tokens of a corpus, on all ranks."""

    total: float
    tokens: float

    @property
    def mean(self) -> float:
        return self.total / self.tokens


def validate(plan, teacher, metrics, vocabulary: int, device, student, progress, *, with_teacher: bool = False):
    """Write val/loss and val/ppl of this step, over all and of each corpus; a run that holds nothing out has none. Returns the
    progress, which knows the loss then, and whether a signal cut it short, on every rank: the resumed run then validates this
    step."""
    if not holds_out(plan.run):
        return progress, False
    try:
        with metrics.aside():
            streams = open_held_out(plan.run.data, vocabulary)
            row = as_row("", student_losses(plan, streams, student, device))
            if with_teacher and plan.teacher:
                row |= as_row("teacher_", teacher_losses(plan, streams, teacher, device))
    except Preempted:
        return progress, True
    metrics.write(progress.step, progress.tokens, row)
    loss = row["val/loss"]
    return replace(progress, validation=loss if math.isfinite(loss) else None), False


def holds_out(run) -> bool:
    return any(corpus.validation for corpus in run.data.corpora)


def student_losses(plan, streams: dict[str, Stream], student, device) -> dict[str, Loss]:
    one = torch.ones((), device=device)
    student.eval()
    losses = measure(plan, streams, lambda batch: student(batch, None, Weights(1.0, 0.0, 0.0), one).ce, device)
    student.train()
    return losses


def teacher_losses(plan, streams: dict[str, Stream], teacher, device) -> dict[str, Loss]:
    one = torch.ones((), device=device)
    return measure(plan, streams, lambda batch: teacher.ce(batch, one), device)


@torch.no_grad()
def measure(plan, streams: dict[str, Stream], summed_loss: Callable, device) -> dict[str, Loss]:
    """The same numbers on every rank, to the last bit, for what follows from them must be the same. A host read a batch, for a
    run that is asked to stop must not validate on."""
    sums = torch.zeros(2, len(streams), dtype=torch.float64, device=device)
    for k, stream in enumerate(streams.values()):
        for batch in batches(plan, stream, device):
            pulse.beat("a batch of validation")
            if signals.anywhere(device):
                raise Preempted
            sums[0, k] += summed_loss(batch)
            sums[1, k] += count_valid([batch])
    dist.all_reduce(sums[0])
    dist.broadcast(sums, src=0)
    return {name: Loss(*column) for name, column in zip(streams, sums.T.tolist(), strict=True)}


def batches(plan, stream: Stream, device):
    return validation_batches(
        stream, tokens=tokens_of_each(plan.run), micro_batch=plan.run.train.micro_batch,
        rank=dist.get_rank(), world=dist.get_world_size(), device=device,
    )  # fmt: skip


def tokens_of_each(run) -> int:
    """validation.tokens, shared out to the corpora that hold some out."""
    return -(-run.validation.tokens // sum(corpus.validation > 0 for corpus in run.data.corpora))


def as_row(side: str, losses: dict[str, Loss]) -> dict[str, float]:
    every = Loss(math.fsum(x.total for x in losses.values()), math.fsum(x.tokens for x in losses.values()))
    of_each = {f"{name}/": loss for name, loss in losses.items()} if len(losses) > 1 else {}
    row = {}
    for name, loss in {"": every, **of_each}.items():
        row |= {f"val/{name}{side}loss": loss.mean, f"val/{name}{side}ppl": perplexity(loss.mean)}
    return row


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # JSON has no infinity
