"""Keep a run going on a plain machine or in a container:

    ted-scale supervise -- deepspeed launch/pretrain.py --config launch/runs/NAME.toml

starts the command, and restarts it if its exit code says that this can help: at once after a requested stop with a save
(75), after a growing pause after a failure, never after "done" (0), a mistake (2), bad numbers (3) or memory that ran
out (6). It gives up after --attempts exits without a newer checkpoint. SIGTERM, SIGUSR1 and Ctrl-C are forwarded to the
ranks only, which finish their step and save. When this program exits, no process of the command is left. Hosts of a --hostfile
are asked before each start: one that ssh does not reach is a mistake at first; later it is waited for, or left out.

Note: `deepspeed` does not forward signals and dies of them. So the ranks are found by their command lines, and this process
adopts every process that loses its parent, as the first process of a container must do anyway.
"""

import argparse
import contextlib
import ctypes
import os
import random
import signal
import sys
import time
from typing import NamedTuple

import psutil

from ted_scale.base.errors import DONE, MEANINGS, MEMORY, MISTAKE, NUMBERS, RESUME, UserError
from ted_scale.base.exits import run_main
from ted_scale.commands.supervised_run import is_done, not_saved, run_file_of, step_of
from ted_scale.config.run_file import load_run
from ted_scale.ranks import hosts
from ted_scale.ranks.signals import descendants_of, ranks_below

PR_SET_CHILD_SUBREAPER = 36
FORWARDED: dict[int, int] = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGINT: signal.SIGTERM,
}
POLL_S = 0.3
KILLED_S = 60  # a process that waits for a device or a file system does not react to SIGKILL
received: list[int] = []


class Exits(NamedTuple):
    """The step of the newest checkpoint at the last exit of the command, and the number of exits in a row at this step."""

    step: int | None = None
    count: int = 0

    def after(self, step: int) -> "Exits":
        return Exits(step, self.count + 1 if step == self.step else 1)


