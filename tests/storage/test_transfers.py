"""Whole files to a store and back: one failure repeats one part, and a later process goes on where an earlier one stopped."""

import hashlib
import random
import time
from pathlib import Path

import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ConnectionClosedError
from botocore.httpsession import URLLib3Session

from ted_scale.base import progress
from ted_scale.base.errors import Gone, UserError
from ted_scale.storage import objects, transfers
from ted_scale.storage.client import s3_client
from tools.bench.object_server import serving

PART = 1024
PARTS = 20
CONTENT = random.Random(0).randbytes(PARTS * PART - 100)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
URL = "s3://bucket/place/file"


@pytest.fixture(scope="module")
def client():
    """Straight to the store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S3_UPLOAD_PART_MIN_SIZE", str(PART))  # moto's; Amazon's is 5 MiB
        with serving() as running:
            s3_client.cache_clear()
            yield running.client()
            s3_client.cache_clear()


class Wire:
    """What this process sends, and answers in the store's place. `faults` has them by operation and number of the request."""

    def __init__(self):
        self.sent, self.faults = [], {}
        s3_client().meta.events.register("before-send.s3", self.send)

    def send(self, request, event_name, **_):
        operation = event_name.rpartition(".")[2]
        self.sent.append(operation)
        fault = self.faults.get((operation, self.count(operation)), self.faults.get(operation))
        return fault and fault(request)

    def count(self, operation: str) -> int:
        return self.sent.count(operation)


class Body:
    def __init__(self, content: bytes):
        self.content = content

    def stream(self):
        yield self.content


def says(status: int, code: str):
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return lambda request: AWSResponse(request.url, status, {}, Body(body))


def lost(request):
    """The store does what was asked, and its answer never comes."""
    URLLib3Session().send(request)
    raise ConnectionClosedError(endpoint_url=request.url)


@pytest.fixture
def wire(client, monkeypatch):
    monkeypatch.setattr(transfers, "PART", PART)
    client.create_bucket(Bucket="bucket")
    for left in client.list_multipart_uploads(Bucket="bucket").get("Uploads", ()):
        client.abort_multipart_upload(Bucket="bucket", Key=left["Key"], UploadId=left["UploadId"])
    for thing in client.list_objects_v2(Bucket="bucket").get("Contents", ()):
        client.delete_object(Bucket="bucket", Key=thing["Key"])
    wire = Wire()
    yield wire
    s3_client().meta.events.unregister("before-send.s3", wire.send)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def upload(source: Path, patience_s: float = 5.0) -> None:
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    transfers.upload(source, URL, digest, "it must be written", patience_s)


def cut_off(wire: Wire, source: Path) -> int:
    """An upload ends after some parts. Returns how many the store has."""
    refused = range(PARTS - 8, PARTS + 1)
    wire.faults = {("UploadPart", number): says(403, "AccessDenied") for number in refused}
    with pytest.raises(UserError, match="access is denied"):
        upload(source)
    came = wire.count("UploadPart") - sum(number in refused for number in range(wire.count("UploadPart") + 1))
    wire.sent, wire.faults = [], {}
    return came


def there(client) -> bytes:
    return client.get_object(Bucket="bucket", Key="place/file")["Body"].read()


def unfinished(client) -> list[str]:
    return [found["Key"] for found in client.list_multipart_uploads(Bucket="bucket").get("Uploads", ())]


def thing() -> objects.Object:
    return objects.tree("s3://bucket/place", "it must be listed", 5.0)["file"]


def test_one_503_sends_one_part_again(client, wire, source):
    wire.faults = {("UploadPart", PARTS - 2): says(503, "SlowDown")}
    upload(source)
    assert (wire.count("UploadPart"), wire.count("CreateMultipartUpload")) == (PARTS + 1, 1)
    assert there(client) == CONTENT


def test_one_503_reads_one_part_again(client, wire, source, tmp_path):
    upload(source)
    wire.faults = {("GetObject", PARTS - 2): says(503, "SlowDown")}
    assert not transfers.download(thing(), tmp_path / "target", "it must be read", 5.0)
    assert wire.count("GetObject") == PARTS + 1
    assert (tmp_path / "target").read_bytes() == CONTENT


