"""What tools/bench/losses.py says of its rows: tables, CSV, and whether the project's targets are met."""

import csv
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

from ted_scale.base.errors import UserError

MIB = 1 << 20
PACKAGES = {"torch": "torch", "triton": "triton", "liger": "liger-kernel", "cce": "cut-cross-entropy"}
MEASURED = [
    "figure", "arm", "device", "hardware", "dtype", "sizes", "median_ms", "min_ms", "peak_mib",
    "peak_beyond_gradients_mib", "peak_beyond_weight_gradients_mib", "loss", "gradient_error", "failed",
]  # fmt: skip
COLUMNS = [*MEASURED, *PACKAGES, "python", "commit"]


class TargetMissed(UserError):
    exit_code = 1


def table(rows) -> str:
    """Ratios are to naive eager; `gradient` is how far the first states' gradient lies from naive's, relative."""
    if not rows:
        return ""
    naive = next((r for r in rows if r.arm == "naive"), None)
    names = ("median ms", 10), ("min ms", 10), ("x naive", 9), ("peak MiB", 10), ("x naive", 9), ("- grads", 9)
    names = (*names, ("loss", 12), ("gradient", 10))
    head = f"{'arm':24}" + "".join(f"{name:>{width}}" for name, width in names)
    lines = ["", f"{rows[0].operation}   {rows[0].sizes}", head]
    for row in rows:
        if row.failed:
            lines.append(f"{row.arm:24}failed: {row.failed}")
            continue
        times = f"{ms(row.median):>10}{ms(min(row.seconds)):>10}{ratio(row, naive, 'median'):>9}"
        memory = f"{mib(row.peak):>10}{ratio(row, naive, 'peak'):>9}{mib(row.beyond_gradients):>9}"
        lines.append(f"{row.arm:24}{times}{memory}{row.loss:>12.6f}{error(row):>10}")
    return "\n".join(lines)


def error_table(rows) -> str:
    lines = ["", f"relative error of the gradient of h_s against fp64, bf16 operands   {rows[0].sizes}"]
    return "\n".join([*lines, *(f"{r.arm:24}{'failed: ' + r.failed if r.failed else error(r)}" for r in rows)])


def ratio(row, naive, name: str) -> str:
    if naive is None or naive.failed:
        return "-"
    return f"{getattr(row, name) / getattr(naive, name):.3f}"


def ms(seconds) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"


def mib(count) -> str:
    return "" if count is None else f"{count / MIB:.1f}"


def error(row) -> str:
    return "" if row.gradient_error is None else f"{row.gradient_error:.1e}"


def append_csv(path: Path, rows, device: str, dtype: str) -> None:
    """The header is written with the first row; a file with other columns is not touched."""
    is_new = not path.exists() or not path.stat().st_size
    with path.open("a+", newline="") as file:
        file.seek(0)
        if not is_new and (head := file.readline().strip()) != ",".join(COLUMNS):
            raise UserError(f"--csv must name a file with the columns {','.join(COLUMNS)}, but {path} has {head}")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        everywhere = {"device": device, "hardware": hardware(device), "dtype": dtype} | surroundings()
        writer.writerows(as_record(row) | everywhere for row in rows)


def as_record(row) -> dict:
    return {
        "figure": row.operation, "arm": row.arm, "sizes": row.sizes, "median_ms": ms(row.median),
        "min_ms": ms(min(row.seconds, default=None)), "peak_mib": mib(row.peak),
        "peak_beyond_gradients_mib": mib(row.beyond_gradients),
        "peak_beyond_weight_gradients_mib": mib(row.beyond_weight_gradients),
        "loss": "" if row.loss is None else f"{row.loss:.6f}", "gradient_error": error(row), "failed": row.failed,
    }  # fmt: skip


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = (
        [x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{len(os.sched_getaffinity(0))} cores {names[0] if names else platform.machine()}"


def load() -> float:
    """The share of the cores that were busy in the last second, before anything of ours runs."""
    before = cpu_times()
    time.sleep(1)
    spent = [b - a for a, b in zip(before, cpu_times(), strict=True)]
    return 1 - (spent[3] + spent[4]) / max(sum(spent), 1) if spent else 0.0


def cpu_times() -> list[int]:
    """Ticks by kind, the fourth and fifth idle; nothing where the system does not tell."""
    stat = Path("/proc/stat")
    return [int(x) for x in stat.read_text().split("\n", 1)[0].split()[1:]] if stat.exists() else []


def surroundings() -> dict[str, str]:
    found = {column: version(package) for column, package in PACKAGES.items()}
    return found | {"torch": torch.__version__, "python": platform.python_version(), "commit": commit()}


def versions() -> str:
    return ", ".join(f"{name} {value}" for name, value in surroundings().items() if value)


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """With a + where the working tree is not that commit's."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def targets(rows, device: str, judge: bool) -> None:
    """Each target beside what was measured; with `judge`, one missed or not measured ends the run with 1."""
    found = {(r.operation, r.arm): r for r in rows if not r.failed}
    missed = []
    for sentence, value, most in (cpu_targets if device == "cpu" else cuda_targets)(found):
        met = value is not None and value <= most
        missed += [] if met else [f"{sentence} must be at most {most:.4g}, but {said(value)}"]
        if judge or value is not None:
            print(f"target: {sentence} <= {most:.4g}: {said(value)}{'' if met else ', MISSED'}", flush=True)
    if judge and missed:
        raise TargetMissed("; ".join(missed))


def said(value) -> str:
    return "was not measured" if value is None else f"is {value:.4g}"


def cpu_targets(found):
    ours, naive = found.get(("linear_kl_ce", "ours-chunked")), found.get(("linear_kl_ce", "naive"))
    yield "linear_kl_ce chunked's peak in MiB", ours and ours.peak / MIB, 250
    yield "linear_kl_ce chunked's time over naive's", ours and naive and ours.median / naive.median, 0.75
    for operation in ("filtered_mse_nmse", "filtered_mse_mse"):
        ours, naive = found.get((operation, "ours")), found.get((operation, "naive"))
        share = ours and naive and ours.beyond_gradients / naive.beyond_gradients
        yield f"{operation}'s peak beyond the gradients over naive's", share, 1 / 6
        yield f"{operation}'s time over naive's", ours and naive and ours.median / naive.median, 1


def cuda_targets(found):
    """Of an H200. Memory is beyond the gradients of weights as they are returned, in the weights' own type."""
    limits = {
        ("filtered_mse_nmse", "ours"): (9, 0.6),
        ("filtered_mse_mse", "ours"): (9, 0.6),
        ("linear_kl_ce", "ours-chunked"): (35, 1.3),
        ("linear_kl_ce", "ours-strict"): (60, 0.2),
    }
    for (operation, arm), (milliseconds, gigabytes) in limits.items():
        row = found.get((operation, arm))
        yield f"{operation} {arm}'s time in ms", row and row.median * 1e3, milliseconds
        yield (
            f"{operation} {arm}'s peak beyond the weights' gradients in GB",
            row and row.beyond_weight_gradients / 1e9,
            gigabytes,
        )
