"""The sentences a user reads when a run cannot start or cannot go on, and the way they leave the process."""

import os
import sys
import time


class UserError(Exception):
    """One sentence: what (its dotted name) must be what, but is what; how out. Exit code 2."""

    exit_code = 2


class RunStopped(Exception):
    """One sentence on why a run that was going ended itself: the step, the rank, the term. Exit code 3."""

    exit_code = 3


def run_main(main) -> None:
    """Run `main()`; our own exceptions become their sentence on stderr and their exit code, others stay tracebacks."""
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
