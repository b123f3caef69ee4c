"""A teacher of 8 bits: its numbers beside bf16's, what is rounded and what is not, and that the bf16 model is never whole."""

import types

import pytest
import torch
from tiny import make_model

from ted_scale.base.errors import UserError
from ted_scale.health import replicas
from ted_scale.models import quantized
from ted_scale.models.anatomy import run_body
from ted_scale.models.inspection import inspect
from ted_scale.models.quantized import build_quantized, unrounded
from ted_scale.models.weights import build_network
from ted_scale.models.zero_lean import Linear

quantization = pytest.importorskip("torchao.quantization")
CPU, TOKENS = torch.device("cpu"), torch.arange(1, 33).view(2, 16)


def anatomy_of(folder, family: str, **sizes):
    return inspect("teacher.path", str(make_model(folder / family, family, **sizes)))


def rounded(anatomy, bits: str = "int8", init: str = "weights"):
    return build_quantized(anatomy, bits, init=init, seed=1, device=CPU).eval()


def states(network, anatomy):
    with torch.no_grad():
        return run_body(network, anatomy, TOKENS).float()


def memory_of(weight) -> int:
    inner = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else None
    return weight.nbytes if inner is None else sum(getattr(weight, key).nbytes for key in inner)


@pytest.fixture
def fp8_anywhere(monkeypatch):
    """torchao asks for a GPU; its fp8 is otherwise the same on a CPU, by torch's product of scaled rows."""
    monkeypatch.setattr(quantization.quant_api, "_check_hardware_support", lambda *_: None)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gemma2"])
def test_a_network_in_int8_is_near_the_one_in_bf16_and_counted_to_the_byte(tmp_path, family):
    anatomy = anatomy_of(tmp_path, family)
    exact = states(build_network(anatomy, ds_config=None, dtype=torch.bfloat16).eval(), anatomy)
    network = rounded(anatomy)
    assert 0 < (states(network, anatomy) - exact).norm() / exact.norm() < 0.1
    assert sum(map(memory_of, network.parameters())) == quantized.counts(anatomy, "int8").bytes
    tied = family != "llama"
    assert (network.get_output_embeddings().weight is network.get_input_embeddings().weight) == tied


def test_every_matrix_of_the_blocks_and_nothing_else_is_rounded(tmp_path):
    anatomy = anatomy_of(tmp_path, "qwen2")
    network = rounded(anatomy)
    found = {name for name, weight in network.named_parameters() if type(weight) is not torch.nn.Parameter}
    assert found == {name for name, p in network.named_parameters() if ".layers." in name and p.dim() > 1}
    assert len(found) == 4 * 7 == sum(quantized.counts(anatomy, "int8").matrices.values())
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    said = quantized.describe(anatomy, "int8")
    assert said.startswith("the teacher in int8: 28 matrices of its blocks, ") and "mlp.down_proj x 4" in said
    assert said.endswith("; embeddings, norms and head stay in bf16")


def test_what_torchao_does_not_take_is_named(tmp_path):
    """Sides of 24 are no multiple of fp8's 16."""
    anatomy = anatomy_of(tmp_path, "llama", intermediate_size=24)
    assert quantized.describe(anatomy, "fp8").endswith(
        ", and so do mlp.gate_proj.weight x 4, mlp.up_proj.weight x 4, mlp.down_proj.weight x 4, which torchao does not take"
    )
    assert not quantized.counts(anatomy, "int8").left_out


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch has no product of scaled rows on a CPU")
def test_in_fp8_too(tmp_path, fp8_anywhere):
    anatomy = anatomy_of(tmp_path, "llama")
    exact = states(build_network(anatomy, ds_config=None, dtype=torch.bfloat16).eval(), anatomy)
    network = rounded(anatomy, "fp8")
    weight = network.model.layers[0].mlp.up_proj.weight
    assert weight.qdata.dtype == torch.float8_e4m3fn and weight.scale.shape == (64, 1)
    assert 0 < (states(network, anatomy) - exact).norm() / exact.norm() < 0.3
    assert sum(map(memory_of, network.parameters())) == quantized.counts(anatomy, "fp8").bytes


