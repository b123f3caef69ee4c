"""What this machine has, what would run here, and what is missing: ted-scale doctor [--ranks N] [--hostfile FILE]

A line for each check, in the order in which a newcomer needs them, each within its own time. Exits with 0 if all that is
needed is there, with 1 if something is missing, and with 2 after a mistake in the arguments.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main
from ted_scale.base.redact import printable, redact
from ted_scale.doctor import disk, machine, outside, ranks, software
from ted_scale.doctor.finding import MISSING, NOTE, OK, Finding, bounded

SOFTWARE_S, LATE_S = 90, 10  # of a check of files; what a check may take beyond the time of its own processes


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    found = []
    for finding in check(arguments):
        found.append(finding)
        if not arguments.json:
            print(line(finding), flush=True)
    missing = [finding for finding in found if finding.state == MISSING]
    if arguments.json:
        print(
            json.dumps({"missing": len(missing), "findings": [said(finding)._asdict() for finding in found]}, indent=1)
        )
    else:
        print(f"\n{summary(found, missing)}")
    sys.exit(1 if missing else 0)


def check(arguments) -> Iterator[Finding]:
    """A process that hangs does not hold the checks before it back, because each is yielded when it ends."""
    probed = machine.Probed()

    def probe() -> list[Finding]:
        probed.update(found := machine.probe())
        probed.why = found.why
        return machine.torch(probed)

    yield from software.python()
    yield from bounded("torch", probe, machine.PROBE_S + LATE_S)
    yield from bounded("packages", software.packages, SOFTWARE_S)
    yield from bounded("compiler", software.compiler, SOFTWARE_S)
    yield from bounded("cpu", machine.host, SOFTWARE_S)
    yield from outer(arguments)
    yield from machine.what_runs(probed)
    yield from groups(arguments, len(probed.get("torch", {}).get("devices", ())))


def outer(arguments) -> Iterator[Finding]:
    """Disks and the network."""
    yield from bounded("disk", partial(disk.check, arguments.folder), disk.DISK_S)
    yield from bounded("W&B", outside.wandb, outside.WANDB_S)
    if arguments.url:
        yield from bounded("S3", partial(outside.s3, arguments.url), outside.S3_S)


def groups(arguments, gpus: int) -> Iterator[Finding]:
    if arguments.ranks or arguments.hostfile:
        yield from bounded("names", outside.names, outside.NAMES_S)
    if arguments.ranks:
        ranks.refuse_too_many(arguments.ranks, gpus)
        yield from ranks.here(arguments.ranks)
    if arguments.hostfile:
        yield from ranks.over(arguments.hostfile)


def line(finding: Finding) -> str:
    what, state, told, way = said(finding)
    return f"{state:<8} {what:<14} {told}" + (f"\n{'':<23} -> {way}" if way else "")


def said(finding: Finding) -> Finding:
    """Others' words in it move no cursor, and no secret is shown."""
    return Finding(*(redact(printable(part)) for part in finding))


def summary(found: list[Finding], missing: list[Finding]) -> str:
    counts = {state: sum(finding.state == state for finding in found) for state in (OK, NOTE, MISSING)}
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    if missing:
        return f"{told}. Needed and not there: {', '.join(dict.fromkeys(finding.what for finding in missing))}."
    return f"{told}. All that is needed is there."


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="whose disk is measured; default: this one")
    parser.add_argument("--url", metavar="s3://BUCKET/PREFIX", help="list, write, read and delete there")
    parser.add_argument("--ranks", type=int, metavar="N", help="a process group of N ranks on this machine")
    parser.add_argument("--hostfile", metavar="FILE", help="one over these machines, as deepspeed --hostfile starts it")
    parser.add_argument("--json", action="store_true", help="all findings as JSON, at the end")
    arguments = parser.parse_args(argv)
    refuse_mistakes(arguments)
    return arguments


def refuse_mistakes(arguments: argparse.Namespace) -> None:
    if not arguments.folder.is_dir():
        raise UserError(f"--folder must be a folder that is there, but is {arguments.folder}; correct it")
    if arguments.url and not arguments.url.startswith("s3://"):
        raise UserError(f"--url must begin with s3://, but is {arguments.url}; correct it")
    if arguments.ranks is not None and arguments.ranks < 1:
        raise UserError(f"--ranks must be at least 1, but is {arguments.ranks}; correct it")
    if arguments.ranks and arguments.hostfile:
        raise UserError(
            "--ranks must be left out with --hostfile, whose slots say how many, but is given; leave one out"
        )
    if arguments.hostfile:
        ranks.names_in(arguments.hostfile)


if __name__ == "__main__":
    run_main(main)
