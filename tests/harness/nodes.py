"""Starts of one run on several nodes: forks with a kernel and a host's name of their own, and a flock that no other node sees."""

import fcntl
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

from ted_scale import run_folder
from ted_scale.base import processes
from ted_scale.base.errors import SENTENCES
from ted_scale.checkpoints import holder

RENEWAL_S, LEASE_S = 0.05, 0.4


class Node(NamedTuple):
    """`said` is "held", or the sentence that the start ended with; `err` has its stderr."""

    pid: int
    answers: socket.socket
    err: Path

    @property
    def said(self) -> str:
        self.answers.settimeout(20)
        return self.answers.recv(4096).decode()

    def leave(self) -> int:
        self.answers.send(b"leave")
        return self.code()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.code()

    def code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def start(folder: Path, node: str, *, lease_s: float = LEASE_S, slow=None) -> Node:
    """It takes the folder and keeps it until it is told to leave. `slow()` may sleep between any two of its steps."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    err = folder.parent / f"err_{node}_{time.monotonic_ns()}"
    if pid := os.fork():
        theirs.close()
        return Node(pid, ours, err)
    ours.close()
    try:
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        live(folder, node, lease_s, slow or (lambda: None), theirs)
    finally:
        os._exit(1)


def live(folder: Path, node: str, lease_s: float, slow, answers: socket.socket) -> None:
    logging.getLogger().handlers.clear()  # pytest's
    holder.held.clear()  # what the process has that forked
    fcntl.flock = lambda *_: None  # as with Lustre's localflock
    socket.gethostname = processes.this_kernel = lambda: node
    holder.RENEWAL_S, holder.LEASE_S = RENEWAL_S, lease_s
    for name in ("numbers", "read", "make"):
        setattr(holder, name, slowed(getattr(holder, name), slow))
    try:
        run_folder.take(folder, folder / "checkpoints" / f"token_{os.getpid()}")
    except SENTENCES as error:
        answers.send(str(error).encode())
        os._exit(error.exit_code)
    answers.send(b"held")
    if answers.recv(16) == b"leave":
        holder.leave(folder)
        os._exit(0)


def slowed(action, slow):
    def call(*arguments):
        slow()
        return action(*arguments)

    return call
