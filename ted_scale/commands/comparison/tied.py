"""A command whose process group ends with the process that starts it, even if that is killed: python tied.py PARENT COMMAND ...

A run that gets the signal saves what it has. Note: `deepspeed` forwards no signal to its ranks, so this process stays beside the
command and signals the group, of which it must be the first. The thread that starts it counts as the parent and must live as long.
"""

import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1  # of Linux' prctl


def main(parent: int, command: list[str]) -> int:
    asked: list[int] = []

    def end(number: int, _) -> None:
        asked.append(number)
        end_group()

    signal.signal(signal.SIGTERM, end)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the wish was made
        return 128 + signal.SIGTERM
    process = subprocess.Popen(command)
    if asked:  # while the command was being started
        end_group()
    code = process.wait()
    return code if code >= 0 else 128 - code


def end_group() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process is in the group, too
    os.killpg(0, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
