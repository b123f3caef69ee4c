"""The memory of a rank in each stage, in bytes by term: an estimate from shapes, before anything starts.

    weights          b · (student + filters) / R                    b: 2 bytes in bf16, else 4; R ranks. Filters of the teacher that
                                                                    read its states as they appear (filters.py): whole, b · filters
    teacher          b · teacher / ranks that share it (placement.py); streamed from the host: two blocks and what is outside them.
                     With teacher.precision a byte for each element of its blocks' matrices, and their rows' scales
    optimizer        12 · trained / R                               fp32 masters and Adam's two moments
    gradients        4 · (trained / R + sub-group)                  summed in fp32; one sub-group twice, for its update
    reduction        4 · bucket + b · largest matrix                whole gradients in reduction; on several ranks 4 · bucket more
    gathered         b · (live student, on several ranks + a block, prefetch and head of a teacher that several share)
    activations      what autograd keeps of N tokens, found by a trial on the meta device; with checkpointing one state a
                     block, and one whole block. One block of the teacher in its own call: instead, or, if it is early, too
    states           of a call of the teacher N' · (pairs · width · b + head's width · b), or filtered as they appear pairs ·
                     filters.width · 4; in stage I also of the student; with loss.mode = "strict" an early one's heads twice
    losses           4 · head's and filters' weights (their gradients), b · N · width a pair, one chunk's logits
    copy for a save  12 · trained / R, on a CPU, where the host is the device

The process itself (0.53 GiB on a CPU) and memory that the allocator keeps are not included: measured peaks were 1.08 to 1.19
times the sum on CPUs and 0.95 on an H100 (docs/benchmarks.md).
"""

from functools import cache

import torch

from ted_scale.distill.filter_sizes import filter_parameters
from ted_scale.distill.filters import keeps_filtered
from ted_scale.distill.stages import Stage
from ted_scale.kernels.formulas.divergences import scratch
from ted_scale.kernels.products import CHUNK_BYTES
from ted_scale.models import quantized
from ted_scale.models.anatomy import Anatomy, run_body
from ted_scale.models.engine_config import engine_config, zero_settings
from ted_scale.models.inspection import empty_model, read_config

TRIAL = 8  # tokens; with more, the scores that attention keeps where it is not fused would count


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
    """(bytes by term, bytes that are offloaded to the host)"""
    run, ranks = plan.run, plan.world
    b, tokens = 2 if run.train.precision == "bf16" else 4, run.train.micro_batch * run.data.seq_len
    counts = filter_parameters(plan)
    student, filters = counts["student"], sum(counts.values()) - (0 if stage.learns_filters else counts["lifts"])
    whole = counts["teacher"] if keeps_filtered(plan, stage) else 0
    trained = (filters + own_heads(plan) if stage.learns_filters else plan.student.parameters + student) / ranks
    found = {
        "weights": b * ((plan.student.parameters + filters - whole) / ranks + whole),
        "teacher": of_teacher(plan, b, device),
        "optimizer": 12 * trained,
        "gradients": 4 * (trained + min(trained, setting(plan, "sub_group_size"))),
        "reduction": reduction(plan, trained * ranks, b, device),
        "gathered": b * gathered(plan, stage),
        "activations": activations(plan, stage, tokens, b),
        "states": tokens * states(plan, stage, b),
        "losses": losses(plan, stage, tokens, b, filters if stage.learns_filters else student, device),
        "copy for a save": 12 * trained if device == "cpu" else 0,
    }
    zero = plan.ds_config["zero_optimization"]
    shards = ("weights",) if plan.placement and plan.placement.is_bare else ("weights", "teacher")
    moved = {"offload_optimizer": ("optimizer", "gradients"), "offload_param": shards}
    gone = [n for key, names in moved.items() if (zero.get(key) or {}).get("device") == "cpu" for n in names]
    away = sum(found.pop(name) for name in gone) if device != "cpu" else 0
    return found, away + (b * in_blocks(plan.teacher) if streams(plan.placement) and device != "cpu" else 0)


def streams(placement) -> bool:
    return placement is not None and placement.way == "offload"


def in_blocks(a: Anatomy) -> int:
    return min(a.layers * a.block_parameters, a.parameters)


def of_teacher(plan, b: int, device: str) -> float:
    """Its weights on a rank's device. One of 8 bits is whole, and counted as it is built (quantized.py)."""
    if plan.teacher is None:
        return 0
    if bits := plan.run.teacher_bits:
        return quantized.counts(plan.teacher, bits).bytes
    return b * teacher_here(plan.teacher, plan.placement, device)


def teacher_here(a: Anatomy, placement, device: str) -> float:
    """The teacher's parameters in the memory of a rank's device; on a CPU the host is the device."""
    if not streams(placement):
        return a.parameters / placement.ranks
    return a.parameters + 2 * a.block_parameters - (in_blocks(a) if device != "cpu" else 0)


def setting(plan, key: str, model: Anatomy | None = None) -> float:
    """A value of the ds_config, or the default that follows from the model. DeepSpeed parses numbers in strings."""
    config = zero_settings(plan.run.ds_config, engine_config(plan, model or plan.student)["zero_optimization"])
    names = {field.alias or name: name for name, field in type(config).model_fields.items()}
    return getattr(config, names[key])


