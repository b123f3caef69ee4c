"""Whole files to objects and back, in parts: a request that fails repeats its part, and nothing else.

Note: both ways go on where an earlier process stopped. An upload is found again by its name, and is used if all parts that the
store has are of this file; a file that is half there is read from its end. Every object carries the SHA-256 of its content: it
shows that an upload is done although the answer to its last request was lost.
"""

import hashlib
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ted_scale.base import beneath, progress
from ted_scale.base.errors import Gone, UserError
from ted_scale.storage import objects
from ted_scale.storage.client import s3_client
from ted_scale.storage.objects import Object, split
from ted_scale.storage.retries import Missing, persist

PART = 8 * 2**20
MOST_PARTS = 10_000  # of one upload
AT_ONCE = 8  # parts of a file that are in memory
SAID = ("ETag", "ChecksumCRC32")  # what a store says of a part and wants to hear again at the end, as far as it does


class Upload(NamedTuple):
    """A file on its way to an object. `ask` makes a request with patience."""

    source: Path
    size: int
    sha256: str
    place: dict[str, str]  # Bucket, Key
    ask: Callable

    @property
    def each(self) -> int:
        """Bytes of a part."""
        return max(PART, -(-self.size // MOST_PARTS))

    @property
    def about(self) -> dict:
        return {**self.place, "Metadata": {"sha256": self.sha256}}

    def part(self, number: int) -> bytes:
        """Numbers begin at 1."""
        start = self.each * (number - 1)
        with self.source.open("rb") as file:
            file.seek(start)
            content = file.read(min(self.each, self.size - start))
        if len(content) != min(self.each, self.size - start):
            raise OSError(f"{self.source} is shorter than when its upload began")
        progress.took(len(content))
        return content


def in_order(work: Callable, items: Iterable) -> Iterator:
    """The results of `work` for all items. Some items are worked on at once, and no more results wait in memory."""
    coming = deque()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for item in items:
                coming.append(pool.submit(work, item))
                if len(coming) == AT_ONCE:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# To the store


def upload(source: Path, url: str, sha256: str, what: str, patience_s: float) -> None:
    """Sends nothing if the object has this content already."""
    place, ask = dict(zip(("Bucket", "Key"), split(url), strict=True)), partial(persist, what, patience_s=patience_s)
    file = Upload(source, source.stat().st_size, sha256, place, ask)
    for _ in range(3):
        if is_there(file):
            return
        try:
            return send_whole(file) if file.size <= PART else send_parts(file)
        except Missing:  # of the upload: it is done and the answer to that was lost, or somebody aborted it
            continue
    raise Gone(f"{what}, but its uploads are aborted again and again; look for another run that copies there")


def is_there(file: Upload) -> bool:
    try:
        found = file.ask(lambda: s3_client().head_object(**file.place))
    except Missing:
        return False
    return found["ContentLength"] == file.size and found.get("Metadata", {}).get("sha256") == file.sha256


def send_whole(file: Upload) -> None:
    content = file.part(1)
    file.ask(lambda: s3_client().put_object(**file.about, Body=content))


def send_parts(file: Upload) -> None:
    number, there = begun(file)
    if number is None:
        number = file.ask(lambda: s3_client().create_multipart_upload(**file.about))["UploadId"]
    place = {**file.place, "UploadId": number}

    def sent(part: int) -> dict:
        if part in there:
            return there[part]
        content = file.part(part)
        return file.ask(lambda: s3_client().upload_part(**place, PartNumber=part, Body=content))

    numbers = range(1, -(-file.size // file.each) + 1)
    parts = [
        {"PartNumber": part, **{key: said[key] for key in SAID if key in said}}
        for part, said in zip(numbers, in_order(sent, numbers), strict=True)
    ]
    file.ask(lambda: s3_client().complete_multipart_upload(**place, MultipartUpload={"Parts": parts}))


def begun(file: Upload) -> tuple[str | None, dict[int, dict]]:
    """(the upload of this file that an earlier process has begun, the parts that the store has). None where there is none, and
    where the store does not tell."""
    try:
        for found in unfinished(file.place["Bucket"], file.place["Key"], file.ask):
            if found["Key"] == file.place["Key"]:
                place = {**file.place, "UploadId": found["UploadId"]}
                there = {part["PartNumber"]: part for part in paged("list_parts", "Parts", place, file.ask)}
                if there and all(in_order(partial(is_of, file), there.values())):
                    return found["UploadId"], there
    except UserError:
        pass
    return None, {}


def is_of(file: Upload, part: dict) -> bool:
    """An ETag that is not the content's MD5, as of some encrypted buckets, equals none: then all parts are sent again."""
    digest = hashlib.md5(file.part(part["PartNumber"]), usedforsecurity=False).hexdigest()
    return part["ETag"].strip('"') == digest


def unfinished(bucket: str, prefix: str, ask: Callable) -> list[dict]:
    return paged("list_multipart_uploads", "Uploads", {"Bucket": bucket, "Prefix": prefix}, ask)


def paged(operation: str, key: str, request: dict, ask: Callable) -> list[dict]:
    pages = ask(lambda: list(s3_client().get_paginator(operation).paginate(**request)))
    return [entry for page in pages for entry in page.get(key, ())]


def abort(folder: str, what: str, patience_s: float) -> int:
    """Abort all uploads below a folder that are not complete: nobody sees them, and they are billed. Returns how many."""
    (bucket, prefix), ask = split(f"{folder}/"), partial(persist, what, patience_s=patience_s)
    found = unfinished(bucket, prefix, ask)
    for entry in found:
        place = {"Bucket": bucket, "Key": entry["Key"], "UploadId": entry["UploadId"]}
        try:
            ask(lambda place=place: s3_client().abort_multipart_upload(**place))
        except Missing:
            continue
    return len(found)


# From the store


def download(thing: Object, target: Path, what: str, patience_s: float) -> bool:
    """Returns whether it went on with a file that was there: then the whole must be compared with its digest."""
    begin = begun_bytes(target)
    begin -= begin % PART

    def piece(start: int) -> bytes:
        return objects.read(thing, start, min(start + PART, thing.size), what, patience_s)

    with os.fdopen(beneath.open_plain(target, os.O_WRONLY), "wb") as file:
        file.truncate(min(begin, thing.size))
        file.seek(0, os.SEEK_END)
        for content in in_order(piece, range(file.tell(), thing.size, PART)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return begin > 0


def begun_bytes(target: Path) -> int:
    """A link, or a second name of another file, must not be written to: it goes."""
    if not beneath.is_there(target):
        return 0
    found = target.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        beneath.discard(target)
        return 0
    return found.st_size
