"""The errors that a user reads when a run cannot start or continue, and the exit codes.

watch.py decides which of many ranks reports an error. Note: a sentence is cleaned when its exception is made, because it
may quote a file or a library. Characters that are not printable are escaped, so that it is one line and moves no cursor,
and secrets are hidden.
"""

import contextlib
import errno
import json
import re

from ted_scale.base import redact

# What a user must correct: a name, a right, or room. Other errors of a file system may pass by themselves.
CORRECTABLE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENXIO, errno.EXDEV, errno.EMLINK),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
}
LONGEST_VALUE, LONGEST_SENTENCE = 200, 4000  # characters

# The one list of what a run's exit code means; docs/operations.md shows it, ted_scale/commands/supervise.py acts on it.
DONE, FAULT, MISTAKE, NUMBERS, HUNG, GONE, MEMORY, RESUME = 0, 1, 2, 3, 4, 5, 6, 75
MEANINGS = {
    DONE: "done",
    FAULT: "a fault of the program; its traceback is the last thing written",
    MISTAKE: "a mistake to correct, in one sentence",
    NUMBERS: "the run stopped itself over its numbers",
    HUNG: "a step took longer than its limit; every rank's stack is in the log",
    GONE: "a rank, or something it cannot do without, has gone",
    MEMORY: "a rank ran out of memory; the sentence has what to lower",
    RESUME: "asked to stop, nothing is lost; the same command goes on",  # EX_TEMPFAIL of sysexits.h
}


NOT_FINITE = "a number is not finite"


class UserError(Exception):
    """One sentence: what (its dotted name) must be what, but is what; how out."""

    exit_code = MISTAKE

    def __init__(self, sentence: str):
        super().__init__(clean(sentence))


class RunStopped(Exception):
    """One sentence on why a running run stopped itself: the step, the rank, the term. `over` is the reason in three words, for an
    alert's title."""

    exit_code = NUMBERS

    def __init__(self, sentence: str, over: str = ""):
        super().__init__(clean(sentence))
        self.over = over


class Gone(Exception):
    """One sentence on what the run needs and lost. The same command may find it again."""

    exit_code = GONE

    def __init__(self, sentence: str):
        super().__init__(clean(sentence))


class OutOfMemory(Exception):
    """One sentence on what did not fit into a rank's memory. The same command would fail again."""

    exit_code = MEMORY

    def __init__(self, sentence: str):
        super().__init__(clean(sentence))


class Preempted(Exception):
    """A signal asked the run to stop. Nothing is lost; `stepped` is whether this start has taken a step."""

    exit_code = RESUME
    SENTENCE = "asked to stop by a signal: every step so far is saved, start the same command again"
    BEFORE = "asked to stop by a signal before this start took a step: nothing is lost, start the same command again"

    def __init__(self, stepped: bool = True):
        super().__init__(self.SENTENCE if stepped else self.BEFORE)


SENTENCES = (UserError, RunStopped, Gone, OutOfMemory, Preempted)


def clean(sentence: str) -> str:
    text = sentence[: 10 * LONGEST_SENTENCE]  # more than is shown, so that a secret cut at its end is not shown
    return shortened(redact.redact(redact.printable(text)), LONGEST_SENTENCE)


def shown(value) -> str:
    """A value in a sentence: one short line, as a run file has it."""
    try:
        text = as_written(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of more digits than Python writes
        return f"a {type(value).__name__} that cannot be shown"
    return shortened(text, LONGEST_VALUE)


def as_written(value) -> str:
    """The value as TOML writes it. What TOML cannot express is written as in JSON or Python."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{bare(key)} = {as_written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_written, value))}]"
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return quoted(value) if isinstance(value, str) else repr(value)


def quoted(text: str) -> str:
    plain = text.isprintable() and "'" not in text and "\\" not in text
    return f"'{text}'" if plain else json.dumps(text)


def bare(key) -> str:
    return key if re.fullmatch(r"[\w-]+", str(key), re.ASCII) else json.dumps(str(key))


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "…"


@contextlib.contextmanager
def files_at(place):
    """An OSError about files becomes a sentence. It names the error's file, or `place` where the error names none. What is no
    mistake is Gone: a file server that fails over answers again."""
    try:
        yield
    except ConnectionError:  # a pipe without a reader
        raise
    except OSError as error:
        if error.errno not in CORRECTABLE:
            raise Gone(
                f"{error.filename or place} must be readable and writable, but the file system says "
                f"{error.strerror or error}; look at it and start the same command again"
            ) from None
        raise UserError(
            f"{error.filename or place} must be a file or folder that this user can use, on a disk with room, but is not: "
            f"{error.strerror or error}; put that right and start the same command again"
        ) from None
