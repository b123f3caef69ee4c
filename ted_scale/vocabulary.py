"""Do two models mean the same text by the same token id? Distillation on logits is noise where they do not."""

from pathlib import Path

from ted_scale.errors import UserError
from ted_scale.models import Anatomy, quiet_transformers

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_same_tokenizer(student: Anatomy, teacher: Anatomy) -> None:
    """Vocabularies may be padded to different sizes; an id that both have must be the same token."""
    if same_file(student.folder, teacher.folder):
        return
    vocabularies = [read_vocabulary(a.folder) for a in (student, teacher)]
    if None in vocabularies:  # a bare model folder: nothing to compare
        return
    tokens_s, tokens_t = ({i: token for token, i in v.items()} for v in vocabularies)
    shared = min(student.vocab_size, teacher.vocab_size)
    for i in sorted(i for i in tokens_s.keys() & tokens_t.keys() if i < shared):
        ours, theirs = tokens_s[i], tokens_t[i]
        if ours != theirs:
            raise UserError(
                f"student.path must have the teacher's tokenizer, but id {i} is {ours!r} in {student.folder} and "
                f"{theirs!r} in {teacher.folder}; choose a student of the same tokenizer"
            )


def same_file(*folders: Path) -> bool:
    """A quick yes: one of the tokenizer's files is byte for byte the same."""
    for name in TOKENIZER_FILES:
        paths = [folder / name for folder in folders]
        if all(p.is_file() for p in paths):
            return paths[0].read_bytes() == paths[1].read_bytes()
    return False


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder).get_vocab()
    except Exception as error:  # whatever the family's own code raises over a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{folder} must hold a readable tokenizer, but does not: {reason}; copy it again") from None
