"""Read documents from plain text, JSON lines, Parquet and Arrow files, also .gz and .zst, in a fixed order. A .json file of JSON
lines is read as such; other JSON and tables are refused, unless the user asks for them as plain text.

Tools make tokens or a vocabulary of the documents. Texts are not changed: no newline is translated, and only the line end that
separates documents and the mark that Windows puts before UTF-8 are stripped. A restart continues after a (file, line) without
parsing what comes before. Note: an unreadable document goes to `on_error`, which raises it (the default) or counts it and returns.
"""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, NoReturn

from ted_scale.base.errors import UserError, files_at
from ted_scale.base.parsing import parse_json
from ted_scale.corpora import saved, tables
from ted_scale.corpora.frames import Frames

# fmt: off
TEXT = {
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".css", ".csv", ".tsv", ".xml", ".json", ".yaml", ".yml", ".toml",
    ".ini", ".cfg", ".py", ".pyi", ".ipynb", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java",
    ".kt", ".scala", ".js", ".jsx", ".ts", ".tsx", ".rb", ".pl", ".php", ".lua", ".r", ".jl", ".hs", ".ml", ".sh",
    ".bash", ".sql", ".swift", ".m",
}
# fmt: on
KEYS = {  # of the records that each --targets reads; the first must be there
    "assistant": ("messages", "tools"),
    "last": ("messages", "tools"),
    "completion": ("prompt", "completion", "tools"),
}
LINES = {".jsonl", ".ndjson"}
TABLES = {".csv", ".tsv"}
PACKED = {".gz", ".zst"}
BOM = b"\xef\xbb\xbf"  # Windows begins a file of UTF-8 with it; it is no part of the text
LONGEST = 2**32  # bytes of a document: what has no end must not fill the memory


class Document(NamedTuple):
    """A text, the number of its file, its line or row there (1 for a whole file), and the bytes of all inputs read so far."""

    text: str
    file: int
    line: int
    consumed: int


def stop(error: UserError) -> None:
    raise error


def refuse(error: UserError) -> NoReturn:
    """`stop` of a command that has no --on-error."""
    raise UserError(str(error).replace(" or pass --on-error skip", ""))


def find_files(inputs: list[str]) -> list[Path]:
    """The files named, and those of known kind in the folders named (sorted, hidden ones left out)."""
    files = []
    for name in inputs:
        with files_at(name):
            if not Path(name).exists():
                raise UserError(f"input {name} must exist, but is missing; check the path")
            files += sorted(_walk(Path(name))) if Path(name).is_dir() else [Path(name)]
    if not files:
        raise UserError(
            f"input {' '.join(inputs)} must hold text, .jsonl, .parquet or .arrow files, but holds none; "
            "name a file itself to read it whatever its ending"
        )
    return files


def _walk(folder: Path) -> Iterator[Path]:
    places = [folder]  # a list, because folders in folders may be deeper than Python's stack
    for place in places:
        if (files := saved.files_of(place)) is not None:
            yield from files
            continue
        for path in (path for path in place.iterdir() if not path.name.startswith(".")):
            if path.is_dir() and not path.is_symlink():
                places.append(path)
            elif path.is_file() and _kind(path) in TEXT | LINES | tables.KINDS and not saved.is_card(path):
                yield path


def _kind(path: Path) -> str:
    plain = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return plain.suffix.lower()


def read_documents(
    files: list[Path],
    text_key: str | tuple[str, ...] = "text",
    document_per: str = "auto",
    on_error: Callable = stop,
    after: tuple[int, int] = (0, 0),
) -> Iterator[Document]:
    """Every document after `after`, a (file, line), in order. `document_per` is for plain text, and auto means file. A table or
    JSON is read as plain text only if `document_per` is not auto. Where `text_key` is several keys, the first of which must be
    there, a text is a record as JSON, which examples.py reads."""
    before, readers = 0, [_reader(path, text_key, document_per) for path in files]
    if on_error in (stop, refuse) and _refused in readers:  # at once, not after hours of reading
        next(_refused(files[readers.index(_refused)], 0, on_error))
    for number, path in enumerate(files):
        if number >= after[0]:
            skip = after[1] if number == after[0] else 0
            for line, text, consumed in readers[number](path, skip, on_error):
                yield Document(text, number, line, before + consumed)
        before += path.stat().st_size


def _reader(path: Path, text_key: str | tuple[str, ...], document_per: str) -> Callable:
    """The function that yields (line, text, bytes so far) of a file of this kind, after the lines to be skipped."""
    kind = _kind(path)
    if kind in tables.KINDS:
        return partial(_table, text_key)
    if kind in LINES or (kind == ".json" and document_per == "auto" and _begins_with_an_object(path)):
        return partial(_json_lines, text_key)
    if kind in {".json", *TABLES} and document_per == "auto":
        return _refused
    return partial(_text, _raw_lines if document_per == "line" else _raw_file)


def _begins_with_an_object(path: Path) -> bool:
    """Whether the first line that is not empty is a whole JSON object; an object over several lines is none."""
    for _, line, _ in _raw_lines(path, 0, lambda _: None):
        if line.strip():
            with contextlib.suppress(ValueError):
                return isinstance(parse_json(line), dict)
            return False
    return False


def _refused(path: Path, skip: int, on_error: Callable) -> Iterator[tuple[int, str, int]]:
    """The markup of tables and JSON is no text to learn a language from, and a whole data set is no document."""
    lines = f"jq -c 'if type == \"array\" then .[] else . end' {path.name} > {path.stem}.jsonl"
    way = lines if _kind(path) == ".json" else "write it as .jsonl or .parquet"
    if not skip:
        on_error(
            UserError(
                f"{path} must be text, JSON lines or parquet, but is {_kind(path)}, a document of no known place for its text; "
                f"{way}, or pass --document-per file to take it as one plain text"
            )
        )
    yield from ()


