"""Time and peak memory of the fused losses beside plain torch and other libraries: forward and backward.

Each operation has a process of its own. Its arms take turns there, so that other work on the machine affects all alike. Medians
are printed with their ratio to naive eager. Memory is the need of one forward and backward beyond its inputs, measured
separately. `--check` compares the numbers with the project's targets.
"""

import argparse
import gc
import multiprocessing
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is on the path, its parent is not

import torch

from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main
from tools.bench import loss_report
from tools.bench.loss_arms import ARMS, Case, kl_ce_arms, layers_case, logit_case, means, normal
from tools.bench.memory import peak_bytes

SIZES = {  # of each device, and the one of Liger's published rows
    "cpu": {"tokens": 2048, "d_s": 512, "d_t": 512, "vocab": 32000, "width": 512, "pairs": 8},
    "cuda": {"tokens": 8192, "d_s": 2048, "d_t": 4096, "vocab": 128256, "width": 2048, "pairs": 16},
    "liger": {"tokens": 8192, "d_s": 4096, "d_t": 4096, "vocab": 128256, "width": 4096, "pairs": 16},
}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
REPEATS = {"cpu": (5, 25), "cuda": (20, 20)}  # of logit losses, of layer losses: those are 20 times shorter
OPERATIONS = ("linear_kl_ce", "filtered_mse", "linear_ce")


@dataclass
class Row:
    """The result of one arm of one operation; `failed` is the reason if there is none."""

    operation: str
    arm: str
    sizes: str
    loss: float | None = None
    gradient_error: float | None = None  # of the student's states, relative: to naive's, or to fp64
    peak: int | None = None
    gradients: int = 0
    weight_gradients: int = 0
    seconds: list[float] = field(default_factory=list)
    failed: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def beyond_gradients(self) -> int | None:
        return None if self.peak is None else self.peak - self.gradients

    @property
    def beyond_weight_gradients(self) -> int | None:
        return None if self.peak is None else self.peak - self.weight_gradients


def main() -> None:
    arguments = parse()
    print(f"{loss_report.hardware(arguments.device)}, {arguments.dtype}, {loss_report.versions()}", flush=True)
    if (load := loss_report.load()) > 0.25:
        print(f"other work uses {load:.0%} of the cores, which affects these times", flush=True)
    rows = []
    for operation in [o for o in ARMS if o.startswith(tuple(arguments.only))]:
        rows += (found := alone(operation_rows, operation, arguments))
        print(loss_report.table(found), flush=True)
    errors = gradient_errors(arguments) if arguments.gradient_error else []
    if errors:
        print(loss_report.error_table(errors), flush=True)
    if arguments.csv:
        loss_report.append_csv(arguments.csv, rows, arguments.device, arguments.dtype)
        loss_report.append_csv(arguments.csv, errors, arguments.device, "bfloat16")
    if is_default(arguments):
        loss_report.targets(rows, arguments.device, arguments.check)


