"""The memory of a rank in each stage, in bytes by term: an estimate from shapes, before anything starts.

    weights          b · student / R                                b: 2 bytes in bf16, else 4; R ranks; adapters, too
    filters          b · filters / R; those of the teacher that read its states as they appear (filters.py) are whole
    teacher          b · teacher / ranks that share it (placement.py); streamed from the host: two blocks and what is outside them.
                     With teacher.precision a byte for each element of its blocks' matrices, and their rows' scales
    masters          4 · trained / R                                the weights in fp32; of a student with adapters theirs alone
    moments          8 · trained / R                                Adam's two
    gradients        4 · trained / R                                summed in fp32
    communication    1 GiB on several GPUs                          assumed
    copy for a save  12 · trained / R, on a CPU, where the host is the device

To these the estimate adds the moment of a step that needs most: frozen forwards, a loss, the head's backward, a block's backward,
or the update. The terms of these moments:

    reduction        4 · bucket + b · largest matrix                whole gradients in reduction; on several ranks 4 · bucket more
    whole gradients  4 · trained, with train.reduce_once on several ranks, from the first backward to the update
    gathered         b · (live student, on several ranks + a block, prefetch and head of a teacher that several share)
    activations      what autograd keeps of N tokens, found by a trial on the meta device; with checkpointing one state a
                     block, and one whole block; of a frozen model one block
    states           of a call of the teacher b · N · (pairs · width + head's width), or, filtered as they appear, 4 · N · pairs ·
                     filters.width; in stage I also of the student
    read ahead       beside the backward: a block and the states of an early teacher's next call
    loss gradients   4 · head's (twice with loss.tokens = "all") and filters' weights, b · N · width a pair: kept until the backward
    chunk            one chunk's logits; on a CPU in bf16 the heads in fp32, too. Before it `vitals` (vitals/memory.py)
    update           4 · sub-group                                  its gradients a second time

The process itself (0.53 GiB on a CPU) and memory that the allocator keeps are not included. docs/planning.md has estimates beside
counted tensors, docs/benchmarks.md resident memory.
"""

from functools import cache

import torch

from ted_scale.distill.filter_sizes import filter_parameters
from ted_scale.distill.filters import keeps_filtered
from ted_scale.distill.normalization import gradient_passes
from ted_scale.distill.stages import Stage
from ted_scale.distill.trained import adapters, head_gradient, own_heads, trained_parameters
from ted_scale.kernels.formulas.divergences import scratch
from ted_scale.kernels.products import rows_per_chunk
from ted_scale.models import lora, quantized
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.engine_config import KEPT_WHOLE, setting
from ted_scale.models.trial import hollow, least_tokens, run_hollow
from ted_scale.vitals.memory import moments as vitals_moments

COMMUNICATION = 2**30  # what NCCL keeps for itself on several GPUs: assumed


