"""A command that ends with the process that starts it, even if that one is killed: python tied.py PARENT COMMAND ...

Note: the kernel keeps the wish over exec, so any program can be tied. A run that gets the signal saves what it has. The thread that
starts the command counts as the parent, so it must live as long.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux' prctl


def main(parent: int, command: list[str]) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the wish was made
        sys.exit(128 + signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
