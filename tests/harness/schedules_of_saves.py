"""A schedule of saves: a run without engines saves STEPS checkpoints, in up to FAULTY lives under random faults and then in
one without. `run` returns the first property that did not hold.

After each life: every checkpoint that was published and that the rules of keeping keep is there, and whole. A life resumes
from the newest one, in its line, with the bits that were saved, and ends done or with a sentence. The last life ends done.
With a store, which fails as well, each checkpoint is copied, and some lives find no folder: then what has a whole copy is
what was published.
"""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import drawn_faults
import lives
import states
import store_contents
import torch
import torch.distributed as dist
from faulty_files import Faults
from lives import End, live

from ted_scale.checkpoints import attempts, holder, owner, state
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints import saver as saving
from ted_scale.checkpoints.progress import Progress, read_progress
from ted_scale.checkpoints.saver import Save, Saver
from ted_scale.config.operation import Checkpoint
from ted_scale.ranks.agree import of_rank_0, share
from ted_scale.run_folder import check_shared, resume_point
from ted_scale.storage import objects

STEPS, FAULTY = 6, 3
CALLS = drawn_faults.WRITES
SHAPES = {"w": [5, 10], "b": [3]}
PATHS = ("*", "*/step_*", "*.part*", "*/manifest.json", "*.safetensors", "*/progress.json", "*/step_*[0-9]")


class Run(NamedTuple):
    """What checkpoints need of a run file."""

    folder: Path
    name: str
    checkpoint: Checkpoint


def run(seed: int, place: Path, faults: Faults, store=None) -> tuple[str | None, list[str]]:
    """(what was wrong, how the lives ended)"""
    rng = random.Random(seed)
    ranks, run = rng.choice((1, 1, 2)), Run(place / "run", f"run_{seed}", drawn_settings(rng, store))
    ever, ends = {}, []
    (place / "filters").write_bytes(b"filters" * 20)
    for number in range(FAULTY + 1):
        life, last = place / f"life_{number}", number == FAULTY
        faults.arm([] if last else drawn_faults.drawn(rng, CALLS, [f"{run.folder}{p}" for p in PATHS], ranks=ranks))
        if store:
            store.arm([] if last else drawn_faults.drawn_of_store(rng))
        before, struck = newest(run), len(faults.log())
        ended = live(ranks, life, faults.folder, train, run, place, life)
        if store:
            faults.add_to_log(store.arm([]))
        ends.append(" ".join(sorted({end.kind for end in ended})))
        if wrong := wrong_with(run, ever, life, ended, before, faults.log()[struck:], last):
            return f"life {number}: {wrong}", ends
        if ends[-1] == "done" and last_is_saved(run):
            return None, ends
        if store and rng.random() < 0.4:
            shutil.rmtree(run.folder, ignore_errors=True)
            ever = store_contents.whole_copies(run.name)
    return None, ends


def drawn_settings(rng: random.Random, store) -> Checkpoint:
    keep = {"keep": rng.choice((1, 2, 3)), "keep_every": rng.choice((0, 0, 2)), "keep_best": rng.random() < 0.3}
    return Checkpoint(**keep, copy_to=store_contents.PLACE if store else "")


# A life, on one rank


def train(run: Run, place: Path, life: Path) -> None:
    """Resume and save every step, as the trainer does."""
    be_quick()
    writes = dist.get_rank() == 0
    check_shared(run.folder, writes)
    of_rank_0(files.clear_unfinished, run.folder)
    of_rank_0(owner.claim, run)
    found, line = resume_point(run)
    progress = read_progress(found) if found else Progress()
    progress = replace(progress, forks=progress.forks + (progress.step,) * (line - len(progress.forks)))
    if writes:
        note(life / "resumed", [found.name if found else "", line])
    if found:
        check_bits(found, progress.step)
    saver = Saver(run, [found / files.FILTERS, place / "filters"] if found else [place / "filters"], lambda *_: None)
    saver.copier.begin_again(found)
    for step in range(progress.step + 1, STEPS + 1):
        name = files.checkpoint_name(step, line)
        now = replace(progress, step=step, tokens=step, samples=step, validation=float(step * 7 % 5))
        saver.begin(Save(files.checkpoints_of(run.folder) / name, snapshot(step), now, True))
        saver.wait()
        if writes and not saver.outcome.failure:
            note(life / "published", {"name": name, "forks": now.forks, "validation": now.validation})
    saver.finish()
    saver.copier.finish()
    if writes and run.checkpoint.copy_to and not saver.copier.failure:
        note(life / "copied", files.checkpoint_name(STEPS, line))


