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


def choose(backend: str, device: torch.device, top_k: int = 0) -> str:
    """The backend to use. Triton has no kernel for a logit loss over the `top_k` likeliest tokens."""
    if backend not in CHOICES:
        raise ValueError(f"backend must be one of {', '.join(CHOICES)}, but is '{backend}'")
    if backend == "auto":
        return "triton" if runs_triton(device) and not top_k else "torch"
    if backend == "triton" and not (runs_triton(device) or interprets()):
        raise ValueError(
            f"backend must be auto, torch or compiled on {device_name(device)}, but is 'triton'; it needs ROCm or CUDA sm_80"
        )
    return backend


def describe(backend: str, device: torch.device, top_k: int = 0) -> str:
    """The line for the log."""
    chosen, of_logits = choose(backend, device), choose(backend, device, top_k)
    apart = "" if of_logits == chosen else f", {of_logits} ones for the logits, of which loss.top_k is {top_k}"
    return f"losses: {chosen} kernels on {device_name(device)}" + (" (auto)" if backend == "auto" else "") + apart