def test_never_is_more_than_one_block_in_bf16(tmp_path, monkeypatch):
    """Elements in bf16 inside blocks, whenever a block was just filled."""
    anatomy = anatomy_of(tmp_path, "llama", num_hidden_layers=5)
    fill, seen = quantized.fill, []

    def count(network, *arguments):
        fill(network, *arguments)
        blocks = network.get_submodule(anatomy.blocks).parameters()
        plain = [p for p in blocks if p.dim() > 1 and not p.is_meta and not hasattr(p, "__tensor_flatten__")]
        seen.append(sum(p.numel() for p in plain))

    monkeypatch.setattr(quantized, "fill", count)
    network = rounded(anatomy)
    unrounded(network, anatomy, CPU)(TOKENS)
    assert seen[0] == 0 and len(seen) == 1 + 2 * 5
    assert set(seen[1:]) == {anatomy.block_parameters - 2 * anatomy.width}


def test_the_model_to_compare_with_is_that_of_the_files(tmp_path):
    anatomy = anatomy_of(tmp_path, "qwen2")
    exact = states(build_network(anatomy, ds_config=None, dtype=torch.bfloat16).eval(), anatomy)
    other = unrounded(rounded(anatomy), anatomy, CPU)
    assert torch.equal(states(other, anatomy), exact) and torch.equal(states(other, anatomy), exact)
    assert {p.device.type for p in other.get_submodule(anatomy.blocks).parameters()} == {"meta"}


def test_random_weights_are_rounded_ones_of_the_seed(tmp_path):
    anatomy = anatomy_of(tmp_path, "llama")
    first, again = (states(rounded(anatomy, init="random"), anatomy) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, states(rounded(anatomy), anatomy))


def test_a_flipped_bit_of_a_number_or_a_scale_changes_a_digest(tmp_path):
    network = rounded(anatomy_of(tmp_path, "llama", num_hidden_layers=1))
    before = replicas.digests(replicas.parts_of(network), CPU)
    weight = network.model.layers[0].mlp.up_proj.weight
    names = list(replicas.parts_of(network))
    for key in ("qdata", "scale"):
        getattr(weight, key).flatten()[:1].view(torch.int8)[0] ^= 1
        changed = (replicas.digests(replicas.parts_of(network), CPU) != before).nonzero().flatten().tolist()
        assert names[changed[-1 if key == "scale" else 0]] == f"model.layers.0.mlp.up_proj.weight.{key}"
    assert len(changed) == 2


def test_deepspeed_s_linear_leaves_8_bits_to_torchao(tmp_path):
    """It takes the place of torch's for every model of the process once a student is sharded."""
    weight = rounded(anatomy_of(tmp_path, "llama", num_hidden_layers=1)).model.layers[0].mlp.up_proj.weight
    x = torch.randn(2, 3, weight.shape[1], dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(Linear(None).apply(x, weight), torch.nn.functional.linear(x, weight))


def test_a_file_without_a_block_s_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    anatomy = anatomy_of(tmp_path, "llama")
    file = tmp_path / "llama" / "model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if name != "model.layers.2.mlp.up_proj.weight"}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"but model\.layers\.2\.mlp\.up_proj\.weight is missing \(1 in all\)"):
        rounded(anatomy)


def test_a_family_without_such_matrices_is_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        quantized.check("int8", anatomy_of(tmp_path, "gpt2"))
    assert str(caught.value) == (
        "teacher.precision must be left out for a teacher of family gpt2, but is 'int8', which needs matrices that are "
        "torch.nn.Linear, and its blocks have none"
    )


def test_without_torchao_the_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        quantized.check("fp8", None)
    assert str(caught.value) == (
        "teacher.precision must be left out where torchao is not installed, but is 'fp8'; pip install -e \".[torchao]\""
    )
    quantized.check(None, None)


@pytest.mark.parametrize(("capability", "hip"), [((8, 9), None), ((9, 4), "7.0")])
def test_fp8_is_refused_on_a_device_without_it(monkeypatch, capability, hip):
    gpu = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(quantized, "device_name", lambda device: device.type)
    for device in (CPU, gpu):
        quantized.check_device("int8", device)
        with pytest.raises(UserError, match=rf"^teacher.precision must be bf16 or int8 on {device.type}, but is 'fp8'"):
            quantized.check_device("fp8", device)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    quantized.check_device("fp8", gpu)
