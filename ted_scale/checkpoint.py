"""Save and load the student's engine, every rank its own shards; the frozen teacher is never saved.

A rank that cannot write must not leave the others in a collective: failures are recorded, agreed on, and only then is
the checkpoint published or thrown away. What stands in a checkpoint's folder, and which is newest:
checkpoint_files.py.
"""

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from ted_scale import checkpoint_files as files
from ted_scale.checkpoint_files import PART, Progress
from ted_scale.errors import UserError
from ted_scale.zero import gathered, load_file

log = logging.getLogger("ted_scale")


def save(engine, folder: Path, progress: Progress, *, keep: int, filters_file: Path | None) -> Path:
    """Write a checkpoint of this step; `latest` names it only when all of it is on disk."""
    part = files.checkpoints_of(folder) / (files.checkpoint_name(progress.step) + PART)
    failures: list[Exception] = []
    writer = engine.checkpoint_engine
    write = writer.save
    writer.save = partial(recorded, failures, write)
    engine._copy_recovery_script = lambda *_: None  # a script beside the shards, and one more way to fail
    try:
        attempt(failures, dist.get_rank() == 0, start_part, part)
        engine.save_checkpoint(str(part.parent), tag=part.name, save_latest=False, exclude_frozen_parameters=True)
        attempt(failures, dist.get_rank() == 0, finish_part, part, progress, filters_file)
    finally:
        writer.save = write
    agree(failures, part)
    attempt(failures, dist.get_rank() == 0, files.publish, part)
    agree(failures, part)
    if dist.get_rank() == 0:
        files.prune(folder, keep)
    return part.with_name(part.name.removesuffix(PART))


def recorded(failures: list, action, *arguments, **named) -> None:
    try:
        action(*arguments, **named)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        failures.append(error)


def attempt(failures: list, mine: bool, action, *arguments) -> None:
    """Run `action` where it is this rank's to run, unless something failed before; nobody passes before it is done."""
    if mine and not failures:
        recorded(failures, action, *arguments)
    dist.barrier()


def start_part(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def finish_part(part: Path, progress: Progress, filters_file: Path | None) -> None:
    if filters_file and filters_file.exists():
        files.link_or_copy(filters_file, part / filters_file.name)
    files.write_progress(part, progress)


def agree(failures: list, part: Path) -> None:
    """All ranks go on, or all leave with the first rank's sentence and without the unfinished checkpoint."""
    sentences = [None] * dist.get_world_size()
    dist.all_gather_object(sentences, str(failures[0]).splitlines()[0] if failures else None)
    bad = [(rank, sentence) for rank, sentence in enumerate(sentences) if sentence]
    if not bad:
        return
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
    rank, sentence = bad[0]
    free = shutil.disk_usage(part.parent).free / 2**30
    raise UserError(
        f"{part.parent} must have room for a checkpoint, but rank {rank} could not write {part.name.removesuffix(PART)}: "
        f"{sentence} ({free:.1f} GiB free); the previous checkpoint is intact: free space and start the same command again"
    )


def load(engine, checkpoint: Path) -> None:
    """Weights, fp32 masters and optimizer moments of this rank's shards; rates and the like stay the run file's."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    engine.load_checkpoint(
        str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False, load_lr_scheduler_states=False
    )
    for group, ours in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(ours)  # DeepSpeed restores whole groups, so that a changed train.lr would be ignored in silence


def filter_tensors(sides: dict) -> dict[str, torch.nn.Parameter]:
    """Name → parameter of the filters of `sides` ({"student": filters_s, …}); stage I's heads are thrown away."""
    named = {f"{side}.{name}": p for side, filters in sides.items() for name, p in filters.named_parameters()}
    return {name: p for name, p in named.items() if not name.rpartition(".")[2].startswith("head_")}


def save_filters(path: Path, sides: dict, identity: dict) -> None:
    """Stage I's result as one safetensors file in fp32; every rank takes part, rank 0 writes."""
    tensors = {}
    for name, parameter in filter_tensors(sides).items():
        value = full_precision(parameter)
        if dist.get_rank() == 0:
            tensors[name] = value.to("cpu", copy=True).contiguous()
    failures: list[Exception] = []
    attempt(failures, dist.get_rank() == 0, write_filters, path, tensors, identity)
    agree(failures, path)


def full_precision(parameter) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(parameter)
    if master is not None:
        return master
    with gathered([parameter]):
        return parameter.detach().float().clone()


def write_filters(path: Path, tensors: dict, identity: dict) -> None:
    part = path.with_name(path.name + PART)
    try:
        save_file(tensors, part, metadata={"identity": json.dumps(identity)})
    except SafetensorError as error:  # a full disk, as a kind that `recorded` does not know
        raise OSError(str(error)) from None
    part.chmod(0o644)  # the library makes it readable to its owner only; other runs read it
    part.rename(path)


def load_filters(path: Path, sides: dict) -> None:
    """Fill the filters with stage I's; every rank reads its own part."""
    targets = filter_tensors(sides)
    missing = targets.keys() - load_file(path, targets)
    if missing:
        raise UserError(f"{path} must hold every filter of this run, but {min(missing)} is missing; run stage I again")
