"""What comes with a model, a tokenizer or a corpus is data: it is not run, and it leads nowhere."""

import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
from foreign import AUTO_MAP, plant
from plain import make_world
from tiny import make_run

from ted_scale.base.errors import UserError
from ted_scale.base.paths import own_folder
from ted_scale.config.data import Streaming
from ted_scale.corpora import corpus, output, remote
from ted_scale.corpora.tokenizer import load_tokenizer
from ted_scale.models.fingerprint import fingerprint
from ted_scale.models.inspection import inspect
from ted_scale.models.model_folder import TOKENIZER_FILES, copy_files
from ted_scale.models.vocabulary import read_vocabulary
from ted_scale.plan import describe, make_plan
from ted_scale.storage.objects import Object
from tools.train_tokenizer import train, write_folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    root = make_world(tmp_path_factory.mktemp("sound"))
    (root / "tokenizer").mkdir()
    texts = [f"some text number {n}\n" for n in range(100)]
    write_folder(train(iter(texts), 300), root / "tokenizer")
    return root


@pytest.fixture
def world(sound, tmp_path):
    """A copy with programs in every folder, and a terminal at which the question whether to run them is answered with yes."""
    root = shutil.copytree(sound, tmp_path / "world")
    for folder in ("student", "teacher", "tokenizer"):
        plant(root / folder, tmp_path / "mark")
    yield root
    assert not (tmp_path / "mark").exists()
    assert not any("foreign_" in name or name.startswith("modeling_foreign") for name in sys.modules)


