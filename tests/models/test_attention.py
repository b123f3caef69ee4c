"""Every attention path against a dense mask, values and gradients; the paths of a GPU as far as a CPU can run them; the rule
that chooses a path; and no path holds a [T, T] tensor."""

import functools

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from corpus import data_section
from dense_attention import dense, packing_of, varlen_stand_in, visible
from plain import load_model
from test_models import LENGTHS, NUDGED, differences, no_host_reads
from tiny import MORE, make_model

from ted_scale.models import attention, attention_paths
from ted_scale.models.anatomy import run_body
from ted_scale.models.attention import PATHS, Layer, choose_path, describe
from tools.bench.memory import peak_bytes

T = 600  # blocks of 128 and tiles of 256 are cut off
ROWS = [[100, 30, 1, 269, 200], [5, 594, 1]]
ROWS_NUDGED = [[100, 31, 1, 268, 200], [5, 594, 1]]
ONE = [[T], [T]]
WINDOWS, CAPS = [None, 50, 300], [None, 2.0]


def operands(heads=4, shared=2, width=16, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(2, count, T, width, dtype=dtype).requires_grad_() for count in (heads, shared, shared)]


def value_and_gradients(attend, tensors):
    out = attend(*tensors)
    pull = torch.arange(out.numel()).reshape(out.shape).remainder(7) - 3.0
    return [out.detach(), *torch.autograd.grad(out, tensors, pull.to(out.dtype))]


