"""The losses that tools/bench/losses.py measures, each written plainly, by other libraries and by ours.

A case is a list of keyword arguments, one for each call (one per pair of blocks; the logit losses have one). An arm makes
`f(**arguments) -> loss`, so imports and compilation happen only for arms that run. An ImportError from an arm means that its
library, or the needed part of it, is not installed. All tokens have weight 1, because other libraries have no token weights;
so every arm computes the same loss. The naive arms still multiply by the weights where ours does, which costs them N
products.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from ted_scale.kernels import filtered_mse, linear_kl_ce

LIGER_CHUNK = {"cpu": 256, "cuda": 1024}  # 1024 is Liger's own default; on CPU 256 needs a third of the memory


class Case(NamedTuple):
    operation: str
    sizes: str
    calls: list[dict]
    states: list[torch.Tensor]  # of the student; these and `weights` get gradients
    weights: list[torch.Tensor]

    def loss(self, arm: Callable):
        return sum(arm(**call) for call in self.calls)


def logit_case(operation: str, size, dtype, device: str, *, kl_weight=1.0, ce_weight=1.0) -> Case:
    """Logits of standard deviation 2; without a kl_weight there is no teacher."""
    torch.manual_seed(0)
    n, v, d_s, d_t = size.tokens, size.vocab, size.d_s, size.d_t
    h_s, w_s = normal(n, d_s, dtype, device), normal(v, d_s, dtype, device, 2 / d_s**0.5)
    call = {"h_s": h_s.requires_grad_(), "w_s": w_s.requires_grad_(), "h_t": None, "w_t": None}
    if kl_weight:
        call |= {"h_t": normal(n, d_t, dtype, device), "w_t": normal(v, d_t, dtype, device, 2 / d_t**0.5)}
    call |= {"labels": torch.randint(0, v, (n,), device=device), "kl_weight": kl_weight, "ce_weight": ce_weight}
    sizes = f"tokens={n} d_s={d_s} {f'd_t={d_t} ' if kl_weight else ''}V={v}"
    return Case(operation, sizes, [call | means(n, device)], [h_s], [w_s])


def layers_case(operation: str, size, dtype, device: str) -> Case:
    """A filter with a bias on both sides; the teacher's is fixed."""
    torch.manual_seed(0)
    calls = [
        one_pair(size, dtype, device) | {"kind": operation.removeprefix("filtered_mse_")} for _ in range(size.pairs)
    ]
    sizes = f"pairs={size.pairs} tokens={size.tokens} d_s={size.d_s} d_t={size.d_t} D={size.width}"
    return Case(operation, sizes, calls, [c["h_s"] for c in calls], [c[name] for c in calls for name in ("w_s", "b_s")])


def one_pair(size, dtype, device: str) -> dict:
    pair = means(size.tokens, device)
    for side, width in (("t", size.d_t), ("s", size.d_s)):
        pair[f"h_{side}"] = normal(size.tokens, width, dtype, device)
        pair[f"w_{side}"] = normal(size.width, width, dtype, device, width**-0.5)
        pair[f"b_{side}"] = torch.zeros(size.width, dtype=dtype, device=device)
    for name in ("h_s", "w_s", "b_s"):
        pair[name].requires_grad_()
    return pair


def normal(rows: int, columns: int, dtype, device: str, scale: float = 1.0):
    return torch.randn(rows, columns, dtype=dtype, device=device).mul_(scale)


def means(tokens: int, device: str) -> dict:
    return {
        "token_weight": torch.ones(tokens, device=device),
        "denom": torch.tensor(float(tokens), device=device),
    }


def kl_ce_arms(device: str) -> dict[str, Callable]:
    arms = {
        "naive": lambda: naive_kl_ce,
        "naive-compiled": lambda: torch.compile(naive_kl_ce, dynamic=False),
        "liger-chunked": lambda: liger_chunked(LIGER_CHUNK[device], compiled=False),
        "liger-chunked-compiled": lambda: liger_chunked(LIGER_CHUNK[device], compiled=True),
        "ours-chunked": lambda: ours_kl_ce(),
        "ours-strict": lambda: ours_kl_ce(mode="strict"),
        "ours-compiled": lambda: ours_kl_ce(backend="compiled"),
    }
    on_cuda = {"liger-triton": liger_triton, "ours-torch": lambda: ours_kl_ce(backend="torch")}
    return arms | on_cuda if device == "cuda" else arms


