"""The forecast of a run as it is written, on the machine where it starts: lines for the dry run and the log, and metrics.

Note: a CPU without a calibration has no forecast of time, because no data sheet says what its cores do beside others.
"""

import contextlib
import logging
from pathlib import Path
from typing import NamedTuple

import torch

from ted_scale.distill import memory
from ted_scale.distill.flops import step_flops
from ted_scale.forecast import machine as machines
from ted_scale.forecast import step
from ted_scale.forecast.machine import Machine
from ted_scale.metrics.time_left import Ahead
from ted_scale.ranks.capacity import local_ranks

log = logging.getLogger("ted_scale")

GIB = 2**30
DAY = 86400


class Forecast(NamedTuple):
    """Of a mean step of a stage."""

    memory: float  # bytes of a rank, without the process
    seconds: dict[str, float]  # by term
    tokens_per_s: float
    mfu: float | None
    days: float  # of the whole stage


def known_machine(run, world: int) -> Machine | None:
    """As it was calibrated, or as the table has it. A calibration of another kind of device, with another precision or, for
    several ranks, by one alone does not count."""
    from deepspeed.accelerator import get_accelerator

    file, device = Path(run.runs) / machines.FILE, get_accelerator().device_name()
    kept = machines.read(file) if file.exists() else None
    if kept and kept.device == device and not machines.unfit(kept, run.train.precision, world):
        return kept
    return machines.of_torch_name(torch.cuda.get_device_name(), run.train.precision) if device == "cuda" else None


def of_stage(plan, stage, machine: Machine, local: int) -> Forecast:
    """Memory, a step's time by terms, tokens a second, MFU, and the days of the stage."""
    terms = step.of_stage(plan, stage, machine, local)
    whole, tokens = sum(terms.values()), plan.run.train.tokens_per_step
    work = [step_flops(plan, stage, at, plan.attended.__getitem__).model for at in step.sampled(stage)]
    mean = sum(work) / len(work)
    mfu = tokens * mean / whole / plan.world / machine.peak if machine.peak else None
    needs = sum(memory.terms(plan, stage, machine.device)[0].values())
    return Forecast(needs, terms, tokens / whole, mfu, stage.steps * whole / DAY)


def describe(plan) -> list[str]:
    """A line a stage."""
    machine = known_machine(plan.run, plan.world)
    if machine is None:
        return [
            f"time of a step: no forecast, because this machine is not in the table and {Path(plan.run.runs) / machines.FILE} is "
            "not there, or of another device, precision or one rank alone; ted-scale plan RUN.toml --calibrate measures it"
        ]
    stages = [line_of(stage, of_stage(plan, stage, machine, local_ranks(plan.world)), machine) for stage in plan.stages]
    return [*stages, *uncounted(plan)]


def uncounted(plan) -> list[str]:
    """What a forecast does not know about this run."""
    missing = []
    if bits := plan.run.teacher_bits:
        missing.append(f"the teacher's time is that of bf16: products in {bits} have no rate of their own here")
    if plan.run.student.lora:
        missing.append("the thin products of student.lora are timed at the rate of whole ones")
    if (ranks := plan.run.data.sequence_parallel) > 1:
        missing.append(f"what the {ranks} ranks of a row send each other around each attention is in no time here")
    zero = plan.ds_config["zero_optimization"]
    if zero.get("zero_quantized_weights"):
        missing.append("weights that are gathered in 8 bits are counted in their own type")
    if any((zero.get(part) or {}).get("device") == "cpu" for part in ("offload_optimizer", "offload_param")):
        missing.append("what the ds_config offloads is timed as on the device, without its copies")
    return missing


def line_of(stage, found: Forecast, machine: Machine) -> str:
    by_size = sorted(found.seconds.items(), key=lambda term: -term[1])
    terms = " + ".join(f"{name} {value * 1e3:,.3g}" for name, value in by_size if value)
    mfu = f", MFU {found.mfu:.2f}" if found.mfu else ""
    return (
        f"time of a step in stage {stage.name}, forecast for {machine.name} ({machine.source}): "
        f"{sum(found.seconds.values()) * 1e3:,.4g} ms = {terms}; {found.tokens_per_s:,.0f} tokens/s{mfu}, {found.days:,.2g} days"
    )


def ahead(plan, stage, at: int, device: str) -> Ahead:
    """A stage that goes on after `at` steps, for the line of each row: what it waits for, and how long the stages after it take."""
    run, each = plan.run, {"checkpoints": plan.run.checkpoint.every}
    if not stage.learns_filters and any(corpus.validation for corpus in run.data.corpora):
        each["validation"] = run.validation.every
    if not stage.learns_filters and run.samples.every:
        each["samples"] = run.samples.every
    forecast, later = numbers(plan, stage, at, device), later_seconds(plan, stage)
    return Ahead(stage.name, stage.first_step, stage.last_step, each, later, forecast)


def later_seconds(plan, stage) -> float | None:
    """Of the stages after this one. None without a forecast, for whatever reason: `numbers` says it."""
    later = [other for other in plan.stages if other.first_step >= stage.last_step]
    with contextlib.suppress(Exception):
        machine = known_machine(plan.run, plan.world) if later else None
        if machine or not later:
            return sum(
                other.steps * sum(of_stage(plan, other, machine, local_ranks(plan.world)).seconds.values())
                for other in later
            )
    return None


def numbers(plan, stage, at: int, device: str) -> dict[str, float]:
    """Of a step like that after `at` steps: for metrics.jsonl, beside perf/step_ms and memory/peak_gib. No run ends because nobody
    can say how long it should take: a trial may fail for a model, and machine.json may be damaged."""
    found = {}
    try:
        found["memory/forecast_gib"] = sum(memory.terms(plan, stage, device)[0].values()) / GIB
        if machine := known_machine(plan.run, plan.world):
            found["perf/forecast_ms"] = (
                sum(step.seconds(plan, stage, at, machine, local_ranks(plan.world)).values()) * 1e3
            )
    except Exception as error:
        log.warning(f"no forecast of this stage: {error}")
    return found
