"""What the compiler makes of every Triton kernel in every shipped shape, for every architecture, on no GPU.

Registers, spills and shared memory are written into docs/kernels.md, between its two markers. `--check` writes nothing and
exits with 1 where a shape spills or does not fit.
"""

import argparse
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is imported; an interpreted one cannot be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main
from ted_scale.kernels.triton import shapes
from ted_scale.kernels.triton.layers import layers_kernel
from ted_scale.kernels.triton.rows import rows_kernel
from ted_scale.kernels.triton.strict import slopes_kernel, statistics_kernel

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
MARKERS = "<!-- compile report -->", "<!-- /compile report -->"
COLUMNS = ["kernel", "target", "operands", "tile", "warps", "stages", "registers", "spills", "shared"]
TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # sm_80: sm_86's and sm_120's
KERNELS = {
    "rows": rows_kernel,
    "rows_jsd": rows_kernel,
    "layers": layers_kernel,
    "statistics": statistics_kernel,
    "slopes": slopes_kernel,
}
LOGITS, GRADIENT = {"KL": True, "CE": True, "DIVERGENCE": "forward"}, {"WANTS_GRADIENT": True}
TRAINS = GRADIENT | {"KEEPS": True, "BIAS_T": True, "BIAS_S": True}
CAPS = {"CAPPED_S": True, "CAPPED_T": True}
CASES = {  # what a kernel is called for: the flags that are then set. The first is the usual one, all were seen to spill
    "rows": {
        "KL and CE": LOGITS | GRADIENT,
        "CE": {"CE": True} | GRADIENT,
        "KL": {"KL": True, "DIVERGENCE": "forward"} | GRADIENT,
        "loss only": LOGITS,
        "soft-capped": LOGITS | CAPS | GRADIENT,
        "reverse KL": LOGITS | CAPS | GRADIENT | {"DIVERGENCE": "reverse"},
    },
    "rows_jsd": {
        "usual": LOGITS | CAPS | GRADIENT | {"DIVERGENCE": "jsd"},
        "entropy": LOGITS | CAPS | GRADIENT | {"DIVERGENCE": "jsd", "ENTROPY": True},
    },
    "layers": {
        "nmse": {"KIND": "nmse"} | TRAINS,
        "mse": {"KIND": "mse"} | TRAINS,
        "cosine": {"KIND": "cosine"} | TRAINS,
        "raw": {"KIND": "cosine"} | GRADIENT,
        "loss only": {"KIND": "nmse", "BIAS_T": True, "BIAS_S": True},
    },
    "statistics": {"KL and CE": LOGITS, "CE": {"CE": True}, "KL": {"KL": True}, "soft-capped": LOGITS | CAPS},
    "slopes": {"KL and CE": LOGITS, "CE": {"CE": True}, "KL": {"KL": True}, "soft-capped": LOGITS | CAPS},
}


LEGEND = (
    "Spills are bytes stored and loaded (AMD: registers), shared memory is of a block; each is the most of all cases that a "
    "kernel is called for. Compiled by"
)


class RefusedShape(UserError):
    exit_code = 1


class Job(NamedTuple):
    """One kernel, in one of its shapes, for one of its cases and one architecture."""

    kernel: str
    arch: str
    dtype: str
    shape: shapes.Shape
    case: str


