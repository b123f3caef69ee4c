"""Scenarios of ranks.py about numbers that go wrong: updates that are dropped, loss spikes that send a run back, and bits that
flip. What is wrong comes with the text that is read, so that it comes again wherever that text is read again."""

import contextlib
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from data_scenarios import again_from
from scenarios import TWO, start
from tiny import make_run

from ted_scale import run as build
from ted_scale import run_folder
from ted_scale.base.errors import RunStopped
from ted_scale.data.stream import open_stream
from ted_scale.distill.student import Student
from ted_scale.metrics.metrics import Metrics
from ted_scale.models import weights
from ted_scale.models.zero import is_sharded

NAN, INF = float("nan"), float("inf")


def quick(folder, steps: int = 6) -> dict:
    """Nothing is validated."""
    return {"train": {"steps": steps, **TWO}, "data": {"corpora": [{"path": str(folder / "corpus")}]}}


@contextlib.contextmanager
def reading(folder, changes: dict):
    """`changes`: (stage I?, position) → what becomes of the losses, by (module, losses), where that sample is the first of a
    micro-batch that is trained on. Of each four samples of a step rank 1 has the last two."""
    run = make_run(folder, **quick(folder))
    stream = open_stream(run.data, run.seed, 128)
    by_text = {(one, tuple(stream.sample(p).tokens.tolist())): change for (one, p), change in changes.items()}
    forward = Student.forward

    def poisoned(self, batch, *arguments):
        while hooks:
            hooks.pop().remove()
        losses = forward(self, batch, *arguments)
        change = by_text.get((self.learns_filters, tuple(batch.tokens_BT[0].tolist())))
        return change(self, losses) if change and torch.is_grad_enabled() else losses

    Student.forward = poisoned
    try:
        yield
    finally:
        Student.forward = forward


@contextlib.contextmanager
def watching(look):
    """`look(step, student's engine, teacher)` after every step, before anything else is made of it."""
    built, add = {}, Metrics.add
    originals = build.build_student, build.build_teacher

    def remember(name, original):
        def wrapped(*arguments):
            built[name] = original(*arguments)
            return built[name]

        return wrapped

    def looked(self, progress, *arguments, **named):
        look(progress.step, built["student"], built["teacher"])
        return add(self, progress, *arguments, **named)

    Metrics.add = looked
    build.build_student, build.build_teacher = remember("student", originals[0]), remember("teacher", originals[1])
    try:
        yield
    finally:
        Metrics.add = add
        build.build_student, build.build_teacher = originals


def no_number(module, losses):
    """A term is not finite, but the gradient is: DeepSpeed would update."""
    return losses._replace(kl=losses.kl * NAN)


def steep(module, losses):
    """Every loss is finite, but the gradient of one tensor is not."""
    bias = dict(module.named_parameters())["network.transformer.ln_f.bias"]  # as an attribute it would be gathered
    hooks.append(bias.register_hook(lambda gradient: gradient * INF))
    return losses


hooks: list = []  # of the micro-batch before


def high(module, losses):
    return losses._replace(total=losses.total * 20)


def bits(tensors) -> str:
    return hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in tensors)).hexdigest()


def as_trained(engine) -> dict:
    """Everything of this rank that an update changes: weights, masters, moments, Adam's own count of steps."""
    zero = engine.optimizer
    states = [zero.optimizer.state[flat] for flat in zero.fp32_partitioned_groups_flat if zero.optimizer.state[flat]]
    moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
    weights = [p.ds_tensor for p in engine.module.parameters()]
    return {
        "bits": bits([*zero.fp32_partitioned_groups_flat, *weights, *moments]),
        "steps": [int(state["step"]) for state in states],
        "sub_groups": len(zero.fp16_groups),
    }


def skips(folder, device):
    """Step 3 has a NaN among its losses, step 4 a gradient that is not finite, both on rank 1; several sub-groups, on the
    device and offloaded."""
    from deepspeed.utils import safe_get_local_grad

    seen = {}
    on_host = {"offload_optimizer": {"device": "cpu"}}
    for name, offload, once in (
        ("skips", {}, False),
        ("skips_offloaded", on_host, False),
        ("skips_once", on_host, True),
    ):
        config = folder / f"zero3_{name}_{dist.get_rank()}.json"
        sharded = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 3000}
        config.write_text(json.dumps({"zero_optimization": {**sharded, **offload}}))
        states, left = seen[name], seen[f"{name} left"] = {}, {}

        def look(step, engine, _, states=states, left=left):
            states[step] = as_trained(engine)
            left[step] = sum(safe_get_local_grad(p).abs().sum().item() for p in engine.module.parameters())

        health, sections = {"on_nonfinite": "skip", "max_skipped": 2}, quick(folder)
        sections["train"] = {**sections["train"], "reduce_once": once}
        with reading(folder, {(False, 18): no_number, (False, 26): steep}), watching(look):
            progress = start(folder, device, name=name, method="kd", health=health, ds_config=str(config), **sections)
        seen[f"{name} counted"] = progress.skipped
    return seen


