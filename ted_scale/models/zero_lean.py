"""DeepSpeed's work for every weight, without the parts that only its debugging needs.

For small blocks, DeepSpeed's Python takes longer than the GPU's work, so it decides the speed. Like zero_hooks.py, this file uses
internals of DeepSpeed 0.19.8.
"""

import functools

import torch


def patch() -> None:
    from deepspeed.runtime.zero import (
        linear,
        parameter_offload,
        partition_parameters,
        partitioned_param_coordinator,
        stage3,
    )
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
    from deepspeed.utils import nvtx

    for module in (partition_parameters, partitioned_param_coordinator):
        silence(module)
    for module in (partitioned_param_coordinator, parameter_offload):
        module.iter_params = parameters_of
    nvtx.enable_nvtx = False  # it makes about forty ranges a block
    linear.LinearFunctionForZeroStage3 = Linear(linear.LinearFunctionForZeroStage3)
    stage3.DeepSpeedZeroOptimizer_Stage3.get_grad_norm_direct = gradient_norm
    Coordinator._PartitionedParameterCoordinator__release_param = release


def silence(module) -> None:
    """Replace DeepSpeed's debug printing. It formats a message and asks for the rank for every weight, but prints only with
    `force`."""
    if hasattr(module, "print_rank_0"):
        module.print_rank_0 = functools.partial(only_forced, module.print_rank_0)
    for name in dir(module):
        if name.startswith("debug_param2name"):
            setattr(module, name, lambda _: "")


def only_forced(say, *message, force: bool = False, **more) -> None:
    if force:
        say(*message, force=True, **more)


def parameters_of(module, recurse: bool = False) -> tuple:
    """The parameters of a module, from a cache. DeepSpeed would walk through a block's modules six times in each pass."""
    name = "_all_parameters" if recurse else "_own_parameters"
    found = module.__dict__.get(name)
    if found is None:
        found = module.__dict__[name] = tuple(module.parameters(recurse=recurse))
    return (*found, *module._external_params.values()) if module._external_params else found


def release(coordinator, weight, free_data: bool = True) -> None:
    """Release a weight in a device's memory, as DeepSpeed does, but with one function call instead of five."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param

    if weight.ds_status is not ZeroParamStatus.AVAILABLE or weight.ds_active_sub_modules:
        return
    if free_data and weight.ds_tensor.final_location is None:
        free_param(weight)
    else:
        weight.partition(free_data=free_data)
    coordinator._PartitionedParameterCoordinator__n_available_params -= weight.ds_numel


class Linear:
    """A linear map whose backward reads the weight itself. Torch's own keeps a transposed view, which keeps the whole weight
    after its release. Without gradients this is one product, not a call of an autograd function."""

    def __init__(self, with_autocast):
        self.with_autocast = with_autocast

    def apply(self, x, weight, bias=None):
        if hasattr(weight, "__tensor_flatten__"):
            return torch._C._nn.linear(
                x, weight, bias
            )  # a weight in 8 bits (quantized.py): torchao supports only torch's own function
        if torch.compiler.is_compiling():
            return product(x, weight, bias)  # a compiled backward reads the weight itself, too
        if torch._C._is_any_autocast_enabled():
            return self.with_autocast.apply(x, weight, bias)
        return LinearFunction.apply(x, weight, bias) if torch.is_grad_enabled() else product(x, weight, bias)


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, slopes):
        (x, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad
        is_away = getattr(getattr(weight, "ds_status", None), "name", "") == "NOT_AVAILABLE"
        if is_away:
            weight.all_gather()
        dx = slopes.matmul(weight) if wanted[0] else None
        rows = slopes.reshape(-1, slopes.shape[-1]) if any(wanted[1:]) else None
        dw = rows.t().matmul(x.reshape(-1, x.shape[-1])) if wanted[1] else None
        if is_away:
            weight.partition()
        return dx, dw, rows.sum(0) if wanted[2] else None


def product(x, weight, bias):
    if bias is not None and x.dim() == 2:
        return torch.addmm(bias, x, weight.t())
    out = x.matmul(weight.t())
    if bias is not None:
        out += bias
    return out


def gradient_norm(optimizer, gradients, params, norm_type=2) -> torch.Tensor:
    """The gradient norm of one group over all ranks, or -1 if it is not finite. DeepSpeed's function copies this -1 from the
    host, so the host waits once for each group."""
    from deepspeed import comm

    norms = torch._foreach_norm([g.to(params[0].device, torch.float32, non_blocking=True) for g in gradients])
    square = torch.stack(norms).square().sum()
    comm.all_reduce(square, group=optimizer._get_param_partition_group(params[0]))
    return torch.where(square.isfinite(), square.sqrt(), -1.0)
