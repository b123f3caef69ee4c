"""Next-token loss on text that is never trained on, of the student and once a stage of the teacher."""

import math

import torch
import torch.distributed as dist

from ted_scale.data import open_held_out, validation_batches
from ted_scale.losses import count_valid
from ted_scale.student import Weights


def validate(plan, teacher, metrics, vocabulary: int, device, student, progress, *, with_teacher: bool = False) -> None:
    """Write val/loss and val/ppl of this step; a run whose corpora hold nothing out has none."""
    if not any(corpus.validation for corpus in plan.run.data.corpora):
        return
    stream = open_held_out(plan.run.data, vocabulary)

    def batches():
        return validation_batches(
            stream, tokens=plan.run.validation.tokens, micro_batch=plan.run.train.micro_batch,
            rank=dist.get_rank(), world=dist.get_world_size(), device=device,
        )  # fmt: skip

    one = torch.ones((), device=device)
    student.eval()
    loss = mean_loss(batches(), lambda b: student(b, None, Weights(1.0, 0.0, 0.0), one).ce, device)
    student.train()
    row = {"val/loss": loss, "val/ppl": perplexity(loss)}
    if with_teacher and plan.teacher:
        loss = mean_loss(batches(), lambda b: teacher.ce(b, one), device)
        row |= {"val/teacher_loss": loss, "val/teacher_ppl": perplexity(loss)}
    metrics.write(progress.step, progress.tokens, row)


@torch.no_grad()
def mean_loss(batches, summed_loss, device) -> float:
    """Mean over all valid tokens on all ranks; the only host read is at the end."""
    total, count = torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), device=device)
    for batch in batches:
        total += summed_loss(batch)
        count += count_valid([batch])
    dist.all_reduce(total)
    return (total / count).item()


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # JSON has no infinity
