"""Everything that happens once, in order: ranks, run folder, teacher, and per stage the student's engine, its data and its
checkpoints.

A stage is built anew, also within one process: stage II starts from the student's folder and stage I's filters file,
the same way whether stage I ran a second ago, before a crash, or in another run.
"""

import gc
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from ted_scale import feed, kernels
from ted_scale.base import exits, redact
from ted_scale.base.errors import Preempted, RunStopped, UserError
from ted_scale.checkpoints import engine_state
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.attempts import attempt
from ted_scale.checkpoints.filters_file import gather_filters, write_filters
from ted_scale.checkpoints.progress import Progress, read_progress
from ted_scale.checkpoints.saver import Saver, give_up, sentence
from ted_scale.config import changes
from ted_scale.data.loader import Loader
from ted_scale.distill.flops import step_flops
from ted_scale.distill.stages import Stage
from ted_scale.engines import DTYPES, build_student, build_teacher, check_engine_config
from ted_scale.filter_start import write_start
from ted_scale.health import replicas, spikes
from ted_scale.health.guard import Guard
from ted_scale.health.rewind import Rewind, gone_back
from ted_scale.metrics import metrics
from ted_scale.metrics.console import say
from ted_scale.metrics.tracking import open_wandb
from ted_scale.models import attention, fused, zero_hooks
from ted_scale.models.fused import describe as describe_blocks
from ted_scale.plan import Plan, as_dict
from ted_scale.ranks import pulse, shortage, watch
from ted_scale.ranks.agree import broadcast, first_of_all, share
from ted_scale.ranks.group import start_ranks
from ted_scale.run_folder import claim_folder, filters_files, where_it_stands
from ted_scale.train import train
from ted_scale.validate import holds_out, validate

log = logging.getLogger("ted_scale")


def run_plan(plan: Plan) -> None:
    """A run from process group to process group's end."""
    check_engine_config(plan)
    device = start_ranks(plan.run, partial(check_device, plan.run))
    try:
        with shortage.enough(shortage.ways_to_need_less(plan.run, plan.ds_config, device.type == "cpu")):
            train_run(plan, device)
    except Preempted:
        dist.barrier()  # rank 0 has closed its logs: the first rank that leaves has its launcher end the others
        raise
    dist.barrier()
    watch.close()
    dist.destroy_process_group()


def check_device(run, device: torch.device) -> None:
    """What the run file asks for must run there."""
    try:
        kernels.choose(run.loss.backend, device)
    except ValueError as error:
        raise UserError(f"loss.{error}") from None
    fused.check_device(run.fused_blocks, device)


def train_run(plan: Plan, device: torch.device) -> Progress:
    """Build and train every stage that is not done yet."""
    if dist.get_world_size() != plan.world:
        raise UserError(
            f"the plan must be made for the ranks there are ({dist.get_world_size()}), but is made for {plan.world}; "
            "make it with the launcher's number"
        )
    writes = dist.get_rank() == 0
    if writes:
        exits.where_it_stands = partial(where_it_stands, plan.run.folder)
    progress, newest = claim_folder(plan)
    if writes:
        log.info(kernels.describe(plan.run.loss.backend, device))
        log.info(describe_attention(plan, device))
        log.info(describe_blocks(plan.run.fused_blocks, {"student": plan.student, "teacher": plan.teacher}, device))
    wandb_run = open_wandb(plan.run, progress.wandb_id) if writes else None
    if wandb_run:
        wandb_run.config.update({"plan": redact.cleaned(as_dict(plan))}, allow_val_change=True)
    wandb_id = wandb_run.id if wandb_run else progress.wandb_id
    written, identity = changes.as_written(plan.run), plan.identity()
    changed = changes.changes(progress.identity, identity, progress.run, written, progress.step) if newest else []
    progress = replace(progress, wandb_id=wandb_id, identity=identity, run=written)
    teacher = build_teacher(plan)
    numbers = metrics.Metrics(
        plan.run, writes=writes, total_steps=plan.total_steps, step=progress.step, device=device, wandb_run=wandb_run
    )
    numbers.say_changes(changed)
    saver = Saver(plan.run, filters_files(plan, newest), numbers.alert)
    loader = Loader(
        prefetch=plan.run.data.prefetch, micro_batch=plan.run.train.micro_batch,
        rank=dist.get_rank(), world=dist.get_world_size(), device=device,
    )  # fmt: skip
    try:
        for stage in plan.stages:
            if progress.step < stage.last_step or validation_is_owed(plan, stage, progress, numbers):
                resumed = newest if progress.step > stage.first_step else None
                progress = run_stage(plan, stage, teacher, progress, resumed, numbers, loader, saver)
    except Preempted:
        saver.finish(leaving=True)
        raise
    except (UserError, RunStopped):  # the checkpoint that is being written is worth the wait
        saver.wait(leaving=True)
        raise
    finally:
        loader.close()
        numbers.close()
    say(f"done: {plan.run.folder} is at step {progress.step}; next: python tools/export_hf.py {plan.run.folder}")
    return progress


def describe_attention(plan: Plan, device: torch.device) -> str:
    sides = {"student": plan.student, "teacher": plan.teacher}
    layers = {side: anatomy.attention for side, anatomy in sides.items() if anatomy}
    data, dtype = plan.run.data, DTYPES[plan.run.train.precision]
    return attention.describe(data.attention, layers, data.seq_len, dtype, device)


