"""Folders from strangers, with one to three hostile things in each: links, pipes, devices, files of 1 TB, names that are no names.

Whatever the project does with one returns, or is refused in one printable sentence; in bounded time and memory; and a home
beside it stays as it was. A seed makes an input. Some here, ten thousand with `pytest -m soak tests/test_hostile.py`.
"""

import contextlib
import io
import os
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import hostile
import pytest
import torch
import torch.distributed as dist
from bounded import bounds
from hostile_inputs import SUBJECTS, World, begun_output
from plain import make_world
from tiny import make_run

from ted_scale import run_folder
from ted_scale.base import beneath
from ted_scale.base.errors import Gone, UserError
from ted_scale.base.sealed import Damaged
from ted_scale.checkpoints import holder
from ted_scale.commands import train_tokenizer
from ted_scale.corpora import documents
from ted_scale.corpora.reader import opened
from ted_scale.metrics.console import log
from ted_scale.models.inspection import inspect
from ted_scale.models.weights import build_network
from ted_scale.plan import make_plan

FEW, MANY = 100, 10_000
MEMORY, LARGEST = 1 << 30, 1 << 26
NOBODY = 65534
REFUSED = (UserError, Gone, Damaged)
TURNS = ("run", "corpus", "run", "model", "run", "texts", "corpus", "tokenizer")
outcomes: Counter = Counter()


@pytest.fixture(scope="module")
def place():
    """Not a folder of pytest's, in which a user who is nobody reaches nothing."""
    with tempfile.TemporaryDirectory(prefix="ted_scale_hostile_") as place:
        Path(place).chmod(0o755)
        (Path(place) / "inputs").mkdir()
        yield Path(place)


@pytest.fixture(scope="module")
def world(place) -> World:
    folder = make_world(place / "world")
    (folder / "tokenizer").mkdir()
    texts = [f"some text number {n} about {word}\n" * 3 for n in range(40) for word in ("weights", "tokens", "layers")]
    train_tokenizer.write_folder(train_tokenizer.train(iter(texts), 320), folder / "tokenizer")
    plan = make_plan(make_run(folder, checkpoint={"every": 2}), 1)
    network = build_network(inspect("student.path", str(folder / "student")), ds_config=None, dtype=torch.float32)
    made = World(folder, plan, network, place / "mark")
    (folder / "begun").mkdir()
    begun_output(folder / "begun", made)
    for name, subject in SUBJECTS.items():
        (place / "sound" / name).mkdir(parents=True)
        subject.make(place / "sound" / name, made)
    return made


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def little_work_of_its_own(monkeypatch):
    monkeypatch.setattr("ted_scale.base.patience.PATIENCE_S", 0.0)
    monkeypatch.setattr(holder, "RENEWAL_S", 0.05)
    monkeypatch.setattr(holder, "LEASE_S", 0.1)
    monkeypatch.setattr(documents, "LONGEST", LARGEST)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(run_folder.memory, "describe", lambda plan: [])  # slow, and reads no folder
    for name in ("handlers", "propagate"):
        monkeypatch.setattr(log, name, getattr(log, name))
    monkeypatch.setattr(run_folder, "held", {})
    monkeypatch.setattr(holder, "held", {})
    monkeypatch.setattr(beneath, "roots", set())


