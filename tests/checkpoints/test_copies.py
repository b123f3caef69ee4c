"""Copies of checkpoints in object storage: every kept checkpoint has one, and a run without its folder resumes from it."""

import errno
import shutil
from pathlib import Path

import pytest
import test_saver
import torch.distributed as dist
from test_saver import content, one_rank  # noqa: F401 - a fixture of this module, too

from ted_scale.base import sealed
from ted_scale.base.errors import SENTENCES, UserError
from ted_scale.checkpoints import copies, owner
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.progress import PROGRESS
from ted_scale.checkpoints.resume import newest_progress
from ted_scale.checkpoints.saver import Saver
from ted_scale.run_folder import resume_point
from ted_scale.storage import objects as object_store
from ted_scale.storage import transfers


def saver_of(run, filters: Path) -> Saver:
    return test_saver.saver_of(run, filters / "filters")


def write(saver: Saver, step: int) -> str | None:
    """Write a checkpoint and wait for its copy."""
    failure = test_saver.write(saver, step)
    saver.copier.finish()
    return failure


def copied(endpoint, run) -> dict[str, set[str]]:
    """Object names by checkpoint."""
    found = {}
    prefix = copies.place_of(run).removeprefix("s3://bucket/") + "/"
    for entry in endpoint.client().list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", ()):
        step, name = entry["Key"].removeprefix(prefix).split("/")
        found.setdefault(step, set()).add(name)
    return found


def test_every_kept_checkpoint_has_a_copy(endpoint, run, tmp_path):
    saver = saver_of(run, tmp_path)
    endpoint.faults(fail=0.2)
    for step in (4, 8, 12):
        assert write(saver, step) is None
    endpoint.faults()
    names = {"rank_00000.safetensors", PROGRESS, files.FILTERS, sealed.MANIFEST}
    assert copied(endpoint, run) == {"step_00000008": names, "step_00000012": names}


def test_a_run_without_its_folder_resumes_from_the_newest_whole_copy(endpoint, run, tmp_path):
    saver = saver_of(run, tmp_path)
    for step in (4, 8):
        assert write(saver, step) is None
    shutil.rmtree(run.folder)
    files.checkpoints_of(run.folder).mkdir(parents=True)
    newest, line = resume_point(run)
    assert line == 0
    assert newest == files.checkpoints_of(run.folder) / "step_00000008"
    assert content(newest) == 8

    shutil.rmtree(run.folder)
    files.checkpoints_of(run.folder).mkdir(parents=True)
    key = f"{copies.place_of(run).removeprefix('s3://bucket/')}/step_00000008/rank_00000.safetensors"
    endpoint.client().put_object(Bucket="bucket", Key=key, Body=b"of another world")
    assert content(resume_point(run)[0]) == 4


def test_a_damaged_checkpoint_here_is_replaced_by_its_copy(endpoint, run, tmp_path, caplog):
    saver = saver_of(run, tmp_path)
    for step in (4, 8):
        assert write(saver, step) is None
    rank_0 = files.checkpoints_of(run.folder) / "step_00000008" / "rank_00000.safetensors"
    data = bytearray(rank_0.read_bytes())
    data[-1] ^= 1
    rank_0.write_bytes(data)
    assert content(resume_point(run)[0]) == 8
    assert "step_00000008 is damaged and skipped: rank_00000.safetensors is not as it was written" in caplog.text


def test_a_copy_that_lacks_an_object_is_damaged_and_the_one_before_is_used(endpoint, run, tmp_path, caplog):
    saver = saver_of(run, tmp_path)
    for step in (4, 8):
        assert write(saver, step) is None
    shutil.rmtree(run.folder)
    files.checkpoints_of(run.folder).mkdir(parents=True)
    key = f"{copies.place_of(run).removeprefix('s3://bucket/')}/step_00000008/rank_00000.safetensors"
    endpoint.client().delete_object(Bucket="bucket", Key=key)
    assert newest_progress(run)[1].step == 4
    newest, line = resume_point(run)
    assert (content(newest), line) == (4, 1)
    assert "step_00000008 is damaged and skipped: its copy: rank_00000.safetensors is missing" in caplog.text


def test_a_copy_that_lacks_an_object_does_not_count_among_those_that_are_kept(endpoint, run, tmp_path):
    saver = saver_of(run, tmp_path)
    for step in (4, 8):
        assert write(saver, step) is None
    key = f"{copies.place_of(run).removeprefix('s3://bucket/')}/step_00000008/rank_00000.safetensors"
    endpoint.client().delete_object(Bucket="bucket", Key=key)
    assert write(saver, 12) is None
    assert copied(endpoint, run).keys() == {"step_00000004", "step_00000008", "step_00000012"}


@pytest.mark.parametrize("left", [b"of another object" * 10, None], ids=["other", "half"])
def test_a_start_goes_on_with_what_an_earlier_one_has_downloaded(endpoint, run, tmp_path, monkeypatch, left):
    saver = saver_of(run, tmp_path)
    assert write(saver, 4) is None
    name = "rank_00000.safetensors"
    whole = (files.checkpoints_of(run.folder) / "step_00000004" / name).read_bytes()
    shutil.rmtree(run.folder)
    began = files.checkpoints_of(run.folder) / f"step_00000004{copies.FETCHED}"
    began.mkdir(parents=True)
    (began / name).write_bytes(left or whole[:500])
    stale = began.with_name(f"step_00000003{copies.FETCHED}")
    stale.mkdir()
    starts, read = [], object_store.read

    def noted(thing, start, *arguments):
        starts.extend([start] if thing.url.endswith(name) else [])
        return read(thing, start, *arguments)

    monkeypatch.setattr(transfers, "PART", 100)
    monkeypatch.setattr(object_store, "read", noted)
    files.clear_unfinished(run.folder)  # as a start does
    assert content(resume_point(run)[0]) == 4
    assert left or sorted(starts) == [500, 600, 700, 800]
    assert not began.exists() and not stale.exists()


