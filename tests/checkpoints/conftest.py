"""A store, and a run that copies its checkpoints to it."""

import pytest
from test_saver import Run

from ted_scale.storage import objects
from tools.bench.object_server import serving


@pytest.fixture(scope="module")
def endpoint():
    with serving() as running:
        running.client().create_bucket(Bucket="bucket")
        yield running


@pytest.fixture
def run(endpoint, tmp_path):
    objects.s3_client.cache_clear()
    endpoint.faults()
    (tmp_path / "filters").write_bytes(b"filters")
    return Run(tmp_path / f"run_{tmp_path.name}", keep=2, copy_to="s3://bucket/runs/")
