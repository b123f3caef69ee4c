"""Everything that follows from a run file, computed and checked before any process group exists.

Every mistake of a user that can be found in files is refused here, in one sentence. --dry-run prints `describe`; run.py
carries the plan out.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from ted_scale import feed, validate
from ted_scale.base.counts import millions
from ted_scale.base.errors import UserError
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints import resume
from ted_scale.checkpoints.filters_file import check_filters
from ted_scale.checkpoints.progress import Progress
from ted_scale.config import changes
from ted_scale.config.ds_config import load_ds_config
from ted_scale.config.models import Model
from ted_scale.config.run import Run
from ted_scale.corpora.corpus import Part, read_corpus
from ted_scale.corpora.shards import check_vocabulary
from ted_scale.data import epochs
from ted_scale.data.stream import open_stream, text_lengths
from ted_scale.distill import filter_sizes
from ted_scale.distill.flops import keys_of, step_flops
from ted_scale.distill.pairs import Matched, match_layers
from ted_scale.distill.stages import Stage, stages_of
from ted_scale.evaluation import prompts
from ted_scale.evaluation.suites import suite_in_training
from ted_scale.feed import Reading, epochs_of, open_feed, refuse_short_corpora
from ted_scale.forecast.placement import Placement, of_this_machine, place
from ted_scale.metrics.live_report import why_never
from ted_scale.metrics.rows import last_row
from ted_scale.metrics.wandb_connection import why_offline
from ted_scale.micro_batches import check_length, derive_accumulation
from ted_scale.models import fused, lora, quantized, ulysses
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.fingerprint import fingerprint
from ted_scale.models.inspection import inspect
from ted_scale.models.vocabulary import check_corpus_tokenizer, check_same_tokenizer, tokenizer_folder

OF_LOSSES = [key.removeprefix("loss.") for key in changes.DECISIVE if key.startswith("loss.")]


@dataclass(frozen=True, kw_only=True)
class Plan:
    run: Run
    world: int
    ds_config: dict
    student: Anatomy
    teacher: Anatomy | None
    pairs: list[tuple[int, int]]
    pairs_origin: str
    width: int
    accumulation: int
    stages: list[Stage]
    readings: dict[str, Reading]
    attended: dict[int | None, float]  # a layer's window → keys that a query sees, on average
    resumes: list[str]  # lines that say where the run resumes
    placement: Placement | None = None  # of the teacher
    suite: dict | None = None  # the tasks of validation.suite, with lm-eval's data for them
    tokenizer: Path | None = None  # the folder of the tokenizer for the suite's texts

    @property
    def total_steps(self) -> int:
        return self.stages[-1].last_step

    @property
    def readers(self) -> int:
        """The number of ranks that read different text. Ranks that share rows count as one."""
        return ulysses.groups_of(self.run, self.world)

    @property
    def vocabulary(self) -> int:
        """The number of tokens that both models know."""
        return min(anatomy.vocab_size for anatomy in (self.student, self.teacher) if anatomy)

    @property
    def filters_file(self) -> Path | None:
        """The filters that stage II starts from: in this run's folder, or in that of another run."""
        if self.run.method != "ted":
            return None
        return files.filters_of(Path(self.run.filters.from_run) if self.run.filters.from_run else self.run.folder)

    def identity(self) -> dict:
        """The settings that decide the result. A run must have the same identity as the checkpoint that it resumes from,
        except for the keys in resume.allow."""
        sides = {"student": self.student, "teacher": self.teacher}
        run, train, loss = self.run, self.run.train, self.run.loss
        filters = {"filters.steps": 0} if run.method == "ted" else {}
        if len(self.stages) > 1:
            filters = {"filters.steps": run.filters.steps, "filters.head": run.filters.head}
        return {
            "method": run.method,
            "seed": run.seed,
            "teacher.every": run.asks_every,
            "teacher.precision": run.teacher_bits or "16 bits or more",  # train.precision says which
            **{f"loss.{k}": changes.plain(getattr(loss, k)) for k in OF_LOSSES},
            **{f"train.{k}": changes.plain(getattr(train, k)) for k in ("precision", "betas", "eps", "weight_decay")},
            **{f"{s}.{k}": getattr(a, k) for s, a in sides.items() if a for k in changes.SHAPE},
            **lora.identity(run.student.lora, self.student),
            **self.filters_identity(),
            **filters,
        }

    def filters_identity(self) -> dict:
        """The settings that must be equal in a stage I and in a stage II that uses its filters."""
        if not self.run.matches_layers:
            return {}
        pairs = [list(p) for p in self.pairs]
        return {"pairs": pairs, "filters.width": self.width, "filters.mlp": self.run.filters.mlp}


