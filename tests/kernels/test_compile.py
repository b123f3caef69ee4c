"""Every shape of every Triton kernel compiles for its architecture without a spill; needs no GPU."""

import os
import subprocess
import sys

from places import ROOT


def report(*arguments: str) -> subprocess.CompletedProcess:
    """In a separate process, because this one interprets kernels. The variable must make no difference there."""
    command = [sys.executable, str(ROOT / "tools" / "bench" / "compile_report.py"), *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)


def test_no_shipped_shape_spills_on_its_target():
    done = report("--check")
    assert done.returncode == 0, done.stderr
    assert "none spills" in done.stdout


def test_a_shape_that_spills_is_refused():
    done = report("--check", "--only", "layers", "--arch", "sm_80", "--shape", "32768,4,1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: layers (nmse) of bf16 on sm_80, 32768 in 4 warps and 1 stages, spills" in done.stderr
    assert "Traceback" not in done.stderr
