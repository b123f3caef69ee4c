"""An unfinished output: the hidden folder .NAME.unfinished beside it, until its shards and manifest are published.

writer.py fills it. The manifest describes the whole output: its job (tokenizer, options, source files), totals, and a digest
of every shard's sidecar; the sidecar describes the shard. Note: a manifest in the folder means that renaming has begun, and
a restart then only continues to rename.
"""

import fcntl
import hashlib
import os
import re
from pathlib import Path

from ted_scale.base import beneath
from ted_scale.base.durable import sync, write_durably
from ted_scale.base.errors import UserError, files_at
from ted_scale.base.parsing import fits, parse_json
from ted_scale.base.paths import checked_name, inside
from ted_scale.base.sealed import LARGEST_TEXT
from ted_scale.corpora.local import unfinished
from ted_scale.corpora.shards import OUTPUT_MANIFEST
from ted_scale.corpora.writer import as_text, finished_shards, part

TOTALS = ("documents", "tokens")
MANIFEST_KEYS = {"shards": list, "sources": list, "documents": int, "tokens": int, "empty": int, "skipped": int}
ROW_KEYS: dict[str, dict[str, type]] = {
    "shards": {"name": str, "sidecar_sha256": str},
    "sources": {"path": str, "bytes": int},
}


def claim(out: Path):
    """Lock the unfinished folder. The lock is the open file, and ends with the process."""
    if out.is_dir() or out.name.endswith((".bin", ".idx")):
        raise UserError(
            f"--out must be a prefix like FOLDER/NAME without ending, but is {out}; add or shorten the name"
        )
    try:
        beneath.keep_inside(out.parent)
        beneath.make_folder(unfinished(out))
        lock = os.fdopen(beneath.open_plain(unfinished(out) / "lock", os.O_RDWR), "r+")
    except OSError as error:
        raise UserError(f"--out must be where files can be written, but {out} is not: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError(f"--out {out} must be written by one run, but another one is writing it; wait for it") from None
    return lock


def begin(out: Path, job: dict, overwrite: bool) -> list[dict]:
    """The sidecars of the finished shards. The same job continues after them; with --overwrite another job starts over."""
    folder = unfinished(out)
    finished, publishing = finished_shards(folder), bool(staged_manifest(out))
    if not (overwrite or publishing) and any(path.suffix == ".idx" for path in existing(out)):
        raise UserError(f"--out {out} must be a new name, but exists; choose another or pass --overwrite")
    try:
        begun = read_job(folder / "job.json")
    except ValueError:
        if not overwrite:
            raise UserError(
                f"{folder}/job.json must say what was begun, but is damaged; pass --overwrite to begin anew"
            ) from None
        begun = {}
    changes = changed(begun, job)
    if begun and changes and (finished or publishing) and not overwrite:
        raise UserError(
            f"--out {out} must go on with the command that began it, but {changes[0]} changed since; run that command "
            "again, or pass --overwrite to begin anew"
        )
    if changes:
        clear(folder)
        finished = []
    write_durably(folder / "job.json", as_text(job))
    return finished


def changed(begun: dict, job: dict) -> list[str]:
    """What of a job differs, by its flags. --on-error skip may be added, because a run may have stopped at an error."""
    flags = {f"--{key.replace('_', '-')}": value for key, value in begun.get("options", {}).items()}
    wanted = {f"--{key.replace('_', '-')}": value for key, value in job["options"].items()}
    if wanted.get("--on-error") == "skip":
        flags["--on-error"] = "skip"
    names = {
        "sources": "the input files",
        "json": "how .json files are read",
        "template_sha256": "--chat-template",
        "day": "the day, which the chat template asks for,",
    }
    rest = [names.get(key, "--tokenizer") for key in job if key != "options" and begun.get(key) != job[key]]
    return rest + [flag for flag in wanted if flags.get(flag) != wanted[flag]]


def clear(folder: Path) -> None:
    """The job goes first: if this is killed half-way, files without a job are deleted by the next start."""
    for path in [folder / "job.json", *folder.iterdir()]:
        if path.name != "lock":
            beneath.unlink(path)


def leave(out: Path) -> None:
    """After a run that failed: remove the folder, unless it has finished shards, which the next run uses."""
    folder = unfinished(out)
    if folder.exists() and not finished_shards(folder) and not staged_manifest(out):
        beneath.discard(folder)


def staged_manifest(out: Path) -> dict:
    """The manifest of a run that began to publish and did not finish; {} if there is none."""
    return read_manifest(unfinished(out) / "manifest.json")


def publish(out: Path, manifest: dict) -> None:
    """Rename all files to their names: an older output goes first, every .bin comes before any .idx, the manifest last."""
    folder = unfinished(out)
    if not staged_manifest(out):
        write_durably(folder / "manifest.json", as_text(manifest))
    moves = {
        inside(out.parent, shard["name"] + ending, folder / "manifest.json"): part(folder, number, ending)
        for ending in (".bin", ".json", ".idx")
        for number, shard in enumerate(manifest["shards"], 1)
    }
    done = {to for to, staged in moves.items() if to.exists() and not staged.exists()}
    for old in sorted(existing(out), key=lambda path: path.suffix != ".idx"):
        if old not in done:
            old.unlink()
    for to, staged in moves.items():
        if to not in done:
            staged.rename(to)
    sync(out.parent)
    (folder / "manifest.json").rename(manifest_path(out))
    sync(out.parent)
    beneath.discard(folder)


def describe(name: str, job: dict, sidecars: list[dict], left_out: dict) -> dict:
    """The manifest: one shard is called NAME, several NAME-00001 and so on."""
    numbered = len(sidecars) > 1
    names = [f"{name}-{number:05d}" if numbered else name for number in range(1, len(sidecars) + 1)]
    digests = [hashlib.sha256(as_text(sidecar).encode()).hexdigest() for sidecar in sidecars]
    return sealed(
        {
            **job,
            **{key: sum(sidecar[key] for sidecar in sidecars) for key in TOTALS},
            **left_out,
            "shards": [{"name": n, "sidecar_sha256": d} for n, d in zip(names, digests, strict=True)],
        }
    )


def sealed(manifest: dict) -> dict:
    """The manifest with a digest of its content, so that an edited one is detected."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return {**rest, "digest": hashlib.sha256(as_text(rest).encode()).hexdigest()}


def manifest_path(out: str | Path) -> Path:
    return Path(f"{out}{OUTPUT_MANIFEST}")


def read_manifest(path: Path, called: str = "") -> dict:
    """The manifest of a published output, checked; {} where there is none, as for shards of other tools. Sentences use
    `called` for the copy of a remote one."""
    with files_at(called or path):
        try:
            manifest = read_json(path)
            sound = not path.exists() or sealed(manifest) == manifest
        except (ValueError, AttributeError):
            sound = False
    if not sound:
        raise UserError(
            f"{called or path} must be as it was written, but its digest is another; copy it again, or delete it"
        )
    if manifest and not (
        fits(manifest, MANIFEST_KEYS)
        and all(fits(row, keys) for key, keys in ROW_KEYS.items() for row in manifest[key])
    ):
        raise UserError(f"{called or path} must describe an output, but does not; copy it again, or delete it")
    for shard in manifest.get("shards", ()):
        checked_name(shard["name"], called or path)
    return manifest


def read_job(path: Path) -> dict:
    job = read_json(path)
    if job and not fits(job, {"options": dict}):
        raise ValueError("it describes no job")
    return job


def read_json(path: Path) -> dict:
    """What the file holds, which may be a link to it; {} where there is no file."""
    if not path.exists():
        return {}
    if not path.is_file() or path.stat().st_size > LARGEST_TEXT:
        raise ValueError("it is no plain file, or too large")
    return parse_json(path.read_text(encoding="utf-8"))


def existing(out: Path) -> list[Path]:
    """The files of a published output of this name."""
    ours = re.compile(rf"{re.escape(out.name)}((-\d{{5}})?\.(bin|idx|json)|\.manifest\.json)")
    return [path for path in out.parent.iterdir() if ours.fullmatch(path.name)]
