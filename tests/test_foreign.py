"""What comes with a model, a tokenizer or a corpus is data: it is not run, and it leads nowhere."""

import contextlib
import json
import os
import shutil
import stat
import sys
from pathlib import Path

import hostile
import pytest
from foreign import AUTO_MAP, plant
from plain import make_world
from tiny import make_run

from ted_scale import run_folder
from ted_scale.base import beneath, durable, sealed
from ted_scale.base.errors import UserError
from ted_scale.base.paths import own_folder
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints import holder, life, strangers
from ted_scale.commands.train_tokenizer import train, write_folder
from ted_scale.config.data import Streaming
from ted_scale.corpora import corpus, output, remote
from ted_scale.corpora.tokenizer import load_tokenizer
from ted_scale.metrics.console import log, open_log
from ted_scale.models.fingerprint import fingerprint
from ted_scale.models.inspection import inspect
from ted_scale.models.model_folder import TOKENIZER_FILES, copy_files
from ted_scale.models.vocabulary import read_vocabulary
from ted_scale.plan import describe, make_plan
from ted_scale.ranks import stacks
from ted_scale.storage import transfers
from ted_scale.storage.objects import Object


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


# A run's folder from a stranger: what is written stays in it


@pytest.fixture
def home(tmp_path):
    home = hostile.victim(tmp_path / "home")
    before = hostile.state_of(home)
    yield home
    assert hostile.state_of(home) == before


@pytest.fixture
def gift(tmp_path, home, monkeypatch):
    """Its lock is given back at the end, its root is guarded and its log is open until then."""
    for name in ("handlers", "propagate"):
        monkeypatch.setattr(log, name, getattr(log, name))
    monkeypatch.setattr(run_folder, "held", {})
    monkeypatch.setattr(holder, "held", {})
    monkeypatch.setattr(beneath, "roots", set())
    folder = tmp_path / "runs" / "gift"
    (folder / "checkpoints").mkdir(parents=True)
    yield folder
    for held in run_folder.held.values():
        os.close(held)


def claim(folder: Path) -> None:
    """What rank 0 does with a run's folder before it looks for a checkpoint."""
    beneath.keep_inside(folder)
    run_folder.take(folder, folder / "checkpoints" / ".shared_0")
    open_log(folder, True)
    files.clear_unfinished(folder)


def refused(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"^{folder / name} must be ") as caught:
        claim(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", hostile.NO_FILES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", strangers.FILES)
def test_a_run_folder_with_something_else_where_a_file_is_written_is_refused(gift, home, name, kind):
    kind(gift / name, home)
    refused(gift, name)


