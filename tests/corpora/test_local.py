"""Shards on local disk are read as the files that were listed, or not at all."""

import os
import shutil
from pathlib import Path

import pytest
from corpus import counting_documents, data_section, write_shard

from ted_scale.base.errors import UserError
from ted_scale.data.stream import open_stream
from ted_scale.feed import describe
from ted_scale.plan import reading_of

VOCAB = 60000
STAYS = r"must stay as it is while a run reads it, but it "


def test_a_shard_that_lost_its_end_is_one_sentence(tmp_path):
    """A map of it would end the process with SIGBUS."""
    stream = open_stream(data_section(write_shard(tmp_path / "web", counting_documents([30] * 20))), 1, VOCAB)
    stream.sample(0)
    os.truncate(tmp_path / "web.bin", 8)
    with pytest.raises(
        UserError, match=rf"web\.bin {STAYS}has 8 bytes, and when the run listed it, it had 1200; start the same"
    ):
        stream.sample(1)


def as_of_yesterday(prefix, token):
    """A shard of one token. File systems may give all files of some milliseconds one time."""
    write_shard(prefix, [[token] * 100], sidecar={"tokens": 100, "max_token_id": token})
    for ending in (".bin", ".idx", ".json"):
        os.utime(f"{prefix}{ending}", (86400.0, 86400.0))


def replace(prefix, token):
    """As a tokenizer writes it anew: other files under the same names, of the same size."""
    write_shard(prefix.with_name("new"), [[token] * 100])
    for ending in (".bin", ".idx"):
        prefix.with_name("new" + ending).rename(f"{prefix}{ending}")


def write_over(prefix, token):
    """As a copy writes it anew: the same files, also for those who have them open."""
    write_shard(prefix, [[token] * 100])


@pytest.mark.parametrize("change", [replace, write_over])
def test_a_shard_that_changed_is_refused_in_one_sentence_and_never_mixed_with_what_it_was(tmp_path, change):
    """Both were read in silence: the old tokens of shards that were open, the new ones of all others."""
    for number in (1, 2):
        as_of_yesterday(tmp_path / f"web-{number:05d}", number)
    part = open_stream(data_section(str(tmp_path / "web"), seq_len=16), 1, VOCAB).parts["web"]
    assert set(part.read(0, 20, VOCAB)[0]) == {1}
    for number in (1, 2):
        change(tmp_path / f"web-{number:05d}", 7)
    with pytest.raises(
        UserError, match=rf"{tmp_path}/web-00002\.idx {STAYS}was written at 20.* UTC, and when the run listed"
    ):
        part.read(120, 20, VOCAB)
    if change is replace:  # its files are open, and whole
        assert set(part.read(20, 20, VOCAB)[0]) == {1}
    else:
        with pytest.raises(UserError, match=rf"web-00001\.idx {STAYS}was written at"):
            part.read(20, 20, VOCAB)
    again = open_stream(data_section(str(tmp_path / "web"), seq_len=16), 1, VOCAB).parts["web"]
    assert set(again.read(0, 150, VOCAB)[0]) == {7}


def test_a_restored_shard_and_a_file_system_that_numbers_its_files_anew_end_no_run(tmp_path):
    as_of_yesterday(tmp_path / "web", 1)
    part = open_stream(data_section(str(tmp_path / "web"), seq_len=16), 1, VOCAB).parts["web"]
    for ending in (".bin", ".idx"):
        shutil.copy2(tmp_path / f"web{ending}", tmp_path / "new")  # keeps size and time
        (tmp_path / "new").rename(tmp_path / f"web{ending}")
    assert set(part.read(0, 20, VOCAB)[0]) == {1}


def link_files(folder, blobs):
    folder.mkdir(exist_ok=True)
    for file in blobs.iterdir():
        (folder / file.name).unlink(missing_ok=True)
        (folder / file.name).symlink_to(Path("..", blobs.name, file.name))


def link_folder(folder, blobs):
    folder.unlink(missing_ok=True)
    folder.symlink_to(blobs)


@pytest.mark.parametrize("link", [link_files, link_folder])
def test_links_are_followed_when_a_corpus_is_listed_and_the_log_says_where_they_lead(tmp_path, link):
    """Caches of a hub hold links to files that are named by their content. Text came from both sides of a link that was moved."""
    for name, token in (("old", 1), ("new", 7)):
        as_of_yesterday(tmp_path / name / "web", token)
    link(tmp_path / "corpus", tmp_path / "old")
    part = open_stream(data_section(str(tmp_path / "corpus"), seq_len=16), 1, VOCAB).parts["corpus"]
    link(tmp_path / "corpus", tmp_path / "new")
    assert set(part.read(0, 20, VOCAB)[0]) == {1} and part.shards[0].recorded.max_token_id == 1
    (line,) = describe({"web": reading_of(part, None, {})})
    assert line.endswith(f"100 tokens to train on, 0 held out, digest {part.listed}, in {tmp_path / 'old'}")
    plain = open_stream(data_section(str(tmp_path / "new"), seq_len=16), 1, VOCAB).parts["new"]
    assert describe({"web": reading_of(plain, None, {})})[0].endswith(f"digest {plain.listed}")
