"""All measurements that need a GPU, in one command: python tools/bench/gpu.py --minutes 9 --out FOLDER

The most valuable parts run first, each in a process of its own with a time limit. A part that fails, hangs or is killed
loses only its own rows. rows.csv grows with every value, summary.md is written again after each part, log.txt has all
output. The same command again continues: first parts that never started, then parts that did not succeed. `--tiny`
rehearses everything on a CPU; `--needs` lists the packages to bring to a machine without a network.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is on the path, its parent is not

import psutil

from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main
from tools.bench import gpu_report
from tools.bench.gpu_needs import needs
from tools.bench.gpu_report import PART, Row
from tools.bench.gpu_task import Task, run

ROOT = Path(__file__).resolve().parents[2]
LOG_BYTES = 400_000  # of one part
LEAST = 20.0  # seconds: a part with less time left is not started

REHEARSAL = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Part(NamedTuple):
    name: str
    seconds: float  # at most
    module: str
    function: str
    settings: dict


def logit_part(name: str, seconds: float, operation: str, size: str) -> Part:
    return Part(name, seconds, "gpu_losses", "operation", {"operation": operation, "size": size})


def step_part(shape: str, method: str, seconds: float) -> Part:
    return Part(f"c.{shape}.{method}", seconds, "gpu_step", "measure", {"shape": shape, "method": method})


def changed_part(shape: str, method: str, name: str, seconds: float, **changes) -> Part:
    settings = {"shape": shape, "method": method, "changes": changes}
    return Part(f"c.{name}.{shape}.{method}", seconds, "gpu_step", "measure", settings)


def reading_part(name: str, **teacher) -> Part:
    """How a teacher reads a step of four micro-batches."""
    settings = {"shape": "8b", "method": "kd", "changes": {"teacher": teacher}, "micro_batches": 4}
    return Part(f"c.{name}.8b.kd", 60, "gpu_step", "measure", settings)


def bench_part(name: str, seconds: float, script: str, words: str, tiny: str) -> Part:
    settings = {"script": script, "words": words.split(), "tiny": tiny.split()}
    return Part(name, seconds, "gpu_machine", "bench", settings)


PARTS = [
    Part("a.machine", 60, "gpu_machine", "machine", {}),
    Part("a.tests", 75, "gpu_machine", "tests", {}),
    logit_part("b.kl_ce", 75, "linear_kl_ce", "cuda"),
    logit_part("b.kl_ce.liger", 75, "linear_kl_ce", "liger"),
    logit_part("b.filtered_mse", 60, "filtered_mse_nmse", "cuda"),
    logit_part("b.ce", 60, "linear_ce", "liger"),
    Part("b.rows", 40, "gpu_losses", "row_kernel", {}),
    Part("b.gradient_error", 40, "gpu_losses", "gradient_error", {}),
    *(step_part("8b", method, 90) for method in ("kd", "ted", "ce")),
    *(step_part("smollm2", method, 60) for method in ("kd", "ted", "ce")),
    changed_part("8b", "kd", "liger", 60, fused_blocks="liger"),
    changed_part("smollm2", "ted", "documents", 60, data={"attention": "document"}),
    reading_part("serial", early=False),
    reading_part("early", early=True),
    reading_part("by_four", micro_batch=4),
    Part("c.teacher.8b", 240, "gpu_teacher", "measure", {"shape": "8b"}),
    Part("d.teacher", 110, "gpu_learning", "teacher", {}),
    Part("d.students", 150, "gpu_learning", "students", {}),
    Part("a.rest", 240, "gpu_machine", "tests", {}),
    Part("e.chunks", 60, "gpu_losses", "chunk_sizes", {}),
    Part("e.tiles", 60, "gpu_losses", "tile_sizes", {}),
    bench_part(
        "e.attention",
        90,
        "attention.py",
        "--device cuda --length 8192 --heads 32 8 --width 128",
        "--length 256 --turns 1",
    ),
    bench_part("e.saving", 90, "saving.py", "--megabytes 4000 --rounds 2", "--megabytes 5 --rounds 1"),
]
NAMES = [part.name for part in PARTS]


def main() -> None:
    arguments = parse()
    if arguments.needs is not None:
        print(needs(arguments.needs))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        run_part(arguments)
        return
    take_over(arguments.resume, arguments.out / "rows.csv")
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a signal to this command also ends the part it waits for
    with scratch(arguments.work) as work:
        run_all(arguments, work)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together")
    parser.add_argument("--out", type=Path, help="folder of rows.csv, summary.md and log.txt")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="b.kl_ce",
        help="only these parts, or parts whose names begin with this",
    )
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU with tiny sizes")
    parser.add_argument("--resume", type=Path, metavar="ROWS.csv", help="continue from the rows of an earlier call")
    parser.add_argument("--commit", default="", help="of the code, where there is no git")
    parser.add_argument("--work", type=Path, help="folder for models and corpora; default: a temporary one")
    parser.add_argument("--needs", nargs="?", const="", metavar="FREEZE.txt", help="packages to bring; FREEZE.txt: "
                        "`pip freeze` of the machine that has the GPU")  # fmt: skip
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.needs is None and arguments.out is None:
        raise UserError("--out must name a folder for the results, but is missing; add --out FOLDER")
    unknown = [word for word in arguments.only if not any(name.startswith(word) for name in NAMES)]
    if unknown:
        raise UserError(f"--only must name parts ({', '.join(NAMES)}), but has '{unknown[0]}'")
    return arguments


def take_over(resume: Path | None, rows: Path) -> None:
    """Copy the rows of an earlier call into this one's folder."""
    if resume is None or resume.resolve() == rows.resolve():
        return
    if not resume.is_file():
        raise UserError(f"--resume must name the rows.csv of an earlier call, but {resume} is not a file")
    if rows.exists():
        raise UserError(
            f"--resume must come with a new --out, but {rows} exists; leave --resume out to continue from it"
        )
    shutil.copyfile(resume, rows)


