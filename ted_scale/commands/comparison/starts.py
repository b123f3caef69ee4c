"""Runs of a comparison as processes: some at once, each with its own devices or cores, and none left behind.

Note: `deepspeed` forwards no signal to its ranks and does not wait for them, so each run is a session that is ended whole. A
comparison that is killed ends none of them, so each is tied to it: the next start would find its run in use.
"""

import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from ted_scale.base.errors import UserError
from ted_scale.base.shipped import PACKAGE, found
from ted_scale.commands.comparison.plan import Comparison, Job
from ted_scale.commands.comparison.sessions import end_session

TIED = Path(__file__).with_name("tied.py")


def run_all(plan: Comparison, jobs: list[Job]) -> Iterator[tuple[Job, int]]:
    """Each job with its exit code, as they end."""
    places: queue.SimpleQueue = queue.SimpleQueue()
    for words in places_of(plan):
        places.put(words)
    alive: list[subprocess.Popen] = []
    over = threading.Event()
    with ThreadPoolExecutor(plan.at_once) as pool:
        waits = {pool.submit(run_one, plan, job, places, alive, over): job for job in jobs}
        try:
            for done in as_completed(waits):
                yield waits[done], done.result()
        except BaseException:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(alive):  # each leaves the list when it has ended
                end_session(process)
            raise


def run_one(plan: Comparison, job: Job, places: queue.SimpleQueue, alive: list, over: threading.Event) -> int:
    place = places.get()
    said = plan.place / "said" / f"{job.name}.txt"
    said.parent.mkdir(parents=True, exist_ok=True)
    words = ["--config", plan.run, *(word for each in job.words for word in ("--set", each))]
    try:
        with said.open("a") as out:
            process = subprocess.Popen(
                [sys.executable, TIED, str(os.getpid()), *launcher(place), *program(job, place), *words],
                stdout=out, stderr=out, env=environment(plan), start_new_session=True,
            )  # fmt: skip
            alive.append(process)
            if over.is_set():  # it was being started while the others were ended
                end_session(process)
            code = process.wait()
            alive.remove(process)
            return code
    finally:
        places.put(place)


def launcher(place: list[str]) -> list:
    if not place:
        return [sys.executable]
    return [Path(sys.executable).with_name("deepspeed"), *place, "--master_port", free_port()]


def program(job: Job, place: list[str]) -> list:
    """Ours is named as a module, because a wheel has no launch/."""
    if job.program:
        return [found(job.program)]
    return ["--module" if place else "-m", "ted_scale.commands.pretrain"]


def places_of(plan: Comparison) -> list[list[str]]:
    """The launcher's words for each of the runs that go on at once. An only rank on a CPU has none: it needs no launcher, whose
    two processes import torch, too."""
    devices = device_count()
    if devices and plan.at_once * plan.ranks > devices:
        raise UserError(
            f"at_once must leave each run {plan.ranks} devices, but is {plan.at_once} on a machine with {devices}; lower it"
        )
    if not devices and plan.ranks == 1:
        return [[]] * plan.at_once
    found = []
    for k in range(plan.at_once):
        own = ",".join(str(n) for n in range(k * plan.ranks, (k + 1) * plan.ranks))
        where = ["--include", f"localhost:{own}"] if devices else ["--num_gpus", str(plan.ranks)]
        found.append(where)
    return found


def refuse_crowd(plan: Comparison, rank: float) -> None:
    """Runs on a CPU share the host's memory, of which a rank needs so many bytes at most."""
    from ted_scale.ranks import capacity  # imports torch

    memory, all_ranks = capacity.of_the_host(), plan.at_once * plan.ranks * rank
    if plan.at_once > 1 and not device_count() and all_ranks > memory:
        raise UserError(
            f"at_once must leave each run its memory, but is {plan.at_once}, which may need {all_ranks / 2**30:.3g} GiB of "
            f"{memory / 2**30:.3g} by the dry run's estimate; lower it"
        )


def free_port() -> str:
    """Another comparison may go on beside this one."""
    with socket.socket() as listening:
        listening.bind(("", 0))
        return str(listening.getsockname()[1])


def device_count() -> int:
    import torch  # seconds that a mistake in a plan should not wait for

    return torch.cuda.device_count()


def environment(plan: Comparison) -> dict[str, str]:
    """Runs on a CPU share its cores; torch would use all of them in each process. They find this package if it is not installed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    packages = f"{PACKAGE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    own = {**os.environ, "PATH": path, "PYTHONPATH": packages}
    if device_count():
        return own
    threads = max(1, len(os.sched_getaffinity(0)) // (plan.ranks * plan.at_once))
    return {"OMP_NUM_THREADS": str(threads), **own, "DS_ACCELERATOR": "cpu"}
