"""Counted FLOPs against torch's own count of the products that run, and against the pairs of query and key one by one."""

import importlib

import pytest
import torch
from plain import build, make_world, own_model
from tiny import EXPERTS, FAMILIES, MORE, RECURRENT, make_corpus, make_model, make_run
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from ted_scale.data.stream import Batch, batch, open_stream, text_lengths
from ted_scale.distill.flops import body_flops, head_flops, keys_of, lengths_of, step_flops
from ted_scale.distill.normalization import count_valid
from ted_scale.metrics.peaks import device_peak, peak_of
from ted_scale.models.inspection import inspect

LENGTH = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def counted(run) -> tuple[float, float]:
    """FLOPs of `run`: of products with weights, and of products of states with states."""
    own = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}  # torch has none for it
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        run()
    each = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    return sum(each.get(f"aten.{op}", 0) for op in ("mm", "addmm", "addmm_")), each.get("aten.bmm", 0)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE, *EXPERTS])
def test_a_family_s_forward_is_what_torch_counts(tmp_path, family):
    """Experts one after the other, for torch counts no product of groups."""
    anatomy = inspect("teacher.path", str(make_model(tmp_path, family)), is_frozen=True)
    model = own_model(tmp_path, **({"experts_implementation": "eager"} if family in EXPERTS else {}))
    with torch.no_grad():
        products, scores = counted(lambda: model(torch.ones(1, LENGTH, dtype=torch.long), use_cache=False))
    nothing = body_flops(anatomy, lambda window: 0)
    assert (nothing + head_flops(anatomy)) * LENGTH == products
    whole = body_flops(anatomy, lambda window: LENGTH) - nothing
    # transformers multiplies what is masked, too; 5.17 also rotary frequencies with positions
    assert 0 <= scores - whole * LENGTH <= 0.005 * scores


@pytest.mark.parametrize("family", RECURRENT)
def test_a_recurrence_counts_its_products_with_weights_and_its_short_convolution(tmp_path, family):
    """torch also computes the convolution's three positions before the first token, and recurrences as products of states."""
    anatomy = inspect("teacher.path", str(make_model(tmp_path, family)), is_frozen=True)
    model = own_model(tmp_path, **({"experts_implementation": "eager"} if family == "qwen3_next" else {}))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.ones(1, LENGTH, dtype=torch.long), use_cache=False)
    each = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    products = each["aten.mm"] + each["aten.convolution"] * LENGTH / (LENGTH + 3)
    assert (body_flops(anatomy, lambda window: 0) + head_flops(anatomy)) * LENGTH == products


OPERATIONS = (
    ("logit_loss", "logit_chunks"), ("filter_loss", "head_chunk"), ("logit_loss_strict", "strict_losses"),
    ("logit_loss_strict", "strict_gradients"),
)  # fmt: skip
SETTINGS = {
    "ce": ({"method": "ce"}, "student"),
    "kd": ({"method": "kd"}, "student"),
    "lwd": ({"method": "lwd"}, "student"),
    "ted": ({}, "student"),
    "ted, mlp": ({"filters": {"mlp": 24}}, "student"),
    "hint, over": ({"loss": {"kl": 0.0, "layer": {"start": 1.0, "off_after": 1e-6}}}, "student"),
    "states first": ({"loss": {"ce": {"start": 1.0, "on_after": 0.5}, "kl": 0.0}}, "student"),
    "strict": ({"loss": {"mode": "strict"}}, "student"),
    "checkpointing": ({"student": {"gradient_checkpointing": True}}, "student"),
    "adapters": ({"student": {"lora": {"rank": 3}}}, "student"),
    "adapters, checkpointing": (
        {"student": {"lora": {"targets": ["c_attn"]}, "gradient_checkpointing": True}},
        "student",
    ),
    "stage I": ({}, "filters"),
    "stage I, mlp": ({"filters": {"mlp": 24}}, "filters"),
    "stage I, own heads": ({"filters": {"head": "per_layer"}}, "filters"),
    "stage I, lifted": ({"filters": {"width": 24}}, "filters"),
    "stage I, drawn": ({"filters": {"mlp": 24, "sample_tokens": 0.5, "sample_pairs": 1}}, "filters"),
}


