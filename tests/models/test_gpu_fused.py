"""On a CUDA device: Liger's kernels in bf16 are as close to fp32 as transformers' own modules, and faster."""

import copy
import time

import pytest
import torch
from test_fused import LIGER, tiny
from test_models import logits_of, tokens

from ted_scale.models.fused import use_liger

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("family", LIGER)
def test_logits_are_as_before_to_bf16_s_own_precision(tmp_path, family):
    anatomy, network = tiny(tmp_path, family)
    with torch.no_grad():
        exact = logits_of(network, anatomy, tokens(4))
        network = network.to("cuda", torch.bfloat16)
        plain = logits_of(network, anatomy, tokens(4).cuda())
        fused = logits_of(use_liger(copy.deepcopy(network)), anatomy, tokens(4).cuda())
    errors = [(logits.float().cpu() - exact).norm() / exact.norm() for logits in (fused, plain)]
    assert errors[0] < 1.2 * errors[1] < 0.1, errors


def test_blocks_take_less_time(tmp_path):
    sizes = {"num_hidden_layers": 4, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
    anatomy, network = tiny(tmp_path, "llama", **sizes, num_key_value_heads=8, max_position_embeddings=4096)
    network = network.to("cuda", torch.bfloat16)
    fused = use_liger(copy.deepcopy(network))
    row = torch.randint(1, 128, (2, 4096), device="cuda")
    times = {"plain": [], "fused": []}
    for _ in range(8):
        for name, model in (("plain", network), ("fused", fused)):
            torch.cuda.synchronize()
            start = time.perf_counter()
            logits_of(model, anatomy, row).float().logsumexp(-1).mean().backward()
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    assert min(times["fused"][2:]) < min(times["plain"][2:]), times
