"""Liger's kernels in the blocks of teacher and student: RMSNorm, rotary positions and the gate of the MLP.

Liger knows which of its kernels replaces which module of a family; `fuse` applies them to one network and keeps its
parameters. Liger also changes the family's file in transformers, and so every model of the process. Among these are the
models that inspection.py runs on the meta device, where no kernel runs. Therefore the file's names are restored, and a
function that a module would have looked up there is given to that module alone.
"""

import functools
import importlib.util
import logging
import sys
import types

import torch

from ted_scale.base.errors import UserError
from ted_scale.kernels.triton.device import device_name, interprets, runs_triton

# Liger supports more; a test compares the logits and gradients of these with transformers' own.
FAMILIES = (
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "ministral", "mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3",
    "smollm3",
)  # fmt: skip


def check(wish: str, models: dict) -> None:
    """Refuses a setting that the models (name: anatomy or None) or the installation do not allow, before any rank starts."""
    if wish != "liger":
        return
    if not installed():
        raise UserError(
            "fused_blocks must be auto or off where liger-kernel is not installed, but is 'liger'; pip install -e .[liger], or "
            "leave it out"
        )
    for side, anatomy in models.items():
        if anatomy and anatomy.family not in FAMILIES:
            raise UserError(
                f"fused_blocks must be auto or off for a {side} of family {anatomy.family}, but is 'liger', which "
                f"supports {', '.join(FAMILIES)}; leave it out"
            )


def check_device(wish: str, device: torch.device) -> None:
    if wish == "liger" and not (runs_triton(device) or interprets()):
        raise UserError(
            f"fused_blocks must be auto or off on {device_name(device)}, but is 'liger', which needs ROCm or CUDA sm_80; leave "
            "it out"
        )


def installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def why_not(wish: str, family: str, device: torch.device) -> str | None:
    """The reason why a network keeps transformers' code; None if there is none."""
    if wish == "off":
        return "off"
    if wish == "auto" and not runs_triton(device):
        return f"no Triton on {device_name(device)}"
    if not installed():
        return "liger-kernel is not installed"
    return None if family in FAMILIES else f"Liger does not support {family}"


def describe(wish: str, models: dict, device: torch.device) -> str:
    """The line for the log."""
    reasons = {side: why_not(wish, anatomy.family, device) for side, anatomy in models.items() if anatomy}
    sides = (f"{s} as in transformers ({why})" if why else f"{s} by Liger" for s, why in reasons.items())
    return "blocks: " + ", ".join(sides)


def fuse(network, wish: str):
    """The network, with Liger's forward in the modules for which there is one."""
    from deepspeed.accelerator import get_accelerator

    if why_not(wish, network.config.model_type, torch.device(get_accelerator().device_name())) is None:
        names = vars(sys.modules[type(network).__module__])
        before = dict(names)
        try:
            apply_liger(network)
            functions = {n: f for n, f in names.items() if isinstance(f, types.FunctionType) and before.get(n) is not f}
        finally:
            names.update(before)
        for module in network.modules():
            use_functions(module, names, functions)
    return network


def apply_liger(network) -> None:
    """Replaces modules inside the blocks only. Liger does not check a gate's activation, so it is compared here."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # as transformers' Trainer does

    logging.getLogger("liger_kernel").setLevel(
        logging.ERROR
    )  # it warns of every other vendor's kernel that is not installed
    config = network.config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    gates = {"swiglu": activation in ("silu", "swish"), "geglu": activation == "gelu_pytorch_tanh"}
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    _apply_liger_kernel_to_instance(model=network, rms_norm=True, rope=True, **gates, **losses)


def use_functions(module, names: dict, functions: dict) -> None:
    """Gives `module` a forward that finds `functions` where it would look them up in its file, whose names are `names`."""
    forward = type(module).forward
    if getattr(forward, "__globals__", None) is names and functions.keys() & set(forward.__code__.co_names):
        parts = forward.__name__, forward.__defaults__, forward.__closure__
        own = types.FunctionType(forward.__code__, {**names, **functions}, *parts)
        own.__kwdefaults__ = forward.__kwdefaults__
        module.forward = types.MethodType(functools.wraps(forward)(own), module)
