"""The store in which the ranks of a run meet. Rank 0 serves it. watch.py's heartbeats use a connection of their own."""

import os
import time
from datetime import timedelta
from pathlib import Path

from ted_scale.base.errors import Gone

MEETING_S = 600.0  # nodes do not start at the same moment


def patiently(action, patience_s: float):
    """Retry `action`. A node that restarts at once still finds the store of the run before, until its other ranks have exited."""
    until = time.monotonic() + patience_s
    while True:
        try:
            return action()
        except Gone:
            if time.monotonic() > until:
                raise
            time.sleep(1)


def open_store(rank: int, world: int, folder: Path):
    """Open a second connection to the store, because the connection of the process group is locked while a thread waits in it.
    Rank 0 is the server. torch finds this server later and uses it, too."""
    import torch.distributed as dist

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = (
        rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    )  # torchrun has a store already, whose port a second one would need
    settings = {"timeout": timedelta(seconds=MEETING_S), "wait_for_workers": False, "multi_tenant": True}
    try:
        store = dist.TCPStore(host, port, world, serves, **settings)
    except RuntimeError as error:
        if rank:
            raise Gone(f"rank 0 must be at {host}:{port} within {MEETING_S:g} s, but is not: {error}") from None
        raise taken(port) from None
    return dist.PrefixStore(f"ted_scale/{world}/{folder}", store)


def taken(port) -> Gone:
    """The error for a port that is in use. Often this run's earlier process has it, and is about to notice that the run has
    ended."""
    return Gone(
        f"MASTER_PORT must be free on rank 0's node, but {port} is not: another run may have it; wait for its end, or start with "
        "another port: `deepspeed --master_port 29511 …`, or without deepspeed MASTER_PORT=29511 in the environment"
    )
