"""Part a of tools/bench/gpu.py: the machine and its speed, and the tests that need a GPU, the most important first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.bench import gpu_report
from tools.bench.gpu_task import Late
from tools.bench.losses import elapsed

ROOT = Path(__file__).resolve().parents[2]
# Parts of tests' names. First the tests that decide whether the others mean anything. Last the ones that start the trainer,
# because on a new machine DeepSpeed compiles for a minute what its CPU ranks need.
TELLING = (
    "test_no_host_read", "test_memory_beyond", "test_logit_losses", "test_layer_losses", "test_32768_tokens",
    "test_batches_on", "test_gpu_kernels", "test_gpu_attention", "",
)  # fmt: skip
ENOUGH = 12.0  # seconds: with less time left no further test starts


def machine(task, write) -> None:
    device = task.device()
    write("cores", len(os.sched_getaffinity(0)), "")
    write("host memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, "GiB")
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        write("GPU memory", properties.total_memory / 2**30, "GiB")
        write("multiprocessors", properties.multi_processor_count, "")
        write("driver", reason=driver())
    write("copy, read and written", copy_rate(device, 1 << (22 if task.tiny else 32)) / 1e9, "GB/s")
    write("product, bf16", product_rate(device, 256 if task.tiny else 8192) / 1e12, "TFLOP/s")


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {error}"


def copy_rate(device: str, count: int) -> float:
    """Bytes a second that a copy of `count` bytes within the device moves, read and written."""
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / best(lambda: target.copy_(source), device)


def product_rate(device: str, size: int) -> float:
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * size**3 / best(lambda: a @ b, device)


def best(action, device: str, times: int = 10) -> float:
    """Seconds of the fastest of some calls, without the first ones."""
    return min([elapsed(action, device) for _ in range(times + 2)][2:])


def tests(task, write) -> None:
    """`pytest -m gpu` until the part's time is over; a test that passed in an earlier call is not run again."""
    os.chdir(ROOT)
    files = [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    reporter = Reporter(task, write, passed_before(task))
    code = pytest.main(["-m", "gpu", "-q", "-W", "ignore", *files], plugins=[reporter])
    if reporter.is_late:
        raise Late("the remaining tests need a second call")
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest exited with {pytest.ExitCode(code).name}; see its rows and log.txt")


def passed_before(task) -> set[str]:
    rows = gpu_report.read(task.rows)
    return {row["figure"] for row in rows if row["arm"] == "passed" and row["tiny"] == task.as_column}


class Reporter:
    """pytest's hooks: a row as soon as a test is done, and no further test when the time is over."""

    def __init__(self, task, write, passed: set[str]):
        self.task, self.write, self.passed = task, write, passed
        self.session, self.is_late = None, False

    def pytest_sessionstart(self, session) -> None:
        self.session = session

    def pytest_collection_modifyitems(self, config, items) -> None:
        items[:] = [item for item in items if item.nodeid not in self.passed]
        items.sort(key=lambda item: next(i for i, part in enumerate(TELLING) if part in item.nodeid))

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self.write(report.nodeid, report.duration, "s", arm=report.outcome, **verdict(report))

    def pytest_runtest_logfinish(self, nodeid, location) -> None:
        if self.task.left < ENOUGH:
            self.is_late = True
            self.session.shouldstop = "its time is over; a second call continues"


def verdict(report) -> dict:
    if report.passed:
        return {}
    if report.skipped:
        return {"status": "skipped", "reason": report.longrepr[2].removeprefix("Skipped: ")}
    crash = getattr(report.longrepr, "reprcrash", None)
    return {"status": "failed", "reason": crash.message if crash else str(report.longrepr)[-300:]}


def bench(task, write, script: str, words: list[str], tiny: list[str]) -> None:
    """Another measurement of tools/bench, its lines as rows."""
    task.device()
    command = [sys.executable, str(ROOT / "tools" / "bench" / script), *(tiny if task.tiny else words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.strip():
                write("said", reason=line)
    if process.returncode:
        raise RuntimeError(f"{script} exited with code {process.returncode}; see log.txt")
