"""Real process groups: ranks on this machine, or on those of a hostfile as a run starts them.

Note: the hosts get the same command as a run's, `deepspeed --hostfile`, so that ssh, pdsh, the paths of the environment and
.deepspeed_env are tried with the network.
"""

import os
import re
import shutil
import socket
import sys
from pathlib import Path

from ted_scale.base.errors import UserError
from ted_scale.base.parsing import parse_json
from ted_scale.doctor.finding import MISSING, OK, Ended, Finding, last_error, run
from ted_scale.doctor.reduce import MARK
from ted_scale.ranks import hosts

SCRIPT = Path(__file__).with_name("reduce.py")
RANKS_S = 180
SLOTS = re.compile(r"^\s*[^\s#]\S*\s+slots=(\d+)", re.M)
HOSTS_WAY = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in .deepspeed_env: docs/nodes.md#what-to-set-where"


def refuse_too_many(ranks: int, gpus: int) -> None:
    if 0 < gpus < ranks:
        raise UserError(f"--ranks must be at most the GPUs ({gpus}), one a rank, but is {ranks}; lower it")


def here(ranks: int) -> list[Finding]:
    """Starts so many processes of this machine, which reduce a tensor together."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}
    environments = [
        {**os.environ, **threads, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)
    ]
    command = [sys.executable, str(SCRIPT), "--seconds", str(RANKS_S)]
    return result(run([command] * ranks, RANKS_S, environments), ranks, "NCCL_DEBUG=INFO says more; docs/nodes.md")


def over(hostfile: str) -> list[Finding]:
    """Checks which hosts ssh reaches, then starts one process group over all of them."""
    names = names_in(hostfile)
    try:
        lost = hosts.unreached(hosts.Hosts(tuple(names), None))
    except UserError as error:
        return [Finding("ssh", MISSING, str(error))]
    found = [reached(name, lost.get(name)) for name in names]
    if shutil.which("pdsh") is None and len(names) > 1:
        found.append(
            Finding("pdsh", MISSING, "it is not installed; DeepSpeed starts ranks with it", "apt-get install pdsh")
        )
    if any(each.state == MISSING for each in found):
        return found
    return [*found, *result(run([command_for(hostfile)], RANKS_S), slots_in(hostfile), HOSTS_WAY)]


def names_in(hostfile: str) -> list[str]:
    if names := hosts.names_in(hostfile):
        return names
    raise UserError(f"--hostfile must have a line NAME slots=N for each machine, but {hostfile} has none; write them")


def reached(name: str, said: str | None) -> Finding:
    if said is None:
        return Finding("ssh", OK, f"{name} answers without a password")
    return Finding(
        "ssh", MISSING, f"{name} is not reached: {said}", f"correct the name, or set up a key: ssh-copy-id {name}"
    )


def command_for(hostfile: str) -> list[str]:
    beside = Path(sys.executable).with_name("deepspeed")
    program = str(beside) if beside.exists() else "deepspeed"
    return [program, "--hostfile", hostfile, "--master_port", free_port(), str(SCRIPT), "--seconds", str(RANKS_S)]


def slots_in(hostfile: str) -> int:
    return sum(map(int, SLOTS.findall(Path(hostfile).read_text(encoding="utf-8"))))


def result(ended: Ended, ranks: int, way: str) -> list[Finding]:
    line = next((line for line in ended.said.splitlines() if MARK in line), None)
    if line is None or any(code != 0 for code in ended.codes):
        late = all(code is None for code in ended.codes)
        said = f"no sum within {RANKS_S} s" if late else last_error(ended.said)
        return [Finding("ranks", MISSING, f"{ranks} ranks do not meet: {said}", way)]
    found = parse_json(line.partition(MARK)[2])
    return [of_backend(name, each, found) for name, each in found["backends"].items()]


def of_backend(name: str, each: dict, found: dict) -> Finding:
    who = f"{found['ranks']} ranks on {', '.join(found['hosts'])}"
    if not each["right"]:
        return Finding(
            name, MISSING, f"{who} add up a wrong sum", "leave one machine out after the other until it is right"
        )
    rates = f"a rank receives {each['bytes_per_s'] / 1e9:,.3g} GB/s, one number takes {each['one_s'] * 1e6:,.0f} us"
    return Finding(name, OK, f"{who} add up right; {rates}")


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
