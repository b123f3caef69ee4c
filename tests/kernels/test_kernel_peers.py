"""The losses compared with other implementations: the same values, less memory, and on a CPU no more time."""

import os
from argparse import Namespace

import pytest
import torch
from test_losses import ours, tensors

from ted_scale.kernels import filtered_mse, linear_kl_ce
from ted_scale.kernels.tokens import IGNORED
from tools.bench import losses
from tools.bench.loss_arms import ARMS, layers_case, logit_case
from tools.bench.memory import peak_bytes


def oracle_values():
    """All token weights are 1: Liger and cut-cross-entropy have none."""
    values = tensors(n=64, d_s=16, d_t=24, v_s=301, v_t=301)
    return {**values, "token_weight": torch.ones(64), "denom": (values["labels"] != IGNORED).sum().float()}


@pytest.mark.parametrize(
    ("beta", "settings"),
    [(0.0, {}), (0.0, {"mode": "strict"}), (1.0, {"divergence": "reverse"}), (0.5, {"divergence": "jsd"})],
    ids=["KL", "KL, strict", "reverse KL", "JSD"],
)
def test_liger_s_distillation_loss_agrees(beta, settings):
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    values = oracle_values()
    mine, grads = ours(values, trained=("h_s", "w_s"), **settings, ce_weight=0.3, kl_weight=0.7, chunk_tokens=16)
    h, w = (values[k].clone().requires_grad_() for k in ("h_s", "w_s"))
    # Liger drops ignored tokens from neither term's numerator but CE's: it is shown the counted tokens alone.
    kept = values["labels"] != IGNORED
    settings = {"weight_hard_loss": 0.3, "weight_soft_loss": 0.7, "beta": beta, "compiled": False, "chunk_size": 16}
    h_t, labels = (values[k][kept] for k in ("h_t", "labels"))
    biases = values["head_bias_s"], values["head_bias_t"]
    loss = liger.LigerFusedLinearJSDLoss(**settings)(h[kept], w, h_t, values["w_t"], labels, *biases)
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.backward()
    for a, b in zip([mine[0], *grads], [loss, h.grad, w.grad], strict=True):
        assert ((a - b).abs().max() / b.abs().max()).item() < 1e-5


@pytest.mark.parametrize("mode", ["chunked", "strict"])
def test_cut_cross_entropy_agrees(mode):
    cce = pytest.importorskip("cut_cross_entropy")
    values = {**oracle_values(), **dict.fromkeys(("h_t", "w_t", "head_bias_t", "head_bias_s"))}
    mine, grads = ours(values, kl_weight=0.0, softcap_s=20.0, mode=mode, chunk_tokens=16)
    h, w = (values[k].clone().requires_grad_() for k in ("h_s", "w_s"))
    loss = cce.linear_cross_entropy(h, w, values["labels"], softcap=20.0, impl="torch_compile")
    loss.backward()
    for a, other in zip([mine[0], *grads], [loss, h.grad, w.grad], strict=True):
        assert ((a - other).abs().max() / other.abs().max()).item() < 1e-5


def test_memory_at_a_real_size():
    """2048 tokens, d 128, V 32000 in fp32: 185 MiB at most, where two whole logits alone are 500."""
    n, d, vocab = 2048, 128, 32000
    h, h_t = torch.randn(n, d, requires_grad=True), torch.randn(n, d)
    w, w_t = torch.randn(vocab, d, requires_grad=True), torch.randn(vocab, d)
    labels, ones, denom = torch.randint(0, vocab, (n,)), torch.ones(n), torch.tensor(float(n))
    peak = peak_bytes(lambda: linear_kl_ce(h, w, h_t, w_t, labels, ones, denom=denom)[0].backward())
    assert peak <= 185 * 2**20, peak / 2**20
    d = 512
    wide = [torch.randn(n, d) for _ in range(2)], [torch.randn(d, d, requires_grad=True) for _ in range(8)]
    states = [torch.randn(n, d, requires_grad=True) for _ in range(8)]
    fixed = torch.randn(d, d)

    def naive():
        pairs = zip(states, wide[1], strict=True)
        sum((h @ w.T - wide[0][0] @ fixed.T).square().sum(-1).mean() for h, w in pairs).backward()

    def fused():
        pairs = zip(states, wide[1], strict=True)
        sum(
            filtered_mse(wide[0][0], fixed, None, h, w, None, ones, denom=denom, kind="mse") for h, w in pairs
        ).backward()

    returned = sum(t.numel() * 4 for t in (*states, *wide[1]))
    beyond = []
    for step in (naive, fused):
        for tensor in (*states, *wide[1]):
            tensor.grad = None
        beyond.append(peak_bytes(step) - returned)
    assert beyond[1] <= beyond[0] / 6, beyond


# Targets are 0.75 and 1, and tools/bench/losses.py has the figures: most of what plain torch loses is fresh memory, whose price
# moves with the hour and the version of torch (0.59 to 0.77 were measured of the same code). A test has room for that.
LIMITS = {"linear_kl_ce": 0.85, "filtered_mse_nmse": 1.1, "filtered_mse_mse": 1.1}


@pytest.mark.alone
@pytest.mark.parametrize("operation", LIMITS)
def test_time_compared_with_plain_torch_on_a_cpu(operation):
    """In a separate process, like the benchmark: where large tensors were freed before, plain torch need not allocate.
    More turns where the machine was busy with something else."""
    for _ in range(3):
        naive, own = losses.alone(timed, operation)
        if min(own) <= LIMITS[operation] * min(naive):
            return
    pytest.fail(f"{operation} must take {LIMITS[operation]} of plain torch's time at most, but took {own} and {naive}")


def timed(operation: str) -> list[list[float]]:
    """Seconds of plain torch and of ours, on all cores, in turns."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    size = Namespace(**losses.SIZES["cpu"])
    case = (layers_case if operation.startswith("filtered") else logit_case)(operation, size, torch.float32, "cpu")
    arms = {name: make for name, make in ARMS[operation]("cpu").items() if name in ("naive", "ours", "ours-chunked")}
    _, rows = losses.measure(case, arms, "cpu", 2 if operation == "linear_kl_ce" else 9)
    assert not any(row.failed for row in rows)
    return [row.seconds for row in rows]
