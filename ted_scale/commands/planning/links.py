"""What ranks receive from each other in a second, and how much of it hides behind a pass: a calibration's probes, and what follows.

Blocks are gathered one after the other, as ZeRO-3 does it. Note: a single small message says little. A network lets its first bytes
pass faster than it goes on (a queue that was empty), or slower (TCP begins slowly after a pause).
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from ted_scale.commands.planning.probes import BLOCKS, dtype_of
from ted_scale.forecast.traffic import RECEIVED
from ted_scale.plan import Plan


def side_of(plan: Plan) -> str:
    """Whose blocks are gathered."""
    return "teacher" if plan.teacher else "student"


def gathers(plan: Plan) -> int:
    """One is asked for before the first block, and one by each block that runs."""
    return min(BLOCKS, getattr(plan, side_of(plan)).layers) + 1


def probes(plan: Plan, device, blocks: Callable) -> dict[str, Callable]:
    """`blocks(before)` runs those of this side forward, and calls `before` in front of each."""
    world, a = dist.get_world_size(), getattr(plan, side_of(plan))
    shard = torch.ones(a.block_parameters // world + 1, device=device, dtype=dtype_of(plan))
    whole = torch.ones(world * len(shard), device=device, dtype=shard.dtype)
    mine = torch.ones(plan.student.block_parameters // world + 1, device=device)
    sums = torch.ones(world * len(mine), device=device)
    one, few = torch.ones(1, device=device), torch.ones(world, device=device)

    def ask():
        return dist.all_gather_into_tensor(whole, shard, async_op=True)

    def beside():
        asked = [ask()]

        def next_one():
            asked.pop().wait()
            asked.append(ask())

        blocks(next_one)
        asked.pop().wait()

    return {
        "gathers": lambda: [ask().wait() for _ in range(gathers(plan))],
        "gathers beside blocks": beside,
        "reductions": lambda: [dist.reduce_scatter_tensor(mine, sums) for _ in range(BLOCKS)],
        "latency": lambda: dist.all_gather_into_tensor(few, one),
    }


def rate(plan: Plan, world: int, took: dict[str, float], device: str) -> float:
    """Bytes that a rank receives a second, without what every collective waits for."""
    of_one, share = (lambda n, b: b * world * (n // world + 1)), 1 - 1 / world
    gathered = gathers(plan) * of_one(getattr(plan, side_of(plan)).block_parameters, dtype_of(plan).itemsize)
    reduced = BLOCKS * RECEIVED[device] * of_one(plan.student.block_parameters, 4)
    waited = (gathers(plan) + BLOCKS) * took["latency"]
    return share * (gathered + reduced) / max(took["gathers"] + took["reductions"] - waited, 1e-9)


def overlap(plan: Plan, took: dict[str, float]) -> float:
    """The share of the shorter one, gathers or pass, that the other one hides."""
    sent, ran = took["gathers"], took[f"{side_of(plan)} blocks"]
    return min(1.0, max(0.0, (sent + ran - took["gathers beside blocks"]) / min(sent, ran)))
