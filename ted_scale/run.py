"""A run from its first process group to its exit: ranks, folder, teacher, and each stage with its engine, data and saves.

train.py has the loop over steps. A border is a step where the blend may change; a stretch is the steps between two borders.
Note: a stage is always built in the same way, from the student's folder and the filters file of stage I. It makes no
difference whether stage I ran in this process, before a crash, or in another run.
"""

import gc
import logging
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ted_scale import feed, run_folder
from ted_scale import validate as validation
from ted_scale.base import exits
from ted_scale.base.errors import Preempted, RunStopped, UserError
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints import holder, life, owner, state
from ted_scale.checkpoints.filters_file import gather_filters, save_filters
from ted_scale.checkpoints.progress import Progress, read_progress
from ted_scale.checkpoints.saver import Saver
from ted_scale.config import changes
from ted_scale.data.loader import Loader
from ted_scale.data.same_text import open_together
from ted_scale.data.stream import Stream
from ted_scale.distill.flops import step_flops
from ted_scale.distill.stages import Stage
from ted_scale.engines import build_student, build_teacher, check_device, check_engine_config, describe, take_back
from ted_scale.filter_start import first_filters
from ted_scale.forecast import summary
from ted_scale.forecast.placement import agreed, needs_less
from ted_scale.health import replicas, teacher_start
from ted_scale.health.guard import Guard
from ted_scale.health.rewind import Rewind, gone_back
from ted_scale.metrics import samples
from ted_scale.metrics.metrics import Metrics
from ted_scale.metrics.wandb_connection import add_facts, facts_of, open_wandb
from ted_scale.models import zero_hooks
from ted_scale.plan import Plan, as_dict
from ted_scale.ranks import pulse, shortage, stacks, watch
from ted_scale.ranks.agree import broadcast, of_rank_0, share, verdict
from ted_scale.ranks.group import start_ranks
from ted_scale.train import train

log = logging.getLogger("ted_scale")


class Parts(NamedTuple):
    """What all stages of a run use."""

    plan: Plan
    teacher: object
    metrics: Metrics
    loader: Loader
    saver: Saver


# The run


def run_plan(plan: Plan) -> None:
    """Start the ranks, train the run, and end the ranks."""
    check_engine_config(plan)
    device = start_ranks(plan.run, partial(check_device, plan))
    try:
        on_cpu, plan = device.type == "cpu", replace(plan, placement=agreed(plan.placement))
        with shortage.enough(shortage.ways_to_need_less(plan.run, plan.ds_config, on_cpu, needs_less(plan, on_cpu))):
            train_run(plan, device)
    except Preempted:
        dist.barrier()  # until rank 0 has closed its logs: the launcher kills all ranks when the first one exits
        raise
    dist.barrier()
    watch.close()
    dist.destroy_process_group()


def train_run(plan: Plan, device: torch.device) -> Progress:
    """Train every stage that is not done yet."""
    refuse_other_world(plan)
    folder = plan.run.folder
    if dist.get_rank() == 0:
        exits.where_it_stands = partial(run_folder.where_it_stands, folder, plan.total_steps)
    progress, newest = run_folder.claim_folder(plan)
    parts, progress = build_parts(plan, device, progress, newest)
    try:
        for stage in plan.stages:
            if progress.step < stage.last_step or validation_is_missing(parts, stage, progress):
                resumed = newest if progress.step > stage.first_step else None
                progress = train_stage(parts, stage, progress, resumed)
        parts.saver.copier.copy_newest_or_fail()
    except Preempted:
        parts.saver.finish(leaving=True)
        parts.saver.copier.finish(leaving=True)
        raise
    except (UserError, RunStopped):  # wait for the checkpoint that is being written, and for its copy
        parts.saver.wait(leaving=True)
        parts.saver.copier.finish(leaving=True)  # the next start copies what is missing; other ranks may be in a step
        raise
    finally:
        parts.loader.close()
        # This comes before the wait for W&B. That may take a minute, which may be longer than the grace period.
        if dist.get_rank() == 0:
            stacks.aside(owner.LEAVING_S, owner.leave, plan.run)
        parts.metrics.close(done=sys.exc_info()[0] is None)
        if dist.get_rank() == 0 and not parts.saver.is_writing():
            holder.leave(folder)
    parts.metrics.write_last_words(life.DONE)
    parts.metrics.tell_end(f"done: {folder} is at step {progress.step}; next: {run_folder.to_export(plan.run)}")
    return progress


def refuse_other_world(plan: Plan) -> None:
    if dist.get_world_size() != plan.world:
        raise UserError(
            f"the plan must be made for the ranks there are ({dist.get_world_size()}), but is made for {plan.world}; "
            "make it with the launcher's number"
        )


