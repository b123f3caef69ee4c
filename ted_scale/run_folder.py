"""The run's folder, as all ranks see it: locked by this process, shared by all nodes, and with the checkpoint to resume from.

folder.py knows the files in it. Note: before a checkpoint is used, the ranks read all of its bytes. Each rank reads a share,
and all ranks get the same result.
"""

import contextlib
import fcntl
import logging
import os
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from ted_scale.base.beneath import discard, keep_inside, make_folder, make_new, open_plain
from ted_scale.base.durable import PART, publish, sync, write_durably
from ted_scale.base.errors import CORRECTABLE, Gone, UserError, files_at
from ted_scale.base.patience import patiently
from ted_scale.base.sealed import WAY_OUT, read_manifest
from ted_scale.checkpoints import copies, holder, owner, strangers
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.progress import Progress, read_progress
from ted_scale.config import changes
from ted_scale.config.run_file import to_toml
from ted_scale.distill import memory
from ted_scale.forecast import summary
from ted_scale.metrics.console import open_log
from ted_scale.metrics.rows import trim_all
from ted_scale.plan import Plan, describe
from ted_scale.ranks import pulse
from ted_scale.ranks.agree import broadcast, gather, of_rank_0, share, verdict

log = logging.getLogger("ted_scale")
held: dict[Path, int] = {}  # the locks of run folders, until this process exits


def claim_folder(plan: Plan) -> tuple[Progress, Path | None]:
    """(progress, the checkpoint to resume from). After this call the folder is locked and clean, and all ranks see it."""
    folder, writes = plan.run.folder, dist.get_rank() == 0
    check_steps(plan)
    # Make the folder and lock it; remove what an earlier process left half-written; take the lease of the copies.
    keep_inside(folder)
    check_shared(folder, writes)
    open_log(folder, writes)
    of_rank_0(files.clear_unfinished, folder)
    of_rank_0(owner.claim, plan.run)
    if writes:
        owner.hold(plan.run)
    # Find the newest whole checkpoint, and refuse it if another run wrote it.
    newest, line = resume_point(plan.run)
    progress = of_rank_0(read_progress, newest) if newest else Progress()
    progress = replace(progress, forks=progress.forks + (progress.step,) * (line - len(progress.forks)))
    if newest:
        changes.refuse_another_run(newest, progress.identity, plan.identity(), plan.run.resume.allow, progress.step)
    # Now the folder is ours: remove rows after the checkpoint's step, keep the run file, log the plan.
    if writes:
        with files_at(folder):
            trim_all(folder, progress.step)
            write_durably(folder / "run.toml", to_toml(plan.run))
        log.info("\n".join([describe(plan), *memory.describe(plan), *summary.describe(plan)]))
        if progress.step > plan.total_steps:
            log.warning(
                f"train.steps ends the run at step {plan.total_steps:,}, but {newest.name} is beyond it: nothing is trained; raise "
                "train.steps to go on"
            )
        if newest:
            log.info(f"resuming from {newest}{on_other_ranks(newest)}")
    return progress, newest


def check_steps(plan: Plan) -> None:
    """Refuse ranks with different numbers of steps. Each rank counts train.epochs itself, and a corpus may grow meanwhile."""
    counts = gather(plan.total_steps)
    if len(set(counts)) > 1:
        raise Gone(
            f"train.epochs must be as many steps on all ranks, but are {min(counts)} on some and {max(counts)} on others; start "
            "the same command again when no file of a corpus changes any more"
        )


def where_it_stands(folder: Path, total_steps: int, begins: str) -> str:
    """What Ctrl-C prints about the run. It prints at once and does not wait for a file server."""
    stands, place = "there is no checkpoint yet", files.checkpoints_of(folder)
    with contextlib.suppress(OSError):
        names = [path.name for path in place.iterdir() if files.key_of(path.name)]
        if names:
            stands = f"the newest checkpoint is {place / max(names, key=files.key_of)}"
    what = pulse.now.what + (f" of {total_steps:,}" if pulse.now.what.startswith("step ") else "")
    return f"{what}, {begins}{stands}"


def to_export(run) -> str:
    return f"ted-scale export {run.folder}" + (" --checkpoint best" if run.checkpoint.best else "")


def on_other_ranks(checkpoint: Path) -> str:
    ranks = read_manifest(checkpoint).get("ranks")
    return "" if ranks == dist.get_world_size() else f", which {ranks} ranks wrote and {dist.get_world_size()} read"


def check_shared(folder: Path, writes: bool) -> None:
    """Rank 0 locks the folder and makes a file in it. Every rank must find this file. Its name is new each time, because an
    NFS client caches for a while that a file does not exist. The file is in the folder of checkpoints, because a client drops
    its cached listing of a folder when it makes a file there."""
    checkpoints = files.checkpoints_of(folder)
    token = checkpoints / broadcast(f".shared_{os.urandom(8).hex()}")
    of_rank_0(take, folder, token)
    if fault := verdict(is_not_shared, folder, token):
        raise UserError(fault)
    if writes:
        with contextlib.suppress(OSError):  # the next start removes what stays
            for left in checkpoints.glob(".shared_*"):
                discard(left)


