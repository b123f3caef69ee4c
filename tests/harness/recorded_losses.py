"""Every loss and gradient norm of four short runs, kept as exact numbers: a change that must change nothing is held to them.

`python tests/harness/recorded_losses.py write FILE` trains ce, kd, lwd and ted on two ranks and keeps what they wrote; `check FILE`
trains them again and names the first number that is another. Note: bits belong to a processor and a set of packages,
which stand in the file; elsewhere the same code has other last digits (`tolerance`).
"""

import json
import math
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from launching import run_ranks
from scenarios import rows, start
from tiny import make_corpus, make_model

HERE = Path(__file__).parent
RECORDED = HERE / "recorded_losses.json"
FILTERS = {"steps": 3, "width": 16, "start": "states", "sample_tokens": 0.5}
RUNS = {"ce": {}, "kd": {}, "lwd": {}, "ted": {"filters": FILTERS, "data": {"attention": "document"}}}
PACKAGES = ("torch", "numpy", "deepspeed", "transformers", "megatron-core")
# Relative. The same code without vector instructions (ATEN_CPU_CAPABILITY=default, MKL_ENABLE_INSTRUCTIONS=SSE4_2) is off by
# 3e-7 at most; a layer loss whose ‖t‖² is off by 1e-4 fails in its first step.
ELSEWHERE = 2e-5


def main(task: str, file: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        run_ranks(2, HERE / "ranks.py", folder, recorded_runs.__name__)
        said = [path.read_text() for path in folder.glob("*.json")]
        assert said == ["null"] * 2, "\n".join(said)
        numbers = numbers_of(folder)
    if task == "write":
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, text=True).strip()
        Path(file).write_text(json.dumps({"machine": machine(), "commit": commit, "numbers": numbers}, indent=1) + "\n")
    elif said := first_difference(json.loads(Path(file).read_text())["numbers"], numbers):
        sys.exit(said)


def make_inputs(folder: Path) -> None:
    make_model(folder / "teacher", "llama", num_hidden_layers=4, hidden_size=48, vocab_size=160)
    make_model(folder / "student", "gpt2", num_hidden_layers=2, seed=1)
    make_corpus(folder / "corpus")


def recorded_runs(folder: Path, device) -> None:
    """A scenario of ranks.py."""
    for method, sections in RUNS.items():
        start(folder, device, name=f"recorded_{method}", method=method, **sections)


def numbers_of(folder: Path) -> dict[str, float | None]:
    """By `method step key`, in the order in which they were written."""
    return {
        f"{method} {row['step']} {key}": value
        for method in RUNS
        for row in rows(folder, f"recorded_{method}")
        for key, value in row.items()
        if key.startswith(("loss/", "optim/grad_norm"))
    }


def machine() -> dict[str, str]:
    """What decides the last bits."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = f"{names[0].partition(':')[2].strip()}, {torch.backends.cpu.get_cpu_capability()}" if names else "unknown"
    return {"cpu": cpu, **{package: version(package) for package in PACKAGES}}


def tolerance(recorded: dict) -> float:
    """None where the numbers were recorded; other processors and packages add up in another order."""
    return 0.0 if recorded["machine"] == machine() else ELSEWHERE


def first_difference(recorded: dict, now: dict, rel_tol: float = 0.0) -> str | None:
    """The sentence of it; None where there is none."""
    for name in [*recorded, *(name for name in now if name not in recorded)]:
        then, today = recorded.get(name), now.get(name)
        if then != today and (then is None or today is None or not math.isclose(then, today, rel_tol=rel_tol)):
            return f"{name} must be {then!r} as it was recorded, but is {today!r}"
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
