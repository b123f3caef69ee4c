"""What a run's own files say of it, for its model card: run file, metrics, log and the checkpoint's progress.

Note: a fact that no file has is None, and the card says so. Names are cut to their last part, because a path says where
somebody's disk is.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

from ted_scale.checkpoints.progress import Progress, read_progress
from ted_scale.config.run import Run
from ted_scale.distill.pairs import CUT
from ted_scale.distill.stages import stages_of
from ted_scale.report.folder import RunSeen, read_run, text_of
from ted_scale.storage.hub import is_path
from ted_scale.storage.objects import is_remote

SHAPE = r"[\w.-]+, \d+ blocks, width \d+, vocabulary \d+, [\d,.]+(?: M)? parameters"
MODEL = rf"^{{side}}: (?P<shape>{SHAPE}), from .*, fingerprint (?P<print>\w+)$"
CORPUS = r"^corpus {name}: (?P<tokens>[\d,]+) tokens to train on, (?P<held>[\d,]+) held out, digest (?P<digest>\w+)"
STAGE = r"^stage (?P<name>\w+): (?P<steps>[\d,]+) steps, .*, (?P<flops>[\d.e+]+) FLOPs$"
RANKS = r"^(?:\S+ )?run \S+: method \w+, \w+, (?P<ranks>\d+) ranks?,"
DEVICE = r"losses: \w+ kernels on (?P<device>[\w ().+-]+?)(?: \(auto\)|,|$)"


class Side(NamedTuple):
    name: str
    hub_id: str | None
    shape: str | None
    fingerprint: str | None


class Held(NamedTuple):
    """Losses on held-out text: of the student at its start and now, and of the teacher."""

    before: float | None
    after: float | None
    teacher: float | None


class Text(NamedTuple):
    name: str
    weight: float
    tokens: str | None
    held_out: str | None
    digest: str | None
    read: int | None  # tokens of it by the last row


class Facts(NamedTuple):
    run: Run
    progress: Progress
    teacher: Side | None
    student: Side
    was_cut: bool
    held: dict[str, Held]  # by corpus; "" is all of it
    texts: list[Text]
    flops: dict[str, str]  # of each stage with all of its steps
    planned: int | None  # steps of all stages
    ranks: str | None
    device: str | None
    suite: dict[str, float]


def gather(folder: Path, checkpoint: Path, run: Run, student: Path) -> Facts:
    seen, progress = read_run(folder), read_progress(checkpoint)
    log = text_of(folder / "log.txt", [], end=True)
    stages = {found["name"]: found for found in re.finditer(STAGE, log, re.M)}
    return Facts(
        run=run, progress=progress, teacher=side("teacher", run.teacher.path, log) if run.teacher and run.method != "ce" else None,
        student=side("student", run.student.path, log), was_cut=(student / CUT).is_file(),
        held={
            name: held(seen, name, stages_of(run)[-1].first_step, progress.step)
            for name in ("", *(corpus.name for corpus in run.data.corpora))
        },
        texts=[text(seen, log, corpus, progress.step) for corpus in run.data.corpora],
        flops={name: found["flops"] for name, found in stages.items()}, planned=seen.total_steps,
        ranks=last(RANKS, log).get("ranks"), device=last(DEVICE, log).get("device"),
        suite={key.removeprefix("val/suite/"): value for key in seen.series if key.startswith("val/suite/")
               and (value := until(seen, key, progress.step)) is not None},
    )  # fmt: skip


def last(pattern: str, log: str) -> dict[str, str]:
    """Of the newest line: a log has those of every start. Empty if there is none."""
    lines = [found.groupdict() for found in re.finditer(pattern, log, re.M)]
    return lines[-1] if lines else {}


def side(name: str, path: str, log: str) -> Side:
    found = last(MODEL.format(side=name), log)
    return Side(last_part(path), None if is_path(path) else path, found.get("shape"), found.get("print"))


def last_part(path: str) -> str:
    """A hub id is public; of a path or an address only the last part says what it is."""
    if is_remote(path) or is_path(path):
        return Path(path.partition("://")[2] or path).name or "a folder"
    return path


def held(seen: RunSeen, corpus: str, start: int, step: int) -> Held:
    """A run validates its student first where stage II starts."""
    of = f"val/{corpus}/" if corpus else "val/"
    first = seen.series.get(f"{of}loss")
    before = first.values[0] if first and first.steps[0] == start and math.isfinite(first.values[0]) else None
    return Held(before, until(seen, f"{of}loss", step), until(seen, f"{of}teacher_loss", step))


def until(seen: RunSeen, key: str, step: int) -> float | None:
    """The last number that was measured up to the checkpoint."""
    series = seen.series.get(key)
    found = [value for at, value in zip(*series, strict=True) if at <= step] if series else []
    return found[-1] if found and math.isfinite(found[-1]) else None


def text(seen: RunSeen, log: str, corpus, step: int) -> Text:
    found, read = last(CORPUS.format(name=re.escape(corpus.name)), log), until(seen, f"data/{corpus.name}/tokens", step)
    tokens, held_out, digest = (found.get(key) for key in ("tokens", "held", "digest"))
    return Text(corpus.name, corpus.weight, tokens, held_out, digest, None if read is None else int(read))
