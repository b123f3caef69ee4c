"""Checks that two models, or a corpus and a model, have the same tokenizer. Otherwise training would learn noise."""

from pathlib import Path

from ted_scale.base.errors import UserError, files_at
from ted_scale.corpora.shards import ShardIndex, tokenizer_of
from ted_scale.corpora.tokenizer import digest, hugging_face, load_tokenizer
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.inspection import quiet_transformers

COMPARED_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_same_tokenizer(student: Anatomy, teacher: Anatomy) -> None:
    """Refuse models with different tokenizers. Vocabularies may be padded to different sizes, but an id in both must be the same
    token."""
    if same_file(student.folder, teacher.folder):
        return
    vocabularies = [read_vocabulary(a.folder) for a in (student, teacher)]
    if None in vocabularies:  # a folder without tokenizer: nothing to compare
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


def check_corpus_tokenizer(indices: list[ShardIndex], student: Anatomy) -> None:
    """Refuse a corpus of another tokenizer. Its ids are also in range, so only the digests in the sidecars show it. A corpus
    without a digest passes."""
    written = tokenizer_of("data.corpora", indices)
    if not written:
        return
    first, theirs = written
    if has_tokenizer(student.folder) and digest(student_tokenizer(student.folder)) != theirs:
        raise UserError(
            f"data.corpora must be written with the student's tokenizer, but {first} is written with another than the "
            f"one in {student.folder}; tokenize it again with --tokenizer {student.folder}"
        )


def student_tokenizer(folder: Path):
    """transformers' tokenizer. Its errors name student.path."""
    try:
        return load_tokenizer(str(folder))
    except UserError as error:
        raise UserError(str(error).replace("--tokenizer", "student.path", 1)) from None


def tokenizer_folder(student: Anatomy, teacher: Anatomy | None, key: str = "validation.suite") -> Path:
    """The folder of the tokenizer of both models. The run file's `key` needs it."""
    for anatomy in filter(None, (student, teacher)):
        if has_tokenizer(anatomy.folder):
            student_tokenizer(anatomy.folder)
            return anatomy.folder
    raise UserError(
        f"student.path must hold a tokenizer for {key}, but {student.folder} has none; copy that of the corpora there"
    )


def same_file(*folders: Path) -> bool:
    """A fast test: whether the first tokenizer file that both folders have is the same, byte for byte."""
    for name in COMPARED_FILES:
        paths = [folder / name for folder in folders]
        if all(p.is_file() for p in paths):
            try:
                return paths[0].read_bytes() == paths[1].read_bytes()
            except OSError as error:
                raise UserError(f"{error.filename} must be readable, but is not: {error.strerror}") from None
    return False


def has_tokenizer(folder: Path) -> bool:
    with files_at(folder):
        return any((folder / name).is_file() for name in COMPARED_FILES)


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    if not has_tokenizer(folder):
        return None
    with quiet_transformers():
        return hugging_face(folder, f"{folder} must hold a readable tokenizer", "copy it again")[1]