@pytest.mark.parametrize(("sections", "name"), SETTINGS.values(), ids=SETTINGS)
def test_a_step_is_what_torch_counts(world, monkeypatch, sections, name):
    for place, op in OPERATIONS:  # into which torch does not look
        module = importlib.import_module(f"ted_scale.kernels.{place}")
        monkeypatch.setattr(module, op, getattr(module, op)._init_fn)
    parts = build(world, stage=name, **sections)
    if parts.plan.run.student.gradient_checkpointing:
        parts.student.network.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(1, 128, (2, LENGTH))
    micro = Batch(tokens, tokens, torch.ones(2, LENGTH), None)
    step = parts.stage.last_step - 1
    weights = parts.stage.weights(step)

    def run():
        signal = parts.teacher(micro, weights) if parts.teacher else None
        parts.student(micro, signal, weights, count_valid([micro])).total.backward()

    work = step_flops(parts.plan, parts.stage, step, lambda window: 0)
    with set_checkpoint_early_stop(False):  # else torch spares the last product of each block
        products, _ = counted(run)
    assert products == pytest.approx(sum(work) * 2 * LENGTH, rel=1e-12)
    run = parts.plan.run
    assert (work.again > 0) == (run.loss.mode == "strict" or run.student.gradient_checkpointing)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_a_query_sees_its_own_document_up_to_itself_and_no_further_back_than_its_window(window):
    lengths = [1, 7, 4]
    seen = [min(i + 1, window or 100) for length in lengths for i in range(length)]
    assert keys_of(lengths)(window) == pytest.approx(sum(seen) / len(seen))
    assert keys_of([4096])(None) == 2048.5


def test_documents_count_as_they_are_packed(tmp_path):
    make_corpus(tmp_path / "corpus")
    run = make_run(tmp_path, data={"attention": "document", "seq_len": 64})
    stream = open_stream(run.data, run.seed, 128)
    micros = [batch(stream, [position, position + 1]) for position in (0, 2)]
    lengths = lengths_of(micros)
    assert sum(lengths) == 4 * 64 and lengths == list(text_lengths(stream, windows=4))
    positions = torch.cat([micro.packing.positions_BT.flatten() for micro in micros])
    assert keys_of(lengths)(None) == pytest.approx((positions + 1).float().mean().item())
    assert keys_of(lengths)(None) < 32.5 == keys_of(lengths_of([micros[0]._replace(packing=None)]))(None)


NAMES = {  # as torch.cuda.get_device_name has them
    "NVIDIA H100 80GB HBM3": (989e12, 67e12),
    "NVIDIA H100 PCIe": (756e12, 51e12),
    "NVIDIA H100 NVL": (835e12, 60e12),
    "NVIDIA H200": (989e12, 67e12),
    "NVIDIA H200 NVL": (835e12, 60e12),
    "NVIDIA GH200 480GB": (989e12, 67e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 19.5e12),
    "NVIDIA B200": (2250e12, 75e12),
    "AMD Instinct MI300X": (1307e12, 163e12),
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb": (None, None),
    "NVIDIA GeForce RTX 4090": (None, None),
}


@pytest.mark.parametrize(("name", "peaks"), NAMES.items(), ids=NAMES)
def test_a_device_s_peak_is_its_card_s_in_the_run_s_precision(monkeypatch, name, peaks):
    assert (peak_of(name, "bf16"), peak_of(name, "fp32")) == peaks
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_peak(torch.device("cuda"), "bf16") == peaks[0]
    assert device_peak(torch.device("cpu"), "bf16") is None