def apart(ours, wanted) -> float:
    """The largest difference, relative to the size of the values."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, wanted, strict=True))


@pytest.fixture
def on_a_cpu(monkeypatch):
    """A stand-in for flash attention with the same contract; flex attention uncompiled, because torch refuses its gradient on
    a CPU."""
    monkeypatch.setattr(attention_paths, "varlen_attn", varlen_stand_in)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(attention_paths, "compiled_flex", lambda: torch_flex.flex_attention)


ASKED = [
    (w, cap) for w in PATHS for cap in CAPS if not (w == "varlen" and cap)
]  # choose_path() sends no soft-cap there


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("way", "softcap"), ASKED)
def test_every_path_gives_what_a_dense_mask_gives(on_a_cpu, way, window, softcap):
    """fp32 sums in another order. A border that is wrong by one token gives a thousand times the difference."""
    tensors = operands()
    for rows, wrong in ((ROWS, ROWS_NUDGED), (ONE, ROWS)):
        packing = packing_of(rows, T)
        ours = value_and_gradients(lambda *t, p=packing: PATHS[way](*t, p, window, 0.2, softcap), tensors)
        wanted = value_and_gradients(lambda *t, r=rows: dense(*t, visible(r, window), softcap, 0.2), tensors)
        assert apart(ours, wanted) < 1e-5
        leaking = value_and_gradients(lambda *t, r=wrong: dense(*t, visible(r, window), softcap, 0.2), tensors)
        assert apart(leaking, wanted) > 1e-2


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("way", "softcap"), [("flex", None), ("tiled", None), ("tiled", 2.0)])
def test_sinks_take_their_share_of_every_query(on_a_cpu, way, softcap, window):
    tensors, sinks = [t.detach() for t in operands()], torch.tensor([-2.0, 0.0, 3.0, 9.0])
    ours = PATHS[way](*tensors, packing_of(ROWS, T), window, 0.2, softcap, sinks)
    seen = visible(ROWS, window)
    assert apart([ours], [dense(*tensors, seen, softcap, 0.2, sinks)]) < 1e-5
    assert apart([ours], [dense(*tensors, seen, softcap, 0.2)]) > 0.1


def test_sinks_are_not_trained():
    sinks = torch.zeros(4, requires_grad=True)
    with pytest.raises(AssertionError, match="sinks get no gradient here"):
        PATHS["tiled"](*operands(), packing_of(ONE, T), None, 0.2, None, sinks)


@pytest.mark.parametrize("window", WINDOWS)
def test_the_blocks_are_those_that_torch_finds_in_a_whole_mask(window):
    for rows in (ROWS, ONE):
        ours = attention_paths.block_mask(packing_of(rows, T).positions_BT, window)
        wanted = torch_flex.create_block_mask(ours.mask_mod, 2, 1, T, T, device="cpu")
        assert torch.equal(torch_flex.create_mask(ours.mask_mod, 2, 1, T, T, device="cpu"), visible(rows, window))
        for side in ("kv", "full_kv", "q", "full_q"):
            counts = getattr(ours, f"{side}_num_blocks")
            assert torch.equal(counts, getattr(wanted, f"{side}_num_blocks"))
            named = torch.arange(counts.shape[-1]) < counts[..., None]
            indices = (getattr(mask, f"{side}_indices") for mask in (ours, wanted))
            assert torch.equal(*(torch.where(named, i, -1) for i in indices))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_flex_attention_compiles_once_for_all_documents_and_in_one_graph(monkeypatch, backend):
    """Inductor's code skips the same blocks as a GPU's; compiling it as C++ takes half a minute."""
    compile = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(attention_paths, "compiled_flex", functools.cache(attention_paths.compiled_flex.__wrapped__))
    tensors = [t.detach() for t in operands()]
    ours = attention_paths.flex(*tensors, packing_of(ROWS, T), 50, 0.2, 2.0)
    assert apart([ours], [dense(*tensors, visible(ROWS, 50), 2.0, 0.2)]) < 1e-5
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    again = attention_paths.flex(*tensors, packing_of(ONE, T), None, 0.2, 2.0)
    assert apart([again], [dense(*tensors, visible(ONE, None), 2.0, 0.2)]) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("window", [None, 50])
def test_torch_s_flash_attention_accepts_our_arguments(window):
    """Only shapes, forward and backward, without a device: it checks names and types of the arguments."""
    sizes = [(2, 4, T, 64), (2, 2, T, 64), (2, 2, T, 64)]
    tensors = [torch.empty(s, dtype=torch.bfloat16, device="meta", requires_grad=True) for s in sizes]
    out = attention_paths.varlen(*tensors, packing_of(ROWS, T).moved(lambda t: t.to("meta")), window, 0.2)
    assert out.shape == (2, T, 4, 64)
    assert [g.shape for g in torch.autograd.grad(out.sum(), tensors)] == [t.shape for t in tensors]


@pytest.fixture(scope="module")
def more_models(tmp_path_factory):
    root = tmp_path_factory.mktemp("more")
    for family in [*MORE, "llama", "qwen2", "gpt2", "gemma2", "mistral"]:
        make_model(root / family, family)
    return root


@pytest.mark.parametrize("family", MORE)
def test_more_families_give_packed_documents_what_each_gives_alone(more_models, family):
    anatomy, network = load_model(more_models / family)
    assert anatomy.blocks_apart == anatomy.layers
    logits, gradients = differences(network, anatomy, LENGTHS)
    assert logits < 2e-5 and gradients < 1e-5
    logits, gradients = differences(network, anatomy, NUDGED)
    assert logits > 1e-2 and gradients > 1e-3


GPU_WAYS = [(f, "varlen") for f in ("llama", "qwen2", "gpt2", "mistral")]
GPU_WAYS += [(f, "flex") for f in ("llama", "qwen2", "gpt2", "gemma2")]


@pytest.mark.parametrize(("family", "way"), GPU_WAYS)
def test_families_keep_documents_apart_on_the_paths_of_a_gpu(more_models, on_a_cpu, monkeypatch, family, way):
    rule, taken = attention.choose_path, []

    def on_a_gpu(*asked):
        taken.append("sdpa" if rule(*asked) == "sdpa" else way)
        return taken[-1]

    monkeypatch.setattr(attention, "choose_path", on_a_gpu)
    anatomy, network = load_model(more_models / family)
    logits, gradients = differences(network, anatomy, LENGTHS)
    assert logits < 2e-5 and gradients < 1e-5 and taken.count(way) >= 4


def test_nothing_is_read_on_the_host(monkeypatch):
    """The computations on a packing on the device; flash attention gets the borders unchanged."""
    tensors, packing = [t.detach() for t in operands()], packing_of(ROWS, T)
    attention_paths.block_mask.cache_clear()
    with no_host_reads(monkeypatch):
        attention_paths.block_mask(packing.positions_BT, 50)
        attention_paths.tiled(*tensors, packing, 50, None, 2.0)


LAYERS = {
    "plain": Layer(64, 64, None, None), "window": Layer(64, 64, 512, None), "soft-cap": Layer(64, 64, None, 50.0),
    "wide": Layer(512, 512, None, None), "two widths": Layer(192, 128, None, None), "narrow": Layer(8, 8, None, 50.0),
}  # fmt: skip
TAKEN = [  # layer, documents, dtype, on a GPU, on a CPU
    ("plain", False, torch.bfloat16, "sdpa", "sdpa"),
    ("plain", False, torch.float32, "sdpa", "sdpa"),
    ("plain", True, torch.bfloat16, "varlen", "tiled"),
    ("plain", True, torch.float32, "flex", "tiled"),
    ("window", False, torch.bfloat16, "varlen", "tiled"),
    ("window", True, torch.bfloat16, "varlen", "tiled"),
    ("soft-cap", False, torch.bfloat16, "flex", "tiled"),
    ("soft-cap", True, torch.bfloat16, "flex", "tiled"),
    ("wide", True, torch.bfloat16, "flex", "tiled"),
    ("two widths", True, torch.bfloat16, "flex", "tiled"),
    ("narrow", True, torch.bfloat16, "tiled", "tiled"),
]


@pytest.mark.parametrize(("name", "packed", "dtype", "gpu", "cpu"), TAKEN)
def test_one_rule_chooses_the_path_of_a_layer(monkeypatch, name, packed, dtype, gpu, cpu):
    asked = (LAYERS[name], 4096, packed, dtype, torch.device("cpu"))
    assert choose_path(*asked) == cpu
    monkeypatch.setattr(attention, "runs_triton", lambda device: True)
    assert choose_path(*asked) == gpu
    # This window is as long as the row.
    assert choose_path(LAYERS["window"], 512, False, dtype, torch.device("cpu")) == "sdpa"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert choose_path(*asked) == gpu.replace("varlen", "flex")


def test_the_log_names_the_paths_of_each_model(monkeypatch):
    gemma = (Layer(256, 256, 4096, 50.0), Layer(256, 256, None, 50.0))
    models, cpu = {"student": (LAYERS["plain"],), "teacher": gemma}, torch.device("cpu")

    def said(**data) -> str:
        return describe(data_section("text", seq_len=8192, **data), models, torch.bfloat16, cpu)

    assert said(attention="document") == "attention: document on cpu, student by tiled, teacher by tiled"
    monkeypatch.setattr(attention, "runs_triton", lambda device: True)
    assert said() == "attention: causal on cpu, student by sdpa, teacher by flex"
    shared = "attention: causal on cpu, student by sdpa and ulysses, teacher by flex and ulysses"
    assert said(sequence_parallel=2) == shared


def peak_of(attend, tensors, *settings) -> int:
    def both():
        out = attend(*tensors, *settings)
        return torch.autograd.grad(out, tensors, torch.ones_like(out))

    return peak_bytes(both)


@pytest.mark.parametrize(
    ("window", "softcap"), [(None, None), (512, None), (None, 2.0)], ids=["plain", "window", "cap"]
)
def test_no_layer_holds_a_mask_or_scores_of_all_tokens(window, softcap):
    """At 4096 tokens a mask of bytes alone is 16.8 MB; tiles of soft-capped scores grow with T, not with its square."""

    def operands_of(length):
        return [torch.randn(1, heads, length, 16).requires_grad_() for heads in (2, 1, 1)]

    short, long = operands_of(2048), operands_of(4096)
    for cuts in ([1000, 96, 452, 500], [2048]):
        settings = (window, None, softcap)
        peak = peak_of(attention_paths.tiled, long, packing_of([[2 * c for c in cuts]], 4096), *settings)
        assert peak < 2.3 * peak_of(attention_paths.tiled, short, packing_of([cuts], 2048), *settings)
        assert softcap or peak < 4096**2 / 2
    assert peak_of(dense, long, visible([[4096]], None)) > 8 * 4096**2  # the meter sees them


def test_documents_cost_a_model_no_memory_that_grows_with_the_square_of_a_row(more_models):
    anatomy, network = load_model(more_models / "llama")
    tokens = torch.ones(1, 4096, dtype=torch.long)

    def peak(packing) -> int:
        return peak_bytes(lambda: run_body(network, anatomy, tokens, packing).sum().backward())

    peak(None)  # the weights' gradients stay
    assert peak(packing_of([[1000, 3096]], 4096)) < peak(None) + 4096**2 / 4