def test_patience_is_for_the_time_without_progress(client, wire, source, monkeypatch):
    monkeypatch.setattr(transfers, "AT_ONCE", 1)
    wire.faults = {"UploadPart": lambda request: time.sleep(0.06)}
    wire.faults |= {("UploadPart", number): says(503, "SlowDown") for number in (5, 12, 17, 22)}
    began = time.monotonic()
    upload(source, patience_s=0.5)
    assert time.monotonic() - began > 1.0  # else this could not fail
    wire.faults = {"UploadPart": says(503, "SlowDown")}
    source.write_bytes(CONTENT[::-1])
    with pytest.raises(Gone, match=r"it must be written, but was not for 0\.5 s: the store says SlowDown"):
        upload(source, patience_s=0.5)


def test_a_later_process_sends_the_parts_that_are_missing(client, wire, source):
    came = cut_off(wire, source)
    upload(source)
    assert (wire.count("UploadPart"), wire.count("CreateMultipartUpload")) == (PARTS - came, 0)
    assert came > 5 and there(client) == CONTENT and not unfinished(client)


def test_an_upload_of_other_bytes_is_not_continued(client, wire, source):
    cut_off(wire, source)
    source.write_bytes(CONTENT[:PART] + CONTENT[::-1][PART:])
    upload(source)
    assert there(client) == source.read_bytes()


def test_what_is_there_already_is_not_sent(client, wire, source):
    upload(source)
    wire.sent = []
    upload(source)
    assert wire.sent == ["HeadObject"]
    source.write_bytes(CONTENT[::-1])  # of the same size
    upload(source)
    assert there(client) == CONTENT[::-1]


def test_an_upload_is_done_though_the_answer_to_its_end_is_lost(client, wire, source):
    wire.faults = {
        ("CompleteMultipartUpload", 1): lost,
        ("CompleteMultipartUpload", 2): says(404, "NoSuchUpload"),  # as Amazon, after a while; moto answers as before
    }
    upload(source)
    assert (wire.count("UploadPart"), wire.count("CreateMultipartUpload")) == (PARTS, 1)
    assert there(client) == CONTENT


def test_an_upload_that_somebody_aborts_begins_anew(client, wire, source):
    def aborted(request):
        if wire.count("CreateMultipartUpload") == 1:
            transfers.abort("s3://bucket/place", "", 5.0)
            return says(404, "NoSuchUpload")(request)
        return None

    wire.faults = {"UploadPart": aborted}
    upload(source)
    assert wire.count("CreateMultipartUpload") == 2
    assert there(client) == CONTENT


def test_unfinished_uploads_of_one_place_are_aborted(client, wire, source):
    for key in ("place/step_1/a", "place/step_1/b", "place2/a"):
        client.create_multipart_upload(Bucket="bucket", Key=key)
    assert transfers.abort("s3://bucket/place", "", 5.0) == 2
    assert unfinished(client) == ["place2/a"]


def test_a_user_who_may_not_list_uploads_can_copy(client, wire, source):
    wire.faults = {"ListMultipartUploads": says(403, "AccessDenied")}
    upload(source)
    assert there(client) == CONTENT


def test_a_later_process_reads_on_where_an_earlier_one_stopped(client, wire, source, tmp_path):
    upload(source)
    target = tmp_path / "target"
    target.write_bytes(CONTENT[: (PARTS - 3) * PART + 5])
    before = progress.now()[0]
    assert transfers.download(thing(), target, "it must be read", 5.0)
    assert wire.count("GetObject") == 3
    assert progress.now() == (before + 3 * PART - 100, "")
    assert target.read_bytes() == CONTENT


def test_a_download_writes_through_no_link_and_into_no_other_name_of_a_file(client, wire, source, tmp_path):
    upload(source)
    other = tmp_path / "other"
    for link in (Path.symlink_to, Path.hardlink_to):
        other.write_bytes(b"x" * 5 * PART)
        link(tmp_path / "target", other)
        transfers.download(thing(), tmp_path / "target", "it must be read", 5.0)
        assert other.read_bytes() == b"x" * 5 * PART and (tmp_path / "target").read_bytes() == CONTENT
        (tmp_path / "target").unlink()


def test_an_object_that_is_replaced_while_it_is_read_is_refused(client, wire, source, tmp_path):
    upload(source)
    seen = thing()
    client.put_object(Bucket="bucket", Key="place/file", Body=CONTENT[::-1])
    with pytest.raises(UserError, match="it is another object than when this run began"):
        transfers.download(seen, tmp_path / "target", "it must be read", 5.0)