@pytest.fixture(autouse=True)
def somebody_says_yes(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_model_of_a_family_that_transformers_has_is_read_without_the_code_that_it_brings(world):
    edit(world / "student" / "config.json", auto_map=AUTO_MAP)
    assert inspect("student.path", str(world / "student")).family == "gpt2"


def test_a_model_that_needs_its_own_code_is_refused_in_one_sentence(world):
    edit(world / "student" / "config.json", auto_map=AUTO_MAP, model_type="foreign")
    with pytest.raises(UserError, match=r"code that comes with a model is not run; choose a model") as caught:
        inspect("student.path", str(world / "student"))
    assert str(caught.value).startswith("student.path must hold the config.json of a known model family, but ")
    assert "trust_remote_code" not in str(caught.value)


@pytest.mark.parametrize("name", ["ForeignTokenizer", None], ids=["its own class", "no class"])
def test_a_tokenizer_that_needs_its_own_code_is_refused_or_read_without_it(world, name):
    folder = world / "tokenizer"
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": AUTO_MAP}))
    edit(folder / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class=name)
    with pytest.raises(UserError, match=r"it needs code of its own, which is not run; save it as a tokenizer.json"):
        load_tokenizer(str(folder))
    with pytest.raises(UserError, match=f"^{folder} must hold a readable tokenizer, but .* code of its own"):
        read_vocabulary(folder)


@pytest.mark.parametrize("name", ["AutoModel", "AutoTokenizer", "AutoModelForCausalLM", "pipeline", "AutoProcessor"])
def test_a_tokenizer_s_class_is_a_tokenizer_s(world, name):
    """transformers would call from_pretrained of whatever of its own has this name, without a word on foreign code."""
    folder = world / "tokenizer"
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": AUTO_MAP}))
    edit(folder / "tokenizer_config.json", tokenizer_class=name)
    with pytest.raises(UserError, match=rf"tokenizer_config.json says tokenizer_class {name}, which is no tokenizer"):
        load_tokenizer(str(folder))


def test_weights_are_safetensors_and_nothing_else(world):
    (world / "student" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"must hold \*.safetensors weights, but .* has none"):
        inspect("student.path", str(world / "student"))


def test_kernels_of_the_hub_are_not_fetched_unless_asked_for():
    assert os.environ["USE_HUB_KERNELS"] == "NO"


def test_what_is_copied_into_an_export_brings_no_code_and_no_file_from_elsewhere(world, tmp_path):
    (tmp_path / "out").mkdir()
    copy_files(world / "tokenizer", tmp_path / "out", TOKENIZER_FILES)
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in copied and not any(name.endswith((".py", ".bin", ".pkl")) for name in copied)
    (tmp_path / "id_rsa").write_text("a key")
    (world / "tokenizer" / "vocab.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(UserError, match=r"vocab.txt must be in its own folder to be copied, but is a link out of it"):
        copy_files(world / "tokenizer", tmp_path / "out", TOKENIZER_FILES)
    assert not (tmp_path / "out" / "vocab.txt").exists()


def test_the_hub_s_snapshots_are_links_and_are_copied(tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "c0ffee", repository / "blobs"
    for folder in (snapshot, blobs, tmp_path / "out"):
        folder.mkdir(parents=True)
    (blobs / "1").write_text("{}")
    (snapshot / "vocab.json").symlink_to("../../blobs/1")
    assert copy_files(snapshot, tmp_path / "out", TOKENIZER_FILES) == 1


@pytest.mark.parametrize("name", ["../corpus", "/etc/passwd", "..", "a/../../b", "a\\b", "a\0b"])
def test_a_manifest_names_shards_of_its_own_folder(world, name):
    shutil.copytree(world, world / "inner", ignore=shutil.ignore_patterns("inner", "student", "teacher", "tokenizer"))
    totals = {"documents": 20, "tokens": 990, "empty": 0, "skipped": 0, "sources": []}
    manifest = output.sealed({**totals, "shards": [{"name": name, "sidecar_sha256": "0"}]})
    path = output.manifest_path(world / "inner" / "corpus")
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"corpus.manifest.json must name files of its own folder, but names "):
        corpus.read_corpus(str(world / "inner"), Streaming())
    (folder := output.unfinished(world / "inner" / "corpus")).mkdir()
    path.rename(folder / "manifest.json")
    with pytest.raises(UserError, match=r"manifest.json must name files of its own folder"):
        output.publish(world / "inner" / "corpus", {})
    assert (world / "corpus.idx").exists()


@pytest.mark.parametrize(
    "key", ["corpora/a/../../../etc/x.bin", "corpora/a/b.bin", "corpora/a\0.idx", "corpora/a\n.json", "other/a.bin"]
)
def test_a_listing_names_objects_of_its_own_folder(monkeypatch, key):
    pages = [Object(f"s3://bucket/{key}", 10, "v")]
    monkeypatch.setattr("ted_scale.storage.objects._s3_pages", lambda *_: pages)
    with pytest.raises(
        UserError, match=r"the listing of s3://bucket/corpora must name files of its own folder, but names "
    ):
        remote.in_folder("s3://bucket/corpora", "", 1.0)


def test_the_default_folder_of_chunks_is_this_user_s_alone(tmp_path, monkeypatch):
    folder = tmp_path / "ted_scale-1"
    own_folder(folder, "data.stream.folder")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    own_folder(folder, "data.stream.folder")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(UserError, match=r"data.stream.folder must be set where its default is another user's"):
        own_folder(folder, "data.stream.folder")
    monkeypatch.undo()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UserError, match=r"data.stream.folder must be set"):
        own_folder(tmp_path / "link", "data.stream.folder")


def test_a_checkpoint_s_wandb_id_makes_no_path(world):
    from ted_scale.checkpoints.progress import PROGRESS, Progress, progress_as_bytes, read_progress

    run = make_run(world)
    run.folder.mkdir(parents=True)
    (run.folder / PROGRESS).write_bytes(progress_as_bytes(Progress(wandb_id="../../x")))
    with pytest.raises(UserError, match=r"progress.json must be a progress file, but is not: wandb_id: "):
        read_progress(run.folder)


def test_a_model_behind_a_link_is_resolved_once_and_its_place_and_fingerprint_are_logged(world, tmp_path):
    (tmp_path / "latest").symlink_to(world / "student")
    found = inspect("student.path", str(tmp_path / "latest"))
    assert found.folder == (world / "student").resolve()
    before = fingerprint(found.folder)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to(world / "teacher")
    assert fingerprint(found.folder) == before != fingerprint(tmp_path / "latest")
    assert f"from {found.folder}, fingerprint {before}" in describe(make_plan(make_run(world), 1))
