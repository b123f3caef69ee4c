"""Scenarios of ranks.py in which several ranks share every row, beside one rank that has whole rows."""

import shutil
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from plain import load_model, make_batch
from scenarios import put_back, start
from tiny import FAMILIES, MORE

from ted_scale import run as build
from ted_scale.checkpoints.filters_file import full_precision
from ted_scale.data.stream import cut
from ted_scale.models import attention, fused, ulysses
from ted_scale.models.anatomy import run_body
from ted_scale.ranks.group import group_of_node

HEADS, TOKENS, WIDTH = 8, 16, 4


def sections(folder: Path, ranks: int) -> dict[str, dict]:
    """Runs of three steps or more by name, with so many ranks to a row. Key heads are shared in both models, and on four ranks the
    teacher is elsewhere. A large eps keeps AdamW from making a step of its full size of a gradient that is nothing but rounding."""
    four, student, data = dist.get_world_size() == 4, {"path": str(folder / "narrow")}, {"sequence_parallel": ranks}
    common = {"train": {"steps": 3, "micro_batch": 2, "eps": 1e-3}, "checkpoint": {"every": 3, "keep": 9}}
    documents = {
        "teacher": {"placement": "node" if four else "sharded", "node_ranks": 2 if four else 1, "micro_batch": 2},
        "filters": {"steps": 2, "width": 16, "start": "states", "sample_tokens": 0.5, "sample_pairs": 1},
        "student": student, "data": {**data, "attention": "document"},
    }  # fmt: skip
    causal = {
        "teacher": {"placement": "offload" if four else "replicated", "early": True}, "filters": {"steps": 0, "width": 16},
        "student": {**student, "gradient_checkpointing": True}, "data": data, "loss": {"skip_low_entropy": 0.4},
        "train": {**common["train"], "reduce_once": True},
    }  # fmt: skip
    return {"documents": {**common, **documents}, "causal": {**common, **causal}}


def rows_shared(folder: Path, device):
    """Rows that all ranks share; of four ranks, in one run only two to a row. Of two, a run that goes on with rows for each."""
    world = dist.get_world_size()
    for name, ranks in {"documents": min(world, 2), "causal": world}.items():
        start_and_keep_weights(folder, device, f"rows_{name}_{world}_by_{ranks}", **sections(folder, ranks)[name])
    if world == 2:
        resume_unshared(folder, device)


def start_and_keep_weights(folder: Path, device, name: str, **of_run) -> None:
    """The weights of network and filters land in FOLDER/NAME.pt."""

    def end(parts, stage, student, progress):
        weights = {key: full_precision(weight).clone() for key, weight in student.module.named_parameters()}
        if dist.get_rank() == 0:
            torch.save(weights, folder / f"{name}.pt")
        end_stage(parts, stage, student, progress)

    end_stage, build.end_stage = build.end_stage, end
    try:
        start(folder, device, name=name, **of_run)
    finally:
        build.end_stage = end_stage


def resume_unshared(folder: Path, device) -> None:
    """The run of documents from its checkpoint in stage II on, its ranks each with rows of their own."""
    if dist.get_rank() == 0:
        put_back(shutil.copytree(folder / "runs/rows_documents_2_by_2", folder / "runs/rows_apart"), 3)
    dist.barrier()
    start(folder, device, name="rows_apart", **sections(folder, 1)["documents"])


def families_shared(folder: Path, device) -> dict[str, float]:
    """How far the body's output of this rank's tokens is from theirs in whole rows, largest difference beside the output's size, by
    family and whether documents are apart; also of compiled blocks, as teacher.compile has them."""
    models, found = {name: load_model(folder / name) for name in sorted(FAMILIES | MORE)}, {}
    models["compiled"] = compiled(*load_model(folder / "llama"))
    for name, (anatomy, network) in models.items():
        for documents in (False, True):
            whole = make_batch(rows=2, length=32, documents=documents)
            ours = cut(whole, dist.get_rank(), dist.get_world_size())
            with torch.no_grad():
                here = run_body(network, anatomy, ours.tokens_BT, ours.packing, ours.share)
                there = run_body(network, anatomy, whole.tokens_BT, whole.packing)
            there = there.chunk(ours.share.of, dim=1)[ours.share.index]
            found[f"{name} {documents}"] = ((here - there).abs().max() / there.abs().max()).item()
    return found


def compiled(anatomy, network):
    """In graphs that torch runs as they are."""
    compiler, torch.compile = torch.compile, partial(torch.compile, backend="eager")
    try:
        return anatomy, fused.fuse(network, network.get_submodule(anatomy.blocks), "compile", attention_apart=True)
    finally:
        torch.compile = compiler


def deepspeed_attention(folder: Path, device) -> dict[str, bool]:
    """Whether ours has the bits of DeepSpeed's class, by the number of key heads: as many as query heads, and one for all ranks."""
    return {str(key_heads): same_as_deepspeed(key_heads, dist.get_world_size()) for key_heads in (HEADS, 1)}


def same_as_deepspeed(key_heads: int, ranks: int) -> bool:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    theirs = UlyssesSPAttentionHF(
        attn=attention.causal_attention, batch_size=2, attn_head_count=HEADS, attn_head_size=WIDTH, kv_head_count=key_heads,
        num_hidden_layers=1, process_group=group_of_node(ranks) or dist.group.WORLD, seq_length_is_variable=True,
    )  # fmt: skip
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // key_heads
    ours = partial(attention.causal_attention, packing=ulysses.Shared(None, ranks))
    positions = torch.zeros(2, TOKENS, dtype=torch.long)  # theirs gathers them, whatever they are
    both = [
        of_attention(ours, module, key_heads),
        of_attention(partial(theirs, position_ids=positions), module, key_heads),
    ]
    return all(map(torch.equal, *both))


def of_attention(attend, module, key_heads: int) -> list[torch.Tensor]:
    """(output, gradients of query, key and value)"""
    generator, shape = torch.Generator().manual_seed(dist.get_rank()), (TOKENS, WIDTH)
    heads = (HEADS, key_heads, key_heads)
    parts = [torch.randn(2, count, *shape, generator=generator, requires_grad=True) for count in heads]
    out = attend(module, *parts, None)[0].reshape(2, TOKENS, HEADS * WIDTH)
    out.backward(torch.randn(out.shape, generator=generator))
    return [out.detach(), *(part.grad for part in parts)]
