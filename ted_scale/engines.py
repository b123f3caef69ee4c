"""Teacher, student and filters as DeepSpeed engines, with an optimizer for what is trained.

The ds_config decides how ZeRO shards, offloads and communicates. All other numbers come from the run file.
"""

import logging
from pathlib import Path

import torch

from ted_scale import kernels
from ted_scale.base.counts import millions
from ted_scale.base.errors import UserError
from ted_scale.checkpoints.filters_file import load_filters
from ted_scale.distill import memory
from ted_scale.distill.filters import Filter, has_lift, keeps_filtered
from ted_scale.distill.stages import Stage
from ted_scale.distill.student import Student
from ted_scale.distill.teacher import Teacher, TeacherBody
from ted_scale.health import replicas
from ted_scale.models import attention, fused, lora, quantized, zero_hooks
from ted_scale.models.engine_config import check_int8_gathers, engine_config, teacher_config, zero_settings
from ted_scale.models.quantized import build_quantized
from ted_scale.models.reduction import sum_in_fp32
from ted_scale.models.streamed import stream_blocks
from ted_scale.models.weights import build_network
from ted_scale.models.zero import shape_of, sharded_construction
from ted_scale.plan import Plan
from ted_scale.ranks.group import group_of_node

log = logging.getLogger("ted_scale")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def check_engine_config(plan: Plan) -> None:
    """Have DeepSpeed check the ds_config, early enough that a mistake is one sentence."""
    from deepspeed.runtime.config import DeepSpeedConfig

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its warnings are about settings that we intend
    zero_settings(plan.run.ds_config, plan.ds_config["zero_optimization"])
    check_int8_gathers(plan)
    try:
        DeepSpeedConfig(engine_config(plan, plan.student))
    except Exception as error:  # each section has its own checks, which raise exceptions of many kinds
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise UserError(
            f"ds_config {plan.run.ds_config} must be what DeepSpeed takes, but is not: {reason}; correct it"
        ) from None


def check_device(plan: Plan, device: torch.device) -> None:
    """Refuse settings of the run file that the device cannot run."""
    run = plan.run
    try:
        kernels.choose(run.loss.backend, device)
    except ValueError as error:
        raise UserError(f"loss.{error}") from None
    fused.check_device(run.fused_blocks, device)
    quantized.check_device(run.teacher_bits, device)
    if plan.ds_config["zero_optimization"].get("zero_quantized_weights") and device.type != "cuda":
        raise UserError(
            f"ds_config {run.ds_config}: zero_optimization.zero_quantized_weights must be left out on {device.type}, but is set: "
            "its kernels are CUDA's; take another file of ds_configs/"
        )
    if plan.teacher and run.teacher.compile:
        fused.check_teacher(paths_of(plan, plan.teacher, device))


def describe(plan: Plan, device: torch.device) -> list[str]:
    """The kernels that this run uses for losses, attention and blocks on this device."""
    run, sides = plan.run, {"student": plan.student, "teacher": plan.teacher}
    layers = {side: anatomy.attention for side, anatomy in sides.items() if anatomy}
    dtype, ways = DTYPES[run.train.precision], {s: blocks_are(plan, s, device) for s in layers}
    lines = [
        kernels.describe(run.loss.backend, device, run.loss.top_k),
        attention.describe(run.data, layers, dtype, device),
        fused.describe(run.fused_blocks, ways),
    ]
    if run.teacher_bits == "fp8" and ways["teacher"] != "compile":
        lines.append(
            "warning: teacher.precision = 'fp8' pays where blocks are compiled, and the teacher's are not: rounding what a matrix "
            "multiplies is several passes over it then; set teacher.compile = true"
        )
    return lines


def paths_of(plan: Plan, anatomy, device: torch.device) -> list[str]:
    """The code paths of a model's attention, by their names in attention.py."""
    run = plan.run
    return attention.paths_of(run.data, anatomy.attention, DTYPES[run.train.precision], device)


def blocks_are(plan: Plan, side: str, device: torch.device) -> str:
    """How a model's blocks run: compiled ("compile"), with Liger's kernels ("liger"), or unchanged ("off")."""
    anatomy = getattr(plan, side)
    if side == "teacher" and plan.run.teacher.compile:
        return "compile"
    # torch unrolls a recurrence into a very large graph.
    paths = [] if anatomy.recurs else paths_of(plan, anatomy, device)
    return fused.chosen(plan.run.fused_blocks, anatomy.family, paths, device)


