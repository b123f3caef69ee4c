"""Corpora under s3:// and msc:// give the samples of local ones, through 50 ms of latency and a fifth of failures.

The server is moto's, the proxy before it is tools/bench/object_server.py's; both run in a process of their own.
"""

import hashlib
import json
import multiprocessing
import pickle
import time

import pytest
from corpus import counting_documents, data_section, steps, write_shard

from ted_scale.base.errors import Gone, UserError
from ted_scale.commands import inspect_corpus
from ted_scale.config.data import Streaming
from ted_scale.corpora import remote as remote_shards
from ted_scale.corpora.corpus import read_corpus
from ted_scale.corpora.output import as_text, sealed
from ted_scale.data.stream import open_stream, validation_batches
from ted_scale.storage import objects
from ted_scale.storage.chunks import chunks_of
from tools.bench.object_server import serving

VOCAB = 60000
SHARDS = 4
S3 = "s3://bucket/corpora/web"


def signed(prefix, documents):
    """As tokenize_corpus leaves it."""
    write_shard(prefix, documents)
    idx, content = (prefix.with_name(prefix.name + ending).read_bytes() for ending in (".idx", ".bin"))
    tokens = [token for document in documents for token in document]
    digests = {"idx_sha256": hashlib.sha256(idx).hexdigest(), "bin_sha256": hashlib.sha256(content).hexdigest()}
    sidecar = {"tokens": len(tokens), "documents": len(documents), "max_token_id": max(tokens), **digests}
    prefix.with_name(prefix.name + ".json").write_text(json.dumps({**sidecar, "bin_bytes": len(content)}))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The local one: 60,000 tokens in four shards, 120 kB."""
    folder = tmp_path_factory.mktemp("corpora")
    for i in range(SHARDS):
        signed(folder / f"web-{i + 1:05d}", counting_documents([100] * 148 + [200], first=15000 * i))
    return folder


@pytest.fixture(scope="module")
def endpoint(corpus):
    with serving() as running:
        running.put_folder(corpus, "bucket", "corpora/")
        running.client().put_object(Bucket="bucket", Key="corpora/website.bin", Body=b"of another corpus")
        yield running


@pytest.fixture(autouse=True)
def fresh(endpoint):
    """As a new process: nothing is known of listings, clients and faults."""
    remote_shards.listing.cache_clear()
    remote_shards.read_corpus.cache_clear()
    objects.s3_client.cache_clear()
    endpoint.faults()


def section(path, folder, *, seq_len=256, validation=0.0, patience_s=20.0, **stream):
    settings = {"folder": str(folder), "chunk_kib": 4, "cache_gib": 0.01, "patience_s": patience_s, **stream}
    data = data_section(str(path), seq_len=seq_len, validation=validation)
    return data.model_copy(update={"stream": Streaming(**settings)})


def hashed(stream, positions):
    digest = hashlib.sha256()
    for position in positions:
        for array in stream.sample(position):
            digest.update(array.tobytes())
    return digest.hexdigest()


def test_samples_and_order_are_those_of_the_local_corpus_with_a_fifth_of_the_requests_failing(
    endpoint, corpus, tmp_path
):
    local = open_stream(section(corpus / "web", tmp_path), 1, VOCAB)
    endpoint.faults(latency_ms=20, fail=0.2)
    remote = open_stream(section(S3, tmp_path), 1, VOCAB)
    taken = [
        next(steps(stream, start=40, samples_per_step=120, micro_batch=8, rank=1, world=3, prefetch=1))
        for stream in (local, remote)
    ]
    assert all((a.tokens_BT == b.tokens_BT).all() for a, b in zip(*taken, strict=True))
    everything = range(240)  # more than an epoch: every chunk is read
    assert hashed(pickle.loads(pickle.dumps(remote)), everything) == hashed(local, everything)
    counted = endpoint.faults()
    assert counted["failed"] >= 5 and counted["requests"] - counted["failed"] >= 12 + 120_000 // 4096


def test_held_out_documents_are_those_of_the_local_corpus(endpoint, corpus, tmp_path):
    batches = [
        list(validation_batches(stream, tokens=10**6, micro_batch=4, rank=0, world=1, device="cpu"))
        for path in (corpus / "web", S3)
        for stream in open_stream(section(path, tmp_path, validation=0.1), 1, VOCAB).held_out.values()
    ]
    assert len(batches[0]) == len(batches[1]) > 3
    assert all((a.labels_BT == b.labels_BT).all() for a, b in zip(*batches, strict=True))


@pytest.mark.parametrize(
    ("path", "number"),
    [(S3, 4), (S3 + "/", 4), (S3 + "-00002", 1), (S3 + "-00002.bin", 1), ("s3://bucket/corpora/.", 0), ("s3://bucket/one", 1)],
)  # fmt: skip
def test_a_path_means_what_it_means_on_disk(endpoint, corpus, tmp_path, path, number):
    client = endpoint.client()
    for ending in (".bin", ".idx"):
        client.upload_file(str(corpus / f"web-00001{ending}"), "bucket", f"one/inside{ending}")
    if number:
        assert len(read_corpus(path, section(path, tmp_path).stream)) == number
    else:
        with pytest.raises(UserError, match="nothing is there"):
            read_corpus(path, section(path, tmp_path).stream)


@pytest.fixture
def many_chunks(endpoint, tmp_path):
    """Far more chunks than a process holds in memory."""
    for i in range(8):
        write_shard(tmp_path / "many" / f"web-{i + 1:05d}", counting_documents([100] * 600))
    endpoint.put_folder(tmp_path / "many", "many")
    return "s3://many/web"


def waits_ms(path, folder, count, **stream):
    data = section(path, folder, seq_len=1024, cache_gib=0.0, **stream)
    batches = steps(open_stream(data, 1, VOCAB), start=0, samples_per_step=8, micro_batch=8, rank=0, world=1)
    waits = []
    for _ in range(count):
        before = time.perf_counter()
        next(batches)
        waits.append(1000 * (time.perf_counter() - before))
        time.sleep(0.3)
    batches.close()
    return waits


def test_reading_ahead_avoids_waits_after_warm_up(endpoint, many_chunks, tmp_path):
    """A step of 0.3 s takes 8 windows of one or two chunks; a request takes 50 ms, so one after another take longer."""
    open_stream(section(many_chunks, tmp_path), 1, VOCAB)  # indices
    endpoint.faults(latency_ms=50, fail=0.2)
    ahead = waits_ms(many_chunks, tmp_path, 13, ahead=24)
    counted = endpoint.faults(latency_ms=50)
    behind = waits_ms(many_chunks, tmp_path, 5, ahead=1, requests=1)
    print([round(wait, 1) for wait in ahead], [round(wait, 1) for wait in behind], counted)
    assert max(ahead[3:]) < 50
    assert counted["failed"] > 10 and min(behind[3:]) > 50  # else this could not fail


def test_the_folder_keeps_the_indices_and_no_more_chunks_than_its_bound(endpoint, tmp_path):
    bound = 64 << 10  # of 120 kB
    stream = open_stream(section(S3, tmp_path, cache_gib=bound / 2**30), 1, VOCAB)
    chunks, most = tmp_path / "chunks", 0
    for position in range(300):
        stream.sample(position)
        most = max(most, chunks.stat().st_blocks * 512)
    assert bound / 2 < most <= bound
    assert {path.suffix for path in (tmp_path / "indices").rglob("*") if path.is_file()} == {".idx", ".json", ""}


def test_a_restart_requests_only_the_listing(endpoint, tmp_path):
    settings = section(S3, tmp_path)
    once = hashed(open_stream(settings, 1, VOCAB), range(60))
    fresh_process(settings)
    endpoint.faults()
    assert hashed(open_stream(settings, 1, VOCAB), range(60)) == once
    assert endpoint.faults()["requests"] == 2


def fresh_process(settings):
    """Without what this one has in memory."""
    remote_shards.listing.cache_clear()
    remote_shards.read_corpus.cache_clear()
    chunks_of(settings.stream).read_before.clear()


def report_samples(settings, out, ready):
    ready.wait()
    out.put(hashed(open_stream(settings, 1, VOCAB), range(20)))


@pytest.mark.filterwarnings("ignore:This process")  # forked while it has threads
def test_processes_of_a_node_fetch_every_index_once_and_a_forked_one_reads(endpoint, tmp_path):
    settings = section(S3, tmp_path, chunk_kib=64)  # a chunk a shard
    hashed(
        open_stream(section(S3, tmp_path / "mine", chunk_kib=64), 1, VOCAB), range(1)
    )  # threads and a client, before
    remote_shards.listing.cache_clear()
    remote_shards.read_corpus.cache_clear()
    fork = multiprocessing.get_context("fork")
    out, ready = fork.Queue(), fork.Barrier(4)
    processes = [fork.Process(target=report_samples, args=(settings, out, ready)) for _ in range(3)]
    for process in processes:
        process.start()
    endpoint.faults()
    ready.wait()
    samples = {out.get(timeout=60) for _ in processes}
    counted = endpoint.faults()["requests"]
    for process in processes:
        process.join()
    assert samples == {hashed(open_stream(settings, 1, VOCAB), range(20))}
    assert 3 * 2 + 2 * SHARDS < counted <= 3 * 2 + 2 * SHARDS + 3 * SHARDS  # listings, indices, and chunks


@pytest.fixture
def own(endpoint, corpus, request):
    """A bucket that a test may spoil."""
    bucket = hashlib.sha256(request.node.name.encode()).hexdigest()[:20]
    endpoint.put_folder(corpus, bucket)
    return bucket


def test_a_changed_object_is_fetched_again_and_refused_by_a_run_that_began_before(endpoint, own, tmp_path):
    settings = section(f"s3://{own}/web", tmp_path)
    before = open_stream(settings, 1, VOCAB)
    first = hashed(before, range(60))
    write_shard(tmp_path / "new" / "web", counting_documents([100] * 148 + [200], first=20000))
    for number in range(1, SHARDS + 1):
        content = (tmp_path / "new" / "web.bin").read_bytes()
        endpoint.client().put_object(Bucket=own, Key=f"web-{number:05d}.bin", Body=content)
    with pytest.raises(UserError, match="it is another object than when this run began"):
        hashed(before, range(60, 240))
    fresh_process(settings)
    after = open_stream(settings, 1, VOCAB)
    assert hashed(after, range(60)) != first
    assert {int(after.sample(p).tokens[0]) // 1000 for p in range(60)} <= set(range(20, 36))


def put(endpoint, bucket, name, content):
    endpoint.client().put_object(Bucket=bucket, Key=name, Body=content)


def get(endpoint, bucket, name):
    return endpoint.client().get_object(Bucket=bucket, Key=name)["Body"].read()


def spoil(name, change):
    return lambda endpoint, bucket: put(endpoint, bucket, name, change(get(endpoint, bucket, name)))


def remove(name):
    return lambda endpoint, bucket: endpoint.client().delete_object(Bucket=bucket, Key=name)


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


SPOILT = {
    "bin_shorter": (spoil("web-00002.bin", lambda c: c[:-2]), r"web-00002.bin must hold 30000 bytes .* but is 29998"),
    "bin_longer": (spoil("web-00002.bin", lambda c: c + b"12"), r"web-00002.bin must hold the 30000 bytes that"),
    "idx_digest": (spoil("web-00002.idx", lambda c: flip(c, 40)), r"web-00002.idx must have the digest that its .json"),
    "idx_version": (
        lambda e, b: [spoil("web-00002.idx", lambda c: flip(c, 9))(e, b), remove("web-00002.json")(e, b)],
        r"web-00002.idx must be a Megatron index of version 1, but is version 0",
    ),
    "idx_lost": (remove("web-00002.idx"), r"web-00002.idx must exist, but is missing"),
    "bin_lost": (remove("web-00002.bin"), r"web-00002.bin must exist, but is missing"),
    "sidecar": (spoil("web-00002.json", lambda c: b"[1]"), r"web-00002.json must describe its shard"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_damaged_shard_is_named_before_training(endpoint, own, tmp_path, case):
    harm, sentence = SPOILT[case]
    harm(endpoint, own)
    with pytest.raises(UserError, match=sentence) as error:
        open_stream(section(f"s3://{own}/web", tmp_path), 1, VOCAB)
    assert f"s3://{own}/web-00002" in str(error.value) and "\n" not in str(error.value)


def test_a_partly_fetched_index_is_not_kept(endpoint, own, tmp_path):
    spoil("web-00002.idx", lambda content: flip(content, 60))(endpoint, own)
    for _ in range(2):
        remote_shards.listing.cache_clear()
        remote_shards.read_corpus.cache_clear()
        with pytest.raises(UserError, match=r"must have the digest that its .json records"):
            open_stream(section(f"s3://{own}/web", tmp_path), 1, VOCAB)
    assert not list(tmp_path.rglob("web-00002*.idx"))


def without_keys(monkeypatch):
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")


def without(module):
    return lambda monkeypatch: monkeypatch.setattr(
        objects.importlib.util, "find_spec", lambda name: None if name == module else object()
    )


MISTAKES = {
    "no_credentials": (without_keys, S3, "there are no credentials; set AWS_ACCESS_KEY_ID"),
    "no_bucket": (None, "s3://no-such-bucket/web", "its bucket does not exist; correct the path"),
    "empty_prefix": (None, "s3://bucket/nothing", "must be a prefix or a folder of .bin/.idx pairs, but nothing is there"),
    "unreachable": (
        lambda monkeypatch: monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9"), S3,
        r"must be listed, but was not for 1 s: its endpoint cannot be reached",
    ),
    "no_boto3": (without("boto3"), S3, "must be read with boto3, but it is not installed; pip install boto3"),
    "no_msc": (without("multistorageclient"), "msc://p/web", "not installed; pip install multi-storage-client"),
    "no_profile": (None, "msc://no_such_profile/web", "no_such_profile"),
}  # fmt: skip


def test_inspection_reads_and_verifies_a_remote_corpus(endpoint, own, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inspect_corpus, "STREAM", Streaming(folder=str(tmp_path)))
    sidecars = [(corpus / f"web-{i + 1:05d}.json").read_bytes() for i in range(SHARDS)]
    shards = [
        {"name": f"web-{i + 1:05d}", "sidecar_sha256": hashlib.sha256(sidecar).hexdigest()}
        for i, sidecar in enumerate(sidecars)
    ]
    totals = {"tokens": 60000, "documents": 149 * SHARDS, "empty": 0, "skipped": 0, "sources": []}
    put(endpoint, own, "web.manifest.json", as_text(sealed({**totals, "shards": shards})).encode())
    command = [f"s3://{own}/web", "--verify", "--documents", "0"]
    inspect_corpus.main(command)
    said = capsys.readouterr().out
    assert (
        "verified: 4 shard(s), digests of 4, 1 manifest(s)" in said
        and "4 shard(s), 596 documents, 60,000 tokens" in said
    )
    spoil("web-00003.bin", lambda content: flip(content, 1000))(endpoint, own)
    spoil("web-00004.json", lambda content: content + b" ")(endpoint, own)
    remote_shards.listing.cache_clear()
    remote_shards.read_corpus.cache_clear()
    with pytest.raises(SystemExit):
        inspect_corpus.main(command)
    damaged = capsys.readouterr().err
    assert f"s3://{own}/web-00003.bin must have the digest" in damaged
    assert f"s3://{own}/web-00004.json must have the digest that s3://{own}/web.manifest.json records" in damaged


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_that_names_the_corpus(tmp_path, monkeypatch, case):
    mistake, path, sentence = MISTAKES[case]
    if mistake:
        mistake(monkeypatch)
    with pytest.raises(Gone if case == "unreachable" else UserError, match=sentence) as error:
        open_stream(section(path, tmp_path, patience_s=1.0), 1, VOCAB)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_a_shard_that_cannot_be_read_for_long_ends_the_run_with_its_name(endpoint, tmp_path):
    stream = open_stream(section(S3, tmp_path, patience_s=1.0), 1, VOCAB)
    endpoint.faults(fail=1.0)
    data = steps(stream, start=0, samples_per_step=8, micro_batch=8)
    with pytest.raises(Gone, match=rf"corpus shard {S3}-0000\d of data.corpora\[0\] .* but was not for 1 s"):
        next(data)


def test_a_disk_without_room_for_indices_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.stream.folder must be on a disk with room .* but .*/file is not"):
        open_stream(section(S3, tmp_path / "file"), 1, VOCAB)


def test_multi_storage_client_reads_the_same(endpoint, corpus, tmp_path, monkeypatch):
    pytest.importorskip("multistorageclient")
    provider = {"type": "s3", "options": {"base_path": "", "endpoint_url": endpoint.url, "region_name": "us-east-1"}}
    posix = {"type": "file", "options": {"base_path": str(corpus.parent)}}
    profiles = {"store": {"storage_provider": provider}, "disk": {"storage_provider": posix}}
    (tmp_path / "msc.json").write_text(json.dumps({"profiles": profiles}))
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.json"))
    local = hashed(open_stream(section(corpus / "web", tmp_path), 1, VOCAB), range(100))
    for path in ("msc://store/bucket/corpora/web", f"msc://disk/{corpus.name}", f"msc://disk/{corpus.name}/web"):
        data = section(path, tmp_path).model_copy(
            update={"corpora": [c.model_copy(update={"name": "web"}) for c in section(path, tmp_path).corpora]}
        )
        assert hashed(open_stream(data, 1, VOCAB), range(100)) == local