@contextlib.contextmanager
def scratch(work: Path | None):
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="ted_scale_gpu_") as folder:
        yield Path(folder)


def run_all(arguments, work: Path) -> None:
    deadline, rows = time.monotonic() + 60 * arguments.minutes, arguments.out / "rows.csv"
    try:
        for part in todo(gpu_report.read(rows), arguments):
            left = deadline - time.monotonic()
            if left < LEAST:
                break
            limit = min(left, 300 if arguments.tiny else part.seconds)  # CPU cores need more time than a GPU
            print(f"{part.name}: up to {limit:.0f} s", flush=True)
            run_in_its_process(part, limit, arguments, work)
            gpu_report.write_page(arguments.out / "summary.md", gpu_report.read(rows), NAMES)
    finally:
        gpu_report.write_page(arguments.out / "summary.md", gpu_report.read(rows), NAMES)
    print((arguments.out / "summary.md").read_text(encoding="utf-8"))


def todo(rows: list[dict], arguments) -> list[Part]:
    """Parts that have not succeeded yet; first those that never started."""
    ends = gpu_report.last_status(rows, "tiny" if arguments.tiny else "")
    chosen = [p for p in PARTS if not arguments.only or p.name.startswith(tuple(arguments.only))]
    return sorted([p for p in chosen if ends.get(p.name) != "ok"], key=lambda p: p.name in ends)


def run_in_its_process(part: Part, limit: float, arguments, work: Path) -> None:
    log, began, mark = arguments.out / "log.txt", time.monotonic(), f"TED_SCALE_BENCH={os.getpid()}.{part.name}"
    start = log.stat().st_size if log.exists() else 0
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n===== {part.name}, up to {limit:.0f} s\n")
        file.flush()
        process = subprocess.Popen(
            command(part, limit, arguments, work), cwd=ROOT, env=environment(arguments.tiny, mark),
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        code = process.wait(timeout=limit)
        reason = "" if code == 0 else f"its process failed with exit code {code}; see log.txt"
    except subprocess.TimeoutExpired:
        reason = f"killed at its limit of {limit:.0f} s"
    finally:
        end(process, mark)
    trim(log, start)
    if reason:
        facts = dict.fromkeys(gpu_report.FACTS, "") | {"tiny": "tiny" if arguments.tiny else ""}
        row = Row(part.name, PART, value=time.monotonic() - began, unit="s", status="failed", reason=reason)
        gpu_report.append(arguments.out / "rows.csv", [row], facts)


def command(part: Part, limit: float, arguments, work: Path) -> list[str]:
    words = [sys.executable, __file__, "--part", part.name, "--limit", limit, "--out", arguments.out.absolute()]
    words += ["--work", work.absolute(), "--commit", arguments.commit, *(["--tiny"] if arguments.tiny else [])]
    return [str(word) for word in words]


def environment(tiny: bool, mark: str) -> dict[str, str]:
    """A rehearsal sees no GPU. No library may use the network: without one it would wait."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    found = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    found |= {"PYTHONDONTWRITEBYTECODE": "1", "TOKENIZERS_PARALLELISM": "false"} | dict([mark.split("=")])
    return found | (REHEARSAL if tiny else {})


def end(process: subprocess.Popen, mark: str) -> None:
    """Kill the part and every process that it started, in whatever session and with whatever parent: one that keeps the GPU's
    memory would spoil the next part."""
    for pid in {process.pid, *marked(mark)} if process.poll() is None else marked(mark):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def marked(mark: str) -> list[int]:
    """Processes that have the mark in their environment, as children inherit it."""
    name, value = mark.split("=")
    running = psutil.process_iter(["environ"])  # None where the process is another user's
    return [process.pid for process in running if (process.info["environ"] or {}).get(name) == value]


def trim(log: Path, start: int) -> None:
    """Keep only the beginning and the end of a part's log if it is too long."""
    words = log.read_bytes()
    if len(words) - start > LOG_BYTES:
        head, tail = words[: start + LOG_BYTES // 4], words[-LOG_BYTES // 2 :]
        log.write_bytes(head + b"\n... left out ...\n" + tail)


def run_part(arguments) -> None:
    part = next(p for p in PARTS if p.name == arguments.part)
    work, limit = arguments.work, arguments.limit
    task = Task(part=part.name, out=arguments.out, work=work, limit=limit, tiny=arguments.tiny, commit=arguments.commit)
    run(task, part.module, part.function, part.settings)
    sys.stdout.flush()
    os._exit(0)  # every row is written; the exit of a library may hang


if __name__ == "__main__":
    run_main(main)
