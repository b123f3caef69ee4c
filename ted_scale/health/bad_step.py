"""The report of a bad step, tensor by tensor: RUN/reports/step_XXXXXXXX.json.

Every rank measures its own ZeRO-3 shards of gradients and fp32 weights. One gather collects the results, and rank 0 writes. Call
it on all ranks after the gradient norm and before the update, because in the update DeepSpeed clips gradients in place. Note:
norm and max cover the finite entries only, and the other entries are counted. Otherwise one NaN would leave a whole group without
a number, and JSON has no NaN.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ted_scale.base.beneath import make_folder
from ted_scale.base.durable import write_durably
from ted_scale.checkpoints.folder import checkpoint_name
from ted_scale.checkpoints.progress import Progress
from ted_scale.distill.stages import Stage
from ted_scale.health.spikes import state_of
from ted_scale.models.zero import without_padding
from ted_scale.ranks.agree import of_all_ranks

CHUNK = 1 << 22  # entries in one piece: a whole shard in fp64 may not fit into memory


class Event(NamedTuple):
    """A bad step. `before` is the progress before it; `shares_RT` are the losses of all ranks, with their `names`."""

    before: Progress
    stage: Stage
    fault: str
    norm: float
    names: list[str]
    shares_RT: torch.Tensor


class Tensors(NamedTuple):
    """The gradients or the weights of some parameters, over all ranks."""

    norm: float
    max: float
    nonfinite: int


def write_report(engine, event: Event) -> str:
    """Write the report; return what to log about it."""
    names, roles, looks = look(engine)
    firsts = {side: first_bad(names, looks[..., k, 2]) for k, side in enumerate(("gradient", "weight"))}
    path = place(event)
    bad = {side: first for side, first in firsts.items() if first}
    found = [f"the first {side} that is not finite is {b['tensor']} of rank {b['rank']}" for side, b in bad.items()]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            make_folder(path.parent)
            write_durably(path, json.dumps(as_dict(event, roles, looks, firsts), indent=1) + "\n")
        except OSError as error:  # the fault must be logged even without a report
            return "; ".join([*found, f"no report ({path}: {error.strerror})"])
    return "; ".join([*found, f"report: {path}"])


def place(event: Event) -> Path:
    """The report's path. If a run goes back and repeats the step, the step gets another report."""
    rewinds = state_of(event.before).rewinds
    name = checkpoint_name(event.before.step + 1) + (f"_rewind_{rewinds}" if rewinds else "")
    return event.stage.run.folder / "reports" / f"{name}.json"


def look(engine) -> tuple[list[str], list[str], torch.Tensor]:
    """(names, roles, numbers) of all trained parameters. The numbers have the shape [ranks, tensors, gradient and weight, 3]; the
    last dimension is sum of squares, max and count of nonfinite entries."""
    zero = engine.optimizer
    groups = zip(zero.sub_group_to_group_id.values(), zero.fp16_groups, strict=True)
    role_of = {id(p): zero.param_groups[group]["role"] for group, params in groups for p in params}
    named = [(name, p) for name, p in engine.module.named_parameters() if id(p) in role_of]
    ours = torch.stack([look_at(p) for _, p in named])
    return [name for name, _ in named], [role_of[id(p)] for _, p in named], of_all_ranks(ours).cpu()


def look_at(parameter) -> torch.Tensor:
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad

    sides = (safe_get_local_grad(parameter), safe_get_local_fp32_param(parameter))
    return torch.stack([measure(without_padding(parameter, side)) for side in sides])


def measure(values: torch.Tensor) -> torch.Tensor:
    """(sum of squares of the finite entries, their largest magnitude, number of nonfinite entries), in fp64."""
    total = torch.zeros(3, dtype=torch.float64, device=values.device)
    for part in values.detach().split(CHUNK):
        finite = part.isfinite()
        size = torch.where(finite, part, 0).double().abs()
        if len(part):
            total[0] += size.square().sum()
            total[1] = torch.maximum(total[1], size.max())
            total[2] += (~finite).sum()
    return total


def first_bad(names: list[str], nonfinite_RP: torch.Tensor) -> dict | None:
    """The first tensor, in the order of the model, that has a nonfinite entry on some rank."""
    for name, counts in zip(names, nonfinite_RP.T.tolist(), strict=True):
        for rank, count in enumerate(counts):
            if count:
                return {"tensor": name, "rank": rank}
    return None


def as_dict(event: Event, roles: list[str], looks: torch.Tensor, firsts: dict) -> dict:
    before, run = event.before, event.stage.run
    groups = {role: [k for k, other in enumerate(roles) if other == role] for role in dict.fromkeys(roles)}
    of_ranks = enumerate(event.shares_RT.tolist())
    rows = [{"rank": r, **dict(zip(event.names, map(number, row), strict=True))} for r, row in of_ranks]
    return {
        "step": before.step + 1,
        "stage": event.stage.name,
        "what": event.fault,
        "samples": {"first": before.samples, "count": event.stage.samples_per_step},
        "losses": rows,
        "grad_norm": number(event.norm),
        "clip": run.train.clip,
        "first_nonfinite": firsts,
        "groups": {role: summary(looks[:, which]) for role, which in groups.items()},
    }


def summary(looks_RPSV: torch.Tensor) -> dict:
    squares, largest, nonfinite = looks_RPSV.unbind(-1)
    sides = {
        side: Tensors(squares[..., k].sum().sqrt().item(), largest[..., k].max().item(), int(nonfinite[..., k].sum()))
        for k, side in enumerate(("gradient", "weight"))
    }
    return {"tensors": looks_RPSV.shape[1], **{side: values._asdict() for side, values in sides.items()}}


def number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