def build_parts(plan: Plan, device, progress: Progress, newest: Path | None) -> tuple[Parts, Progress]:
    """Returns the parts that all stages use, and the progress with this start's run file and W&B run."""
    run, writes = plan.run, dist.get_rank() == 0
    spent, lost = broadcast(life.take_up(run.folder, progress.step, progress.spent) if writes else None)
    if writes:
        for line in describe(plan, device):
            log.info(line)
    # W&B opens before the teacher is loaded, so it also shows a run that fails while it loads the teacher.
    wandb_run = open_wandb(run, progress.wandb_id) if writes else None
    if wandb_run:
        wandb_run.tell(partial(add_facts, facts_of(as_dict(plan))))
    teacher = build_teacher(plan)
    at_start = {"total_steps": plan.total_steps, "step": progress.step, "device": device}
    metrics = Metrics(run, writes=writes, **at_start, wandb_run=wandb_run, spent=spent)
    exits.at_end = metrics.write_last_words
    if lost:
        metrics.restarted(lost)
    written, identity = changes.as_written(run), plan.identity()
    if newest:
        metrics.log_changes(changes.changes(progress.identity, identity, progress.run, written, progress.step))
    saver = Saver(run, run_folder.filters_files(plan, newest), metrics.alert)
    saver.copier.begin_again(newest)
    loader = Loader(
        prefetch=run.data.prefetch, micro_batch=run.train.micro_batch,
        rank=dist.get_rank(), world=dist.get_world_size(), sequence_parallel=run.data.sequence_parallel, device=device,
    )  # fmt: skip
    wandb_id = wandb_run.id if wandb_run else progress.wandb_id
    progress = replace(progress, wandb_id=wandb_id, identity=identity, run=written)
    return Parts(plan, teacher, metrics, loader, saver), progress


# A stage


def train_stage(parts: Parts, stage: Stage, progress: Progress, resumed: Path | None) -> Progress:
    """Build the stage, then train on one stretch of its data after another, then end the stage."""
    pulse.building(f"the build of stage {stage.name}")
    stream, progress = open_data(parts, stage, progress)
    student = build_stage(parts, stage, stream, progress, resumed)
    guard = Guard(student, stage, parts.metrics.alert, parts.saver.wait)
    parts.metrics.expect(partial(summary.ahead, parts.plan, stage, progress.step, parts.loader.device.type))
    progress = validate_first(parts, stage, student, stream, progress, resumed)
    parts.metrics.resume_from(progress.tokens)
    while progress.step < stage.last_step:
        stream, progress = next_stretch(parts, stage, student, stream, progress)
        progress = train_stretch(parts, stage, student, guard, stream, progress)
    end_stage(parts, stage, student, progress)
    return progress


def build_stage(parts: Parts, stage: Stage, stream: Stream, progress: Progress, resumed: Path | None):
    """The student's engine, with the state of the checkpoint that it resumes from."""
    plan, teacher, _, loader, saver = parts
    parts.metrics.ledger.turn("start")
    take_back(plan, teacher)
    teacher_start.begin(plan, stream, teacher, parts.metrics, progress, loader.device)
    filters_file = first_filters(plan, stage, stream, teacher, progress, saver.filters_file, loader.device)
    gc.collect()  # frees the engine of an earlier stage, which has reference cycles
    student = build_student(plan, stage, teacher, filters_file)
    if resumed:
        state.load(student, resumed)
    saver.prepare(student, progress.step)
    return student


def open_data(parts: Parts, stage: Stage, progress: Progress) -> tuple[Stream, Progress]:
    opened = partial(feed.open_feed, parts.plan.run, stage, progress, parts.plan.vocabulary)
    stream, progress, changed = open_together(opened)
    parts.metrics.log_changes(changed)
    return stream, progress


def validate_first(parts: Parts, stage: Stage, student, stream: Stream, progress: Progress, resumed) -> Progress:
    """Validate student and teacher before stage II's first step. On a resume, repeat a validation that a signal interrupted."""
    fresh, stopping = progress.step == stage.first_step and not stage.learns_filters, False
    lacked = resumed and validation.lacks_best(parts.plan.run, stage, progress)
    measured = (*parts[:3], stream.held_out, student)
    if fresh or (resumed and validation_is_missing(parts, stage, progress)):
        progress, stopping = validation.validate(*measured, progress, with_teacher=fresh)
        if lacked and progress.scores and not stopping:  # this step's checkpoint lacks the scores
            parts.saver.copier.finish()
            save_checkpoint(parts.plan, stage, parts.metrics, parts.saver, student, progress)
    if stopping or (stage.writes_samples(progress.step) and samples.write(*measured, progress)):
        raise Preempted(pulse.now.stepped)  # the next start validates
    return progress


