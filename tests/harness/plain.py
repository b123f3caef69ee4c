"""The student module and its teacher over tiny models without DeepSpeed, as run.py would put them together."""

from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from corpus import write_shard
from tiny import make_model, make_run

from ted_scale.data.packing import pack
from ted_scale.data.stream import Batch
from ted_scale.distill.normalization import count_valid
from ted_scale.distill.signal import Weights
from ted_scale.distill.stages import Stage
from ted_scale.distill.student import Student
from ted_scale.distill.teacher import Teacher, TeacherBody
from ted_scale.engines import build_filters
from ted_scale.kernels.tokens import IGNORED
from ted_scale.models import lora
from ted_scale.models.inspection import inspect
from ted_scale.models.weights import build_network
from ted_scale.plan import Plan, make_plan

VOCABULARY = 128


class Parts(NamedTuple):
    plan: Plan
    stage: Stage
    student: Student
    teacher: Teacher | None


def make_world(root: Path) -> Path:
    """A llama teacher, wider and deeper than its gpt2 student, and a corpus."""
    make_model(root / "teacher", "llama", hidden_size=48)
    make_model(root / "student", "gpt2", num_hidden_layers=2, seed=1)
    make_shard(root / "corpus")
    return root


def make_shard(prefix: Path, largest: int = VOCABULARY - 1, documents: int = 20) -> None:
    """So many documents of 40 tokens and more, with the sidecar that names the largest id."""
    written = [[1 + (7 * d + i) % largest for i in range(40 + d)] for d in range(documents)]
    written[3][5] = largest
    tokens = sum(map(len, written))
    write_shard(prefix, written, sidecar={"max_token_id": largest, "tokens": tokens})


def build(root: Path, stage: str = "student", seed: int = 0, **sections) -> Parts:
    """The parts of a run's stage; filters are moved off their start, so that they do something."""
    plan = make_plan(make_run(root, **sections), 1)
    stage = next(s for s in plan.stages if s.name == stage)
    filters_s, filters_t = build_filters(plan, stage)
    network = build_network(plan.student, ds_config=None, dtype=torch.float32).requires_grad_(not stage.learns_filters)
    if plan.run.student.lora and not stage.learns_filters:
        lora.adapt(network, plan.student, plan.run.student.lora)
    teacher = make_teacher(plan) if plan.teacher else None
    torch.manual_seed(seed)
    for filters in (filters_s, filters_t):
        for parameter in filters.parameters() if filters is not None else ():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    if filters_t is not None and not stage.learns_filters:
        filters_t.requires_grad_(False)
    student = Student(
        plan.run, network, plan.student, plan.pairs, learns_filters=stage.learns_filters, filters_s=filters_s,
        filters_t=filters_t, head_t=teacher and teacher.head,
    )  # fmt: skip
    return Parts(plan, stage, student.train(), teacher)


def make_teacher(plan: Plan) -> Teacher:
    network = build_network(plan.teacher, ds_config=None, dtype=torch.float32)
    body = TeacherBody(network, plan.teacher, [t for _, t in plan.pairs])
    return Teacher(body, body)


def make_batch(rows: int = 4, length: int = 16, seed: int = 0, documents: bool = False) -> Batch:
    """Rows with unevenly many ignored labels: the last one has none that counts."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (rows, length), generator=g)
    labels = torch.randint(1, VOCABULARY, (rows, length), generator=g)
    for row in range(rows):
        labels[row, : 3 * row] = IGNORED
    labels[-1] = IGNORED
    begins = torch.arange(length).remainder(length // 2 + 1).eq(0).repeat(rows, 1)
    return Batch(tokens, labels, (labels != IGNORED).float(), pack(begins.numpy()) if documents else None)


def cut(batch: Batch) -> list[Batch]:
    """The rows of a batch as micro-batches of one row."""

    def row(i: int) -> Batch:
        begins = batch.packing and batch.packing.positions_BT[i : i + 1] == 0
        return Batch(*(t[i : i + 1] for t in batch[:3]), None if begins is None else pack(begins.numpy()))

    return [row(i) for i in range(len(batch.tokens_BT))]


def run_step(parts: Parts, batches, weights: Weights | None = None) -> tuple[list, dict[str, torch.Tensor]]:
    """One optimizer step's losses, a micro-batch each, and the sum of their gradients by parameter name."""
    weights = weights or parts.stage.weights(parts.stage.first_step)
    denom = count_valid(batches)
    parts.student.zero_grad()
    losses = [parts.student(b, parts.teacher(b, weights) if parts.teacher else None, weights, denom) for b in batches]
    sum(loss.total for loss in losses).backward()
    return losses, {n: p.grad.clone() for n, p in parts.student.named_parameters() if p.grad is not None}


def load_model(folder: Path, **settings):
    anatomy = inspect("student.path", str(folder), **settings)
    return anatomy, build_network(anatomy, ds_config=None, dtype=torch.float32).eval()


def own_model(folder: Path, **settings):
    """The family as transformers loads and runs it; eager, because 5.17's SDPA leaves Gemma-2's soft-cap out in silence."""
    settings = {"attn_implementation": "eager", **settings}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