def _text(raw: Callable, path: Path, skip: int, on_error: Callable) -> Iterator[tuple[int, str, int]]:
    for number, content, consumed in raw(path, skip, on_error):
        try:
            yield number, content.decode(), consumed
        except UnicodeDecodeError as error:
            line = None if raw is _raw_file else number
            on_error(_unreadable(path, line, "UTF-8 text", error.reason))


def _json_lines(
    text_key: str | tuple[str, ...], path: Path, skip: int, on_error: Callable
) -> Iterator[tuple[int, str, int]]:
    for number, line, consumed in _raw_lines(path, skip, on_error):
        if not line.strip():
            continue
        try:
            text = line.decode() if isinstance(text_key, tuple) else _checked(parse_json(line)[text_key])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            must = "UTF-8 text" if isinstance(text_key, tuple) else f'a JSON object with text in "{text_key}"'
            on_error(_unreadable(path, number, must, f"{type(error).__name__}: {error}{_read_by(line)}"))
        else:
            yield number, text, consumed


def _read_by(line: bytes) -> str:
    """Which option reads a record that has no text."""
    with contextlib.suppress(ValueError):
        record = parse_json(line)
        for targets, (key, *_) in KEYS.items():
            if isinstance(record, dict) and key in record:
                return f"; it has {key}, which --targets {targets} of tokenize and train-tokenizer reads"
    return ""


def _checked(text) -> str:
    """The text. A ValueError or TypeError says why it is none: half of a surrogate pair, which JSON can spell, is no character."""
    if not isinstance(text, str):
        raise TypeError(f"it is {type(text).__name__}")
    text.encode()
    return text


def _table(
    text_key: str | tuple[str, ...], path: Path, skip: int, on_error: Callable
) -> Iterator[tuple[int, str, int]]:
    pyarrow, row = _imported("pyarrow", path), 0
    try:
        table = tables.opened(path, _kind(path))
        columns = tables.columns_of(path, table.schema, text_key)
        for rows in table.batches(columns):
            values = rows.to_struct_array() if isinstance(text_key, tuple) else rows.column(0)
            texts = values.slice(max(skip - row, 0))
            row += len(rows) - len(texts)
            for value in texts:  # one by one: a text that is not UTF-8 costs its own row, not all that follow
                row += 1
                try:
                    text = _as_json(value.as_py()) if isinstance(text_key, tuple) else _checked(value.as_py())
                except (ValueError, TypeError) as error:
                    on_error(_unreadable(path, row, f"a row with text in {text_key}", error))
                else:
                    yield row, text, table.consumed(row)
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
        on_error(_unreadable(path, None, f"a whole {_kind(path)} file", error))


def _as_json(row: dict) -> str:
    return json.dumps({key: _without_nulls(value) for key, value in row.items()}, ensure_ascii=False, default=str)


def _without_nulls(value):
    """In a table each struct of a list has the keys of all others, as null."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _raw_file(path: Path, skip: int, on_error: Callable) -> Iterator[tuple[int, bytes, int]]:
    if skip:
        return
    raw, stream, errors = _open(path)
    with raw:
        try:
            content = _read(stream)
        except errors as error:
            on_error(_unreadable(path, None, f"a whole {path.suffix} file", error))
            return
    if len(content) > LONGEST:
        on_error(_unreadable(path, None, f"a document of at most {LONGEST:,} bytes", "it is longer"))
    else:
        yield 1, content.removeprefix(BOM), path.stat().st_size


def _read(stream: io.BufferedIOBase) -> bytes:
    """The whole stream. If it is longer than LONGEST, only its beginning, which is still longer than LONGEST."""
    pieces, size = [], 0
    while size <= LONGEST and (piece := stream.read(1 << 20)):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def _raw_lines(path: Path, skip: int, on_error: Callable) -> Iterator[tuple[int, bytes, int]]:
    raw, stream, errors = _open(path)
    number = skip
    with raw:
        try:
            for _ in islice(stream, skip):
                pass
            for number, line in enumerate(iter(partial(stream.readline, LONGEST + 1), b""), skip + 1):
                if len(line) > LONGEST:
                    must = f"a line of at most {LONGEST:,} bytes"
                    on_error(_unreadable(path, number, must, "it is longer, and what follows is left out"))
                    return
                plain = line.removesuffix(b"\n").removesuffix(b"\r")
                yield number, plain.removeprefix(BOM) if number == 1 else plain, raw.tell()
        except errors as error:
            on_error(_unreadable(path, number + 1, f"a whole {path.suffix} file", error))


def _open(path: Path) -> tuple[io.BufferedReader, io.BufferedIOBase, tuple[type[Exception], ...]]:
    """The file, its unpacked bytes, and what reading those may raise."""
    packed = path.suffix.lower()
    zstandard = _imported("zstandard", path) if packed == ".zst" else None
    raw = path.open("rb")  # the caller closes it
    if packed == ".gz":
        return raw, gzip.open(raw), (OSError, EOFError, zlib.error)
    if zstandard:
        stream = io.BufferedReader(Frames(raw, zstandard.ZstdDecompressor().decompressobj), 1 << 20)
        return raw, stream, (OSError, EOFError, zstandard.ZstdError)
    return raw, raw, (OSError,)


def _imported(module: str, path: Path):
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        package = module.split(".")[0]
        raise UserError(f"reading {path} must have {package}, but it is not installed; pip install {package}") from None


def _unreadable(path: Path, line: int | None, must: str, found: object) -> UserError:
    where = path if line is None else f"{path}:{line}"
    reason = " ".join(str(found).split())
    return UserError(f"{where} must be {must}, but is not ({reason}); correct it or pass --on-error skip")