def own_heads(plan) -> int:
    """Parameters of the filters' own heads, with `filters.head = "per_layer"`."""
    vocabularies = [a.vocab_size for a in (plan.student, plan.teacher) if a]
    return len(plan.pairs) * (plan.width + 1) * sum(vocabularies) if plan.run.filters.head == "per_layer" else 0


def reduction(plan, trained: float, b: int, device: str) -> float:
    """A CPU uses only memory that is written, a GPU all that is allocated. A matrix larger than the bucket is reduced alone."""
    bucket, contiguous = setting(plan, "reduce_bucket_size"), setting(plan, "contiguous_gradients")
    used, largest = min(bucket, trained), min(trained, plan.student.vocab_size * plan.student.head_width)
    buffer = (used if device == "cpu" else bucket) if contiguous else 0
    whole = largest if contiguous else max(used, largest)
    return 4 * buffer + b * whole + (4 * max(used, largest) if plan.world > 1 else 0)


def gathered(plan, stage: Stage) -> float:
    """Trained weights stay gathered between forward and backward; a frozen model is gathered block by block."""

    def of_frozen(a: Anatomy) -> float:
        blocks = a.block_parameters + setting(plan, "stage3_prefetch_bucket_size", a)
        return min(a.parameters, blocks + a.vocab_size * a.head_width)

    live = min(plan.student.parameters, setting(plan, "stage3_max_live_parameters"))
    ours = of_frozen(plan.student) if stage.learns_filters else live
    shared = plan.placement and plan.placement.ranks > 1
    return (ours if plan.world > 1 else 0) + (of_frozen(plan.teacher) if shared else 0)


def activations(plan, stage: Stage, tokens: int, b: int) -> float:
    """Of the student's graph; a frozen model only has those of one block at a time."""
    dtype = torch.bfloat16 if b == 2 else torch.float32
    s, t = plan.student, plan.teacher
    kept = kept_a_token(s, dtype)
    ours, block = kept, kept / s.layers
    if stage.learns_filters:
        ours = block
    elif plan.run.student.gradient_checkpointing:
        ours = b * s.layers * s.width + block
    theirs = together(plan) * kept_a_token(t, dtype) / t.layers if t else 0
    return tokens * (ours + theirs if is_early(plan) else max(ours, theirs))


def together(plan) -> int:
    """The micro-batches in a call of the teacher."""
    return min(plan.run.teacher.micro_batch, plan.accumulation)


def is_early(plan) -> bool:
    """Whether the teacher may run during a backward of the student. A step of one call has none before its end."""
    bare = plan.placement is not None and plan.placement.is_bare
    return bare and plan.run.teacher.early and plan.accumulation > together(plan)


@cache  # for all stages: a trial of a deep model takes half a second
def kept_a_token(anatomy: Anatomy, dtype) -> float:
    """Bytes a token that autograd keeps of a forward of the body, without weights."""
    with torch.device("meta"):
        network = empty_model(read_config("model", anatomy.folder), dtype)
        tokens = torch.zeros(1, TRIAL, dtype=torch.long)
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that its address is not used again
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_body(network, anatomy, tokens)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights) / TRIAL


def states(plan, stage: Stage, b: int) -> int:
    """Bytes for a micro-batch's token that are kept from the teacher's forward to the losses."""
    if plan.teacher is None:
        return 0
    matched, head = len(plan.pairs), b * plan.teacher.head_width
    pairs = matched * (4 * plan.width if keeps_filtered(plan, stage) else b * plan.teacher.width)
    # The backward of strict mode reads the head's input again.
    waits = head if is_early(plan) and plan.run.loss.mode == "strict" else 0
    ours = matched * b * plan.student.width if stage.learns_filters else 0
    return together(plan) * (pairs + head + waits) + ours


def losses(plan, stage: Stage, tokens: int, b: int, filters: int, device: str) -> float:
    """Gradients that are computed in the forward are kept until the backward; a chunk's logits are freed before."""
    a, t = plan.student, plan.teacher
    if stage.learns_filters:
        rows, heads, waiting = t.vocab_size * (4 + b), t.vocab_size * t.head_width, 4 * (filters + own_heads(plan))
    else:
        rows = 4 * (a.vocab_size + (t.vocab_size if t else 0)) + (
            2 * a.vocab_size if device == "cuda" and b == 2 else 0
        )
        if t and (device == "cpu" or plan.run.loss.top_k):
            rows += 4 * scratch(plan.run.loss.divergence, plan.run.loss.top_k) * min(a.vocab_size, t.vocab_size)
        heads = a.vocab_size * a.head_width + (t.vocab_size * t.head_width if t else 0)
        waiting = (4 + b) * a.vocab_size * a.head_width + 4 * filters
        waiting += b * tokens * (len(plan.pairs) * a.width + a.head_width)
    of_chunk = min((plan.run.loss.chunk_tokens or tokens) * rows, tokens * rows)
    if plan.run.loss.chunk_tokens is None:
        of_chunk = min(CHUNK_BYTES[device], of_chunk)
    return waiting + of_chunk + (4 * heads if device == "cpu" and b == 2 else 0)  # a CPU multiplies in fp32
