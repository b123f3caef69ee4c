"""A student's adapters: a trained low-rank product B·A is added to each frozen matrix of its blocks (LoRA, by peft).

Note: peft writes to an adapter's weights after it has made them, and ZeRO-3 allows this only while they are whole. So they are
made outside of ZeRO-3's construction. Every rank draws the same numbers, and DeepSpeed shards them when the engine is made.
"""

import importlib.util
import warnings
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from ted_scale.base.counts import millions
from ted_scale.base.errors import UserError, shown
from ted_scale.base.packages import install_extra
from ted_scale.config.changes import plain
from ted_scale.config.models import Lora
from ted_scale.models import fingerprint
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.trial import hollow

ALL = "all-linear"
NAMES = ("lora_A.default.weight", "lora_B.default.weight")  # peft's names of an adapter's weights inside its module


class Matrix(NamedTuple):
    """A linear map with an adapter."""

    inputs: int
    outputs: int
    is_turned: bool  # its weight is [inputs, outputs], as in GPT-2


def check(lora: Lora | None, anatomy: Anatomy) -> None:
    """Refuse adapters that the installation or the model does not allow, before any rank starts."""
    if lora is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            f"student.lora must be left out where peft is not installed, but is set; {install_extra('lora')}"
        )
    every = matrices(anatomy, ALL)
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in every}))
    for target in () if lora.targets == ALL else lora.targets:
        if not any(is_called(name, target) for name in every):
            raise UserError(
                f"student.lora.targets must name linear maps of the student's blocks ({kinds}), but {shown(target)} is none; "
                "correct it, or leave it out for all of them"
            )


def is_called(name: str, target: str) -> bool:
    """Whether a module's name ends with the parts of `target`."""
    return f".{name}".endswith(f".{target}")


@cache  # the plan, its memory, its FLOPs and its description ask for it
def matrices(anatomy: Anatomy, targets: tuple[str, ...] | str) -> dict[str, Matrix]:
    """Module → matrix, for the linear maps of blocks that get an adapter. The head gets none, because the fused losses read its
    weight directly."""
    inside, found = f"{anatomy.blocks}.", {}
    for name, module in hollow(anatomy, torch.bfloat16).named_modules():
        chosen = targets == ALL or any(is_called(name, target) for target in targets)
        if chosen and name.startswith(inside) and isinstance(module, (torch.nn.Linear, Conv1D)):
            is_turned = isinstance(module, Conv1D)
            first, second = module.weight.shape
            found[name] = Matrix(first, second, True) if is_turned else Matrix(second, first, False)
    return found


def shapes(anatomy: Anatomy, lora: Lora) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name in the adapted network, shape) of each adapter's A and B."""
    for name, matrix in matrices(anatomy, lora.targets).items():
        yield f"{name}.{NAMES[0]}", (lora.rank, matrix.inputs)
        yield f"{name}.{NAMES[1]}", (matrix.outputs, lora.rank)


def parameters(anatomy: Anatomy, lora: Lora | None) -> int:
    """The parameters of all adapters; 0 without them."""
    return sum(rows * columns for _, (rows, columns) in shapes(anatomy, lora)) if lora else 0


def identity(lora: Lora | None, anatomy: Anatomy) -> dict:
    """What must be the same at a resume: a checkpoint of adapters does not hold the frozen weights."""
    if lora is None:
        return {"student.lora.rank": 0}
    named = {f"student.lora.{key}": plain(getattr(lora, key)) for key in ("rank", "alpha", "targets")}
    return {**named, "student.base": fingerprint.sampled(anatomy.folder)}


def describe(lora: Lora | None, anatomy: Anatomy) -> list[str]:
    """The line for the dry run and the log."""
    if lora is None:
        return []
    count, trained = len(matrices(anatomy, lora.targets)), parameters(anatomy, lora)
    return [
        f"student.lora: rank {lora.rank}, alpha {lora.alpha:g}, on {count} matrices of the blocks: {millions(trained)} "
        f"trainable parameters, {trained / anatomy.parameters:.2%} of the student, whose own stay as they are"
    ]


def settings(anatomy: Anatomy, lora: Lora):
    """peft's settings. Dropout is off, as it is in the models themselves."""
    from peft import LoraConfig

    names = list(matrices(anatomy, lora.targets))
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=names, lora_dropout=0.0, task_type="CAUSAL_LM")


def adapt(network, anatomy: Anatomy, lora: Lora, seed: int = 0) -> None:
    """Put adapters into the network, and freeze its own weights. They start as in peft: A at random, B at 0.

    The embeddings' output gets a gradient that is not used. DeepSpeed takes the gradients of a block when the gradient of the
    block's input is ready. Without this gradient it would take those of the first block too early."""
    from peft import inject_adapter_in_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about GPT-2's transposed matrices, which peft detects itself
        inject_adapter_in_model(settings(anatomy, lora), network)
    network.get_input_embeddings().register_forward_hook(with_gradient)


def with_gradient(module, inputs, output):
    return output.requires_grad_(torch.is_grad_enabled())


def delta(matrix: Matrix, lora: Lora, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The matrix that an adapter adds to its own, in fp32."""
    product = (b.float() @ a.float()) * (lora.alpha / lora.rank)
    return product.t() if matrix.is_turned else product
