"""Every loss term, in plain torch and chunked over tokens: the definition, the CPU path, the fused kernels' oracle.

All terms obey one rule, which lives here alone: a term is the sum over tokens of token weight times the token's
value, divided by `denom`, the number of valid tokens of the whole optimizer step (over ranks and accumulation). A
token is valid when its weight is > 0 and its label is not ignored. A denom of 0 gives 0. Sums are fp32.

Gradients are formed chunk by chunk in the forward pass and scaled in the backward pass, so neither logits nor filtered
states are ever whole in memory, and a caller's weights are read only while the calling module holds them gathered.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from ted_scale.data import IGNORED
from ted_scale.models import Head, soften

EPSILON = 1e-6  # nmse: a teacher state of norm 0 divides by this


def valid_weights(labels_N, weights_N):
    """Token weights in fp32, 0 where a token does not count."""
    return torch.where((labels_N != IGNORED) & (weights_N > 0), weights_N, 0.0).float()


def count_valid(batches) -> torch.Tensor:
    """The step's denominator: valid tokens of all micro-batches on all ranks. Stays on the device."""
    count = sum((valid_weights(b.labels_BT, b.weights_BT) > 0).sum() for b in batches).to(torch.float32)
    if dist.is_initialized():
        dist.all_reduce(count)
    return count


def for_engine(total):
    """DeepSpeed averages gradients over ranks, but `total` is already this rank's share of the global mean."""
    return total * (dist.get_world_size() if dist.is_initialized() else 1)


def linear_kl_ce(
    h_s, w_s, h_t, w_t, labels, token_weight, *, denom, temperature=1.0, kl_weight=1.0, ce_weight=1.0,
    softcap_s=None, softcap_t=None, logit_scale_s=1.0, logit_scale_t=1.0, head_bias_s=None, head_bias_t=None,
    chunk_tokens=1024,
):  # fmt: skip
    """(total, kl, ce), total = ce_weight·ce + kl_weight·kl, from states [N, d] and output weights [V, d].

    kl is KL(teacher ‖ student) at `temperature`, times its square, over the vocabulary both sides have; ce is over the
    student's whole vocabulary. A weight of 0 skips its term's work. Only `total` carries a gradient.
    """
    teacher = kl_weight != 0
    shared = min(len(w_s), len(w_t)) if teacher else 0
    fixed = (w_t[:shared], None if head_bias_t is None else head_bias_t[:shared]) if teacher else ()

    def formula(rows, mask, weights):
        h_s, labels, *h_t = rows
        z_s = soften(linear_fp32(h_s, *weights), softcap_s, logit_scale_s)
        ce = (
            torch.nn.functional.cross_entropy(z_s, labels, ignore_index=IGNORED, reduction="none") if ce_weight else 0.0
        )
        kl = 0.0
        if teacher:
            with torch.no_grad():
                z_t = soften(linear_fp32(h_t[0], *fixed), softcap_t, logit_scale_t)
            z_s, z_t = (z if temperature == 1.0 else z / temperature for z in (z_s[:, :shared], z_t))
            kl = temperature**2 * kl_per_token(z_s, z_t)
        return [masked_sum(ce_weight * ce + kl_weight * kl, mask), masked_sum(kl, mask), masked_sum(ce, mask)]

    rows = [h_s, labels, *([h_t] if teacher else [])]
    return chunked(formula, rows, valid_weights(labels, token_weight), [w_s, head_bias_s], denom, chunk_tokens)


def kl_per_token(z_s, z_t):
    """KL(teacher ‖ student) of each row of logits; exactly 0, with gradient exactly 0, where both rows are equal."""
    return Divergence.apply(z_s, z_t)


class Divergence(torch.autograd.Function):
    """Σ p·(log p − log q) of each row. The gradient is written out, q − p: autograd's own leaves a rounding error of
    the sum of p where p and q are equal."""

    @staticmethod
    def forward(ctx, z_s, z_t):
        log_p, log_q = torch.log_softmax(z_t, dim=-1), torch.log_softmax(z_s, dim=-1)
        p = log_p.exp()
        value = log_p.sub_(log_q).mul_(p).sum(dim=-1)  # in place: each of these is as large as the logits
        ctx.save_for_backward(log_q.exp_().sub_(p) if ctx.needs_input_grad[0] else None)
        return value

    @staticmethod
    def backward(ctx, g):
        return g[:, None] * ctx.saved_tensors[0], None


def filtered_mse(h_t, w_t, b_t, h_s, w_s, b_s, token_weight, *, denom, kind="nmse", chunk_tokens=1024):
    """The layer loss of one pair; s = h_s·w_sᵀ + b_s and t likewise, a weight of None is the identity.

    mse = ‖s−t‖² / D,  nmse = ‖s−t‖² / (‖t‖² + ε),  cosine = 1 − cos(s, t), per token.
    """

    def formula(rows, mask, weights):
        h_s, h_t = rows
        s = linear_fp32(h_s, *weights)
        with torch.no_grad():
            t = linear_fp32(h_t, w_t, b_t)
        return [masked_sum(distance(s, t, kind), mask)]

    return chunked(formula, [h_s, h_t], token_weight, [w_s, b_s], denom, chunk_tokens)[0]


