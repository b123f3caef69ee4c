"""Sharded models beside those that transformers builds, on real ranks (ranks.py)."""

from pathlib import Path

import torch
import torch.distributed as dist
from tiny import FAMILIES, MORE, make_run
from transformers import AutoModelForCausalLM

from ted_scale import engines
from ted_scale.models.anatomy import run_body
from ted_scale.models.engine_config import engine_config
from ted_scale.models.inspection import inspect
from ted_scale.models.weights import build_network
from ted_scale.models.zero import gathered
from ted_scale.plan import make_plan

FAR = 4096


def buffers(folder: Path, device):
    """Buffers of every family, in both precisions, that are not bit for bit and type for type those of transformers; and how
    many there are."""
    wrong, count = [], 0
    anatomies = {family: inspect("model", str(folder / family)) for family in [*FAMILIES, *MORE]}
    for precision, dtype in engines.DTYPES.items():
        config = config_of(folder, precision)
        for family, anatomy in anatomies.items():
            network = build_network(anatomy, ds_config=config, dtype=dtype)
            assert {parameter.dtype for parameter in network.parameters()} == {dtype}
            ours, theirs = dict(network.named_buffers()), dict(plain(folder / family, dtype).named_buffers())
            wrong += [f"{family}, {precision}: {name}" for name in ours | theirs if not same(ours, theirs, name)]
            count += len(theirs)
    return {"wrong": wrong, "count": count}


def same(ours: dict, theirs: dict, name: str) -> bool:
    a, b = ours.get(name), theirs.get(name)
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def config_of(folder: Path, precision: str) -> dict:
    run = make_run(folder, train={"steps": 6, "precision": precision})
    plan = make_plan(run, dist.get_world_size())
    return engine_config(plan, plan.student)


def plain(folder: Path, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def far_positions(folder: Path, device):
    """Distances of two bf16 models, ours as the teacher's engine runs it and transformers', from the fp32 one: the root mean
    square of logits past 2,048 tokens."""
    import deepspeed

    tokens = torch.randint(1, 128, (1, FAR), generator=torch.Generator().manual_seed(1))
    anatomy, config = inspect("model", str(folder / "far")), config_of(folder, "bf16")
    network = build_network(anatomy, ds_config=config, dtype=torch.bfloat16)
    engine = deepspeed.initialize(model=network.requires_grad_(False).eval(), config=config)[0]
    with gathered(engine.module.parameters()):
        ours = engine.module.lm_head(run_body(engine.module, anatomy, tokens))
    exact, theirs = (plain(folder / "far", t)(tokens, use_cache=False).logits for t in (torch.float32, torch.bfloat16))
    return {side: (z.float() - exact)[:, 2048:].square().mean().sqrt().item() for side, z in
            {"ours": ours, "theirs": theirs}.items()}  # fmt: skip
