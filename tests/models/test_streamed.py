"""A network whose blocks are streamed from the host's memory: the same numbers, and no more than two blocks on the device."""

import pytest
import torch
from tiny import make_model

from ted_scale.models import fused
from ted_scale.models.anatomy import run_body
from ted_scale.models.inspection import inspect
from ted_scale.models.streamed import BlockStream, stream_blocks
from ted_scale.models.weights import build_network

NEW = [("qwen3_moe", 2), ("gpt_oss", 2), ("mamba2", 2), ("qwen3_next", 4)]
TOKENS = torch.arange(1, 33).view(2, 16)


def both(folder, family: str, blocks: int, compiled: bool = False):
    """(the body's output of a whole network, that of a streamed one, called twice; the streamed network and its blocks)"""
    anatomy = inspect(
        "teacher.path", str(make_model(folder / family, family, num_hidden_layers=blocks)), is_frozen=True
    )
    whole, streamed = (build_network(anatomy, ds_config=None, dtype=torch.float32).eval() for _ in range(2))
    if compiled:
        fused.compile_blocks(streamed.get_submodule(anatomy.blocks), fails=True)
    stream_blocks(streamed, streamed.get_submodule(anatomy.blocks), torch.device("cpu"))
    with torch.no_grad():
        results = [run_body(network, anatomy, TOKENS) for network in (whole, streamed, streamed)]
    return results, streamed, streamed.get_submodule(anatomy.blocks)


@pytest.mark.parametrize(("family", "blocks"), [("llama", 1), ("llama", 3), ("gpt2", 4), ("gemma2", 2), *NEW])
def test_streamed_blocks_compute_what_whole_ones_do(tmp_path, family, blocks):
    (whole, first, second), *_ = both(tmp_path, family, blocks)
    assert torch.equal(first, whole) and torch.equal(second, whole)


def test_compiled_blocks_read_the_weights_of_their_turn(tmp_path, monkeypatch):
    """One graph for all blocks, whose weights come and go."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, **named: compiler(forward, backend="eager", **named))
    (whole, first, second), *_ = both(tmp_path, "llama", 3, compiled=True)
    assert torch.equal(first, second) and torch.allclose(first, whole, atol=1e-6)


def test_a_block_s_weights_are_on_the_device_while_it_runs_and_the_next_one_s_are_on_their_way(tmp_path, monkeypatch):
    seen, begin = [], BlockStream.begin

    def looked(stream, index, block, *arguments):
        begin(stream, index, block, *arguments)
        memory = stream.places[stream.turn]
        inside = [memory.data_ptr() <= w.data_ptr() < memory.data_ptr() + memory.nbytes for w in block.parameters()]
        seen.append((index, all(inside), stream.holds[1 - stream.turn]))

    monkeypatch.setattr(BlockStream, "begin", looked)
    _, _, blocks = both(tmp_path, "llama", 3)
    assert seen == [(0, True, 1), (1, True, 2), (2, True, 0)] * 2
    with torch.no_grad():  # between two passes every weight is that of the host, which health.replicas_every reads
        assert all(w.abs().sum() > 0 for w in blocks.parameters())


def test_a_pass_that_broke_off_spoils_no_later_one(tmp_path):
    (whole, *_), network, blocks = both(tmp_path, "llama", 3)
    hook = blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        network(TOKENS, use_cache=False)
    hook.remove()
    with torch.no_grad():
        assert torch.equal(network.model(input_ids=TOKENS, use_cache=False)[0], whole)
