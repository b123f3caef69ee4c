"""A tiny corpus on disk, written by hand so that no test pays the import of megatron for having one."""

import hashlib
import json
import struct
from pathlib import Path

import numpy

from ted_scale.config.data import Data


def write_shard(prefix, documents, dtype=numpy.uint16, sidecar=None):
    """A .bin/.idx pair of these documents (lists of ids), one sequence a document; returns the prefix as text."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(prefix.name + ".bin").write_bytes(numpy.array([t for d in documents for t in d], dtype).tobytes())
    prefix.with_name(prefix.name + ".idx").write_bytes(index_of([len(d) for d in documents], dtype))
    if sidecar is not None:
        prefix.with_name(prefix.name + ".json").write_text(json.dumps(sidecar))
    return str(prefix)


def index_of(lengths, dtype=numpy.uint16) -> bytes:
    """The .idx of documents of these lengths."""
    code = {numpy.uint16: 8, numpy.int32: 4}[dtype]
    lengths = numpy.array(lengths, numpy.int32)
    pointers = (numpy.cumsum(lengths, dtype=numpy.int64) - lengths) * numpy.dtype(dtype).itemsize
    borders = numpy.arange(len(lengths) + 1, dtype=numpy.int64)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(lengths), len(borders))
    return header + lengths.tobytes() + pointers.astype(numpy.int64).tobytes() + borders.tobytes()


def write_masked(prefix, documents, targets):
    """The same with targets: 1 for each token that counts, in lists as long as the documents."""
    from ted_scale.corpora.writer import index_bytes, runs_of

    path, lengths = write_shard(prefix, documents), numpy.array([len(d) for d in documents])
    runs = runs_of(numpy.array([mark for marks in targets for mark in marks], numpy.int8), lengths)
    prefix.with_name(prefix.name + ".idx").write_bytes(index_bytes(lengths, numpy.dtype("uint16"), runs))
    return path


def counting_documents(lengths, first=0):
    """Documents of the given lengths whose tokens count upwards, so that a token is its own place in the corpus."""
    ends = numpy.cumsum(lengths) + first
    return [list(range(end - length, end)) for end, length in zip(ends.tolist(), lengths, strict=True)]


def data_section(*paths, seq_len=8, attention="causal", weights=None, validation=0.0, blend=None, **more):
    """The run file's data section."""
    weights = weights or [1.0] * len(paths)
    corpora = [{"path": p, "weight": w, "validation": validation} for p, w in zip(paths, weights, strict=True)]
    blend = {"blend": blend} if blend else {}
    return Data.model_validate({"corpora": corpora, "seq_len": seq_len, "attention": attention} | blend | more)


def steps(
    stream, *, start=0, stop=None, samples_per_step, micro_batch, rank=0, world=1, sequence_parallel=1, prefetch=2
):
    """What one rank draws of a stream, by a loader of its own."""
    from ted_scale.data.loader import Loader

    place = {"rank": rank, "world": world, "sequence_parallel": sequence_parallel}
    loader = Loader(prefetch=prefetch, micro_batch=micro_batch, **place, device="cpu")
    return loader.steps(stream, start=start, stop=stop, samples_per_step=samples_per_step)


def digest(micros) -> str:
    """Of everything that a model is given, in order."""
    found = hashlib.sha256()
    for micro in micros:
        micro.moved(lambda tensor: found.update(tensor.numpy().tobytes()))
    return found.hexdigest()


def of_all_ranks(stream, world: int, start: int, stop: int) -> list:
    """The samples of all ranks in the order of their positions: micro-step first, then rank."""
    ranks = [
        steps(stream, start=start, stop=stop, samples_per_step=8, micro_batch=1, rank=r, world=world)
        for r in range(world)
    ]
    return [micro for step in zip(*ranks, strict=True) for micros in zip(*step, strict=True) for micro in micros]


def read_all(path: Path, vocabulary: int = 128) -> None:
    """What a run reads of a corpus: header, borders, windows to train and to validate on."""
    from tiny import make_run

    from ted_scale.corpora.local import expand
    from ted_scale.corpora.shards import document_borders, read_index
    from ted_scale.data.stream import batch, open_stream

    data = make_run(path.parent, data={"seq_len": 16, "corpora": [{"path": str(path), "validation": 0.2}]}).data
    stream = open_stream(data, 1, vocabulary)
    batch(stream, [0, 1, 7, 10**6])
    for held_out in stream.held_out.values():
        batch(held_out, list(range(min(held_out.count, 4))))
    for prefix in expand(path):
        document_borders(read_index(prefix))
