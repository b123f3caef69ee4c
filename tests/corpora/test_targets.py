"""Conversations and completions: which tokens count, that they arrive in a batch, and what is refused."""

import json
import re
from datetime import date

import chats
import numpy
import pytest
from corpus import data_section
from marked import documents_of, targets_as_text, tokenize
from places import ROOT

from ted_scale.base.errors import UserError
from ted_scale.commands import tokenize_corpus
from ted_scale.corpora.examples import describe, open_reader
from ted_scale.corpora.local import expand
from ted_scale.corpora.reader import Shard
from ted_scale.corpora.shards import document_borders, read_index, sidecar_of
from ted_scale.data.stream import batch, open_stream
from ted_scale.kernels.tokens import IGNORED

HARNESS = ROOT / "tests" / "harness"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chats.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_an_answer_counts_up_to_its_end_of_turn_and_nothing_else_does(tmp_path, folder):
    turns = [
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", "the cat"),
        ("user", "no"),
        ("assistant", "42 \U0001f600"),
    ]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    source = chats.write_records(tmp_path / "a.jsonl", [record])
    start = "<|im_start|>"
    begin = f"{start}system\nbe brief<|im_end|>\n{start}user\nhi<|im_end|>\n{start}assistant\n"
    rest = f"{start}user\nno<|im_end|>\n{start}assistant\n[42 \U0001f600<|im_end|>\n]"
    (every,) = documents_of(tokenize(folder, tmp_path / "every", source, "--targets", "assistant"))
    assert targets_as_text(folder, every) == f"{begin}[the cat<|im_end|>\n]{rest}"
    (last,) = documents_of(tokenize(folder, tmp_path / "last", source, "--targets", "last"))
    assert targets_as_text(folder, last) == f"{begin}the cat<|im_end|>\n{rest}"


def test_a_template_that_marks_answers_is_masked_as_transformers_does(tmp_path, folder):
    from transformers import AutoTokenizer

    model, records = AutoTokenizer.from_pretrained(folder), chats.conversations(40)
    (tmp_path / "marked.jinja").write_text(chats.MARKED)
    source = chats.write_records(tmp_path / "a.jsonl", records)
    out = tokenize(
        folder, tmp_path / "c", source, "--targets", "assistant", "--chat-template", tmp_path / "marked.jinja"
    )
    for record, (ids, marks) in zip(records, documents_of(out), strict=True):
        options = {"chat_template": chats.MARKED, "return_dict": True, "return_assistant_tokens_mask": True}
        theirs = model.apply_chat_template(record["messages"], tokenize=True, **options)
        assert (ids, [int(mark) for mark in marks]) == (theirs["input_ids"], theirs["assistant_masks"])


def test_ten_conversations_have_the_targets_that_trl_gives_them(tmp_path, folder):
    """trl_targets.json has what TRL 1.16's collator made of these with assistant_only_loss, decoded, its labels in brackets."""
    (tmp_path / "marked.jinja").write_text(chats.MARKED)
    source = chats.write_records(tmp_path / "a.jsonl", chats.conversations(10))
    out = tokenize(
        folder, tmp_path / "c", source, "--targets", "assistant", "--chat-template", tmp_path / "marked.jinja"
    )
    theirs = json.loads((HARNESS / "trl_targets.json").read_text(encoding="utf-8"))
    assert [targets_as_text(folder, document) for document in documents_of(out)] == theirs


def test_completions_count_with_the_end_token_as_trl_counts_them(tmp_path, folder):
    from transformers import AutoTokenizer

    model, records = AutoTokenizer.from_pretrained(folder), chats.pairs(60)
    out = tokenize(
        folder, tmp_path / "c", chats.write_records(tmp_path / "a.jsonl", records), "--targets", "completion"
    )
    straddled = 0
    for record, (ids, marks) in zip(records, documents_of(out), strict=True):
        prompt = model(record["prompt"])["input_ids"]
        assert ids == model(record["prompt"] + record["completion"] + model.eos_token)["input_ids"]
        alike = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
        straddled += alike < len(prompt)
        assert marks == [False] * alike + [True] * (len(ids) - alike)
    assert straddled  # a token across the border counts, as in TRL


