"""Whatever stands in a file that a run or a tool reads: success or one sentence. No other exception, no hang, no memory by
the gigabyte, and nothing that came as data is run.

A target makes a sound file, damages it and gives it to what reads it. A few hundred inputs here; ten thousand with
`pytest -m soak tests/test_fuzz.py`, and docs/benchmarks.md has what came of them. A new target is a function in TARGETS.
"""

import dataclasses
import gzip
import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import tomli_w
import torch
import zstandard
from bounded import bounds
from corpus import read_all, write_shard
from foreign import damaged_bytes, damaged_tree, json_text, plant
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain import VOCABULARY, make_world
from safetensors.torch import save_file
from states import state_of
from tiny import make_run, run_values

from ted_scale import feed, plan
from ted_scale.base import durable, sealed
from ted_scale.base.errors import UserError, files_at
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.filters_file import check_filters, filter_tensors, load_filters
from ted_scale.checkpoints.progress import Measured, Progress, read_progress
from ted_scale.checkpoints.state import KINDS, Part, key_of, rank_file
from ted_scale.commands import inspect_corpus, train_tokenizer
from ted_scale.config import changes
from ted_scale.config.data import Streaming
from ted_scale.config.ds_config import load_ds_config
from ted_scale.config.operation import Checkpoint
from ted_scale.config.run_file import load_run, to_toml
from ted_scale.corpora import output
from ted_scale.corpora.corpus import read_corpus
from ted_scale.corpora.documents import read_documents
from ted_scale.corpora.reader import opened
from ted_scale.corpora.shards import read_index
from ted_scale.corpora.tokenizer import digest, load_tokenizer
from ted_scale.data.stream import batch
from ted_scale.distill import pairs
from ted_scale.distill.filters import Filter
from ted_scale.metrics.rows import rows_at, trim_rows
from ted_scale.models import inspection
from ted_scale.models.inspection import inspect
from ted_scale.models.vocabulary import read_vocabulary
from ted_scale.models.weights import build_network, load_weights
from ted_scale.plan import describe, make_plan
from ted_scale.storage.tensor_file import as_bytes

FEW = 30
IDENTITY = {"pairs": [[0, 1], [1, 3]], "filters.width": 48, "filters.mlp": 0}
numbers = count()
outcomes: Counter = Counter()


class Place(NamedTuple):
    """A folder of this input's own, the world that all share, and what is there when a program was run."""

    folder: Path
    world: Path
    mark: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    root = tmp_path_factory.mktemp("fuzz")
    world = make_world(root / "world")
    (world / "tokenizer").mkdir()
    texts = [f"some text number {n} about {word}\n" * 3 for n in range(40) for word in ("weights", "tokens", "layers")]
    train_tokenizer.write_folder(train_tokenizer.train(iter(texts), 320), world / "tokenizer")
    return Place(root / "inputs", world, root / "mark")


def run_file(data, at: Place) -> Callable:
    """Run files and --set."""
    values = run_values(at.world, name="fuzz", wandb={"project": "p"})
    if data.draw(st.booleans()):
        values = data.draw(damaged_tree(values))
        text = "\n".join(f"{toml_key(k)} = {toml_of(v)}" for k, v in values.items()).encode("utf-8", "surrogatepass")
    else:
        sound = tomli_w.dumps(values).encode()
        text = data.draw(damaged_bytes(sound, at.mark))
    (at.folder / "run.toml").write_bytes(text)
    keys = st.sampled_from(
        ("train.lr", "train.steps", "loss.kl", "data.corpora", "name", "wandb.tags", "resume.allow", "x")
    )
    override = st.builds("{}={}".format, keys, st.text(max_size=12)) | st.text(max_size=12)
    overrides = [] if data.draw(st.integers(0, 3)) else [data.draw(override)]

    def read():
        run = load_run(at.folder / "run.toml", overrides)
        (at.folder / "again.toml").write_text(to_toml(run), encoding="utf-8")
        assert load_run(at.folder / "again.toml") == run
        describe(make_plan(run, 2))

    return read


def toml_key(key: str) -> str:
    return json.dumps(str(key), ensure_ascii=False)


