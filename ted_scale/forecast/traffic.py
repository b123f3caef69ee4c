"""The bytes that ranks send each other in a micro-step, by part, and how long a link takes for them.

ZeRO-3 gathers each weight where it is used and reduces each gradient once. Note: in the ring of a collective every rank receives
all parts but its own, and each node receives those of all other nodes once, over its whole network.
"""

import math
from typing import NamedTuple

from ted_scale.distill.memory import filters_by_place, keeps_student_whole
from ted_scale.forecast.machine import Machine
from ted_scale.models.engine_config import setting

# What ranks receive in a reduction, in units of what its ring receives: gloo's reduce-scatter moves as much as its all-reduce.
RECEIVED = {"cpu": 2, "cuda": 1}


class Sent(NamedTuple):
    """Traffic of one part: bytes of whole tensors, number of collectives, ranks in the group."""

    bytes: float
    calls: int
    ranks: int


def teacher_gathers(plan, b: int) -> Sent:
    """Of one forward; nothing where a rank has it whole."""
    a, shared = plan.teacher, plan.placement
    if shared is None or shared.is_bare:
        return Sent(0, 0, 1)
    return Sent(b * a.parameters, a.layers + 2, shared.ranks)


def student_gathers(plan, stage, b: int, device: str) -> Sent:
    """Forward and backward. Up to `stage3_max_live_parameters` stay whole in between. A frozen body is only run forward; filters
    that ranks share are gathered with the body. What always stays whole is gathered anew after an update."""
    a, (filters, _) = plan.student, filters_by_place(plan, stage)
    if keeps_student_whole(plan, device):
        return Sent(
            b * (a.parameters + filters) / plan.accumulation, math.ceil((a.layers + 2) / plan.accumulation), plan.world
        )
    live = (
        a.parameters if stage.learns_filters else min(a.parameters, setting(plan, "stage3_max_live_parameters", device))
    )
    again = a.parameters - live
    return Sent(b * (a.parameters + again + filters), a.layers + 2 + round(a.layers * again / a.parameters), plan.world)


def reduction(plan, stage, trained: float, device: str) -> Sent:
    """fp32, once a micro-step or step: small gradients by the bucket, large ones alone."""
    calls = math.ceil(trained / setting(plan, "reduce_bucket_size", device)) + 1
    share = 1 / plan.accumulation if plan.run.train.reduce_once else 1
    width = 2 if plan.ds_config.get("communication_data_type") in ("bf16", "bfp16", "fp16") else 4
    return Sent(width * trained * share, math.ceil(calls * share), plan.world)


def as_received(reduced: Sent, device: str) -> Sent:
    return reduced._replace(bytes=RECEIVED[device] * reduced.bytes)


def seconds(sent: Sent, machine: Machine, local: int) -> float:
    """The slower of a node's links and its network, and a delay that grows with the depth of a tree of the ranks."""
    if sent.ranks <= 1 or not sent.bytes:
        return 0.0
    inside = min(local, sent.ranks)
    nodes = sent.ranks / inside
    within = sent.bytes * (1 - 1 / inside) / machine.node_link
    across = sent.bytes * (1 - 1 / nodes) / (inside * machine.far_link)
    return max(within, across) + sent.calls * machine.latency * math.log2(sent.ranks)
