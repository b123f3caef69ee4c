"""The most FLOP/s that a device can do in a precision, by the name torch gives it; of an unknown device nothing is said.

Dense figures of the vendors' data sheets, whose tensor-core figures mostly count the zeros of sparse matrices and are halved
here: NVIDIA's of A100 (2021), H100 with PCIe and NVL (2022, 2024), H200 (2024), HGX B200 (2025), AMD's of Instinct MI300X
(2023). fp32 products are exact here (torch's TF32 is off), so that fp32 runs are held against the plain fp32 units. The
surprise: one chip has several cards, and the PCIe ones reach three quarters.
"""

import torch

PEAKS = (  # the first name that is part of torch's
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
    """A slice of a device (MIG) has a part of its units, which its name does not tell in FLOPs."""
    known = next((peaks for key, peaks in PEAKS if key in name), None)
    return known[precision] if known and "MIG" not in name else None
