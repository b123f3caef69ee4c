"""Random schedules of faults without engines: what a run saves, resumes, copies and reads. The real trainer under such
schedules is in test_faults.py.

`make soak` runs two thousand. Note: the schedules of a kind are one process, started under the faulty file system.
"""

import json
import os
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import faulty_files
import forked
import pytest
import soak_report
import store_contents
from faulty_store import standing_before
from places import HARNESS

from tools.bench.object_server import serving

pytestmark = pytest.mark.skipif(faulty_files.COMPILER is None, reason="there is no C compiler for faulty_files.c")


@contextmanager
def object_store(kind: str):
    """What a copier needs in its environment."""
    if kind != "copying":
        yield {}
        return
    with serving() as moto, standing_before(moto.moto) as store:
        moto.client().create_bucket(Bucket=store_contents.BUCKET)
        yield {"AWS_ENDPOINT_URL": store.url, "FAULTY_STORE": str(store.port), "MOTO_URL": moto.moto}


def schedules(folder: Path, kind: str, seeds: range, seconds: float = 120) -> list[dict]:
    command = [HARNESS / "fault_schedules.py", kind, folder, seeds.start, seeds.stop]
    with object_store(kind) as needed:
        environment = {**os.environ, **needed, "LD_PRELOAD": faulty_files.library()}
        done = forked.run(command, env=environment, timeout=seconds)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["seed"] for report in reports] == list(seeds)
    wrong = [(kind, report["seed"], report["wrong"], report["struck"]) for report in reports if report["wrong"]]
    assert not wrong, f"{len(wrong)} of {len(seeds)}, the first: {wrong[0]}"
    return reports


@pytest.mark.parametrize(("kind", "count"), [("saving", 40), ("reading", 40), ("copying", 8)])
def test_no_schedule_of_faults_loses_a_checkpoint_or_reads_other_data(tmp_path, kind, count):
    assert sum(bool(report["struck"]) for report in schedules(tmp_path, kind, range(count))) > count / 2


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "count"), [("saving", 1000), ("reading", 700), ("copying", 300)])
def test_two_thousand_schedules_of_faults_lose_no_checkpoint_and_read_no_other_data(tmp_path, kind, count):
    reports = schedules(tmp_path, kind, range(10_000, 10_000 + count), seconds=3600)
    ends = Counter(end for report in reports for end in report["ends"])
    struck = sum(len(report["struck"]) for report in reports)
    soak_report.note("schedules", kind, schedules=count, lives=dict(ends), faults=struck)
