"""DeepSpeed's configuration for one model: its file's part, what the run file owns, and sizes that follow from the model."""

from ted_scale.models.anatomy import Anatomy


def engine_config(plan, model: Anatomy, **trained) -> dict:
    """DeepSpeed's configuration for a model: its file's part, and what the run file owns."""
    return {
        "communication_data_type": "fp32",  # in bf16 a sum loses more the more ranks there are; a ds_config may say bf16
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at every forward and step
        **plan.ds_config,
        "zero_optimization": {**bucket_sizes(model), **plan.ds_config["zero_optimization"]},
        "train_micro_batch_size_per_gpu": plan.run.train.micro_batch,
        "bf16": {"enabled": plan.run.train.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on offloaded shards too, with nothing to compile
        **trained,
    }


def bucket_sizes(model: Anatomy) -> dict:
    """What DeepSpeed gathers, reduces and updates at once, in elements; the arithmetic is in design note 23."""
    from deepspeed.accelerator import get_accelerator

    on_cpu = get_accelerator().device_name() == "cpu"
    return {
        "stage3_prefetch_bucket_size": model.block_parameters,  # the next block, whole, while this one computes
        "stage3_max_live_parameters": max(10**9, 3 * model.block_parameters),
        "contiguous_gradients": False,  # a copy of every gradient, in a buffer that reduce-scatter does not read
        "reduce_bucket_size": 2**21,  # small gradients together; a large matrix goes alone, uncopied
        "sub_group_size": 2**22 if on_cpu else 10**8,  # an update copies its gradients; 16 MiB malloc keeps
    }
