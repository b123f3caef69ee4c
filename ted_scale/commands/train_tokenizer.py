"""Texts in, a tokenizer folder out: ted-scale train-tokenizer --vocab-size 4096 --out FOLDER INPUT...

The folder holds a sentencepiece model (tokenizer.model, BPE with byte fallback, nothing normalized) and a Hugging Face
tokenizer (tokenizer.json). Both must give the same ids, so the tool compares them on its training texts before it gives the
folder its name.
"""

import argparse
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ted_scale.base.errors import UserError, files_at
from ted_scale.base.exits import run_main
from ted_scale.corpora.documents import KEYS, Document, find_files, read_documents, refuse
from ted_scale.corpora.messages import said
from ted_scale.corpora.tokenizer import load_tokenizer

SPACE = "\u2581"  # both write a space inside a piece like this
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CHUNK = 2000  # characters; the trainer drops sentences above 4192 bytes without a message
COMPARED = 1 << 20


def chunks(documents, limit: int) -> Iterator[str]:
    """Parts of the texts of at most CHUNK characters, cut at line ends if possible, up to `limit` characters in all."""
    taken = 0
    for document in documents:
        for chunk in _chunks(document.text):
            taken += len(chunk)
            if taken > limit:
                return
            yield chunk


def _chunks(text: str) -> Iterator[str]:
    chunk = ""
    for line in text.splitlines(keepends=True):
        if chunk and len(chunk) + len(line) > CHUNK:
            yield chunk
            chunk = ""
        chunk += line
        while len(chunk) > CHUNK:
            yield chunk[:CHUNK]
            chunk = chunk[CHUNK:]
    if chunk:
        yield chunk


def train(texts: Iterator[str], vocab_size: int) -> bytes:
    """A serialized sentencepiece model that keeps every character, also several spaces in a row."""
    import sentencepiece

    model, mistakes = io.BytesIO(), []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=until_mistaken(texts, mistakes),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=len(os.sched_getaffinity(0)),
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if mistakes:
            raise mistakes[0] from None
        reason = " ".join(str(error).split())
        raise UserError(
            f"--vocab-size must be a size that the texts can fill, but is {vocab_size} and sentencepiece reports "
            f"{reason}; change it or give more text"
        ) from None
    if mistakes:
        raise mistakes[0]
    return model.getvalue()


def until_mistaken(texts: Iterator[str], mistakes: list[UserError]) -> Iterator[str]:
    """sentencepiece makes an error of its own of one that its texts raise, so this one is put aside, and ends them."""
    try:
        yield from texts
    except UserError as error:
        mistakes.append(error)


def to_hugging_face(model_file: Path):
    """The same model as a `tokenizers` pipeline: BPE over the whole text, with spaces as in the pieces."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = SentencePieceProcessor(model_file=str(model_file))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    reserved = {i for i in range(len(pieces)) if model.is_byte(i) or model.is_control(i) or model.is_unknown(i)}
    merges = _merges({p: model.get_score(i) for i, p in enumerate(pieces) if i not in reserved})
    bpe = models.BPE(
        vocab={p: i for i, p in enumerate(pieces)},
        merges=merges,
        unk_token=SPECIAL["unk_token"],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    # No piece has a space after another character, so cutting there changes no merge and lets words be cached.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL.values()])
    return tokenizer


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first; sentencepiece merges any pair that forms a piece."""
    ranked = sorted((p for p in scores if len(p) > 1), key=lambda p: -scores[p])
    return [(p[:i], p[i:]) for p in ranked for i in range(len(p) - 1, 0, -1) if p[:i] in scores and p[i:] in scores]


def write_folder(model: bytes, folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(model)
    to_hugging_face(folder / "tokenizer.model").save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **SPECIAL,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_max_length": 10**30,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL, indent=1) + "\n")


def compare(folder: Path, texts: list[str]) -> None:
    """Check that both tokenizers of the folder give the same ids for every text."""
    one, other = load_tokenizer(str(folder / "tokenizer.model")), load_tokenizer(str(folder))
    assert one.pieces == other.pieces, "the two vocabularies differ"
    for text, ids, others in zip(texts, one.encode(texts), other.encode(texts), strict=True):
        assert list(ids) == list(others), f"the two encodings differ for {text[:200]!r}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a sentencepiece BPE tokenizer that Hugging Face loads too.")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, including 256 bytes and 4 special ones")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--sample-mb", type=float, default=200, help="millions of characters to train on at most")
    parser.add_argument("--text-key", default="text", help="key or column of the text in .jsonl and .parquet")
    parser.add_argument(
        "--targets",
        choices=KEYS,
        help="the inputs are conversations or pairs, as tokenize reads them; all of their text counts",
    )
    parser.add_argument(
        "--document-per", choices=("file", "line", "auto"), default="auto",
        help="for plain text, and for .json and .csv if given; auto: file",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="text, .jsonl, .parquet, also .gz/.zst; or folders")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with files_at(args.out):
        make(args)
    print(
        f"{args.vocab_size} pieces -> {args.out} (tokenizer.model for sentencepiece, tokenizer.json for Hugging Face)"
    )


def make(args) -> None:
    files, limit = find_files(args.inputs), int(args.sample_mb * 1e6)
    if args.out.exists() and not args.overwrite:
        raise UserError(f"--out {args.out} must be a new folder, but exists; choose another or pass --overwrite")

    def texts(limit: int = limit) -> Iterator[str]:
        return chunks(documents(args, files), limit)

    if next(texts(), None) is None:
        raise UserError(f"input {' '.join(args.inputs)} must hold text, but holds none; check files and --sample-mb")
    temporary = args.out.with_name(f".{args.out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_folder(train(texts(), args.vocab_size), temporary)
        compare(temporary, list(texts(min(limit, COMPARED))))
        if args.out.exists():
            shutil.rmtree(args.out)
        temporary.rename(args.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def documents(args, files: list[Path]) -> Iterator[Document]:
    keys = KEYS[args.targets] if args.targets else args.text_key
    for document in read_documents(files, keys, args.document_per, refuse):
        yield document._replace(text=said_at(files[document.file], document)) if args.targets else document


def said_at(path: Path, document: Document) -> str:
    try:
        return said(document.text)
    except ValueError as error:
        refuse(UserError(f"{path}:{document.line} {error}"))


if __name__ == "__main__":
    run_main(main)
