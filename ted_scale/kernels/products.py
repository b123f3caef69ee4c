"""Matrix products of 16- or 32-bit operands with fp32 results, by the vendor's library.

CUDA and ROCm accumulate and write fp32 from 16-bit operands at full speed. CPU has no such product, so there the
operands become fp32: exact, and slower.
"""

import torch


def operand(weight, backend: str):
    """A weight as its many products want it: on CPU one fp32 copy a call instead of one a chunk."""
    return weight if weight is None or weight.is_cuda or backend == "triton" else weight.float()


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
    else:
        total.t().addmm_(
            b.float().t(), a.float().t()
        )  # the same sum; a CPU's library does it 4 % faster this way round


def project(states, weight, bias, out=None):
    """states·weightᵀ + bias in fp32, in `out` or a new tensor; a weight of None is the identity."""
    if out is None:
        width = states.shape[1] if weight is None else len(weight)
        out = torch.empty(len(states), width, dtype=torch.float32, device=states.device)
    if weight is not None and bias is not None and not states.is_cuda:
        return torch.addmm(bias.float(), states.float(), weight.float().t(), out=out)
    y = out.copy_(states) if weight is None else matmul_into(out, states, weight.t())
    return y if bias is None else y.add_(bias)


def live_rows(states, weight):
    """Zeros where a token does not count, so that not even a NaN in it reaches a product."""
    return states if all_count(weight) else torch.where((weight > 0)[:, None], states, 0)


def all_count(weight) -> bool:
    """Whether every token is known to count: a look, which spares a CPU copies; a device would wait for it, a trace cannot."""
    return weight.is_cpu and not torch.compiler.is_compiling() and bool((weight > 0).all())
