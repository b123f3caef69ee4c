"""Where each placement of the teacher stops paying: the same run on 8 to 4096 GPUs, with the failures of so many.

Note: a step has as many tokens on all of them, so that many GPUs have small micro-batches. Failures are those of tools/goodput.py.
"""

from ted_scale.config.run import Run
from ted_scale.forecast.machine import Machine
from ted_scale.placement import FASTEST_FIRST
from ted_scale.plan import Plan
from tools import goodput
from tools.planning.options import Cluster, Option, base, every_way

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
HEAD = ("GPUs", *FASTEST_FIRST, "best", "MFU", "a failure every", "`checkpoint.every`", "goodput", "days", "cost")


def table(run: Run, machine: Machine, arguments) -> str:
    """tokens/s of a GPU by placement, each with its best micro-batch that fits; then the best one."""
    rows, plan = [list(HEAD), ["---:"] * len(HEAD)], base(run)
    for gpus in GPUS:
        cluster = Cluster(machine, gpus, min(arguments.per_node, gpus))
        rows.append(row(fastest(plan, run, cluster), cluster, arguments.price))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def fastest(plan: Plan, run: Run, cluster: Cluster) -> dict[str, Option]:
    """The fastest way that fits, for each placement."""
    found: dict[str, Option] = {}
    for one in every_way(plan, run, cluster):
        if one.fits and (one.way not in found or one.days < 0.9999 * found[one.way].days):
            found[one.way] = one
    return found


def row(found: dict[str, Option], cluster: Cluster, price: float) -> list[str]:
    each = [cell(found[way], cluster) if way in found else "-" for way in FASTEST_FIRST]
    if not found:
        return [f"{cluster.gpus:,}", *each, "nothing fits", *["-"] * (len(HEAD) - len(each) - 2)]
    best = min(found.values(), key=lambda one: one.days)
    costs = failures(best, cluster)
    every, shares = goodput.best(costs)
    days = best.days / shares.goodput
    return [
        f"{cluster.gpus:,}", *each, best.way or "no teacher", f"{best.main.mfu:.2f}" if best.main.mfu else "-",
        f"{costs.mtbf / 3600:,.1f} h", f"{every:,}", f"{shares.goodput:.1%}", f"{days:,.1f}",
        f"{days * 24 * cluster.gpus * price:,.0f}" if price else "-",
    ]  # fmt: skip


def cell(one: Option, cluster: Cluster) -> str:
    """Micro-batch, and "c" with checkpointing."""
    run = one.plan.run
    how = f"{run.train.micro_batch}{'c' if run.student.gradient_checkpointing else ''}"
    return f"{one.main.tokens_per_s / cluster.gpus:,.0f} ({how})"


def failures(one: Option, cluster: Cluster) -> goodput.Costs:
    """As tools/goodput.py assumes them, with this run's step and models."""
    plan = one.plan
    flags = goodput.parse([])
    flags.step_s = sum(one.main.seconds.values())
    flags.teacher = plan.teacher.parameters / plan.student.parameters if plan.teacher else 0.0
    return goodput.costs_of(plan.student.parameters, cluster.gpus, flags)