class Result(NamedTuple):
    registers: int
    spills: int  # bytes stored and loaded; on AMD registers
    shared: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a shape will not do")
    parser.add_argument("--only", choices=KERNELS, metavar="KERNEL", help=f"print one: {', '.join(KERNELS)}")
    parser.add_argument("--arch", choices=TARGETS, metavar="ARCH", help=f"print one: {', '.join(TARGETS)}")
    parser.add_argument("--shape", type=shape_of, metavar="ROWSxBLOCK,WARPS,STAGES", help="try this one, in bf16")
    arguments = parser.parse_args()
    kernels = [arguments.only] if arguments.only else list(KERNELS)
    archs = [arguments.arch] if arguments.arch else list(TARGETS)
    wanted = [job for kernel in kernels for arch in archs for job in jobs(kernel, arch, arguments.shape)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        done = list(zip(wanted, pool.map(compile_job, wanted), strict=True))
    if arguments.check:
        check(done)
    elif arguments.only or arguments.arch or arguments.shape:
        print(report(done))
    else:
        write(report(done))


def shape_of(text: str) -> shapes.Shape:
    blocks, warps, stages = text.split(",")
    sizes = [int(size) for size in blocks.split("x")]
    return shapes.Shape(dict(zip(("ROWS", "BLOCK")[-len(sizes) :], sizes, strict=True)), int(warps), int(stages))


def jobs(kernel: str, arch: str, other: shapes.Shape | None = None) -> list[Job]:
    """In what is shipped, or in another shape; fp16 is the same code as bf16."""
    found = []
    for dtype in ("bf16",) if other else ("bf16", "fp16", "fp32"):
        cases = list(CASES[kernel])[: 1 if dtype == "fp16" else None]
        found += [Job(kernel, arch, dtype, other or shapes.SHAPES[kernel], case) for case in cases]
    return found


def compile_job(job: Job) -> Result:
    kernel = KERNELS[job.kernel]
    signature = {p.name: "constexpr" if p.is_constexpr else type_of(p.name, job) for p in kernel.params}
    divisible = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(kernel, signature, flags_of(job), divisible)
    compiled = triton.compile(
        source, target=TARGETS[job.arch], options={"num_warps": job.shape.num_warps, "num_stages": job.shape.num_stages}
    )
    registers, spills = (read_amd if job.arch.startswith("gfx") else read_nvidia)(compiled.asm)
    return Result(registers, spills, compiled.metadata.shared)


def flags_of(job: Job) -> dict:
    given = job.shape.blocks | CASES[job.kernel][job.case]
    return {p.name: given.get(p.name, False) for p in KERNELS[job.kernel].params if p.is_constexpr}


def type_of(name: str, job: Job) -> str:
    """An argument's type, by its name."""
    if name in ("b_t", "b_s", "dz", "h", "dy", "kept"):
        return f"*{job.dtype}"
    if name in ("t", "s"):  # a filtered state, or a raw one
        return f"*{job.dtype if job.case == 'raw' else 'fp32'}"
    if name in ("z_s", "z_t", "weight", "values", "norms", "running", "kl_out", "ce_out", "floor", "entropy_out"):
        return "*fp32"
    if name == "labels":
        return "*i64"
    return "fp32" if re.match("temperature|cap_|scale_|kl_weight|ce_weight", name) else "i32"


def read_nvidia(asm) -> tuple[int, int]:
    """(registers, spilled bytes)"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = output_of(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = ""  # without a stack there is nothing to count, and this takes its time
        if "STACK:0 " not in usage:
            code = output_of(triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)
    spills = sum(local_bytes(suffix) for suffix in re.findall(r"\b(?:STL|LDL)((?:\.\w+)*)", code))
    return int(re.search(r"REG:(\d+)", usage)[1]), spills


def local_bytes(suffix: str) -> int:
    """Of one load or store of local memory, by its suffix: our kernels have none but for spilled registers."""
    width = re.search(r"\.[US]?(8|16|64|128)\b", suffix)
    return int(width[1]) // 8 if width else 4


def read_amd(asm) -> tuple[int, int]:
    """(registers, spilled registers)"""
    code = asm["amdgcn"]
    registers, spills = (int(re.search(rf"\.{name}:\s*(\d+)", code)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
    return registers, spills


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check(done: list[tuple[Job, Result]]) -> None:
    refused = [f"{described(job)} {what}" for job, result in done if (what := fault(job, result))]
    if refused:
        raise RefusedShape("; ".join(refused))
    print(f"triton {triton.__version__}: {len(done)} compilations, none spills")


def described(job: Job) -> str:
    shape = f"{tile_of(job.shape)} in {job.shape.num_warps} warps and {job.shape.num_stages} stages"
    return f"{job.kernel} ({job.case}) of {job.dtype} on {job.arch}, {shape},"


def fault(job: Job, result: Result) -> str | None:
    if result.spills:
        return f"spills {result.spills} {'registers' if job.arch.startswith('gfx') else 'bytes'}"
    if result.shared > SHARED[job.arch]:
        return f"takes {result.shared} bytes of shared memory of {SHARED[job.arch]}"
    return None


def tile_of(shape: shapes.Shape) -> str:
    return "x".join(map(str, shape.blocks.values()))


def report(done: list[tuple[Job, Result]]) -> str:
    """A line for each kernel, target and shape: the most of its operand types and of the cases."""
    groups: dict[tuple, list[tuple[Job, Result]]] = {}
    for job, result in done:
        shape = tile_of(job.shape), job.shape.num_warps, job.shape.num_stages
        groups.setdefault((job.kernel, job.arch, shape), []).append((job, result))
    lines = [f"{LEGEND} triton {triton.__version__}:", "", row(COLUMNS), row(["---"] * len(COLUMNS))]
    lines += [row(cells(*key, members)) for key, members in groups.items()]
    return "\n".join(lines)


def cells(kernel: str, arch: str, shape: tuple, members) -> list:
    dtypes = ", ".join(dict.fromkeys(job.dtype for job, _ in members))
    registers, spills, shared = (max(column) for column in zip(*(result for _, result in members), strict=True))
    return [kernel, arch, dtypes, *shape, registers, spills, f"{shared / 1024:.1f} KiB"]


def row(values) -> str:
    return f"| {' | '.join(map(str, values))} |"


def write(text: str) -> None:
    page = PAGE.read_text() if PAGE.exists() else f"# Kernels\n\n{MARKERS[0]}\n{MARKERS[1]}\n"
    if any(page.count(marker) != 1 for marker in MARKERS):
        raise UserError(f"{PAGE} must hold {' and '.join(MARKERS)} once each, but does not")
    before, after = page.split(MARKERS[0])[0], page.split(MARKERS[1])[1]
    PAGE.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{after}")
    print(f"written into {PAGE}")


if __name__ == "__main__":
    run_main(main)
