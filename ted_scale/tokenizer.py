"""One face for both kinds of tokenizer that a corpus is written with: sentencepiece models and Hugging Face ones.

Training one is tools/train_tokenizer.py's part. The surprise: a special token spelled out in a text stays text, in both
kinds, unless asked otherwise; a web page that says </s> must not end a document.
"""

import hashlib
import json
from functools import partial
from typing import NamedTuple

from ted_scale.errors import UserError

NO_EOD = "must have an end-of-sequence token to end documents with, but has none; set one in the tokenizer"


class Tokenizer(NamedTuple):
    """What both kinds of tokenizer come down to; `pieces` is the vocabulary by id."""

    encode: object  # list of texts -> list of lists of ids; pickles without transformers, so a worker starts at once
    decode: object  # list of ids -> text
    pieces: list[str]
    eod: int
    content: str  # sha256 of merges and rules too, where digest() is of the vocabulary alone


def load_tokenizer(path: str, parse_special: bool = False) -> Tokenizer:
    """A sentencepiece .model file, or a Hugging Face folder or name."""
    if str(path).endswith(".model"):
        return _sentencepiece(path)
    return _hugging_face(path, parse_special)


def _sentencepiece(path: str) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise UserError(
            f"--tokenizer {path} must be a sentencepiece model, but does not load; check the file"
        ) from None
    if model.eos_id() < 0:
        raise UserError(f"--tokenizer {path} {NO_EOD}")
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    content = _sha256(model.serialized_model_proto())
    return Tokenizer(partial(model.encode, num_threads=1), model.decode, pieces, model.eos_id(), content)


def _hugging_face(path: str, parse_special: bool) -> Tokenizer:
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        model = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # from_pretrained raises whatever the folder's content makes it raise
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--tokenizer {path} must be a .model file or a Hugging Face tokenizer, but does not load ({reason}); "
            "name a local folder or run where the hub can be reached"
        ) from None
    if model.eos_token_id is None:
        raise UserError(f"--tokenizer {path} {NO_EOD}")
    size = max([len(model), *(i + 1 for i in model.get_vocab().values())])
    encode, content = (_fast if model.is_fast else _slow)(model, parse_special)
    decode = partial(model.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Tokenizer(encode, decode, model.convert_ids_to_tokens(range(size)), model.eos_token_id, content)


def _fast(model, parse_special: bool) -> tuple:
    """(encode, content): plain ids without added, cut or padded tokens."""
    backend = model.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return partial(_encode_fast, backend, parse_special), _sha256(backend.to_str().encode())


def _encode_fast(backend, parse_special: bool, texts: list[str]) -> list[list[int]]:
    backend.encode_special_tokens = not parse_special  # set here, because a pickled backend forgets it
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _slow(model, parse_special: bool) -> tuple:
    content = _sha256(json.dumps([type(model).__name__, sorted(model.get_vocab().items())]).encode())
    return partial(_encode_slow, model, parse_special), content


def _encode_slow(model, parse_special: bool, texts: list[str]) -> list[list[int]]:
    options = {"add_special_tokens": False, "split_special_tokens": not parse_special, "verbose": False}
    return model(texts, **options)["input_ids"]


def digest(tokenizer: Tokenizer) -> str:
    """The same for every form of one vocabulary: which token has which id, and which ends a document."""
    return _sha256(json.dumps([tokenizer.pieces, tokenizer.eod]).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