def distance(s, t, kind: str):
    if kind == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(s, t, dim=-1, eps=EPSILON)
    square = (s - t).square().sum(dim=-1)
    return square / t.shape[-1] if kind == "mse" else square / (t.square().sum(dim=-1) + EPSILON)


def filtered_ce(h, filter_w, filter_b, head: Head, labels, token_weight, *, denom, chunk_tokens=1024):
    """Stage I: next-token cross-entropy of `head` read on the filtered state. Trains the filter, and the head's
    projection where it requires gradients (`per_layer`)."""

    def formula(rows, mask, weights):
        h, labels = rows
        filter_w, filter_b, head_w, head_b = weights
        filtered = linear_fp32(h, filter_w, filter_b).to(h.dtype)
        z = soften(linear_fp32(head.norm(filtered), head_w, head_b), head.softcap, head.logit_scale)
        ce = torch.nn.functional.cross_entropy(z, labels, ignore_index=IGNORED, reduction="none")
        return [masked_sum(ce, mask)]

    weights = [filter_w, filter_b, head.weight, head.bias]
    return chunked(formula, [h, labels], valid_weights(labels, token_weight), weights, denom, chunk_tokens)[0]


def masked_sum(values, mask):
    """Σ mask·value; a masked token's value is dropped, not multiplied, so it may even be NaN."""
    return torch.where(mask > 0, values * mask, 0.0).sum() if torch.is_tensor(values) else mask.new_zeros(())


class MatmulFp32(torch.autograd.Function):
    """x·wᵀ with an fp32 result from 16-bit operands; the gradient is rounded to their type only to be multiplied."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return multiply(x, w.t())

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        g = g.to(x.dtype)
        dx = multiply(g, w).to(x.dtype) if ctx.needs_input_grad[0] else None
        return dx, multiply(g.t(), x) if ctx.needs_input_grad[1] else None


def multiply(a, b):
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def linear_fp32(x, w, b):
    """x·wᵀ + b in fp32; w of None is the identity."""
    y = x.float() if w is None else MatmulFp32.apply(x, w)
    return y if b is None else y + b.float()


def chunked(formula: Callable, rows: list, mask, weights: list, denom, chunk_tokens: int) -> tuple[torch.Tensor, ...]:
    """Σ over token chunks of `formula(rows, mask, weights)`, a list of sums, divided by denom; the first has a
    gradient.

    `rows` are tensors [N, …] cut along N, `weights` whole tensors or None. Rows with mask 0 are read as zeros, so that
    not even a NaN in them reaches a loss or a gradient.
    """
    return Chunked.apply(formula, chunk_tokens, torch.is_grad_enabled(), len(rows), mask, denom, *rows, *weights)


class Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, formula, chunk_tokens, grad_enabled, n_rows, mask, denom, *tensors):
        wanted = [t is not None and t.requires_grad and grad_enabled for t in tensors]
        # A row's gradient is written once, in its own type; a weight's is a sum over chunks, kept in fp32.
        dtypes = [None if t is None else t.dtype if i < n_rows else torch.float32 for i, t in enumerate(tensors)]
        grads = [torch.zeros_like(t, dtype=d) if w else None for t, d, w in zip(tensors, dtypes, wanted, strict=True)]
        total = 0.0
        for start in range(0, len(mask), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            parts = [drop_masked(row[chunk], mask[chunk]) for row in tensors[:n_rows]] + list(tensors[n_rows:])
            into = [g[chunk] if g is not None and i < n_rows else g for i, g in enumerate(grads)]
            total = total + run_chunk(formula, parts, n_rows, mask[chunk], into)
        ctx.scale = torch.where(denom > 0, 1.0 / denom, 0.0)  # no valid token: 0, not 0/0
        ctx.grads, ctx.dtypes = grads, [None if t is None else t.dtype for t in tensors]
        values = tuple((total * ctx.scale).unbind())
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    def backward(ctx, g_total, *_):
        scale = g_total * ctx.scale
        scaled = [None if g is None else (g * scale).to(d) for g, d in zip(ctx.grads, ctx.dtypes, strict=True)]
        return None, None, None, None, None, None, *scaled


def drop_masked(row, mask):
    """Zeros where mask is 0; integer rows (labels) cannot hold a NaN and stay."""
    return torch.where((mask > 0)[:, None], row, 0) if row.is_floating_point() else row


def run_chunk(formula, parts, n_rows, mask, into) -> torch.Tensor:
    """The chunk's sums, and its gradients added to `into` where that holds a tensor."""
    leaves = [p if g is None else p.detach().requires_grad_() for p, g in zip(parts, into, strict=True)]
    wanted = [(leaf, g) for leaf, g in zip(leaves, into, strict=True) if g is not None]
    with torch.set_grad_enabled(bool(wanted)):
        sums = formula(leaves[:n_rows], mask, leaves[n_rows:])
    if wanted and sums[0].requires_grad:  # it does not where every weight is 0: no work, and gradients of 0
        grads = torch.autograd.grad(sums[0], [leaf for leaf, _ in wanted], allow_unused=True)
        for (_, target), grad in zip(wanted, grads, strict=True):
            if grad is not None:
                target.add_(grad)
    return torch.stack([s.detach() for s in sums])
