"""Whole examples in rows: none is cut or lost, little is padding, and a row is a function of its position."""

import errno
import itertools
from functools import partial

import chats
import numpy
import pytest
from corpus import counting_documents, data_section, write_shard

from ted_scale.base.errors import UserError
from ted_scale.commands import tokenize_corpus
from ted_scale.corpora.local import File
from ted_scale.data import blend, packs
from ted_scale.data.stream import batch, open_stream
from ted_scale.kernels.tokens import IGNORED

VOCABULARY = 1 << 16
SHORT = [3, 8, 5, 1, 2, 7, 4, 4, 6, 8, 2, 3]


def section(path, seq_len=8, **more):
    return data_section(str(path), seq_len=seq_len, attention="document", packing="examples", **more)


def rows(stream, count=None, start=0):
    count = count or next(iter(stream.packs.values())).counts.packs
    return [batch(stream, [start + position]) for position in range(count)]


def documents_in(row):
    """The tokens of each document of a row, without padding."""
    borders = row.packing.borders.tolist()
    found = [row.tokens_BT[0, a:b].tolist() for a, b in itertools.pairwise(borders)]
    return [document for document in found if any(document)]


def lognormal(documents, seed=0):
    return numpy.random.default_rng(seed).lognormal(numpy.log(300), 0.8, documents).astype(int).clip(2)


def test_at_most_3_percent_of_rows_is_padding():
    lengths = numpy.minimum(lognormal(20_000), 2048)
    found = packs.best_fit(lengths, 2048)
    filled = numpy.bincount(found, weights=lengths)
    assert filled.max() <= 2048
    assert 1 - filled.sum() / (2048 * len(filled)) <= 0.03


@pytest.mark.parametrize("looked_at", [16, packs.LOOKED_AT])
def test_an_epoch_has_every_example_whole_and_once(tmp_path, monkeypatch, looked_at):
    monkeypatch.setattr(packs, "LOOKED_AT", looked_at)
    documents = counting_documents(SHORT, first=1)
    stream = open_stream(section(write_shard(tmp_path / "c", documents)), 1, VOCABULARY)
    for epoch in (0, 1):
        count = stream.packs["c"].counts.packs
        found = [d for row in rows(stream, start=epoch * count) for d in documents_in(row)]
        assert sorted(found) == sorted(d for d in documents if len(d) > 1)  # one token alone has no label


def test_a_label_is_the_next_token_of_the_same_example_and_padding_has_none(tmp_path):
    stream = open_stream(section(write_shard(tmp_path / "c", counting_documents(SHORT, first=1))), 1, VOCABULARY)
    padded = 0
    for row in rows(stream):
        begins = (row.packing.positions_BT[0] == 0).tolist()
        tokens, labels = row.tokens_BT[0].tolist(), row.labels_BT[0].tolist()
        for i, label in enumerate(labels):
            last = i + 1 == len(tokens) or begins[i + 1] or not tokens[i]
            assert label == (IGNORED if last else tokens[i] + 1)
        padded += tokens.count(0)
    assert padded


def test_longer_examples_are_cut_into_rows_or_left_out_and_are_named(tmp_path):
    documents = counting_documents([5, 20, 3, 9], first=1)
    path = write_shard(tmp_path / "c", documents)
    cut = open_stream(section(path), 1, VOCABULARY)
    found = sorted(d for row in rows(cut) for d in documents_in(row))
    assert [t for d in found for t in d] == [t for d in documents for t in d][
        :-1
    ]  # the last piece of one token teaches nothing
    said, look = str(cut.packs["c"]), f"of {path} (ted-scale inspect {path} --document"
    assert f"2 longer ones are cut, the first is document 1 {look} 1); 1 pieces without a target" in said
    assert said.endswith(f"are left out, the first begins in document 3 {look} 3)")
    kept = open_stream(section(path, longer="leave_out"), 1, VOCABULARY)
    assert sorted(d for row in rows(kept) for d in documents_in(row)) == [documents[0], documents[2]]
    assert "2 longer ones are left out" in str(kept.packs["c"])


def test_epochs_are_shuffled_apart(tmp_path):
    lengths = numpy.random.default_rng(0).integers(2, 9, 60).tolist()
    stream = open_stream(section(write_shard(tmp_path / "c", counting_documents(lengths, first=1))), 1, VOCABULARY)
    count = stream.packs["c"].counts.packs
    found = [row.tokens_BT[0].tolist() for row in rows(stream, 2 * count)]
    assert sorted(found[:count]) == sorted(found[count:]) and found[:count] != found[count:]


