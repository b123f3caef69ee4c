"""Which code computes the losses: one rule for all of them.

`triton`    Triton kernels beside the vendor's matrix products: CUDA from sm_80 on, ROCm
`torch`     the same formulas in torch, in place, chunk by chunk: every device
`compiled`  `torch`, with the row formulas of chunked logit losses and of stage I through torch.compile: fewer passes over
            a chunk, after a minute of compiling
`auto`      `triton` where the device runs it, else `torch`
"""

import torch

from ted_scale.kernels.triton.device import device_name, interprets, runs_triton

CHOICES = ("auto", "triton", "torch", "compiled")


def choose(backend: str, device: torch.device) -> str:
    if backend not in CHOICES:
        raise ValueError(f"backend must be one of {', '.join(CHOICES)}, but is '{backend}'")
    if backend == "auto":
        return "triton" if runs_triton(device) else "torch"
    if backend == "triton" and not (runs_triton(device) or interprets()):
        raise ValueError(
            f"backend must be auto, torch or compiled on {device_name(device)}, but is 'triton'; it needs ROCm or CUDA sm_80"
        )
    return backend


def describe(backend: str, device: torch.device) -> str:
    """The line for the log."""
    chosen = choose(backend, device)
    return f"losses: {chosen} kernels on {device_name(device)}" + (" (auto)" if backend == "auto" else "")