def describe(plan) -> list[str]:
    """One line a stage, for this machine's device, largest terms first."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator().device_name()
    return [line_of(stage, *terms(plan, stage, device), device) for stage in plan.stages]


def line_of(stage: Stage, here: dict[str, float], away: float, device: str) -> str:
    by_size = sorted(here.items(), key=lambda term: -term[1])
    of = " + ".join(f"{name} {size / 2**30:,.3g}" for name, size in by_size if size)
    host = f"; {away / 2**30:,.3g} GiB offloaded" if away else ""
    total = f"{sum(here.values()) / 2**30:,.3g} GiB"
    return (
        f"memory a rank in stage {stage.name}, estimated for {device}, without the process itself: {total} = {of}{host}"
    )


def terms(plan, stage: Stage, device: str) -> tuple[dict[str, float], float]:
    """(bytes by term at the moment of a step with the highest need, bytes that are offloaded to the host)"""
    found = resting(plan, stage, device)
    zero = plan.ds_config["zero_optimization"]
    shards = ("weights", "filters", *(() if plan.placement and plan.placement.is_bare else ("teacher",)))
    moved = {"offload_optimizer": ("masters", "moments", "gradients"), "offload_param": shards}
    gone = [n for key, names in moved.items() if (zero.get(key) or {}).get("device") == "cpu" for n in names]
    away = sum(found.pop(name) for name in gone) if device != "cpu" else 0
    if "filters" in gone and device != "cpu":
        stays = bytes_of(plan) * filters_by_place(plan, stage)[1]  # the teacher's, not part of an engine
        found["filters"], away = stays, away - stays
    away += bytes_of(plan) * plan.teacher.in_blocks if streams(plan.placement) and device != "cpu" else 0
    return found | max(moments(plan, stage, device), key=lambda moment: sum(moment.values())), away


def bytes_of(plan) -> int:
    return 2 if plan.run.train.precision == "bf16" else 4


def tokens_of(plan) -> int:
    """The tokens of a micro-batch that one rank has."""
    return plan.run.train.micro_batch * plan.run.data.seq_len // plan.run.data.sequence_parallel


def filters_by_place(plan, stage: Stage) -> tuple[int, int]:
    """(parameters of filters that ranks share, parameters of filters that every rank has whole). Only stage I has lifts."""
    counts = filter_parameters(plan)
    whole = counts["teacher"] if keeps_filtered(plan, stage) else 0
    return sum(counts.values()) - (0 if stage.learns_filters else counts["lifts"]) - whole, whole


def resting(plan, stage: Stage, device: str) -> dict[str, float]:
    """The terms that are in memory all the time, also between steps."""
    b, trained = bytes_of(plan), trained_parameters(plan, stage) / plan.world
    shared, whole = filters_by_place(plan, stage)
    return {
        "weights": b * (plan.student.parameters + adapters(plan, stage)) / plan.world,
        "filters": b * (shared / plan.world + whole),
        "teacher": of_teacher(plan, b, device),
        "masters": 4 * trained,
        "moments": 8 * trained,
        "gradients": 4 * trained,
        "communication": COMMUNICATION if plan.world > 1 and device == "cuda" else 0,
        "copy for a save": 12 * trained if device == "cpu" else 0,
    }


def moments(plan, stage: Stage, device: str) -> list[dict[str, float]]:
    """The terms of each moment of a step: frozen forwards, a loss, the head's backward, a block's backward, the update."""
    b, trained = bytes_of(plan), trained_parameters(plan, stage)
    stays = b * plan.student.parameters if keeps_student_whole(plan, device) else 0
    once = plan.run.train.reduce_once and plan.world > 1
    whole = {"gathered": b * gathered(plan, stage, device), "whole gradients": 4 * trained if once else 0}
    kept, block, frozen = activations(plan, stage)
    signal, ahead = {"states": states(plan, stage)}, beside_backward(plan, stage, frozen)
    matrix = head_gradient(plan, stage)
    early, reduced = loss_gradients(plan, stage), {"reduction": reduction(plan, trained, b, device)}
    measured = [] if stage.learns_filters else vitals_moments(plan, b, device, early)
    rounded = matrix * b if b == 2 else 0  # a gradient in the weight's type; in fp32 it is the fp32 gradient itself
    return [
        {"activations": frozen, **signal, **whole},
        {
            "activations": kept, "chunk": chunk(plan, stage, device), **signal, **whole,
            "loss gradients": early if stage.learns_filters else of_logits(plan, stage),
        },
        {"activations": kept, "loss gradients": early + rounded, "read ahead": ahead, **reduced, **whole},
        {"activations": kept + block, "loss gradients": b * matrix, "read ahead": ahead, **reduced, **whole},
        *({"activations": kept, **signal, **whole, **sample} for sample in measured),
        {"update": 4 * min(trained / plan.world, setting(plan, "sub_group_size", device)), "gathered": stays},
    ]  # fmt: skip


def streams(placement) -> bool:
    return placement is not None and placement.way == "offload"


def of_teacher(plan, b: int, device: str) -> float:
    """The teacher's weights on a rank's device. A teacher in 8 bits is whole. Its size is counted by building it (quantized.py)."""
    if plan.teacher is None:
        return 0
    if bits := plan.run.teacher_bits:
        return quantized.counts(plan.teacher, bits).bytes
    return b * teacher_here(plan.teacher, plan.placement, device)


def teacher_here(a: Anatomy, placement, device: str) -> float:
    """The number of the teacher's parameters in the memory of a rank's device. On a CPU the host is the device."""
    if not streams(placement):
        return a.parameters / placement.ranks
    return a.parameters + 2 * a.block_parameters - (a.in_blocks if device != "cpu" else 0)


def reduction(plan, trained: float, b: int, device: str) -> float:
    """A CPU uses only the memory that is written; a GPU uses all that is allocated. A matrix larger than the bucket is reduced
    alone."""
    bucket, contiguous = (setting(plan, key, device) for key in ("reduce_bucket_size", "contiguous_gradients"))
    used, largest = min(bucket, trained), min(trained, plan.student.vocab_size * plan.student.head_width)
    buffer = (used if device == "cpu" else bucket) if contiguous else 0
    whole = largest if contiguous else max(used, largest)
    return 4 * buffer + b * whole + (4 * max(used, largest) if plan.world > 1 else 0)


def keeps_student_whole(plan, device: str) -> bool:
    """Whether, on several ranks, every rank keeps the whole student: no weight is above the ds_config's limit for that."""
    a, most = plan.student, setting(plan, KEPT_WHOLE, device)
    return plan.world > 1 and most >= max(a.vocab_size * a.width, a.block_parameters)