@pytest.mark.long  # starts processes
def test_parquet_and_workers_make_the_same_shards(tmp_path, folder, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    records = chats.conversations(30)
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    source = chats.write_records(tmp_path / "a.jsonl", records)
    one = documents_of(tokenize(folder, tmp_path / "one", source, "--targets", "assistant", "--workers", 1))
    monkeypatch.setattr(tokenize_corpus, "BATCH_DOCUMENTS", 4)
    assert documents_of(tokenize(folder, tmp_path / "p", tmp_path / "a.parquet", "--targets", "assistant")) == one
    assert documents_of(tokenize(folder, tmp_path / "two", source, "--targets", "assistant", "--workers", 2)) == one


def test_megatron_reads_the_tokens_and_the_targets(tmp_path, folder):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    source = chats.write_records(tmp_path / "a.jsonl", chats.conversations(20))
    out = tokenize(folder, tmp_path / "c", source, "--targets", "assistant")
    dataset, ours = IndexedDataset(str(out), multimodal=True), documents_of(out)
    borders = dataset.document_indices.tolist()
    for begin, end, (ids, marks) in zip(borders[:-1], borders[1:], ours, strict=True):
        runs = [dataset[sequence] for sequence in range(begin, end)]
        assert numpy.concatenate([tokens for tokens, _ in runs]).tolist() == ids
        assert [bool(mode) for tokens, mode in runs for _ in tokens] == marks
    sidecar = sidecar_of(read_index(out).files)
    assert sidecar["targets"] == sum(sum(marks) for _, marks in ours)


def test_any_stretch_of_a_shard_has_the_targets_of_its_tokens(tmp_path, folder):
    source = chats.write_records(tmp_path / "a.jsonl", chats.conversations(400))
    out = tokenize(folder, tmp_path / "c", source, "--targets", "assistant")
    index = read_index(out)
    whole = numpy.concatenate([marks for _, marks in documents_of(out)])
    assert index.sequences > 1200  # more than one block of the index
    rng = numpy.random.default_rng(0)
    for low in [0, index.tokens - 1, *rng.integers(0, index.tokens, 60).tolist()]:
        high = min(index.tokens, low + int(rng.integers(1, 3000)))
        assert (Shard(index).targets(low, high) == whole[low:high]).all()


def test_a_batch_counts_targets_alone_and_a_blend_mixes_masked_and_plain_corpora(tmp_path, folder):
    source = chats.write_records(tmp_path / "a.jsonl", chats.conversations(60))
    masked = tokenize(folder, tmp_path / "masked", source, "--targets", "assistant")
    plain = tokenize(folder, tmp_path / "plain", chats.write_records(tmp_path / "t.jsonl", [{"text": "a cat " * 900}]))
    stream = open_stream(data_section(str(masked), str(plain), seq_len=64), 1, 400)
    tokens = numpy.concatenate([ids for ids, _ in documents_of(masked)])
    marks = numpy.concatenate([marks for _, marks in documents_of(masked)])
    ends = set((document_borders(read_index(masked))[1:] - 1).tolist())
    kinds = set()
    for position in range(40):
        which, cursor = stream.interval.at(position)
        one = batch(stream, [position])
        counted = (one.weights_BT[0] > 0).tolist()
        kinds.add(which)
        if which == 1:
            assert counted == (one.labels_BT[0] != IGNORED).tolist()
            continue
        ((first, length),) = stream.interval.pieces(which, cursor)
        assert one.tokens_BT[0].tolist() == tokens[first : first + length].tolist()
        assert counted == [bool(marks[i + 1]) and i not in ends for i in range(first, first + length)]
    assert kinds == {0, 1}


REFUSED = {
    "user": ({"messages": [{"role": "user", "content": "hi"}]}, "ends with a turn of the assistant"),
    "empty": ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}]}, "message 2"),
    "no role": ({"messages": [{"content": "hi"}, {"role": "assistant", "content": "yes"}]}, "role in every message"),
    "content": (
        {"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "yes"}]},
        'text, a list or null as the "content"',
    ),
    "no list": ({"messages": "hi"}, "list of messages"),
    "special": (
        {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "yes"}]},
        "spells out <|im_end|>",
    ),
    "surrogate": (
        {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a"}]},
        "surrogate",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_record_that_teaches_nothing_is_refused_with_its_line_or_left_out(tmp_path, folder, case):
    record, words = REFUSED[case]
    good = chats.conversations(3)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*good, record, *good]))
    with pytest.raises(UserError, match=words) as refusal:
        tokenize(folder, tmp_path / "c", path, "--targets", "assistant")
    assert f"{path}:4 must" in str(refusal.value)
    out = tokenize(folder, tmp_path / "c", path, "--targets", "assistant", "--on-error", "skip")
    assert len(documents_of(out)) == 6 and json.loads((tmp_path / "c.manifest.json").read_text())["skipped"] == 1


def test_a_sentencepiece_model_is_refused_with_what_targets_need():
    with pytest.raises(UserError, match=r"must be a fast Hugging Face tokenizer .* is a sentencepiece model"):
        open_reader("a.model", "assistant", None, False)


def test_a_template_that_asks_for_the_day_gets_the_one_of_the_job(folder):
    reader = open_reader(str(folder), "assistant", None, False)
    template = reader.template._replace(text="{{ strftime_now('%d %b %Y') }}", day=date(2020, 2, 3))
    assert template.render([], None) == "03 Feb 2020"
    assert describe(reader._replace(template=template))["day"] == "2020-02-03"


