"""One run owns the copies: another is refused, and a run that has lost its folder goes on when the lease has ended."""

import json
import shutil
import threading
from pathlib import Path

import pytest
from botocore.exceptions import ConnectionClosedError
from botocore.httpsession import URLLib3Session
from test_copies import copied, saver_of, write
from test_saver import Run, content, one_rank  # noqa: F401 - a fixture of this module, too

from ted_scale.base.errors import Gone, UserError
from ted_scale.checkpoints import copies, owner
from ted_scale.checkpoints import folder as files
from ted_scale.run_folder import resume_point
from ted_scale.storage.client import s3_client


@pytest.fixture
def lease(monkeypatch):
    """One that has ended when somebody asks."""
    monkeypatch.setattr(owner, "LEASE_S", 0.0)
    monkeypatch.setattr(owner, "RENEWAL_S", 0.2)


def folder_lost(run: Run) -> Run:
    """The same run on another disk."""
    other = Run(run.folder.parent / "other_disk" / run.name, keep=2, copy_to="s3://bucket/runs/")
    files.checkpoints_of(other.folder).mkdir(parents=True)
    return other


def started(run: Run, tmp_path: Path):
    files.checkpoints_of(run.folder).mkdir(parents=True, exist_ok=True)
    owner.claim(run)
    return saver_of(run, tmp_path)


def test_a_second_run_of_the_same_name_is_refused_and_removes_nothing(endpoint, run, tmp_path, lease):
    saver = started(run, tmp_path)
    for step in (4, 8):
        assert write(saver, step) is None
    other = folder_lost(run)
    shutil.copytree(files.checkpoints_of(run.folder), files.checkpoints_of(other.folder), dirs_exist_ok=True)
    with pytest.raises(
        UserError, match=r"must be of this run alone, but holds the copies of the run of .* on .*; give"
    ) as e:
        owner.claim(other)
    assert "\n" not in str(e.value)
    write(saver_of(other, tmp_path), 12)
    assert copied(endpoint, run).keys() == {"step_00000004", "step_00000008"}


def test_a_run_that_finds_its_owner_alive_does_not_start(endpoint, run, tmp_path, lease, monkeypatch):
    started(run, tmp_path)
    monkeypatch.setattr(owner, "LEASE_S", 20.0)
    alive = threading.Timer(0.3, owner.renew, [run])
    alive.start()
    with pytest.raises(Gone, match=r"must be of this run alone, but the run of .* is using it; wait for its end"):
        owner.claim(folder_lost(run))
    alive.join()


@pytest.mark.parametrize("leaves", [True, False], ids=["left", "killed"])
def test_a_run_without_its_folder_goes_on_when_the_owner_is_gone(
    endpoint, run, tmp_path, caplog, lease, leaves, monkeypatch
):
    monkeypatch.setattr(owner, "LEASE_S", 2.0)  # the store writes whole seconds
    assert write(started(run, tmp_path), 4) is None
    if leaves:
        owner.leave(run)
    other = folder_lost(run)
    saver = started(other, tmp_path)
    assert content(resume_point(other)[0]) == 4
    assert write(saver, 8) is None
    assert copied(endpoint, run).keys() == {"step_00000004", "step_00000008"}
    assert f"the copies in {copies.place_of(run)} were of the run of " in caplog.text
    assert ("waiting for up to" in caplog.text) != leaves


def test_an_owner_that_was_replaced_copies_and_removes_nothing_more_and_says_so(endpoint, run, tmp_path, caplog, lease):
    replaced = started(run, tmp_path)
    assert write(replaced, 4) is None
    assert write(started(folder_lost(run), tmp_path), 8) is None
    for step in (12, 16):
        assert write(replaced, step) is None
    assert copied(endpoint, run).keys() == {"step_00000004", "step_00000008"}
    assert "step_00000016 has no copy; the run goes on: checkpoint.copy_to" in caplog.text
    with pytest.raises(UserError, match=r"the run of .* has it now"):
        replaced.copier.copy_newest_or_fail()
    with pytest.raises(UserError, match="holds the copies of"):
        owner.claim(run)


def test_a_run_with_its_folder_starts_again_at_once_and_its_earlier_process_copies_no_more(endpoint, run, tmp_path):
    started(run, tmp_path)
    clone = folder_lost(run)
    shutil.copy(run.folder / owner.OWNER, clone.folder)
    owner.claim(clone)
    owner.renew(clone)
    with pytest.raises(UserError, match="has it now"):
        owner.renew(run)


