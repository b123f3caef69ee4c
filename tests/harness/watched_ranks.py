"""Ranks without a model, two for each fault: an all-reduce a step, watched as run.py has its ranks watched.

`python tests/harness/watched_ranks.py FOLDER deepspeed.launcher.none` imports torch once, forks the ranks of one fault after the
other, so that no start keeps another run from its heartbeats, and writes FOLDER/results.json: of each fault the ranks' exit
codes and when they left; FOLDER/FAULT.err is what both ranks wrote, in order. The second word makes this process a launcher in
the eyes of signals.py.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from functools import partial

import torch
import torch.distributed as dist

from ted_scale.base import exits
from ted_scale.base.errors import Preempted, UserError
from ted_scale.base.exits import run_main
from ted_scale.config.operation import Limits
from ted_scale.ranks import pulse, shortage, signals, watch
from ted_scale.run_folder import where_it_stands

PYTHON = ctypes.PyDLL(None)  # calls through it keep Python's lock
FAULTY_STEP = 10
START_S = 20.0  # for two ranks to meet, on a machine that does other work
FAULTS = (  # those that take longest first
    "suspended",
    "lock",
    "hang",
    "die",
    "die0",
    "raise",
    "sentence",
    "memory",
    "orphan",
    "signal",
    "interrupt",
    "early",
    "none",
)


def fault(name: str, folder: Path) -> None:
    """What goes wrong in this rank, at the step in which it does."""
    (folder / f"{name}.at").write_text(str(time.time()))
    if name == "raise":
        raise ValueError("what really went wrong")
    if name == "sentence":
        raise UserError("a file must be there, but is not")
    if name == "memory":
        torch.empty(1 << 60)
    if name in ("die", "die0"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "hang":
        time.sleep(600)
    if name == "lock":
        mutex = ctypes.create_string_buffer(64)  # no signal interrupts a wait for it, as it would interrupt a sleep
        PYTHON.pthread_mutex_lock(mutex)
        PYTHON.pthread_mutex_lock(mutex)
    if name == "signal":
        os.kill(os.getpid(), signal.SIGUSR1)
    if name == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    if name == "orphan":
        os.kill(os.getppid(), signal.SIGKILL)
    if name == "suspended":
        ranks = [int((folder / f"{name}.{rank}.pid").read_text()) for rank in (0, 1)]
        fork(lambda: suspend(ranks, 14.0))


def suspend(ranks: list[int], seconds: float) -> None:
    """Longer than three times the limit of silence, after which the kernel's alarm would end a rank."""
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    time.sleep(seconds)
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)


def rank_of(name: str, folder: Path) -> None:
    signals.listen()
    rank, faulty = dist_rank(), 0 if name in ("die0", "interrupt") else 1
    step_s = 4.0 if name == "hang" else 40.0
    silence_s = {"die": 4.0, "die0": 4.0, "lock": 4.0, "suspended": 4.0}.get(name, 20.0)
    watch.start(Limits(step_s=step_s, start_s=40.0, silence_s=silence_s), folder / name)
    dist.init_process_group("gloo")
    watch.all_have_met()
    (folder / f"{name}.{rank}.up").touch()
    if rank == 0:
        exits.where_it_stands = partial(where_it_stands, folder / name, 1000)
    if name == "early" and rank == faulty:
        (folder / f"{name}.at").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGTERM)
    for step in range(1, 40):
        if name == "early":
            time.sleep(600)
        pulse.step(step)
        if rank == faulty and step == FAULTY_STEP:
            with shortage.enough("lower something"):
                fault(name, folder)
        asked = torch.tensor([float(signals.asked.is_set())])
        dist.all_reduce(asked)
        if asked.item():
            dist.barrier()
            raise Preempted
        time.sleep(0.05 if step < 30 else 0)
    if name not in ("none", "suspended"):
        time.sleep(600)
    dist.barrier()
    watch.close()
    dist.destroy_process_group()


def dist_rank() -> int:
    return int(os.environ["RANK"])


def fork(action) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return pid


def start(name: str, rank: int, port: int, folder: Path) -> int:
    def action():
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(port)
        err = os.open(folder / f"{name}.err", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(err, 1)
        os.dup2(err, 2)
        (folder / f"{name}.{rank}.pid").write_text(str(os.getpid()))
        run_main(lambda: rank_of(name, folder))

    return fork(action)


def launcher(name: str, port: int, folder: Path) -> None:
    for rank in (0, 1):
        start(name, rank, port, folder)
    time.sleep(600)


def begin(name: str, folder: Path, results: dict, ranks: dict) -> None:
    """Start both ranks and wait until they have met."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results[name] = {"codes": [None, None], "left": [None, None]}
    if name == "orphan":
        fork(lambda: launcher(name, port, folder))
    else:
        ranks.update({start(name, rank, port, folder): (name, rank) for rank in (0, 1)})
    until = time.time() + START_S
    while not all((folder / f"{name}.{rank}.up").exists() for rank in (0, 1)) and time.time() < until:
        reap(folder, results, ranks)


def reap(folder: Path, results: dict, ranks: dict) -> None:
    """Note what has exited since the last call, and when."""
    time.sleep(0.01)
    with contextlib.suppress(ChildProcessError):
        while (exited := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            pid, status = exited
            for rank in (0, 1):
                path = folder / f"orphan.{rank}.pid"
                if path.exists() and path.read_text() == str(pid):
                    ranks[pid] = ("orphan", rank)
            if pid in ranks:
                name, rank = ranks.pop(pid)
                results[name]["codes"][rank] = os.waitstatus_to_exitcode(status)
                results[name]["left"][rank] = time.time()


def main() -> None:
    folder = Path(sys.argv[1])
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans come to this process
    results: dict[str, dict[str, list]] = {}
    ranks: dict[int, tuple[str, int]] = {}
    for name in FAULTS:
        (folder / name).mkdir()
        begin(name, folder, results, ranks)
    deadline = time.time() + 60
    while any(None in result["codes"] for result in results.values()) and time.time() < deadline:
        reap(folder, results, ranks)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
