"""Scenarios of students with adapters, run by ranks.py: each on every rank, with the folder of models and corpus."""

import shutil
from pathlib import Path

import torch.distributed as dist
from scenarios import TWO, put_back, start

from ted_scale import run as build
from ted_scale.health import replicas
from ted_scale.models.zero import gathered

LORA = {
    "student": {"gradient_checkpointing": True, "lora": {"rank": 4}},
    "filters": {"steps": 0},
    "train": {"steps": 4, "lr": 1e-2, **TWO},
    "checkpoint": {"every": 1, "keep": 9},
}


def frozen_digests(engine, device) -> list[int]:
    """Of what is frozen in the network, whole."""
    frozen = {name: p for name, p in engine.module.network.named_parameters() if not p.requires_grad}
    with gathered(frozen.values()):
        return replicas.digests(list(frozen.items()), device).tolist()


def adapters(folder: Path, device):
    """TED with adapters: the digests of the frozen weights before the first step and after the last; then again from the middle."""
    name, seen, ended = f"lora_{dist.get_world_size()}", [], build.end_stage

    def end(parts, stage, student, progress):
        seen.append(frozen_digests(student, device))
        return ended(parts, stage, student, progress)

    def built(*arguments, **named):
        student = make(*arguments, **named)
        seen.append(frozen_digests(student, device))
        return student

    make, build.build_student, build.end_stage = build.build_student, built, end
    try:
        start(folder, device, name=name, **LORA)
    finally:
        build.build_student, build.end_stage = make, ended
    if dist.get_rank() == 0:
        shutil.copytree(folder / "runs" / name, folder / "runs" / f"{name}_again")
        put_back(folder / "runs" / f"{name}_again", 2)
    dist.barrier()
    start(folder, device, name=f"{name}_again", **LORA)
    return seen


def adapters_on_others(folder: Path, device):
    """The run of two ranks goes on, on another number of ranks, from its second step."""
    name = f"lora_2_on_{dist.get_world_size()}"
    if dist.get_rank() == 0:
        shutil.copytree(folder / "runs" / "lora_2", folder / "runs" / name)
        put_back(folder / "runs" / name, 2)
    dist.barrier()
    start(folder, device, name=name, **LORA)
