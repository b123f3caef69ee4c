"""Everything that happens once: process group, teacher, and per stage the student's engine, its data and its
checkpoints.

A stage is built anew, also within one process: stage II starts from the student's folder and stage I's filters file,
the same way whether stage I ran a second ago, before a crash, or in another run.
"""

import logging
import os
import socket
import warnings
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from ted_scale import attention, checkpoint, feed, health, kernels, metrics, pulse, redact, replicas, resume, watch
from ted_scale import checkpoint_files as files
from ted_scale.checkpoint_files import Progress
from ted_scale.config import Run
from ted_scale.errors import Preempted, RunStopped, UserError
from ted_scale.filters import Filter
from ted_scale.guard import Guard
from ted_scale.loader import Loader
from ted_scale.plan import Plan, as_dict, flops_per_token
from ted_scale.rewind import Rewind, gone_back
from ted_scale.run_folder import claim_folder, filters_source, first_of_all, refuse_together, share
from ted_scale.saver import Saver
from ted_scale.schedule import Stage
from ted_scale.student import Student
from ted_scale.teacher import Teacher, TeacherBody
from ted_scale.train import train
from ted_scale.validate import holds_out, validate
from ted_scale.zero import build_network, shape_of, sharded_construction

log = logging.getLogger("ted_scale")
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run_plan(plan: Plan) -> None:
    """A run from process group to process group's end."""
    check_engine_config(plan)
    try:
        train_run(plan, start_ranks(plan.run))
    except Preempted:
        dist.barrier()  # rank 0 has closed its logs: the first rank that leaves has its launcher end the others
        raise
    dist.barrier()
    watch.close()
    dist.destroy_process_group()


def check_engine_config(plan: Plan) -> None:
    """What only DeepSpeed can tell of its file, while a mistake is still one sentence."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**plan.ds_config["zero_optimization"])
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(["zero_optimization", *map(str, wrong["loc"])])
        raise UserError(
            f"ds_config {plan.run.ds_config}: {key} must be what DeepSpeed knows, but is {wrong['input']!r} ({wrong['msg']}); "
            "correct it"
        ) from None
    try:
        DeepSpeedConfig(engine_config(plan))
    except Exception as error:  # its sections have checks of their own, with exceptions of every kind
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise UserError(
            f"ds_config {plan.run.ds_config} must be what DeepSpeed takes, but is not: {reason}; correct it"
        ) from None


def train_run(plan: Plan, device: torch.device) -> Progress:
    """Build and train every stage that is not done yet."""
    if dist.get_world_size() != plan.world:
        raise UserError(
            f"the plan must be made for the ranks there are ({dist.get_world_size()}), but is made for {plan.world}; "
            "make it with the launcher's number"
        )
    progress, newest = claim_folder(plan)
    writes = dist.get_rank() == 0
    if writes:
        log.info(kernels.describe(plan.run.loss.backend, device))
        log.info(describe_attention(plan, device))
    wandb_run = metrics.open_wandb(plan.run, progress.wandb_id) if writes else None
    if wandb_run:
        wandb_run.config.update({"plan": redact.cleaned(as_dict(plan))}, allow_val_change=True)
    wandb_id = wandb_run.id if wandb_run else progress.wandb_id
    written, identity = resume.as_written(plan.run), plan.identity()
    changed = resume.changes(progress.identity, identity, progress.run, written, progress.step) if newest else []
    progress = replace(progress, wandb_id=wandb_id, identity=identity, run=written)
    teacher = build_teacher(plan)
    numbers = metrics.Metrics(
        plan.run, writes=writes, total_steps=plan.total_steps, step=progress.step, device=device, wandb_run=wandb_run
    )
    numbers.say_changes(changed)
    saver = Saver(plan.run, filters_source(plan, newest), numbers.alert)
    loader = Loader(
        workers=plan.run.data.workers, prefetch=plan.run.data.prefetch, micro_batch=plan.run.train.micro_batch,
        rank=dist.get_rank(), world=dist.get_world_size(), device=device,
    )  # fmt: skip
    try:
        for stage in plan.stages:
            if progress.step < stage.last_step or validation_is_owed(plan, stage, progress, numbers):
                numbers.flops_per_token = flops_per_token(plan, stage)
                resumed = newest if progress.step > stage.first_step else None
                progress = run_stage(plan, stage, teacher, progress, resumed, numbers, loader, saver)
    except Preempted:
        saver.finish()
        raise
    except (UserError, RunStopped):  # the checkpoint that is being written is worth the wait
        saver.wait()
        raise
    finally:
        loader.close()
        numbers.close()
    metrics.say(
        f"done: {plan.run.folder} is at step {progress.step}; next: python tools/export_hf.py {plan.run.folder}"
    )
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


def start_ranks(run: Run | None = None) -> torch.device:
    """The process group, and this rank's device, which must run the losses' backend. One process without a launcher is a
    world of its own. With a run, its ranks watch each other from here on."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="deepspeed|torch")
    for key, value in {**ALONE, "MASTER_PORT": free_port()}.items():
        os.environ.setdefault(key, value)
    accelerator, local = get_accelerator(), int(os.environ["LOCAL_RANK"])
    on_cpu = accelerator.device_name() == "cpu"
    if not on_cpu:
        accelerator.set_device(local)
    device = torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(), local)
    try:
        kernels.choose(run.loss.backend if run else "auto", device)
    except ValueError as error:
        raise UserError(f"loss.{error}") from None
    if run:
        watch.start(run.limits, run.folder)
    patience_s = run.limits.longest_s + 300 if run else 1800  # a step's limit comes first: it has every rank's stack
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=patience_s))
    return device