def test_where_all_records_are_refused_the_first_reason_is_said(tmp_path, folder):
    records = [{"messages": "first"}, {"messages": [{"role": "user", "content": "hi"}]}]
    path = chats.write_records(tmp_path / "a.jsonl", records)
    with pytest.raises(
        UserError, match=r"2 skipped\); check the files and --targets; .*a\.jsonl:1 must have a list of mes"
    ):
        tokenize(folder, tmp_path / "c", path, "--targets", "assistant", "--on-error", "skip")


def test_templates_that_cannot_be_masked_exactly_are_refused_with_the_way_out(tmp_path, folder):
    turns = [
        ("system", "be"),
        ("user", "hi"),
        ("assistant", "<think>hm</think>yes"),
        ("user", "no"),
        ("assistant", "so"),
    ]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    source = chats.write_records(tmp_path / "a.jsonl", [record])
    forgets, drops = tmp_path / "forgets.jinja", tmp_path / "drops.jinja"
    forgets.write_text(chats.FORGETS)
    drops.write_text(chats.DROPS)
    with pytest.raises(UserError, match=r"a\.jsonl:1 .*turn 3 .*--targets last.*\{% generation %\}"):
        tokenize(folder, tmp_path / "c", source, "--targets", "assistant", "--chat-template", forgets)
    (document,) = documents_of(
        tokenize(folder, tmp_path / "c", source, "--targets", "last", "--chat-template", forgets)
    )
    assert targets_as_text(folder, document).endswith("assistant\n[so<|im_end|>\n]")
    with pytest.raises(UserError, match=r"a\.jsonl:1 .*drops or changes turn 1 \(system\)"):
        tokenize(folder, tmp_path / "d", source, "--targets", "assistant", "--chat-template", drops)


def test_an_index_that_lost_its_targets_is_refused(tmp_path, folder):
    source = chats.write_records(tmp_path / "a.jsonl", chats.conversations(3000))
    out = tokenize(folder, tmp_path / "c", source, "--targets", "assistant")
    idx = out.with_suffix(".idx")
    whole = idx.read_bytes()
    assert len(whole) > 1 << 16  # else its digest is looked at first
    sequences = read_index(out).sequences
    idx.write_bytes(whole[:-sequences])
    with pytest.raises(UserError, match="whether its tokens count"):
        read_index(out)
    (tmp_path / "c.json").unlink()
    idx.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"or {len(whole):,} with one for each of its .* but has {len(whole) - 1:,};"):
        read_index(out)


def test_inspect_shows_a_document_whole_and_where_it_came_from(tmp_path, folder, capsys):
    """The line, unless one was left out before the end of the shard."""
    from ted_scale.commands import inspect_corpus

    records = chats.conversations(40)
    answer = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the cat " * 100 + "so"}]
    }
    records[30:31] = [answer]
    first = chats.write_records(tmp_path / "a.jsonl", records)
    second = chats.write_records(tmp_path / "b.jsonl", [{"messages": []}, *records])
    options = ("--targets", "assistant", "--on-error", "skip", "--shard-tokens", 900)
    out = tokenize(folder, tmp_path / "c", first, second, *options)
    shards = [read_index(prefix) for prefix in expand(out)]
    assert len(shards) > 2
    inspect_corpus.main([str(out), "--document", "30"])
    said = capsys.readouterr().out
    assert f"tokens, from {first}:31\n" in said and "the cat so<|im_end|>" in said and " …" not in said
    inspect_corpus.main([shards[0].prefix, "--document", "1"])
    assert f"document 1 of {shards[0].prefix}" in (said := capsys.readouterr().out) and f"from {first}:2\n" in said
    inspect_corpus.main([str(out), "--document", "40"])
    assert re.search(rf"from between {first}:\d+ and {second}:\d+\n", capsys.readouterr().out)
    with pytest.raises(UserError, match="--document must be below the 80 documents"):
        inspect_corpus.main([str(out), "--document", "80"])


def test_inspect_shows_targets_and_their_share_and_finds_other_ones(tmp_path, folder, capsys, monkeypatch):
    from ted_scale.commands import inspect_corpus

    record = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the cat\nso"}]}
    source = chats.write_records(tmp_path / "a.jsonl", [record])
    out = tokenize(folder, tmp_path / "c", source, "--targets", "assistant")
    ((ids, marks),) = documents_of(out)
    capsys.readouterr()
    inspect_corpus.main([str(out), "--verify"])
    said = capsys.readouterr().out
    assert f"{sum(marks)} tokens are targets, {sum(marks) / len(ids):.1%} of all" in said
    assert "    <|im_start|>assistant\n    [the cat\n    so<|im_end|>\n" in said
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    inspect_corpus.main([str(out)])
    assert "\x1b[32mthe cat" in capsys.readouterr().out
    sidecar = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps({**sidecar, "targets": sidecar["targets"] + 1}))
    with pytest.raises(SystemExit):
        inspect_corpus.main([str(out), "--verify"])
    assert "targets that its .json counts" in capsys.readouterr().err
