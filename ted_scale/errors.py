"""The sentences a user reads when a run cannot start or cannot go on, and the way they leave the process.

The surprise: a sentence is cleaned when it is made, because it may quote a file or a library: what is not printable is
escaped, so that it is one line and moves no cursor, and what is secret is hidden.
"""

import contextlib
import os
import sys
import time
import traceback

from ted_scale import redact

LONGEST_VALUE, LONGEST_SENTENCE = 200, 4000  # characters


class UserError(Exception):
    """One sentence: what (its dotted name) must be what, but is what; how out. Exit code 2."""

    exit_code = 2

    def __init__(self, sentence: str):
        super().__init__(clean(sentence))


class RunStopped(Exception):
    """One sentence on why a run that was going ended itself: the step, the rank, the term. Exit code 3."""

    exit_code = 3

    def __init__(self, sentence: str):
        super().__init__(clean(sentence))


def clean(sentence: str) -> str:
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in sentence)
    return shortened(redact.redact("".join(escaped)), LONGEST_SENTENCE)


def shown(value) -> str:
    """A value in a sentence: one line, and not a page of it."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of more digits than Python writes
        return f"a {type(value).__name__} that cannot be shown"
    return shortened(text, LONGEST_VALUE)


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "…"


@contextlib.contextmanager
def files_at(place):
    """What the system says of files becomes a sentence: it names the file, or the disk that was being written is `place`'s."""
    try:
        yield
    except ConnectionError:  # a pipe that nobody reads
        raise
    except OSError as error:
        raise UserError(
            f"{error.filename or place} must be a file or folder that this user can use, on a disk with room, but is not: "
            f"{error.strerror or error}; put that right and start the same command again"
        ) from None


def run_main(main) -> None:
    """Run `main()`; our own exceptions become their sentence on stderr and their exit code, others stay tracebacks."""
    redact.watch_logs()
    sys.excepthook = show_traceback
    try:
        main()
    except (UserError, RunStopped) as error:
        speak_once(f"error: {error}")
        sys.stdout.flush()
        os._exit(error.exit_code)  # no atexit: a process group or a prefetch thread must not hold the exit
    except Exception:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            time.sleep(
                5
            )  # the echo of another rank's end is not worth a traceback: the launcher ends this one meanwhile
        raise


def speak_once(sentence: str) -> None:
    """Rank 0 speaks at once, and the launcher then ends the others; one that is still there has its own reason to tell."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(5)
    print(sentence if rank == 0 else f"rank {rank}: {sentence}", file=sys.stderr, flush=True)


def show_traceback(kind, error, trace) -> None:
    """Python's own, without the secrets that a library's exception may quote."""
    print(redact.redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)
