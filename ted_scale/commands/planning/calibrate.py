"""Measures a machine with a run's shapes: blocks of both models, their products and attention alone, losses, updates, links.

Every probe takes its turn in each round, so that a machine that is busy for a while slows all of them. Note: element-wise work
has no probe of its own. It is what a block's time leaves after its products and its attention.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ted_scale.commands.planning import links, probes
from ted_scale.commands.planning.probes import BLOCKS, CALLS, UPDATED, dtype_of
from ted_scale.config.run import Run
from ted_scale.distill import flops
from ted_scale.distill.memory import tokens_of
from ted_scale.forecast import machine as machines
from ted_scale.forecast.machine import Machine
from ted_scale.forecast.work import passes
from ted_scale.models.anatomy import Anatomy
from ted_scale.plan import Plan, plan_of_models
from ted_scale.ranks import capacity

UPDATE_BYTES = 28  # a parameter: weight and moments read and written, a gradient read
WARM_UP = 2  # rounds that do not count
LEAST = 3  # rounds that count


def measure_and_keep(run: Run, path: Path, minutes: float) -> None:
    from ted_scale.ranks.group import start_ranks

    device = start_ranks()
    plan = plan_of_models(with_whole_rows(run, dist.get_world_size()), dist.get_world_size(), needs_weights=False)
    found = machine_from(plan, device, rounds(actions(plan, device), device, 60 * minutes))
    if dist.get_rank() == 0:
        machines.write(path, found)
        print("\n".join([*lines(found), f"kept in {path}"]))
    dist.barrier()
    dist.destroy_process_group()


def actions(plan: Plan, device) -> dict[str, Callable]:
    """All probes, by name. Ranks that are several have links."""
    found = probes.probes(plan, device)
    several = dist.get_world_size() > 1
    return found | (links.probes(plan, device, found[f"{links.side_of(plan)} blocks"]) if several else {})


def with_whole_rows(run: Run, world: int) -> Run:
    """A rate does not depend on who computes it. Every rank then has rows of its own, which the step may not have."""
    if run.data.sequence_parallel == 1:
        return run
    data = run.data.model_copy(update={"sequence_parallel": 1})
    train = run.train.model_copy(update={"tokens_per_step": run.train.micro_batch * data.seq_len * world})
    return run.model_copy(update={"data": data, "train": train})


def rounds(probed: dict[str, Callable], device, seconds: float) -> dict[str, float]:
    """The median time of each probe. All ranks make as many rounds: rank 0 says when it is over."""
    taken: dict[str, list[float]] = {name: [] for name in probed}
    begin, number, goes_on = time.perf_counter(), 0, torch.ones(1)
    while goes_on:
        for name, action in probed.items():
            took = timed(action, device)
            if number >= WARM_UP:
                taken[name].append(took)
        number += 1
        goes_on = torch.tensor(
            [float(number < WARM_UP + LEAST or time.perf_counter() - begin < seconds)], device=device
        )
        dist.broadcast(goes_on, 0)
    return {name: statistics.median(times) for name, times in taken.items()}


def timed(action: Callable, device) -> float:
    settle(device)
    start = time.perf_counter()
    action()
    settle(device)
    return time.perf_counter() - start


def settle(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine_from(plan: Plan, device, took: dict[str, float]) -> Machine:
    world, found = dist.get_world_size(), rates(plan, took)
    kind, memory = capacity.of_a_rank(capacity.local_ranks(world))
    on_gpu = device.type == "cuda"
    known = machines.of_torch_name(torch.cuda.get_device_name(device), plan.run.train.precision) if on_gpu else None
    link = links.rate(plan, world, took, kind) if world > 1 else found["copies"]
    return Machine(
        name=known.name if known else kind, device=kind, memory=memory, peak=known and known.peak, **found, node_link=link,
        far_link=link, host_link=known.host_link if known else found["copies"], latency=took.get("latency", 0.0),
        overlap=links.overlap(plan, took) if world > 1 else 0.0, source=f"calibrated, {world} rank{'s' if world > 1 else ''}",
        precision=plan.run.train.precision, ranks=world,
    )  # fmt: skip


def rates(plan: Plan, took: dict[str, float]) -> dict[str, float]:
    """From the times of the probes."""
    a, t, tokens = plan.student, plan.teacher, tokens_of(plan)
    sides = {"teacher": t, "student": a} if t else {"student": a}
    work = {side: blocks_work(plan, anatomy) for side, anatomy in sides.items()}
    products, attention = (
        sum(getattr(of, kind) for of in work.values()) / sum(took[f"{side} {kind}"] for side in sides)
        for kind in ("products", "attention")
    )
    passed = [(of.forward, 1, of, took[f"{side} blocks"]) for side, of in work.items()]
    both = work["student"]
    passed.append((both.forward + both.backward, 3, both, took["student blocks, both ways"]))
    rest = sum(time - times * (of.products / products + of.attention / attention) for _, times, of, time in passed)
    head = tokens * (3 * flops.head_flops(a) + (flops.head_flops(t, a.vocab_size) if t else 0)) / took["head"]
    return {
        "products": products, "attention": attention, "head": head,
        "layer": of_pair(plan) / took["layer loss"] if plan.pairs else head,
        "copies": sum(moved for moved, *_ in passed) / max(rest, 1e-9),
        "update": UPDATE_BYTES * UPDATED / took["update"], "call": took["calls"] / CALLS,
    }  # fmt: skip


class Work(NamedTuple):
    """Of the probed blocks forward: FLOPs, and the bytes of all other operations, also backward."""

    products: float
    attention: float
    forward: float
    backward: float


def blocks_work(plan: Plan, a: Anatomy) -> Work:
    keys, share = plan.attended.__getitem__, tokens_of(plan) * min(BLOCKS, a.layers) / a.layers
    scores, one = flops.attention_flops(a, keys), passes(a, dtype_of(plan))
    return Work(
        share * (flops.body_flops(a, keys) - scores),
        share * scores,
        share * one.forward.eager,
        share * one.backward.eager,
    )


def of_pair(plan: Plan) -> float:
    """FLOPs of the layer loss of one pair."""
    widths = 3 * plan.student.width + (plan.teacher.width if plan.run.method == "ted" else 0)
    return 2 * tokens_of(plan) * widths * plan.width


def lines(found: Machine) -> list[str]:
    rates = {"products": found.products, "attention": found.attention, "head and losses": found.head}
    said = [f"{name} {rate / 1e9:,.4g} GFLOP/s" for name, rate in rates.items()]
    said += [
        f"{name} {rate / 1e9:,.4g} GB/s"
        for name, rate in (("other operations", found.copies), ("updates", found.update))
    ]
    said.append(
        f"links {found.node_link / 1e9:,.4g} GB/s" if found.latency else "links not measured, for there is one rank"
    )
    return [
        f"{found.name}: {', '.join(said)}; {found.latency * 1e6:,.3g} us a collective, {found.call * 1e6:,.3g} us a call"
    ]