def test_copies_without_an_owner_are_adopted(endpoint, run, tmp_path, caplog):
    caplog.set_level("INFO")
    assert write(started(run, tmp_path), 4) is None
    bucket, key = owner.url_of(run).removeprefix("s3://").split("/", 1)
    endpoint.client().delete_object(Bucket=bucket, Key=key)
    (run.folder / owner.OWNER).unlink()
    owner.claim(run)
    assert "had no owner; this run has it now" in caplog.text
    assert owner.parsed(owner.look(run)) == owner.recorded(run.folder)


def test_an_exit_in_the_middle_of_a_claim_is_no_obstacle(endpoint, run, tmp_path, lease, monkeypatch):
    """Of a run that has checkpoints already, and of one that takes over."""
    other = folder_lost(run)
    for mine in (run, other):
        (mine.folder).mkdir(parents=True, exist_ok=True)
        if mine is run:
            (files.checkpoints_of(run.folder) / "step_00000004").mkdir(parents=True)
        for place in ("put", "record"):
            with monkeypatch.context() as patch, pytest.raises(InterruptedError):
                patch.setattr(owner, place, interrupt)
                owner.claim(mine)
        owner.claim(mine)
        owner.renew(mine)


def interrupt(*_):
    raise InterruptedError


def test_the_first_of_two_that_claim_at_once_has_the_place(endpoint, run, tmp_path, lease, monkeypatch):
    first, second, put = run, folder_lost(run), owner.put
    run.folder.mkdir()

    def late(*arguments):
        monkeypatch.setattr(owner, "put", put)
        owner.claim(first)
        put(*arguments)

    monkeypatch.setattr(owner, "put", late)
    with pytest.raises(UserError, match="holds the copies of"):
        owner.claim(second)
    owner.renew(first)


@pytest.mark.parametrize("knows", [True, False])
def test_a_lost_answer_to_a_renewal_is_no_other_owner(endpoint, run, tmp_path, knows, monkeypatch):
    """Also in a store that does not know conditions."""
    started(run, tmp_path)
    sent = []

    def twice(request, event_name, **_):
        if not knows:
            del request.headers["If-Match"]
        sent.append(1)
        if len(sent) == 1:
            URLLib3Session().send(request)
            raise ConnectionClosedError(endpoint_url=request.url)

    s3_client().meta.events.register("before-send.s3.PutObject", twice)
    try:
        owner.renew(run)
    finally:
        s3_client.cache_clear()
    assert len(sent) == 2
    assert owner.parsed(owner.look(run)).renewals == 1


@pytest.mark.parametrize("text", ["", "[]", '{"id": 1}', json.dumps({"id": "x" * 20000})])
def test_a_record_that_is_none_is_another_run_s(endpoint, run, tmp_path, lease, text):
    started(run, tmp_path)
    (run.folder / owner.OWNER).write_text(text)
    (files.checkpoints_of(run.folder) / "step_00000004").mkdir()
    with pytest.raises(UserError, match=r"or remove s3://.*owner\.json if nobody needs that run any more"):
        owner.claim(run)


def test_a_lease_outlives_a_refusal_that_passes(endpoint, run, tmp_path, lease, monkeypatch, caplog):
    """Its thread ended for good, and a run without its folder could take the place of one that lives."""
    started(run, tmp_path)
    renew, asked = owner.renew, threading.Semaphore(0)

    def refused(run):
        asked.release()
        if len(refusals) < 2:
            refusals.append(1)
            raise UserError("owner.json must be readable, but is not: AccessDenied")
        renew(run)
        if asked._value > 3:
            raise SystemExit

    refusals: list = []
    monkeypatch.setattr(owner, "RENEWAL_S", 0.01)
    monkeypatch.setattr(owner, "renew", refused)
    thread = threading.Thread(target=owner.keep, args=(run,), daemon=True)
    thread.start()
    for _ in range(4):
        assert asked.acquire(timeout=20)
    assert caplog.text.count("was not renewed, and is tried again") == 1
    monkeypatch.setattr(owner, "renew", lambda run: (_ for _ in ()).throw(owner.Taken("another has it")))
    thread.join(20)
    assert not thread.is_alive() and "nothing is copied any more: another has it" in caplog.text