def toml_of(value) -> str:
    """TOML of what JSON holds; there is no null."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_key(k)} = {toml_of(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml_of(v) for v in value) + "]"
    written = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return '"none"' if value is None else written.replace("NaN", "nan").replace("Infinity", "inf")


def ds_config(data, at: Place) -> Callable:
    tree = {"zero_optimization": {"stage": 3, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}}}
    (at.folder / "ds.json").write_bytes(text_of(data, tree, at))
    return lambda: load_ds_config(str(at.folder / "ds.json"))


def text_of(data, tree, at: Place) -> bytes:
    """JSON damaged as a tree or as text."""
    if data.draw(st.integers(0, 3)):
        return json_text(data.draw(damaged_tree(tree)))
    return data.draw(damaged_bytes(json_text(tree), at.mark))


def progress(data, at: Place) -> Callable:
    """progress.json, and the place in the data that it names."""
    run = make_run(at.world, method="kd", data={"corpora": [{"path": str(at.world / "corpus"), "validation": 0.1}]})
    (stage,) = plan.stages_of(run)
    _, stands, _ = feed.open_feed(run, stage, Progress(), VOCABULARY)
    adaptive = Measured(step=2, weights={"corpus": 1.0}, teacher={"corpus": 2.5}, text={"corpus": "text"})
    tree = {
        "step": 4, "tokens": 1024, "samples": 32, "blend": stands.blend, "adaptive": adaptive, "wandb_id": "abc",
        "identity": {**IDENTITY, "method": "ted", "filters.steps": 4}, "run": changes.as_written(run),
    }  # fmt: skip
    (at.folder / "progress.json").write_bytes(text_of(data, tree, at))
    other = data.draw(st.sampled_from(({}, {"filters.steps": 9}, {"filters.mlp": 4, "method": "kd"})))

    def read():
        found = read_progress(at.folder)
        ours, written = {**tree["identity"], **other}, changes.as_written(run)
        changes.changes(found.identity, ours, found.run, written, found.step)
        stream, _, _ = feed.open_feed(run, stage, found, VOCABULARY)
        batch(stream, [found.samples])
        changes.refuse_another_run(at.folder, found.identity, ours, ["method"], found.step)

    return read


def sealed_folder(data, at: Place) -> Callable:
    """A checkpoint whose manifest or state is damaged, or made by somebody else, digests and all."""
    folder = files.checkpoints_of(at.folder) / "step_00000004"
    folder.mkdir(parents=True)
    values = {key_of(kind, "w"): torch.arange(6.0) for kind in KINDS}
    state = b"".join(bytes(piece) for piece in as_bytes(values))
    forged = data.draw(st.sampled_from(("state", "manifest", "nothing")))
    state = data.draw(damaged_bytes(state, at.mark)) if forged == "state" else state
    entries = {rank_file(0): durable.write_file(folder / rank_file(0), [state])}
    sealed.seal(
        folder, entries, {"step": 4, "forks": [], "ranks": 1, "updates": 4, "validation": 1.0, "shapes": {"w": [2, 3]}}
    )
    outer = json.loads((folder / sealed.MANIFEST).read_text())
    if forged == "manifest":
        content = data.draw(damaged_tree(outer["content"]))
        with suppress(ValueError, TypeError):
            outer = {"content": content, "sha256": sealed.digest_of_content(content)}
        (folder / sealed.MANIFEST).write_bytes(json_text(outer))
    if forged == "nothing":
        (folder / sealed.MANIFEST).write_bytes(text_of(data, outer, at))

    def read():
        files.newest_checkpoint(at.folder)
        files.kept({s.path.name: s.manifest for s in files.published(at.folder)}, Checkpoint(keep_best=True))
        if files.check_digests(folder) is None:
            found = state_of(folder)
            found.fill([Part("fp32", name, 0, torch.empty(6)) for name in found.shapes])

    return read


def corpus_of(at: Place, **sidecar) -> Path:
    """A corpus of two documents to damage; its name is new, because headers are remembered by their files."""
    prefix = at.folder / f"c{next(numbers)}"
    documents = [[1 + (3 * d + i) % 100 for i in range(30 + d)] for d in range(12)]
    tokens = sum(map(len, documents))
    write_shard(prefix, documents, sidecar={"max_token_id": 101, "tokens": tokens, **sidecar})
    return prefix


def index_header(data, at: Place) -> Callable:
    """.idx: random bytes, counts that overflow, offsets out of order, cut off."""
    prefix = corpus_of(at)
    path = Path(f"{prefix}.idx")
    path.write_bytes(data.draw(damaged_bytes(path.read_bytes(), at.mark)))
    return lambda: read_all(prefix)


def tokens(data, at: Place) -> Callable:
    """.bin: any bytes are tokens, but not of every vocabulary."""
    prefix = corpus_of(at)
    path = Path(f"{prefix}.bin")
    path.write_bytes(data.draw(damaged_bytes(path.read_bytes(), at.mark)))
    return lambda: read_all(prefix)


def sidecar(data, at: Place) -> Callable:
    signed = {"tokenizer": "t", "tokenizer_digest": "0" * 64, "vocab_size": 128, "eod_id": 2, "documents": 12}
    prefix = corpus_of(at, **signed, read={"file": 0, "line": 1, "empty": 0, "skipped": 0})
    path = Path(f"{prefix}.json")
    path.write_bytes(text_of(data, json.loads(path.read_text()), at))

    def read():
        read_all(prefix)
        index = read_index(prefix)
        print(inspect_corpus.summary(str(prefix), [index], {}))
        inspect_corpus.damages([str(prefix)], [], None)

    return read


def manifest(data, at: Place) -> Callable:
    """The manifest of an output, its own digest made right again."""
    prefix = corpus_of(at)
    tree = {
        "tokenizer": "t", "sources": [{"path": "a", "bytes": 5, "modified_ns": 7}], "options": {}, "documents": 12,
        "tokens": read_index(prefix).tokens, "empty": 0, "skipped": 0,
        "shards": [{"name": prefix.name, "sidecar_sha256": "0" * 64}],
    }  # fmt: skip
    content = text_of(data, output.sealed(tree), at)
    with suppress(ValueError, AttributeError, RecursionError):
        content = json_text(output.sealed(json.loads(content)))
    staged = data.draw(st.booleans())
    path = output.manifest_path(prefix)
    if staged:
        output.unfinished(prefix).mkdir()
        path = output.unfinished(prefix) / "manifest.json"
    path.write_bytes(content)

    def read():
        if staged:
            with files_at(prefix):
                output.publish(prefix, output.staged_manifest(prefix))
            return
        indices = read_corpus(str(prefix.parent), Streaming())
        print(inspect_corpus.summary(str(prefix), indices, {str(prefix): output.read_manifest(path)}))
        inspect_corpus.check_manifest(str(prefix), [str(prefix)])

    return read


def job(data, at: Place) -> Callable:
    """What a killed tokenize_corpus left: its job and the sidecar of a finished shard."""
    out = at.folder / "out"
    folder = output.unfinished(out)
    folder.mkdir()
    now = {"tokenizer": "t", "options": {"text_key": "text"}, "sources": []}
    left = {
        "documents": 1,
        "tokens": 5,
        "max_token_id": 3,
        "bin_bytes": 10,
        "read": {"file": 0, "line": 1, "empty": 0, "skipped": 0},
    }
    texts = {"job.json": now, "00001.json.part": left}
    which = data.draw(st.sampled_from(sorted(texts)))
    for name, tree in texts.items():
        (folder / name).write_bytes(text_of(data, tree, at) if name == which else json_text(tree))
    return lambda: output.begin(out, now, overwrite=False)


def filters(data, at: Place) -> Callable:
    """The filters of another run."""
    sides = {"student": torch.nn.ModuleList([Filter(8, 8), Filter(8, 8)])}
    path = at.folder / "filters.safetensors"
    tensors = {name: p.detach() for name, p in filter_tensors(sides).items()}
    save_file(tensors, path, metadata={"identity": json.dumps(IDENTITY)})
    path.write_bytes(data.draw(damaged_bytes(path.read_bytes(), at.mark)))

    def read():
        check_filters(path, IDENTITY)
        load_filters(path, sides)

    return read


@cache
def network_of(folder: Path):
    return build_network(inspect("student.path", str(folder)), ds_config=None, dtype=torch.float32)


def weights(data, at: Place) -> Callable:
    """A model's safetensors."""
    content = (at.world / "student" / "model.safetensors").read_bytes()
    (at.folder / "model.safetensors").write_bytes(data.draw(damaged_bytes(content, at.mark)))
    return lambda: load_weights(network_of(at.world / "student"), at.folder)


