"""Where this process is: the stack of every thread, and the line of this package in which the main thread is."""

import contextlib
import faulthandler
import os
import sys
import threading
from pathlib import Path

from ted_scale.base.beneath import make_folder
from ted_scale.base.durable import write_file

HERE = f"{Path(__file__).parents[1]}{os.sep}"


def stacks() -> str:
    """The stack of every thread. faulthandler writes to a file descriptor, so this uses a file in memory."""
    with os.fdopen(os.memfd_create("stacks"), "w+", encoding="utf-8", errors="replace") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


def aside(patience_s: float, write, *arguments) -> threading.Thread:
    """Call `write` in a thread and wait at most `patience_s` for it, because the file system may be what hangs."""
    writer = threading.Thread(target=write, args=arguments, daemon=True)
    writer.start()
    writer.join(patience_s)
    return writer


def write_stacks(folder: Path, rank: int, text: str) -> None:
    with contextlib.suppress(OSError):
        make_folder(folder)
        write_file(folder / f"rank_{rank}.txt", [text.encode()])


def place() -> str:
    """The line of this package in which the main thread is."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None and not frame.f_code.co_filename.startswith(HERE):
        frame = frame.f_back
    if frame is None:
        return "in no line of ted_scale"
    return f"in {Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"
