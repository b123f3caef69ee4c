"""Sound folders of every kind that a stranger may give away, and everything that this project does with each.

`make` fills a folder; `acts` are calls on it, each of which either returns or raises one of the project's sentences.
"""

import dataclasses
import gzip
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import torch
from corpus import read_all, write_shard
from foreign import plant
from plain import VOCABULARY
from states import state_of

from ted_scale import run_folder
from ted_scale.base import durable, sealed
from ted_scale.base.beneath import make_folder
from ted_scale.base.errors import files_at
from ted_scale.checkpoints import copies, holder, life, owner, resume, strangers
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.filters_file import check_filters, write_filters
from ted_scale.checkpoints.progress import Progress, progress_as_bytes, read_progress
from ted_scale.checkpoints.state import KINDS, Part, key_of, rank_file
from ted_scale.commands import checkpoints, inspect_corpus, tokenize_corpus
from ted_scale.config import changes
from ted_scale.config.run_file import to_toml
from ted_scale.corpora.documents import find_files, read_documents
from ted_scale.corpora.tokenizer import digest, load_tokenizer
from ted_scale.distill import pairs
from ted_scale.metrics.metrics import Metrics
from ted_scale.metrics.rows import last_row
from ted_scale.models.fingerprint import fingerprint
from ted_scale.models.inspection import inspect
from ted_scale.models.model_folder import TOKENIZER_FILES, copy_files, new_folder
from ted_scale.models.vocabulary import read_vocabulary
from ted_scale.models.weights import load_weights
from ted_scale.plan import Plan
from ted_scale.ranks import stacks
from ted_scale.storage.tensor_file import as_bytes

Acts = list[Callable[[], object]]


class World(NamedTuple):
    """What is sound and the user's own: models, a tokenizer, a plan; and a mark that is there once a program was run."""

    folder: Path
    plan: Plan
    network: torch.nn.Module
    mark: Path


class Subject(NamedTuple):
    make: Callable[[Path, World], None]
    acts: Callable[[Path, World], Acts]
    begin: Callable[[Path, World], object] | None = None  # from here on, the folder is in use
    later: Callable[[Path, World], Acts] = lambda folder, world: []


# A run and its checkpoints