def model_config(data, at: Place) -> Callable:
    """config.json of a folder that holds programs as well."""
    folder = shutil.copytree(at.world / data.draw(st.sampled_from(("student", "teacher"))), at.folder / "model")
    plant(folder, at.mark)
    path = folder / "config.json"
    path.write_bytes(text_of(data, json.loads(path.read_text()), at))
    return lambda: inspect("student.path", str(folder))


def cut(data, at: Place) -> Callable:
    """The map of a student that was cut."""
    student = network_shape(at.world / "student")
    tree = pairs.cut_map(network_shape(at.world / "teacher"), list(range(student.layers)))
    (at.folder / pairs.CUT).write_bytes(text_of(data, tree, at))
    return lambda: pairs.read_cut(dataclasses.replace(student, folder=at.folder))


@cache
def network_shape(folder: Path):
    return inspect("student.path", str(folder))


def tokenizer(data, at: Place) -> Callable:
    """The files of a tokenizer's folder, beside programs."""
    folder = shutil.copytree(at.world / "tokenizer", at.folder / "tokenizer")
    plant(folder, at.mark)
    name = data.draw(
        st.sampled_from(("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"))
    )
    path = folder / name
    if name == "tokenizer.model":
        path.write_bytes(data.draw(damaged_bytes(path.read_bytes(), at.mark)))
    else:
        path.write_bytes(text_of(data, json.loads(path.read_text()), at))

    def read():
        read_vocabulary(folder)
        found = load_tokenizer(str(path if name == "tokenizer.model" else folder))
        digest(found)
        found.decode(found.encode(["some text </s> about 𝄞 tokens"])[0])

    return read


