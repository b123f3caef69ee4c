"""Logit losses computed from states and output weights: next-token cross-entropy and a divergence from a teacher.

`chunked` holds the logits of one chunk of tokens, and computes the gradients with the loss. `strict` (logit_loss_strict.py) holds
a small tile of logits, and computes the gradients in backward.
"""

import contextlib
import functools
from collections.abc import Sequence

import torch

from ted_scale.kernels import arguments
from ted_scale.kernels.autograd import attach, wants_gradient
from ted_scale.kernels.backend import choose
from ted_scale.kernels.formulas import logits
from ted_scale.kernels.formulas.divergences import DIVERGENCES, scratch
from ted_scale.kernels.formulas.logits import LogitLoss
from ted_scale.kernels.products import (
    add_gradients,
    chunks,
    empty_gradients,
    live_rows,
    operand,
    project,
    rows_per_chunk,
)
from ted_scale.kernels.tokens import valid_weights

MODES = ("chunked", "strict")
# Number of chunks for one product of the weight's gradient. Each product reads and writes the gradient's fp32 sum, 8 bytes an
# entry. On an H100 (680 TFLOP/s, 3 TB/s) this takes as long as the product of 900 rows. A row's gradient in bf16 has a quarter
# of the size of its logits.
SPAN = 4


def linear_kl_ce(
    h_s, w_s, h_t, w_t, labels, token_weight, *, denom, temperature=1.0, kl_weight=1.0, ce_weight=1.0,
    softcap_s=None, softcap_t=None, logit_scale_s=1.0, logit_scale_t=1.0, head_bias_s=None, head_bias_t=None,
    divergence="forward", top_k=0, skip_below=None, mode="chunked", backend="auto", chunk_tokens=None,
    gather=contextlib.nullcontext,
):  # fmt: skip
    """(total, kl, ce) with total = ce_weight·ce + kl_weight·kl, from states [N, d] and output weights [V, d].

    kl is T² times the divergence at temperature T, over the vocabulary that both sides have. The divergence is KL(teacher ‖
    student), or "reverse", or "jsd". With `top_k` it is over the teacher's k likeliest tokens and one bucket for all others. ce
    is over the student's whole vocabulary. Only `total` has a gradient: for h_s, w_s and head_bias_s. A term with weight 0 is not
    computed. Strict mode and Triton's kernels do not support all of this; `check_divergence` refuses the rest. With `skip_below`,
    a token whose teacher entropy at T is lower has no kl, and the entropies [N] are returned as a fourth value. Strict mode reads
    w_t and head_bias_t again in backward: `gather([w_t, head_bias_t])` is a context in which they are whole.
    """
    if not kl_weight:
        h_t = w_t = head_bias_t = None
        arguments.check_absent("skip_below", skip_below, "where kl_weight is 0")
    check(h_s, w_s, head_bias_s, h_t, w_t, head_bias_t, labels, token_weight, bool(kl_weight))
    arguments.check_choice("mode", mode, MODES)
    arguments.check_positive("temperature", temperature)
    arguments.check_positive("chunk_tokens", chunk_tokens)
    caps, scales = (softcap_s or 0.0, softcap_t or 0.0), (logit_scale_s, logit_scale_t)
    covers = 1.0 if w_t is not None and len(w_t) >= len(w_s) else 0.0  # bool() would bind a trace to one size of V
    loss = LogitLoss(temperature, kl_weight, ce_weight, *caps, *scales, covers).numbers
    student, teacher = (h_s, w_s, head_bias_s), (h_t, w_t, head_bias_t)
    check_divergence(divergence, top_k, skip_below, mode, backend)
    backend, weight = choose(backend, h_s.device, top_k), valid_weights(labels, token_weight)
    if mode == "strict":
        from ted_scale.kernels.logit_loss_strict import strict_kl_ce

        return strict_kl_ce(student, teacher, labels, weight, denom, loss, backend, chunk_tokens or 0, gather)
    wanted = wants_gradient(student)
    with torch.no_grad():
        code = (loss, wanted, backend, chunk_tokens or 0, divergence, top_k, -1.0 if skip_below is None else skip_below)
        values, *gradients, entropies = logit_chunks(*student, *teacher, labels, weight, *code)
    total, values = attach(values[0], values, denom, student, wanted, gradients)
    return total, values[1], values[2], *([] if skip_below is None else [entropies])


def check(h_s, w_s, b_s, h_t, w_t, b_t, labels, token_weight, teacher: bool) -> None:
    arguments.check_states("h_s", h_s, None, None)
    arguments.check_given("w_s", w_s)
    rows = len(h_s)
    arguments.check_weight("w_s", w_s, h_s.shape[1], "head_bias_s", b_s)
    arguments.check_type("w_s", w_s, "h_s", h_s)
    if teacher:
        for name, tensor in (("h_t", h_t), ("w_t", w_t)):
            arguments.check_given(name, tensor, " where kl_weight is not 0")
        arguments.check_states("h_t", h_t, None, rows)
        arguments.check_weight("w_t", w_t, h_t.shape[1], "head_bias_t", b_t)
        arguments.check_type("w_t", w_t, "h_t", h_t)
    arguments.check_vector("token_weight", token_weight, rows)
    arguments.check_labels(labels, rows, len(w_s), token_weight)
    tensors = {"h_s": h_s, "w_s": w_s, "head_bias_s": b_s, "h_t": h_t, "w_t": w_t, "head_bias_t": b_t}
    fixed = ("h_t", "w_t", "head_bias_t", "token_weight")
    arguments.check_common("h_s", {**tensors, "labels": labels, "token_weight": token_weight}, fixed)


