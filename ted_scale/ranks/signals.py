"""SIGTERM, SIGUSR1 and a first Ctrl-C ask a run to save and stop; so does the death of the launcher above it.

A signal only sets `asked` on the ranks that it reaches. During steps the ranks agree on the step after which they save and
exit: the flag is part of the guard's reduction, and `anywhere` reduces it beside steps. Before the first step there is
nothing to save, and watch.py ends the run at once. Note: Python runs a signal handler in the main thread, and a main thread
that waits for a dead rank never runs it. So a thread reads the signal from a pipe.
"""

import contextlib
import itertools
import os
import signal
import threading

import psutil

from ted_scale.base.errors import RESUME, Preempted
from ted_scale.base.exits import leave, say_where_it_stands, speak

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
IN_TIME = "which is finished and saved first; a second Ctrl-C ends the run at once, and DeepSpeed's launcher does after 30 s: then "
asked = threading.Event()
launchers: tuple[psutil.Process, ...] = ()  # those above when `listen` was called, nearest first
watched = threading.Event()  # watch.py decides from here on


def listen() -> None:
    """Call early in the main thread: until then a signal just ends the process."""
    global launchers
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # with the default the pipe would stay empty
    signal.signal(signal.SIGINT, once_more(itertools.count()))
    launchers = launchers_above()
    threading.Thread(target=heed, args=(readable,), name="ted_scale signals", daemon=True).start()


def once_more(presses: itertools.count):
    """Of Ctrl-C: the first asks, the next one ends."""

    def handle(number, frame):
        if next(presses):
            signal.default_int_handler(number, frame)

    return handle


def heed(readable: int) -> None:
    while number := os.read(readable, 1):
        if number[0] in (*SIGNALS, signal.SIGINT):
            again = asked.is_set()
            asked.set()
            if not watched.is_set():
                leave_alone()
            if number[0] == signal.SIGINT and not again:
                say_where_it_stands(IN_TIME)


def leave_alone() -> None:
    """Before the ranks have met: no step was taken, and the launcher ends the others."""
    if os.environ.get("RANK", "0") == "0":
        speak(f"stopped: {Preempted.SENTENCE}")
    leave(RESUME)


def anywhere(device) -> bool:
    """Whether any rank was asked; every rank must call this, and all get one answer. Reads the device."""
    import torch
    import torch.distributed as dist

    flag = torch.full((1,), float(asked.is_set()), device=device)
    if dist.is_initialized():
        dist.all_reduce(flag)
    return flag.item() > 0


def launchers_above() -> tuple[psutil.Process, ...]:
    """DeepSpeed's launch.py, which starts ranks, and the `deepspeed` command above it, if they are there. Their death does
    not end the ranks by itself: the command forwards no signal, and ranks without launch.py would train on unseen."""
    found, process = [], parent_of(psutil.Process())
    while len(found) < 2 and process and any(is_launcher(word) for word in words_of(process)):
        found.append(process)
        process = parent_of(process)
    return tuple(found)


def parent_of(process: psutil.Process) -> psutil.Process | None:
    """None where there is none, or `process` has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.parent()
    return None


def words_of(process: psutil.Process) -> list[str]:
    """The command line; nothing of a process that has ended or is another user's."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def ranks_below(pid: int) -> list[int]:
    """The ranks that a DeepSpeed launcher under `pid` has started: it passes --local_rank to them."""
    below = psutil.Process(pid).children(recursive=True)
    return [p.pid for p in below if any(word.startswith("--local_rank") for word in words_of(p))]


def is_launcher(word: str) -> bool:
    return word.rpartition("/")[2] == "deepspeed" or "deepspeed.launcher." in word


def launcher_is_gone() -> bool:
    """Whether one of them died: then the process below it has another parent."""
    process = psutil.Process()
    for launcher in launchers:
        process = parent_of(process)
        if process != launcher:
            return True
    return False
