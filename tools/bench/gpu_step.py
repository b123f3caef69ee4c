"""Part c of tools/bench/gpu.py: a training step of the trainer's own loop and engines, beside plain Hugging Face.

Models are random, made on the device and never written. Plain runs first and is freed before ours starts, because DeepSpeed
keeps every module that it was given. Parts are timed by events around the functions of the loop, so the timed steps are the
trainer's own.
"""

import gc
import itertools
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
import transformers

from ted_scale import engines
from ted_scale.checkpoints.progress import Progress
from ted_scale.config.run import Run
from ted_scale.corpora.writer import dtype_of, index_bytes
from ted_scale.data.loader import Loader
from ted_scale.data.stream import open_stream
from ted_scale.distill.flops import step_flops
from ted_scale.health.guard import Guard
from ted_scale.metrics.clock import Clock
from ted_scale.metrics.metrics import Metrics
from ted_scale.metrics.peaks import device_peak
from ted_scale.plan import Plan, make_plan
from ted_scale.ranks.group import start_ranks
from ted_scale.train import train
from tools.bench import plain_step
from tools.bench.gpu_task import Skipped
from tools.bench.gpu_trace import write_trace
from tools.bench.memory import peak_bytes

ZERO3 = Path(__file__).resolve().parents[2] / "ds_configs" / "zero3.json"
PLAIN, OURS = "plain", "ours"
WARM_UP = 3


class Shape(NamedTuple):
    """Of a Llama-like pair; sizes not given for the student are the teacher's."""

    teacher: dict
    student: dict
    tokens: int
    checkpointing: bool = False


SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192}  # fmt: skip
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}  # fmt: skip
SMALL_1_5B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 20, "tie_word_embeddings": True}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256}  # fmt: skip
SHAPES = {
    "smollm2": Shape(SMOLLM2, {"num_hidden_layers": 10}, 4096),
    "8b": Shape(LLAMA_8B, SMALL_1_5B, 4096, checkpointing=True),
}
TINY_SHAPES = {
    "smollm2": Shape(TINY, {"num_hidden_layers": 2}, 128),
    "8b": Shape(TINY, {"hidden_size": 32, "num_hidden_layers": 2}, 128, checkpointing=True),
}


def measure(task, write, shape: str, method: str, changes: dict | None = None, micro_batches: int = 1) -> None:
    """Both arms, and ratios of ours to plain; with changes of the run only ours."""
    task.device()
    if changes and task.tiny:
        changes = {**changes, "fused_blocks": "off"}  # a CPU has no kernels of Liger's
    sizes = (TINY_SHAPES if task.tiny else SHAPES)[shape]
    plan = plan_of(task.work / task.part, sizes, method, changes or {}, micro_batches)
    device = start_ranks()
    refuse_small(plan, device)
    batches, found = forever(plan, device), {}
    for arm, build in ((PLAIN, build_plain), (OURS, build_ours))[bool(changes) :]:
        try:
            found[arm] = measure_arm(plan, device, build, batches, 2 if task.tiny else 10, write_of(write, plan, arm))
        except Exception as error:  # a failure of plain must not end ours
            traceback.print_exc()
            write("tokens/s", arm=arm, status="failed", reason=f"{type(error).__name__}: {error}")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if len(found) == 2:
        write("tokens/s beside plain", found[OURS][0] / found[PLAIN][0], "", arm=OURS)
        write("memory beyond states beside plain", found[OURS][1] / found[PLAIN][1], "", arm=OURS)
    if OURS not in found:
        raise RuntimeError("ours did not run; its row has the reason")


def plan_of(folder: Path, shape: Shape, method: str, changes: dict, micro_batches: int) -> Plan:
    for side, sizes in (("teacher", shape.teacher), ("student", shape.teacher | shape.student)):
        transformers.LlamaConfig(**sizes).save_pretrained(folder / side)
    write_corpus(folder / "corpus", shape.teacher["vocab_size"], 64 * shape.tokens)
    run = {
        "name": "step", "method": method, "runs": str(folder / "runs"), "ds_config": str(ZERO3), "seed": 1,
        "student": {"path": str(folder / "student"), "init": "random", "gradient_checkpointing": shape.checkpointing},
        "teacher": {"path": str(folder / "teacher"), "init": "random"},
        "data": {"seq_len": shape.tokens, "corpora": [{"path": str(folder / "corpus")}]},
        "filters": {"steps": 0},
        "train": {"steps": 10_000, "tokens_per_step": micro_batches * shape.tokens, "micro_batch": 1, "lr": 1e-5},
        "checkpoint": {"every": 1_000_000},
    }  # fmt: skip
    for key, value in changes.items():
        run[key] = run[key] | value if isinstance(value, dict) else value
    return make_plan(Run.model_validate(run), 1)


