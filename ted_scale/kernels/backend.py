"""Which code computes the losses: one rule for all of them.

`triton`    Triton kernels beside the vendor's matrix products: CUDA from sm_80 on, ROCm
`torch`     the same formulas in torch, in place, chunk by chunk: every device
`compiled`  `torch`, with the row formulas of chunked logit losses and of stage I through torch.compile: fewer passes over
            a chunk, after a minute of compiling
`auto`      `triton` where the device can, else `torch`
"""

import torch

from ted_scale.kernels.triton.device import device_name, interprets, runs_triton

CHOICES = ("auto", "triton", "torch", "compiled")
CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}  # of one chunk's scratch; fewer chunks re-read the weights less often


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
    """The log's line."""
    chosen = choose(backend, device)
    return f"losses: {chosen} kernels on {device_name(device)}" + (" (auto)" if backend == "auto" else "")


def rows_per_chunk(rows: int, bytes_a_row: int, device: torch.device, chunk_tokens: int | None) -> int:
    """As many as the budget holds, in multiples of 128 where it can: the products' tiles."""
    if chunk_tokens:
        return min(chunk_tokens, max(rows, 1))
    fit = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // bytes_a_row
    fit = fit // 128 * 128 if fit >= 128 else max(fit, 16)
    return max(1, min(fit, rows))


def chunks(rows: int, chunk: int):
    return [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]
