"""The scenarios of ranks.py: each is called on every rank with the folder of models and corpus, and returns plain
values."""

import contextlib
import errno
import json
import resource
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import FAMILIES, make_run

from ted_scale import run as build
from ted_scale.base import durable
from ted_scale.base.errors import RunStopped, UserError
from ted_scale.checkpoints import attempts, copier, saver
from ted_scale.checkpoints import folder as checkpoint_files
from ted_scale.checkpoints.progress import Progress
from ted_scale.checkpoints.saver import Save
from ted_scale.checkpoints.state import KINDS, Snapshot, key_of
from ted_scale.distill.student import Student
from ted_scale.distill.teacher import Teacher
from ted_scale.kernels.arguments import check_labels
from ted_scale.kernels.products import all_count
from ted_scale.metrics.metrics import Metrics
from ted_scale.models import fused, zero_hooks
from ted_scale.models.engine_config import engine_config
from ted_scale.models.zero import gathered, is_sharded, shape_of
from ted_scale.plan import make_plan
from ted_scale.ranks.agree import new_group

TWO = {"micro_batch": 2}  # two micro-batches a step on two ranks: half the time of four
TEN_STEPS = {"filters": {"steps": 4}, "train": {"steps": 6, **TWO}}
FIVE_STEPS = {"filters": {"steps": 2}, "train": {"steps": 3, **TWO}}  # a stage's first step learns the order of weights
THREE_STEPS = {"filters": {"steps": 1}, "train": {"steps": 2, **TWO}}
SKIPPING = {"divergence": "jsd", "skip_low_entropy": 0.4}  # from the second step of stage II on
SAVED = {**TEN_STEPS, "checkpoint": {"every": 3, "keep": 100}, "loss": {"balance": "auto"}}


MIXTURES = {"qwen3_moe": "sharded", "qwen3_next": "node"}  # a teacher's family: its place


def beside(names: list[str]) -> list[tuple[str, str]]:
    """Each name with the one after it, the last with the first."""
    return list(zip(names, [*names[1:], names[0]], strict=True))


def start(folder: Path, device, **sections):
    """Validates a row for each of four ranks, unless it is told more."""
    run = make_run(folder, **{"validation": {"tokens": 128}, **sections})
    with groups_that_end():
        return build.train_run(make_plan(run, dist.get_world_size()), device)


@contextlib.contextmanager
def groups_that_end():
    """The groups of a run's saves end with it here, and elsewhere with its process: of each, a thread of gloo looks around a
    hundred times a second, and a process here has many runs (docs/log.md)."""
    groups: list = []

    def noted():
        groups.append(new_group())
        return groups[-1]

    saver.new_group = copier.new_group = noted
    try:
        yield
    finally:
        saver.new_group = copier.new_group = new_group
        dist.barrier()  # a save's last words may be on their way to another rank
        for group in groups:
            dist.destroy_process_group(group)


