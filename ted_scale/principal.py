"""Where filters start: from one pass over a little training text, the same on any number of ranks, kept in a file.

A teacher's filter starts as the principal directions of its block's states (as the identity where it is as wide), its
lift as the way back, a student's as the ridge regression of the teacher's filtered states on the student's. The
surprise: a state counts by its direction alone, for norms and the layer loss read no more of it, and the few sink
tokens, a hundred times as long as others, would take the first directions for themselves.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ted_scale import checkpoint, pulse, zero_hooks
from ted_scale.attempts import attempt
from ted_scale.checkpoint_files import Progress
from ted_scale.config import Model
from ted_scale.data import validation_batches
from ted_scale.engines import build_filters, build_teacher
from ted_scale.feed import open_feed
from ted_scale.filters import has_lift
from ted_scale.kernels.products import live_rows
from ted_scale.kernels.tokens import valid_weights
from ted_scale.run_folder import broadcast
from ted_scale.saver import give_up, sentence
from ted_scale.student import Weights

log = logging.getLogger("ted_scale")

TOKENS_A_WIDTH = 8  # tokens of the pass for each dimension of the wider model: enough for a regression on all of them
RIDGE = 1e-3  # of the mean eigenvalue
READ = Weights(ce=0.0, kl=0.0, layer=1.0)


class Moments(NamedTuple):
    """Sums over tokens of a pair, of states t and s divided by ‖t‖: Σ t·tᵀ, and Σ t·sᵀ, Σ s·sᵀ where the student ran."""

    tt: torch.Tensor
    ts: torch.Tensor | None = None
    ss: torch.Tensor | None = None


class Start(NamedTuple):
    """Weights of a pair's filters, None: as the module makes them."""

    teacher: torch.Tensor | None
    student: torch.Tensor | None


def write_start(plan, stage, teacher, device, path: Path) -> Path:
    """The filters that `stage` begins with, in a file like stage I's result; every rank takes part."""
    starts = measured_starts(plan, stage, teacher, device) if needs_states(plan) else []
    failure = None
    if dist.get_rank() == 0:
        tensors = checkpoint.filter_tensors(filled(plan, stage, starts))
        failure, _ = attempt(checkpoint.write_filters, path, tensors, plan.filters_identity())
    if failure := broadcast(failure):
        give_up(sentence(path, 0, failure))
    return path


def needs_states(plan) -> bool:
    """Filters between models of one width that are as wide start as the identity, which needs no text; wider than the teacher
    they start at random."""
    widths = {plan.width, plan.student.width, plan.teacher.width}
    return plan.run.filters.start == "states" and len(widths) > 1 and plan.width <= plan.teacher.width


def filled(plan, stage, starts: list[Start]) -> dict:
    """Plain filters with their starting weights, by side. Heads of their own are no part of the file: they begin where the
    module makes them."""
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


def measured_starts(plan, stage, teacher, device) -> list[Start]:
    """A pair's sums and solution on one rank, then everywhere. A student that begins anew has no states worth a look."""
    student = None if plan.run.student.init == "random" else build_teacher(as_teacher(plan))
    tokens, sums = TOKENS_A_WIDTH * max(plan.student.width, plan.teacher.width), None
    for batch in batches(plan, stage, tokens, device):
        states = [side(batch, READ).layers_NE if side else () for side in (teacher, student)]
        sums = add_moments(sums, batch, *states)
    if student:
        zero_hooks.destroy(student.engine)
    over_ranks(sums)
    if dist.get_rank() == 0:
        log.info(f"filters start from the states of {tokens:,} tokens")
    rank, world = dist.get_rank(), dist.get_world_size()
    own = {k: start_of(pair, plan.width) for k, pair in enumerate(sums) if k % world == rank}  # all ranks at once
    return [known_to_all(plan, k, pair, own.get(k, (None, None))) for k, pair in enumerate(sums)]


def as_teacher(plan):
    """The student as a frozen model whose matched blocks are read."""
    run = plan.run.model_copy(update={"teacher": Model(path=plan.run.student.path)})
    return replace(plan, run=run, teacher=plan.student, pairs=[(s, s) for s, _ in plan.pairs])


def batches(plan, stage, tokens: int, device) -> Iterator:
    """The stage's first windows, the same on any number of ranks."""
    vocabulary = min(plan.student.vocab_size, plan.teacher.vocab_size)
    stream, _, _ = open_feed(plan.run, stage, Progress(stage.first_step), vocabulary)
    stream = stream._replace(count=-(-tokens // stream.seq_len))
    return validation_batches(
        stream, tokens=tokens, micro_batch=plan.run.train.micro_batch, rank=dist.get_rank(), world=dist.get_world_size(),
        device=device,
    )  # fmt: skip


def known_to_all(plan, k: int, pair: Moments, start) -> Start:
    """The start of pair k, from the rank that had its sums."""
    pulse.beat(f"the start of the filters of pair {k}")
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


@torch.no_grad()
def add_moments(sums: list[Moments] | None, batch, states_t, states_s) -> list[Moments]:
    """`sums` and a micro-batch's; states are one tensor [N, width] a pair, the student's empty where it did not run."""
    weight = valid_weights(batch.labels_BT.flatten(), batch.weights_BT.flatten())
    found = []
    for k, t in enumerate(states_t):
        t = live_rows(t.float(), weight)
        t, length = torch.nn.functional.normalize(t), t.norm(dim=1, keepdim=True).clamp(min=1e-12)
        s = live_rows(states_s[k].float(), weight) / length if states_s else None
        found.append(Moments(t.t() @ t) if s is None else Moments(t.t() @ t, t.t() @ s, s.t() @ s))
    if sums is None:
        return found
    return [
        Moments(*(a if b is None else a.add_(b) for a, b in zip(old, new, strict=True)))
        for old, new in zip(sums, found, strict=True)
    ]


def over_ranks(sums: list[Moments]) -> None:
    """Every pair's sums, whole, on the rank that works on it."""
    for k, pair in enumerate(sums):
        for tensor in pair:
            if tensor is not None:
                dist.reduce(tensor, dst=k % dist.get_world_size())


def directions(tt: torch.Tensor, width: int) -> torch.Tensor:
    """[width, d] orthonormal rows that hold the most of Σ t·tᵀ; each has its largest entry above 0, for a sign is nobody's."""
    vectors = torch.linalg.eigh(tt.double()).eigenvectors.flip(1)[:, :width]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).t().float().contiguous()


def regression(filter_t: torch.Tensor | None, pair: Moments) -> torch.Tensor:
    """W of the least Σ ‖W·s − filter_t·t‖²/‖t‖², [width, d_s]; a filter of None is the identity."""
    ts, ss = pair.ts.double(), pair.ss.double()
    damped = ss + (RIDGE * ss.trace() / len(ss) + 1e-30) * torch.eye(len(ss), dtype=ss.dtype, device=ss.device)
    target = ts if filter_t is None else filter_t.double() @ ts
    return torch.linalg.solve(damped, target.t()).t().float()


def start_of(pair: Moments, width: int) -> Start:
    teacher = directions(pair.tt, width) if width < len(pair.tt) else None
    return Start(teacher, None if pair.ts is None else regression(teacher, pair))
