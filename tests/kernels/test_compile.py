"""Every tile shape of every Triton kernel compiles for its architecture without a spill; needs no GPU."""

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
    done = report("--check", "--only", "difference", "--arch", "sm_80", "--shape", "256x256x64,8,3")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: difference (filtered) of bf16 on sm_80, 256x256x64 in 8 warps and 3 stages, spills" in done.stderr
    assert "Traceback" not in done.stderr
