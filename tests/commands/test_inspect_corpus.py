"""What inspect_corpus says of a corpus is what stands in it, and damage of any kind is found and named."""

import json
import keyword
import random
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import chats
import marked
import numpy
import pytest
from corpus import write_shard
from places import ROOT

from ted_scale.base.errors import UserError
from ted_scale.commands import inspect_corpus, tokenize_corpus, train_tokenizer
from ted_scale.commands.length_picture import Lengths, bins, picture
from ted_scale.corpora import output
from ted_scale.corpora.local import expand
from ted_scale.corpora.shards import read_index, tokenizer_of

WORDS = [
    *keyword.kwlist,
    "teacher",
    "student",
    "filter",
    "layer",
    "token",
    "corpus",
    "shard",
    "index",
    "digest",
    "step",
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Two tokenizer folders of different vocabularies, and the text that they learnt."""
    base = tmp_path_factory.mktemp("tokenizers")
    rng = random.Random(0)
    texts = ["\n".join(" ".join(rng.choices(WORDS, k=9)) for _ in range(rng.randint(20, 90))) for _ in range(90)]
    (base / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, size in (("one", "600"), ("other", "500")):
        train_tokenizer.main(["--vocab-size", size, "--out", str(base / name), str(base / "text.jsonl")])
    return base


def tokenize(tokenizers, out, name="one"):
    tokenizer = str(tokenizers / name / "tokenizer.model")
    source = str(tokenizers / "text.jsonl")
    tokenize_corpus.main(["--tokenizer", tokenizer, "--out", str(out), "--shard-tokens", "30000", source])


@pytest.fixture
def corpus(tmp_path, tokenizers, capsys):
    tokenize(tokenizers, tmp_path / "web" / "c")
    capsys.readouterr()
    return tmp_path / "web" / "c"


def inspect(capsys, *arguments):
    inspect_corpus.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_counts_histogram_and_documents_are_those_of_the_corpus(corpus, tokenizers, capsys):
    said = inspect(capsys, corpus, "--documents", 2, "--verify")
    indices = [read_index(prefix) for prefix in expand(corpus)]
    texts = [json.loads(line)["text"] for line in (tokenizers / "text.jsonl").read_text().splitlines()]
    tokens = sum(index.tokens for index in indices)
    assert f"{len(indices)} shard(s), {len(texts)} documents, {tokens:,} tokens, {2 * tokens:,} bytes of uint16" in said
    assert f"verified: {len(indices)} shard(s), digests of {len(indices)}, 1 manifest(s)" in said
    assert sum(int(line.split()[-1]) for line in said.split("\ndocument ")[0].splitlines() if " to " in line) == len(
        texts
    )
    assert said.count("\ndocument ") == 2
    first_lines = [line.strip() for line in said.split("\ndocument ")[1].splitlines()[1:3]]
    assert any(all(line.rstrip(" …") in text for line in first_lines) for text in texts)


def test_the_same_seed_shows_the_same_documents_and_another_shows_others(corpus, capsys):
    said = [inspect(capsys, corpus, "--documents", 2, "--seed", seed) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def second(corpus, ending):
    return corpus.with_name(f"c-00002{ending}")


def lose(corpus):
    for ending in (".bin", ".idx", ".json"):
        second(corpus, ending).unlink()


def manifest(corpus):
    return corpus.with_name("c.manifest.json")


DAMAGES = {
    "idx_flipped": (lambda c: flip(second(c, ".idx"), 34), "c-00002.idx must"),
    "idx_flipped_in_its_middle": (lambda c: flip(second(c, ".idx"), 60), "c-00002.idx must"),
    "bin_flipped": (lambda c: flip(second(c, ".bin"), 1000), "c-00002.bin must have the digest"),
    "bin_cut": (lambda c: second(c, ".bin").write_bytes(second(c, ".bin").read_bytes()[:-2]), "c-00002.bin must hold"),
    "bin_longer": (lambda c: second(c, ".bin").open("ab").write(b"1"), "c-00002.bin must hold"),
    "sidecar_edited": (lambda c: edit(second(c, ".json"), documents=1), "c-00002.json must have the digest"),
    "sidecar_lost": (lambda c: second(c, ".json").unlink(), "c-00002.json must have the digest"),
    "shard_lost": (lose, "c-00002 is missing"),
    "manifest_edited": (lambda c: edit(manifest(c), tokens=1), "c.manifest.json must be as it was written"),
    "manifest_cut": (lambda c: manifest(c).write_text("{"), "c.manifest.json must be as it was written"),
    "manifest_of_another": (
        lambda c: manifest(c).write_text(
            json.dumps(output.sealed(json.loads(manifest(c).read_text()) | {"tokens": 1}))
        ),
        "tokens as its shards do, but counts 1",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named_and_gives_exit_code_1(corpus, capsys, case):
    harm, sentence = DAMAGES[case]
    harm(corpus)
    with pytest.raises(SystemExit) as end:
        inspect(capsys, corpus, "--verify", "--documents", 0)
    damaged = capsys.readouterr().err.splitlines()
    assert end.value.code == 1
    assert any(sentence in line for line in damaged) and all(line.startswith("damaged: ") for line in damaged)


def test_a_wrong_digest_or_size_is_refused_when_a_shard_is_opened(corpus):
    flip(second(corpus, ".idx"), 60)
    with pytest.raises(UserError, match=r"c-00002.idx must have the digest that its .json records"):
        read_index(second(corpus, ""))
    second(corpus, ".bin").open("ab").write(b"1")
    with pytest.raises(UserError, match=r"c-00002.bin must hold the \d+ bytes that .*c-00002.json records"):
        read_index(second(corpus, ""))


def test_a_large_index_is_hashed_by_inspection_only(corpus, capsys, monkeypatch):
    monkeypatch.setattr("ted_scale.corpora.shards.SMALL_INDEX", 10)
    flip(second(corpus, ".idx"), 60)
    read_index(second(corpus, ""))
    with pytest.raises(SystemExit):
        inspect(capsys, corpus, "--verify")


def test_one_shard_of_several_is_inspected_alone(corpus, capsys):
    assert "verified: 1 shard(s), digests of 1, 0 manifest(s)" in inspect(capsys, second(corpus, ""), "--verify")


def test_shards_of_another_tool_are_shown_and_their_ids_checked_by_a_tokenizer(tmp_path, tokenizers, capsys):
    prefix = write_shard(tmp_path / "foreign", [[5, 6, 7], [8, 9], [550, 2]])
    assert "digests of 0, 0 manifest(s)" in inspect(capsys, prefix, "--verify", "--documents", 0)
    with pytest.raises(SystemExit) as end:
        inspect(capsys, prefix, "--verify", "--tokenizer", tokenizers / "other")
    assert (
        end.value.code == 1
        and "must hold token ids in 0..499 (vocabulary size 500), but holds 550" in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="must name its tokenizer to be shown as text"):
        inspect(capsys, prefix)


def test_two_tokenizers_in_one_corpus_are_refused(corpus, tokenizers, capsys):
    tokenize(tokenizers, corpus.with_name("d"), "other")
    with pytest.raises(
        UserError, match=r"corpus .*web must be written with one tokenizer, but .*d(-\d+)? is written with"
    ):
        inspect(capsys, corpus.parent)
    with pytest.raises(UserError, match=r"data\.corpora must be written with one tokenizer"):
        tokenizer_of("data.corpora", [read_index(prefix) for prefix in expand(corpus.parent)])
    with pytest.raises(UserError, match=r"--tokenizer must be the one that .*c-00001 is written with"):
        inspect(capsys, corpus, "--tokenizer", tokenizers / "other")


def test_the_picture_is_an_svg_with_a_bar_a_bin_axes_and_a_title(corpus, tmp_path, capsys):
    inspect(capsys, corpus, "--picture", tmp_path / "lengths.svg", "--documents", 0)
    root = ElementTree.parse(tmp_path / "lengths.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    words = [element.text for element in root.iter(svg + "text")]
    lengths = inspect_corpus.lengths_of([read_index(prefix) for prefix in expand(corpus)])
    bars = [bar for bar in root.iter(svg + "rect") if bar.get("fill") == "#4c78a8"]
    assert f"Document lengths of {corpus}" in words and {"documents", "tokens in a document (logarithmic)"} <= set(
        words
    )
    assert len(bars) == len(bins(lengths, 2)) and any("median" in word for word in words)
    inner = [float(bar.get(key)) for bar in bars for key in ("x", "y", "width", "height")]
    assert all(0 <= number <= 860 for number in inner)


@pytest.mark.parametrize("values", [[1], [1, 2, 3], [7], [0, 5], [1, 10**9]])
def test_every_document_is_in_one_bin_and_any_lengths_can_be_drawn(values):
    lengths = Lengths(numpy.array(values), numpy.arange(1, len(values) + 1))
    for per_doubling in (1, 2):
        found = bins(lengths, per_doubling)
        assert sum(count for _, _, count in found) == lengths.documents
        assert found[0][0] <= values[0] < found[0][1] and found[-1][0] <= values[-1] < found[-1][1]
        assert all(a[1] == b[0] for a, b in pairwise(found))
    ElementTree.fromstring(picture("a < b & c", lengths))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "corpus file nowhere.idx must exist, but is missing"),
        (["nowhere", "--verify"], "corpus file nowhere.idx must exist, but is missing"),
        (["nowhere", "--documents", "-1"], "--documents must be 0 or more, but is -1; leave it out"),
        (["nowhere", "--picture", "a.png"], "--picture must be an .svg file in a folder that exists, but is a.png"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_exit_code_2(arguments, sentence):
    command = [sys.executable, ROOT / "tools/inspect_corpus.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {sentence}")


def test_a_target_is_shown_however_long_its_prompt_is_and_the_document_asked_for_is_whole(tmp_path, capsys):
    folder = chats.make_tokenizer(tmp_path / "tokenizer")
    record = {"prompt": "first " + "a cat " * 400, "completion": "so!"}
    source = chats.write_records(tmp_path / "a.jsonl", [record])
    out = marked.tokenize(folder, tmp_path / "c", source, "--targets", "completion")
    inspect_corpus.main([str(out)])
    assert "    … " in (said := capsys.readouterr().out) and "so!<|" in said and "first" not in said
    inspect_corpus.main([str(out), "--document", "0"])
    assert "    first a cat" in (said := capsys.readouterr().out) and "so!<|" in said