def prepare_blocks(plan: Plan, side: str, network):
    """Compile or replace the network's blocks as `blocks_are` says. Returns the blocks."""
    from deepspeed.accelerator import get_accelerator

    anatomy, device = getattr(plan, side), torch.device(get_accelerator().device_name())
    blocks = network.get_submodule(anatomy.blocks)
    asked = side == "teacher" and plan.run.teacher.compile
    apart = asked and paths_of(plan, anatomy, device) != ["sdpa"]  # only torch's own attention can be part of the graph
    fails = asked or plan.run.fused_blocks != "auto"
    fused.fuse(network, blocks, blocks_are(plan, side, device), fails=fails, attention_apart=apart)
    return blocks


def build_teacher(plan: Plan):
    if plan.teacher is None:
        return lambda batch, weights: None
    from deepspeed.accelerator import get_accelerator

    log.info(
        f"loading {plan.teacher.folder}, {millions(plan.teacher.parameters)} parameters"
    )  # for minutes, if it is large
    device = torch.device(get_accelerator().current_device_name())
    teacher = bare_teacher(plan, device) if plan.placement.is_bare else sharded_teacher(plan)
    if plan.run.health.replicas_every:
        teacher.at_load = replicas.digests(replicas.parts_of(teacher.body), device)
    return teacher


def bare_teacher(plan: Plan, device: torch.device) -> Teacher:
    """A teacher that no ranks share: whole on this rank's device, or in its host's memory. Every rank reads the files. A node
    fetches each file once from its server, and no rank waits for another."""
    streamed = plan.placement.way == "offload"
    body, blocks = teacher_body(plan, ds_config=None, device="cpu" if streamed else device)
    if streamed:
        stream_blocks(body.network, blocks, device)
    return Teacher(body, body, together=plan.run.teacher.micro_batch, early=memory.is_early(plan))


def sharded_teacher(plan: Plan) -> Teacher:
    import deepspeed

    config = teacher_config(plan)
    body, blocks = teacher_body(plan, ds_config=config, group=group_of_node(plan.placement.ranks))
    zero_hooks.patch_deepspeed()
    zero_hooks.gather_whole_blocks(blocks)
    engine = deepspeed.initialize(model=body, config=config)[0]
    teacher = Teacher(engine, body, together=plan.run.teacher.micro_batch)
    zero_hooks.trim(engine, config, [body])
    return teacher


def teacher_body(plan: Plan, **where):
    """(the teacher's module, its blocks)"""
    start: dict = {"init": plan.run.teacher.init, "seed": plan.run.seed + 1}  # not the student's seed
    bits = plan.run.teacher_bits
    if bits:
        network = build_quantized(plan.teacher, bits, **start, device=where["device"])
    else:
        network = build_network(plan.teacher, dtype=DTYPES[plan.run.train.precision], **start, **where)
    blocks = prepare_blocks(plan, "teacher", network)
    return TeacherBody(network, plan.teacher, [t for _, t in plan.pairs]), blocks


