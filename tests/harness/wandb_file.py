"""Read a .wandb file back: LevelDB's log (blocks of 32 KiB, records cut into pieces) around W&B's own Record messages."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768
HEADER = struct.Struct("<IHB")  # checksum, length, type
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[Record]:
    data, offset, pieces = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B", data[:7]
    while offset + HEADER.size <= len(data):
        left = BLOCK - offset % BLOCK
        _, length, kind = HEADER.unpack_from(data, offset) if left >= HEADER.size else (0, 0, 0)
        if kind == 0:  # the padding at a block's end
            offset += left
            continue
        pieces += data[offset + HEADER.size : offset + HEADER.size + length]
        offset += HEADER.size + length
        if kind in (FULL, LAST):
            yield Record.FromString(pieces)
            pieces = b""


def finished(path: Path, patience_s: float = 20) -> list[Record]:
    """The records of a run that was finished: on a busy machine W&B's process writes them after `finish` has returned."""
    until = time.monotonic() + patience_s
    while "exit" not in {record.WhichOneof("record_type") for record in read_records(path)}:
        assert time.monotonic() < until, f"{path} has no end"
        time.sleep(0.1)
    return list(read_records(path))


def read_rows(records: list[Record]) -> list[dict]:
    """What was logged, a dict a call; W&B's own keys begin with _."""
    rows = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item} for row in rows]


def read_config(records: list[Record]) -> dict:
    updates = [r.config for r in records if r.WhichOneof("record_type") == "config"]
    updates += [r.run.config for r in records if r.WhichOneof("record_type") == "run"]
    return {"/".join(u.nested_key) or u.key: json.loads(u.value_json) for update in updates for u in update.update}
