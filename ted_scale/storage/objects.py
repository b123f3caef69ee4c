"""Objects under s3:// and msc://: list, read, write and delete them, each by requests that are retried.

Endpoint and credentials come from the AWS_* environment or multi-storage-client's configuration. Note: an object to be read
always comes with its version, so that neither a cache nor a later request can use another object of the same name.
"""

import importlib.util
import os
import random
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ted_scale.base.errors import Gone, UserError
from ted_scale.base.redact import holds_secret

PACKAGES = {"s3": ("boto3", "boto3"), "msc": ("multistorageclient", "multi-storage-client")}  # scheme: module, package
# How long a request that fails is retried depends on who waits for it. While a run reads, all ranks wait, and its user says
# how long: data.stream.patience_s. The other two are here. (checkpoints/attempts.py retries writes to disk, and no request.)
OPENING_S = 20  # a user waits: what is wrong at the start of a run is rarely an outage
COPYING_S = 600  # a background thread waits, and the checkpoint that it copies is on disk already
CONNECTIONS = 64
TIMEOUTS_S = (5, 20)  # to connect, to wait for bytes
LONGEST_PAUSE_S = 15
# Exceptions of botocore, multi-storage-client, urllib3 and Python by name: neither package must be there to ask.
PASSING = {"HTTPClientError", "ConnectionError", "IncompleteReadError", "RetryableError", "TimeoutError", "HTTPError"}
PASSING |= {"CredentialRetrievalError", "ShortAnswer"}
PASSING_CODES = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "InternalError"}
LOST_KEYS = {"NoCredentialsError", "PartialCredentialsError"}


class Object(NamedTuple):
    url: str
    size: int
    version: str  # its etag; size and time where a store has none


class ShortAnswer(Exception):
    """Fewer bytes than were asked for."""


def is_remote(path) -> bool:
    return str(path).startswith(tuple(f"{scheme}://" for scheme in PACKAGES))


def check_package(path: str, what: str = "corpus") -> None:
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


def _s3_pages(folder: str, start: str, what: str, patience_s: float):
    bucket, key = split(folder)
    request = {"Bucket": bucket, "Prefix": f"{key}/{start}" if key else start, "Delimiter": "/"}
    while True:
        page = persist(what, lambda: s3_client().list_objects_v2(**request), patience_s)
        for entry in page.get("Contents", ()):
            yield Object(f"s3://{bucket}/{entry['Key']}", entry["Size"], entry["ETag"])
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
        return found

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
    request, found = {"Bucket": bucket, "Prefix": f"{key}/", "Delimiter": "/"}, []
    while True:
        page = persist(what, lambda: s3_client().list_objects_v2(**request), patience_s)
        found += [entry["Prefix"][len(key) + 1 : -1] for entry in page.get("CommonPrefixes", ())]
        if not page.get("IsTruncated"):
            return found
        request["ContinuationToken"] = page["NextContinuationToken"]


def text(url: str, what: str, patience_s: float) -> str | None:
    """A small object's text; None where there is no such object."""
    bucket, key = split(url)

    def request():
        try:
            return s3_client().get_object(Bucket=bucket, Key=key)["Body"].read().decode("utf-8", "replace")
        except Exception as error:
            if answer(chain(error)) == (404, "NoSuchKey"):
                return None
            raise

    return persist(what, request, patience_s)


def upload(source: Path, url: str, what: str, patience_s: float) -> None:
    bucket, key = split(url)
    persist(what, lambda: s3_client().upload_file(str(source), bucket, key), patience_s)


def download(url: str, target: Path, what: str, patience_s: float) -> None:
    bucket, key = split(url)
    persist(what, lambda: s3_client().download_file(bucket, key, str(target)), patience_s)


def delete(url: str, what: str, patience_s: float) -> None:
    bucket, key = split(url)
    persist(what, lambda: s3_client().delete_object(Bucket=bucket, Key=key), patience_s)


@lru_cache(maxsize=1)
def s3_client():
    """One for all threads and shards: making one takes 10 ms, and each keeps connections of its own."""
    import boto3
    import botocore.session
    from botocore.config import Config

    connect_s, read_s = TIMEOUTS_S
    once = {"mode": "standard", "total_max_attempts": 1}  # only persist() retries
    config = Config(retries=once, connect_timeout=connect_s, read_timeout=read_s, max_pool_connections=CONNECTIONS)
    session = botocore.session.get_session()
    # The time of writing is not used, and parsing it is most of the cost of listing thousands of objects.
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
    return boto3.session.Session(botocore_session=session).client("s3", config=config)


os.register_at_fork(after_in_child=s3_client.cache_clear)


def persist(what: str, request, patience_s: float):
    """The answer to a request. It is retried with growing pauses while its failures are of the kind that pass."""
    end, pause = time.monotonic() + patience_s, 0.05
    while True:
        try:
            return request()
        except Exception as error:
            links = list(chain(error))
            if not passes(links):
                if not is_ours(links):
                    raise  # a bug of this program, not a failure of the store
                raise UserError(f"{what}, but {reason(links)}") from error
            if time.monotonic() + pause > end:
                raise Gone(f"{what}, but was not for {patience_s:g} s: {reason(links)}") from error
        time.sleep(random.uniform(0.5, 1) * pause)  # all ranks fail at once, and must not all retry at once
        pause = min(2 * pause, LONGEST_PAUSE_S)


def chain(error: BaseException | None):
    """An exception and those that it was raised from: multi-storage-client wraps botocore's."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def answer(links) -> tuple[int, str]:
    """(HTTP status, code) that the store answered with; (0, "") where it did not."""
    for error in links:
        response = getattr(error, "response", None)
        if isinstance(response, dict) and "Error" in response:
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return status, str(response["Error"].get("Code", status))
    return 0, ""


def passes(links) -> bool:
    status, code = answer(links)
    if status:
        return status >= 500 or status in (408, 429) or code in PASSING_CODES
    return any(names(error) & PASSING for error in links)


def is_ours(links) -> bool:
    """Whether a failure comes from the store or from the connection to it."""
    known = {"BotoCoreError", "OSError", "PreconditionFailedError"}
    return bool(answer(links)[0]) or any(names(error) & known or is_of_msc(error) for error in links)


def is_of_msc(error: BaseException) -> bool:
    """multi-storage-client raises ValueError and RuntimeError for a profile that is missing or wrong."""
    trace, files = error.__traceback__, []
    while trace:
        files.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return any(name.partition(".")[0] == "multistorageclient" for name in files)


def reason(links) -> str:
    """The rest of the sentence: the fault, and how to correct it."""
    status, code = answer(links)
    kinds, said = set().union(*(names(error) for error in links)), " ".join(str(links[-1]).split())[:300]
    if kinds & LOST_KEYS:
        return "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if code == "NoSuchBucket":
        return "its bucket does not exist; correct the path, or AWS_ENDPOINT_URL"
    if status in (401, 403) or "PermissionError" in kinds:
        return f"access is denied ({code or said}); check the credentials and what they allow"
    if status == 412 or "PreconditionFailedError" in kinds:
        return "it is another object than when this run began; start the run again"
    if status == 404 or "FileNotFoundError" in kinds:
        return "it is gone; check the path"
    if {"EndpointConnectionError", "ConnectTimeoutError"} & kinds:
        return f"its endpoint cannot be reached ({said}); check AWS_ENDPOINT_URL and the network"
    return f"the store says {code} ({said})" if code else f"the request fails ({type(links[-1]).__name__}: {said})"
