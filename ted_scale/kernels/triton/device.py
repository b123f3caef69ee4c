"""The device on which the losses run: its name, and whether it runs Triton kernels."""

import functools
import os

import torch


def runs_triton(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def interprets() -> bool:
    """Whether Triton's interpreter runs the kernels on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"{torch.cuda.get_device_name(device)} ({architecture(device)})"


@functools.cache
def architecture(device: torch.device) -> str:
    """The name of a device's architecture, for example `sm_90` or `gfx942`."""
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
