"""megatron-core's readers of objects, one request a call; imported late, because megatron takes seconds.

object_store.py decides what is read and when again. The surprise: megatron's S3 reader makes a client of its own for
every shard (10 ms and a connection) and keeps what it read last, so a shard's reader cannot be shared by threads; here
readers are made anew for every request, around one client.
"""

from typing import NamedTuple

import numpy

from ted_scale.corpora import megatron_indexed
from ted_scale.object_store import Object, ShortAnswer, s3_client

indexed = megatron_indexed()
EXACT = indexed.ObjectStorageConfig(path_to_idx_cache="", bin_chunk_nbytes=1)  # no more than is asked for


class OneVersion(NamedTuple):
    """The shared client, as one reader uses it: for one version of the object, and without closing it."""

    client: object
    version: str

    def get_object(self, **request):
        return self.client.get_object(IfMatch=self.version, **request)

    def close(self) -> None:
        pass


class S3Range(indexed._S3BinReader):
    """Everything but its client is megatron's."""

    def __init__(self, thing: Object):
        self._client = OneVersion(s3_client(), thing.version)
        self._s3_bucket, self._s3_key = indexed.parse_s3_path(thing.url)
        self._cache, self._cache_nbytes = None, EXACT.bin_chunk_nbytes


def reader_of(thing: Object):
    if thing.url.startswith("s3://"):
        return S3Range(thing)
    indexed.MultiStorageClientFeature.enable()  # off unless asked for, in newer versions of megatron
    return indexed._MultiStorageClientBinReader(thing.url, EXACT)


def read(thing: Object, start: int, stop: int) -> bytes:
    reader = reader_of(thing)
    try:
        found = reader.read(numpy.uint8, stop - start, start).tobytes()
    except AssertionError as error:  # megatron's, of a body that is too short
        raise ShortAnswer(f"{thing.url} gave fewer than {stop - start} bytes at {start}") from error
    if len(found) != stop - start:
        raise ShortAnswer(f"{thing.url} gave {len(found)} of {stop - start} bytes at {start}")
    return found
