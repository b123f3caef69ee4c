"""Objects under s3:// and msc://: list, read and delete them, each by requests that are retried; transfers.py moves whole files.

Endpoint and credentials come from the AWS_* environment or multi-storage-client's configuration. Note: an object to be read
always comes with its version, so that neither a cache nor a later request can use another object of the same name.
"""

import importlib.util
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from ted_scale.base import progress
from ted_scale.base.errors import UserError
from ted_scale.base.redact import holds_secret
from ted_scale.storage.client import s3_client
from ted_scale.storage.retries import Changed, Missing, ShortAnswer, Unsupported, persist

PACKAGES = {"s3": ("boto3", "boto3"), "msc": ("multistorageclient", "multi-storage-client")}  # scheme: module, package
# How long a request that fails is retried depends on who waits for it. While a run reads, all ranks wait, and its user says
# how long: data.stream.patience_s. The other two are here. (checkpoints/attempts.py retries writes to disk, and no request.)
OPENING_S = 20  # a user waits: what is wrong at the start of a run is rarely an outage
COPYING_S = 600  # a background thread waits, and the checkpoint that it copies is on disk already; without any progress


class Object(NamedTuple):
    url: str
    size: int
    version: str  # its etag; size and time where a store has none


class Note(NamedTuple):
    """A small object that several processes write, and its age by the store's own clock."""

    text: str
    version: str
    age_s: float


def is_remote(path) -> bool:
    return str(path).startswith(tuple(f"{scheme}://" for scheme in PACKAGES))


def check_package(path: str, what: str = "corpus") -> None:
    """A UserError where the path holds credentials, or where its scheme needs a package that is not installed."""
    if holds_secret(path):
        raise UserError(
            f"{what} {path} must hold no credentials, but does; they belong into the environment (AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )
    scheme = path.partition("://")[0]
    module, package = PACKAGES[scheme]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{what} {path} must be read with {package}, but it is not installed; pip install {package}")


def listed(folder: str, start: str, patience_s: float) -> dict[str, Object]:
    """The objects directly in a folder whose names begin with `start`, by name. Call check_package() first."""
    what = f"corpus {folder}/{start} must be listed"
    pages = _s3_pages if folder.startswith("s3://") else _msc_pages
    return {thing.url.removeprefix(f"{folder}/"): thing for thing in pages(folder, start, what, patience_s)}


def tree(folder: str, what: str, patience_s: float) -> dict[str, Object]:
    """All objects below a folder under s3://, by their paths in it."""
    return {thing.url.removeprefix(f"{folder}/"): thing for thing in _s3_pages(folder, "", what, patience_s, {})}


FLAT = {"Delimiter": "/"}  # without what is in folders below


def _s3_pages(folder: str, start: str, what: str, patience_s: float, kind: dict[str, str] = FLAT):
    bucket, key = split(folder)
    request = {"Bucket": bucket, "Prefix": f"{key}/{start}" if key else start, **kind}
    for page in _answers(request, what, patience_s):
        for entry in page.get("Contents", ()):
            yield Object(f"s3://{bucket}/{entry['Key']}", entry["Size"], entry["ETag"])


def _answers(request: dict, what: str, patience_s: float):
    """The pages of one listing."""
    while True:
        page = persist(what, lambda: s3_client().list_objects_v2(**request), patience_s)
        yield page
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _msc_pages(folder: str, start: str, what: str, patience_s: float):
    import multistorageclient

    entries = persist(what, lambda: list(multistorageclient.list(f"{folder}/", include_directories=True)), patience_s)
    for entry in entries:
        name = entry.key.rpartition("/")[2]
        if entry.type == "file" and name.startswith(start):
            version = entry.etag or f"{entry.content_length}-{entry.last_modified.timestamp()}"
            yield Object(f"{folder}/{name}", entry.content_length, version)


def read(thing: Object, start: int, stop: int, what: str, patience_s: float) -> bytes:
    """Bytes [start, stop) of an object; `what` begins the sentence if they cannot be read."""

    def request() -> bytes:
        found = (_s3_range if thing.url.startswith("s3://") else _msc_range)(thing, start, stop)
        if len(found) != stop - start:
            raise ShortAnswer(f"{thing.url} gave {len(found)} of {stop - start} bytes at {start}")
        progress.took(len(found))
        return found

    with progress.reading(thing.url):
        return persist(what, request, patience_s)


def _s3_range(thing: Object, start: int, stop: int) -> bytes:
    bucket, key = split(thing.url)
    request = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{stop - 1}", "IfMatch": thing.version}
    return s3_client().get_object(**request)["Body"].read()


def _msc_range(thing: Object, start: int, stop: int) -> bytes:
    import multistorageclient

    client, path = multistorageclient.resolve_storage_client(thing.url)
    return client.read(path=path, byte_range=multistorageclient.types.Range(offset=start, size=stop - start))


def split(url: str) -> tuple[str, str]:
    """(bucket, key) of an s3:// address."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


def folders(url: str, what: str, patience_s: float) -> list[str]:
    """The names of the folders in a folder."""
    bucket, key = split(url)
    pages = _answers({"Bucket": bucket, "Prefix": f"{key}/", **FLAT}, what, patience_s)
    return [entry["Prefix"][len(key) + 1 : -1] for page in pages for entry in page.get("CommonPrefixes", ())]


def text(thing: Object, what: str, patience_s: float) -> str:
    """A small object, whole."""
    return read(thing, 0, thing.size, what, patience_s).decode("utf-8", "replace") if thing.size else ""


def note(url: str, what: str, patience_s: float) -> Note | None:
    """None where there is no such object. Its age is 0 where the store does not say what time it is."""
    bucket, key = split(url)

    def request() -> Note:
        found = s3_client().get_object(Bucket=bucket, Key=key)
        headers = found["ResponseMetadata"]["HTTPHeaders"]
        now, written = (
            parsedate_to_datetime(headers.get(k, headers["last-modified"])) for k in ("date", "last-modified")
        )
        return Note(found["Body"].read().decode("utf-8", "replace"), found["ETag"], (now - written).total_seconds())

    try:
        return persist(what, request, patience_s)
    except Missing:
        return None


def put_note(url: str, text: str, version: str | None, what: str, patience_s: float) -> None:
    """Changed if the object is not of `version` any more; None means that there must be none. A store without such conditions
    overwrites it: read it again."""
    bucket, key = split(url)
    request = {"Bucket": bucket, "Key": key, "Body": text.encode()}
    condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
    try:
        persist(what, lambda: s3_client().put_object(**request, **condition), patience_s)
    except Missing:
        raise Changed(f"{what}, but it is gone") from None
    except Unsupported:
        persist(what, lambda: s3_client().put_object(**request), patience_s)


def delete(url: str, what: str, patience_s: float) -> None:
    bucket, key = split(url)
    persist(what, lambda: s3_client().delete_object(Bucket=bucket, Key=key), patience_s)
