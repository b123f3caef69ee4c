"""Filters as one safetensors file, from which stage II starts: the result of stage I, or without stage I the measured starts."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from ted_scale.base.durable import write_durably
from ted_scale.base.errors import UserError, files_at
from ted_scale.base.parsing import parse_json
from ted_scale.checkpoints.attempts import attempt_write, give_up
from ted_scale.config import changes
from ted_scale.models.weights import load_file
from ted_scale.models.zero import gathered
from ted_scale.ranks.agree import broadcast
from ted_scale.storage import tensor_file


def filter_tensors(sides: dict) -> dict[str, torch.nn.Parameter]:
    """Name → parameter of the filters of `sides` ({"student": filters_s, …}). Stage I's own heads are left out."""
    named = {f"{side}.{name}": p for side, filters in sides.items() for name, p in filters.named_parameters()}
    return {name: p for name, p in named.items() if not name.rpartition(".")[2].startswith("head_")}


def gather_filters(sides: dict) -> dict[str, torch.Tensor]:
    """The filters in fp32, on rank 0. A collective."""
    tensors = {}
    for name, parameter in filter_tensors(sides).items():
        value = full_precision(parameter)
        if dist.get_rank() == 0:
            tensors[name] = value.to("cpu", copy=True).contiguous()
    return tensors


def full_precision(parameter) -> torch.Tensor:
    """The whole tensor, on every rank: the fp32 master if it is trained here, else the weight itself. A collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(parameter)
    if master is not None:
        return master
    with gathered([parameter]):
        return parameter.detach().float().clone()


def save_filters(path: Path, tensors: dict, identity: dict) -> None:
    """Write the file on rank 0. A collective: all ranks raise if the write fails."""
    failure = None
    if dist.get_rank() == 0:
        failure, _ = attempt_write(path, write_filters, path, tensors, identity)
    if failure := broadcast(failure):
        give_up(failure)


def write_filters(path: Path, tensors: dict, identity: dict) -> None:
    write_durably(path, tensor_file.as_bytes(tensors, {"identity": json.dumps(identity)}))


def load_filters(path: Path, sides: dict) -> None:
    """Fill the filters from the file. Every rank reads only its own part."""
    targets = filter_tensors(sides)
    missing = targets.keys() - {at.name for at in load_file(path, targets)}
    if missing:
        raise UserError(f"{path} must hold every filter of this run, but {min(missing)} is missing; run stage I again")


def check_filters(path: Path, identity: dict) -> None:
    """Refuse `filters.from` unless it names a run whose stage I is done and whose filters fit this run."""
    with files_at(path):
        is_there = path.is_file()
    if not is_there:
        raise UserError(f"filters.from must name a run folder whose stage I is done, but {path} does not exist")
    try:
        written = dict(parse_json(tensor_file.header_of(path).about["identity"]))
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"filters.from must name filters that this project wrote, but {path} is not: {error}") from None
    changes.refuse_other_filters(path, written, identity)