def main(argv: list[str] | None = None) -> None:
    settings, command = parse(argv)
    run = load_run(*run_file_of(command))
    for number in FORWARDED:
        signal.signal(number, lambda number, _: received.append(number))
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    sys.exit(supervise(run, command, settings))


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=5, help="exits without a newer checkpoint, before it gives up")
    parser.add_argument(
        "--pause-s", type=float, default=10, help="before the second start at a step; it doubles each time"
    )
    parser.add_argument("--longest-pause-s", type=float, default=600)
    parser.add_argument(
        "--patience-s", type=float, default=300, help="for ranks to stop when asked; then they are killed"
    )
    parser.add_argument(
        "--lost-hosts",
        choices=["wait", "leave"],
        default="wait",
        help="of a --hostfile that ssh reaches no more: wait for them, or go on without them until the next start",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    settings = parser.parse_args(argv)
    command = settings.command[1:] if settings.command[:1] == ["--"] else settings.command
    if not command:
        parser.error("a command must follow --, but nothing does")
    return settings, command


def supervise(run, command: list[str], settings) -> int:
    exits, reached = Exits(), first_reached(command, settings)
    while reached is not None:
        code = run_once(reached, settings.patience_s)
        if code == DONE and not is_done(run):
            log("the command exited with 0 before the last step: its launcher was killed")
            code = 1
        exits = exits.after(step_of(run))
        report = (
            f"exit code {code} ({MEANINGS.get(code, 'ended by a signal, or by its launcher')}) at step {exits.step}"
            f"{not_saved(run, exits.step)}"
        )
        if code in (DONE, MISTAKE, NUMBERS, MEMORY) or received:
            log(report)
            return code
        if exits.count >= settings.attempts:
            log(f"{report}; gave up after {exits.count} exits without a newer checkpoint")
            return code
        pause = pause_after(code, exits.count, settings, random.random())
        log(f"{report}; restarting in {pause:.0f} s, {settings.attempts - exits.count} more times at this step")
        reached = None if signalled_within(pause) else still_reached(command, settings)
    return RESUME


def first_reached(command: list[str], settings) -> list[str] | None:
    """The command, unless its hostfile names a machine in vain; None if a signal came meanwhile."""
    found = hosts.hosts_of(command)
    if settings.lost_hosts == "leave":
        hosts.refuse_other_programs(command)
        hosts.refuse_other_choices(command)
    hosts.refuse_unreached(hosts.unreached(found, received))
    # A machine that is cut off closes no connection: without this ssh, and the launcher above it, wait for ever.
    if found.names:
        os.environ.setdefault("PDSH_SSH_ARGS_APPEND", "-o ServerAliveInterval=15 -o ServerAliveCountMax=3")
    return None if received else command


def still_reached(command: list[str], settings) -> list[str] | None:
    """The command for the hosts that are there now; None if a signal came meanwhile."""
    found, said = hosts.hosts_of(command), None
    while lost := hosts.unreached(found, received):
        if settings.lost_hosts == "leave" and len(lost) < len(found.names):
            log(f"without hosts that ssh does not reach: {hosts.spell(lost)}")
            return hosts.without(command, lost)
        if lost != said:
            log(f"waiting for hosts that ssh must reach: {hosts.spell(lost)}")
        said = lost
        if signalled_within(settings.pause_s):
            return None
    return None if received else command


def pause_after(code: int, exits: int, settings, draw: float) -> float:
    """Seconds; `draw`, from 0 to 1, spreads the restarts of many runs that failed together."""
    if code == RESUME:
        return 0.0
    return min(settings.longest_pause_s, settings.pause_s * 2 ** (exits - 1)) * (0.75 + draw / 2)


def run_once(command: list[str], patience_s: float) -> int:
    """The exit code of the command, or of ranks that outlived it, once no process of it is left."""
    main_pid, code = spawn(command), None
    forwarded, end, orphans, orphan_codes = 0, None, set(), []
    while code is None or orphans:
        for pid, status in reap().items():
            if pid == main_pid:
                code = status
            elif pid in orphans:
                orphan_codes.append(status)
        if code is not None:
            orphans = set(ranks_below(os.getpid()))  # they noticed that their launcher is gone: they save and exit
            end = end or time.monotonic() + patience_s
        if len(received) > forwarded:
            forward(received[forwarded], main_pid)
            forwarded, end = len(received), end or time.monotonic() + patience_s
        if (end and time.monotonic() > end) or received.count(signal.SIGINT) > 1:
            break
        time.sleep(POLL_S)
    kill_remaining()
    status = max(*orphan_codes, code, code) if code is not None else -signal.SIGKILL
    return 128 - status if status < 0 else status  # as a shell reports it


def spawn(command: list[str]) -> int:
    """In a session of its own: a Ctrl-C in the terminal reaches only this process, which forwards it."""
    defaults = [signal.SIGPIPE, signal.SIGXFSZ, *FORWARDED]
    try:
        return os.posix_spawnp(command[0], command, os.environ, setsid=True, setsigdef=defaults)
    except OSError as error:
        raise UserError(f"the command must be a program, but {command[0]} is not: {error.strerror}") from None


def reap() -> dict[int, int]:
    """Processes that have exited by now, orphans too: exit code, or the negative number of the signal, by pid."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])
    return ended


def forward(number: int, main_pid: int) -> None:
    """To the ranks; to the command itself if it started none (no launcher, or srun)."""
    for pid in ranks_below(os.getpid()) or [main_pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, FORWARDED[number])


def kill_remaining() -> None:
    end = time.monotonic() + KILLED_S
    while (alive := descendants_of(os.getpid())) and time.monotonic() < end:
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(POLL_S / 3)
        reap()
    if alive:
        log(f"processes {[process.pid for process in alive]} cannot be killed: a device or a file system holds them")


def signalled_within(seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not received and time.monotonic() < end:
        reap()
        time.sleep(min(POLL_S, seconds))
    return bool(received)


def log(sentence: str) -> None:
    print(f"supervise: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
