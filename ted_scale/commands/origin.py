"""Where a document of a corpus came from, as far as its files say: ", from FILE:LINE", or between which lines.

Note: a sidecar records the line at which its shard ends, and no line of a document. Only where each line between two ends became a
document, the lines are those of the documents.
"""

from ted_scale.base.errors import UserError
from ted_scale.base.parsing import fits
from ted_scale.config.data import Streaming
from ted_scale.corpora.corpus import manifest_files, read_shards
from ted_scale.corpora.local import SHARD_NUMBER, name_of
from ted_scale.corpora.output import read_manifest
from ted_scale.corpora.shards import ShardIndex, sidecar_of
from ted_scale.corpora.writer import MARK, Mark

STREAM = Streaming()


def origin(index: ShardIndex, number: int) -> str:
    """Of document `number` of a shard; "" where another tool wrote it, or it lost its manifest."""
    name = SHARD_NUMBER.sub("", index.prefix)
    file = manifest_files(name, [index.prefix], STREAM).get(name)
    manifest = read_manifest(file, f"{name}.manifest.json") if file else {}
    shards = [shard["name"] for shard in manifest.get("shards", ())]
    end = mark_of(index)
    if end is None or name_of(index.prefix) not in shards:
        return ""
    place = shards.index(name_of(index.prefix))
    before = end_of(f"{name.removesuffix(name_of(name))}{shards[place - 1]}") if place else Mark()
    paths = [source["path"] for source in manifest["sources"]]
    if before is None or not before.file <= end.file < len(paths):
        return ""
    if before.file == end.file and end.line - before.line == index.documents:
        return f", from {paths[end.file]}:{before.line + number + 1}"
    return f", from between {paths[before.file]}:{before.line + 1} and {paths[end.file]}:{end.line}"


def end_of(prefix: str) -> Mark | None:
    try:
        (index,) = read_shards(prefix, STREAM)
    except UserError:  # it is missing or damaged, which is not asked here
        return None
    return mark_of(index)


def mark_of(index: ShardIndex) -> Mark | None:
    """What of the inputs was read up to the end of a shard."""
    found = (sidecar_of(index.files) or {}).get("read")
    return Mark(**found) if fits(found, MARK) else None
