"""A command in a session of its own, which can be ended with all of its children."""

import contextlib
import os
import signal
import subprocess
import time


def end_session(process: subprocess.Popen) -> None:
    """End the command and its children: `deepspeed` forwards no signal to its ranks and does not wait for them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            process.wait()
            for _ in range(50):
                time.sleep(0.2)
                os.killpg(process.pid, 0)  # raises once no process is left
