"""Corpora of many shards and corpora in object storage: start-up times, and how long a step waits for data.

Prints four figures: start-up from disk under a limit of 1024 descriptors; start-up from object storage, the first time and
later; waits of a consumer whose steps take --step-ms, at 50 ms latency, without and with a fifth of the requests failing;
and the size of the cache on disk with a bound far below the corpus. Everything runs on this machine: moto's server and its
proxy share the cores with the reader, so the times are upper bounds. From the second start on, the proxy serves pages of
listings, because moto takes a second for each in a bucket of 30,000.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from a checkout that is not installed, too

import numpy

from ted_scale.config.data import Data
from ted_scale.corpora import remote as remote_shards
from ted_scale.corpora.writer import dtype_of, index_bytes
from tools.bench.object_server import Endpoint, serving

VOCAB = 60000
WARM_UP = 4  # steps


def write_shard(folder: Path, name: str, tokens: int, seed: int) -> None:
    lengths = numpy.full(tokens // 1000, 1000, numpy.int32)
    content = numpy.random.default_rng(seed).integers(0, VOCAB, 1000 * len(lengths), dtype_of(VOCAB)).tobytes()
    index = index_bytes(lengths, dtype_of(VOCAB))
    facts = {"tokens": 1000 * len(lengths), "max_token_id": VOCAB - 1, "bin_bytes": len(content)}
    sidecar = json.dumps({**facts, "idx_sha256": hashlib.sha256(index).hexdigest()})
    for ending, value in ((".bin", content), (".idx", index), (".json", sidecar.encode())):
        (folder / f"{name}{ending}").write_bytes(value)


def link_shards(folder: Path, number: int) -> str:
    (folder / "one").mkdir(parents=True)
    write_shard(folder / "one", "shard", 10_000, 0)
    for i in range(1, number + 1):
        for ending in (".bin", ".idx", ".json"):
            os.link(folder / "one" / f"shard{ending}", folder / f"web-{i:05d}{ending}")
    return str(folder / "web")


def section(path: str, folder: Path, **stream) -> Data:
    corpora = [{"path": path, "name": "web"}]
    return Data.model_validate({"corpora": corpora, "seq_len": 4096, "stream": {"folder": str(folder), **stream}})


def first_step_s(path: str, folder: Path) -> float:
    """In a process of its own, from open_stream to the first step of 64 windows; imports come before."""
    command = [sys.executable, __file__, "--first-step", path, "--folder", str(folder)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_first_step(path: str, folder: Path) -> None:
    from ted_scale.data.loader import Loader
    from ted_scale.data.stream import open_stream

    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    began = time.monotonic()
    stream = open_stream(section(path, folder), 1, VOCAB)
    loader = Loader(prefetch=2, micro_batch=8, rank=0, world=1, device="cpu")
    next(loader.steps(stream, start=0, stop=64, samples_per_step=64))
    print(time.monotonic() - began)


def upload(endpoint: Endpoint, folder: Path, bucket: str) -> None:
    client = endpoint.client()
    client.create_bucket(Bucket=bucket)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda path: client.put_object(Bucket=bucket, Key=path.name, Body=path.read_bytes()),
                [path for path in folder.iterdir() if path.is_file()],
            )
        )


def waits_ms(path: str, folder: Path, count: int, step_ms: float, **stream) -> tuple[list[float], str, int]:
    """(waits of steps after the warm-up, digest of all samples, peak bytes of the cache on disk)."""
    from ted_scale.data.loader import Loader
    from ted_scale.data.stream import open_stream

    opened = open_stream(section(path, folder, **stream), 1, VOCAB)
    loader = Loader(prefetch=2, micro_batch=8, rank=0, world=1, device="cpu")
    batches = loader.steps(opened, start=0, samples_per_step=8)
    waits, digest, most = [], hashlib.sha256(), 0
    for _ in range(count):
        before = time.perf_counter()
        (micro,) = next(batches)
        waits.append(1000 * (time.perf_counter() - before))
        digest.update(micro.tokens_BT.numpy().tobytes())
        time.sleep(step_ms / 1000)
        chunks = folder / "chunks"
        most = max(most, chunks.stat().st_blocks * 512) if chunks.exists() else most
    batches.close()
    loader.close()
    return waits[WARM_UP:], digest.hexdigest(), most


def start_up(endpoint: Endpoint, folder: Path, on_disk: int, remote: int) -> None:
    local = link_shards(folder / "local", on_disk)
    print(
        f"start-up, {on_disk:,} shards on disk: {first_step_s(local, folder):.1f} s to the first step, ulimit -n 1024"
    )
    upload(endpoint, Path(link_shards(folder / "remote", remote)).parent, "many")
    endpoint.faults(latency_ms=50, remember=True)
    first, again = (first_step_s("s3://many/web", folder / "stream") for _ in range(2))
    print(f"start-up, {remote:,} shards in object storage at 50 ms: {first:.1f} s the first time, then {again:.1f} s")


def waiting(endpoint: Endpoint, folder: Path, count: int, step_ms: float) -> None:
    (folder / "waits").mkdir()
    for i in range(1, 9):
        write_shard(folder / "waits", f"web-{i:05d}", 4_000_000, i)
    endpoint.faults()
    upload(endpoint, folder / "waits", "waits")
    bound = 16 << 20
    _, expected, _ = waits_ms(str(folder / "waits" / "web"), folder, count, 0)
    for fail in (0.0, 0.2):
        remote_shards.listing.cache_clear()
        endpoint.faults(latency_ms=50, fail=fail)
        arm = folder / f"arm-{fail}"
        waits, digest, most = waits_ms("s3://waits/web", arm, count, step_ms, cache_gib=bound / 2**30)
        counted = endpoint.faults()
        print(
            f"{len(waits)} steps of {step_ms:g} ms and 8 windows of 4096, {counted['failed']} of {counted['requests']} "
            f"requests failed: median wait {statistics.median(waits):.2f} ms, longest {max(waits):.2f} ms; "
            f"samples {'as' if digest == expected else 'NOT as'} on disk; cache at most {most / bound:.0%} of its bound"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=10_000, help="on disk")
    parser.add_argument("--remote-shards", type=int, default=1000, help="uploaded first, three objects each")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--step-ms", type=float, default=300.0)
    parser.add_argument("--first-step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.first_step:
        return print_first_step(arguments.first_step, arguments.folder)
    with tempfile.TemporaryDirectory() as folder, serving() as endpoint:
        start_up(endpoint, Path(folder), arguments.shards, arguments.remote_shards)
        waiting(endpoint, Path(folder), arguments.steps, arguments.step_ms)


if __name__ == "__main__":
    main()