def documents(data, at: Place) -> Callable:
    """Texts to tokenize, of every kind that is read."""
    lines = b"".join(json_text({"text": f"document {n}"}) + b"\n" for n in range(20))
    table = pyarrow.table({"text": [f"document {n}" for n in range(20)]})
    pyarrow.parquet.write_table(table, at.folder / "sound.parquet")
    sound = {
        "a.jsonl": lines, "a.txt": lines, "a.jsonl.gz": gzip.compress(lines), "a.jsonl.zst": zstandard.compress(lines),
        "a.parquet": (at.folder / "sound.parquet").read_bytes(),
    }  # fmt: skip
    name = data.draw(st.sampled_from(sorted(sound)))
    path = at.folder / name
    path.write_bytes(data.draw(damaged_bytes(sound[name], at.mark)))
    return lambda: [document.text for document in read_documents([path])]


def rows(data, at: Place) -> Callable:
    """metrics.jsonl, as a machine may have left it."""
    lines = "".join(json.dumps({"step": step, "tokens": 256 * step, "loss/total": 1.5}) + "\n" for step in range(1, 5))
    path = at.folder / "metrics.jsonl"
    path.write_bytes(data.draw(damaged_bytes(lines.encode(), at.mark)))

    def read():
        trim_rows(path, 3)
        rows_at(path, 3)

    return read


TARGETS = (run_file, ds_config, progress, sealed_folder, index_header, tokens, sidecar, manifest, job, filters, weights,
           model_config, cut, tokenizer, documents, rows)  # fmt: skip


def one_input(target, data, at: Place) -> None:
    at = at._replace(folder=at.folder / str(next(numbers)))
    at.folder.mkdir(parents=True)
    before = at.world.stat().st_mtime_ns
    read = target(data, at)
    try:
        with bounds():
            read()
        outcomes[target.__name__, "read"] += 1
    except UserError as error:
        outcomes[target.__name__, "refused"] += 1
        assert str(error).isprintable() and len(str(error)) < 4100
    finally:
        opened.cache_clear()
        shutil.rmtree(at.folder)
    assert not at.mark.exists() and at.world.stat().st_mtime_ns == before


def fuzz(target, at: Place, examples: int) -> None:
    @settings(
        max_examples=examples, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def run(data):
        one_input(target, data, at)

    run()


@pytest.fixture(autouse=True)
def plans_inspect_once(monkeypatch):
    """A run file's models are looked at once, for thousands of plans ask; and no hub is."""

    def out_of_reach(*_, **__):
        raise OSError("there is no network here")

    monkeypatch.setattr("ted_scale.storage.hub.fetched", out_of_reach)
    monkeypatch.setattr(plan, "inspect", cache(inspection.inspect))


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.__name__)
def test_a_damaged_file_is_one_sentence_or_is_read(target, place):
    fuzz(target, place, FEW)


@pytest.mark.soak
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.__name__)
def test_ten_thousand_damaged_files(target, place):
    outcomes.clear()
    fuzz(target, place, -(-10_000 // len(TARGETS)))
    print(f"{target.__name__}: " + ", ".join(f"{n} {what}" for (_, what), n in sorted(outcomes.items())))
    assert outcomes.total() >= 10_000 // len(TARGETS)