def make_plan(run: Run, world: int) -> Plan:
    """Decide and check everything that needs no process group."""
    plan = plan_of_models(epochs.resolved(run, resume.written_before(run)), world)
    quantized.check(run.teacher_bits, plan.teacher)
    check_shards(plan.run, plan.vocabulary, plan.student)
    plan = dataclasses.replace(plan, attended=attended(plan.run, plan.vocabulary, plan.student, plan.teacher))
    plan = dataclasses.replace(plan, placement=place(plan, of_this_machine(world)))
    prompts.check(plan)
    if run.validation.suite:
        plan = dataclasses.replace(plan, tokenizer=tokenizer_folder(plan.student, plan.teacher))
        plan = dataclasses.replace(plan, suite=suite_in_training(run.validation, plan.student.max_length))
        validate.refuse_unpromised(run.checkpoint.best, plan.suite)
    where, progress = resume.find(run, plan.identity())
    plan = dataclasses.replace(plan, readings=check_corpora(plan, progress))
    resumes = resume.describe(run, where, progress, plan.total_steps, last_row(run.folder / "metrics.jsonl"))
    if run.filters.from_run and run.method == "ted":
        check_filters(plan.filters_file, plan.filters_identity())
    return dataclasses.replace(plan, resumes=resumes + epochs.describe(plan.run))


def plan_of_models(run: Run, world: int, *, needs_weights: bool = True) -> Plan:
    """A plan from the run file and the models' configs alone. It reads no data except the corpora's sizes for train.epochs,
    and asks nothing of the machine. Every row counts as one document. The teacher has no place yet."""
    ds_config, run = load_ds_config(run.ds_config), epochs.resolved(run)
    accumulation = derive_accumulation(run, world)
    teacher = look_at("teacher", run.teacher, needs_weights) if run.teacher and run.method != "ce" else None
    student = look_at("student", run.student, needs_weights)
    if teacher:
        check_same_tokenizer(student, teacher)
    matched = match_layers(run.pairs, student, teacher) if run.matches_layers else Matched([], "")
    run = filter_sizes.resolved(run, student, teacher, matched.pairs) if matched.pairs else run
    width = int(run.filters.width) if matched.pairs else 0
    fused.check(run.fused_blocks, {"student": student, "teacher": teacher}, run.data.attention)
    ulysses.check(run, {"student": student, "teacher": teacher})
    quantized.check_model(run.teacher_bits, teacher)
    lora.check(run.student.lora, student)
    check_length(run, student, teacher)
    check_documents(run, student, teacher)
    return Plan(
        run=run, world=world, ds_config=ds_config, student=student, teacher=teacher, pairs=matched.pairs,
        pairs_origin=matched.origin, width=width, accumulation=accumulation, stages=stages_of(run), readings={},
        attended=keys_of_windows([run.data.seq_len], student, teacher), resumes=[],
    )  # fmt: skip


def look_at(side: str, model: Model, needs_weights: bool) -> Anatomy:
    needs_weights = needs_weights and model.init == "weights"
    return inspect(f"{side}.path", model.path, needs_weights=needs_weights, is_frozen=side == "teacher")


def check_documents(run: Run, *models: Anatomy | None) -> None:
    """Refuse data.attention = "document" for recurrent layers: they carry their state from one document into the next."""
    for side, anatomy in zip(("student", "teacher"), models, strict=True):
        if run.data.attention == "document" and anatomy and anatomy.blocks_apart < anatomy.layers:
            raise UserError(
                "data.attention must be 'causal' where not all blocks keep documents apart, but is 'document' for a "
                f"{side} of family {anatomy.family}, where {anatomy.blocks_apart} of {anatomy.layers} blocks do; leave it out"
            )


def check_shards(run: Run, vocabulary: int, student: Anatomy) -> None:
    """Every shard must be whole and must fit the vocabulary and the tokenizer."""
    if not any(c.weight for c in run.data.corpora):
        raise UserError("data.corpora must have a weight above 0, but all are 0")
    indices = [index for corpus in run.data.corpora for index in read_corpus(corpus.path, run.data.stream)]
    for index in indices:
        check_vocabulary(index, vocabulary)
    check_corpus_tokenizer(indices, student)


