"""Rounding in bf16 and memory of the chunked losses, compared with plain implementations."""

import itertools

import pytest
import torch
from test_losses import doubled, naive_kl_ce, ours, tensors

from ted_scale.kernels import filtered_ce, filtered_mse, linear_kl_ce
from ted_scale.kernels.tokens import IGNORED
from tools.bench.memory import peak_bytes


def plain_bf16(h_s, w_s, h_t, w_t, labels, token_weight, denom, head_bias_s, head_bias_t):
    """The plain implementation: bf16 logits, F.cross_entropy and F.kl_div on their fp32 copies."""
    functional, rows = torch.nn.functional, (labels != IGNORED) & (token_weight > 0)
    z_s, z_t = (functional.linear(h, w, b).float() for h, w, b in ((h_s, w_s, head_bias_s), (h_t, w_t, head_bias_t)))
    kl = functional.kl_div(z_s.log_softmax(-1), z_t.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    ce = functional.cross_entropy(z_s, labels, ignore_index=IGNORED, reduction="none")
    return ((kl + ce) * token_weight)[rows].sum() / denom, (kl * token_weight)[rows].sum() / denom


def test_bf16_is_no_less_exact_than_a_plain_bf16_implementation():
    worst = torch.zeros(2, 5)
    for seed in range(8):
        values = tensors(seed, n=64, d_s=64, d_t=96, v_s=300, v_t=300, dtype=torch.bfloat16)
        values |= {"w_s": values["w_s"] * 0.1, "w_t": values["w_t"] * 0.1}
        true, true_grads = ours(doubled(values), naive_kl_ce)
        for side, (loss, settings) in enumerate([(linear_kl_ce, {"chunk_tokens": 16}), (plain_bf16, {})]):
            mine, grads = ours(values, loss, **settings)
            pairs = zip([*mine[:2], *grads], [*true[:2], *true_grads], strict=True)
            errors = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
            worst[side] = torch.maximum(worst[side], torch.tensor(errors))
    assert (worst[0] <= worst[1] * 1.05).all(), worst


def test_the_gradient_of_a_bf16_weight_loses_nothing_over_many_chunks():
    values = tensors(n=1024, d_s=16, d_t=16, dtype=torch.bfloat16)
    _, true = ours(doubled(values), naive_kl_ce)
    for chunk_tokens in (1, 1024):
        _, grads = ours(values, chunk_tokens=chunk_tokens)
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(grads[1:], true[1:], strict=True)]
        assert max(errors) < 0.004, (chunk_tokens, errors)  # half a unit in bf16's last place


def measure(loss: str, tokens: int, wide: int, *, grad=True, narrow=32, chunk=32) -> int:
    """Peak bytes of one forward and backward; `wide` is the vocabulary, or the filters' width."""
    torch.manual_seed(0)
    h, h_t = torch.randn(tokens, narrow, requires_grad=True), torch.randn(tokens, narrow)
    w, w_t = torch.randn(wide, narrow, requires_grad=True), torch.randn(wide, narrow)
    labels, ones, denom = torch.randint(0, wide, (tokens,)), torch.ones(tokens), torch.tensor(float(tokens))
    square = torch.randn(narrow, narrow, requires_grad=True)
    settings = {"denom": denom, "chunk_tokens": chunk}
    calls = {
        "kl_ce": lambda: linear_kl_ce(h, w, h_t, w_t, labels, ones, **settings)[0],
        "mse": lambda: filtered_mse(h_t, w_t, None, h, w, None, ones, **settings),
        "filter ce": lambda: filtered_ce(h, square, None, lambda x: x, w, None, labels, ones, **settings),
        "naive": lambda: plain_bf16(h, w, h_t, w_t, labels, ones, denom, None, None)[0],
        "naive mse": lambda: (h @ w.T - h_t @ w_t.T).square().sum(-1).mean(),
    }
    with torch.set_grad_enabled(grad):
        return peak_bytes(lambda: calls[loss]().backward() if grad else calls[loss]())


@pytest.mark.parametrize(("loss", "contrast"), [("kl_ce", "naive"), ("filter ce", "naive"), ("mse", "naive mse")])
def test_memory_beyond_one_chunk_does_not_grow_with_tokens_times_vocabulary(loss, contrast):
    chunk, narrow = 32, 32
    for tokens, wide in itertools.product((512, 1024), (2048, 4096)):
        one_chunk, gradients = chunk * wide * 4, (tokens + wide) * narrow * 4
        assert measure(loss, tokens, wide) <= 5 * one_chunk + 3 * gradients, (tokens, wide)
        assert measure(contrast, tokens, wide) >= 2 * tokens * wide * 4  # the meter sees whole logits
    for wide in (2048, 4096):
        more_tokens = measure(loss, 1024, wide) - measure(loss, 512, wide)
        assert abs(more_tokens) <= 512 * narrow * 4 * 3 < 512 * wide * 4 / 8


@pytest.mark.parametrize("loss", ["kl_ce", "mse", "filter ce"])
def test_evaluation_makes_no_gradient_buffers(loss):
    tokens, wide, narrow, chunk = 256, 2048, 256, 8
    without = measure(loss, tokens, wide, narrow=narrow, chunk=chunk, grad=False)
    assert without < wide * narrow * 4 / 2 < measure(loss, tokens, wide, narrow=narrow, chunk=chunk)