def free_port() -> str:
    """For a process alone, beside which another may run."""
    with socket.socket() as any_free:
        any_free.bind(("127.0.0.1", 0))
        return str(any_free.getsockname()[1])


def engine_config(plan: Plan, **trained) -> dict:
    """DeepSpeed's configuration: its file's part, and what the run file owns."""
    return {
        "communication_data_type": "fp32",  # bf16 sums over ranks lose more digits the more ranks there are; ds_config may say bf16
        **plan.ds_config,
        "train_micro_batch_size_per_gpu": plan.run.train.micro_batch,
        "bf16": {"enabled": plan.run.train.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on offloaded shards too, with nothing to compile
        **trained,
    }


def build_teacher(plan: Plan):
    if plan.teacher is None:
        return lambda batch, weights: None
    import deepspeed

    config = engine_config(plan)
    config["zero_optimization"] = {k: v for k, v in config["zero_optimization"].items() if k != "offload_optimizer"}
    network = build_network(plan.teacher, ds_config=config, dtype=DTYPES[plan.run.train.precision])
    body = TeacherBody(network, plan.teacher, [t for _, t in plan.pairs])
    teacher = Teacher(deepspeed.initialize(model=body, config=config)[0], body)
    if plan.run.health.replicas_every:
        teacher.at_load = replicas.digests(replicas.shards_of(body), teacher.engine.device)
    return teacher


def build_student(plan: Plan, stage: Stage, teacher, filters_file: Path | None):
    """The stage's engine: what trains in it, with its optimizer."""
    import deepspeed

    run, dtype = plan.run, DTYPES[plan.run.train.precision]
    config = engine_config(plan, gradient_accumulation_steps=plan.accumulation, gradient_clipping=run.train.clip)
    network = build_network(plan.student, ds_config=config, dtype=dtype, init=run.student.init, seed=run.seed)
    network.requires_grad_(not stage.learns_filters)
    if run.student.gradient_checkpointing and not stage.learns_filters:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    with sharded_construction(config):
        filters_s, filters_t = build_filters(plan, stage)
    if not stage.learns_filters and filters_t is not None:
        checkpoint.load_filters(filters_file, {"student": filters_s, "teacher": filters_t})
        filters_t.requires_grad_(False)
    module = Student(
        run, network, plan.student, plan.pairs, learns_filters=stage.learns_filters, filters_s=filters_s,
        filters_t=filters_t, head_t=getattr(teacher, "head", None),
    )  # fmt: skip
    module.train()
    settings = {"lr": run.train.lr, "betas": run.train.betas, "eps": run.train.eps, "fused": True}
    optimizer = torch.optim.AdamW(parameter_groups(run, module), **settings)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]


