"""Ranks as a launcher starts them, without the launcher, which is half the time of a start; what it does is in test_launch.py."""

import os
import socket
import tempfile
import time

import forked


def start_ranks(ranks: int, said, *words, environment: dict[str, str] | None = None) -> list:
    """`python WORDS…` once a rank, with this environment beside the test's own; all write to `said`."""
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    shared = {**os.environ, **(environment or {}), **world}
    return [
        forked.start(words, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=said, stderr=said)
        for rank in range(ranks)
    ]


def free_port() -> str:
    """Free at this moment: two suites may run on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ended(processes: list, seconds: float, alone_s: float = 60) -> list[int]:
    """Exit codes when all have ended, or one in a way that leaves the others waiting, so long."""
    deadline = time.monotonic() + seconds
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        if any(p.poll() for p in processes):
            deadline = min(deadline, time.monotonic() + alone_s)
        time.sleep(0.05)
    for process in processes:
        process.kill()
    return [process.wait() for process in processes]


def run_ranks(ranks: int, *words, seconds: float = 900) -> None:
    """From start to a good end."""
    with tempfile.TemporaryFile("w+") as said:
        codes = ended(start_ranks(ranks, said, *words), seconds)
        said.seek(0)
        assert codes == [0] * ranks, said.read()[-3000:]