def gathered(plan, stage: Stage, device: str) -> float:
    """Trained weights stay gathered between forward and backward. A frozen model is gathered block by block."""

    def of_frozen(a: Anatomy) -> float:
        blocks = a.block_parameters + setting(plan, "stage3_prefetch_bucket_size", device, a)
        return min(a.parameters, blocks + a.vocab_size * a.head_width)

    a, most = plan.student, setting(plan, "stage3_max_live_parameters", device)
    ours = of_frozen(a) if stage.learns_filters else min(a.parameters, most)
    ours = a.parameters if keeps_student_whole(plan, device) else ours
    shared = plan.placement and plan.placement.ranks > 1
    return (ours if plan.world > 1 else 0) + (of_frozen(plan.teacher) if shared else 0)


def activations(plan, stage: Stage) -> tuple[float, float, float]:
    """(what the student's graph keeps, what one block needs in addition if blocks are computed again, what a frozen block needs)"""
    b, tokens = bytes_of(plan), tokens_of(plan)
    dtype = torch.bfloat16 if b == 2 else torch.float32
    kept = {a: tokens * kept_a_token(a, dtype) for a in (plan.student, plan.teacher) if a}
    if adapters(plan, stage):
        kept[plan.student] = tokens * kept_a_token(plan.student, dtype, plan.run.student.lora)
    theirs = together(plan) * kept[plan.teacher] / plan.teacher.layers if plan.teacher else 0.0
    frozen = max(theirs, kept[plan.student] / plan.student.layers if stage.learns_filters else 0.0)
    if stage.learns_filters:
        return 0.0, 0.0, frozen
    if plan.run.student.gradient_checkpointing:
        return tokens * b * plan.student.layers * plan.student.width, kept[plan.student] / plan.student.layers, frozen
    return kept[plan.student], 0.0, frozen


@cache  # for all stages: a trial of a deep model takes half a second
def kept_a_token(anatomy: Anatomy, dtype, low_rank=None) -> float:
    """Bytes for each token that autograd keeps from a forward of the body, without weights."""
    network = hollow(anatomy, dtype)
    if low_rank:
        with torch.device("meta"):
            lora.adapt(network, anatomy, low_rank)
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    kept, tokens = {}, least_tokens(anatomy)

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that its address is not used again
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_hollow(network, anatomy, tokens)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights) / tokens


def together(plan) -> int:
    """The micro-batches in a call of the teacher."""
    return min(plan.run.teacher.micro_batch, plan.accumulation)