def alone(function: Callable, *arguments):
    """In a process of its own, so that heap, caches and compilers of one operation do not affect another."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def operation_rows(operation: str, arguments: Namespace) -> list[Row]:
    layers, device = operation.startswith("filtered_mse"), arguments.device
    make, fixed = (layers_case if layers else logit_case), ({"kl_weight": 0.0} if operation == "linear_ce" else {})
    case = make(operation, arguments, getattr(torch, arguments.dtype), device, **fixed)
    repeats = arguments.repeats or REPEATS[device][layers]
    return case_rows(case, chosen(ARMS[operation], arguments), device, repeats)


def case_rows(case: Case, arms: dict[str, Callable], device: str, repeats: int) -> list[Row]:
    steps, rows = measure(case, arms, device, repeats)
    for row in rows:  # after all times: the meter on CPU is torch's profiler
        attempt(row, lambda row=row: weigh(case, steps[row.arm], row, device), case, device)
        row.gradient = None
    return rows


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=DTYPES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, help="the defaults of the sizes below; default: the device's")
    parser.add_argument("--only", nargs="+", choices=[*OPERATIONS, "gradient_error"], default=OPERATIONS)
    parser.add_argument("--arms", nargs="+", help="only these; ratios are relative to naive")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int)
    parser.add_argument(
        "--gradient-error", action="store_true", help="the error of bf16 near the teacher, against fp64"
    )
    parser.add_argument("--csv", type=Path, help="append the rows there")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    for name in SIZES["cpu"]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    arguments = parser.parse_args()
    defaults = SIZES[arguments.size or arguments.device] | {"dtype": DTYPES[arguments.device]}
    for name, value in defaults.items():
        setattr(arguments, name, getattr(arguments, name) or value)
    arguments.gradient_error |= "gradient_error" in arguments.only
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device must be cpu where torch sees no GPU, but is cuda")
    if arguments.check and not is_default(arguments):
        raise UserError("--check must come without other sizes or types: the targets are of the default ones")
    return arguments


def is_default(arguments: Namespace) -> bool:
    wanted = SIZES[arguments.device] | {"dtype": DTYPES[arguments.device]}
    return all(getattr(arguments, name) == value for name, value in wanted.items())


def chosen(arms_of: Callable, arguments: Namespace) -> dict[str, Callable]:
    return {name: make for name, make in arms_of(arguments.device).items() if name in (arguments.arms or [name])}


def measure(case: Case, arms: dict[str, Callable], device: str, repeats: int) -> tuple[dict[str, Callable], list[Row]]:
    """(what runs each arm once, its row with loss, gradient and times)"""
    rows, steps, reference = [], {}, None
    for name, make in arms.items():
        row = Row(case.operation, name, case.sizes)
        try:
            arm = make()
        except ImportError as error:
            print(f"{case.operation}: {name} is left out: {error}", flush=True)
            continue
        steps[name] = lambda arm=arm: forward_backward(case, arm)
        attempt(row, lambda row=row, true=reference: warm_up(case, steps[row.arm], row, true), case, device)
        if name == "naive" and not row.failed:
            reference = row.gradient
        rows.append(row)
    for _ in range(repeats):
        for row in rows:
            attempt(row, lambda row=row: row.seconds.append(elapsed(steps[row.arm], device)), case, device)
    return steps, rows


def forward_backward(case: Case, arm: Callable):
    loss = case.loss(arm)
    loss.backward()
    return loss.detach()


def warm_up(case: Case, step: Callable, row: Row, reference) -> None:
    """The first call of an arm: it compiles and tunes, and its result is checked."""
    row.loss = step().item()
    row.gradient = case.states[0].grad.float()
    if reference is not None:
        row.gradient_error = relative(row.gradient, reference)


def weigh(case: Case, step: Callable, row: Row, device: str) -> None:
    row.peak = peak_bytes(step, device)
    row.weight_gradients = sum(t.grad.nbytes for t in case.weights)
    row.gradients = row.weight_gradients + sum(t.grad.nbytes for t in case.states)


def elapsed(step: Callable, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def attempt(row: Row, action: Callable, case: Case, device: str) -> None:
    """An arm that fails once is left out, with the reason; no gradient remains."""
    if row.failed:
        return
    try:
        action()
    except Exception as error:  # another library may raise anything
        row.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    for tensor in (*case.states, *case.weights):
        tensor.grad = None
    if row.failed:
        free(device)


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def relative(value, true) -> float:
    return ((value - true).norm() / true.norm()).item()


def gradient_errors(arguments: Namespace) -> list[Row]:
    """The error of the KL's gradient for the student's states near the teacher, where two softmaxes nearly cancel.

    naive rounds its logits to bf16, as a bf16 model's head does.
    """
    case, true, kl = near_teacher(arguments.device)
    arms = {n: m for n, m in chosen(kl_ce_arms, arguments).items() if "compiled" not in n}
    _, rows = measure(case._replace(sizes=f"{case.sizes} KL={kl:.4f}"), arms, arguments.device, 0)
    for row in rows:
        row.gradient_error = None if row.failed else relative(row.gradient.double(), true)
    return rows


def near_teacher(device: str, n: int = 192, d: int = 1024, v: int = 32000):
    """(the case in bf16, the gradient of its values in fp64, its KL in nats); logits of standard deviation 2."""
    torch.manual_seed(0)
    h, w_t = normal(n, d, torch.bfloat16, device), normal(v, d, torch.bfloat16, device, 2 / d**0.5)
    w_s = w_t + normal(v, d, torch.bfloat16, device, 0.063 / d**0.5)
    p, q = ((h.double() @ w.double().T).log_softmax(-1) for w in (w_t, w_s))
    kl, true = (p.exp() * (p - q)).sum(-1).mean().item(), (q.exp() - p.exp()) @ w_s.double() / n
    call = {"h_s": h.clone().requires_grad_(), "w_s": w_s.requires_grad_(), "h_t": h, "w_t": w_t}
    labels = torch.zeros(n, dtype=torch.int64, device=device)
    call |= {"labels": labels, "kl_weight": 1.0, "ce_weight": 0.0, **means(n, device)}
    return Case("gradient_error", f"tokens={n} d={d} V={v}", [call], [call["h_s"]], [w_s]), true, kl


if __name__ == "__main__":
    run_main(main)
