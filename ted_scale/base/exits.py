"""How a process exits: its last message on stderr, and its exit code; errors.py lists what each code means.

The ranks of a run exit together: while they watch each other, `end_together` is set. Nothing here waits for a thread or a
process group, because either of them may be what hangs.
"""

import contextlib
import logging
import os
import sys
import threading
import time
import traceback

from ted_scale.base import redact
from ted_scale.base.errors import FAULT, SENTENCES, Preempted

# These are set during a run. The first is watch.py's and ends all ranks; the second describes the position for Ctrl-C; rank 0
# calls the third with its last words.
end_together = None
where_it_stands = None
at_end = None


def run_main(main) -> None:
    """Run `main()`. Our own exceptions become a sentence on stderr and an exit code, others a traceback."""
    redact.watch_logs()
    sys.excepthook = show_traceback
    threading.excepthook = lambda raised: show_traceback(*raised[:3])
    try:
        main()
    except KeyboardInterrupt:
        say_where_it_stands("which is not saved: ")
        leave(130)
    except SENTENCES as error:
        last_words(f"{'stopped' if isinstance(error, Preempted) else 'error'}: {error}", error.exit_code)
    except Exception:
        if end_together is None and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        last_words(traceback.format_exc(), FAULT)


def say_where_it_stands(begins: str) -> None:
    """On one rank of a run that Ctrl-C ends: what is saved."""
    if where_it_stands is not None:
        speak(f"interrupted in {where_it_stands(begins)}; the same command goes on")


def last_words(words: str, code: int) -> None:
    """End this process, and the other ranks if they watch each other already."""
    if end_together is not None:
        end_together(words, code)
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(5)  # the launcher ends this rank if rank 0 fails for the same reason; else this rank reports its own
    speak(words if rank == 0 else f"rank {rank}: {words}")
    leave(code)


def end(words: str, code: int) -> None:
    """Called by a thread: end this process, and the other ranks where they watch each other."""
    if end_together is not None:
        end_together(words, code)  # returns if another thread is ending the run already
    else:
        speak(words)
        leave(code)


def write_last_words(words: str, code: int) -> None:
    """On rank 0, for all ranks: to the log file and to life.json."""
    for handler in logging.getLogger("ted_scale").handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(logging.makeLogRecord({"msg": words}))
    if at_end is not None:
        at_end(f"{words} (exit code {code})")


def speak(words: str) -> None:
    with contextlib.suppress(OSError):  # its reader may be gone
        print(redact.printable(redact.redact(words.rstrip("\n")), "\n\t"), file=sys.stderr, flush=True)


def show_traceback(kind, error, trace) -> None:
    """As Python prints it, without the secrets that a library's exception may quote."""
    speak("".join(traceback.format_exception(kind, error, trace)))


def leave(code: int) -> None:
    """Without atexit: no process group and no thread may delay the exit."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
