"""The time of an optimizer step by terms, in seconds: what each part computes, reads, writes and sends, over a machine's rates.

    teacher      its forward for the micro-batches that ask for it; streamed from the host, no faster than its blocks arrive
    student      forward, backward, and the second forward of checkpointing
    head         output projections of both sides, with cross-entropy and KL
    layer loss   the filters and their gradients; in stage I filters and heads
    gathers      of weights that ranks share, where no computation hides them
    reduction    gradients summed in fp32, and sent where there are several ranks
    optimizer    norm, clipping, AdamW, new weights: of this rank's share
    data         a batch's copy to the device; it was read before

Note: nothing is fitted here. Every rate is the machine's, every count that of flops.py, work.py or traffic.py.
"""

import math

import torch

from ted_scale.distill import flops
from ted_scale.distill.memory import bytes_of, streams, together, tokens_of
from ted_scale.distill.trained import trained_parameters
from ted_scale.forecast import traffic
from ted_scale.forecast.machine import Machine
from ted_scale.forecast.work import passes
from ted_scale.models.attention import choose_path

BATCH_BYTES = 20  # a token's id, label and weight
# Bytes a parameter beside the new weight: its gradient copied, its norm, clipping, AdamW over weight and moments, the master read.
UPDATE_BYTES = 52
FUSED_CALLS = 0.25  # of a pass's operations where torch compiles its blocks: assumed
SAMPLES = 64  # steps of a stage that are looked at: loss weights come and go


def seconds(plan, stage, step: int, machine: Machine, local: int) -> dict[str, float]:
    """Of the step after `step` steps of the run, by term."""
    b, keys = bytes_of(plan), plan.attended.__getitem__
    parts = flops.of_parts(plan, stage, step, keys)
    tokens, micro = tokens_of(plan), plan.accumulation
    trained = trained_parameters(plan, stage)
    teacher, student = teacher_pass(plan, stage, parts, tokens, machine), student_pass(plan, stage, tokens, machine)
    again = plan.run.student.gradient_checkpointing and not stage.learns_filters
    exposed = gathers_of_teacher(plan, stage, teacher, machine, local) if "teacher" in parts else 0.0
    exposed = exposed / stage.asks_every
    exposed += hidden(traffic.student_gathers(plan, stage, b, machine.device), sum(student), machine, local)
    sums = local_sums(trained, b) / machine.copies
    # On CPU ranks the backward waits for each reduction: DeepSpeed has no stream to send it from.
    waits = plan.run.train.reduce_once or machine.device == "cpu"
    beside = 0.0 if waits else student[1]
    reduced = traffic.as_received(traffic.reduction(plan, stage, trained, machine.device), machine.device)
    sums += hidden(reduced, beside, machine, local)
    rates = {"head": machine.head, "filters": machine.head, "layer loss": machine.layer}
    rows = {name: tokens * sum(parts[name]) / rate for name, rate in rates.items() if name in parts}
    each = {
        "teacher": teacher / stage.asks_every,
        "student": student[0] * (2 if again else 1) + student[1],
        "head": rows.get("head", 0.0),
        "layer loss": rows.get("layer loss", 0.0) + rows.get("filters", 0.0),
        "gathers": exposed,
        "reduction": sums,
        "data": BATCH_BYTES * tokens / machine.host_link,
    }
    found = {name: micro * value for name, value in each.items()}
    return {**found, "optimizer": (UPDATE_BYTES + b) * trained / plan.world / machine.update}


def local_sums(trained: float, b: int) -> float:
    """Bytes a micro-step: a gradient is read and added to its fp32 sum."""
    return (b + 8) * trained


def calls_of_teacher(plan, stage) -> float:
    """For each micro-batch that asks it: a call reads several of a step."""
    asking = max(1.0, plan.accumulation / stage.asks_every)
    return math.ceil(asking / together(plan)) / asking