def make_run_folder(folder: Path, world: World) -> None:
    for step in (4, 6):
        save(folder, world, step)
    for part in ("step_00000008.part", "step_00000002.old.part", "step_00000009.fetched"):
        (folder / "checkpoints" / part).mkdir()
        (folder / "checkpoints" / part / rank_file(0)).write_bytes(b"half")
    for name in ("stacks", "reports", "wandb/run-20260101_000000-abc/logs"):
        (folder / name).mkdir(parents=True)
    (folder / "wandb" / "latest-run").symlink_to("run-20260101_000000-abc")
    (folder / "stacks" / "rank_0.txt").write_text("a stack\n")
    (folder / "reports" / "step_00000003.json").write_text("{}")
    (folder / "log.txt").write_text("12:00:00 step 4\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "tokens": n}) + "\n" for n in range(1, 8)))
    (folder / "run.toml").write_text(to_toml(world.plan.run))
    life.write(folder, life.Life(6, life.Spent(at=1.0), "it was killed"))
    owner.record(folder, owner.Owner("id", "start", "host", "user"))
    write_filters(files.filters_of(folder), {"student.0": torch.ones(2)}, world.plan.filters_identity())
    (folder / ".lock").touch()


def save(folder: Path, world: World, step: int) -> None:
    """A checkpoint, written as the saver does."""
    place = files.checkpoints_of(folder) / files.checkpoint_name(step)
    part = place.with_name(place.name + durable.PART)
    make_folder(part)
    values = {key_of(kind, "w"): torch.arange(6.0) for kind in KINDS}
    at = Progress(step, 8 * step, step, identity=world.plan.identity(), run=changes.as_written(world.plan.run))
    entries = {
        rank_file(0): durable.write_file(part / rank_file(0), as_bytes(values)),
        "progress.json": durable.write_file(part / "progress.json", [progress_as_bytes(at)]),
        files.FILTERS: durable.write_file(part / files.FILTERS, as_bytes({"student.0": torch.ones(2)})),
    }
    about = {"step": step, "forks": [], "ranks": 1, "updates": step, "validation": 1.0, "shapes": {"w": [2, 3]}}
    sealed.seal(part, entries, about)
    durable.publish(part)


def acts_of_a_run(folder: Path, world: World) -> Acts:
    run = world.plan.run.model_copy(update={"runs": str(folder.parent), "name": folder.name})
    tool = partial(partial, checkpoints.main)
    newest = partial(files.newest_checkpoint, folder)
    return [
        tool([str(folder), "list"]),
        tool([str(folder), "verify"]),
        tool([str(folder), "prune"]),
        lambda: life.read(folder),
        lambda: (found := newest()) and read_progress(found),
        lambda: check_filters(files.filters_of(folder), world.plan.filters_identity()),
        lambda: resume.describe(run, *resume.find(run, world.plan.identity()), 6, last_row(folder / "metrics.jsonl")),
        lambda: claim(folder, world),
        lambda: run_folder.where_it_stands(folder, 9, ""),
        lambda: (found := newest()) and fill(found),
        tool([str(folder), "prune", "--keep", "1", "--yes"]),
    ]


def claim(folder: Path, world: World) -> None:
    run = world.plan.run.model_copy(update={"runs": str(folder.parent), "name": folder.name})
    run_folder.claim_folder(dataclasses.replace(world.plan, run=run))


def fill(checkpoint: Path) -> None:
    state = state_of(checkpoint)
    state.fill([Part("fp32", name, 0, torch.empty(6)) for name in state.shapes])


def acts_of_a_run_that_has_begun(folder: Path, world: World) -> Acts:
    """Its folder was sound at the start. What comes later must not lead out of it either."""
    run = world.plan.run.model_copy(update={"runs": str(folder.parent), "name": folder.name})
    settings = run.checkpoint.model_copy(update={"keep": 1})
    return [
        lambda: save(folder, world, 9),
        lambda: save(folder, world, 6),
        lambda: durable.remove(folder / "checkpoints" / "step_00000004"),
        lambda: files.prune(folder, settings),
        lambda: files.clear_unfinished(folder),
        lambda: copies.forget_fetched(folder / "checkpoints"),
        lambda: life.take_up(folder, 6, life.Spent()),
        lambda: holder.held and holder.renew(folder, holder.held[folder]),
        lambda: owner.record(folder, owner.Owner("id", "start", "host", "user")),
        lambda: write_rows(run),
        lambda: stacks.write_stacks(folder / "stacks", 0, "stack"),
        lambda: (
            make_folder(folder / "reports"),
            durable.write_durably(folder / "reports" / "step_00000003.json", "{}"),
        ),
        lambda: write_filters(folder / "filters_start.safetensors", {"student.0": torch.ones(2)}, {}),
        lambda: strangers.refuse(folder),
        lambda: holder.leave(folder),
    ]


def write_rows(run) -> None:
    metrics = Metrics(run, writes=True, total_steps=9, step=6, device=torch.device("cpu"), wandb_run=None)
    try:
        metrics.write(7, 7, {"loss/total": 1.0})
        metrics.go_back(Progress(4, 4, 4))
        metrics.write_last_words("the end")
    finally:
        metrics.close_file()


# A corpus, and texts


def make_corpus(folder: Path, world: World) -> None:
    documents = [[1 + (3 * d + i) % 100 for i in range(30 + d)] for d in range(12)]
    for name in ("a-00001", "a-00002", "b"):
        write_shard(folder / name, documents, sidecar={"max_token_id": 101, "tokens": sum(map(len, documents))})
    (folder / "texts").mkdir()
    (folder / "texts" / "t.jsonl").write_text('{"text": "some text about tokens"}\n' * 20)
    shutil.copytree(world.folder / "begun", folder, dirs_exist_ok=True)


def begun_output(folder: Path, world: World) -> None:
    """A tokenization that was killed after its first shard."""
    text = folder.parent / "begun.jsonl"
    text.write_text('{"text": "some text about tokens"}\n' * 20)
    tokenize(folder / "new", text, world, publishes=False)


def tokenize(out: Path, text: Path, world: World, *, publishes: bool = True) -> None:
    words = ["--tokenizer", world.folder / "tokenizer", "--out", out, "--workers", 1, "--shard-tokens", 60, text]
    if publishes:
        return tokenize_corpus.main(list(map(str, words)))
    publish = tokenize_corpus.output.publish
    tokenize_corpus.output.publish = lambda out, manifest: None
    try:
        tokenize_corpus.main(list(map(str, words)))
    finally:
        tokenize_corpus.output.publish = publish


def acts_of_a_corpus(folder: Path, world: World) -> Acts:
    inspected = partial(partial, inspect_corpus.main)
    tokenizer = ["--tokenizer", str(world.folder / "tokenizer")]
    return [
        lambda: read_all(folder, VOCABULARY),
        lambda: read_all(folder / "a", VOCABULARY),
        lambda: read_all(folder / "b", VOCABULARY),
        inspected([str(folder), *tokenizer]),
        inspected([str(folder / "b"), "--verify", "--documents", "0"]),
        inspected([str(folder), "--verify", "--documents", "0"]),
        lambda: tokenize(folder / "new", world.folder / "begun.jsonl", world),
    ]


def make_texts(folder: Path, world: World) -> None:
    lines = b"".join(json.dumps({"text": f"document {n}"}).encode() + b"\n" for n in range(20))
    (folder / "inner").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["document"] * 20}), folder / "b.parquet")
    for name in ("c.jsonl", "d.txt", "inner/e.jsonl", "f.json"):
        (folder / name).write_bytes(lines)
    (folder / "g.jsonl.gz").write_bytes(gzip.compress(lines))


