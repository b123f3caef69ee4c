"""On a CUDA device: a teacher of 8 bits is near the one in bf16, smaller, in fp8 and compiled faster, and never whole in bf16."""

import time

import pytest
import torch
from plain import make_batch
from tiny import make_model

from ted_scale.config.method import Loss
from ted_scale.distill.teacher import Teacher, TeacherBody
from ted_scale.health.teacher_start import cost_of
from ted_scale.models import fused, quantized
from ted_scale.models.inspection import inspect
from ted_scale.models.quantized import build_quantized, unrounded
from ted_scale.models.weights import build_network

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
pytest.importorskip("torchao")
LARGE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 8,
    "max_position_embeddings": 4096, "initializer_range": 0.02,
}  # fmt: skip
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def anatomy(tmp_path_factory):
    return inspect(
        "teacher.path", str(make_model(tmp_path_factory.mktemp("large"), "llama", dtype=torch.bfloat16, **LARGE))
    )


def supported(bits: str) -> str:
    if bits == "fp8" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 needs sm_90")
    return bits


def built(anatomy, bits: str):
    return build_quantized(anatomy, bits, init="weights", seed=0, device=CUDA).eval().requires_grad_(False)


def teacher_of(anatomy, network) -> Teacher:
    body = TeacherBody(network, anatomy, [3, 7])
    return Teacher(body, body)


@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_8_bits_are_near_bf16_and_leave_half_of_its_memory(anatomy, bits):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    network = built(anatomy, supported(bits))
    size = quantized.counts(anatomy, bits).bytes
    assert torch.cuda.memory_allocated() - before < 1.05 * size
    # While a block is rounded, torchao has copies of one of its matrices in fp32.
    assert torch.cuda.max_memory_allocated() - before < size + 6 * 2 * anatomy.block_parameters
    teacher, batch = teacher_of(anatomy, network), make_batch(2, 512).moved(lambda t: t.cuda())
    exact = TeacherBody(unrounded(network, anatomy, CUDA), anatomy, [3, 7])
    cost = cost_of(teacher, exact, batch, Loss())
    assert 0 < cost.kl < 0.1 and all(0 < error < 0.2 for error in cost.errors.values()), cost


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_compiled_blocks_of_8_bits_say_what_plain_ones_do(anatomy, bits, documents):
    network = built(anatomy, supported(bits))
    batches = [make_batch(2, 512, seed, documents=documents).moved(lambda t: t.cuda()) for seed in (0, 1)]
    with torch.no_grad():
        wanted = [teacher_of(anatomy, network).run(batch, True, True) for batch in batches]
        fused.fuse(network, network.get_submodule(anatomy.blocks), "compile", attention_apart=documents)
        found = [teacher_of(anatomy, network).run(batch, True, True) for batch in batches]
    for ours, theirs in zip(found, wanted, strict=True):
        error = (ours.last_NE - theirs.last_NE).float().norm() / theirs.last_NE.float().norm()
        assert error < 0.05, error


def test_compiled_fp8_takes_at_most_0_8_of_compiled_bf16(anatomy):
    supported("fp8")
    plain = build_network(anatomy, ds_config=None, dtype=torch.bfloat16, device=CUDA).eval().requires_grad_(False)
    batch, times = make_batch(1, 4096).moved(lambda t: t.cuda()), {"bf16": [], "fp8": []}
    teachers = {}
    for name, network in (("bf16", plain), ("fp8", built(anatomy, "fp8"))):
        fused.fuse(network, network.get_submodule(anatomy.blocks), "compile")
        teachers[name] = teacher_of(anatomy, network)
    with torch.no_grad():
        for _ in range(12):
            for name, teacher in teachers.items():
                torch.cuda.synchronize()
                began = time.perf_counter()
                teacher.run(batch, False, True)
                torch.cuda.synchronize()
                times[name].append(time.perf_counter() - began)
    assert min(times["fp8"][2:]) < 0.8 * min(times["bf16"][2:]), times