def write_corpus(prefix: Path, vocab: int, tokens: int) -> None:
    """Random ids, in documents of a thousand."""
    dtype, lengths = dtype_of(vocab), numpy.full(max(tokens // 1000, 2), 1000, numpy.int32)
    ids = numpy.random.default_rng(0).integers(1, vocab, lengths.sum())
    prefix.with_name(prefix.name + ".bin").write_bytes(ids.astype(dtype).tobytes())
    prefix.with_name(prefix.name + ".idx").write_bytes(index_bytes(lengths, dtype))


def refuse_small(plan: Plan, device: torch.device) -> None:
    if device.type != "cuda":
        return
    has, needs = torch.cuda.get_device_properties(device).total_memory, 1.25 * states(plan, OURS)
    if needs > has:
        raise Skipped(f"the pair needs about {needs / 2**30:.0f} GiB, and the GPU has {has / 2**30:.0f}")


def states(plan: Plan, arm: str) -> float:
    """Bytes of both models and the optimizer: ours has bf16 weights beside fp32 masters and moments, plain the latter alone."""
    student = plan.student.parameters * (14 if arm == OURS else 12)
    return student + (2 * plan.teacher.parameters if plan.teacher else 0)


def forever(plan: Plan, device: torch.device):
    """Steps of their micro-batches, by the trainer's loader."""
    data = plan.run.data
    loader = Loader(prefetch=data.prefetch, micro_batch=1, rank=0, world=1, device=device)
    stream = open_stream(data, plan.run.seed, plan.student.vocab_size)
    return loader.steps(stream, start=0, samples_per_step=plan.accumulation)


def build_plain(plan: Plan, device: torch.device, batches, clock: Clock) -> Callable:
    built = plain_step.build(plan, device)
    weights = plan.stages[-1].weights(plan.stages[-1].first_step)
    return plain_step.step_of(plan, weights, built, (micros[0] for micros in batches), clock)


def build_ours(plan: Plan, device: torch.device, batches, clock: Clock) -> Callable:
    stage, teacher = plan.stages[-1], engines.build_teacher(plan)
    engine = engines.build_student(plan, stage, teacher, None)  # filters as made: only time is measured
    numbers = Metrics(plan.run, writes=False, total_steps=1, step=0, device=device, wandb_run=None)
    guard = Guard(engine, stage, lambda *said: print(*said), lambda: None)
    at = [Progress(stage.first_step)]
    watch(clock, plan, engine, teacher)

    def step():
        """The trainer's own loop, on the data of one step."""
        data = itertools.islice(batches, 1)
        at[0] = train(stage, engine, teacher, data, guard, numbers, at[0], None, None, None, None)
        return guard.sums[0]

    return step


def watch(clock: Clock, plan: Plan, engine, teacher) -> None:
    """Teacher and engine note their parts: hooks and wrapped methods around what train.train calls. An early teacher's is
    the time on its own stream."""

    def around(name: str, call: Callable) -> Callable:
        def timed(*arguments, **named):
            with clock.time(name):
                return call(*arguments, **named)

        return timed

    engine.backward, engine.step = around("backward", engine.backward), around("optimizer", engine.step)
    body = engine.module.network.get_submodule(engine.module.anatomy.body)
    for name, module in (("student and losses", engine.module), ("of them the student's body", body)):
        began = []
        module.register_forward_pre_hook(lambda *_, began=began: began.append(clock.now()))
        module.register_forward_hook(
            lambda *_, began=began, name=name: clock.spans.append((name, began.pop(), clock.now()))
        )
    if plan.teacher:
        teacher.run = around("teacher", teacher.run)


def write_of(write, plan: Plan, arm: str) -> Callable:
    data = plan.run.data
    shapes = [
        f"{s} {a.parameters / 1e6:,.0f} M" for s, a in (("student", plan.student), ("teacher", plan.teacher)) if a
    ]
    again = ", activations computed again" if plan.run.student.gradient_checkpointing else ""
    sizes = f"{', '.join(shapes)}, {data.seq_len} tokens{again}"
    return lambda figure, value, unit, **more: write(figure, value, unit, arm=arm, sizes=sizes, **more)


def measure_arm(plan: Plan, device: torch.device, build: Callable, batches, steps: int, write) -> tuple[float, float]:
    """(tokens a second, bytes beyond the models' states); the first steps allocate and compile, and do not count."""
    arm, clock = PLAIN if build is build_plain else OURS, Clock(device)
    step = build(plan, device, batches, clock)
    write("loss", float(step()), "nats")
    for _ in range(WARM_UP - 1):
        step()
    settle(device)
    clock.read()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    settle(device)
    seconds = (time.perf_counter() - began) / steps
    rate = plan.run.train.tokens_per_step / seconds
    write("tokens/s", rate, "")
    write("step", seconds * 1e3, "ms")
    for name, milliseconds in clock.read().items():
        write(f"part: {name}", milliseconds / steps, "ms")
    write_mfu(plan, device, rate, write)
    beyond = write_memory(plan, device, arm, step, write)
    write_trace(step, device, write)
    return rate, beyond


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def write_mfu(plan: Plan, device: torch.device, rate: float, write) -> None:
    """By the project's convention for both arms: recomputed FLOPs do not count."""
    stage = plan.stages[-1]
    work = step_flops(plan, stage, stage.first_step, plan.attended.__getitem__).model
    write("work of a token", work / 1e9, "GFLOP")
    if peak := device_peak(device, plan.run.train.precision):
        write("MFU", rate * work / peak, "")
    else:
        write("MFU", None, "", status="skipped", reason=f"the peak of this {device.type} is not known")


def write_memory(plan: Plan, device: torch.device, arm: str, step: Callable, write) -> float:
    """On a CPU, memory between steps is not counted: the peak is beyond that."""
    rest = torch.cuda.memory_allocated() if device.type == "cuda" else states(plan, arm)
    peak = rest + peak_bytes(step, device.type)
    write("memory between steps", rest / 1e9, "GB")
    write("peak memory", peak / 1e9, "GB")
    write("peak beyond states", (peak - states(plan, arm)) / 1e9, "GB")
    return peak - states(plan, arm)