def build_student(plan: Plan, stage: Stage, teacher, filters_file: Path | None):
    """The engine of a stage: the student, its filters, and an optimizer for the parameters that are trained."""
    import deepspeed

    run, dtype = plan.run, DTYPES[plan.run.train.precision]
    log.info(f"loading {plan.student.folder}, {millions(plan.student.parameters)} parameters, with its optimizer")
    config = engine_config(
        plan, plan.student, gradient_accumulation_steps=plan.accumulation, gradient_clipping=run.train.clip
    )
    network = build_network(plan.student, ds_config=config, dtype=dtype, init=run.student.init, seed=run.seed)
    blocks = prepare_blocks(plan, "student", network)
    network.requires_grad_(not stage.learns_filters)
    if run.student.lora and not stage.learns_filters:  # in stage I the adapters would be 0 and change nothing
        lora.adapt(network, plan.student, run.student.lora, run.seed)
    if run.student.gradient_checkpointing and not stage.learns_filters:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    with sharded_construction(config):
        filters_s = student_filters(plan, stage)
        filters_t = None if keeps_filtered(plan, stage) else teacher_filters(plan, stage)
    of_teacher = teacher_filters(plan, stage) if keeps_filtered(plan, stage) else filters_t
    if of_teacher is not None:
        if filters_file:
            load_filters(filters_file, {"student": filters_s, "teacher": of_teacher})
        of_teacher.requires_grad_(stage.learns_filters)
    if of_teacher is not filters_t:
        lend(of_teacher, teacher, dtype)
    module = Student(
        run, network, plan.student, plan.pairs, learns_filters=stage.learns_filters, filters_s=filters_s,
        filters_t=filters_t, head_t=getattr(teacher, "head", None),
    )  # fmt: skip
    module.train()
    if run.train.reduce_once:
        sum_in_fp32(module.parameters())
    settings = {"lr": run.train.lr, "betas": run.train.betas, "eps": run.train.eps, "fused": True}
    optimizer = torch.optim.AdamW(parameter_groups(run, module), **settings)
    zero_hooks.patch_deepspeed()
    zero_hooks.gather_whole_blocks(blocks)
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
    zero_hooks.trim(engine, config, frozen_parts(module, stage))
    if "compile" in [blocks_are(plan, side, engine.device) for side in ("student", "teacher") if getattr(plan, side)]:
        log.info("the first batch compiles the blocks, and takes longer than those that follow")
    return engine


def frozen_parts(module: Student, stage: Stage) -> list:
    frozen = module.network if stage.learns_filters else module.filters_t
    return [] if frozen is None else [frozen]


def lend(filters, teacher: Teacher, dtype: torch.dtype) -> None:
    """Give frozen filters, whole on this rank, to the teacher. It then filters each state when it is computed."""
    device = teacher.head.weight.device
    teacher.keep_filtered(filters.to(device, dtype))
    if teacher.at_load is not None:
        teacher.at_load = torch.cat([teacher.at_load, replicas.digests(replicas.parts_of(filters), device)])


def take_back(plan: Plan, teacher) -> None:
    """Remove the teacher's filters: those of an earlier stage, or those of this stage from before the run went back."""
    if plan.teacher is None:
        return
    teacher.keep_filtered(None)
    if teacher.at_load is not None:
        teacher.at_load = teacher.at_load[: len(replicas.parts_of(teacher.body))]


def build_filters(plan: Plan, stage: Stage):
    """(student's filters, teacher's filters), one for each pair."""
    return student_filters(plan, stage), teacher_filters(plan, stage)


def student_filters(plan: Plan, stage: Stage):
    return filters_of(plan, stage, plan.student, 0) if plan.pairs else None


def teacher_filters(plan: Plan, stage: Stage):
    """The teacher's filters, one for each pair. The method lwd has none."""
    if not plan.pairs or plan.run.method == "lwd":
        return None
    lift = plan.teacher.width if stage.learns_filters and has_lift(plan.run, plan.teacher) else 0
    return filters_of(plan, stage, plan.teacher, 1, lift)


def filters_of(plan: Plan, stage: Stage, anatomy, offset: int, lift: int = 0):
    filters = plan.run.filters
    seeds = [plan.run.seed * 1000 + 2 * k + offset for k in range(len(plan.pairs))]
    vocab = anatomy.vocab_size if filters.head == "per_layer" and stage.learns_filters else 0
    settings: dict = {"mlp": filters.mlp, "random": filters.start == "noise", "vocab": vocab, "lift": lift}
    return torch.nn.ModuleList(Filter(anatomy.width, plan.width, seed=seed, **settings) for seed in seeds)


def parameter_groups(run, module: Student) -> list[dict]:
    """The optimizer's groups. Matrices have weight decay, other tensors have none. Filters have their own learning rate."""
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    filters = [p for n, p in trained if n.startswith("filters_")]
    network = [p for n, p in trained if not n.startswith("filters_")]
    groups = [
        {
            "role": "decay",
            "params": [p for p in network if len(shape_of(p)) > 1],
            "weight_decay": run.train.weight_decay,
        },
        {"role": "plain", "params": [p for p in network if len(shape_of(p)) <= 1], "weight_decay": 0.0},
        {"role": "filters", "params": filters, "weight_decay": 0.0},
    ]
    rates = {"filters": run.filters.lr}
    return [{**g, "peak_lr": rates.get(g["role"], run.train.lr)} for g in groups if g["params"]]