def layer_arms(device: str) -> dict[str, Callable]:
    arms = {
        "naive": lambda: naive_mse,
        "naive-compiled": lambda: torch.compile(naive_mse, dynamic=False),
        "ours": lambda: filtered_mse,
    }
    # The same products of 16-bit operands with fp32 results, and the row formulas in torch: our torch backend on CUDA.
    vendor = {"vendor-gemm": lambda: lambda **call: filtered_mse(**call, backend="torch")}
    return arms | vendor if device == "cuda" else arms


def ce_arms(device: str) -> dict[str, Callable]:
    arms = {
        "naive": lambda: naive_ce,
        "torch-chunked": torch_chunked,
        "ours-chunked": lambda: ours_kl_ce(),
        "ours-strict": lambda: ours_kl_ce(mode="strict"),
    }
    if device != "cuda":
        return arms | {"cce-torch-compile": lambda: cut_cross_entropy(impl="torch_compile")}
    return arms | {
        "liger-triton": liger_ce,
        "cce": lambda: cut_cross_entropy(impl="cce"),  # leaves out gradients below 2^-12
        "cce-unfiltered": lambda: cut_cross_entropy(impl="cce", filter_eps=None),
        "cce-kahan-full-c": cce_kahan,
    }


ARMS = {
    "linear_kl_ce": kl_ce_arms,
    "filtered_mse_nmse": layer_arms,
    "filtered_mse_mse": layer_arms,
    "linear_ce": ce_arms,
}


def naive_kl_ce(*, h_s, w_s, h_t, w_t, **call):
    """As in most trainers: logits in the model's type, the losses on their fp32 copies."""
    return plain_kl_ce(functional.linear(h_s, w_s).float(), functional.linear(h_t, w_t).float(), **call)


def plain_kl_ce(z_s, z_t, *, labels, token_weight, denom, kl_weight, ce_weight):
    """A term with weight 0 is not computed; without a teacher only CE is."""
    rows = 0.0
    if kl_weight:
        kl = functional.kl_div(z_s.log_softmax(-1), z_t.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        rows = kl_weight * kl
    if ce_weight:
        rows = rows + ce_weight * functional.cross_entropy(z_s, labels, reduction="none")
    return (rows * token_weight).sum() / denom


def naive_mse(*, h_t, w_t, b_t, h_s, w_s, b_s, token_weight, denom, kind):
    t, s = functional.linear(h_t, w_t, b_t).float(), functional.linear(h_s, w_s, b_s).float()
    squares = (s - t).square()
    rows = squares.mean(-1) if kind == "mse" else squares.sum(-1) / (t.square().sum(-1) + 1e-6)
    return (rows * token_weight).sum() / denom


def naive_ce(*, h_s, w_s, labels, **_):
    return functional.cross_entropy(functional.linear(h_s, w_s).float(), labels)


def ours_kl_ce(**settings) -> Callable:
    return lambda **call: linear_kl_ce(**call, **settings)[0]


def liger_chunked(chunk: int, compiled: bool) -> Callable:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def loss(*, h_s, w_s, h_t, w_t, labels, kl_weight, ce_weight, **_):
        weights = {"weight_hard_loss": ce_weight, "weight_soft_loss": kl_weight}
        jsd = LigerFusedLinearJSDLoss(beta=0.0, compiled=compiled, chunk_size=chunk, **weights)  # beta 0: forward KL
        return jsd(h_s, w_s, h_t, w_t, labels)

    return loss


def liger_triton() -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    kl, ce = LigerFusedLinearJSD(jsd_beta=0.0), LigerFusedLinearCrossEntropyLoss()

    def loss(*, h_s, w_s, h_t, w_t, labels, kl_weight, ce_weight, **_):
        total = kl_weight * kl(h_s, w_s, h_t, w_t, labels)
        return total + ce_weight * ce(w_s, h_s, labels) if ce_weight else total

    return loss


def liger_ce() -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    ce = LigerFusedLinearCrossEntropyLoss()
    return lambda *, h_s, w_s, labels, **_: ce(w_s, h_s, labels)


def torch_chunked() -> Callable:
    """torch's own, chunked: without options it forms all logits."""
    if not hasattr(functional, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    ce, options = functional.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
    return lambda *, h_s, w_s, labels, **_: ce(h_s, w_s, labels, options=options)


def cut_cross_entropy(**settings) -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    return lambda *, h_s, w_s, labels, **_: linear_cross_entropy(h_s, w_s, labels, **settings)


def cce_kahan() -> Callable:
    """Compensated sums and every gradient of the weight; only in the repository, not in the release 25.1.1."""
    from cut_cross_entropy import cce_utils  # noqa: F401  it came with the presets

    return cut_cross_entropy(impl="cce_kahan_full_c")
