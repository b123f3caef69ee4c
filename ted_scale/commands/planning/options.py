"""The ways to run a run file on given GPUs: every placement of the teacher, micro-batches, checkpointing or not.

Note: a way is a plan like any other, so what is said about it is what a run would log about itself.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from ted_scale.base.errors import UserError
from ted_scale.config.ds_config import load_ds_config
from ted_scale.config.run import Run
from ted_scale.distill import memory
from ted_scale.distill.stages import stages_of
from ted_scale.forecast import summary
from ted_scale.forecast.machine import Machine
from ted_scale.forecast.placement import (
    FASTEST_FIRST,
    Placement,
    Rank,
    candidates,
    place,
    placed,
    ranks_of_a_node,
    usable,
)
from ted_scale.forecast.summary import Forecast
from ted_scale.micro_batches import derive_accumulation
from ted_scale.models import quantized
from ted_scale.models.ulysses import groups_of
from ted_scale.plan import Plan, plan_of_models

WHOLE_STUDENT = "ds_configs/zero3_whole_student.json"
BITS = "int8"  # of fp8 the memory is the same but for a byte a row
MOST = 64  # rows of a micro-batch that are tried


class Cluster(NamedTuple):
    machine: Machine
    gpus: int
    per_node: int

    @property
    def rank(self) -> Rank:
        return Rank(self.machine.device, self.machine.memory, self.per_node)


class Option(NamedTuple):
    plan: Plan
    way: str  # of the teacher's placement; "" without a teacher
    needs: dict[str, float]  # bytes by term of the stage that needs most
    away: float  # bytes in the host's memory
    forecasts: dict[str, Forecast]  # by stage
    fits: bool

    @property
    def days(self) -> float:
        return sum(found.days for found in self.forecasts.values())

    @property
    def main(self) -> Forecast:
        return list(self.forecasts.values())[-1]


def check(cluster: Cluster) -> None:
    if cluster.gpus > cluster.per_node and cluster.gpus % cluster.per_node:
        raise UserError(
            f"--per-node must divide --gpus ({cluster.gpus}), but is {cluster.per_node}; every node must have as many ranks"
        )


def base(run: Run) -> Plan:
    """The models are looked at once; what else a way changes follows from the run file."""
    fewest = run.data.sequence_parallel
    return plan_of_models(changed(run, 1, run.student.gradient_checkpointing), fewest, needs_weights=False)


def varied(plan: Plan, gpus: int, micro_batch: int, checkpointing: bool) -> Plan:
    run = changed(plan.run, micro_batch, checkpointing)
    return replace(plan, run=run, world=gpus, accumulation=derive_accumulation(run, gpus), stages=stages_of(run))


def as_written(plan: Plan, run: Run, cluster: Cluster, *, checkpointing: bool | None = None) -> Option:
    """With another checkpointing if that is given."""
    chosen = run.student.gradient_checkpointing if checkpointing is None else checkpointing
    plan = varied(plan, cluster.gpus, run.train.micro_batch, chosen)
    return option(replace(plan, placement=place_of(plan, cluster)), cluster)


def place_of(plan: Plan, cluster: Cluster) -> Placement | None:
    """As a run would choose it. One that must be whole and does not fit would not start: here its page says so."""
    node = ranks_of_a_node(plan.run.teacher, plan.world, cluster.per_node) if plan.teacher else 1
    if plan.teacher and plan.run.teacher.is_whole:
        return placed(plan, "replicated", node)
    return place(plan, cluster.rank)


def option(plan: Plan, cluster: Cluster) -> Option:
    worst = max(plan.stages, key=lambda stage: sum(memory.terms(plan, stage, cluster.machine.device)[0].values()))
    needs, away = memory.terms(plan, worst, cluster.machine.device)
    local = min(cluster.per_node, cluster.gpus)
    forecasts = {stage.name: summary.of_stage(plan, stage, cluster.machine, local) for stage in plan.stages}
    fits = sum(needs.values()) <= usable(cluster.rank)
    return Option(plan, plan.placement.way if plan.placement else "", needs, away, forecasts, fits)


def placements(plan: Plan, cluster: Cluster) -> list[Option]:
    """Every placement that is another one on these ranks, with all else as in the plan."""
    if plan.teacher is None:
        return [option(plan, cluster)]
    node = ranks_of_a_node(plan.run.teacher, plan.world, cluster.per_node)
    ways = {placement.way for placement in candidates(plan, node)}
    ways |= set() if plan.run.teacher.is_whole else {"offload"}
    return [option(replace(plan, placement=placed(plan, way, node)), cluster) for way in FASTEST_FIRST if way in ways]


def in_8_bits(plan: Plan, cluster: Cluster) -> Option | None:
    """With the teacher whole on every rank in 8 bits; None where it is so anyway, or has no matrices that may be rounded."""
    teacher = plan.run.teacher
    if plan.teacher is None or teacher.is_whole or not quantized.counts(plan.teacher, BITS).matrices:
        return None
    of_8_bits = teacher.model_copy(update={"precision": BITS, "placement": "replicated"})
    run = plan.run.model_copy(update={"teacher": of_8_bits})
    return option(replace(plan, run=run, placement=placed(plan, "replicated", 1)), cluster)


def changed(run: Run, micro_batch: int, checkpointing: bool) -> Run:
    train = run.train.model_copy(update={"micro_batch": micro_batch})
    student = run.student.model_copy(update={"gradient_checkpointing": checkpointing})
    return run.model_copy(update={"train": train, "student": student})


def micro_batches(run: Run, gpus: int) -> list[int]:
    """Those that divide a step: powers of two, and what the run file says."""
    rows = run.train.tokens_per_step // run.data.seq_len
    asked = {1 << power for power in range(MOST.bit_length())} | {run.train.micro_batch}
    return sorted(size for size in asked if size <= MOST and rows % (size * groups_of(run, gpus)) == 0)


def every_way(plan: Plan, run: Run, cluster: Cluster) -> Iterator[Option]:
    for checkpointing in (False, True):
        for size in micro_batches(run, cluster.gpus):
            yield from placements(varied(plan, cluster.gpus, size, checkpointing), cluster)


def best(plan: Plan, run: Run, cluster: Cluster) -> Option | None:
    """The fastest way that fits."""
    every = (one for shared in sharings(plan) for one in every_way(shared, run, cluster))
    return fastest(one for one in every if one.fits and is_advised(one))


def sharings(plan: Plan) -> list[Plan]:
    """As written, and with the student whole on every rank, its gradients reduced once a step, and both: what is sent in a step
    against memory. A ds_config of the user's own stays."""
    run, found = plan.run, []
    configs = [run.ds_config, *([WHOLE_STUDENT] if run.ds_config == Run.model_fields["ds_config"].default else [])]
    for config in configs:
        for once in sorted({run.train.reduce_once, True}):
            train = run.train.model_copy(update={"reduce_once": once})
            other = run.model_copy(update={"ds_config": config, "train": train})
            found.append(replace(plan, run=other, ds_config=load_ds_config(config)))
    return found


def fastest(found: Iterable[Option]) -> Option | None:
    """Of equally fast ones that without checkpointing, with the smaller micro-batch."""
    return min(found, key=lambda one: float(f"{one.days:.4g}"), default=None)


def is_advised(one: Option) -> bool:
    """Nobody knows what a host has to spare, so that `offload` must be asked for."""
    return one.way != "offload" or one.plan.run.teacher.placement == "offload"
