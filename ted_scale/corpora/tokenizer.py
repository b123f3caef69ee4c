"""One interface for both kinds of tokenizer that a corpus is written with: sentencepiece and Hugging Face.

ted-scale train-tokenizer trains one. Note: a special token that is spelled out in a text stays text in both kinds, unless
the user asks otherwise, because a web page that contains </s> must not end a document. No code of a tokenizer is run
(docs/security.md).
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ted_scale.base.errors import UserError
from ted_scale.base.parsing import parse_json
from ted_scale.storage import hub

MOST_PIECES = 1 << 24  # a list of a vocabulary's pieces is made, by id
NO_EOD = "must have an end-of-sequence token to end documents with, but has none; set one in the tokenizer"


class Tokenizer(NamedTuple):
    """What both kinds have in common; `pieces` is the vocabulary by id."""

    encode: (
        object  # list of texts -> list of lists of ids; pickles without transformers, so that a worker starts quickly
    )
    decode: object  # list of ids -> text
    pieces: list[str]
    eod: int
    content: str  # sha256 that includes merges and rules; digest() is of the vocabulary alone


def load_tokenizer(path: str, parse_special: bool = False) -> Tokenizer:
    """A sentencepiece .model file, or a Hugging Face folder or hub id."""
    if str(path).endswith(".model"):
        return _sentencepiece(path)
    return _hugging_face(path, parse_special)


def _sentencepiece(path: str) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    must = f"--tokenizer {path} must be a sentencepiece model"
    try:
        hub.check_text(must, Path(path))
        model = SentencePieceProcessor(model_file=str(path))
        pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    except (OSError, RuntimeError, ValueError):  # ValueError: pieces that are not text
        raise UserError(f"{must}, but does not load; check the file") from None
    if model.eos_id() < 0:
        raise UserError(f"--tokenizer {path} {NO_EOD}")
    content = _sha256(model.serialized_model_proto())
    return Tokenizer(
        partial(model.encode, num_threads=1), partial(_checked, model.decode), pieces, model.eos_id(), content
    )


def _hugging_face(path: str, parse_special: bool) -> Tokenizer:
    folder = hub.find_folder("--tokenizer", str(path), hub.TOKENIZER)
    model, vocabulary = hugging_face(folder, f"--tokenizer {path} must be a .model file or a Hugging Face tokenizer")
    if model.eos_token_id is None:
        raise UserError(f"--tokenizer {path} {NO_EOD}")
    size = max([len(model), *(i + 1 for i in vocabulary.values())])
    encode, content = (_fast if model.is_fast else _slow)(model, parse_special)
    decode = partial(_checked, model.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Tokenizer(encode, decode, model.convert_ids_to_tokens(range(size)), model.eos_token_id, content)


def hugging_face(path, must: str, out: str = "check its files"):
    """(tokenizer of a folder or name, its vocabulary). Only classes of transformers itself are allowed. `must` begins the
    sentence if it does not load, `out` ends it."""
    import transformers

    transformers.logging.set_verbosity_error()
    hub.check_texts(must, Path(path))
    try:
        check_class(transformers, path)
        model = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        vocabulary = model.get_vocab()
        ids = [*vocabulary.values(), *(i for i in model.all_special_ids if i is not None)]
        if max(ids, default=0) >= MOST_PIECES:
            raise ValueError(f"its ids reach beyond {MOST_PIECES:,}")
    except BaseException as error:  # the folder's content may raise anything; a panic in Rust is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which is not run; save it as a tokenizer.json where you trust that code"
        raise UserError(f"{must}, but does not load ({reason}); {out}") from None
    return model, vocabulary


def check_class(transformers, path) -> None:
    """transformers would use any of its classes that the file names, also models and loaders of code."""
    for file in ("tokenizer_config.json", "config.json"):
        found = transformers.utils.cached_file(path, file, _raise_exceptions_for_missing_entries=False)
        values = parse_json(Path(found).read_bytes()) if found else {}
        name = values.get("tokenizer_class") if isinstance(values, dict) else None
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if kind is not None and not is_tokenizer(transformers, kind):
            raise ValueError(f"{file} says tokenizer_class {name}, which is no tokenizer")


def is_tokenizer(transformers, kind) -> bool:
    """A tokenizer, or a placeholder for one whose package is not installed, which raises with that reason."""
    base = transformers.PreTrainedTokenizerBase
    return isinstance(kind, type) and (issubclass(kind, base) or ".dummy_" in kind.__module__)


def _fast(model, parse_special: bool) -> tuple:
    """(encode, content): plain ids without added, cut or padded tokens."""
    backend = model.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return partial(_encode_fast, backend, parse_special), _sha256(backend.to_str().encode())


def _encode_fast(backend, parse_special: bool, texts: list[str]) -> list[list[int]]:
    backend.encode_special_tokens = not parse_special  # set here, because a pickled backend forgets it
    return [e.ids for e in _checked(backend.encode_batch_fast, texts, add_special_tokens=False)]


def _slow(model, parse_special: bool) -> tuple:
    content = _sha256(json.dumps([type(model).__name__, sorted(model.get_vocab().items())]).encode())
    return partial(_encode_slow, model, parse_special), content


def _encode_slow(model, parse_special: bool, texts: list[str]) -> list[list[int]]:
    options = {"add_special_tokens": False, "split_special_tokens": not parse_special, "verbose": False}
    return _checked(model, texts, **options)["input_ids"]


def _checked(action, *arguments, **named):
    """Some tokenizers fail only at a certain text, like one without a token for unknown characters."""
    try:
        return action(*arguments, **named)
    except Exception as error:
        raise UserError(
            f"the tokenizer must take every text, but cannot: {error}; correct it or take another"
        ) from None


def digest(tokenizer: Tokenizer) -> str:
    """The same for every file format of one vocabulary: which token has which id, and which ends a document."""
    return _sha256(json.dumps([tokenizer.pieces, tokenizer.eod]).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