REWINDS = {
    "filters": {"steps": 4}, "checkpoint": {"every": 2, "keep": 100, "background": False},
    "health": {"on_spike": "rewind", "spike_window": 4, "spike_factor": 2.0},
}  # fmt: skip
# Of stage I step 4; of stage II step 6, where it has no checkpoint yet, then step 9, and again what is read there instead.
SPIKES = {(True, 26): high, (False, 10): high, (False, 34): high, (False, 42): high}


class Killed(BaseException):
    pass


def rewinds(folder, device):
    """A run that meets four spikes; the same from its checkpoint of step 6 on, killed after it went back twice and before it
    saved again; and what its last stretch must be: on from the checkpoint of step 6 with sample 48."""
    visited = []

    def look(step, engine, _):
        visited.append(step)
        if killing and visited[-2:] == [8, 7]:
            raise Killed

    killing, sections = False, {**REWINDS, **quick(folder, steps=8)}
    with reading(folder, SPIKES), watching(look):
        start(folder, device, name="rewinds", **sections)
        straight, killing = visited.copy(), True
        again_from(folder, "rewinds", 6, "rewinds_killed")
        with contextlib.suppress(Killed):
            start(folder, device, name="rewinds_killed", **sections)
        killing = False
        start(folder, device, name="rewinds_killed", **sections)
    again_from(folder, "rewinds", 6, "rewinds_beside")
    read_progress = run_folder.read_progress
    run_folder.read_progress = lambda checkpoint: replace(read_progress(checkpoint), samples=48)
    try:
        start(folder, device, name="rewinds_beside", **sections | {"health": {"on_spike": "off"}})
    finally:
        run_folder.read_progress = read_progress
    return {"straight": straight, "killed": visited[len(straight) :]}


WHOLE = str(Path(__file__).parents[2] / "ds_configs" / "zero3.json")  # small tensors stay whole


def flips(folder, device):
    """One bit of one rank's memory after step 2: of a teacher's shard, of a small teacher's tensor, of the student's, of a whole
    teacher, of a filter that a teacher was lent; and one that this rank read wrongly, of a whole teacher."""

    def flip(tensor) -> None:
        tensor.view(-1).view(torch.int32)[3] ^= 1

    def shard(student, teacher):
        flip(dict(teacher.engine.module.named_parameters())["network.model.layers.1.mlp.up_proj.weight"].ds_tensor)

    def teachers(student, teacher):
        flip(dict(teacher.engine.module.named_parameters())["network.model.norm.weight"].data)

    def students(student, teacher):
        flip(dict(student.module.named_parameters())["network.transformer.ln_f.bias"].data)

    def replica(student, teacher):
        flip(teacher.body.network.model.norm.weight.data)

    def lent(student, teacher):
        flip(teacher.filters[1].weight.data)

    def read(student, teacher): ...

    said, load = {}, weights.load_weights

    def load_wrongly(network, *arguments):
        load(network, *arguments)
        if dist.get_rank() == 1 and not is_sharded(network.lm_head.weight):
            flip(network.lm_head.weight.data)

    for what in (shard, teachers, students, replica, lent, read):

        def look(step, student, teacher, what=what):
            if step == 2 and dist.get_rank() == 1:
                what(student, teacher)

        checked = {"ds_config": WHOLE, "health": {"replicas_every": 1}}
        checked |= {"teacher": {"placement": "replicated"}} if what in (replica, read) else {}
        method = {"method": "ted", "filters": {"steps": 0, "width": 16}} if what is lent else {"method": "kd"}
        weights.load_weights = load_wrongly if what is read else load
        try:
            with watching(look):
                start(folder, device, name=f"flips_{what.__name__}", **{**quick(folder, steps=3), **method, **checked})
        except RunStopped as error:
            said[what.__name__] = str(error)
        finally:
            weights.load_weights = load
    return said
