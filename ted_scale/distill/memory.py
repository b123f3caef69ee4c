"""The memory of a rank in each stage, in bytes by term: an estimate from shapes, before anything starts.

    weights          b · student / R                                b: 2 bytes in bf16, else 4; R ranks
    filters          b · filters / R
    teacher          b · teacher / ranks that share it (placement.py); streamed from the host: two blocks and what is outside blocks
    masters          4 · trained / R                                the weights in fp32
    moments          8 · trained / R                                Adam's two
    gradients        4 · (trained / R + sub-group)                  summed in fp32; one sub-group twice, for its update
    reduction        4 · bucket + b · largest matrix                whole gradients in reduction; on several ranks 4 · bucket more
    gathered         b · (live student, on several ranks + a block, prefetch and head of a teacher that several share)
    activations      what autograd keeps of N tokens, found by a trial on the meta device; with checkpointing one state a
                     block, and one whole block
    states           b · N · (pairs · width + head's width) of the teacher, in stage I also of the student
    loss gradients   4 · head's and filters' weights, b · N · width a pair: formed in the forward, kept until the backward
    chunk            one chunk's logits; on a CPU in bf16 the heads in fp32, too
    copy for a save  12 · trained / R, on a CPU, where the host is the device

The process itself (0.53 GiB on a CPU) and memory that the allocator keeps are not included: measured peaks were 1.08 to 1.19
times the sum on CPUs and 0.95 on an H100 (docs/benchmarks.md).
"""

from functools import cache

import torch

from ted_scale.distill.filter_sizes import filter_parameters
from ted_scale.distill.stages import Stage
from ted_scale.kernels.formulas.divergences import scratch
from ted_scale.kernels.products import CHUNK_BYTES
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.engine_config import engine_config, zero_settings
from ted_scale.models.trial import hollow, run_hollow

TRIAL = 8  # tokens


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
    trained = (filters + own_heads(plan) if stage.learns_filters else plan.student.parameters + student) / ranks
    found = {
        "weights": b * plan.student.parameters / ranks,
        "filters": b * filters / ranks,
        "teacher": b * teacher_here(plan.teacher, plan.placement, device) if plan.teacher else 0,
        "masters": 4 * trained,
        "moments": 8 * trained,
        "gradients": 4 * (trained + min(trained, setting(plan, "sub_group_size", device))),
        "reduction": reduction(plan, trained * ranks, b, device),
        "gathered": b * gathered(plan, stage, device),
        "activations": activations(plan, stage, tokens, b),
        "states": b * tokens * states(plan, stage),
        "loss gradients": loss_gradients(plan, stage, tokens, b, filters if stage.learns_filters else student),
        "chunk": chunk(plan, stage, tokens, b, device),
        "copy for a save": 12 * trained if device == "cpu" else 0,
    }
    zero = plan.ds_config["zero_optimization"]
    shards = ("weights", "filters", *(() if plan.placement and plan.placement.is_bare else ("teacher",)))
    moved = {"offload_optimizer": ("masters", "moments", "gradients"), "offload_param": shards}
    gone = [n for key, names in moved.items() if (zero.get(key) or {}).get("device") == "cpu" for n in names]
    away = sum(found.pop(name) for name in gone) if device != "cpu" else 0
    return found, away + (b * in_blocks(plan.teacher) if streams(plan.placement) and device != "cpu" else 0)


def streams(placement) -> bool:
    return placement is not None and placement.way == "offload"


def in_blocks(a: Anatomy) -> int:
    return min(a.layers * a.block_parameters, a.parameters)


def teacher_here(a: Anatomy, placement, device: str) -> float:
    """The teacher's parameters in the memory of a rank's device; on a CPU the host is the device."""
    if not streams(placement):
        return a.parameters / placement.ranks
    return a.parameters + 2 * a.block_parameters - (in_blocks(a) if device != "cpu" else 0)


def setting(plan, key: str, device: str, model: Anatomy | None = None) -> float:
    """A value of the ds_config, or the default that follows from model and device. DeepSpeed parses numbers in strings."""
    zero = engine_config(plan, model or plan.student, device)["zero_optimization"]
    config = zero_settings(plan.run.ds_config, zero)
    names = {field.alias or name: name for name, field in type(config).model_fields.items()}
    return getattr(config, names[key])


def own_heads(plan) -> int:
    """Parameters of the filters' own heads, with `filters.head = "per_layer"`."""
    vocabularies = [a.vocab_size for a in (plan.student, plan.teacher) if a]
    return len(plan.pairs) * (plan.width + 1) * sum(vocabularies) if plan.run.filters.head == "per_layer" else 0


