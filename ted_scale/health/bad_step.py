"""What a step that went wrong looked like, tensor by tensor: RUN/reports/step_XXXXXXXX.json.

Every rank measures its own ZeRO-3 shards of gradient and fp32 weight, one gather brings them together, rank 0 writes. Call it
on all ranks between the gradient norm and the update: afterwards DeepSpeed has clipped some gradients in place. The
surprise: norm and max are those of the finite entries, and the others are counted, for else a group with one NaN would have
no number at all, and JSON knows none for it.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ted_scale.base.durable import write_durably
from ted_scale.checkpoints.folder import checkpoint_name
from ted_scale.checkpoints.progress import Progress
from ted_scale.distill.stages import Stage
from ted_scale.health.spikes import state_of
from ted_scale.models.zero import own_part
from ted_scale.ranks.agree import of_all_ranks

CHUNK = 1 << 22  # entries that are looked at together: in fp64 a whole shard may find no room


class Event(NamedTuple):
    """A step that began at `before`; `shares_RT` are all ranks' losses under their `names`."""

    before: Progress
    stage: Stage
    said: str
    norm: float
    names: list[str]
    shares_RT: torch.Tensor


class Tensors(NamedTuple):
    """Some parameters' gradients, or their weights, over all ranks."""

    norm: float
    max: float
    nonfinite: int


def write_report(engine, event: Event) -> str:
    """Returns what to say of it."""
    names, roles, looks = look(engine)
    firsts = {side: first_bad(names, looks[..., k, 2]) for k, side in enumerate(("gradient", "weight"))}
    path = place(event)
    bad = {side: first for side, first in firsts.items() if first}
    said = [f"the first {side} that is not finite is {b['tensor']} of rank {b['rank']}" for side, b in bad.items()]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            path.parent.mkdir(exist_ok=True)
            write_durably(path, json.dumps(as_dict(event, roles, looks, firsts), indent=1) + "\n")
        except OSError as error:  # what is told must not be lost with it
            return "; ".join([*said, f"no report ({path}: {error.strerror})"])
    return "; ".join([*said, f"report: {path}"])


def place(event: Event) -> Path:
    """Another one for the same step after every rewind."""
    rewinds = state_of(event.before).rewinds
    name = checkpoint_name(event.before.step + 1) + (f"_rewind_{rewinds}" if rewinds else "")
    return event.stage.run.folder / "reports" / f"{name}.json"


def look(engine) -> tuple[list[str], list[str], torch.Tensor]:
    """(names, roles, [ranks, tensors, gradient and weight, squares and max and nonfinite]) of what is trained."""
    zero = engine.optimizer
    groups = zip(zero.sub_group_to_group_id.values(), zero.fp16_groups, strict=True)
    role_of = {id(p): zero.param_groups[group]["role"] for group, params in groups for p in params}
    named = [(name, p) for name, p in engine.module.named_parameters() if id(p) in role_of]
    ours = torch.stack([look_at(p) for _, p in named])
    return [name for name, _ in named], [role_of[id(p)] for _, p in named], of_all_ranks(ours).cpu()


def look_at(parameter) -> torch.Tensor:
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad

    sides = (safe_get_local_grad(parameter), safe_get_local_fp32_param(parameter))
    return torch.stack([measure(own_part(parameter, side)) for side in sides])


def measure(values: torch.Tensor) -> torch.Tensor:
    """(sum of squares and largest magnitude of the finite entries, how many are not), fp64."""
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
    """In the model's order."""
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
        "what": event.said,
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
