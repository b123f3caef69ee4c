"""A frozen network with matrices in 8 bits: which matrices these are, and how they are read.

torchao rounds them and multiplies by them. With fp8, every row of a matrix and of its input has a scale of its own. With int8,
only the matrix is rounded, and each product converts it back. Note: a block is read whole, in bf16, and rounded before the next
one is read. So the device never holds more than one block in bf16.
"""

import importlib.util
from collections import Counter
from functools import cache
from typing import NamedTuple

import torch

from ted_scale.base.counts import millions
from ted_scale.base.errors import UserError
from ted_scale.base.packages import install_extra
from ted_scale.kernels.triton.device import device_name
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.inspection import empty_model, read_config
from ted_scale.models.weights import draw_weights, load_weights, tensors_of
from ted_scale.models.zero import bare_construction

MULTIPLE = 16  # fp8 products need both sides of a matrix to be a multiple of it
BESIDE = {"fp8": 4, "int8": 5}  # bytes for each row of a matrix: its scale, and int8's zero point, which is always 0


class Counts(NamedTuple):
    """How a network's parameters are kept."""

    matrices: dict[str, int]  # matrices in 8 bits: name inside a block → number of blocks that have it
    left_out: dict[str, int]  # matrices of blocks that stay in bf16
    elements: int  # number of elements in 8 bits
    bytes: int  # size of the whole network


def check(bits: str | None, anatomy: Anatomy) -> None:
    """Refuse 8 bits that the installation or the model does not allow, before any rank starts."""
    if bits and importlib.util.find_spec("torchao") is None:
        raise UserError(
            f"teacher.precision must be left out where torchao is not installed, but is '{bits}'; "
            f"{install_extra('torchao')}"
        )
    check_model(bits, anatomy)


def check_model(bits: str | None, anatomy: Anatomy) -> None:
    """Check the model's shapes alone, because a run may be planned on a machine that cannot run it."""
    if bits and not counts(anatomy, bits).matrices:
        raise UserError(
            f"teacher.precision must be left out for a teacher of family {anatomy.family}, but is '{bits}', which needs matrices "
            f"that are torch.nn.Linear{' with sides of multiples of 16' if bits == 'fp8' else ''}, and its blocks have none"
        )


def check_device(bits: str | None, device: torch.device) -> None:
    """Refuse a device that cannot compute the teacher's 8 bits."""
    hopper = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)
    if bits == "fp8" and not hopper:
        raise UserError(
            f"teacher.precision must be bf16 or int8 on {device_name(device)}, but is 'fp8', which needs CUDA sm_90 or newer; take "
            "'int8' for its memory, or leave it out"
        )


def takes(module, bits: str) -> bool:
    """Whether torchao rounds this module. fp8 products need sides that are multiples of MULTIPLE."""
    fits = type(module) is torch.nn.Linear
    return fits and (bits == "int8" or not any(side % MULTIPLE for side in module.weight.shape))


@cache  # the plan, its memory and its description ask for it
def counts(anatomy: Anatomy, bits: str) -> Counts:
    """The matrices that would be rounded to 8 bits, by kind of module, and the teacher's bytes then. Nothing is loaded."""
    with torch.device("meta"):
        network = empty_model(read_config("teacher", anatomy.folder), torch.bfloat16)
    found, others, elements, rows = Counter(), Counter(), 0, 0
    for block in network.get_submodule(anatomy.blocks):
        for name, module in block.named_modules():
            if takes(module, bits):
                found[name] += 1
                elements, rows = elements + module.weight.numel(), rows + len(module.weight)
            else:
                own = module.named_parameters(name, recurse=False)
                others.update(key for key, weight in own if weight.dim() > 1)
    size = 2 * anatomy.parameters - elements + BESIDE[bits] * rows
    return Counts(dict(found), dict(others), elements, size)


def describe(anatomy: Anatomy, bits: str) -> str:
    """The line for the log."""
    found = counts(anatomy, bits)
    said = (
        f"the teacher in {bits}: {sum(found.matrices.values())} matrices of its blocks, {millions(found.elements)} of "
        f"{millions(anatomy.parameters)} parameters ({listed(found.matrices)}); embeddings, norms and head stay in bf16"
    )
    return said + (f", and so do {listed(found.left_out)}, which torchao does not take" if found.left_out else "")


def listed(names: dict[str, int]) -> str:
    return ", ".join(f"{name} x {count}" for name, count in names.items())


# Building


def build_quantized(anatomy: Anatomy, bits: str, *, init: str, seed: int, device):
    """The causal LM with its folder's weights or random ones. It is whole on `device`, with its blocks' matrices in 8 bits."""
    network, config = hollow(anatomy, device), config_of(bits)
    torch.manual_seed(seed)
    rest = rest_of(network, anatomy)
    empty(rest, device)
    inside = f"{anatomy.blocks}."
    outside = {name: tensor for name, tensor in tensors_of(network).items() if not name.startswith(inside)}
    fill(network, anatomy, rest, outside, init)
    for number, block in enumerate(network.get_submodule(anatomy.blocks)):
        read_block(network, anatomy, number, device, init)
        quantize(block, bits, config)
    return network


def hollow(anatomy: Anatomy, device):
    """The network with its buffers on `device`, and without matrices."""
    with bare_construction("meta"):
        network = empty_model(read_config("teacher", anatomy.folder), torch.bfloat16)
    for buffer in network.buffers():
        buffer.data = buffer.data.to(device)
    return network


def rest_of(network, anatomy: Anatomy) -> list:
    """The modules outside the blocks."""
    inside = set(network.get_submodule(anatomy.blocks).modules())
    return [module for module in network.modules() if module not in inside]


def read_block(network, anatomy: Anatomy, number: int, device, init: str = "weights") -> None:
    name = f"{anatomy.blocks}.{number}"
    block = network.get_submodule(name)
    empty(block.modules(), device)
    fill(network, anatomy, block.modules(), tensors_of(block, name), init)


def empty(modules, device) -> None:
    """Give the modules parameters without values on `device`. A shared parameter stays shared."""
    made: dict = {}
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                made[parameter] = torch.nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
            setattr(module, name, made[parameter])


def fill(network, anatomy: Anatomy, modules, tensors: dict, init: str) -> None:
    if init == "random":
        draw_weights(network, modules)
    else:
        load_weights(network, anatomy.folder, tensors)


def config_of(bits: str):
    """torchao's settings. Its defaults would also change how torch compiles everything else in this process."""
    from torchao import quantization

    if bits == "int8":
        return quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    rows = quantization.PerRow()
    return quantization.Float8DynamicActivationFloat8WeightConfig(granularity=rows, set_inductor_config=False)


def quantize(block, bits: str, config) -> None:
    from torchao.quantization import quantize_

    quantize_(block, config, filter_fn=lambda module, _: takes(module, bits))


def unrounded(network, anatomy: Anatomy, device):
    """The same causal LM in bf16, for a comparison. Outside the blocks it is `network` itself. A block is read from the files
    when it is called, and freed afterwards."""
    other = hollow(anatomy, device)
    for ours, theirs in zip(rest_of(other, anatomy), rest_of(network, anatomy), strict=True):
        for name, parameter in theirs.named_parameters(recurse=False):
            setattr(ours, name, parameter)
    for number, block in enumerate(other.get_submodule(anatomy.blocks)):
        block.register_forward_pre_hook(lambda block, _, number=number: read_block(other, anatomy, number, device))
        block.register_forward_hook(lambda block, *_: empty(block.modules(), "meta"))
    return other.eval()
