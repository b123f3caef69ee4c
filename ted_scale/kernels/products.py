"""Chunks of rows and their matrix products: 16- or 32-bit operands, fp32 results, computed by the vendor's library.

CUDA and ROCm multiply 16-bit operands, sum in fp32 and write fp32 at full speed. A CPU has no such product. There the operands
are converted to fp32 first, which is exact but slower.
"""

import torch

CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}  # of one chunk; fewer chunks read the weights less often


def rows_per_chunk(rows: int, bytes_a_row: int, device: torch.device, chunk_tokens: int | None) -> int:
    """As many rows as fit into the budget; if possible a multiple of 128, the tile size of the products."""
    if chunk_tokens:
        return min(chunk_tokens, max(rows, 1))
    fit = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // bytes_a_row
    fit = fit // 128 * 128 if fit >= 128 else max(fit, 16)
    return max(1, min(fit, rows))


def chunks(rows: int, chunk: int):
    return [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]


def live_rows(states, weight):
    """The states with zeros for tokens that do not count, so that not even a NaN there reaches a product."""
    return states if all_count(weight) else torch.where((weight > 0)[:, None], states, 0)


def all_count(weight) -> bool:
    """Whether every token is known to count. Only a CPU checks this, to save copies. A device would have to wait for the answer,
    and a trace has no values."""
    return weight.is_cpu and not torch.compiler.is_compiling() and bool((weight > 0).all())


def operand(weight, backend: str):
    """A weight in the form that its products need. On a CPU this makes one fp32 copy for each call, not one for each chunk."""
    return weight if weight is None or weight.is_cuda or backend == "triton" else weight.float()


def project(states, weight, bias, out=None):
    """states·weightᵀ + bias in fp32, in `out` or in a new tensor. A weight of None is the identity."""
    if out is None:
        width = states.shape[1] if weight is None else len(weight)
        out = torch.empty(len(states), width, dtype=torch.float32, device=states.device)
    if weight is not None and bias is not None and not states.is_cuda:
        return torch.addmm(bias.float(), states.float(), weight.float().t(), out=out)
    y = out.copy_(states) if weight is None else matmul_into(out, states, weight.t())
    return y if bias is None else y.add_(bias)


def empty_gradients(h, w, b, wanted, start=torch.zeros):
    """Tensors for the gradients of h·wᵀ + b. A row's gradient is written once, in its own type. A weight's gradient is an fp32
    sum over chunks. It starts at 0, or uninitialized (torch.empty) if the first chunk writes it. An operation cannot return None,
    so a gradient that is not wanted has no entries."""
    makers = (torch.empty, h.dtype), (start, torch.float32), (start, torch.float32)
    return [
        make(t.shape if wants else 0, dtype=dtype, device=h.device)
        for t, (make, dtype), wants in zip((h, w, b), makers, wanted, strict=True)
    ]


def add_gradients(dy, h, w, wanted, dh, dw, db, first: bool = False) -> None:
    """The gradients of y = h·wᵀ + b for one chunk. They are written to dh and added to dw and db; with `first` they are written
    to all three. Gradients that are not wanted are not touched. dh is written last, because its memory may hold h."""
    if wanted[1]:
        (matmul_into if first else add_matmul)(dw, dy.t(), h)
    if wanted[2] and first:
        torch.sum(dy, dim=0, dtype=torch.float32, out=db)
    elif wanted[2]:
        db.add_(dy.sum(dim=0, dtype=torch.float32))
    if wanted[0]:
        dh.copy_(dy) if w is None else matmul_into(dh, dy, w)


def matmul(a, b):
    """a·b in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b.to(a.dtype), out_dtype=torch.float32)
    return a.float() @ b.float()


def matmul_into(out, a, b):
    """out = a·b, rounded once to out's type."""
    if a.dtype == b.dtype == out.dtype and (a.is_cuda or a.dtype == torch.float32):
        return torch.mm(a, b, out=out)
    if a.is_cuda and out.dtype == torch.float32:
        return torch.mm(a, b.to(a.dtype), out_dtype=torch.float32, out=out)
    return out.copy_(matmul(a, b))


def add_matmul(total, a, b) -> None:
    """total += a·b; total is fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b.to(a.dtype), out_dtype=torch.float32, out=total)
    else:  # the transposed product gives the same sum, 4 % faster in a CPU's library
        total.t().addmm_(b.float().t(), a.float().t())