def check_corpora(plan: Plan, progress: Progress) -> dict[str, Reading]:
    """What is read of each corpus. Refuses a corpus without a window to train on or to validate on. Refuses a corpus that
    must not repeat if it is too short for the rest of a stage."""
    training, held_out, packed, epochs = {}, {}, {}, {}
    for stage in plan.stages:
        if progress.step < stage.last_step:
            at = progress if progress.step > stage.first_step else Progress(stage.first_step)
            stream, at, _ = open_feed(plan.run, stage, at, plan.vocabulary)
            refuse_short_corpora(plan.run, stage, stream, at)
            training |= stream.parts
            packed |= {name: str(packs) for name, packs in stream.packs.items()}
            held_out |= {name: held.parts[name] for name, held in stream.held_out.items()}
            epochs[stage.name] = epochs_of(stage, stream, at)
    return {
        name: reading_of(
            training.get(name), held_out.get(name), {s: of[name] for s, of in epochs.items() if name in of}
        )._replace(packed=packed.get(name, ""))
        for name in {**training, **held_out}
    }


def reading_of(training: Part | None, held_out: Part | None, epochs: dict[str, float]) -> Reading:
    tokens, kept = (part.tokens if part else 0 for part in (training, held_out))
    part = training or held_out  # both have the same shards
    return Reading(tokens, kept, epochs, part.listed, part.place)


def attended(run: Run, vocabulary: int, *models: Anatomy | None) -> dict[int | None, float]:
    """The keys that a query sees on average, for each attention window of the models. Documents are sampled from the corpora."""
    apart = run.data.attention == "document"
    lengths = text_lengths(open_stream(run.data, run.seed, vocabulary)) if apart else [run.data.seq_len]
    return keys_of_windows(lengths, *models)


def keys_of_windows(lengths, *models: Anatomy | None) -> dict[int | None, float]:
    keys = keys_of(lengths)
    return {window: keys(window) for anatomy in models if anatomy for _, window in anatomy.scores}


def stage_flops(plan: Plan, stage: Stage) -> float:
    """Model FLOPs of all tokens of the stage. They are computed at a thousand of its steps, because loss weights change."""
    steps = range(stage.first_step, stage.last_step, max(1, stage.steps // 1000))
    each = [step_flops(plan, stage, step, plan.attended.__getitem__).model for step in steps]
    return stage.steps * plan.run.train.tokens_per_step * sum(each) / len(each)


def describe(plan: Plan) -> str:
    """The numbers of the plan as lines, for --dry-run and for the log."""
    run, train, ranks = plan.run, plan.run.train, f"{plan.world} rank{'s' if plan.world > 1 else ''}"
    lines = [f"run {run.name}: method {run.method}, {train.precision}, {ranks}, folder {run.folder}"]
    for side, a in (("teacher", plan.teacher), ("student", plan.student)):
        if a:
            shape = (
                f"{a.layers} blocks, width {a.width}, vocabulary {a.vocab_size}, {millions(a.parameters)} parameters"
            )
            lines.append(f"{side}: {a.family}, {shape}, from {a.folder}, fingerprint {fingerprint(a.folder)}")
    lines += lora.describe(run.student.lora, plan.student)
    if plan.placement:
        lines.append(str(plan.placement))
    lines += [quantized.describe(plan.teacher, run.teacher_bits)] if run.teacher_bits else []
    if plan.pairs:
        pairs = " ".join(f"({s},{t})" for s, t in plan.pairs)
        lines.append(f"pairs (student block, teacher block), {plan.pairs_origin}: {pairs}")
        lines.append(filter_sizes.describe(plan))
    lines.append(
        f"step: {train.tokens_per_step:,} tokens = {plan.accumulation} accumulation * {train.micro_batch} micro-batch * "
        + (ranks if plan.readers == plan.world else f"{plan.readers} groups of ranks")
        + f" * {run.data.seq_len} tokens"
    )
    lines += feed.describe(plan.readings)
    for stage in plan.stages:
        tokens = stage.steps * train.tokens_per_step
        epochs, flops = feed.describe_epochs(plan.readings, stage), stage_flops(plan, stage)
        lines.append(f"stage {stage.name}: {stage.steps:,} steps, {tokens:,} tokens, {epochs}, {flops:.3g} FLOPs")
    if plan.suite:
        lines.append(describe_suite(plan.suite["tasks"], run.validation))
    if run.wandb and run.wandb.mode == "online" and (why := why_offline(run.wandb)):
        lines.append(f"W&B will be offline{why}")
    if warning := why_never(run.report.every_minutes):
        lines.append(warning)
    lines += plan.resumes
    return "\n".join(lines)


def describe_suite(tasks: dict, validation) -> str:
    most = validation.suite_limit or sys.maxsize
    questions = sum(min(len(task.eval_docs), most) for task in tasks.values())
    named = ", ".join(tasks) if len(tasks) < 8 else f"{len(tasks)} tasks"
    return f"suite: {named}: {questions:,} questions at one validation in {validation.suite_every}"


def as_dict(plan: Plan) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(plan, suite=None)), default=str))
