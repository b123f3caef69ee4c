"""Where each placement of the teacher stops paying: the same run on 8 to 4096 GPUs, with the failures of so many.

Note: a step has as many tokens on all of them, so that many GPUs have small micro-batches. Failures are those of ted-scale goodput.
"""

from ted_scale.commands.planning import goodput
from ted_scale.commands.planning.options import (
    Cluster,
    Option,
    base,
    check,
    every_way,
    fastest,
    is_advised,
    micro_batches,
)
from ted_scale.config.run import Run
from ted_scale.distill.trained import trained_parameters
from ted_scale.forecast.machine import Machine
from ted_scale.forecast.placement import FASTEST_FIRST

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
HEAD = ("GPUs", *FASTEST_FIRST, "best", "MFU", "a failure every", "`checkpoint.every`", "goodput", "days", "cost")


def table(run: Run, machine: Machine, arguments) -> str:
    """tokens/s of a GPU by placement, each with its best micro-batch that fits; then the best one."""
    rows, plan = [list(HEAD), ["---:"] * len(HEAD)], base(run)
    for gpus in GPUS:
        cluster = Cluster(machine, gpus, min(arguments.per_node, gpus))
        check(cluster)
        fitting = [one for one in every_way(plan, run, cluster) if one.fits]
        rows.append(row(run, fitting, cluster, arguments.price))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(run: Run, fitting: list[Option], cluster: Cluster, price: float) -> list[str]:
    each = [cell(fastest(one for one in fitting if one.way == way), cluster) for way in FASTEST_FIRST]
    best = fastest(one for one in fitting if is_advised(one))
    if best is None:
        return [f"{cluster.gpus:,}", *each, why_none(run, fitting, cluster), *["-"] * (len(HEAD) - len(each) - 2)]
    costs = failures(best, cluster)
    every, shares = goodput.best(costs)
    days = best.days / shares.goodput
    return [
        f"{cluster.gpus:,}", *each, best.way or "no teacher", f"{best.main.mfu:.2f}" if best.main.mfu else "-",
        f"{costs.mtbf / 3600:,.1f} h", f"{every:,}", f"{shares.goodput:.1%}", f"{days:,.1f}",
        f"{days * 24 * cluster.gpus * price:,.0f}" if price else "-",
    ]  # fmt: skip


def why_none(run: Run, fitting: list[Option], cluster: Cluster) -> str:
    if not micro_batches(run, cluster.gpus):
        return f"a step has {run.train.tokens_per_step // run.data.seq_len:,} rows"
    return "nothing else fits" if fitting else "nothing fits"


def cell(one: Option | None, cluster: Cluster) -> str:
    """Micro-batch, and "c" with checkpointing."""
    if one is None:
        return "-"
    run = one.plan.run
    how = f"{run.train.micro_batch}{'c' if run.student.gradient_checkpointing else ''}"
    return f"{one.main.tokens_per_s / cluster.gpus:,.0f} ({how})"


def failures(one: Option, cluster: Cluster) -> goodput.Costs:
    """As ted-scale goodput assumes them, with this run's step and models."""
    plan = one.plan
    flags = goodput.parse([])
    flags.step_s = sum(one.main.seconds.values())
    flags.teacher = plan.teacher.parameters / plan.student.parameters if plan.teacher else 0.0
    trained = trained_parameters(plan, plan.stages[-1]) if plan.run.student.lora else None
    return goodput.costs_of(plan.student.parameters, cluster.gpus, flags, trained)