def reduction(plan, trained: float, b: int, device: str) -> float:
    """A CPU uses only memory that is written, a GPU all that is allocated. A matrix larger than the bucket is reduced alone."""
    bucket, contiguous = (setting(plan, key, device) for key in ("reduce_bucket_size", "contiguous_gradients"))
    used, largest = min(bucket, trained), min(trained, plan.student.vocab_size * plan.student.head_width)
    buffer = (used if device == "cpu" else bucket) if contiguous else 0
    whole = largest if contiguous else max(used, largest)
    return 4 * buffer + b * whole + (4 * max(used, largest) if plan.world > 1 else 0)


def gathered(plan, stage: Stage, device: str) -> float:
    """Trained weights stay gathered between forward and backward; a frozen model is gathered block by block."""

    def of_frozen(a: Anatomy) -> float:
        blocks = a.block_parameters + setting(plan, "stage3_prefetch_bucket_size", device, a)
        return min(a.parameters, blocks + a.vocab_size * a.head_width)

    live = min(plan.student.parameters, setting(plan, "stage3_max_live_parameters", device))
    ours = of_frozen(plan.student) if stage.learns_filters else live
    shared = plan.placement and plan.placement.ranks > 1
    return (ours if plan.world > 1 else 0) + (of_frozen(plan.teacher) if shared else 0)


def activations(plan, stage: Stage, tokens: int, b: int) -> float:
    """Of the student's graph; a frozen model only has those of one block at a time."""
    dtype = torch.bfloat16 if b == 2 else torch.float32
    kept = {a: kept_a_token(a, dtype) for a in (plan.student, plan.teacher) if a}
    block = max(size / a.layers for a, size in kept.items())
    if stage.learns_filters:
        return tokens * block
    if plan.run.student.gradient_checkpointing:
        return tokens * (b * plan.student.layers * plan.student.width + block)
    return tokens * max(kept[plan.student], block)


@cache  # for all stages: a trial of a deep model takes half a second
def kept_a_token(anatomy: Anatomy, dtype) -> float:
    """Bytes a token that autograd keeps of a forward of the body, without weights."""
    network = hollow(anatomy, dtype)
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that its address is not used again
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_hollow(network, anatomy, TRIAL)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights) / TRIAL


def states(plan, stage: Stage) -> int:
    """Elements a token that are kept from the teacher's forward to the losses."""
    sides = [plan.teacher] if plan.teacher else []
    matched = [*sides, plan.student] if stage.learns_filters else sides
    return sum(len(plan.pairs) * a.width for a in matched) + sum(a.head_width for a in sides)


def loss_gradients(plan, stage: Stage, tokens: int, b: int, filters: int) -> float:
    """They are computed in the forward and kept until the backward."""
    a = plan.student
    if stage.learns_filters:
        return 4 * (filters + own_heads(plan))
    of_states = b * tokens * (len(plan.pairs) * a.width + a.head_width)
    return (4 + b) * a.vocab_size * a.head_width + 4 * filters + of_states


def chunk(plan, stage: Stage, tokens: int, b: int, device: str) -> float:
    """One chunk's logits, and on a CPU, which multiplies in fp32, the heads in that type. Both are freed before the backward."""
    a, t, loss = plan.student, plan.teacher, plan.run.loss
    rows = bytes_a_row(plan, stage, b, device)
    of_chunk = min((loss.chunk_tokens or tokens) * rows, tokens * rows)
    if loss.chunk_tokens is None:
        of_chunk = min(CHUNK_BYTES[device], of_chunk)
    heads = 0 if stage.learns_filters else a.vocab_size * a.head_width
    heads += t.vocab_size * t.head_width if t else 0
    return of_chunk + (4 * heads if device == "cpu" and b == 2 else 0)


def bytes_a_row(plan, stage: Stage, b: int, device: str) -> float:
    a, t, loss = plan.student, plan.teacher, plan.run.loss
    if stage.learns_filters:
        return t.vocab_size * (4 + b)
    rows = 4 * (a.vocab_size + (t.vocab_size if t else 0)) + (2 * a.vocab_size if device == "cuda" and b == 2 else 0)
    if t and (device == "cpu" or loss.top_k):
        rows += 4 * scratch(loss.divergence, loss.top_k) * min(a.vocab_size, t.vocab_size)
    return rows
