"""Python processes that start with the large packages imported: forks of one process that has imported them and nothing else.

A core needs seconds to import torch, transformers and deepspeed, and the tests start many processes that need them. No file
of ted_scale is imported before the fork, so that its modules see each process's own environment; the packages saw that
of the first call. Note: CUDA does not work after a fork, so that a machine with a GPU starts every process anew.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import faulty_files

PACKAGES = (
    "torch", "deepspeed", "megatron.core.datasets.indexed_dataset", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip


class Forked:
    """A child of a child: what the tests use of a Popen."""

    def __init__(self, command: list[str], answers: socket.socket):
        self.args, self.answers, self.returncode = command, answers, None
        self.pid = int(answers.recv(32))

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.answers.settimeout(timeout)
            try:
                self.returncode = int(self.answers.recv(32))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(command, *, stdout, stderr, env=None, cwd=None) -> Forked | subprocess.Popen:
    """`python SCRIPT WORD…`, as Popen starts it; `command` is without the interpreter."""
    import torch

    command = [str(word) for word in command]
    if torch.cuda.is_available():
        return subprocess.Popen([sys.executable, *command], stdout=stdout, stderr=stderr, env=env, cwd=cwd)
    env = dict(os.environ if env is None else env)
    request = {"command": command, "env": env, "cwd": str(cwd or Path.cwd())}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        descriptors = [stdout.fileno(), stderr.fileno(), theirs.fileno()]
        socket.send_fds(origin(env.get("LD_PRELOAD", "")), [json.dumps(request).encode()], descriptors)
    return Forked(command, ours)


def run(command, *, timeout: float, env=None, cwd=None) -> subprocess.CompletedProcess:
    """As subprocess.run with the output captured."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start(command, stdout=out, stderr=err, env=env, cwd=cwd)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(process.args, code, out.read(), err.read())


@functools.cache
def origin(preloaded: str) -> socket.socket:
    """The process that forks, by the socket that it reads; it exits with this one, whose end of the socket then closes. There is
    one for each library that is to be loaded first, because only a new program loads it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": preloaded}
        subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
    return ours


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    for package in PACKAGES:
        importlib.import_module(package)
    gc.freeze()  # or every child copies the pages that its first collection writes to
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for `attend`
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            sys.exit()
        if os.fork() == 0:
            requests.close()
            break
        for descriptor in descriptors:
            os.close(descriptor)
    become(attend(json.loads(message), *descriptors))


def attend(request: dict, out: int, err: int, answers: int) -> dict:
    """Returns in the child that the request asks for. Its parent writes the child's number, and then how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if child := os.fork():
        os.write(answers, str(child).encode())
        os.close(out), os.close(err)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(BrokenPipeError):
            os.write(answers, str(code).encode())
        os._exit(0)
    os.dup2(out, 1), os.dup2(err, 2)
    for descriptor in (out, err, answers):
        os.close(descriptor)
    return request


def become(request: dict) -> None:
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if rules := os.environ.get("FAULTY_FILES"):
        faulty_files.begin(Path(rules))
    sys.argv[:] = request["command"]
    sys.path[:1] = [str(Path(sys.argv[0]).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
