"""How a process ends: its last words on stderr, and its exit code; errors.py has the list of what each code means.

The ranks of a run end together: while they watch each other, `end_together` is theirs. Nothing here waits for a thread
or a process group, because either may be what hangs.
"""

import contextlib
import os
import sys
import threading
import time
import traceback

from ted_scale.base import redact
from ted_scale.base.errors import FAULT, SENTENCES, Preempted

# Set for a run: watch.py's, which ends all its ranks with these words, and what Ctrl-C says of where it stands.
end_together = None
where_it_stands = None


def run_main(main) -> None:
    """Run `main()`; our own exceptions become their sentence on stderr and their exit code, others their traceback."""
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
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        last_words(traceback.format_exc(), FAULT)


def say_where_it_stands(begins: str) -> None:
    """Of a run that Ctrl-C ends, on one rank: what of it stays."""
    if where_it_stands is not None:
        speak(f"interrupted in {where_it_stands(begins)}; the same command goes on")


def last_words(words: str, code: int) -> None:
    """End this process, and with it the others of its group, if there is one by now."""
    if end_together is not None:
        end_together(words, code)
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(5)  # the launcher ends this rank when rank 0 has said the same; if not, it has its own reason
    speak(words if rank == 0 else f"rank {rank}: {words}")
    leave(code)


def speak(words: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it may be gone
        print(redact.redact(words.rstrip("\n")), file=sys.stderr, flush=True)


def show_traceback(kind, error, trace) -> None:
    """Python's own, without the secrets that a library's exception may quote."""
    speak("".join(traceback.format_exception(kind, error, trace)))


def leave(code: int) -> None:
    """No atexit: neither a process group nor a thread may hold the exit."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
