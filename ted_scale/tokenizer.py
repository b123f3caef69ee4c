"""One face for both kinds of tokenizer that a corpus is written with: sentencepiece models and Hugging Face ones.

Training one is tools/train_tokenizer.py's part. The surprise: a special token spelled out in a text stays text, in both
kinds, unless asked otherwise; a web page that says </s> must not end a document.
"""

import hashlib
import json
from typing import NamedTuple

from ted_scale.errors import UserError

NO_EOD = "must have an end-of-sequence token to end documents with, but has none; set one in the tokenizer"


class Tokenizer(NamedTuple):
    """What both kinds of tokenizer come down to; `pieces` is the vocabulary by id."""

    encode: object  # list of texts -> list of lists of ids
    pieces: list[str]
    eod: int


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
    return Tokenizer(lambda texts: model.encode(texts, num_threads=1), pieces, model.eos_id())


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
    return Tokenizer(
        _hugging_face_encoder(model, parse_special), model.convert_ids_to_tokens(range(size)), model.eos_token_id
    )


def _hugging_face_encoder(model, parse_special: bool):
    """Plain ids without added, cut or padded tokens; a special token spelled out in a text stays text unless asked."""
    if not model.is_fast:
        options = {"add_special_tokens": False, "split_special_tokens": not parse_special, "verbose": False}
        return lambda texts: model(texts, **options)["input_ids"]
    backend = model.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = not parse_special
    return lambda texts: [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def digest(tokenizer: Tokenizer) -> str:
    """The same for every form of one vocabulary: which token has which id, and which ends a document."""
    return hashlib.sha256(json.dumps([tokenizer.pieces, tokenizer.eod]).encode()).hexdigest()
