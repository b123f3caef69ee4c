"""From text to shards: the same tokens whatever the file kind, tokenizer form and number of workers; all or nothing."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
from places import ROOT

from ted_scale.base.errors import UserError
from ted_scale.commands import tokenize_corpus, train_tokenizer
from ted_scale.corpora.documents import find_files, read_documents
from ted_scale.corpora.local import expand, unfinished
from ted_scale.corpora.shards import read_index, sidecar_of

HARSH = [
    "def f(x):\n    if x:\n\treturn  x   # tab\r\n\n\n",
    "  leading and trailing  ",
    "\u00e9\u0301 \u6f22\u5b57 \U0001f600 \xa0 \ufeff \x00 \u2028",
    "</s> <s> <unk> <0x0A> stay text",
    "----====    ____" * 9,
]


@pytest.fixture(scope="module")
def texts():
    """Real text: this repository's own files."""
    files = sorted([*ROOT.glob("ted_scale/**/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("tests/**/*.py")])
    return [text for text in (f.read_bytes().decode() for f in files) if text.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    """A trained tokenizer folder."""
    base = tmp_path_factory.mktemp("tokenizer")
    write_jsonl(base / "texts.jsonl", texts)
    train_tokenizer.main(["--vocab-size", "700", "--out", str(base / "tok"), str(base / "texts.jsonl")])
    return base / "tok"


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def tokenize(folder, out, *rest, tokenizer="tokenizer.model"):
    tokenize_corpus.main(["--tokenizer", str(folder / tokenizer), "--out", str(out), *map(str, rest)])
    return content(out)


def content(out):
    return [Path(f"{p}{ending}").read_bytes() for p in expand(out) for ending in (".bin", ".idx")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, folder, texts):
    """(input file, bytes of its shard) as one worker writes them with the sentencepiece model."""
    base = tmp_path_factory.mktemp("reference")
    source = write_jsonl(base / "texts.jsonl", texts + HARSH)
    return source, tokenize(folder, base / "out", source, "--workers", 1)


def test_both_halves_of_a_tokenizer_folder_encode_alike_and_decode_exactly(folder, texts):
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    other = AutoTokenizer.from_pretrained(str(folder))
    assert [other.unk_token_id, other.bos_token_id, other.eos_token_id, other.pad_token_id] == [0, 1, 2, 3]
    for text in texts + HARSH + [" " * n for n in range(1, 40)]:
        ids = model.encode(text)
        assert other(text)["input_ids"] == ids
        assert other.decode(ids) == model.decode(ids) == text


def test_shards_do_not_depend_on_the_form_of_the_tokenizer(tmp_path, folder, reference):
    source, expected = reference
    assert tokenize(folder, tmp_path / "out", source, tokenizer="") == expected
    sidecars = [json.loads(Path(f"{p}.json").read_text()) for p in (tmp_path / "out", source.parent / "out")]
    assert sidecars[0]["tokenizer_digest"] == sidecars[1]["tokenizer_digest"]


def test_shards_do_not_depend_on_the_number_of_workers(tmp_path, folder, reference, monkeypatch):
    monkeypatch.setattr(tokenize_corpus, "BATCH_DOCUMENTS", 3)
    source, expected = reference
    assert tokenize(folder, tmp_path / "out", source, "--workers", 2) == expected


def test_megatron_reads_back_every_document_with_its_end_token(reference, folder, texts):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    dataset = IndexedDataset(str(reference[0].parent / "out"))
    wanted = [[*model.encode(text), model.eos_id()] for text in texts + HARSH]
    assert [document.tolist() for document in dataset] == wanted
    assert dataset.index.dtype == numpy.uint16 and dataset.document_indices.tolist() == list(range(len(wanted) + 1))
    index = read_index(reference[0].parent / "out")
    assert index.tokens == sum(map(len, wanted)) and index.recorded.max_token_id == max(map(max, wanted))
    sidecar = sidecar_of(index.files)
    assert (sidecar["documents"], sidecar["vocab_size"], sidecar["eod_id"]) == (len(wanted), 700, 2)


def as_plain(path, texts):
    path.mkdir()
    for i, text in enumerate(texts):
        (path / f"{i:04}.txt").write_bytes(text.encode())
    return path


def as_gzip(path, texts):
    name = path.with_suffix(".jsonl.gz")
    name.write_bytes(gzip.compress(write_jsonl(path, texts).read_bytes()))
    return name


def as_zstandard(path, texts):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    name, half = path.with_suffix(".jsonl.zst"), len(texts) // 2
    frames = [write_jsonl(path, part).read_bytes() for part in (texts[:half], texts[half:])]
    name.write_bytes(b"".join(zstandard.ZstdCompressor().compress(frame) for frame in frames))
    return name


def as_parquet(path, texts):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    name = path.with_suffix(".parquet")
    parquet.write_table(pyarrow.table({"other": [0] * len(texts), "text": texts}), name, row_group_size=7)
    return name


@pytest.mark.parametrize("write", [as_plain, as_gzip, as_zstandard, as_parquet])
def test_every_kind_of_file_gives_the_same_shard(tmp_path, folder, texts, reference, write):
    source = write(tmp_path / "input", texts + HARSH)
    assert tokenize(folder, tmp_path / "out", source) == reference[1]


@pytest.mark.parametrize("write", [as_plain, as_gzip, as_zstandard, as_parquet])
def test_reading_continues_after_any_document(tmp_path, write):
    first = write(tmp_path / "first", ["one", "", "two\n\nlines", "three"])
    last = write(tmp_path / "last", ["four", "five"])
    files = find_files([str(first), str(last)])
    documents = list(read_documents(files))
    assert [d.text for d in documents] == ["one", "", "two\n\nlines", "three", "four", "five"]
    for number, document in enumerate(documents, 1):
        assert list(read_documents(files, after=(document.file, document.line))) == documents[number:]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.txt.gz", "a.jsonl.gz"])
def test_the_mark_that_windows_puts_before_utf8_is_no_text(tmp_path, name):
    content = "\ufeff" + ('{"text": "one \\ufeff"}\n' if "jsonl" in name else "one \ufeff")
    packed = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(packed(content.encode()))
    assert [document.text for document in read_documents([tmp_path / name])] == ["one \ufeff"]


def test_an_unreadable_document_is_reported_again_only_after_the_resume_position(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "one"}\n[]\n\n{"text": "two"}\n{"text": 3}\n')
    for after, expected in (((0, 0), [2, 5]), ((0, 1), [2, 5]), ((0, 4), [5])):
        errors = []
        list(read_documents([path], on_error=errors.append, after=after))
        assert [int(str(e).split(":")[1].split()[0]) for e in errors] == expected


def test_one_document_a_line_equals_json_lines(tmp_path, folder):
    (tmp_path / "lines.txt").write_bytes(b"one\n\n two \r\nthree")
    source = write_jsonl(tmp_path / "lines.jsonl", ["one", "", " two ", "three"])
    per_line = tokenize(folder, tmp_path / "a", "--document-per", "line", tmp_path / "lines.txt")
    assert per_line == tokenize(folder, tmp_path / "b", source)
    assert read_index(tmp_path / "a").documents == 3


def test_json_lines_are_read_as_such_whatever_the_file_is_called(tmp_path, folder):
    """They were one plain text, markup and all, with exit code 0."""
    lines = write_jsonl(tmp_path / "a.jsonl", ["one", "two\nlines"])
    expected = tokenize(folder, tmp_path / "a", lines)
    for name, content in (("b.json", lines.read_bytes()), ("c.json.gz", gzip.compress(b"\n" + lines.read_bytes()))):
        (tmp_path / name).write_bytes(content)
        assert tokenize(folder, tmp_path / name[0], tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "way"),
    [
        (
            "array.json",
            '[{"text": "one"}, {"text": "two"}]',
            "then .[] else . end' array.json > array.jsonl, or pass --document-per file",
        ),
        (
            "spread.json",
            '{\n "text": "one"\n}\n',
            "else . end' spread.json > spread.jsonl, or pass --document-per file",
        ),
        ("table.csv", "text,label\none,1\n", "write it as .jsonl or .parquet, or pass --document-per file to take it"),
    ],
)
def test_other_json_and_tables_are_refused_at_once_unless_plain_text_is_asked_for(tmp_path, folder, name, content, way):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", ["before it"])
    (tmp_path / "in" / name).write_text(content)
    said = refused(folder, tmp_path / "c", tmp_path / "in")
    assert said.startswith(f"{tmp_path}/in/{name} must be text, JSON lines or parquet, but is {Path(name).suffix}, ")
    assert way in said
    tokenize(folder, tmp_path / "d", tmp_path / "in", "--document-per", "file")
    assert read_index(tmp_path / "d").documents == 2
    tokenize(folder, tmp_path / "e", tmp_path / "in", "--on-error", "skip")
    assert read_index(tmp_path / "e").documents == 1


def test_a_new_shard_begins_at_a_document_border(tmp_path, folder, reference):
    source, (whole, _) = reference
    tokenize(folder, tmp_path / "part", source, "--shard-tokens", 3000)
    shards = [read_index(prefix) for prefix in expand(tmp_path / "part")]
    assert len(shards) > 2 and all(s.tokens <= 3000 or s.documents == 1 for s in shards)
    bins = [Path(s.prefix + ".bin").read_bytes() for s in shards]
    assert b"".join(bins) == whole
    assert all(numpy.frombuffer(b, numpy.uint16)[-1] == 2 for b in bins)


def refused(folder, out, *rest):
    with pytest.raises(UserError) as error:
        tokenize(folder, out, *rest)
    return str(error.value)


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_both_tools_report_a_full_disk_in_one_sentence(tmp_path, folder, texts, monkeypatch):
    source = write_jsonl(tmp_path / "texts.jsonl", texts[:20])
    monkeypatch.setattr("ted_scale.corpora.writer.Writer._append", full)
    said = refused(folder, tmp_path / "c", source)
    assert said.startswith(
        f"{tmp_path}/c must be a file or folder that this user can use, on a disk with room, but is not: No sp"
    )
    monkeypatch.setattr(train_tokenizer, "write_folder", full)
    with pytest.raises(UserError, match=r"/tok must be a file or folder .*: No space left on device; put that right"):
        train_tokenizer.main(["--vocab-size", "400", "--out", str(tmp_path / "tok"), str(source)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl"]


def test_an_input_that_cannot_be_opened_is_reported_in_one_sentence(tmp_path, folder, texts, monkeypatch):
    source = write_jsonl(tmp_path / "texts.jsonl", texts[:20])

    def denied(*_):
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr("ted_scale.corpora.documents._open", denied)
    assert refused(folder, tmp_path / "c", source).startswith(
        f"{source} must be a file or folder that this user can use"
    )


@pytest.mark.parametrize("line", ['{"text": "cut', '{"body": "x"}', '{"text": 3}', '["x"]'])
def test_a_corrupt_line_is_named_and_leaves_nothing(tmp_path, folder, line):
    source = tmp_path / "bad.jsonl"
    source.write_text(f'{{"text": "good"}}\n{line}\n{{"text": "good too"}}\n')
    (tmp_path / "out").mkdir()
    assert refused(folder, tmp_path / "out" / "c", source).startswith(f"{source}:2 must be a JSON object with")
    assert list((tmp_path / "out").iterdir()) == []


def test_skipped_and_empty_documents_are_counted(tmp_path, folder, capsys):
    source = tmp_path / "bad.jsonl"
    source.write_text('{"text": "good"}\n{"text": "cut\n{"text": " "}\n{"text": "good too"}\n')
    tokenize(folder, tmp_path / "c", source, "--on-error", "skip")
    printed = capsys.readouterr().out
    assert printed.startswith("2 documents, ") and "1 empty and 1 unreadable left out" in printed


@pytest.mark.parametrize("write", [as_gzip, as_zstandard])
def test_a_cut_archive_is_named(tmp_path, folder, texts, write):
    source = write(tmp_path / "input", texts)
    source.write_bytes(source.read_bytes()[:-100])
    said = refused(folder, tmp_path / "c", source)
    assert f"{source}:" in said and f"must be a whole {source.suffix} file" in said


def test_text_that_is_not_utf8_is_named(tmp_path, folder):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert f"{tmp_path}/latin.txt must be UTF-8 text" in refused(folder, tmp_path / "c", tmp_path / "latin.txt")


def as_bad_json_lines(path):
    path.write_text('{"text": "one"}\n{"text": "half \\ud800 a pair"}\n{"text": "three \\ud83d\\ude00"}\n')
    return path


def as_bad_parquet(path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    texts = pyarrow.array([b"one", b"half \xed\xa0\x80 a pair", "three \U0001f600".encode()]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), path)
    return path


@pytest.mark.parametrize(("write", "name"), [(as_bad_json_lines, "a.jsonl"), (as_bad_parquet, "a.parquet")])
def test_half_of_a_surrogate_pair_costs_its_own_document_alone(tmp_path, folder, write, name):
    """In JSON it ended tokenization in a worker; in parquet the rows after it were lost."""
    source = write(tmp_path / name)
    assert f"{source}:2 must be a " in refused(folder, tmp_path / "a", source)
    skipped = tokenize(folder, tmp_path / "b", source, "--on-error", "skip")
    assert skipped == tokenize(folder, tmp_path / "c", write_jsonl(tmp_path / "c.jsonl", ["one", "three \U0001f600"]))


def test_input_that_is_missing_or_holds_nothing_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    assert "nowhere must exist, but is missing" in refused(folder, tmp_path / "c", tmp_path / "nowhere")
    assert "empty must hold text, .jsonl, .parquet or .arrow" in refused(folder, tmp_path / "c", tmp_path / "empty")
    assert "must hold a document with text, but holds none (1 empty" in refused(
        folder, tmp_path / "c", tmp_path / "blank.txt"
    )


def test_an_existing_output_is_replaced_only_on_demand(tmp_path, folder, reference):
    source, expected = reference
    tokenize(folder, tmp_path / "c", source, "--shard-tokens", 3000)
    assert "must be a new name, but exists" in refused(folder, tmp_path / "c", source)
    assert tokenize(folder, tmp_path / "c", source, "--overwrite") == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.bin", "c.idx", "c.json", "c.manifest.json"]


def test_a_tokenizer_without_end_token_or_that_does_not_load_is_refused(tmp_path, folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (bare / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    (tmp_path / "noise.model").write_bytes(b"noise")
    source = write_jsonl(tmp_path / "a.jsonl", ["text"])
    assert "must have an end-of-sequence token" in refused(folder, tmp_path / "c", source, "--tokenizer", bare)
    assert "must be a sentencepiece model" in refused(
        tmp_path, tmp_path / "c", source, "--tokenizer", tmp_path / "noise.model"
    )


def test_a_special_token_spelled_in_a_text_is_parsed_only_on_demand(tmp_path, folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps({**settings, "split_special_tokens": False}))
    source = write_jsonl(tmp_path / "a.jsonl", ["one</s>two"])
    for out, flags, ends in (("text", [], 1), ("parsed", ["--parse-special"], 2), ("workers", ["--workers", 2], 1)):
        tokens = tokenize(tmp_path / "tok", tmp_path / out, source, *flags, tokenizer="")[0]
        assert numpy.frombuffer(tokens, numpy.uint16).tolist().count(2) == ends


def test_a_vocabulary_the_texts_cannot_fill_is_refused_and_leaves_no_folder(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["few words"])
    with pytest.raises(UserError, match="--vocab-size must be a size that the texts can fill, but is 5000"):
        train_tokenizer.main(["--vocab-size", "5000", "--out", str(tmp_path / "tok"), str(source)])
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def start(folder, out, source, *rest):
    command = [sys.executable, ROOT / "tools/tokenize_corpus.py", "--tokenizer", folder / "tokenizer.model"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, "--out", out, *rest, source], env=env, stderr=subprocess.PIPE, text=True)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_run_leaves_no_loadable_shard_and_no_worker_and_a_second_run_succeeds(tmp_path, folder, texts):
    source, out = write_jsonl(tmp_path / "long.jsonl", texts * 80), tmp_path / "out" / "c"
    written = unfinished(out) / "00001.bin.part"
    run = start(folder, out, source, "--workers", "2")
    deadline = time.time() + 40
    while not (written.exists() and written.stat().st_size) and time.time() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert run.poll() is None and len(children) >= 2
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert written.exists() and not [p for p in out.parent.iterdir() if not p.name.startswith(".")]
    with pytest.raises(UserError, match="c must be finished, but is not"):
        read_index(expand(out)[0])
    while any(alive(pid) for pid in children) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in children)
    tokenize(folder, out, write_jsonl(tmp_path / "short.jsonl", texts))
    assert sorted(p.name for p in out.parent.iterdir()) == ["c.bin", "c.idx", "c.json", "c.manifest.json"]
    assert read_index(out).documents == len(texts)


def test_idle_workers_end_with_a_killed_run(folder):
    code = f"""
import multiprocessing, time
from ted_scale.corpora.tokenizer import load_tokenizer
from ted_scale.commands.tokenize_corpus import Batch, encode_all, encoder_of

def groups():
    for _ in range(20):
        yield Batch(["text"], [], 0)
    time.sleep(1)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(60)

list(encode_all(groups(), 2, encoder_of(None, load_tokenizer({str(folder / "tokenizer.model")!r}))))
"""
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    workers = run.stdout.readline().split()
    assert len(workers) == 2 and all(map(alive, workers))
    run.kill()
    run.wait()
    deadline = time.time() + 5
    while any(map(alive, workers)) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def test_the_command_ends_with_one_sentence_and_code_2(tmp_path, folder):
    run = start(folder, tmp_path / "c", tmp_path / "nowhere")
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2
    assert errors == f"error: input {tmp_path}/nowhere must exist, but is missing; check the path\n"
