"""Shards in object storage: found by listing, their .idx and sidecars kept on local disk.

shards.py checks them as it checks local ones. The first process of a node fetches what is missing, under a lock, and the
others find it. Note: a copy's name holds the version of its object and the digest that it was checked against. So a copy
that exists is right, an object that changed is fetched again, and nothing is overwritten.
"""

import contextlib
import fcntl
import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ted_scale.base.durable import PART, write_file
from ted_scale.base.errors import UserError
from ted_scale.base.paths import checked_name, own_folder
from ted_scale.corpora import shards
from ted_scale.corpora.local import SHARD_NUMBER, Files, missing
from ted_scale.corpora.shards import OUTPUT_MANIFEST, ShardIndex
from ted_scale.storage import objects
from ted_scale.storage.objects import Object

log = logging.getLogger("ted_scale")
PARALLEL = 32
PIECE = 8 << 20  # of an index, a request
ENDINGS = (".bin", ".idx", ".json")


class Wanted(NamedTuple):
    """A file to have on local disk, and the sha256 that a sidecar records for it."""

    thing: Object
    sha256: str = ""

    def path(self, settings) -> Path:
        folder, _, name = self.thing.url.rpartition("/")
        version = hashlib.sha256(f"{self.thing.version} {self.thing.size} {self.sha256}".encode()).hexdigest()[:16]
        stem, _, ending = name.rpartition(".")
        return (
            settings.place / "indices" / hashlib.sha256(folder.encode()).hexdigest()[:16] / f"{stem}@{version}.{ending}"
        )


@lru_cache(maxsize=64)
def listing(path: str, patience_s: float) -> dict[str, dict[str, Object]]:
    """The shards that a path means, as local.expand finds them on disk, each with its files by ending. A process lists a path
    once: files that are added during a run are for the next run."""
    objects.check_package(path)
    path = path.rstrip("/")
    for ending in (".bin", ".idx"):
        path = path.removesuffix(ending)
    folder, _, name = path.rpartition("/")
    beside = {} if folder.endswith("/") else in_folder(folder, name, patience_s)  # s3://BUCKET alone is a folder
    if path in beside:
        return {path: beside[path]}
    family = {prefix: files for prefix, files in beside.items() if SHARD_NUMBER.sub("", prefix) == path}
    found = in_folder(path, "", patience_s) or family
    if not found:
        raise UserError(
            f"corpus {path} must be a prefix or a folder of .bin/.idx pairs, but nothing is there; check it"
        )
    return found


def in_folder(folder: str, start: str, patience_s: float) -> dict[str, dict[str, Object]]:
    found: dict[str, dict[str, Object]] = {}
    for name, thing in objects.listed(folder, start, patience_s).items():
        stem, dot, ending = name.rpartition(".")
        if dot + ending in ENDINGS and stem and not name.startswith("."):
            checked_name(
                name.replace("/", "\\"), f"the listing of {folder}"
            )  # a folder's own objects have no / in them
            found.setdefault(f"{folder}/{stem}", {})[dot + ending] = thing
    return {p: manifested(p, found) for p, files in sorted(found.items()) if ".bin" in files or ".idx" in files}


def manifested(prefix: str, found: dict[str, dict[str, Object]]) -> dict[str, Object]:
    """The files of a shard, with the manifest of its output."""
    manifest = found.get(SHARD_NUMBER.sub("", prefix) + ".manifest", {})
    return found[prefix] | ({OUTPUT_MANIFEST: manifest[".json"]} if ".json" in manifest else {})


def opening_patience_s(settings) -> float:
    return min(objects.OPENING_S, settings.patience_s)


@lru_cache(maxsize=64)
def read_corpus(path: str, settings) -> list[ShardIndex]:
    """Checked headers of the shards of one path."""
    found = listing(path, opening_patience_s(settings))
    for prefix, files in found.items():
        for ending in (".idx", ".bin"):
            if ending not in files:
                raise missing(prefix + ending)
    sidecars = fetched({p: Wanted(files[".json"]) for p, files in found.items() if ".json" in files}, path, settings)
    digests = {p: shards.read_sidecar(copy, f"{p}.json").get("idx_sha256", "") for p, copy in sidecars.items()}
    indices = fetched({p: Wanted(files[".idx"], digests.get(p, "")) for p, files in found.items()}, path, settings)
    copies = ((p, {".idx": indices[p]} | ({".json": sidecars[p]} if p in sidecars else {})) for p in found)
    places = {p: tuple((ending, str(copy)) for ending, copy in of.items()) for p, of in copies}
    return [shards.check(Files(p, "", places[p], remote_bin=files[".bin"])) for p, files in found.items()]


def manifests(path: str, settings) -> dict[str, Path]:
    """Local copies of the manifests of the outputs that a path means, by output."""
    found = listing(path, opening_patience_s(settings))
    wanted = {
        SHARD_NUMBER.sub("", p): Wanted(files[OUTPUT_MANIFEST])
        for p, files in found.items()
        if OUTPUT_MANIFEST in files
    }
    return fetched(wanted, path, settings)


def fetched(wanted: dict[str, Wanted], path: str, settings) -> dict[str, Path]:
    """Local copies of files, by the same keys. The first process fetches what is missing."""
    paths = {key: want.path(settings) for key, want in wanted.items()}

    def absent() -> list[str]:
        return [key for key, copy in paths.items() if not is_whole(copy, wanted[key].thing.size)]

    try:
        if not settings.folder:
            own_folder(settings.place, "data.stream.folder")
        if absent():
            with locked(settings.place / "indices" / "lock"):
                fetch([(wanted[key], paths[key]) for key in absent()], path, opening_patience_s(settings))
    except OSError as error:
        raise UserError(
            f"data.stream.folder must be on a disk with room that this user can write, but {settings.place} is not: "
            f"{error.strerror}; set it to another"
        ) from None
    return paths


def is_whole(copy: Path, size: int) -> bool:
    try:
        return copy.stat().st_size == size
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(path: Path):
    """One process at a time is in here; the others wait. A lock ends with its process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch(missing: list[tuple[Wanted, Path]], path: str, patience_s: float) -> None:
    if not missing:
        return
    size = sum(want.thing.size for want, _ in missing)
    log.info(f"corpus {path}: fetching {len(missing):,} indices and sidecars, {size / 2**20:,.1f} MiB")
    for folder in {copy.parent for _, copy in missing}:
        folder.mkdir(exist_ok=True)
        for left in folder.glob(f"*{PART}"):  # of a process that was killed: we hold the lock
            left.unlink()
    with ThreadPoolExecutor(min(PARALLEL, len(missing))) as pool:
        tasks = [pool.submit(fetch_one, want, copy, patience_s) for want, copy in missing]
        try:
            for task in tasks:
                task.result()
        finally:
            pool.shutdown(cancel_futures=True)


def fetch_one(want: Wanted, copy: Path, patience_s: float) -> None:
    """The copy is there whole and as recorded, or not at all. A lost rename costs another fetch, so the folder is not synced."""
    thing, staged, what = want.thing, copy.with_name(copy.name + PART), f"corpus file {want.thing.url} must be readable"
    starts = range(0, thing.size, PIECE)
    pieces = (objects.read(thing, start, min(start + PIECE, thing.size), what, patience_s) for start in starts)
    found = write_file(staged, pieces)
    if want.sha256:
        shards.check_digest(thing.url, found.sha256, want.sha256)
    staged.rename(copy)
