"""teacher.compile: blocks in graphs that hold for every batch, also where documents are apart."""

import pytest
import torch
from plain import make_batch
from tiny import make_model
from torch._dynamo.testing import CompileCounter

from ted_scale.base.errors import UserError
from ted_scale.data.packing import pack
from ted_scale.models import fused
from ted_scale.models.anatomy import run_body
from ted_scale.models.inspection import inspect
from ted_scale.models.quantized import build_quantized
from ted_scale.models.weights import build_network


@pytest.fixture
def counter(monkeypatch):
    """Counts graphs, which torch then runs as they are: the compiler itself would take most of the time here."""
    compiler, counter = torch.compile, CompileCounter()
    monkeypatch.setattr(torch, "compile", lambda forward, **named: compiler(forward, backend=counter, **named))
    torch._dynamo.reset()
    return counter


def compiled(anatomy, network):
    return fused.fuse(network, network.get_submodule(anatomy.blocks), "compile", attention_apart=True)


def outputs(anatomy, network, batches) -> list[torch.Tensor]:
    with torch.no_grad():
        return [run_body(network, anatomy, batch.tokens_BT, batch.packing) for batch in batches]


def apart(every: int):
    """Documents of so many tokens."""
    return pack((torch.arange(16).repeat(2, 1) % every == 0).numpy())


def test_documents_of_every_batch_share_the_graphs_of_the_first(tmp_path, counter):
    anatomy = inspect("teacher.path", str(make_model(tmp_path / "m", "llama", num_hidden_layers=2)))
    first = make_batch(2, 16, documents=True)
    batches = [first, *(first._replace(packing=apart(every)) for every in (3, 5))]
    plain, network = (build_network(anatomy, ds_config=None, dtype=torch.float32).eval() for _ in range(2))
    wanted, network = outputs(anatomy, plain, batches), compiled(anatomy, network)
    found = outputs(anatomy, network, batches[:1])
    graphs = counter.frame_count
    found += outputs(anatomy, network, batches[1:])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    assert not torch.allclose(wanted[1], wanted[2])
    assert counter.frame_count == graphs > 0


def test_matrices_of_8_bits_are_compiled_too(tmp_path, counter):
    pytest.importorskip("torchao")
    anatomy = inspect("teacher.path", str(make_model(tmp_path / "m", "llama", num_hidden_layers=2)))
    settings = {"init": "weights", "seed": 0, "device": torch.device("cpu")}
    plain, network = (build_quantized(anatomy, "int8", **settings).eval() for _ in range(2))
    batch = make_batch(2, 16, documents=True)
    (wanted,) = outputs(anatomy, plain, [batch])
    (found,) = outputs(anatomy, compiled(anatomy, network), [batch])
    of_8_bits = counter.frame_count
    assert torch.equal(found, wanted)
    whole = build_network(anatomy, ds_config=None, dtype=torch.bfloat16).eval()
    outputs(anatomy, compiled(anatomy, whole), [batch])
    assert counter.frame_count - of_8_bits == of_8_bits > 0  # blocks share their graphs, too


def test_attention_that_is_compiled_by_itself_is_refused():
    fused.check_teacher(["sdpa", "varlen", "tiled"])
    with pytest.raises(
        UserError, match=r"^teacher.compile must be false where a layer of the teacher takes flex attention"
    ):
        fused.check_teacher(["flex", "sdpa"])