def test_a_whole_copy_removes_the_uploads_that_an_exit_has_left(endpoint, run, tmp_path):
    client, prefix = endpoint.client(), copies.place_of(run).removeprefix("s3://bucket/")
    client.create_multipart_upload(Bucket="bucket", Key=f"{prefix}/step_00000002/rank_00000.safetensors")
    assert write(saver_of(run, tmp_path), 4) is None
    assert not client.list_multipart_uploads(Bucket="bucket", Prefix=prefix).get("Uploads")


def test_a_copy_without_a_manifest_is_not_used(endpoint, run, tmp_path):
    saver = saver_of(run, tmp_path)
    for step in (4, 8):
        assert write(saver, step) is None
    shutil.rmtree(run.folder)
    files.checkpoints_of(run.folder).mkdir(parents=True)
    key = f"{copies.place_of(run).removeprefix('s3://bucket/')}/step_00000008/{sealed.MANIFEST}"
    endpoint.client().delete_object(Bucket="bucket", Key=key)
    assert content(resume_point(run)[0]) == 4


def test_if_all_copies_are_damaged_the_run_does_not_start_again_and_names_them(endpoint, run, tmp_path, caplog):
    saver, client = saver_of(run, tmp_path), endpoint.client()
    for step in (4, 8):
        assert write(saver, step) is None
        key = f"{copies.place_of(run).removeprefix('s3://bucket/')}/step_{step:08d}/{sealed.MANIFEST}"
        manifest = client.get_object(Bucket="bucket", Key=key)["Body"].read()
        client.put_object(Bucket="bucket", Key=key, Body=manifest[:-9])
    shutil.rmtree(run.folder)
    files.checkpoints_of(run.folder).mkdir(parents=True)
    for resumes in (resume_point, newest_progress):
        with pytest.raises(
            UserError, match=r"must hold a whole checkpoint, but none of 2 is .*its copy: its manifest\.json"
        ):
            resumes(run)
    assert len([said for said in caplog.messages if "is damaged and skipped: its copy: " in said]) == 2


def test_a_copy_that_was_never_finished_is_removed_later(endpoint, run, tmp_path):
    saver = saver_of(run, tmp_path)
    for step in (4, 8):
        assert write(saver, step) is None
    prefix = copies.place_of(run).removeprefix("s3://bucket/")
    endpoint.client().delete_object(Bucket="bucket", Key=f"{prefix}/step_00000004/{sealed.MANIFEST}")
    assert write(saver, 12) is None
    assert copied(endpoint, run).keys() == {"step_00000008", "step_00000012"}


def test_a_failed_copy_is_reported_and_the_run_and_the_checkpoint_stay(run, tmp_path, caplog):
    saver = saver_of(run, tmp_path)
    saver.copier.place = "s3://no-such-bucket/runs/x/checkpoints"
    assert write(saver, 4) is None
    assert saver.copier.failed == 1
    assert "step_00000004 has no copy; the run goes on: " in caplog.text and "its bucket does not exist" in caplog.text
    assert content(files.newest_checkpoint(run.folder)) == 4


def test_a_bucket_that_does_not_exist_is_one_sentence_before_anything_starts(run):
    run.checkpoint = run.checkpoint.model_copy(update={"copy_to": "s3://no-such-bucket"})
    with pytest.raises(UserError, match="its bucket does not exist") as caught:
        resume_point(run)
    assert "\n" not in str(caught.value)
    assert dist.is_initialized()


def test_a_run_does_not_start_again_because_of_an_outage_or_a_full_disk(endpoint, run, tmp_path, monkeypatch):
    """Its folder is gone, and the bucket cannot be read at the moment."""
    assert write(saver_of(run, tmp_path), 4) is None
    shutil.rmtree(run.folder)
    files.checkpoints_of(run.folder).mkdir(parents=True)
    monkeypatch.setattr(object_store, "COPYING_S", 0.2)
    monkeypatch.setattr(object_store, "OPENING_S", 0.2)
    endpoint.faults(fail=1.0)
    with pytest.raises(SENTENCES):
        resume_point(run)
    endpoint.faults()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="on a disk with room, but is not"):
        patch.setattr(transfers, "download", full)
        resume_point(run)
    assert content(resume_point(run)[0]) == 4


def test_a_run_that_skips_a_newer_checkpoint_goes_on_in_a_new_line(run, tmp_path):
    saver = saver_of(run, tmp_path)
    for step in (4, 8):
        assert write(saver, step) is None
    saver.copier.place = ""
    assert write(saver, 12) is None
    rank_0 = files.checkpoints_of(run.folder) / "step_00000012" / "rank_00000.safetensors"
    rank_0.write_bytes(bytes(rank_0.stat().st_size))
    newest, line = resume_point(run)
    assert (newest.name, line) == ("step_00000008", 1)


def test_old_copies_of_an_earlier_start_are_removed_too(endpoint, run, tmp_path):
    for step in (4, 8):
        assert write(saver_of(run, tmp_path), step) is None
    owner.leave(run)
    shutil.rmtree(run.folder)
    run.folder.mkdir()
    owner.claim(run)
    saver = saver_of(run, tmp_path)
    for step in (12, 16):
        assert write(saver, step) is None
    assert copied(endpoint, run).keys() == {"step_00000012", "step_00000016"}