class Console(io.TextIOWrapper):
    """A terminal that takes text and nothing else."""

    def __init__(self, errors: str = "strict"):
        super().__init__(io.BytesIO(), "utf-8", errors)

    def said(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()


def one_input(seed: int, world: World) -> None:
    rng, name = random.Random(seed), TURNS[seed % len(TURNS)]
    subject, at = SUBJECTS[name], world.folder.with_name("inputs") / str(seed)
    folder, home = at / "stranger" / name, at / "home"
    shutil.copytree(world.folder.with_name("sound") / name, folder, symlinks=True)
    hostile.victim(home)
    strikes = sorted(rng.choices(hostile.STRIKES, k=rng.randint(1, 3)), key=hostile.STRIKES.index)
    late = subject.begin is not None and rng.random() < 0.4
    acts = [partial(subject.begin, folder, world)] if late else subject.acts(folder, world)
    as_nobody = hostile.closed in strikes and os.getuid() == 0
    try:
        for strike in () if late else strikes:
            strike(rng, folder, home)
        before = given_away(at, home) if as_nobody else hostile.state_of(home)
        with whom(as_nobody):
            for act in acts:
                attempt(name, act)
            for strike in strikes if late else ():
                strike(rng, folder, home)
            for act in subject.later(folder, world) if late else ():
                attempt(f"{name} in use", act)
        assert hostile.state_of(home) == before, "something outside was touched"
        assert {path.name for path in at.iterdir()} <= {"stranger", "home", "out"}, "something was made outside"
        assert {path.name for path in folder.parent.iterdir()} == {name}, "something was made beside it"
        assert not world.mark.exists(), "a program was run"
        assert not any(path.lstat().st_size > LARGEST for path in at.glob("out/*")), "a giant was copied"
    except BaseException as error:
        error.add_note(f"seed {seed}: {name}, {', '.join(strike.__name__ for strike in strikes)}{', late' * late}")
        raise
    finally:
        forget()
        remove(at)


def attempt(name: str, act) -> None:
    """Success or one sentence, and an output that a terminal shows as it is."""
    out, err = Console(), Console("backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), bounds(MEMORY):
        try:
            act()
            outcomes[name, "read"] += 1
        except REFUSED as error:
            outcomes[name, "refused"] += 1
            assert str(error).isprintable() and len(str(error)) < 4100
        except OSError:  # of a run that is under way: it is told of, or tried again
            if not name.endswith("in use"):
                raise
            outcomes[name, "refused"] += 1
        except SystemExit as end:
            outcomes[name, "refused"] += 1
            assert end.code == 1
    for said in (out.said(), err.said()):
        assert all(c.isprintable() or c in "\n\t" for c in said), f"a terminal obeys {said!r}"
        assert "\n12:00:00 FORGED" not in said


@contextlib.contextmanager
def whom(nobody: bool):
    """Modes mean nothing to root."""
    if nobody:
        os.setegid(NOBODY), os.seteuid(NOBODY)
    try:
        yield
    finally:
        if nobody:
            os.seteuid(0), os.setegid(0)


def given_away(at: Path, home: Path) -> dict:
    subprocess.run(["chown", "-hR", f"{NOBODY}:{NOBODY}", at], check=True)
    return hostile.state_of(home)


def forget() -> None:
    """What a process keeps of one folder."""
    for handler in log.handlers:
        handler.close()
    log.handlers = []
    for held in run_folder.held.values():
        os.close(held)
    holder.held.clear(), run_folder.held.clear(), beneath.roots.clear(), opened.cache_clear()


def remove(at: Path) -> None:
    try:
        shutil.rmtree(at)
    except (RecursionError, OSError):
        subprocess.run(["rm", "-rf", at], check=True)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_sound_folder_is_read(world, tmp_path, name):
    folder = tmp_path / "stranger" / name
    folder.mkdir(parents=True)
    SUBJECTS[name].make(folder, world)
    try:
        for act in SUBJECTS[name].acts(folder, world):
            act()
        shutil.rmtree(folder)
        folder.mkdir()
        SUBJECTS[name].make(folder, world)
        for act in SUBJECTS[name].later(folder, world):
            act()
    finally:
        forget()


def test_a_hostile_folder_is_one_sentence_or_is_read_and_nothing_outside_is_touched(world):
    for seed in range(FEW):
        one_input(seed, world)


@pytest.mark.soak
def test_ten_thousand_hostile_folders(world):
    outcomes.clear()
    before = hostile.state_of(world.folder)
    for seed in range(FEW, FEW + MANY):
        one_input(seed, world)
    print(", ".join(f"{name}: {number} {what}" for (name, what), number in sorted(outcomes.items())))
    assert hostile.state_of(world.folder) == before