def check_divergence(divergence: str, top_k: int, skip_below: float | None, mode: str, backend: str) -> None:
    arguments.check_choice("divergence", divergence, tuple(DIVERGENCES))
    if mode == "strict" and divergence != "forward":
        raise ValueError(f"divergence must be forward in strict mode, but is '{divergence}'")
    if mode == "strict":
        arguments.check_absent("skip_below", skip_below, "in strict mode")
    if top_k and (mode == "strict" or backend == "triton"):
        raise ValueError(f"top_k must be 0 in strict mode and with backend 'triton', but is {top_k}")


@torch.library.custom_op("ted_scale::logit_chunks", mutates_args=())
def logit_chunks(
    h_s: torch.Tensor, w_s: torch.Tensor, b_s: torch.Tensor | None, h_t: torch.Tensor | None,
    w_t: torch.Tensor | None, b_t: torch.Tensor | None, labels: torch.Tensor, weight: torch.Tensor,
    loss: Sequence[float], wanted: Sequence[bool], backend: str, chunk_tokens: int, divergence: str = "forward",
    top_k: int = 0, skip_below: float = -1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """((total, kl, ce) summed over rows, ∂total/∂h_s, ∂total/∂w_s, ∂total/∂b_s, the teacher's entropies). A gradient that is not
    wanted is empty. The entropies are empty if `skip_below` is negative."""
    f, wants, row_losses = LogitLoss(*loss, divergence, top_k), any(wanted), row_losses_of(backend)
    if w_t is not None:  # only the vocabulary that the student has, too
        w_t, b_t = w_t[: len(w_s)], None if b_t is None else b_t[: len(w_s)]
    # `span` chunks of logits share one product for the weight's gradient, which reads `slopes`.
    span = SPAN if wants and backend == "triton" and h_s.dtype != torch.float32 else 1
    floor, entropies = floor_and_entropies(weight, skip_below)
    chunk = rows_of_chunk(h_s, w_s, w_t, f, backend, span, chunk_tokens)
    dh, dw, db = gradients = empty_gradients(h_s, w_s, b_s, wanted)
    w_s, w_t = operand(w_s, backend), operand(w_t, backend)
    logits_s = weight.new_empty(chunk, len(w_s))  # the same memory for every chunk
    logits_t = None if w_t is None else weight.new_empty(chunk, len(w_t))
    slopes = h_s.new_empty(min(span * chunk, len(h_s)), len(w_s)) if span > 1 else None
    kl, ce = weight.new_zeros(2, len(weight)).unbind()
    if not (f.kl_weight or f.ce_weight):
        dh.zero_()
    for at in chunks(len(h_s), span * chunk) if f.kl_weight or f.ce_weight else ():
        live, h = weight[at], live_rows(h_s[at], weight[at])
        t = None if h_t is None else live_rows(h_t[at], live)
        for part in chunks(len(h), chunk):
            count = len(h[part])
            z_s = project(h[part], w_s, b_s, logits_s[:count])
            z_t = None if t is None else project(t[part], w_t, b_t, logits_t[:count])
            room = None if slopes is None else slopes[part]
            found = row_losses(z_s, z_t, labels[at][part], live[part], f, wants, room, floor)
            kl[at][part], ce[at][part], dz, entropy = found
            if floor is not None:
                entropies[at][part] = entropy
        if wants:
            add_gradients(dz if slopes is None else slopes[: len(h)], h, w_s, wanted, dh[at], dw, db)
    kl, ce = kl.sum(), ce.sum()
    return torch.stack([f.ce_weight * ce + f.kl_weight * kl, kl, ce]), *gradients, entropies


@logit_chunks.register_fake
def _(
    h_s, w_s, b_s, h_t, w_t, b_t, labels, weight, loss, wanted, backend, chunk_tokens, divergence="forward", top_k=0,
    skip_below=-1.0,
):  # fmt: skip
    entropies = weight.new_empty(len(weight) if skip_below >= 0 else 0)
    return weight.new_empty(3), *empty_gradients(h_s, w_s, b_s, wanted), entropies


def floor_and_entropies(weight, skip_below: float):
    """(the floor or None, memory for the entropies). The floor is a tensor, because torch would compile again for every new
    number."""
    if skip_below < 0:
        return None, weight.new_empty(0)
    return weight.new_full((), skip_below), torch.zeros_like(weight)


def rows_of_chunk(h_s, w_s, w_t, loss: LogitLoss, backend: str, span: int, chunk_tokens: int) -> int:
    """The rows of a chunk. A row needs its fp32 logits, more such rows for the teacher and the divergence, and `span` rows for
    the logits' gradient if it has memory of its own."""
    more = 0 if backend == "triton" else scratch(loss.divergence, loss.top_k)
    logits = 4 * (len(w_s) + (0 if w_t is None else (1 + more) * len(w_t)))
    apart = span * h_s.element_size() * len(w_s) if h_s.is_cuda and h_s.element_size() == 2 else 0
    return rows_per_chunk(len(h_s), logits + apart, h_s.device, chunk_tokens)


def row_losses_of(backend: str):
    """A function `f(z_s, z_t, labels, weight, loss, wants_gradient, room, floor) -> (kl, ce, dz, entropy)`. It may overwrite z_s
    and z_t. dz is in `room`, or in z_s if `room` is None. Without a floor there is no entropy."""
    if backend == "triton":
        from ted_scale.kernels.triton.rows import launch_rows

        return launch_rows
    whole_rows = compiled_rows() if backend == "compiled" else logits.whole_rows
    return lambda z_s, z_t, labels, weight, f, wants, room, floor=None: whole_rows(
        z_s, z_t, labels, weight, f, wants, floor
    )


@functools.cache
def compiled_rows():
    return torch.compile(logits.whole_rows, dynamic=False)
