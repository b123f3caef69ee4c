"""The filters that a stage starts from: measured on a little training text, equal on any number of ranks, written to a file.

filter_init.py has the mathematics. This file runs the models. Each rank solves some of the pairs.
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from ted_scale.checkpoints.filters_file import filter_tensors, save_filters
from ted_scale.checkpoints.progress import Progress
from ted_scale.config.models import Teacher
from ted_scale.data.loader import first_batches
from ted_scale.data.stream import Stream
from ted_scale.distill.filter_init import TOKENS_A_WIDTH, Moments, Start, add_moments, over_ranks, start_of
from ted_scale.distill.filters import has_lift
from ted_scale.distill.signal import Weights
from ted_scale.engines import build_filters, build_teacher
from ted_scale.forecast.placement import placed
from ted_scale.models import zero_hooks
from ted_scale.ranks import pulse

log = logging.getLogger("ted_scale")


READ = Weights(ce=0.0, kl=0.0, layer=1.0)


def first_filters(
    plan, stage, stream: Stream, teacher, progress: Progress, learned: Path | None, device
) -> Path | None:
    """The file of the filters that a stage starts from. The stage reads `stream`. `learned` is the file of an earlier stage
    I. None if the stage has no filters, if they start at random, or if a checkpoint of the stage has them."""
    filters, starts = plan.run.filters, stage is plan.stages[0] and progress.step == stage.first_step
    own = plan.run.method == "ted" and not filters.from_run and starts
    if own and not stage.learns_filters:
        return write_start(plan, stage, stream, teacher, device, plan.filters_file)
    if own and filters.start == "states":
        return write_start(plan, stage, stream, teacher, device, plan.run.folder / "filters_start.safetensors")
    return None if stage.learns_filters else learned


def write_start(plan, stage, stream: Stream, teacher, device, path: Path) -> Path:
    """The filters that `stage` starts from, in a file like the result of stage I. A collective."""
    starts = measured_starts(plan, stream, teacher, device) if needs_states(plan) else []
    tensors = filter_tensors(filled(plan, stage, starts)) if dist.get_rank() == 0 else {}
    save_filters(path, tensors, plan.filters_identity())
    return path


def needs_states(plan) -> bool:
    """Filters as wide as both models start as the identity, and filters wider than the teacher start at random. Neither needs
    text."""
    widths = {plan.width, plan.student.width, plan.teacher.width}
    return plan.run.filters.start == "states" and len(widths) > 1 and plan.width <= plan.teacher.width


def filled(plan, stage, starts: list[Start]) -> dict:
    """Plain filters with their starting weights, by side. Heads are not in the file: they keep the weights that their module
    starts with."""
    made = stage if has_lift(plan.run, plan.teacher) else plan.stages[-1]
    filters_s, filters_t = build_filters(plan, made)
    begin(filters_s, filters_t, starts)
    return {"student": filters_s.requires_grad_(False), "teacher": filters_t.requires_grad_(False)}


@torch.no_grad()
def begin(filters_s, filters_t, starts: list[Start]) -> None:
    for of_student, of_teacher, start in zip(filters_s, filters_t, starts, strict=False):
        if start.student is not None:
            of_student.weight.copy_(start.student)
        if start.teacher is not None:
            of_teacher.weight.copy_(start.teacher)
            if of_teacher.lift_weight is not None:
                of_teacher.lift_weight.copy_(start.teacher.t())


def measured_starts(plan, stream: Stream, teacher, device) -> list[Start]:
    """The start of each pair, on all ranks. One rank has the sums of a pair and solves it. A student with random weights is
    not run, because its states mean nothing."""
    student = None if plan.run.student.init == "random" else build_teacher(as_teacher(plan))
    tokens, sums = TOKENS_A_WIDTH * max(plan.student.width, plan.teacher.width), None
    log.info(f"filters start from the states of {tokens:,} tokens, which are read now")
    for batch in first_batches(plan.run, stream, tokens, device):
        states = [side(batch, READ).layers_NE if side else () for side in (teacher, student)]
        sums = add_moments(sums, batch, *states)
    if student and not student.is_bare:
        zero_hooks.destroy(student.engine)
    over_ranks(sums)
    rank, world = dist.get_rank(), dist.get_world_size()
    own = {k: start_of(pair, plan.width) for k, pair in enumerate(sums) if k % world == rank}  # all ranks at once
    return [share_start(plan, k, pair, own.get(k, (None, None))) for k, pair in enumerate(sums)]


def as_teacher(plan):
    """A plan in which the student is a frozen model whose matched blocks are read."""
    run = plan.run.model_copy(update={"teacher": Teacher(path=plan.run.student.path)})
    placement = placed(plan, "replicated", 1) if plan.placement.is_bare else plan.placement
    return replace(plan, run=run, teacher=plan.student, placement=placement, pairs=[(s, s) for s, _ in plan.pairs])


def share_start(plan, k: int, pair: Moments, start) -> Start:
    """The start of pair k. The rank that solved it sends it to all ranks."""
    pulse.doing(f"the start of the filters of pair {k}")
    owner, device = k % dist.get_world_size(), pair.tt.device
    narrow, student = plan.width < plan.teacher.width, pair.ts is not None
    shapes = [narrow and (plan.width, plan.teacher.width), student and (plan.width, plan.student.width)]
    return Start(*(from_rank(owner, weight, shape, device) for weight, shape in zip(start, shapes, strict=True)))


def from_rank(owner: int, weight, shape, device):
    if not shape:
        return None
    whole = weight.contiguous() if dist.get_rank() == owner else torch.empty(shape, device=device)
    dist.broadcast(whole, src=owner)
    return whole.cpu()
