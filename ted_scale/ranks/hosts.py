"""The hosts on which a `deepspeed --hostfile` command starts ranks: which of them ssh reaches, and the command without some hosts.

Note: only ssh can say whether it reaches a host, because a name may be an alias in ssh's configuration. With --no_ssh the command
is started on each host separately, and the names are only labels.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ted_scale.base.errors import UserError, files_at

LINE = re.compile(r"^\s*([^\s#]\S*)\s+slots=\d+", re.M)  # DeepSpeed's format of a line
CONNECT_S, ANSWER_S = 5, 20  # for one connection; for all answers, logins included
POLL_S, KILLED_S = 0.05, 1
ALONE = ("-o", "ControlMaster=no", "-o", "ControlPath=none")  # a shared connection may be older than the loss
PROBE = ("ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", *ALONE)
CHOICES = ("--include", "--exclude", "--num_nodes")  # options that choose hosts of the hostfile


class Hosts(NamedTuple):
    names: tuple[str, ...]
    port: str | None


class Probe(NamedTuple):
    """`said` is a file, not a pipe: ssh may leave a process behind, for a ProxyJump for example, and it would keep a pipe open."""

    process: subprocess.Popen
    said: BinaryIO


def hosts_of(command: list[str]) -> Hosts:
    """The hosts of the command. It has no names if the command starts no rank over ssh."""
    known = parse(command)
    if known.hostfile is None or known.no_ssh:
        return Hosts((), None)
    return Hosts(tuple(chosen(names_in(known.hostfile), known)), known.ssh_port)


def names_in(hostfile: str) -> list[str]:
    """The names, in the order of the file. Refuses a name that ssh would read as an option."""
    try:
        with files_at(hostfile):
            names = LINE.findall(Path(hostfile).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"--hostfile must be UTF-8, but {hostfile} is not at byte {error.start}; correct it") from None
    if options := [name for name in names if name.startswith("-")]:
        raise UserError(
            f"--hostfile must name machines, but {hostfile} names {options[0]}, which ssh takes for an option; correct it"
        )
    return names


def parse(command: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for names in (("-H", "--hostfile"), ("-i", "--include"), ("-e", "--exclude"), ("--ssh_port",)):
        parser.add_argument(*names)
    parser.add_argument("--num_nodes", type=int)
    parser.add_argument("--no_ssh", action="store_true")
    try:
        return parser.parse_known_args(command)[0]
    except argparse.ArgumentError as error:
        raise UserError(f"the command must be one that deepspeed can read, but is not: {error}; correct it") from None


def chosen(names: list[str], known: argparse.Namespace) -> list[str]:
    """The names that DeepSpeed would choose. An excluded name with slots loses only these slots. A number below 1 is no limit."""
    if known.include:
        included = [part.partition(":")[0] for part in known.include.split("@")]
        names = [name for name in names if name in included]
    if known.exclude:
        names = [name for name in names if name not in known.exclude.split("@")]
    return names[: known.num_nodes] if (known.num_nodes or 0) > 0 else names


def unreached(hosts: Hosts, signals: Sequence[int] = ()) -> dict[str, str]:
    """For each host on which ssh cannot run a command, what ssh says. All hosts are asked at the same time. A signal that arrives
    in `signals` ends the wait, and the result is empty."""
    port = ("-p", hosts.port) if hosts.port else ()
    probes = {name: ask((*PROBE, *port, "--", name, "true")) for name in hosts.names}
    end = time.monotonic() + ANSWER_S
    while any(probe.process.poll() is None for probe in probes.values()) and not signals and time.monotonic() < end:
        time.sleep(POLL_S)
    answers = {name: answer(probe) for name, probe in probes.items()}
    return {} if signals else {name: said for name, said in answers.items() if said is not None}


def ask(command: tuple[str, ...]) -> Probe:
    """Start ssh in a session of its own. So Ctrl-C in the terminal does not reach it, and processes that it leaves behind can be
    found."""
    quiet, said = subprocess.DEVNULL, os.fdopen(os.memfd_create("ssh"), "w+b")
    try:
        process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=said, start_new_session=True)
    except OSError as error:
        raise UserError(
            f"ssh must be a program here, but is not: {error.strerror}; install it, or take --no_ssh"
        ) from None
    return Probe(process, said)


def answer(probe: Probe) -> str | None:
    """None if ssh reached the host, else the last line that ssh wrote. No process of the probe is left."""
    code = probe.process.poll()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(probe.process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a hanging file system may keep it alive
        probe.process.wait(KILLED_S)
    with probe.said as file:
        file.seek(0)
        said = file.read().decode(errors="replace").strip()
    if code is None:
        return f"no answer within {ANSWER_S} s"
    return None if code == 0 else (said.splitlines() or [f"ssh exits with {code}"])[-1]


def refuse_unreached(lost: dict[str, str]) -> None:
    """A UserError that names the hosts which ssh does not reach."""
    if lost:
        raise UserError(
            f"--hostfile must name machines that ssh reaches, but {spell(lost)}; correct it, or set up ssh there without a password"
        )


def spell(lost: dict[str, str]) -> str:
    return ", ".join(f"{name} is not ({said})" for name, said in lost.items())


def without(command: list[str], lost: dict[str, str]) -> list[str]:
    """The command with options that make DeepSpeed leave these hosts out. If one host remains, DeepSpeed would take it for this
    machine and ignore .deepspeed_env; an option prevents this."""
    return [command[0], "--force_multi", "--exclude", "@".join(lost), *command[1:]]


def refuse_other_programs(command: list[str]) -> None:
    """Refuse a command whose first word is not DeepSpeed, because `without` inserts options after the first word."""
    if Path(command[0]).name != "deepspeed":
        raise UserError(
            f"the command must begin with deepspeed with --lost-hosts leave, but begins with {command[0]}; put that before "
            "ted-scale, and variables for other hosts into .deepspeed_env"
        )


def refuse_other_choices(command: list[str]) -> None:
    """Refuse a command that chooses hosts itself: DeepSpeed allows one such option, and `without` adds it."""
    known = vars(parse(command))
    if given := [name for name in CHOICES if known[name.strip("-")] is not None]:
        raise UserError(
            f"the command must choose its hosts by --hostfile alone with --lost-hosts leave, but has {given[0]}; write the "
            "hosts to use into the hostfile"
        )
