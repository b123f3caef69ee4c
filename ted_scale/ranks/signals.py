"""SIGTERM, SIGUSR1 and the first Ctrl-C ask a run to save and stop. So does the death of its launcher.

A signal only sets `asked` on the rank that receives it. Ranks that are training agree on the step after which they save and exit:
guard.py gathers the flag with the losses, train.py and validate.py call agree.anywhere. Before the first step there is nothing to
save, and watch.py ends the run at once. Note: Python runs a signal handler only in the main thread, which may wait for a dead
rank for ever. So a thread reads the signals from a pipe.
"""

import contextlib
import itertools
import os
import signal
import threading

import psutil

from ted_scale.base.errors import RESUME, Preempted
from ted_scale.base.exits import leave, say_where_it_stands, speak
from ted_scale.ranks import pulse

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
IN_TIME = (
    "which is finished and saved first: wait for the line 'stopped'; a second Ctrl-C ends the run at once, and DeepSpeed's "
    "launcher does so after 30 s: then "
)
AT_ONCE = "which ends at once: "
asked = threading.Event()
launchers: tuple[psutil.Process, ...] = ()  # the processes above this one when `listen` was called, nearest first
watched = threading.Event()  # set when watch.py decides when the run exits


def listen() -> None:
    """Start to listen. Call this early, in the main thread, because before it a signal kills the process."""
    global launchers
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # the default handler would write nothing to the pipe
    signal.signal(signal.SIGINT, interrupt_at_the_second(itertools.count()))
    launchers = launchers_above()
    threading.Thread(target=read_signals, args=(readable,), name="ted_scale signals", daemon=True).start()


def interrupt_at_the_second(presses: itertools.count):
    """The handler of Ctrl-C. The first one asks the run to stop; the second one raises KeyboardInterrupt."""

    def handle(number, frame):
        if next(presses):
            signal.default_int_handler(number, frame)

    return handle


def read_signals(readable: int) -> None:
    while number := os.read(readable, 1):
        if number[0] in (*SIGNALS, signal.SIGINT):
            again = asked.is_set()
            asked.set()
            if not watched.is_set():
                exit_alone()
            if number[0] == signal.SIGINT and not again:
                say_where_it_stands(IN_TIME if pulse.now.unsaved else AT_ONCE)


def exit_alone() -> None:
    """Exit before the ranks have met. No step was taken, and the launcher ends the other ranks."""
    if os.environ.get("RANK", "0") == "0":
        speak(f"stopped: {Preempted.BEFORE}")
    leave(RESUME)


def launchers_above() -> tuple[psutil.Process, ...]:
    """DeepSpeed's launch.py, which starts the ranks, and the `deepspeed` command above it, if they are there. Ranks do not notice
    the death of these processes. A dead command passes no signal on, and without launch.py the ranks would train for nothing."""
    found, process = [], parent_of(psutil.Process())
    while len(found) < 2 and process and any(is_launcher(word) for word in words_of(process)):
        found.append(process)
        process = parent_of(process)
    return tuple(found)


def parent_of(process: psutil.Process) -> psutil.Process | None:
    """The parent. None if there is none, or if the system hides it: with hidepid other users' processes cannot be read."""
    with contextlib.suppress(psutil.Error, OSError):
        return process.parent()
    return None


def words_of(process: psutil.Process) -> list[str]:
    """The command line; empty if the process has ended or cannot be read."""
    with contextlib.suppress(psutil.Error, OSError):
        return process.cmdline()
    return []


def descendants_of(pid: int) -> list[psutil.Process]:
    """The descendants, parents before their children, without zombies. psutil's own `children` fails if any process of the
    machine cannot be read, also another user's."""
    children: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE:
                children.setdefault(process.ppid(), []).append(process)
    found, below = [], children.get(pid, [])
    while below:
        found += below
        below = [child for process in below for child in children.get(process.pid, [])]
    return found


def ranks_below(pid: int) -> list[int]:
    """The ranks that a DeepSpeed launcher under `pid` has started. They are known by their --local_rank option."""
    return [p.pid for p in descendants_of(pid) if any(word.startswith("--local_rank") for word in words_of(p))]


def is_launcher(word: str) -> bool:
    return word.rpartition("/")[2] == "deepspeed" or "deepspeed.launcher." in word


def launcher_is_gone() -> bool:
    """Whether a launcher has died; the system then gives this process another parent. watch.py calls this every second, in a
    thread that must not end. If a process cannot be read now, for lack of descriptors or memory, the next call asks again."""
    pid = os.getppid()
    for launcher in launchers:
        if pid != launcher.pid:
            return True
        try:
            pid = launcher.ppid()
        except psutil.NoSuchProcess:
            return True
        except (psutil.Error, OSError):
            return False
    return False