@pytest.mark.parametrize("kind", [*hostile.LINKS, hostile.pipe, hostile.plain_file], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", [*strangers.FOLDERS, "checkpoints/step_00000004"])
def test_a_run_folder_with_something_else_where_a_folder_is_written_is_refused(gift, home, name, kind):
    if name == "checkpoints":
        (gift / name).rmdir()
    kind(gift / name, home)
    refused(gift, name) if "step" not in name or kind in hostile.LINKS else claim(gift)


@pytest.mark.parametrize("name", strangers.APPENDED)
def test_a_file_that_a_run_appends_to_has_one_name(gift, home, name):
    hostile.second_name(gift / name, home)
    refused(gift, name)


def test_a_lock_with_a_second_name_is_locked_and_not_written_to(gift, home):
    hostile.second_name(gift / ".lock", home)
    claim(gift)


@pytest.mark.parametrize("kind", hostile.LINKS, ids=lambda kind: kind.__name__)
def test_a_link_with_the_name_of_an_unfinished_checkpoint_goes_and_what_it_leads_to_stays(gift, home, kind):
    names = [
        gift / "checkpoints" / f"step_0000000{n}{end}" for n, end in enumerate((".part", ".old.part", ".gone.part"))
    ]
    for name in names:
        kind(name, home)
    claim(gift)
    assert not any(map(os.path.lexists, names))


def test_a_start_up_file_behind_log_txt_gets_no_line(gift, home):
    """A log quotes what stands in progress.json: a shell would run it."""
    (gift / "log.txt").symlink_to(home / ".bashrc")
    refused(gift, "log.txt")
    with pytest.raises(UserError, match=r"log\.txt must be a plain file, because a run writes there, but is a link"):
        open_log(gift, True)


def test_w_and_b_s_own_links_stay_and_no_link_leads_out_of_its_folder(gift, home):
    inner = gift / "wandb" / "run-20260101_000000-abc" / "logs"
    inner.mkdir(parents=True)
    (inner / "debug.log").touch()
    (gift / "wandb" / "latest-run").symlink_to(inner.parent.name)
    (gift / "wandb" / "debug.log").symlink_to(inner / "debug.log")
    claim(gift)
    (inner / "debug-core.log").symlink_to(home / ".cache")  # W&B does this
    claim(gift)
    (gift / "wandb" / "latest-run").unlink()
    (gift / "wandb" / "latest-run").symlink_to(home)
    with pytest.raises(
        UserError, match=r"wandb/latest-run must be in its own folder, because a run writes there, but is a link"
    ):
        strangers.refuse(gift)


def test_a_folder_that_everybody_may_write_to_is_refused_unless_its_file_system_keeps_no_modes(gift, monkeypatch):
    (gift / "checkpoints").chmod(0o777)
    with pytest.raises(UserError, match=r"checkpoints must not be writable by everybody, but is.*`chmod -R o-w "):
        claim(gift)
    monkeypatch.setattr(run_folder, "make_new", lambda path, mode: beneath.make_new(path, 0o666))
    before = os.umask(0)
    try:
        claim(gift)
    finally:
        os.umask(before)


def test_the_root_of_a_run_s_folder_may_be_a_link(gift, tmp_path, home):
    (tmp_path / "runs" / "linked").symlink_to(gift)
    claim(tmp_path / "runs" / "linked")
    assert (gift / "log.txt").exists()


AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")


@AS_ROOT
@pytest.mark.parametrize("name", ["", *strangers.FOLDERS])
def test_a_folder_of_another_user_is_refused(gift, home, name):
    (gift / name).mkdir(exist_ok=True)
    os.chown(gift / name, 12345, 12345)
    with pytest.raises(
        UserError, match=rf"^{gift / name} must be yours, .* but belongs to 12345; copy .* `cp -r`, "
    ) as caught:
        claim(gift)
    assert "\n" not in str(caught.value)


@AS_ROOT
def test_a_folder_may_belong_to_root_or_to_who_owns_the_folder_above(gift, home, monkeypatch):
    """As in a container with a folder from outside, and with a server that makes somebody else of root."""
    for path in (gift.parent, gift):
        os.chown(path, 12345, 12345)
    make_new = run_folder.make_new
    monkeypatch.setattr(run_folder, "make_new", lambda path, mode: given_away(make_new(path, mode)))
    claim(gift)


def given_away(file: int) -> int:
    os.fchown(file, 65534, 65534)
    return file


def writes_of_a_run(run: Path) -> dict:
    """Each writes one thing into the run's folder, without a look at the folder as a whole."""
    part = run / "checkpoints" / "step_00000004.part"
    return {
        "checkpoints": lambda: durable.write_file(part / "manifest.json", [b"{}"]),
        "checkpoints/step_00000004.part": lambda: (beneath.make_folder(part), sealed.seal(part, {}, {})),
        "checkpoints/step_00000004.part/manifest.json": lambda: (beneath.make_folder(part), sealed.seal(part, {}, {})),
        "run.toml": lambda: durable.write_durably(run / "run.toml", "x"),
        "run.toml.part": lambda: durable.write_durably(run / "run.toml", "x"),
        "filters.safetensors": lambda: durable.link_or_copy(run / "sound", run / "filters.safetensors"),
        "life.json": lambda: life.write(run, life.Life(4, life.Spent())),
        "life.json.part": lambda: life.write(run, life.Life(4, life.Spent())),
        "checkpoints/step_00000004.fetched": lambda: download(part.with_suffix(".fetched") / "progress.json"),
        "checkpoints/step_00000004.fetched/progress.json": lambda: download(
            part.with_suffix(".fetched") / "progress.json"
        ),
        "metrics.jsonl": lambda: beneath.append_to(run / "metrics.jsonl").write("x"),
        "stacks": lambda: stacks.write_stacks(run / "stacks", 0, "x"),
        "stacks/rank_0.txt": lambda: stacks.write_stacks(run / "stacks", 0, "x"),
        "reports": lambda: (
            beneath.make_folder(run / "reports"),
            durable.write_durably(run / "reports" / "a.json", "x"),
        ),
    }


def download(target: Path) -> None:
    beneath.make_folder(target.parent)
    transfers.download(Object("s3://bucket/none", 0, "0"), target, "it must be read", 1.0)


@pytest.mark.parametrize("kind", [*hostile.LINKS, hostile.second_name, hostile.pipe], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", writes_of_a_run(Path()))
def test_no_write_passes_a_link_that_came_after_the_start(gift, home, name, kind):
    beneath.keep_inside(gift)
    (gift / "sound").write_text("sound")
    if name == "checkpoints":
        (gift / name).rmdir()
    (gift / name).parent.mkdir(exist_ok=True)
    kind(gift / name, home)
    with contextlib.suppress(OSError, UserError):
        writes_of_a_run(gift)[name]()


def test_a_removed_checkpoint_that_is_a_link_leaves_what_it_led_to(gift, home):
    beneath.keep_inside(gift)
    hostile.link_to_folder(gift / "checkpoints" / "step_00000004", home)
    durable.remove(gift / "checkpoints" / "step_00000004")
    assert not list((gift / "checkpoints").iterdir())


def test_a_model_behind_a_link_is_resolved_once_and_its_place_and_fingerprint_are_logged(world, tmp_path):
    (tmp_path / "latest").symlink_to(world / "student")
    found = inspect("student.path", str(tmp_path / "latest"))
    assert found.folder == (world / "student").resolve()
    before = fingerprint(found.folder)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to(world / "teacher")
    assert fingerprint(found.folder) == before != fingerprint(tmp_path / "latest")
    assert f"from {found.folder}, fingerprint {before}" in describe(make_plan(make_run(world), 1))