def rows(folder: Path, name: str) -> list[dict]:
    text = (folder / "runs" / name / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def put_back(run: Path, step: int) -> None:
    """As if the run had been killed when its checkpoint of `step` was the newest."""
    for standing in checkpoint_files.published(run):
        if standing.step > step:
            shutil.rmtree(standing.path)


def ten_steps(folder: Path, device):
    """Losses of a TED run of both stages."""
    start(folder, device, name=f"ten_{dist.get_world_size()}", **TEN_STEPS)


def watched_ten_steps(folder: Path, device):
    """The same, and of it: the share of the parameters that this rank holds, after construction and between steps 9 and 10, and
    the student's weights after step 6, to compare with runs that stop in step 7."""
    seen, weights, engines = {}, [], {}

    def watch(name, original):
        def wrapped(*arguments, **named):
            built = original(*arguments, **named)
            engines[name] = built.engine.module if name == "teacher" else built.module
            seen[f"{name} built"] = resident_share(engines[name])
            return built

        return wrapped

    def add(self, progress, *arguments, **named):
        if progress.step == 6:
            weights.extend(checksum(engines["student"]))
        if progress.step == 9:
            seen.update({f"{name} at 9": resident_share(module) for name, module in engines.items()})
        return Metrics_add(self, progress, *arguments, **named)

    originals = build.build_teacher, build.build_student
    Metrics_add, Metrics.add = Metrics.add, add
    build.build_teacher, build.build_student = watch("teacher", originals[0]), watch("student", originals[1])
    try:
        ten_steps(folder, device)
    finally:
        build.build_teacher, build.build_student = originals
        Metrics.add = Metrics_add
    return {"resident": seen, "weights": weights}


def all_methods(folder: Path, device):
    """ce, kd and lwd take the same path; on two ranks recorded_runs has them."""
    for method in ("ce", "kd", "lwd"):
        start(folder, device, name=f"{method}_{dist.get_world_size()}", method=method, **TEN_STEPS)


def seldom(folder: Path) -> dict:
    """Without held-out text, on which the teacher would run, too."""
    return {
        "filters": {"steps": 2},
        "train": {"steps": 3},
        "teacher": {"every": 3},
        "data": {"corpora": [{"path": str(folder / "corpus")}]},
    }


def asked_seldom(folder: Path, device):
    """TED with a teacher that is asked for one micro-batch in three: how often it ran in each stage."""
    asked = []

    def run(self, batch, wants_layers, wants_head):
        asked.append(wants_head)
        return Teacher_run(self, batch, wants_layers, wants_head)

    Teacher_run, Teacher.run = Teacher.run, run
    try:
        start(folder, device, name=f"seldom_{dist.get_world_size()}", **seldom(folder))
    finally:
        Teacher.run = Teacher_run
    return {"stage I": asked.count(False), "stage II": asked.count(True)}


def resident_share(module) -> float:
    """This rank's elements, gathered ones and shards, as a share of the elements of the whole module."""
    parameters = list(module.parameters())
    whole = sum(torch.Size(shape_of(p)).numel() for p in parameters)
    here = sum(p.data.numel() + (p.ds_tensor.numel() if is_sharded(p) else 0) for p in parameters)
    return here / whole


def resumes(folder: Path, device):
    """Ten steps straight, then again from the checkpoints in stage I, at the switch, and in stage II."""
    start(folder, device, name="straight", **SAVED)
    for step in (3, 4, 6):
        name = f"from_{step}"
        if dist.get_rank() == 0:
            target = folder / "runs" / name
            shutil.copytree(folder / "runs" / "straight", target)
            put_back(target, step)
            if step < 4:
                (target / "filters.safetensors").unlink()
        dist.barrier()
        start(folder, device, name=name, **SAVED)


def teacher_moves(folder: Path, device):
    """The run of `resumes`, from its checkpoint in stage II on with its teacher elsewhere."""
    for way in ("replicated", "offload"):
        if dist.get_rank() == 0:
            target = folder / "runs" / f"moved_to_{way}"
            shutil.copytree(folder / "runs" / "straight", target)
            put_back(target, 6)
        dist.barrier()
        start(folder, device, name=f"moved_to_{way}", **SAVED, teacher={"placement": way})


def resumes_with_other_settings(folder: Path, device):
    """The optimizer's groups of a run that goes on with other rates, and what it writes of them."""
    engines = []

    def remember(*arguments):
        engines.append(build_student(*arguments))
        return engines[-1]

    other = {"lr": 1e-5, "weight_decay": 0.7, "betas": [0.5, 0.6], "eps": 1e-6}
    first = {"filters": {"steps": 1}, "train": {"steps": 1, "schedule": "constant"}}
    then = {"filters": {"steps": 1, "lr": 0.5}, "train": {"steps": 3, "schedule": "constant", **other}}
    then["resume"] = {"allow": ["train.betas", "train.eps", "train.weight_decay"]}
    build_student, build.build_student = build.build_student, remember
    try:
        start(folder, device, name="other_settings", **first)
        start(folder, device, name="other_settings", **then)
    finally:
        build.build_student = build_student
    return [{k: v for k, v in g.items() if k != "params"} for g in engines[-1].optimizer.param_groups]


def poisoned_loss(folder: Path, device):
    """Rank 1's layer loss turns NaN in step 7: what is said, and whether a weight moved."""
    return stopped_by(folder, device, "poisoned_loss", poison_loss)


def poisoned_gradient(folder: Path, device):
    """Every loss is finite, a gradient is not: DeepSpeed would skip the update and go on."""
    return stopped_by(folder, device, "poisoned_gradient", poison_gradient)


def poison_loss(losses, step: int):
    if step == 7 and dist.get_rank() == 1:
        bad = losses.layer * float("nan")
        return losses._replace(total=losses.total + bad, layer=bad)
    return losses


def poison_gradient(losses, step: int):
    if step == 7 and dist.get_rank() == 1:
        losses.total.register_hook(lambda g: g * float("inf"))
    return losses


def stopped_by(folder: Path, device, name: str, poison):
    original, engines, steps = Student.student_losses, [], [4]
    calls = 256 // 32 // TWO["micro_batch"] // dist.get_world_size()

    def losses(self, *given):
        result = original(self, *given)
        if not torch.is_grad_enabled():
            return result
        steps.append(steps[-1] + 1 / calls)
        return poison(result, int(steps[-2] + 1e-6) + 1)

    def remember(*arguments):
        engines.append(build_student(*arguments))
        return engines[-1]

    build_student, build.build_student = build.build_student, remember
    Student.student_losses = losses
    try:
        start(folder, device, name=name, **TEN_STEPS, checkpoint={"every": 6})
        said = None
    except RunStopped as error:
        said = str(error)
    finally:
        Student.student_losses, build.build_student = original, build_student
    return {"said": said, "weights": checksum(engines[-1].module), "steps": engines[-1].global_steps}


def checksum(module) -> list[float]:
    sums = []
    for parameter in module.network.parameters():
        with gathered([parameter]):
            sums.append(parameter.double().sum().item())
    return sums


def full_disk(folder: Path, device):
    """Rank 1 may not write more than a few bytes when step 10 is saved."""
    small = 4096
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save, said = build.save_checkpoint, []

    def save_with_little_room(*arguments):
        if arguments[-1].step == 10 and dist.get_rank() == 1:
            arguments[3].wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (small, limits[1]))
        save(*arguments)

    build.save_checkpoint, pauses, saver.LAST_PAUSES_S = save_with_little_room, saver.LAST_PAUSES_S, ()
    try:
        start(folder, device, name="full_disk", **TEN_STEPS, checkpoint={"every": 6})
    except UserError as error:
        said.append(str(error))
    finally:
        build.save_checkpoint, saver.LAST_PAUSES_S = save, pauses
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    left = sorted(p.name for p in (folder / "runs" / "full_disk" / "checkpoints").iterdir())
    dist.barrier()
    start(folder, device, name="full_disk", **TEN_STEPS, checkpoint={"every": 6})
    return {"said": said, "left": left}