def is_early(plan) -> bool:
    """Whether the teacher may run during a backward of the student. It must need no other rank, neither for its weights nor for
    its rows. In a step with a single call, no call is left for the backward."""
    bare = plan.placement is not None and plan.placement.is_bare and plan.run.data.sequence_parallel == 1
    return bare and plan.run.teacher.early and plan.accumulation > together(plan)


def states(plan, stage: Stage) -> float:
    """The teacher's states, which are kept from its call to the losses. In stage I the student's states are kept, too."""
    if plan.teacher is None:
        return 0
    b, matched = bytes_of(plan), len(plan.pairs)
    pairs = matched * (4 * plan.width if keeps_filtered(plan, stage) else b * plan.teacher.width)
    ours = matched * b * plan.student.width if stage.learns_filters else 0
    return tokens_of(plan) * (together(plan) * (pairs + b * plan.teacher.head_width) + ours)


def beside_backward(plan, stage: Stage, frozen: float) -> float:
    """What the teacher adds to the student's backward. An early teacher runs its next call. In strict mode the loss reads the
    teacher's head input again, so this input is kept."""
    if plan.teacher is None:
        return 0
    waits = plan.run.loss.mode == "strict" and not stage.learns_filters
    left = bytes_of(plan) * tokens_of(plan) * together(plan) * plan.teacher.head_width if waits else 0
    return left + (frozen + states(plan, stage) if is_early(plan) else 0)


def loss_gradients(plan, stage: Stage) -> float:
    """The gradients that are computed in the forward and kept until the backward: those of the head's weight, filters and
    states."""
    filters = filter_parameters(plan)
    if stage.learns_filters:
        return 4 * (sum(filters.values()) + own_heads(plan))
    of_states = bytes_of(plan) * tokens_of(plan) * len(plan.pairs) * plan.student.width
    return of_logits(plan, stage) + 4 * filters["student"] + of_states


def of_logits(plan, stage: Stage) -> float:
    """The gradients of the head's weight, if it is trained, and of its input. Each pass over the logits that keeps them has its
    own."""
    matrix_and_input = 4 * head_gradient(plan, stage) + plan.student.head_width * bytes_of(plan) * tokens_of(plan)
    return gradient_passes(plan.run.loss, plan.run.terms.get("kl")) * matrix_and_input


def chunk(plan, stage: Stage, device: str) -> float:
    """The logits of one chunk of tokens. On a CPU also a copy of both sides' states, if some tokens do not count. In bf16 a CPU
    also copies both heads to fp32 for the product. All of it is freed before the backward."""
    a, t, b, tokens = plan.student, plan.teacher, bytes_of(plan), tokens_of(plan)
    planned, more = bytes_a_row(plan, stage, device)
    rows = rows_per_chunk(tokens, planned, torch.device(device), plan.run.loss.chunk_tokens)
    if device != "cpu":
        return rows * (planned + more)
    sides = [side for side in (None if stage.learns_filters else a, t) if side]
    heads = 4 * sum(side.vocab_size * side.head_width for side in sides) if b == 2 else 0
    return rows * (planned + more + b * sum(side.head_width for side in sides)) + heads


def bytes_a_row(plan, stage: Stage, device: str) -> tuple[int, int]:
    """(bytes of a row's logits, by which the loss plans its chunks; bytes that torch's formulas allocate beside them. Triton's
    kernels allocate none of the latter.)"""
    a, t, b, loss = plan.student, plan.teacher, bytes_of(plan), plan.run.loss
    if stage.learns_filters:
        return t.vocab_size * (4 + b), 0
    rows = 4 * (a.vocab_size + (t.vocab_size if t else 0)) + (2 * a.vocab_size if device == "cuda" and b == 2 else 0)
    if device == "cuda" and not loss.top_k:
        return rows, 0
    more = scratch(loss.divergence, loss.top_k) * min(a.vocab_size, t.vocab_size) if t else 0
    softmaxes = bool(a.softcap) if t is None else 1 + (loss.temperature != 1.0)
    return rows + 4 * more, 4 * softmaxes * a.vocab_size