def take(folder: Path, token: Path) -> None:
    try:
        strangers.refuse(folder)
        make_folder(token.parent)
        is_free = lock(folder)
        os.close(make_new(token, 0o600))
        strangers.refuse_others(folder, token)
        if is_free:  # as far as this node knows
            holder.take(folder)
    except OSError as error:
        if error.errno in CORRECTABLE:
            raise UserError(
                f"runs must be a folder this user can write, but {folder} is not: {error.strerror}"
            ) from None
        raise Gone(
            f"{folder} must be writable, but its file system says {error.strerror}; look at it and start again"
        ) from None
    if not is_free:  # no mistake of the user: a file server keeps the lock of a lost node for a while
        raise Gone(
            f"runs must be used by one process at a time, but another process is using {folder}; wait for it, or give this run "
            "another name"
        )


def is_not_shared(folder: Path, token: Path) -> str | None:
    try:
        patiently(os.stat, token, WAY_OUT)
    except FileNotFoundError:
        sees = f"runs must be a folder that all nodes share, but rank {dist.get_rank()} sees another {folder}"
        return f"{sees}; set runs to a folder on a shared file system"
    return None


def lock(folder: Path) -> bool:
    """Lock the folder until this process exits or dies. False if another process trains in it. Nothing is written to the lock
    file, because it may be a hard link to another file."""
    path = folder / ".lock"
    if path in held:  # an earlier run of this process has locked it
        return True
    file = open_plain(path, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return False
    except OSError as error:  # some shared file systems have no locks: train without one
        log.warning(
            f"{path} cannot be locked ({error.strerror}): a second start has only the files holder_*.json to see"
        )
    held[path] = file
    return True


def resume_point(run) -> tuple[Path | None, int]:
    """(checkpoint, line). The checkpoint is the newest one whose bytes are all intact, in the folder or among the copies in
    object storage. The run continues in this line (folder.py). If damaged checkpoints were skipped, they are logged, and the
    line is new."""
    place, writes, damaged = copies.place_of(run), dist.get_rank() == 0, []
    here = [path.name for path in of_rank_0(files.listed, run.folder)]
    there = of_rank_0(copies.names, place) if place else []
    for name in sorted({*here, *there}, key=files.key_of, reverse=True):
        checkpoint = files.checkpoints_of(run.folder) / name
        if name in here:
            log.info(f"checking every byte of {checkpoint}")
        faults = [verdict(files.check_digests, checkpoint, share())] if name in here else []
        if name in there and None not in faults:
            faults.append(fetch(place, checkpoint))
        for fault in filter(None, faults):
            damaged.append((checkpoint, fault))
            if writes:
                log.error(files.skipped(checkpoint, fault))
        if None in faults:
            passed = [path.name for path, _ in damaged if path.name != name]
            if writes:
                copies.forget_fetched(checkpoint.parent)
            return checkpoint, files.key_of(passed[0])[0] + 1 if passed else files.key_of(name)[0]
    if damaged:
        raise files.none_is_whole(run.folder, damaged)
    return None, 0


def fetch(place: str, checkpoint: Path) -> str | None:
    """Download a copy; every rank downloads a share of its files. Returns None if the copy is whole, "" if it never was
    whole, and else what is wrong with it."""
    copy = of_rank_0(copies.copy_of, place, checkpoint.name)
    if not copy.is_whole:
        return copy.fault or ""
    folder, (first, each) = checkpoint.with_name(checkpoint.name + copies.FETCHED), share()
    fault = verdict(copies.fetch, copy, folder, list(copy.manifest["files"])[first::each])
    return fault or of_rank_0(finish_fetched, copy, folder, checkpoint)


def finish_fetched(copy: copies.Copy, folder: Path, checkpoint: Path) -> str | None:
    """Publish a downloaded copy, on rank 0, after all its files have arrived. Returns what is wrong with it."""
    part = checkpoint.with_name(checkpoint.name + PART)
    with files_at(checkpoint):
        if fault := copies.publishable(copy, folder, part):
            return fault
        sync(part)
        publish(part)
    log.info(f"{checkpoint} was downloaded")
    return None


def filters_files(plan: Plan, newest: Path | None) -> list[Path]:
    """The files from which stage II may read its filters. A checkpoint of stage II has its own, so it needs no other file."""
    own = [newest / files.FILTERS] if newest and (newest / files.FILTERS).is_file() else []
    return [*own, *([plan.filters_file] if plan.filters_file else [])]
