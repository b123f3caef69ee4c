"""Targets and packs of a corpus under s3:// are those of the same corpus on disk."""

import numpy
import pytest
import torch
from corpus import counting_documents, data_section, write_masked

from ted_scale.config.data import Streaming
from ted_scale.data.stream import batch, open_stream
from ted_scale.storage import objects
from tools.bench.object_server import serving


@pytest.mark.parametrize("packing", ["windows", "examples"])
def test_rows_under_s3_are_those_on_disk(tmp_path, packing):
    lengths = numpy.random.default_rng(0).integers(3, 40, 300).tolist()
    documents = counting_documents(lengths, first=1)
    targets = [[int(i > len(document) // 2) for i in range(len(document))] for document in documents]
    (tmp_path / "here").mkdir()
    path = write_masked(tmp_path / "here" / "chat", documents, targets)
    settings = {"seq_len": 64, "attention": "document", "packing": packing}
    with serving() as running:
        running.put_folder(tmp_path / "here", "bucket", "corpora/")
        objects.s3_client.cache_clear()
        stream = {"stream": Streaming(folder=str(tmp_path / "cache"), chunk_kib=4, cache_gib=0.01)}
        there = open_stream(data_section("s3://bucket/corpora/chat", **settings, **stream), 1, 1 << 16)
        here = open_stream(data_section(path, **settings), 1, 1 << 16)
        for position in range(80):
            theirs, ours = batch(there, [position]), batch(here, [position])
            assert all(torch.equal(a, b) for a, b in zip(theirs[:3], ours[:3], strict=True))
            assert 0 < ours.weights_BT.sum() < 64
