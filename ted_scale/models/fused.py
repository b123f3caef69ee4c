"""Fewer kernel launches in the blocks: torch compiles them, or Liger computes RMSNorm, rotary positions and the gated MLP.

Liger knows which of its kernels replaces which module of a family. `fuse` applies them to one network and keeps its parameters.
Liger also changes the family's file in transformers, and so every model of the process. This includes the models that
inspection.py runs on the meta device, where no kernel runs. Therefore the names in that file are restored. A function that a
module would look up there is given to this module alone.
"""

import functools
import importlib.util
import logging
import sys
import types

import torch

from ted_scale.base.errors import UserError
from ted_scale.base.packages import install_extra
from ted_scale.kernels.triton.device import device_name, interprets, runs_triton
from ted_scale.models import attention

# Liger supports more families. For these, a test compares logits and gradients with transformers' own.
FAMILIES = (
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "ministral", "mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3",
    "smollm3",
)  # fmt: skip


def check(wish: str, models: dict, mode: str) -> None:
    """Refuse a setting that the models (name: anatomy or None), data.attention or the installation do not allow. This is called
    before any rank starts."""
    if wish == "compile" and mode == "document":
        raise UserError(
            "fused_blocks must be auto, liger or off where data.attention is 'document', but is 'compile': a "
            "graph would hold for the documents of one batch, so that every step would be compiled anew; leave it out"
        )
    if wish != "liger":
        return
    if not installed():
        raise UserError(
            "fused_blocks must be auto, compile or off where liger-kernel is not installed, but is 'liger'; "
            f"{install_extra('liger')}, or leave it out"
        )
    for side, anatomy in models.items():
        if anatomy and anatomy.family not in FAMILIES:
            raise UserError(
                f"fused_blocks must be auto, compile or off for a {side} of family {anatomy.family}, but is 'liger', which "
                f"supports {', '.join(FAMILIES)}; leave it out"
            )


def check_device(wish: str, device: torch.device) -> None:
    """Refuse a fused_blocks that the device cannot run."""
    if wish == "compile" and not runs_triton(device):
        raise UserError(
            f"fused_blocks must be auto or off on {device_name(device)}, but is 'compile', which needs ROCm or CUDA sm_80; leave "
            "it out"
        )
    if wish == "liger" and not (runs_triton(device) or interprets()):
        raise UserError(
            f"fused_blocks must be auto or off on {device_name(device)}, but is 'liger', which needs ROCm or CUDA "
            "sm_80; leave it out"
        )


def check_teacher(paths: list[str]) -> None:
    """Refuse teacher.compile if one of these paths is flex attention, which is compiled separately."""
    if "flex" in paths:
        raise UserError(
            "teacher.compile must be false where a layer of the teacher takes flex attention, which is compiled by itself, but is "
            "true; leave it out"
        )


def installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def chosen(wish: str, family: str, paths: list[str], device: torch.device) -> str:
    """compile, liger or off. `paths` are those of attention.py; torch compiles only its own attention well. On a CPU, launches
    cost little beside a block's work."""
    if wish != "auto":
        return wish
    if not runs_triton(device):
        return "off"
    if paths == ["sdpa"]:
        return "compile"
    return "liger" if installed() and family in FAMILIES else "off"


def describe(wish: str, ways: dict[str, str]) -> str:
    """The line for the log. `ways` has the choice for each side."""
    said = {
        "compile": "to be compiled by torch at the first steps", "liger": "with Liger's kernels",
        "off": "as in transformers",
    }  # fmt: skip
    sides = ", ".join(f"{side} {said[way]}" for side, way in ways.items())
    return f"blocks: {sides}" + (" (auto)" if wish == "auto" else "")


def fuse(network, blocks, way: str, fails: bool = True, attention_apart: bool = False):
    """The network, with its `blocks` compiled, or with Liger's forward in the modules for which Liger has one. With
    `attention_apart` the attention of a compiled block runs outside of its graph."""
    if way == "compile":
        if attention_apart:
            network.config._attn_implementation = attention.SEALED
            for block in blocks:
                block.register_forward_pre_hook(attention.seal, with_kwargs=True)
        compile_blocks(blocks, fails)
    elif way == "liger":
        use_liger(network)
    return network


def compile_blocks(blocks, fails: bool) -> None:
    """Compile each block's forward. DeepSpeed's hooks stay around it. Blocks of one kind share a graph. If torch cannot compile a
    block, it runs uncompiled, or with `fails` the run stops."""
    import torch._dynamo

    # Two models, two stages and validation compile the same code, more often than torch's limit.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.suppress_errors = not fails
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)


def use_liger(network):
    """The network, with Liger's forward in the modules for which Liger has one."""
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
    """Replace modules, inside the blocks only. Liger does not check the activation of a gate, so it is compared here."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # transformers' Trainer uses it, too

    logging.getLogger("liger_kernel").setLevel(
        logging.ERROR
    )  # it warns about other vendors' kernels that are not installed
    config = network.config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    gates = {"swiglu": activation in ("silu", "swish"), "geglu": activation == "gelu_pytorch_tanh"}
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    _apply_liger_kernel_to_instance(model=network, rms_norm=True, rope=True, **gates, **losses)


def use_functions(module, names: dict, functions: dict) -> None:
    """Give `module` a forward that uses `functions` in place of those of its file. `names` are the names in that file."""
    forward = type(module).forward
    if getattr(forward, "__globals__", None) is names and functions.keys() & set(forward.__code__.co_names):
        parts = forward.__name__, forward.__defaults__, forward.__closure__
        own = types.FunctionType(forward.__code__, {**names, **functions}, *parts)
        own.__kwdefaults__ = forward.__kwdefaults__
        module.forward = types.MethodType(functools.wraps(forward)(own), module)
