"""Keep a run going on a plain machine or in a container:

    python launch/supervise.py -- deepspeed launch/pretrain.py --config launch/runs/NAME.toml

starts the command, and starts it again as long as its exit code says that this helps: at once where it was asked to stop
and has saved (75), after a growing pause where something failed, never after "done" (0), a mistake (2), bad
numbers (3) or memory that ran out (6).
It gives up after --attempts ends without a newer checkpoint. SIGTERM, SIGUSR1 and Ctrl-C go to the ranks alone, which
finish their step and save; when this program leaves, nothing of the command is left.

The surprise: `deepspeed` passes no signal on and does not outlive one, so the ranks are found by the words they were
started with, and this process adopts whatever loses its parent, as a container's first process must anyway.
"""

import argparse
import contextlib
import ctypes
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ted_scale.base.errors import DONE, MEANINGS, MEMORY, MISTAKE, NUMBERS, RESUME, UserError
from ted_scale.base.exits import run_main
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.progress import read_progress
from ted_scale.config.run_file import load_run
from ted_scale.ranks.signals import ranks_below

PR_SET_CHILD_SUBREAPER = 36
FORWARDED = {signal.SIGTERM: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1, signal.SIGINT: signal.SIGTERM}
LOOK_S = 0.3
KILLED_S = 60  # a process that waits for a device or a file system does not hear SIGKILL
received: list[int] = []


class Standing(NamedTuple):
    """The newest checkpoint's step when the command last ended, and how many ends in a row there were at it."""

    step: int | None = None
    ends: int = 0

    def after(self, step: int) -> "Standing":
        return Standing(step, self.ends + 1 if step == self.step else 1)


def main() -> None:
    settings, command = parse(sys.argv[1:])
    run = load_run(*run_file_of(command))
    for number in FORWARDED:
        signal.signal(number, lambda number, _: received.append(number))
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    sys.exit(supervise(run, command, settings))


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=5, help="ends without a newer checkpoint; then it gives up")
    parser.add_argument("--pause-s", type=float, default=10, help="before the second start at a step; doubles")
    parser.add_argument("--longest-pause-s", type=float, default=600)
    parser.add_argument(
        "--patience-s", type=float, default=300, help="for ranks that were asked to stop; then they are killed"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    settings = parser.parse_args(words)
    command = settings.command[1:] if settings.command[:1] == ["--"] else settings.command
    if not command:
        parser.error("a command must follow --, but nothing does")
    return settings, command


def run_file_of(command: list[str]) -> tuple[str, list[str]]:
    """--config and the --set of the command, as launch/pretrain.py will read them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--set", action="append", default=[])
    known, _ = parser.parse_known_args(command)
    if known.config is None:
        raise UserError(
            "the command must name its run file by --config, but does not; it tells where the checkpoints are"
        )
    return known.config, known.set


def supervise(run, command: list[str], settings) -> int:
    standing = Standing()
    while True:
        code = run_once(command, settings.patience_s)
        if code == DONE and not is_done(run):
            say("the command left with 0 before the last step: its launcher was killed")
            code = 1
        standing = standing.after(step_of(run))
        said = (
            f"exit code {code} ({MEANINGS.get(code, 'ended by a signal, or by its launcher')}) at step {standing.step}"
        )
        if code in (DONE, MISTAKE, NUMBERS, MEMORY) or received:
            say(said)
            return code
        if standing.ends >= settings.attempts:
            say(f"{said}; gave up after {standing.ends} ends without a newer checkpoint")
            return code
        pause = pause_after(code, standing.ends, settings, random.random())
        say(f"{said}; starting again in {pause:.0f} s, {settings.attempts - standing.ends} more times at this step")
        if asked_within(pause):
            return RESUME


def pause_after(code: int, ends: int, settings, draw: float) -> float:
    """Seconds; `draw` from 0 to 1 spreads the starts of many that failed together."""
    if code == RESUME:
        return 0.0
    return min(settings.longest_pause_s, settings.pause_s * 2 ** (ends - 1)) * (0.75 + draw / 2)


def step_of(run) -> int:
    """Of the newest checkpoint; a damaged one is the trainer's to tell of."""
    with contextlib.suppress(UserError):
        newest = files.newest_checkpoint(run.folder)
        return read_progress(newest).step if newest else 0
    return 0


def is_done(run) -> bool:
    """A launcher that is killed is `deepspeed`'s exit code 0 as well."""
    from ted_scale.distill.stages import stages_of  # torch, seconds and memory that are not needed before

    return step_of(run) >= stages_of(run)[-1].last_step


def run_once(command: list[str], patience_s: float) -> int:
    """The command's exit code, or that of ranks that outlived it, when nothing of it is left."""
    main_pid, code = spawn(command), None
    passed_on, end, orphans, left = 0, None, set(), []
    while code is None or orphans:
        for pid, status in reap().items():
            if pid == main_pid:
                code = status
            elif pid in orphans:
                left.append(status)
        if code is not None:
            orphans = set(ranks_below(os.getpid()))  # they saw their launcher go: they save and leave
            end = end or time.monotonic() + patience_s
        if len(received) > passed_on:
            pass_on(received[passed_on], main_pid)
            passed_on, end = len(received), end or time.monotonic() + patience_s
        if (end and time.monotonic() > end) or received.count(signal.SIGINT) > 1:
            break
        time.sleep(LOOK_S)
    kill_what_is_left()
    status = max(*left, code, code) if code is not None else -signal.SIGKILL
    return 128 - status if status < 0 else status  # as a shell says it


def spawn(command: list[str]) -> int:
    """In a session of its own: a Ctrl-C of the terminal reaches this process only, which passes it on."""
    defaults = [signal.SIGPIPE, signal.SIGXFSZ, *FORWARDED]
    try:
        return os.posix_spawnp(command[0], command, os.environ, setsid=True, setsigdef=defaults)
    except OSError as error:
        raise UserError(f"the command must be a program, but {command[0]} is not: {error.strerror}") from None


def reap() -> dict[int, int]:
    """What has ended by now, orphans too, with its exit code, or the negative number of its signal."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])
    return ended


def pass_on(number: int, main_pid: int) -> None:
    """To the ranks; a command that has none below it (no launcher, or srun's) is told itself."""
    for pid in ranks_below(os.getpid()) or [main_pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, FORWARDED[number])


def kill_what_is_left() -> None:
    end = time.monotonic() + KILLED_S
    while (alive := psutil.Process().children(recursive=True)) and time.monotonic() < end:
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(LOOK_S / 3)
        reap()
    if alive:
        say(f"processes {[process.pid for process in alive]} cannot be killed: a device or a file system holds them")


def asked_within(seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not received and time.monotonic() < end:
        reap()
        time.sleep(min(LOOK_S, seconds))
    return bool(received)


def say(sentence: str) -> None:
    print(f"supervise: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