def teacher_pass(plan, stage, parts: dict, tokens: int, machine: Machine) -> float:
    """Its forward of a micro-batch, or the copy of its blocks from the host if that takes longer."""
    if "teacher" not in parts:
        return 0.0
    calls = calls_of_teacher(plan, stage)
    computed = body_pass(plan, "teacher", tokens, machine, calls)[0]
    copied = bytes_of(plan) * plan.teacher.in_blocks / machine.host_link if streams(plan.placement) else 0.0
    return max(computed, calls * copied)


def gathers_of_teacher(plan, stage, forward: float, machine: Machine, local: int) -> float:
    """What its forward of a micro-batch leaves of them."""
    calls = calls_of_teacher(plan, stage)
    return calls * hidden(traffic.teacher_gathers(plan, bytes_of(plan)), forward / calls, machine, local)


def student_pass(plan, stage, tokens: int, machine: Machine) -> tuple[float, float]:
    """(forward, backward)"""
    forward, backward = body_pass(plan, "student", tokens, machine)
    return forward, 0.0 if stage.learns_filters else backward


def body_pass(plan, side: str, tokens: int, machine: Machine, calls: float = 1.0) -> tuple[float, float]:
    """(forward, backward): products, attention and all else in turn, but no faster than the host calls them in so many calls of
    the body."""
    a, dtype = getattr(plan, side), torch.bfloat16 if bytes_of(plan) == 2 else torch.float32
    is_fused = fuses(plan, side, machine.device)
    scores = flops.attention_flops(a, plan.attended.__getitem__)
    products = flops.body_flops(a, plan.attended.__getitem__) - scores
    adapters = flops.adapter_flops(plan) if side == "student" else 0
    frozen = side == "student" and plan.run.student.lora is not None
    found = []
    for times, one in zip((1, 2), passes(a, dtype), strict=True):
        whole = products if frozen else times * products  # of a frozen matrix no gradient
        moved = one.fused if is_fused else one.eager
        work = tokens * (
            (whole + times * adapters) / machine.products + times * scores / machine.attention + moved / machine.copies
        )
        found.append(max(work, calls * one.calls * machine.call * (FUSED_CALLS if is_fused else 1)))
    return found[0], found[1]


def fuses(plan, side: str, device: str) -> bool:
    """Whether torch compiles the blocks there, as engines.blocks_are chooses on a GPU that is here."""
    if side == "teacher" and plan.run.teacher.compile:
        return True
    a = getattr(plan, side)
    length, packed = plan.run.data.seq_len, plan.run.data.attention == "document"
    on_cpu = torch.device("cpu")  # of which only torch's own attention is asked: the others depend on a GPU
    plain = not a.recurs and plan.run.data.sequence_parallel == 1
    plain = plain and all(choose_path(layer, length, packed, torch.bfloat16, on_cpu) == "sdpa" for layer in a.attention)
    wish = plan.run.fused_blocks
    return wish == "compile" or (wish == "auto" and device == "cuda" and plain)


def hidden(sent: traffic.Sent, beside: float, machine: Machine, local: int) -> float:
    """What remains of a communication beside a computation."""
    return max(0.0, traffic.seconds(sent, machine, local) - machine.overlap * beside)


def of_stage(plan, stage, machine: Machine, local: int) -> dict[str, float]:
    """A mean step. Loss terms come and go, so steps are sampled, and those with the same terms are computed once."""
    known, total, count = {}, {}, 0
    for step in sampled(stage):
        weights = stage.weights(step)
        terms = weights.ce != 0, weights.kl != 0, weights.layer != 0
        if terms not in known:
            known[terms] = seconds(plan, stage, step, machine, local)
        total = {name: total.get(name, 0.0) + value for name, value in known[terms].items()}
        count += 1
    return {name: value / count for name, value in total.items()}


def sampled(stage) -> range:
    return range(stage.first_step, stage.last_step, max(1, stage.steps // SAMPLES))
