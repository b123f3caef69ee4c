"""Two nodes on one machine: network namespaces with an address and a port space each, one cable between them, and stand-ins for
ssh, pdsh, srun and scontrol that start programs there.

Both see the same files, as nodes with a shared file system do. Note: a namespace that its test left behind, because it was
killed, carries that process's id in its name; the next test removes it.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from places import HARNESS, ROOT

DEEPSPEED = Path(sys.executable).with_name("deepspeed")
PRETRAIN = ROOT / "launch" / "pretrain.py"
SUPERVISE = (sys.executable, ROOT / "launch" / "supervise.py")
NAME = re.compile(r"^ted_scale_(\d+)_[ab]", re.M)
ADDRESSES = ("10.77.0.1", "10.77.0.2")
NOBODY = "10.77.0.9"  # an address of the same network
QUEUE = ("burst", "128k", "latency", "200ms")  # a packet of TCP's may have 64 KiB


class Nodes(NamedTuple):
    """`spaces` are the namespaces of ADDRESSES; `bin` has the stand-ins."""

    spaces: tuple[str, str]
    bin: Path

    def command(self, node: int, *words) -> list[str]:
        """As typed on that node."""
        return ["ip", "netns", "exec", self.spaces[node], *map(str, words)]

    def environment(self, **more: str) -> dict[str, str]:
        """For the first process; the stand-in of ssh passes on no more of it than ssh does."""
        ours = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": os.environ.get("HOME", "/root"),
            "NODES": " ".join(self.spaces),
        }
        return {**ours, **more}

    def start(self, node: int, *words, said, cwd: Path, **more: str) -> subprocess.Popen:
        environment, command = self.environment(**more), self.command(node, *words)
        return subprocess.Popen(command, env=environment, cwd=cwd, stdout=said, stderr=said, start_new_session=True)

    def cut(self, node: int) -> None:
        ip("-n", self.spaces[node], "link", "set", "eth0", "down")

    def join(self, node: int) -> None:
        ip("-n", self.spaces[node], "link", "set", "eth0", "up")

    def slow(self, megabits: float) -> None:
        """Both directions of the cable."""
        for space in self.spaces:
            limit = ("dev", "eth0", "root", "tbf", "rate", f"{megabits}mbit", *QUEUE)
            called("tc", "-n", space, "qdisc", "replace", *limit)

    def received(self, node: int) -> int:
        """Bytes, by the kernel's count."""
        counts = subprocess.check_output(self.command(node, "cat", "/proc/net/dev"), text=True)
        return int(re.search(r"eth0:\s*(\d+)", counts)[1])


@contextlib.contextmanager
def two_nodes(folder: Path, *, shaped: bool = False) -> Iterator[Nodes]:
    """Skips the test where the machine does not allow it. Whatever happens, no process and no namespace is left."""
    remove_leftovers()
    spaces = tuple(f"ted_scale_{os.getpid()}_{letter}" for letter in "ab")
    try:
        connect(spaces, shaped)
        yield Nodes(spaces, stand_ins(folder / "bin"))
    finally:
        for space in spaces:
            remove(space)


def connect(spaces: tuple[str, str], shaped: bool) -> None:
    wanted = ("ip", "hostname", *(["tc"] if shaped else []))
    if missing := [program for program in wanted if not shutil.which(program)]:
        pytest.skip(f"two nodes need {', '.join(missing)}")
    for space in spaces:
        done = subprocess.run(["ip", "netns", "add", space], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"`ip netns add` is not allowed here: {done.stderr.strip()}")
    ip("link", "add", "eth0", "netns", spaces[0], "type", "veth", "peer", "name", "eth0", "netns", spaces[1])
    for space, address in zip(spaces, ADDRESSES, strict=True):
        ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            ip("-n", space, "link", "set", link, "up")


def ip(*words: str) -> None:
    called("ip", *words)


def called(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


def write_hosts(folder: Path, names) -> Path:
    """The hostfile, one rank a machine, and beside it what DeepSpeed sets on each of them."""
    known = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    known |= {name: os.environ[name] for name in ("TORCH_EXTENSIONS_DIR",) if name in os.environ}
    (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in known.items()))
    (folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in names))
    return folder / "hosts"


def stand_ins(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("ssh", "pdsh", "srun", "scontrol"):
        (folder / name).symlink_to(HARNESS / "on_nodes" / name)
    return folder


def remove(space: str) -> None:
    """With every process that runs there; the cable goes with its ends."""
    end = time.monotonic() + 20
    while (found := pids_in(space)) and time.monotonic() < end:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def pids_in(space: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def remove_leftovers() -> None:
    if shutil.which("ip"):
        names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
        for found in NAME.finditer(names):
            if not Path(f"/proc/{found[1]}").exists():
                remove(found[0])
