"""Tables of columns, a Parquet or an Arrow file: one is opened, and its column of text is found or refused.

Note: .arrow is what Hugging Face `datasets` writes, a stream without an index; pyarrow's own files of that name begin with
ARROW1 and have one. Both are read batch by batch, with pyarrow alone.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ted_scale.base.errors import UserError, shortened

KINDS = {".parquet", ".arrow"}
WITH_AN_INDEX = b"ARROW1"
ROWS = 1024  # of a batch of Parquet


class Table(NamedTuple):
    schema: Any
    batches: Callable[[list[str]], Iterator]  # with these columns
    consumed: Callable[[int], int]  # bytes of the file, once so many rows were read


def opened(path: Path, kind: str) -> Table:
    """Whatever is wrong with the file, pyarrow says it by an ArrowException, an OSError or a ValueError."""
    return _parquet(path) if kind == ".parquet" else _arrow(path)


def _parquet(path: Path) -> Table:
    import pyarrow.parquet

    file, size = pyarrow.parquet.ParquetFile(path), path.stat().st_size
    rows = file.metadata.num_rows
    return Table(
        file.schema_arrow,
        lambda columns: file.iter_batches(batch_size=ROWS, columns=columns),
        lambda row: size * row // rows,
    )


def _arrow(path: Path) -> Table:
    import pyarrow

    file = pyarrow.OSFile(str(path))
    if file.read(len(WITH_AN_INDEX)) == WITH_AN_INDEX:
        reader = pyarrow.ipc.open_file(file)
        found = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        file.seek(0)
        reader = found = pyarrow.ipc.open_stream(file)
    return Table(
        reader.schema,
        lambda columns: (batch.select(columns) for batch in found),
        lambda _: file.tell(),
    )


def columns_of(path: Path, schema, key: str | tuple[str, ...]) -> list[str]:
    """The columns to read. One must be there and hold text; of several, which together are an example, the first must be there."""
    first, *_ = keys = key if isinstance(key, tuple) else (key,)
    if first not in schema.names:
        way = f"rename one: {', '.join(keys)} are read" if isinstance(key, tuple) else "set --text-key"
        raise UserError(f"{path} must have a column {first}, but has {', '.join(schema.names)}; {way}")
    found = [name for name in keys if name in schema.names]
    if twice := next((name for name in found if schema.names.count(name) > 1), None):
        raise UserError(f"{path} must have one column {twice}, but has {schema.names.count(twice)}; rename the others")
    if isinstance(key, str):
        refuse_other_than_text(path, schema, key)
    return found


def refuse_other_than_text(path: Path, schema, key: str) -> None:
    if is_text(found := schema.field(schema.names.index(key)).type):
        return
    others = [field.name for field in schema if is_text(field.type)]
    way = (
        f"set --text-key to a column of text: {', '.join(others)}"
        if others
        else f"none of {', '.join(schema.names)} has text"
    )
    raise UserError(f"{path} must have text in column {key}, but it holds {shortened(str(found), 100)}; {way}")


def is_text(kind) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