def validation_is_owed(plan: Plan, stage: Stage, progress: Progress, numbers) -> bool:
    """Whether a signal cut short the validation of the very step that the run goes on from."""
    owed = [stage.validates(progress.step) and holds_out(plan.run) and not numbers.stands_already("val/loss")]
    dist.broadcast_object_list(owed, src=0)
    return owed[0]


def run_stage(plan: Plan, stage: Stage, teacher, progress: Progress, resumed, numbers, loader, saver) -> Progress:
    run, device = plan.run, loader.device
    pulse.building(f"the build of stage {stage.name}")
    source = first_filters(plan, stage, teacher, progress, saver, device)
    gc.collect()  # an earlier stage's engine, which holds itself in circles
    engine = build_student(plan, stage, teacher, source)
    if resumed:
        engine_state.load(engine, resumed)
    saver.prepare(engine)
    vocabulary = min(a.vocab_size for a in (plan.student, plan.teacher) if a)
    stream, progress, changed = feed.open_feed(run, stage, progress, vocabulary)
    numbers.say_changes(changed)
    progress = spikes.begin(progress, stage)
    check = partial(validate, plan, teacher, numbers, vocabulary, device)
    keep, guard = partial(save, plan, stage, numbers, saver), Guard(engine, stage, numbers.alert, saver.wait)
    verify = partial(replicas.verify, teacher)
    fresh = progress.step == stage.first_step and not stage.learns_filters
    if fresh or (resumed and validation_is_owed(plan, stage, progress, numbers)):
        progress, cut_short = check(engine, progress, with_teacher=fresh)
        if cut_short:
            raise Preempted  # before a step: the next start validates anew
    numbers.resume_from(progress.tokens)
    began = progress.step

    def keep_what_is_not() -> None:  # a second time would begin by removing the first
        if progress.step > began and not stage.saves(progress.step):
            keep(engine, progress)

    # Only where all ranks leave together: a save waits for every one of them.
    while progress.step < stage.last_step:
        if feed.due(stage, stream, progress):
            try:
                stream, progress = feed.weigh(plan, teacher, numbers, vocabulary, device, engine, stream, progress)
            except Preempted:
                keep_what_is_not()
                raise
        try:
            feed.refuse_short_corpora(run, stage, stream, progress)
        except UserError:
            keep_what_is_not()
            raise
        numbers.reads(stream)
        data = loader.steps(
            stream,
            start=progress.samples,
            stop=feed.last_sample(stage, progress),
            samples_per_step=stage.samples_per_step,
        )
        data = numbers.counted(enumerate(data, progress.step), partial(step_flops, plan, stage))
        try:
            progress = train(stage, engine, teacher, data, guard, numbers, progress, verify, check, keep)
        except Rewind as rewind:
            progress = go_back(stage, engine, rewind, numbers)
            began = progress.step
    numbers.write(progress.step, progress.tokens, saver.finish())
    saver.copier.finish()
    pulse.building(f"the end of stage {stage.name}")
    saver.forget()
    zero_hooks.destroy(engine)
    return progress


def first_filters(plan: Plan, stage: Stage, teacher, progress: Progress, saver, device) -> Path | None:
    """The file of the filters that a stage begins with; None where there are none, or a checkpoint of the stage has them."""
    filters, begins = plan.run.filters, stage is plan.stages[0] and progress.step == stage.first_step
    own = plan.run.method == "ted" and not filters.from_run and begins
    if own and not stage.learns_filters:
        return write_start(plan, stage, teacher, device, plan.filters_file)
    if own and filters.start == "states":
        return write_start(plan, stage, teacher, device, plan.run.folder / "filters_start.safetensors")
    return None if stage.learns_filters else saver.filters_file


def go_back(stage: Stage, engine, rewind: Rewind, numbers) -> Progress:
    """Into the engine there is: another would be built beside it."""
    for place in rewind.checkpoints:
        pulse.beat(f"the way back to {place.name}")
        if (fault := first_of_all(files.check_digests(place, share()))) is None:
            progress = gone_back(read_progress(place), rewind.progress)
            engine_state.load(engine, place)
            numbers.go_back(progress)
            return spikes.begin(progress, stage)
        numbers.alert("a damaged checkpoint", files.skipped(place, fault))
    raise RunStopped(f"{stage.run.folder} must hold a whole checkpoint to go back to, but all there are are damaged")


def save(plan: Plan, stage: Stage, numbers, saver, engine, progress: Progress) -> None:
    """A checkpoint; at the end of stage I the filters first, so that its last checkpoint is never without them."""
    pulse.beat(f"the checkpoint of step {progress.step}")
    done = progress.step == stage.last_step
    if stage.learns_filters and done:
        save_filters(plan, engine)
        saver.take_filters_from(plan.filters_file)
    with_filters = plan.run.method == "ted" and (done or not stage.learns_filters)
    numbers.write(progress.step, progress.tokens, saver.save(engine, progress, with_filters=with_filters))


def save_filters(plan: Plan, engine) -> None:
    """Stage I's result as one file, for this run's stage II and for other runs."""
    sides, failure = {"student": engine.module.filters_s, "teacher": engine.module.filters_t}, None
    tensors = gather_filters(sides)
    if dist.get_rank() == 0:
        failure, _ = attempt(write_filters, plan.filters_file, tensors, plan.filters_identity())
    if failure := broadcast(failure):
        give_up(sentence(plan.filters_file, 0, failure))