def validation_is_missing(parts: Parts, stage: Stage, progress: Progress) -> bool:
    """Whether a signal interrupted the validation of the step that the run resumes from. Only rank 0 has the rows."""
    return broadcast(validation.missing(parts.plan, parts.metrics, stage, progress))


def next_stretch(parts: Parts, stage: Stage, student, stream: Stream, progress: Progress) -> tuple[Stream, Progress]:
    """(stream, progress) for the steps up to the next border. An adaptive blend is measured at every border. If the run cannot
    go on, it saves first. All ranks find the same reason, so all of them take part in the save."""
    plan, teacher, metrics, *_ = parts
    if feed.due(stage, stream, progress):
        stream, progress, stopping = feed.weigh(plan, teacher, metrics, student, stream, progress)
        if stopping:
            save_unless_saved(parts, stage, student, progress)
            raise Preempted(pulse.now.stepped)
    try:
        feed.refuse_short_corpora(plan.run, stage, stream, progress)
    except UserError:
        save_unless_saved(parts, stage, student, progress)
        raise
    return stream, progress


def train_stretch(parts: Parts, stage: Stage, student, guard: Guard, stream: Stream, progress: Progress) -> Progress:
    """Train up to the next border, or go back to an earlier checkpoint after a loss spike."""
    plan, teacher, metrics, loader, saver = parts
    metrics.reads(stream)
    stop, each = feed.last_sample(stage, progress), stage.samples_per_step
    data = loader.steps(stream, start=progress.samples, stop=stop, samples_per_step=each)
    data = metrics.counted(enumerate(data, progress.step), partial(step_flops, plan, stage))
    verify = partial(replicas.verify, teacher)
    validate = partial(validation.validate, plan, teacher, metrics, stream.held_out)
    write_samples = partial(samples.write, plan, teacher, metrics, stream.held_out)
    save = partial(save_checkpoint, plan, stage, metrics, saver)
    try:
        return train(stage, student, teacher, data, guard, metrics, progress, verify, validate, write_samples, save)
    except Rewind as rewind:
        progress = go_back(stage, student, rewind, metrics)
        saver.prepare(student, progress.step)
        return progress


def end_stage(parts: Parts, stage: Stage, student, progress: Progress) -> None:
    """Wait for the last save and its copy, then free the engine."""
    metrics, saver = parts.metrics, parts.saver
    with metrics.ledger.within("checkpoints"):
        metrics.write(progress.step, progress.tokens, saver.finish())
        saver.copier.finish()
    pulse.building(f"the end of stage {stage.name}")
    saver.forget()
    zero_hooks.destroy(student)


def go_back(stage: Stage, student, rewind: Rewind, metrics: Metrics) -> Progress:
    """Load an earlier checkpoint into the existing engine. DeepSpeed releases no module: a second would double the memory."""
    for checkpoint in rewind.checkpoints:
        pulse.building(f"the rewind to {checkpoint.name}")
        if (fault := verdict(files.check_digests, checkpoint, share())) is None:
            progress = gone_back(of_rank_0(read_progress, checkpoint), rewind.progress)
            state.load(student, checkpoint)
            metrics.go_back(progress)
            return progress
        metrics.alert("a damaged checkpoint", files.skipped(checkpoint, fault))
    raise RunStopped(f"{stage.run.folder} must hold a whole checkpoint to go back to, but all of them are damaged")


# Saves


def save_checkpoint(plan: Plan, stage: Stage, metrics: Metrics, saver: Saver, student, progress: Progress) -> None:
    """Save the engine's state. At the end of stage I the filters file is written first, so the last checkpoint of stage I
    never exists without it."""
    pulse.doing(f"the checkpoint of step {progress.step}")
    done = progress.step == stage.last_step
    if stage.learns_filters and done:
        filters = gather_filters({"student": student.module.filters_s, "teacher": student.module.filters_t})
        save_filters(plan.filters_file, filters, plan.filters_identity())
        saver.use_filters(plan.filters_file)
    with_filters = plan.run.method == "ted" and (done or not stage.learns_filters)
    with metrics.ledger.within("checkpoints"):
        progress = replace(progress, spent=metrics.ledger.spent())
        row = saver.save(student, progress, with_filters=with_filters)
    metrics.write(progress.step, progress.tokens, row)


def save_unless_saved(parts: Parts, stage: Stage, student, progress: Progress) -> None:
    """Save, unless this step is saved already. A second save would first remove the good checkpoint."""
    if progress.step != parts.saver.saved_step:
        save_checkpoint(parts.plan, stage, parts.metrics, parts.saver, student, progress)
