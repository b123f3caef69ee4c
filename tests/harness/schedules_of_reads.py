"""A schedule of reads: a run without engines reads STEPS steps of two corpora, in up to FAULTY lives under random faults and
then in one without. `run` returns the first property that did not hold.

Every batch is that of an undisturbed run, and a life ends done or with a sentence. One corpus is a family of shards with a
manifest, the last of which is younger: a stale listing lacks it. Note: the parent process opens no corpus, because its forks
would inherit what it knows.
"""

import json
import random
import time
from pathlib import Path

import drawn_faults
import lives
import numpy
from corpus import counting_documents, data_section, steps, write_shard
from faulty_files import Faults
from lives import live

from ted_scale.corpora.output import sealed
from ted_scale.data.stream import open_stream

STEPS, FAULTY, VOCABULARY = 10, 3, 60_000
SHAPE = {"samples_per_step": 4, "micro_batch": 2}
PATHS = ("/*", "/web*", "/code*", "/*.idx", "/*.bin", "/*.json")
AGE_S = 0.5  # between the shards of a family


def run(seed: int, place: Path, faults: Faults) -> tuple[str | None, list[str]]:
    """(what was wrong, how the lives ended)"""
    rng, ends = random.Random(seed), []
    corpora = place.parent / "corpora"
    if not corpora.exists():
        make_corpora(corpora)
        faults.arm([])
        live(1, place / "undisturbed", faults.folder, read, corpora, place, 0, corpora.with_name("expected.npy"))
    for life in range(FAULTY + 1):
        rules = drawn_faults.drawn(rng, drawn_faults.READS, [f"{corpora}{path}" for path in PATHS])
        faults.arm([with_age(rule, corpora) for rule in rules] if life < FAULTY else [])
        was_read, struck = done_before(place), len(faults.log())
        end = live(1, place / f"life_{life}", faults.folder, read, corpora, place, was_read, None)[0]
        ends.append(end.kind)
        if wrong := lives.wrong_end([end], faults.log()[struck:]):
            return f"life {life}: {wrong}", ends
        if end.kind == "done":
            return None, ends
    return f"without faults the run did not end: {end}", ends


def make_corpora(folder: Path) -> None:
    """Every token is its own place in both corpora."""
    rng = random.Random(0)
    shards = []
    for number in range(1, 4):
        name = f"web-{number:05d}"
        write_shard(
            folder / name, documents := counting_documents([rng.randint(3, 90) for _ in range(90)], number * 10_000)
        )
        about = {"max_token_id": documents[-1][-1], "tokens": sum(map(len, documents))}
        (folder / f"{name}.json").write_text(json.dumps(about))
        shards.append({"name": name, "sidecar_sha256": ""})
        if number == 2:
            time.sleep(AGE_S)
    totals = {"sources": [], "documents": 0, "tokens": 0, "empty": 0, "skipped": 0}
    (folder / "web.manifest.json").write_text(json.dumps(sealed({**totals, "shards": shards})))
    write_shard(folder / "code", counting_documents([rng.randint(3, 90) for _ in range(90)]))


def with_age(rule, corpora: Path):
    """A stale listing lacks the last shard, and has the others."""
    if rule.action != "stale":
        return rule
    return rule._replace(value=time.time() - (corpora / "web-00003.bin").stat().st_ctime + AGE_S / 2)


def done_before(place: Path) -> int:
    path = place / "steps"
    return int(path.read_text()) if path.exists() else 0


def read(corpora: Path, place: Path, first: int, record: Path | None) -> None:
    """A life: read the steps from `first` on, and compare or record them."""
    lives.shorten_patience()
    data = data_section(
        str(corpora / "web"), str(corpora / "code"), seq_len=16, attention="document", weights=[2.0, 1.0]
    )
    stream, each = open_stream(data, 7, VOCABULARY), SHAPE["samples_per_step"]
    drawn = steps(stream, start=first * each, stop=STEPS * each, **SHAPE)
    found = (numpy.stack([[micro.tokens_BT.numpy(), micro.labels_BT.numpy()] for micro in step]) for step in drawn)
    if record:
        numpy.save(record, numpy.stack(list(found)))
        return
    expected = numpy.load(corpora.with_name("expected.npy"))
    for number, step in enumerate(found, first):
        assert (step == expected[number]).all(), f"step {number} is not that of an undisturbed run"
        (place / "steps.part").write_text(str(number + 1))  # a kill in the middle leaves the number before
        (place / "steps.part").rename(place / "steps")
