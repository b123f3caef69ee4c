"""Where the frozen teacher lives: which ranks share its weights, and whether DeepSpeed has to gather them.

A placement changes no loss and is in no checkpoint, so it may be another one at every start. Note: every rank decides for itself
before the ranks meet, from the memory of its own machine; `agreed` is what holds.
"""

from dataclasses import replace
from typing import NamedTuple

from ted_scale.base.errors import UserError
from ted_scale.distill import memory
from ted_scale.ranks import capacity
from ted_scale.ranks.agree import gather

BY_ITSELF = ("replicated", "node", "sharded")  # what `auto` takes, fastest first
FASTEST_FIRST = (*BY_ITSELF, "offload")
# The share of a rank's memory that the estimate may take, which leaves out the process and what the allocator keeps: on CPUs
# resident peaks were up to 1.19 times as high as an earlier, larger estimate (docs/benchmarks.md).
ROOM = {"cpu": 0.8, "cuda": 0.9}
SAID = {
    "replicated": "whole on every rank", "node": "sharded by ZeRO-3 over the {ranks} ranks of a node",
    "sharded": "sharded by ZeRO-3 over all {ranks} ranks",
    "offload": "in every rank's host memory, and come to the device block by block",
}  # fmt: skip


class Placement(NamedTuple):
    way: str
    ranks: int  # that share one copy of the weights
    is_bare: bool  # a plain module without DeepSpeed's engine, because there is nobody to gather from
    why: str = "teacher.placement"

    def __str__(self) -> str:
        way = "replicated" if self.is_bare and self.way != "offload" else self.way
        return f"the teacher's weights are {SAID[way].format(ranks=self.ranks)} ({self.why})"


class Rank(NamedTuple):
    """What a rank has."""

    device: str  # "cpu" or "cuda"
    memory: float  # bytes
    local: int  # ranks of its node


def of_this_machine(world: int) -> Rank:
    local = capacity.local_ranks(world)
    return Rank(*capacity.of_a_rank(local), local)


def place(plan, rank: Rank) -> Placement | None:
    """As the run file says, or the fastest that fits."""
    if plan.teacher is None:
        return None
    wish, node = plan.run.teacher.placement, ranks_of_a_node(plan.run.teacher, plan.world, rank.local)
    if wish == "auto":
        return fastest_that_fits(plan, node, rank)
    if wish == "node" and plan.world % node:
        raise UserError(
            f"teacher.node_ranks must be set where nodes have different numbers of ranks, but this one has {node} of {plan.world}; "
            "set it to a number that divides both, or take teacher.placement = 'sharded'"
        )
    return placed(plan, wish, node)


def ranks_of_a_node(teacher, world: int, local: int) -> int:
    """As many as share the teacher with the way 'node': teacher.node_ranks, or those that the launcher started here."""
    if not teacher.node_ranks:
        return min(local, world)
    if world % teacher.node_ranks:
        raise UserError(
            f"teacher.node_ranks must divide the ranks ({world}), but is {teacher.node_ranks}; correct it, or leave it out for "
            "what the launcher started on this node"
        )
    return teacher.node_ranks


def placed(plan, way: str, node: int) -> Placement:
    """The way as numbers: how many ranks share the teacher, and whether it is bare, which is without an engine of DeepSpeed."""
    ranks = {"node": node, "sharded": plan.world}.get(way, 1)
    is_engine = way in ("node", "sharded") and (ranks > 1 or offloads_weights(plan.ds_config))
    return Placement(way, ranks, not is_engine)


def offloads_weights(ds_config: dict) -> bool:
    """Whether DeepSpeed keeps shards in the host's memory, those of a single rank, too."""
    return (ds_config["zero_optimization"].get("offload_param") or {}).get("device", "none") != "none"


def fastest_that_fits(plan, node: int, rank: Rank) -> Placement:
    """By the estimate of the stage that needs most. If none fits, the one that needs least; a teacher that must be whole is
    refused then, because no other place helps."""
    (device, has, _), needs = rank, {}
    for placement in candidates(plan, node):
        needs[placement] = needed(replace(plan, placement=placement), device)
        if needs[placement] <= usable(rank):
            break
    chosen = min(needs, key=needs.__getitem__)
    said = ", ".join(f"{placement.way} {size / 2**30:,.3g}" for placement, size in needs.items())
    if plan.run.teacher.is_whole and needs[chosen] > usable(rank):
        raise UserError(
            f"teacher.placement must be one that fits, but with teacher.{asked(plan.run.teacher)} only 'replicated' is possible, "
            f"which needs {needs[chosen] / 2**30:,.3g} GiB of {ROOM[device]:.0%} of {has / 2**30:,.3g} on {device}; leave "
            "teacher.precision and teacher.compile out, or overrule the estimate by teacher.placement = 'replicated'"
        )
    fits = "the fastest that fits" if needs[chosen] <= usable(rank) else "none fits, this one needs least"
    return chosen._replace(
        why=f"auto: {fits}; GiB needed of {ROOM[device]:.0%} of {has / 2**30:,.3g} on {device}: {said}"
    )


def asked(teacher) -> str:
    """What of the run file makes a teacher whole."""
    return f"precision = '{teacher.precision}'" if teacher.eight_bits else "compile = true"


def usable(rank: Rank) -> float:
    return ROOM[rank.device] * rank.memory


def candidates(plan, node: int) -> list[Placement]:
    """Without those that are another one under these ranks, and without `offload`: nobody knows what a host has to spare."""
    if plan.run.teacher.is_whole:
        return [placed(plan, "replicated", node)]
    nodes = ["node"] if 1 < node < plan.world and plan.world % node == 0 else []
    shares = ["sharded"] if plan.world > 1 or offloads_weights(plan.ds_config) else []
    return [placed(plan, way, node) for way in BY_ITSELF if way in ("replicated", *nodes, *shares)]


def needed(plan, device: str) -> float:
    return max(sum(memory.terms(plan, stage, device)[0].values()) for stage in plan.stages)


def needs_less(plan, on_cpu: bool) -> str | None:
    """The placement to take where this one does not fit after all."""
    placement = plan.placement
    if placement is None or placement.way == "offload" or plan.run.teacher.is_whole:
        return None
    if placement.way != "sharded" and plan.world > 1:
        return "sharded"
    return None if on_cpu else "offload"


def agreed(ours: Placement | None) -> Placement | None:
    """The most careful choice of all ranks: one of them may have less memory. A collective."""
    everyone = gather(ours)
    if ours is None:
        return None
    chosen = max(everyone, key=lambda placement: FASTEST_FIRST.index(placement.way))
    if len({placement.ranks for placement in everyone if placement.way == chosen.way}) > 1:
        raise UserError(
            "teacher.node_ranks must be set where nodes have different numbers of ranks, but is not; set it to a number that "
            "divides all of them, or take teacher.placement = 'sharded'"
        )
    return chosen