def acts_of_texts(folder: Path, world: World) -> Acts:
    def read(**how) -> None:
        with files_at(folder):
            for _ in read_documents(find_files([str(folder)]), **how):
                pass

    return [read, partial(read, on_error=lambda error: None), partial(read, document_per="line")]


# A model, and a tokenizer


def make_model(folder: Path, world: World) -> None:
    shutil.copytree(world.folder / "student", folder, dirs_exist_ok=True)
    shutil.copytree(world.folder / "tokenizer", folder, dirs_exist_ok=True)
    (folder / pairs.CUT).write_text(json.dumps(pairs.cut_map(world.plan.teacher, [0, 1])))
    plant(folder, world.mark)


def acts_of_a_model(folder: Path, world: World) -> Acts:
    def look() -> None:
        anatomy = inspect("student.path", str(folder))
        fingerprint(anatomy.folder)
        pairs.read_cut(anatomy)

    return [look, lambda: load_weights(world.network, folder), *acts_of_a_tokenizer(folder, world)]


def make_tokenizer(folder: Path, world: World) -> None:
    shutil.copytree(world.folder / "tokenizer", folder, dirs_exist_ok=True)
    plant(folder, world.mark)


def acts_of_a_tokenizer(folder: Path, world: World) -> Acts:
    def use(path: Path) -> None:
        found = load_tokenizer(str(path))
        digest(found)
        found.decode(found.encode(["some text </s> about 𝄞 tokens"])[0])

    def copy() -> None:
        with new_folder(folder.parent.parent / "out", overwrite=False) as part:
            copy_files(folder, part, TOKENIZER_FILES)

    return [
        lambda: read_vocabulary(folder),
        partial(use, folder),
        partial(use, folder / "tokenizer.model"),
        copy,
    ]


SUBJECTS = {
    "run": Subject(make_run_folder, acts_of_a_run, claim, acts_of_a_run_that_has_begun),
    "corpus": Subject(make_corpus, acts_of_a_corpus),
    "texts": Subject(make_texts, acts_of_texts),
    "model": Subject(make_model, acts_of_a_model),
    "tokenizer": Subject(make_tokenizer, acts_of_a_tokenizer),
}
