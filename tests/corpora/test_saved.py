"""Folders of Hugging Face `datasets`: read as their files say, in order, with pyarrow alone; what cannot be text is refused."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from places import ROOT

from ted_scale.base.errors import UserError
from ted_scale.commands import tokenize_corpus, train_tokenizer
from ted_scale.corpora.documents import find_files, read_documents

TEXTS = [f"text number {number}: é and more" for number in range(2500)]


def write_arrow(path: Path, columns: dict, rows: int = 100) -> None:
    """As `datasets` writes: a stream of batches."""
    table = pyarrow.table(columns)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=rows)


def save(folder: Path, texts: list[str], shards: int = 1, **more) -> Path:
    """The files of save_to_disk, as its release 5.2 writes them, and a cache that is no data."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    for number, name in enumerate(names):
        part = texts[number * len(texts) // shards : (number + 1) * len(texts) // shards]
        write_arrow(folder / name, {"text": part, "meta": [{"a": 1}] * len(part)})
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None, **more}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}, indent=2))
    write_arrow(folder / "cache-0451bf6c6f12b818.arrow", {"text": ["no data"]})
    return folder


def splits(folder: Path, *names: str) -> Path:
    for name in names:
        save(folder / name, TEXTS[:10])
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(names)}))
    return folder


def texts_in(*places, **more) -> list[str]:
    return [document.text for document in read_documents(find_files(list(map(str, places))), **more)]


def test_a_saved_dataset_is_read_whole_and_in_order(tmp_path):
    assert texts_in(save(tmp_path / "saved", TEXTS, shards=3)) == TEXTS


def test_reading_goes_on_after_any_row(tmp_path):
    files = find_files([str(save(tmp_path / "saved", TEXTS, shards=3))])
    documents = list(read_documents(files))
    assert [d.consumed for d in documents] == sorted(d.consumed for d in documents)
    assert documents[-1].consumed <= sum(path.stat().st_size for path in files)
    for place in (0, 99, 100, 832, 833, 1700, 2499):
        assert list(read_documents(files, after=documents[place][1:3])) == documents[place + 1 :]


def test_shards_are_those_of_the_same_text_as_json_lines(tmp_path):
    """Also Parquet's, and Arrow's files with an index."""
    train_tokenizer.main(["--vocab-size", "600", "--out", str(tmp_path / "t"), str(ROOT / "README.md")])
    save(tmp_path / "saved", TEXTS, shards=2)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "indexed.arrow", table.schema) as out:
        out.write_table(table, max_chunksize=64)
    made = []
    for source in ("a.jsonl", "a.parquet", "indexed.arrow", "saved"):
        prefix = tmp_path / "out" / source.replace(".", "_")
        words = ["--tokenizer", tmp_path / "t", "--out", prefix, "--workers", "1", tmp_path / source]
        tokenize_corpus.main([str(word) for word in words])
        made.append(Path(f"{prefix}.bin").read_bytes())
    assert made[0] and made == [made[0]] * 4


def test_one_split_is_taken_and_several_are_refused_with_their_names(tmp_path):
    assert texts_in(splits(tmp_path / "one", "train")) == TEXTS[:10]
    both = splits(tmp_path / "both", "train", "test")
    with pytest.raises(UserError, match=rf"input {both} must be one split, but has train, test; .*{both}/train"):
        texts_in(both)
    assert texts_in(both / "train") == TEXTS[:10]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (
            "meta",
            r"must have text in column meta, but it holds struct<a: int64>; set --text-key to a column of text: text",
        ),
        ("body", r"must have a column body, but has text, meta; set --text-key"),
    ],
)
def test_a_column_without_text_is_refused_with_those_that_have_some(tmp_path, column, said):
    save(tmp_path / "saved", TEXTS[:10])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "meta": [{"a": 1}]}), tmp_path / "a.parquet")
    for place in ("saved", "a.parquet"):
        with pytest.raises(UserError, match=said):
            texts_in(tmp_path / place, text_key=column, on_error=lambda _: None)


@pytest.mark.parametrize("name", ["a.arrow", "a.parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path, name):
    table = pyarrow.table([["a"], ["b"], [1], [2]], names=["text", "text", "other", "other"])
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_file(tmp_path / name, table.schema) as out:
            out.write_table(table)
    with pytest.raises(UserError, match=r"must have one column text, but has 2; rename the others"):
        texts_in(tmp_path / name)


def test_a_table_without_an_example_is_told_the_columns_of_one(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"column messages, but has text; rename one: messages, tools are read"):
        texts_in(tmp_path / "a.parquet", text_key=("messages", "tools"))


def test_words_that_are_numbered_are_text(tmp_path):
    words = pyarrow.array(["a", "b", "a"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": words}), tmp_path / "a.parquet")
    assert texts_in(tmp_path / "a.parquet") == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"_data_files": [{"filename": "../other.arrow"}]}, "must name files of its own folder"),
        ({"_data_files": [{"filename": "/etc/passwd"}]}, "must name files of its own folder"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "has no gone.arrow"),
        ({"_data_files": "all"}, "must be as datasets' save_to_disk writes it"),
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "is a selection of others'"),
    ],
)
def test_a_state_of_a_stranger_leads_nowhere_else(tmp_path, state, said):
    save(tmp_path / "saved", TEXTS[:10], **state)
    (tmp_path / "other.arrow").write_text("secret")
    with pytest.raises(UserError, match=said):
        find_files([str(tmp_path / "saved")])


@pytest.mark.parametrize("text", ["[", "[]", "{}", "[" * 100_000])
def test_a_state_that_is_none_is_refused(tmp_path, text):
    save(tmp_path / "saved", TEXTS[:10])
    (tmp_path / "saved" / "state.json").write_text(text)
    with pytest.raises(UserError, match="must be as datasets' save_to_disk writes it"):
        find_files([str(tmp_path / "saved")])


def test_a_damaged_file_is_a_sentence_and_can_be_skipped(tmp_path):
    save(tmp_path / "saved", TEXTS, shards=2)
    first = tmp_path / "saved" / "data-00000-of-00002.arrow"
    first.write_bytes(first.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"must be a whole \.arrow file"):
        texts_in(tmp_path / "saved")
    skipped = []
    kept = texts_in(tmp_path / "saved", on_error=skipped.append)
    assert len(skipped) == 1 and kept[-1250:] == TEXTS[1250:] and kept[:1000] == TEXTS[:1000]


def test_the_card_of_a_hub_folder_is_no_text_and_another_readme_is(tmp_path):
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("---\nconfigs: []\n---\nabout")
    assert texts_in(tmp_path) == ["a", "b"]
    (tmp_path / "README.md").write_text("a text of ours")
    assert sorted(texts_in(tmp_path)) == ["a", "a text of ours", "b"]
