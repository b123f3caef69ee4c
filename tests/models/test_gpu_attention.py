"""On a CUDA device: flash attention and compiled flex attention against a dense mask, alone and inside families; memory, host
reads."""

import pytest
import torch
from dense_attention import dense, packing_of, visible
from plain import load_model
from tiny import FAMILIES, MORE, make_model

from ted_scale.data.packing import whole_rows
from ted_scale.models import attention_paths
from ted_scale.models.anatomy import run_body
from ted_scale.models.attention import PATHS, Layer, choose_path

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = torch.device("cuda")
ROWS = [[100, 30, 1, 869, 24], [5, 1018, 1]]
T = 1024
WIDER = {"hidden_size": 64, "head_dim": 16}  # tiny heads of 8 are below what flex attention takes


def on_device(lengths, length=T):
    return packing_of(lengths, length).moved(lambda t: t.to(DEVICE))


def operands(dtype, heads=8, shared=2, width=64, length=T, rows=2):
    torch.manual_seed(0)
    sizes = [(rows, count, length, width) for count in (heads, shared, shared)]
    return [torch.randn(s, device=DEVICE).to(dtype).requires_grad_() for s in sizes]


def value_and_gradients(attend, tensors):
    out = attend(*tensors)
    pull = torch.arange(out.numel(), device=out.device).reshape(out.shape).remainder(7) - 3
    return [out.detach(), *torch.autograd.grad(out, tensors, pull.to(out.dtype))]


def error(ours, exact) -> float:
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True))


ASKED = [
    (way, softcap, dtype)
    for way in PATHS
    for softcap in (None, 20.0)
    for dtype in (torch.bfloat16, torch.float32)
    if way != "varlen" or (softcap is None and dtype == torch.bfloat16)
]


@pytest.mark.parametrize("window", [None, 50, 300])
@pytest.mark.parametrize(("way", "softcap", "dtype"), ASKED, ids=str)
def test_every_path_is_as_exact_as_a_dense_mask_of_its_type(way, softcap, dtype, window):
    tensors = operands(dtype)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    for rows in (ROWS, [[T], [T]]):
        mask = visible(rows, window).to(DEVICE)
        exact = value_and_gradients(lambda *t, m=mask: dense(*t, m, softcap, 0.125), wide)
        plain = value_and_gradients(lambda *t, m=mask: dense(*t, m, softcap, 0.125), tensors)
        packing = on_device(rows)
        ours = value_and_gradients(lambda *t, p=packing: PATHS[way](*t, p, window, 0.125, softcap), tensors)
        assert error(ours, exact) < 2 * error(plain, exact) + 1e-6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES | MORE:
        make_model(root / family, family, **WIDER)
    return root


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES | MORE)
def test_families_give_packed_documents_what_each_gives_alone(models, family, dtype):
    """bf16 packed and bf16 alone round the same values differently: each is compared with fp32 alone."""
    anatomy, network = load_model(models / family)
    lengths, length = [[50, 13, 1, 64], [128]], 128
    tokens = torch.randint(1, 128, (2, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    texts = [d for row, cuts in zip(tokens, lengths, strict=True) for d in row[None].split(cuts, dim=1)]

    def states(texts, packing=None):
        network.zero_grad()
        out = torch.cat([run_body(network, anatomy, text, packing).flatten(0, 1) for text in texts])
        out.float().square().sum().backward()
        gradients = torch.cat([p.grad.double().flatten() for p in network.parameters() if p.grad is not None])
        return [out.detach(), gradients]

    network.to(DEVICE)
    exact = [t.double() for t in states(texts)]
    network.to(dtype)
    alone, together = states(texts), states([tokens], on_device(lengths, length))
    assert error(together, exact) < 2 * error(alone, exact) + 1e-5
    together = states([tokens], on_device([[51, 12, 1, 64], [128]], length))
    assert error(together, exact) > 0.02 + 2 * error(alone, exact)


LAYERS = [Layer(64, 64, None, None), Layer(64, 64, 4096, None), Layer(64, 64, None, 50.0)]


@pytest.mark.parametrize("layer", LAYERS, ids=["plain", "window", "cap"])
def test_32768_tokens_hold_no_mask_and_wait_for_nothing(layer):
    length = 32768
    tensors = operands(torch.bfloat16, length=length, rows=1)
    way = choose_path(layer, length, True, torch.bfloat16, DEVICE)
    packings = [on_device([[10000, 768, 22000]], length), whole_rows(1, length, DEVICE)]

    def attend(packing):
        settings = (packing, layer.window, 0.125, layer.softcap)
        value_and_gradients(lambda *t: PATHS[way](*t, *settings), tensors)

    assert way == ("flex" if layer.softcap else "varlen")
    attend(packings[0])
    attention_paths.block_mask.cache_clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for packing in packings:
            attend(packing)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < length**2 / 2  # bytes: half of what a bool mask takes