def test_packs_are_made_once_and_others_for_another_seq_len_text_or_format(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "c", counting_documents(SHORT, first=1))
    made, make = [], packs.make
    monkeypatch.setattr(packs, "make", lambda *rest: made.append(rest) or make(*rest))
    first = open_stream(section(path), 1, VOCABULARY)
    again = open_stream(section(path), 1, VOCABULARY)
    assert len(made) == 1 and first.packs == again.packs
    open_stream(section(path, seq_len=10), 1, VOCABULARY)
    assert len(made) == 2
    write_shard(tmp_path / "c", counting_documents(SHORT[::-1], first=1))
    open_stream(section(path), 1, VOCABULARY)
    assert len(made) == 3
    monkeypatch.setattr(packs, "MAGIC", b"TEDPACKS0")
    open_stream(section(path), 1, VOCABULARY)
    assert len(made) == 4


def test_other_packs_are_other_text_to_a_run_that_resumes(tmp_path):
    path = write_shard(tmp_path / "c", counting_documents(SHORT * 9, first=1))
    before = open_stream(section(path), 1, VOCABULARY).interval
    after = open_stream(section(path, longer="leave_out"), 1, VOCABULARY, before, 5).interval
    assert "holds other text to train on" in " ".join(blend.changes(before, after))
    assert open_stream(section(path), 1, VOCABULARY, before, 5).interval is before


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-4], lambda b: b"", *(partial(flipped, at=at) for at in (0, 9, 96, 97, 150, -5))]
)
def test_damaged_packs_are_refused_and_made_again_once_they_are_deleted(tmp_path, damage):
    path = write_shard(tmp_path / "c", counting_documents(SHORT, first=1))
    stream = open_stream(section(path), 1, VOCABULARY)
    file = next(tmp_path.glob("c.packs-8-*"))
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    packs.opened.cache_clear()
    with pytest.raises(UserError, match="but is damaged; delete it to have it made again"):
        open_stream(section(path), 1, VOCABULARY)
    file.unlink()
    assert open_stream(section(path), 1, VOCABULARY).packs == stream.packs
    assert file.read_bytes() == whole


def test_a_run_that_opens_packs_anew_checks_them_anew(tmp_path):
    stream = open_stream(section(write_shard(tmp_path / "c", counting_documents(SHORT, first=1))), 1, VOCABULARY)
    file = next(tmp_path.glob("c.packs-8-*"))
    file.write_bytes(flipped(file.read_bytes(), -5))
    packs.opened.cache_clear()
    with pytest.raises(UserError, match="delete it"):
        rows(stream)


def test_packs_whose_handle_is_stale_are_opened_anew(tmp_path, monkeypatch):
    stream = open_stream(section(write_shard(tmp_path / "c", counting_documents(SHORT, first=1))), 1, VOCABULARY)
    expected = [row.tokens_BT.tolist() for row in rows(stream)]
    pack, read = stream.packs["c"], File.read
    stale = packs.opened(pack.path, pack.digest)

    def reads(file, start, count):
        if file is stale:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(file, start, count)

    monkeypatch.setattr(File, "read", reads)
    assert [row.tokens_BT.tolist() for row in rows(stream)] == expected


def test_examples_without_a_target_in_reach_are_left_out_and_all_of_them_is_a_mistake(tmp_path):
    folder = chats.make_tokenizer(tmp_path / "tok")
    records = [{"messages": [{"role": "user", "content": "a cat " * 40}, {"role": "assistant", "content": "no"}]}]
    source = chats.write_records(tmp_path / "a.jsonl", records)
    tokenize_corpus.main(["--tokenizer", str(folder), "--out", str(tmp_path / "c"), "--targets", "last", str(source)])
    with pytest.raises(UserError, match="must hold an example with a target"):
        open_stream(section(tmp_path / "c", seq_len=16, longer="leave_out"), 1, VOCABULARY)
    stream = open_stream(section(tmp_path / "c", seq_len=16), 1, VOCABULARY)
    (row,) = rows(stream)
    assert (row.weights_BT > 0).any() and stream.packs["c"].counts.untaught > 1


def test_what_is_held_out_is_packed_too(tmp_path):
    lengths = numpy.random.default_rng(0).integers(2, 9, 60).tolist()
    documents = counting_documents(lengths, first=1)
    data = section(write_shard(tmp_path / "c", documents), validation=0.2)
    stream = open_stream(data, 1, VOCABULARY)
    held = stream.held_out["c"]
    found = [d for position in range(held.count) for d in documents_in(batch(held, [position]))]
    kept = [d for row in rows(stream) for d in documents_in(row)]
    assert sorted(kept + found) == documents
    assert max(map(max, kept)) < min(map(min, found))


def test_examples_need_documents_apart():
    with pytest.raises(ValueError, match=r"attention must be 'document' where data\.packing is 'examples'"):
        data_section("c", packing="examples")
