"""Scenarios of ranks.py about what a micro-step asks of the device and of the network."""

import contextlib
import functools
import gc
import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from counting import as_on_cuda
from scenarios import start
from tiny import make_model

from ted_scale.metrics.metrics import Metrics
from ted_scale.models import zero_hooks

MICRO_STEPS = 2
WAYS = ("sharded", "replicated", "node", "offload")


def deep(folder: Path, blocks: int, placement: str = "sharded", **sizes) -> dict:
    """Sections of a run whose student and teacher have `blocks` blocks each, all of them matched."""
    if dist.get_rank() == 0:
        make_model(folder / f"deep_{blocks}", "llama", num_hidden_layers=blocks, **sizes)
        nothing_kept = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
        (folder / "nothing_kept.json").write_text(json.dumps({"zero_optimization": nothing_kept}))
    dist.barrier()
    path = {"path": str(folder / f"deep_{blocks}")}
    train = {"tokens_per_step": 32 * dist.get_world_size() * MICRO_STEPS, "steps": 3}
    return {"teacher": {**path, "placement": placement}, "student": path, "train": train, "filters": {"steps": 3}}


def traffic(folder: Path, device):
    """Counts of each optimizer step: with 4 pairs, also beside a teacher that every rank has whole, and with 16 where no weight
    stays whole until backward."""
    return {
        "4": traffic_of(folder, device, "4", **deep(folder, 4)),
        "replicated": traffic_of(folder, device, "replicated", **deep(folder, 4, placement="replicated")),
        "tied": traffic_of(folder, device, "tied", **deep(folder, 2, tie_word_embeddings=True), method="kd"),
        "once": traffic_of(folder, device, "once", **whole_student(folder)),
        "16": traffic_of(folder, device, "16", **deep(folder, 16), ds_config=str(folder / "nothing_kept.json")),
    }


def whole_student(folder: Path) -> dict:
    """It is gathered once a step, after its update, and its gradients are reduced once."""
    sections = deep(folder, 4, placement="replicated")
    sections["train"]["reduce_once"] = True
    return {**sections, "ds_config": str(Path(__file__).parents[2] / "ds_configs" / "zero3_whole_student.json")}


def placements(folder: Path, device):
    """Counts of each optimizer step on four ranks, which are two nodes of two, with the teacher in every place."""
    return {way: traffic_of(folder, device, f"at_{way}", **short(folder, way)) for way in WAYS}


def short(folder: Path, way: str) -> dict:
    sections = deep(folder, 2, placement=way, tie_word_embeddings=True)
    sections["teacher"]["node_ranks"] = 2
    return {**sections, "train": {**sections["train"], "steps": 3}, "filters": {"steps": 2}}


def traffic_of(folder: Path, device, name: str, **sections) -> list[dict]:
    steps: list[dict] = []

    def add(self, *arguments, **named):
        steps.append(asdict(counts))
        counts.clear()
        return Metrics_add(self, *arguments, **named)

    Metrics_add, Metrics.add = Metrics.add, add
    try:
        with as_on_cuda() as counts:
            start(folder, device, name=f"traffic_{name}", **sections)
    finally:
        Metrics.add = Metrics_add
    return steps


def stage_two_memory(folder: Path, device):
    """Bytes of tensors that live in stage II, beyond what lived before the run: after stage I in the same process, and
    alone."""
    filters = {"from": str(folder / "runs/after_filters")}
    after = bytes_in_stage_two(folder, device, name="after_filters", **deep(folder, 4))
    return after, bytes_in_stage_two(folder, device, name="alone", **{**deep(folder, 4), "filters": filters})


def bytes_in_stage_two(folder: Path, device, **sections) -> int:
    before, seen = bytes_alive(), []

    def add(self, progress, values, **named):
        if "loss/ce" in values:
            seen.append(bytes_alive() - before)
        return Metrics_add(self, progress, values, **named)

    Metrics_add, Metrics.add = Metrics.add, add
    try:
        start(folder, device, **sections)
    finally:
        Metrics.add = Metrics_add
    return seen[2]


def bytes_alive() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def blocks_compiled(folder: Path, device) -> dict:
    """Compiled blocks, whose activations are computed again or kept: how many weights are released before a backward, and how
    many of these are still in memory when it begins; and the number of graphs. Traced and cut as for a GPU, but without a
    compiler of C++."""
    sections = {**deep(folder, 4), "ds_config": str(folder / "nothing_kept.json"), "fused_blocks": "compile"}
    sections |= {"filters": {"steps": 1}, "train": {**sections["train"], "steps": 2}}
    paths = {"student": sections["student"] | {"gradient_checkpointing": True}}
    compiler, held = torch.compile, {}
    torch.compile = functools.partial(compiler, backend="aot_eager_decomp_partition")
    try:
        for name, more in (("compiled", {}), ("compiled_again", paths)):
            with watched_releases() as counts:
                start(folder, device, name=name, **{**sections, **more})
            held[name] = [max(column) for column in zip(*counts, strict=True)]
    finally:
        torch.compile = compiler
    start(folder, device, name="not_compiled", **{**sections, "fused_blocks": "off"})
    return held | {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


@contextlib.contextmanager
def watched_releases():
    """Before each backward: (weights released since the one before, those whose memory is still held)."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
    from torch.multiprocessing.reductions import StorageWeakRef

    zero_hooks.patch_deepspeed()
    released, counts = [], []
    name = "_PartitionedParameterCoordinator__release_param"
    release, backward = getattr(Coordinator, name), DeepSpeedEngine.backward

    def noting(coordinator, weight, free_data=True):
        if weight.numel():
            released.append(StorageWeakRef(weight.untyped_storage()))
        release(coordinator, weight, free_data)

    def counting(engine, *arguments, **named):
        counts.append((len(released), sum(not storage.expired() for storage in released)))
        released.clear()
        return backward(engine, *arguments, **named)

    setattr(Coordinator, name, noting)
    DeepSpeedEngine.backward = counting
    try:
        yield counts
    finally:
        setattr(Coordinator, name, release)
        DeepSpeedEngine.backward = backward
