"""Of what a tokenizer is trained, and what is said of inputs that it cannot read."""

import json

import pytest

from ted_scale.base.errors import UserError
from ted_scale.commands import task, train_tokenizer
from ted_scale.corpora.tokenizer import load_tokenizer

QUESTION, ANSWER = "Which colour has the sky of {}?", " It is ultramarine, day {}."
RECORDS = {
    "completion": lambda n: {"prompt": QUESTION.format(n), "completion": ANSWER.format(n)},
    "assistant": lambda n: {
        "messages": [
            {"role": "user", "content": QUESTION.format(n)},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER.format(n)}]},
        ]
    },
}


def written(path, record) -> str:
    path.write_text("".join(json.dumps(record(n)) + "\n" for n in range(200)))
    return str(path)


@pytest.mark.parametrize("targets", RECORDS)
def test_a_vocabulary_is_of_both_sides_of_pairs_and_conversations_and_not_of_their_keys(tmp_path, targets):
    rows = written(tmp_path / "rows.jsonl", RECORDS[targets])
    words = ["--vocab-size", "350", "--out", str(tmp_path / "tokenizer"), rows]
    train_tokenizer.main(["--targets", targets, *words])
    pieces = {piece.strip("\u2581,") for piece in load_tokenizer(str(tmp_path / "tokenizer")).pieces}
    assert {"colour", "ultramarine"} <= pieces
    assert not {"completion", "messages", "assistant"} & pieces


@pytest.mark.parametrize("targets", RECORDS)
def test_records_without_text_name_the_option_that_reads_them_and_none_that_the_command_lacks(tmp_path, targets):
    rows = written(tmp_path / "rows.jsonl", RECORDS[targets])
    with pytest.raises(UserError, match=f"which --targets {targets} of tokenize and train-tokenizer reads") as refused:
        train_tokenizer.main(["--vocab-size", "330", "--out", str(tmp_path / "tokenizer"), rows])
    assert "--on-error" not in str(refused.value)


@pytest.mark.parametrize(
    "record", [[], {"prompt": 3}, {"messages": ["hello"]}, {"messages": [{"content": 3}]}], ids=str
)
def test_a_record_that_is_none_is_named_by_its_line(tmp_path, record):
    rows = written(tmp_path / "rows.jsonl", lambda n: record)
    with pytest.raises(UserError, match=r"rows\.jsonl:1 must .*; correct it"):
        train_tokenizer.main(["--targets", "completion", "--vocab-size", "330", "--out", str(tmp_path / "t"), rows])


def test_held_out_items_that_are_not_there_are_said_before_the_data_is_read(tmp_path):
    rows = written(tmp_path / "rows.jsonl", lambda n: {"no": "column of the task"})
    with pytest.raises(UserError, match="nofile must exist"):
        task.main(["sst2", "--data", rows, "--held-out", str(tmp_path / "nofile"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "line",
    ['{"prompt": ', "[]", json.dumps({"prompt": "\ud800", "completion": "b"})],
    ids=["json", "list", "surrogate"],
)
def test_a_bad_record_behind_good_ones_is_named_and_not_the_size_of_the_vocabulary(tmp_path, line):
    rows = tmp_path / "rows.jsonl"
    written(rows, RECORDS["completion"])
    rows.write_text(rows.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:201 must .*; correct it") as refused:
        train_tokenizer.main(
            ["--targets", "completion", "--vocab-size", "350", "--out", str(tmp_path / "t"), str(rows)]
        )
    assert "vocab-size" not in str(refused.value) and not (tmp_path / "t").exists()


def test_a_table_that_is_no_text_is_refused_before_the_text_beside_it_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    (tmp_path / "b.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"b\.csv must be text.*take it as one plain text"):
        train_tokenizer.main(
            ["--vocab-size", "330", "--out", str(tmp_path / "t"), str(tmp_path / "a.txt"), str(tmp_path / "b.csv")]
        )


def test_a_message_without_text_is_refused_without_an_option_that_the_command_lacks(tmp_path):
    rows = written(tmp_path / "rows.jsonl", lambda n: {"messages": [{"role": "user", "content": 3}]})
    with pytest.raises(UserError, match=r"rows\.jsonl:1 must have text, a list or null .*; correct it$"):
        train_tokenizer.main(["--targets", "assistant", "--vocab-size", "330", "--out", str(tmp_path / "t"), rows])
