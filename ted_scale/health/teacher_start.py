"""The teacher's first call in a stage: how long compiling takes, and how much 8 bits differ from bf16.

Both are measured before the student is built. Note: the bf16 teacher is never whole on the device. One of its blocks at a time is
read from the files (quantized.py), while every rank runs its own micro-batch.
"""

import logging
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from ted_scale.base.errors import UserError
from ted_scale.data.loader import first_batches
from ted_scale.data.stream import Stream, joined
from ted_scale.distill.memory import together
from ted_scale.distill.teacher import Teacher, TeacherBody
from ted_scale.kernels import linear_kl_ce
from ted_scale.kernels.tokens import valid_weights
from ted_scale.models.quantized import unrounded
from ted_scale.ranks import pulse

log = logging.getLogger("ted_scale")

MOST_KL, MOST_ERROR = 0.1, 0.2  # a choice: SmolLM2-135M has 0.004 and 0.033 in int8, 0.028 and 0.11 in fp8


class Cost(NamedTuple):
    """How much the rounding of a teacher changes."""

    kl: float  # KL(bf16 ‖ 8 bits), nats a token
    errors: dict[int, float]  # matched block → ‖its state − that of bf16‖ / ‖that of bf16‖

    def row(self) -> dict[str, float]:
        return {"teacher/kl_to_bf16": self.kl} | {f"teacher/state_error/{b}": error for b, error in self.errors.items()}

    def __str__(self) -> str:
        said, errors = f"KL {self.kl:.2g} nats a token", self.errors.values()
        return f"{said}, relative error of matched states {min(errors):.2g} to {max(errors):.2g}" if errors else said


def begin(plan, stream: Stream, teacher, metrics, progress, device) -> None:
    """If the teacher is compiled or rounded, run it once, and log the time or the difference. A collective."""
    if plan.teacher is None or not plan.run.teacher.is_whole:
        return
    pulse.building("the teacher's first micro-batch")
    tokens = plan.readers * plan.run.train.micro_batch * stream.seq_len
    batch = next(first_batches(plan.run, stream, tokens, device))
    if plan.run.teacher.compile:
        log_line(seconds_of_compiling(teacher, joined([batch] * together(plan)), bool(plan.pairs)))
    if bits := plan.run.teacher_bits:
        say_cost(plan, bits, teacher, batch, metrics, progress)


def log_line(line: str) -> None:
    if dist.get_rank() == 0:
        log.info(line)


def seconds_of_compiling(teacher: Teacher, batch, wants_layers: bool) -> str:
    from torch._dynamo.exc import TorchDynamoException

    def seconds() -> float:
        began = time.perf_counter()
        float(teacher.run(batch, wants_layers, True).last_NE.sum())  # reading the value waits for the device
        return time.perf_counter() - began

    try:
        with torch.no_grad():
            first, second = seconds(), seconds()
    except TorchDynamoException as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"teacher.compile must be false where torch cannot compile the teacher's blocks, but is true: {reason}; leave it out"
        ) from None
    return f"the teacher's first call took {first:.3g} s, with compiling its blocks; the second took {second:.3g} s"


def say_cost(plan, bits: str, teacher: Teacher, batch, metrics, progress) -> None:
    if plan.run.teacher.init == "random":
        log_line(f"the teacher is random: what {bits} costs it is not measured")
        return
    network = unrounded(teacher.body.network, plan.teacher, batch.tokens_BT.device)
    exact = TeacherBody(network, plan.teacher, teacher.body.blocks)
    cost = cost_of(teacher, exact, batch, plan.run.loss)
    said = f"the teacher in {bits} beside bf16, on {plan.readers} micro-batches: {cost}"
    log_line(said)
    metrics.write(progress.step, progress.tokens, cost.row())
    if cost.kl > MOST_KL or max(cost.errors.values(), default=0.0) > MOST_ERROR:
        metrics.alert(
            "a coarse teacher",
            f"warning: {said}; that is more than {MOST_KL:g} nats or {MOST_ERROR:g}: take another precision",
        )


@torch.no_grad()
def cost_of(teacher: Teacher, exact: TeacherBody, batch, loss) -> Cost:
    """The difference between the rounded and the exact teacher, over the micro-batches of all ranks."""
    blocks, wants = teacher.body.blocks, bool(teacher.body.blocks)
    rounded, whole = teacher.body(batch, wants), exact(batch, wants)
    norms = {b: norms_of(x, y) for b, x, y in zip(blocks, rounded.layers_NE, whole.layers_NE, strict=True)}
    valid = (valid_weights(batch.labels_BT, batch.weights_BT) > 0).sum().float()
    of_head = torch.stack([valid, kl_sum(teacher.head, rounded.last_NE, whole.last_NE, batch, loss)])
    found = torch.cat([of_head, *norms.values()]).double()
    if dist.is_initialized():
        dist.all_reduce(found)
    tokens, kl, *squares = found.tolist()
    errors = {b: (squares[2 * k] / squares[2 * k + 1]) ** 0.5 for k, b in enumerate(norms)}
    return Cost(kl / tokens, errors)


def norms_of(rounded_NE, whole_NE):
    """[squared norm of the difference, squared norm of the second]"""
    whole_NE = whole_NE.float()
    return torch.stack([(rounded_NE.float() - whole_NE).square().sum(), whole_NE.square().sum()])


def kl_sum(head, rounded_NE, whole_NE, batch, loss):
    """The sum of KL over this rank's valid tokens, computed in chunks of logits."""
    one, weight, settings = rounded_NE.new_ones((), dtype=torch.float32), head.weight, {}
    for side in "st":
        settings |= head.linear_kl_ce_arguments(side)
    return linear_kl_ce(
        rounded_NE, weight, whole_NE, weight, batch.labels_BT.flatten(), batch.weights_BT.flatten(), denom=one, ce_weight=0.0,
        backend=loss.backend, chunk_tokens=loss.chunk_tokens, **settings,
    )[1]  # fmt: skip
