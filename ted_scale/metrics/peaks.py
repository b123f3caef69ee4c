"""The peak FLOP/s of a device in a precision, by torch's name of the device. An unknown device has none.

These are the dense figures of the vendors' data sheets: NVIDIA's of A100 (2021), H100 with PCIe and NVL (2022, 2024), H200
(2024), HGX B200 (2025), AMD's of Instinct MI300X (2023). Most sheets count the zeros of sparse matrices for tensor cores; such a
figure is halved. fp32 products are exact here (torch's TF32 is off), so fp32 runs are compared with the plain fp32 units. Note:
one chip is sold on several cards, and its PCIe cards reach three quarters of the others.
"""

import torch

PEAKS = (  # the first entry whose name is part of torch's name is used
    ("H100 PCIe", {"bf16": 756e12, "fp32": 51e12}),
    ("H100 NVL", {"bf16": 835e12, "fp32": 60e12}),
    ("H200 NVL", {"bf16": 835e12, "fp32": 60e12}),
    ("H100", {"bf16": 989e12, "fp32": 67e12}),
    ("H200", {"bf16": 989e12, "fp32": 67e12}),
    ("A100", {"bf16": 312e12, "fp32": 19.5e12}),
    ("B200", {"bf16": 2250e12, "fp32": 75e12}),
    ("MI300X", {"bf16": 1307e12, "fp32": 163e12}),
)


def device_peak(device: torch.device, precision: str) -> float | None:
    return peak_of(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def peak_of(name: str, precision: str) -> float | None:
    """The peak, or None if it is unknown. A slice of a device (MIG) has no peak, because its name does not show its FLOP/s."""
    known = next((peaks for key, peaks in PEAKS if key in name), None)
    return known[precision] if known and "MIG" not in name else None
