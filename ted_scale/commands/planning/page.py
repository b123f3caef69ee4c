"""What ted-scale plan prints: a column for every placement of the teacher, its memory and its time by term."""

from ted_scale.commands.planning.options import Cluster, Option
from ted_scale.config.run import Run
from ted_scale.forecast.placement import usable
from ted_scale.forecast.summary import uncounted

GIB = 2**30
HOURS = 24


def page(
    written: Option, placements: list[Option], other: Option, rounded: Option | None, best: Option | None, cluster: Cluster,
    price: float,
) -> list[str]:  # fmt: skip
    """`other` is the run as written but with checkpointing where it has none, or without; `rounded` has the teacher in 8 bits."""
    lines = [head(written, cluster), "", *table(memory_rows(placements), placements), ""]
    activations = {checkpoints(one): one.needs["activations"] / GIB for one in (written, other)}
    lines.append(f"activations: {activations[False]:,.3g} GiB kept, {activations[True]:,.3g} GiB with checkpointing")
    if rounded:
        lines.append(in_8_bits(rounded))
    for stage in written.forecasts:
        lines += ["", *table(time_rows(placements, stage, price, cluster.gpus), placements)]
    lines += ["", *uncounted(written.plan)] if uncounted(written.plan) else []
    return [*lines, "", verdict(written, cluster), recommendation(best, written.plan.run)]


def head(written: Option, cluster: Cluster) -> str:
    plan, machine = written.plan, cluster.machine
    train, a_node = plan.run.train, min(cluster.per_node, cluster.gpus)
    return (
        f"{plan.run.name}: {plan.run.method}, {train.precision}, {cluster.gpus} x {machine.name} ({machine.source}), {a_node} a "
        f"node, {machine.far_link * a_node / 1e9:,.4g} GB/s a node to the others; {train.tokens_per_step:,} tokens a step = "
        f"{plan.accumulation} x {train.micro_batch} x {plan.run.data.seq_len} x {plan.readers}"
    )


def checkpoints(option: Option) -> bool:
    return option.plan.run.student.gradient_checkpointing


def in_8_bits(rounded: Option) -> str:
    fits = "fits" if rounded.fits else "does not fit"
    return (
        f"teacher.precision = 'int8' or 'fp8': whole on every rank, {rounded.needs['teacher'] / GIB:,.3g} GiB of teacher, "
        f"{sum(rounded.needs.values()) / GIB:,.3g} GiB in all: {fits}"
    )


def memory_rows(placements: list[Option]) -> dict[str, list[str]]:
    names = list(dict.fromkeys(name for one in placements for name in one.needs))
    rows = {f"{name}, GiB": [f"{one.needs.get(name, 0.0) / GIB:,.2f}" for one in placements] for name in names}
    rows["in all, GiB"] = [f"{sum(one.needs.values()) / GIB:,.2f}" for one in placements]
    if any(one.away for one in placements):
        rows["in the host's memory, GiB"] = [f"{one.away / GIB:,.2f}" for one in placements]
    rows["fits"] = ["yes" if one.fits else "no" for one in placements]
    return rows


def time_rows(placements: list[Option], stage: str, price: float, gpus: int) -> dict[str, list[str]]:
    found = [one.forecasts[stage] for one in placements]
    rows = {f"{name}, ms": [f"{one.seconds[name] * 1e3:,.1f}" for one in found] for name in found[0].seconds}
    rows[f"step of stage {stage}, ms"] = [f"{sum(one.seconds.values()) * 1e3:,.1f}" for one in found]
    rows["tokens/s"] = [f"{one.tokens_per_s:,.0f}" for one in found]
    rows["MFU"] = [f"{one.mfu:.3f}" if one.mfu else "-" for one in found]
    rows["days"] = [f"{one.days:,.2f}" for one in found]
    if price:
        rows["cost"] = [f"{one.days * HOURS * gpus * price:,.0f}" for one in found]
    return rows


def table(rows: dict[str, list[str]], placements: list[Option]) -> list[str]:
    rows = {"": [one.way or "no teacher" for one in placements], **rows}
    first = max(map(len, rows))
    widths = [max(map(len, column)) for column in zip(*rows.values(), strict=True)]
    return [
        f"{name:{first}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows.items()
    ]


def verdict(written: Option, cluster: Cluster) -> str:
    run, needs, room, has = written.plan.run, sum(written.needs.values()), usable(cluster.rank), cluster.rank.memory
    way = f", placement {written.way}" if written.way else ""
    fits = "fits" if written.fits else "does not fit"
    return (
        f"as written (micro-batch {run.train.micro_batch}{way}, checkpointing {'on' if checkpoints(written) else 'off'}): {fits}, "
        f"{needs / GIB:,.1f} GiB of {room / GIB:,.1f} ({room / has:.0%} of a rank's {has / GIB:,.1f})"
    )


def recommendation(best: Option | None, run: Run) -> str:
    if best is None:
        return (
            "recommended: nothing fits; take more GPUs, a smaller student, ds_configs that offload, or, with room in the host's "
            "memory, teacher.placement=offload"
        )
    train, student, config = best.plan.run.train, best.plan.run.student, best.plan.run.ds_config
    keys = [f"train.micro_batch={train.micro_batch}"]
    keys += [f"ds_config={config}"] if config != run.ds_config else []
    keys += ["train.reduce_once=true"] if train.reduce_once != run.train.reduce_once else []
    keys += [f"teacher.placement={best.way}"] if best.way else []
    keys += [f"student.gradient_checkpointing={str(student.gradient_checkpointing).lower()}"]
    return f"recommended: {' '.join(f'--set {key}' for key in keys)}: {best.main.tokens_per_s:,.0f} tokens/s, {best.days:,.2f} days"