def retried_save(folder: Path, device):
    """Rank 1's disk fails a save and is well again for the next try; rank 0's is slow to remove what is left of the first."""
    run, write_file, rmtree = make_run(folder, name="retried"), durable.write_file, shutil.rmtree
    tensors = {key_of(kind, "w"): torch.full((50,), 4.0) for kind in KINDS}
    snapshot = Snapshot(tensors, {"ranks": 2, "updates": 4, "shapes": {"w": [100]}})
    made = saver.Saver(run, [], lambda title, text: None)

    def broken(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    def slowly(path, **named):
        time.sleep(1 if path.exists() else 0)
        rmtree(path, **named)

    pauses = attempts.PAUSES_S, saver.LAST_PAUSES_S
    attempts.PAUSES_S, saver.LAST_PAUSES_S, shutil.rmtree = (), (0.1, 0.1), slowly
    durable.write_file = broken if dist.get_rank() == 1 else write_file
    try:
        place = checkpoint_files.checkpoints_of(run.folder) / checkpoint_files.checkpoint_name(4)
        made.begin(Save(place, snapshot, Progress(4, 4, 4), False))
        failed = made.wait()["checkpoint/failed"]
        durable.write_file = write_file
        return {"failed": [failed, made.finish()["checkpoint/failed"]], "fault": checkpoint_files.check_digests(place)}
    finally:
        attempts.PAUSES_S, saver.LAST_PAUSES_S = pauses
        durable.write_file, shutil.rmtree = write_file, rmtree


def layer_loss_ends(folder: Path, device):
    """After the layer loss is off, filters stand still and their last gradient is forgotten."""
    from deepspeed.utils import safe_get_local_grad

    seen = []

    def add(self, progress, values, **named):
        step = progress.step
        filters = list(engines[-1].module.filters_s.parameters()) if step > 4 else []
        moved = [p.ds_tensor.double().sum().item() for p in filters]
        left = sum(safe_get_local_grad(p).abs().sum().item() for p in filters)
        seen.append({"step": step, "filters": moved, "left": left, "layer": "loss/layer" in values})
        return Metrics_add(self, progress, values, **named)

    def remember(*arguments):
        engines.append(build_student(*arguments))
        return engines[-1]

    engines = []
    build_student, build.build_student = build.build_student, remember
    Metrics_add, Metrics.add = Metrics.add, add
    try:
        start(folder, device, name="hint", loss={"layer": {"start": 1.0, "off_after": 0.5}}, **TEN_STEPS)
    finally:
        build.build_student, Metrics.add = build_student, Metrics_add
    return seen


def loading_memory(folder: Path, device):
    """Peak host memory of this rank while a model of many files loads, sharded and then whole, and the sizes it is compared
    with."""
    from ted_scale.models.inspection import inspect
    from ted_scale.models.weights import build_network

    anatomy = inspect("student.path", str(folder / "large"))
    sizes = [f.stat().st_size for f in anatomy.folder.glob("*.safetensors")]
    before = memory_begins()
    plan = make_plan(make_run(folder), dist.get_world_size())
    config = engine_config(plan, plan.student)
    network = build_network(anatomy, ds_config=config, dtype=torch.float32)
    part = sum(torch.Size(shape_of(p)).numel() for p in network.parameters()) * 4 / dist.get_world_size()
    seen = {"peak": memory("VmHWM") - before, "part": part, "file": max(sizes), "whole": sum(sizes)}
    del network
    before = memory_begins()
    network = build_network(anatomy, ds_config=None, dtype=torch.float32)
    tensor = max(parameter.nbytes for parameter in network.parameters())
    return seen | {"whole_peak": memory("VmHWM") - before, "tensor": tensor}


def memory_begins() -> int:
    """What is used now; VmHWM counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def host_reads(folder: Path, device):
    """Reads of tensor values by code of ours or of transformers, by optimizer step, where each is made; but for the losses'
    looks at what stands on a CPU (test_kernel_ops.py: they look at nothing else)."""
    import sys

    reads: list[list[str]] = [[]]
    names = ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy")
    originals, on_a_cpu = (
        {name: getattr(torch.Tensor, name) for name in names},
        (all_count.__code__, check_labels.__code__),
    )

    def spy(name):
        def read(tensor, *arguments, **named):
            frame = sys._getframe(1)
            path = frame.f_code.co_filename
            if ("/ted_scale/" in path or "/transformers/" in path) and frame.f_code not in on_a_cpu:
                reads[-1].append(f"{Path(path).name}:{frame.f_code.co_name}.{name}")
            return originals[name](tensor, *arguments, **named)

        return read

    def add(self, *arguments, **named):
        reads.append([])
        return Metrics_add(self, *arguments, **named)

    Metrics_add, Metrics.add = Metrics.add, add
    for name in names:
        setattr(torch.Tensor, name, spy(name))
    try:
        start(folder, device, name="reads", **TEN_STEPS, log_every=3, data={"attention": "document"})
    finally:
        Metrics.add = Metrics_add
        for name in names:
            setattr(torch.Tensor, name, originals[name])
    return reads


def variants(folder: Path, device):
    """A run of five steps, and the same in other clothes, which must agree with it."""
    start(folder, device, name="five_2", **FIVE_STEPS)
    bf16 = {**FIVE_STEPS, "train": {"steps": 3, "precision": "bf16", **TWO}}
    start(folder, device, name="bf16_2", **bf16)
    offload = str(Path(__file__).with_name("zero3_offload.json"))
    start(folder, device, name="offload_2", ds_config=offload, **FIVE_STEPS)
    start(folder, device, name="borrowed_2", train={"steps": 3, **TWO}, filters={"from": str(folder / "runs/five_2")})
    start(folder, device, name="strict_2", **FIVE_STEPS, loss={"mode": "strict"})


CONFIGS = Path(__file__).parents[2] / "ds_configs"
ON_A_GPU = CONFIGS / "zero3_int8_gathers.json"
ON_A_CPU = sorted(set(CONFIGS.glob("*.json")) - {ON_A_GPU})


def shipped_configs(folder: Path, device):
    """Every file of ds_configs; and gradients that are reduced once a step, in both precisions."""
    for file in ON_A_CPU:
        start(folder, device, name=f"by_{file.stem}", ds_config=str(file), **FIVE_STEPS)
    for precision in ("fp32", "bf16"):
        once = {"steps": 3, "precision": precision, "reduce_once": True, **TWO}
        start(folder, device, name=f"once_{precision}", filters={"steps": 2}, train=once)


class Quantizer:
    """What DeepSpeed's CUDA kernels do, in torch: int8 in groups, each with its scale, and fp16 back."""

    Symmetric = 0
    rounded = 0

    def quantize(self, weights, groups, bits, kind):
        apart = weights.float().reshape(groups, -1)
        scales = (apart.abs().amax(1) / 127).clamp_min(1e-12)
        Quantizer.rounded += weights.numel()
        return (apart / scales[:, None]).round().to(torch.int8).reshape(weights.shape), scales

    def dequantize(self, rounded, scales, groups, bits, kind):
        return (rounded.float().reshape(groups, -1) * scales[:, None]).half().reshape(rounded.shape)


def int8_gathers(folder: Path, device):
    """The ds_config that needs a GPU, with a stand-in for its kernels; nothing stays whole. How many weights were rounded."""
    from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer

    sections = json.loads(ON_A_GPU.read_text())
    sections["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    config = folder / "int8_gathers.json"
    if dist.get_rank() == 0:
        config.write_text(json.dumps(sections))
    dist.barrier()
    CUDAQuantizer.quantizer_cuda_module = Quantizer()
    start(folder, device, name="int8_gathers", ds_config=str(config), **FIVE_STEPS)
    return Quantizer.rounded


def kinds_of_filters(folder: Path, device):
    """And a student that begins anew: the same on any number of ranks."""
    world, two_steps = dist.get_world_size(), {"train": {"steps": 2, **TWO}}
    narrow = {"student": {"path": str(folder / "narrow")}}
    kinds = {
        "own": ({"head": "own"}, narrow),
        "per_layer": ({"head": "per_layer"}, {}),
        "mlp": ({"mlp": 8}, {"loss": {"kind": "cosine"}}),
        "sampled": ({"sample_tokens": 0.5, "sample_pairs": 1}, {"loss": SKIPPING}),
        "narrow": ({"width": 16, "start": "states", "sample_tokens": "auto"}, {}),
        "narrow_own": ({"width": 16, "start": "states", "head": "own"}, narrow),
    }
    for name, (filters, others) in kinds.items():
        start(folder, device, name=f"{name}_{world}", filters={"steps": 2, **filters}, **two_steps, **others)
    start(folder, device, name=f"fresh_{world}", method="ce", train={"steps": 3, **TWO}, student={"init": "random"})


READINGS = {
    "one_by_one": {}, "sharded_by_two": {"placement": "sharded", "micro_batch": 2}, "early": {"early": True},
    "early_by_three": {"early": True, "micro_batch": 3},
    "offload_by_two": {"early": True, "placement": "offload", "micro_batch": 2},
}  # fmt: skip


def readings(folder: Path, device):
    """Four micro-batches a step, read by the teacher in these ways; its filters are narrow, and what it has is compared."""
    sections = {"filters": {"steps": 1, "width": 16}, "train": {"steps": 2}, "data": {"attention": "document"}}
    for name, teacher in READINGS.items():
        teacher = {"placement": "replicated", **teacher}
        start(folder, device, name=f"read_{name}", **sections, teacher=teacher, health={"replicas_every": 1})


def without_stage_one(folder: Path, device):
    """Filters that stay where they start, straight and from step 1's checkpoint, which has them."""
    filters = {"steps": 0, "width": 16, "start": "states"}
    few = {"train": {"steps": 3, **TWO}, "checkpoint": {"every": 1, "keep": 9}}
    sections = {**few, "filters": filters, "loss": SKIPPING}
    start(folder, device, name="unlearnt", **sections)
    if dist.get_rank() == 0:
        target = folder / "runs" / "unlearnt_from_1"
        shutil.copytree(folder / "runs" / "unlearnt", target)
        put_back(target, 1)
        (target / "filters.safetensors").unlink()
    dist.barrier()
    start(folder, device, name="unlearnt_from_1", **sections)


def families(folder: Path, device):
    """Every family as a student beside the next one as its teacher, three steps over both stages: documents apart in both, the
    student's activations computed again."""
    for student, teacher in beside(sorted(FAMILIES)):
        sections = sections_of_families(folder, student, teacher)
        sections["student"]["gradient_checkpointing"] = True
        start(folder, device, name=f"family_{student}", **sections)


def mixtures(folder: Path, device):
    """Experts, and experts beside recurrences, whose rows two ranks share."""
    for teacher, place in MIXTURES.items():
        start(folder, device, name=f"beside_{teacher}", **sections_of_mixtures(folder, teacher, place))


def alone(folder: Path, device):
    """Reductions, and gathers of several weights, that one rank asks for, of what types it takes norms, and DeepSpeed's hooks."""
    from deepspeed.comm import comm
    from deepspeed.runtime.zero.partition_parameters import NoGatherCoalescedHandle

    calls, types, gathers, hooks = [], set(), [], []
    trim, gather = zero_hooks.trim, NoGatherCoalescedHandle.__init__
    reduce, norm = comm.cdb.reduce_scatter_tensor, torch._foreach_norm

    def noting(tensors, *arguments, **named):
        types.update(str(tensor.dtype) for tensor in tensors)
        return norm(tensors, *arguments, **named)

    def counting(handle, weights):
        gathers.append(len(weights))
        gather(handle, weights)

    def counting_hooks(engine, *arguments):
        trim(engine, *arguments)
        owner = zero_hooks.hook_owner(engine)
        hooks.extend(h for h in (*owner.forward_hooks, *owner.backward_hooks) if h.id in h.hooks_dict_ref())

    NoGatherCoalescedHandle.__init__, zero_hooks.trim = counting, counting_hooks
    comm.cdb.reduce_scatter_tensor = lambda *a, **named: (calls.append(1), reduce(*a, **named))[1]
    torch._foreach_norm = noting
    try:
        start(folder, device, name="alone_1", **THREE_STEPS)
    finally:
        comm.cdb.reduce_scatter_tensor, torch._foreach_norm = reduce, norm
        NoGatherCoalescedHandle.__init__, zero_hooks.trim = gather, trim
    return {"reductions": len(calls), "gathers": len(gathers), "norms": sorted(types), "hooks": len(hooks)}


def blocks_by_liger(folder: Path, device):
    """Of student and teacher, sharded, in Triton's interpreter."""
    import interpreter
    import pytest

    if not fused.installed():
        return
    interpreter.mend()
    try:
        with pytest.MonkeyPatch.context() as patch:
            interpreter.mend_liger(patch)
            start(folder, device, name="by_liger", fused_blocks="liger", **sections_for_liger(folder))
    finally:
        interpreter.unmend()


def sections_for_liger(folder: Path) -> dict:
    """Few and short rows: a row of a kernel is a loop of Python."""
    few = {"data": {"seq_len": 8}, "filters": {"steps": 1}, "train": {"steps": 1, "tokens_per_step": 32}}
    return {
        **few,
        "validation": {"tokens": 8},
        "student": {"path": str(folder / "narrow"), "gradient_checkpointing": True},
    }


def sections_of_mixtures(folder: Path, teacher: str, place: str) -> dict:
    path = str(folder / f"teacher_{teacher}")
    return {**THREE_STEPS, "student": {"path": str(folder / "qwen2")}, "teacher": {"path": path, "placement": place}}


def sections_of_families(folder: Path, student: str, teacher: str) -> dict:
    paths = {"student": {"path": str(folder / student)}, "teacher": {"path": str(folder / teacher)}}
    return {**THREE_STEPS, **paths, "data": {"attention": "document"}}
