"""Scenarios of students with adapters, run by ranks.py: each on every rank, with the folder of models and corpus."""

import json
import shutil
from pathlib import Path

import torch.distributed as dist
from places import ROOT
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
        return replicas.digests(frozen, device).tolist()


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
        go_on(folder, device, name, f"{name}_again")
    finally:
        build.build_student, build.end_stage = make, ended
    if dist.get_rank() == 0:  # of each number of ranks, for the file of a scenario is of its last launch
        (folder / f"digests_{name}.json").write_text(json.dumps(seen))


def go_on(folder: Path, device, name: str, again: str) -> None:
    """A copy of the run goes on from its second step."""
    if dist.get_rank() == 0:
        shutil.copytree(folder / "runs" / name, folder / "runs" / again)
        put_back(folder / "runs" / again, 2)
    dist.barrier()
    start(folder, device, name=again, **LORA)


def adapters_on_others(folder: Path, device):
    """The run of two ranks, on another number of ranks."""
    go_on(folder, device, "lora_2", f"lora_2_on_{dist.get_world_size()}")


def adapters_beside_a_whole_student(folder: Path, device):
    """The same run where every rank keeps all weights, and gradients are reduced once a step."""
    ds_config = str(ROOT / "ds_configs" / "zero3_whole_student.json")
    start(
        folder,
        device,
        name="lora_whole",
        ds_config=ds_config,
        **LORA | {"train": {**LORA["train"], "reduce_once": True}},
    )


def merged(folder: Path, device):
    """A run that begins with what the export makes of the run of two ranks, and validates it first."""
    from ted_scale.commands.export_hf import main

    main([str(folder / "runs" / "lora_2"), str(folder / "merged"), "--adapters"])
    student = {"student": {"path": str(folder / "merged")}}
    start(folder, device, name="from_merged", method="ce", **student, train={"steps": 1, **TWO})
