"""The DeepSpeed configuration beside a run file. It says how ZeRO-3 shards, offloads and communicates, and nothing else.

The sections that work here are listed, because DeepSpeed ignores unknown sections, and some known sections make a run fail after
minutes. Every refusal has a reason. engines.check_engine_config lets DeepSpeed check the other values.
"""

import difflib
from pathlib import Path

from ted_scale.base.errors import UserError, shown
from ted_scale.base.parsing import parse_json
from ted_scale.base.shipped import HOME, found

USABLE = (
    "zero_optimization", "communication_data_type", "zero_allow_untested_optimizer", "timers", "wall_clock_breakdown",
    "comms_logger", "dump_state", "disable_python_gc",
)  # fmt: skip

DS_OWNED_BY_RUN = {
    "train_batch_size": "train.tokens_per_step",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.tokens_per_step",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "gradient_clipping": "train.clip",
    "optimizer": "train.lr",
    "scheduler": "train.schedule",
    "wandb": "wandb.project",
    "steps_per_print": "log_every",
    "activation_checkpointing": "student.gradient_checkpointing",
    "data_efficiency": "data.blend",
    "sequence_parallel_size": "data.sequence_parallel",
    "checkpoint": "checkpoint.every",
}

CANNOT = {
    "ZeRO-3 alone splits the models": (
        "tensor_parallel", "autotp", "pipeline", "expert_parallel", "data_parallel_size",
        "use_data_before_expert_parallelism", "seq_parallel_communication_data_type", "inference",
    ),
    "gradients are averaged over ranks, in fp32 sums, by losses that are divided already": (
        "data_types", "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "disable_allgather",
        "managed_gradient_accumulation",
    ),
    "torch's fused AdamW updates, on offloaded shards too": ("zero_force_ds_cpu_optimizer", "weight_quantization"),
    "engines only run forward, backward and step, as they are": ("compile", "hybrid_engine", "autotuning", "flops_profiler"),
    "data and checkpoints are not DeepSpeed's here": ("dataloader_drop_last", "datastates_ckpt", "aio", "vocabulary_size"),
    "numbers go to metrics.jsonl and Weights & Biases": ("tensorboard", "csv_monitor", "comet", "memory_breakdown", "log_level"),
    "DeepSpeed no longer has it": (
        "nebula", "compression_training", "quantize_training", "sparse_gradients", "eigenvalue", "sparse_attention",
        "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop",
    ),
}  # fmt: skip

CANNOT_ZERO = {
    "its groups are made once, and teacher and student are two models": ("zero_hpz_partition_size",),
    "DeepSpeed no longer has it": ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param", "elastic_checkpoint"),
    "teacher.precision gives a frozen model 8 bits": ("zero_quantized_nontrainable_weights",),
    "gradients of 8 bits were not tried; communication_data_type = bf16 halves what is sent": ("zero_quantized_gradients",),
    "torch's fused AdamW updates": ("zenflow",),
    "offload_optimizer and offload_param replace it": ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"),
}  # fmt: skip


def load_ds_config(path: str) -> dict:
    """The file's sections. A section that the run file owns, or that cannot work here, is refused."""
    try:
        values = parse_json(found(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"ds_config must name a readable file, but {path} is not: {error.strerror}; {way_to(path)}"
        ) from None
    except ValueError as error:
        raise UserError(f"ds_config {path} must be valid JSON, but is not: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("zero_optimization"), dict):
        raise UserError(f"ds_config {path} must be a JSON object with a zero_optimization section, but is not")
    for key in values:
        check_section(path, key)
    check_zero(path, values["zero_optimization"])
    return values


def way_to(path: str) -> str:
    names = sorted(file.name for file in (HOME / "ds_configs").glob("*.json"))
    close = difflib.get_close_matches(Path(path).name, names, n=1)
    return (
        f"did you mean ds_configs/{close[0]}?"
        if close
        else f"correct it, or take one of ds_configs/: {', '.join(names)}"
    )


def check_section(path: str, key: str) -> None:
    if (home := DS_OWNED_BY_RUN.get(key)) is not None:
        raise UserError(f"ds_config {path} must leave {key} to the run file, but sets it; set {home} there instead")
    if (reason := reason_of(CANNOT, key)) is not None:
        raise UserError(f"ds_config {path} must do without {key}, but has it: {reason}; leave it out")
    if key not in USABLE:
        close = difflib.get_close_matches(key, [*USABLE, *DS_OWNED_BY_RUN], n=1)
        raise UserError(
            f"ds_config {path} must have sections that are known here, but has {shown(key)}; "
            + (f"did you mean {close[0]}?" if close else "leave it out")
        )


def reason_of(refused: dict[str, tuple[str, ...]], key: str) -> str | None:
    return next((reason for reason, keys in refused.items() if key in keys), None)


def check_zero(path: str, zero: dict) -> None:
    if zero.get("stage") != 3:
        found = shown(zero["stage"]) if "stage" in zero else "missing"
        raise UserError(f"ds_config {path}: zero_optimization.stage must be 3, but is {found}")
    for key, value in zero.items():
        reason = reason_of(CANNOT_ZERO, key)
        off = value is None or value is False or (key == "zero_hpz_partition_size" and value in (0, 1))
        if reason and not off:
            raise UserError(
                f"ds_config {path} must do without zero_optimization.{key}, but has {shown(value)}: {reason}; leave it out"
            )
    for part in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(part), dict):
            check_offload(f"ds_config {path}: zero_optimization.{part}", zero[part])


def check_offload(what: str, offload: dict) -> None:
    if offload.get("ratio", 1) != 1 or offload.get("super_offload"):
        key = "super_offload" if offload.get("super_offload") else "ratio"
        raise UserError(
            f"{what}.{key} must be left out, but is {shown(offload[key])}: only DeepSpeed's own Adam runs in parts"
        )
    if (device := offload.get("device", "none")) not in ("cpu", "none"):
        raise UserError(
            f"{what}.device must be cpu or none, but is {shown(device)}: checkpoints do not read state on other devices"
        )