def be_quick() -> None:
    """The pauses and the patience of a program that nobody waits for."""
    attempts.PAUSES_S, saving.LAST_PAUSES_S = (0, 0.001), (0, 0.001)
    objects.COPYING_S, objects.OPENING_S, owner.LEASE_S = 2, 1, 0
    holder.RENEWAL_S, holder.LEASE_S = 0.01, 0.04
    lives.shorten_patience()


def whole(step: int) -> dict[str, torch.Tensor]:
    """The state after a step: tensors by kind and name."""
    bits = torch.Generator().manual_seed(step)
    return {
        state.key_of(kind, name): torch.randn(shape, generator=bits)
        for kind in state.KINDS
        for name, shape in SHAPES.items()
    }


def snapshot(step: int) -> state.Snapshot:
    rank, ranks = share()
    pieces = {}
    for key, tensor in whole(step).items():
        first, last = state.cut(tensor.numel(), ranks, rank)
        if last > first:
            pieces[key] = tensor.flatten()[first:last]
    return state.Snapshot(pieces, {"ranks": ranks, "updates": step, "shapes": SHAPES})


def check_bits(checkpoint: Path, step: int) -> None:
    found = states.state_of(checkpoint)
    for kind in state.KINDS:
        for name in SHAPES:
            assert torch.equal(states.whole(found, name, kind), whole(step)[state.key_of(kind, name)]), (
                f"{checkpoint} holds other bits"
            )


def note(path: Path, value) -> None:
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def noted(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# After a life, without faults


def newest(run: Run) -> str:
    """Here or among the copies."""
    here = {c.path.name for c in files.published(run.folder) if c.fault is None}
    return max(here | copies_of(run).keys(), key=files.key_of, default="")


def copies_of(run: Run) -> dict[str, dict]:
    return store_contents.whole_copies(run.name) if run.checkpoint.copy_to else {}


def last_is_saved(run: Run) -> bool:
    return bool(name := newest(run)) and files.key_of(name)[1] == STEPS


def wrong_with(run, ever, life: Path, ended: list[End], before: str, struck: list[str], last: bool) -> str | None:
    """`ever` collects what was published: manifests by name."""
    if wrong := lives.wrong_end(ended, struck):
        return wrong
    ever |= {note["name"]: note for note in noted(life / "published")}
    for name, line in noted(life / "resumed"):
        if (
            before
            and not any(" stale " in line for line in struck)
            and (name, line) != (before, files.key_of(before)[0])
        ):
            return f"it resumed from {name or 'nothing'} in line {line}, but {before} is the newest"
    there = {c.path.name: c.manifest for c in files.published(run.folder) if c.fault is None}
    ever |= there
    copies = copies_of(run)
    for name in files.kept(ever, run.checkpoint):
        if name in copies and not (files.checkpoints_of(run.folder) / name).exists():
            continue  # the run's folder was lost
        fault = files.check_digests(files.checkpoints_of(run.folder) / name)
        if fault:
            return f"{name} was published and is lost: {fault}"
        check_bits(files.checkpoints_of(run.folder) / name, files.key_of(name)[1])
    if missing := [name for name in noted(life / "copied") if name not in copies]:
        return f"the run ended, but {missing[0]} has no copy"
    if last and not (all(end.kind == "done" for end in ended) and last_is_saved(run)):
        return f"without faults the run did not end: {ended}"
    return None