def build_filters(plan: Plan, stage: Stage):
    """(student's, teacher's) filters, one a pair; lwd has none on the teacher's side and a random one on the
    student's."""
    if not plan.pairs:
        return None, None
    filters, lwd = plan.run.filters, plan.run.method == "lwd"
    heads = filters.head == "per_layer" and stage.learns_filters

    def side(anatomy, offset: int):
        seeds = [plan.run.seed * 1000 + 2 * k + offset for k in range(len(plan.pairs))]
        vocab = anatomy.vocab_size if heads else 0
        settings = {"mlp": filters.mlp, "random": lwd, "vocab": vocab}
        return torch.nn.ModuleList(Filter(anatomy.width, plan.width, seed=seed, **settings) for seed in seeds)

    return side(plan.student, 0), None if lwd else side(plan.teacher, 1)


def parameter_groups(run, module: Student) -> list[dict]:
    """Matrices with weight decay, the rest without, and the filters with a rate of their own."""
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    filters = [p for n, p in trained if n.startswith("filters_")]
    network = [p for n, p in trained if not n.startswith("filters_")]
    groups = [
        {
            "role": "decay",
            "params": [p for p in network if len(shape_of(p)) > 1],
            "weight_decay": run.train.weight_decay,
        },
        {"role": "plain", "params": [p for p in network if len(shape_of(p)) <= 1], "weight_decay": 0.0},
        {"role": "filters", "params": filters, "weight_decay": 0.0},
    ]
    rates = {"filters": run.filters.lr}
    return [{**g, "peak_lr": rates.get(g["role"], run.train.lr)} for g in groups if g["params"]]


def run_stage(plan: Plan, stage: Stage, teacher, progress: Progress, resumed, numbers, loader, saver) -> Progress:
    run, device = plan.run, loader.device
    pulse.building(f"the build of stage {stage.name}")
    engine = build_student(plan, stage, teacher, saver.source)
    if resumed:
        checkpoint.load(engine, resumed)
    vocabulary = min(a.vocab_size for a in (plan.student, plan.teacher) if a)
    stream, progress, changed = feed.open_feed(run, stage, progress, vocabulary)
    numbers.say_changes(changed)
    progress = health.begin(progress, stage)
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
        try:
            progress = train(stage, engine, teacher, data, guard, numbers, progress, verify, check, keep)
        except Rewind as rewind:
            progress = go_back(stage, engine, rewind, numbers)
            began = progress.step
    numbers.write(progress.step, progress.tokens, saver.finish())
    pulse.building(f"the end of stage {stage.name}")
    saver.forget()
    engine.destroy()
    return progress


def go_back(stage: Stage, engine, rewind: Rewind, numbers) -> Progress:
    """Into the engine there is: DeepSpeed keeps every module that it was ever given, so that another would need its room."""
    if fault := first_of_all(files.check_digests(rewind.checkpoint, share())):
        raise RunStopped(
            f"{files.skipped(rewind.checkpoint, fault)}; start the same command again to go on from an earlier one"
        )
    pulse.beat(f"the way back to {rewind.checkpoint.name}")
    progress = gone_back(files.read_progress(rewind.checkpoint), rewind.progress)
    checkpoint.load(engine, rewind.checkpoint)
    numbers.go_back(progress)
    return health.begin(progress, stage)


def save(plan: Plan, stage: Stage, numbers, saver, engine, progress: Progress) -> None:
    """A checkpoint; at the end of stage I the filters first, so that its last checkpoint is never without them."""
    pulse.beat(f"the checkpoint of step {progress.step}")
    done = progress.step == stage.last_step
    if stage.learns_filters and done:
        save_filters(plan, engine)
    with_filters = plan.run.method == "ted" and (done or not stage.learns_filters)
    numbers.write(progress.step, progress.tokens, saver.save(engine, progress, with_filters=with_filters))


def save_filters(plan: Plan, engine) -> None:
    """Stage I's result as one file, for this run's stage II and for other runs."""
    sides, sentence = {"student": engine.module.filters_s, "teacher": engine.module.filters_t}, None
    tensors = checkpoint.gather_filters(sides)
    if dist.get_rank() == 0:
        try:
            checkpoint.write_filters(plan.filters_file, tensors, plan.filters_identity())
        except OSError as error:
            sentence = f"{plan.run.folder} must have room for {files.FILTERS}, but has not: {error.strerror}"
            sentence += "; the last checkpoint is intact: free space and start the same command again"
    refuse_together(sentence)
