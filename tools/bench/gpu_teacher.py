"""Part c.teacher of tools/bench/gpu.py: the forward of a replicated teacher in bf16, fp8 and int8, its blocks compiled or not.

The teacher is random and made on the device, as the trainer makes it. An arm is freed before the next one is made.
"""

import gc
import time
from functools import partial

import torch

from ted_scale import engines
from ted_scale.base.errors import UserError
from ted_scale.distill import memory
from tools.bench.gpu_step import SHAPES, TINY_SHAPES, forever, plan_of, settle
from tools.bench.gpu_task import Skipped
from tools.bench.memory import peak_bytes

ARMS = [(precision, compiled) for precision in ("bf16", "fp8", "int8") for compiled in (False, True)]
TIMES = 10
BASE = "bf16 compiled"  # what a run has without these keys, where attention is torch's own


def measure(task, write, shape: str) -> None:
    device, found = torch.device(task.device()), {}
    sizes, batch = (TINY_SHAPES if task.tiny else SHAPES)[shape], None
    for precision, compiled in ARMS:
        name = f"{precision} compiled" if compiled else precision
        asked = {"precision": precision, "compile": compiled, "placement": "replicated"}
        try:
            refuse_rehearsal(task, compiled)
            plan = plan_of(task.work / task.part, sizes, "kd", {"teacher": asked, "fused_blocks": "off"}, 1)
            batch = next(forever(plan, device))[0] if batch is None else batch
            found[name] = measure_arm(plan, batch, device, partial(write, arm=name))
        except (Skipped, UserError) as error:
            write("teacher forward", arm=name, status="skipped", reason=str(error))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for name, seconds in found.items():
        if BASE in found:
            write("time beside bf16", seconds / found[BASE], "", arm=name)


def refuse_rehearsal(task, compiled: bool) -> None:
    if task.tiny and compiled:
        raise Skipped("a rehearsal compiles nothing")


@torch.no_grad()
def measure_arm(plan, batch, device: torch.device, write) -> float:
    """Seconds of the fastest forward of a micro-batch."""
    engines.check_device(plan, device)
    teacher, seconds = engines.bare_teacher(plan, device), []
    for _ in range(TIMES + 2):
        began = time.perf_counter()
        teacher.run(batch, False, True)
        settle(device)
        seconds.append(time.perf_counter() - began)
    sizes = f"teacher {plan.teacher.parameters / 1e6:,.0f} M, {plan.run.data.seq_len} tokens"
    write("teacher forward", min(seconds[2:]) * 1e3, "ms", sizes=sizes)
    write("first forward", seconds[0], "s", sizes=sizes)
    write("weights, counted", memory.of_teacher(plan, 2, device.type) / 1e9, "GB", sizes=sizes)
    write(
        "peak beyond weights", peak_bytes(lambda: teacher.run(batch, False, True), device.type) / 1e9, "GB", sizes=sizes
    )
    return min(seconds[2:])
