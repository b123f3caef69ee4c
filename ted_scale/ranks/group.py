"""This process as a rank: its device, and the process group that the launcher's environment variables describe."""

import contextlib
import functools
import io
import logging
import os
import socket
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from ted_scale.base import extension
from ted_scale.config.run import Run
from ted_scale.ranks import watch

# The limit of a collective whose ranks watch each other. watch.py ends a hang long before and shows every rank's stack. Only
# watch.py knows whether the rank that all others wait for still reads its part of a large state.
LONGEST_WAIT = timedelta(days=7)
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def start_ranks(run: Run | None = None, check=lambda device: None) -> torch.device:
    """Join the process group and return this rank's device. `check(device)` may refuse the device before the ranks meet. A
    process without a launcher is the only rank. With a run, its ranks watch each other from here on."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="deepspeed|torch")
    for key, value in {**ALONE, "MASTER_PORT": free_port()}.items():
        os.environ.setdefault(key, value)
    accelerator, local = get_accelerator(), int(os.environ["LOCAL_RANK"])
    on_cpu = accelerator.device_name() == "cpu"
    if not on_cpu:
        accelerator.set_device(local)
    device = torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(), local)
    check(device)
    if run:
        watch.start(run.limits, run.folder)
    if on_cpu:
        extension.wait_for_lock()
    patience = LONGEST_WAIT if run else timedelta(minutes=30)
    with contextlib.redirect_stdout(io.StringIO()):  # "built successfully", on every rank
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=patience)
    watch.all_have_met()
    return device


def group_of_node(ranks: int):
    """The process group of `ranks` neighbouring ranks with this rank in it: those of its node, or those that share its rows. None
    if these are all ranks, which have a group already. A collective of all ranks."""
    if ranks == dist.get_world_size():
        return None
    return groups_of_nodes(ranks)


@functools.cache  # a group lives as long as the process
def groups_of_nodes(ranks: int):
    return dist.new_subgroups(ranks, timeout=LONGEST_WAIT)[0]


def free_port() -> str:
    """A free port, for a process without a launcher. Other such processes may run on this machine."""
    with socket.socket() as any_free:
        any_free.bind(("127.0.0.1", 0))
        return str(any_free.getsockname()[1])
