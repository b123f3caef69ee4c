"""DeepSpeed's configuration for one model: the ds_config, the values of the run file, and sizes that follow from the model."""

from collections.abc import Iterator

import torch

from ted_scale.base.errors import UserError, shown
from ted_scale.models import lora
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.trial import hollow
from ted_scale.models.zero_single import is_whole

KEPT_WHOLE, KEPT_BY_DEFAULT = "stage3_param_persistence_threshold", 10**5  # elements of a weight


def engine_config(plan, model: Anatomy, device: str | None = None, **trained) -> dict:
    """The configuration of an engine on `device`, by default this machine's accelerator."""
    # DeepSpeed's own linear map is only needed for weights that are released before backward.
    own_linear = not is_whole(plan.ds_config["zero_optimization"], plan.world)
    return {
        "communication_data_type": "fp32",  # bf16's error of a sum grows with the number of ranks; a ds_config may choose it
        "timers": {"throughput": {"enabled": False}},  # these would wait for the device at every forward and step
        **plan.ds_config,
        "zero_optimization": {
            "memory_efficient_linear": own_linear,
            **bucket_sizes(model, device),
            **plan.ds_config["zero_optimization"],
        },
        "train_micro_batch_size_per_gpu": plan.run.train.micro_batch,
        "bf16": {"enabled": plan.run.train.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on offloaded shards and needs no compiler
        **trained,
    }


def teacher_config(plan, device: str | None = None) -> dict:
    """The configuration of the teacher's engine. It has no optimizer. It keeps no more weights whole than DeepSpeed does by
    default: a ds_config that keeps the student whole must not keep the teacher whole."""
    config = engine_config(plan, plan.teacher, device)
    zero = {k: v for k, v in config["zero_optimization"].items() if k != "offload_optimizer"}
    zero[KEPT_WHOLE] = min(setting(plan, KEPT_WHOLE, device, plan.teacher), KEPT_BY_DEFAULT)
    return {**config, "zero_optimization": zero}


def check_int8_gathers(plan) -> None:
    """Refuse int8 gathers of weights that cannot be cut for them: DeepSpeed's kernels need shards of a multiple of 8 weights."""
    if not plan.ds_config["zero_optimization"].get("zero_quantized_weights"):
        return
    for name, elements, ranks in gathered_weights(plan):
        if elements % (8 * ranks):
            raise UserError(
                f"ds_config {plan.run.ds_config}: zero_optimization.zero_quantized_weights must be left out where a rank's "
                f"part of a weight is no multiple of 8 elements, but {name} has {elements} on {ranks} ranks; leave it out, or "
                "take another number of ranks"
            )


def gathered_weights(plan) -> Iterator[tuple[str, int, int]]:
    """(name, elements, ranks that share it) of each weight that ranks gather: the student's, the filters', those of a shared
    teacher."""
    models = [("student", plan.student, plan.world)]
    if plan.placement and not plan.placement.is_bare:
        models.append(("teacher", plan.teacher, plan.placement.ranks))
    for side, model, ranks in models:
        for name, weight in hollow(model, torch.bfloat16).named_parameters():
            yield f"{name} of the {side}", weight.numel(), ranks
    for name, (rows, columns) in lora.shapes(plan.student, plan.run.student.lora) if plan.run.student.lora else ():
        yield f"{name} of the student", rows * columns, plan.world
    if plan.pairs:  # the rows of a filter's matrix
        yield "a filter's bias", plan.width, plan.world


def zero_settings(path: str, zero: dict):
    """The section of ZeRO as DeepSpeed parses it. A mistake in it is one sentence about the ds_config at `path`."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        return DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(["zero_optimization", *map(str, wrong["loc"])])
        raise UserError(
            f"ds_config {path}: {key} must be what DeepSpeed knows, but is {shown(wrong['input'])} ({wrong['msg']}); correct it"
        ) from None


def setting(plan, key: str, device: str | None, model: Anatomy | None = None) -> float:
    """A value of the ds_config, or the default that follows from model and device. DeepSpeed parses numbers in strings."""
    zero = engine_config(plan, model or plan.student, device)["zero_optimization"]
    config = zero_settings(plan.run.ds_config, zero)
    names = {field.alias or name: name for name, field in type(config).model_fields.items()}
    return getattr(config, names[key])


def bucket_sizes(model: Anatomy, device: str | None = None) -> dict:
    """How many elements DeepSpeed gathers, reduces and updates at once; design note 23 has the arithmetic."""
    from deepspeed.accelerator import get_accelerator

    on_cpu = (device or get_accelerator().device_name()) == "cpu"
    return {
        "stage3_prefetch_bucket_size": model.block_parameters,  # the whole next block, while this one computes
        "stage3_max_live_parameters": max(10**9, 3 * model.block_parameters),
        "contiguous_gradients": False,  # True would copy every gradient into a buffer that reduce-scatter does not read
        "reduce_bucket_size": 2**21,  # small gradients are reduced together, a large matrix alone and without a copy
        "sub_group_size": 2**22 if on_cpu else 10**8,  # an update copies its gradients; malloc keeps blocks of 16 MiB
    }
