"""A commented run file for a teacher and a text: ted-scale init --teacher MODEL --text FOLDER [--prepare]

With --prepare the text is tokenized and the student is cut, too, so that one more command starts the run. Without, the next
commands are printed, and the text's tokens are estimated from its beginning. What exists is used as it is.
"""

import argparse
import json
import logging
import re
import shlex
import tempfile
from pathlib import Path
from typing import NamedTuple

from ted_scale.base.counts import millions
from ted_scale.base.durable import write_durably
from ted_scale.base.errors import UserError, files_at
from ted_scale.base.exits import run_main
from ted_scale.corpora.output import manifest_path, read_manifest
from ted_scale.storage.objects import is_remote

SAMPLE = 2_000_000  # characters of the text that are tokenized for an estimate
REFIT_TOKENS, REFIT_ROW = 16_384, 512  # what cut-student reads by default


class Places(NamedTuple):
    """`corpus` is where the shards are or will be, `text` is None where they are there already."""

    teacher: str
    student: str
    corpus: str
    text: str | None
    layers: int | None  # of the student that is to be cut; None if it is there
    context: int | None  # of the teacher


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    out = Path(arguments.out)
    logging.disable(logging.WARNING)  # DeepSpeed logs to stdout
    if out.exists() and not arguments.overwrite:
        raise UserError(f"--out must be a new file, but {out} is there; name another one, or pass --overwrite")
    print(f"reading {arguments.teacher} ...", flush=True)
    from ted_scale.models.inspection import inspect
    from ted_scale.storage.hub import TOKENIZER, find_folder

    folder = find_folder("--teacher", arguments.teacher, TOKENIZER)
    teacher = inspect("--teacher", str(folder), needs_weights=Path(arguments.teacher).is_dir(), is_frozen=True)
    places = places_of(arguments, teacher)
    if arguments.prepare:
        places = prepared(places)
    tokens = tokens_of(places, folder)
    text = written(places, teacher, tokens, arguments)
    with files_at(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(out, text)
    if places.text is None and places.layers is None:
        check(out, arguments.ranks)
    ranks = f"{arguments.ranks} rank{'s' if arguments.ranks > 1 else ''}; for others run init again with --ranks N --overwrite"
    counted = f"{tokens:,} tokens{' by estimate' if places.text else ''}"
    print(f"{out}: {places.teacher} -> {places.student}, {counted}, for {ranks}")
    print("\n".join(["next:", *(f"  {line}" for line in commands(places, out, tokens, arguments.ranks))]))


def check(out: Path, ranks: int) -> None:
    """As a dry run does: what is left to do is to start it."""
    from ted_scale.config.run_file import load_run
    from ted_scale.plan import make_plan

    make_plan(load_run(out), ranks)


def places_of(arguments, model) -> Places:
    """Where things are, or will be."""
    teacher, text, layers = arguments.teacher, arguments.text, model.layers
    is_corpus = is_remote(text) or has_shards(text)
    corpus = text if is_corpus else f"corpora/{name_of(text)}"
    cut = arguments.layers or max(1, layers // 2)
    student = arguments.student or f"models/{name_of(teacher)}_{cut}_blocks"
    if not 0 < cut <= layers:
        raise UserError(f"--layers must be from 1 to the teacher's blocks ({layers}), but is {cut}; correct it")
    if not arguments.student and (Path(student) / "config.json").exists():
        refuse_another_teacher(teacher, model, student)
    is_there = (Path(student) / "config.json").exists() or (arguments.student and not looks_new(student))
    return Places(teacher, student, corpus, None if is_corpus else text, None if is_there else cut, model.max_length)


def refuse_another_teacher(teacher: str, model, student: str) -> None:
    """A student that is found by its name alone may be of a teacher of the same name elsewhere."""
    from ted_scale.distill.pairs import CUT, read_cut, shape_of
    from ted_scale.models.inspection import inspect

    cut = read_cut(inspect("--student", student, needs_weights=False))
    if cut and cut["teacher"] != shape_of(model):
        raise UserError(
            f"--teacher {teacher} must be the one that {student} was cut from, but its {CUT} is of another; name another folder "
            "by --student"
        )


def refuse_another_text(text: str, corpus: str) -> None:
    """A corpus that is found by its name alone may be of a folder of the same name elsewhere, or of what was there before."""
    from ted_scale.commands.tokenize_corpus import describe_sources
    from ted_scale.corpora.documents import find_files

    manifest = manifest_path(corpus)
    if resolved(read_manifest(manifest)["sources"]) != resolved(describe_sources(find_files([text]))):
        raise UserError(
            f"--text {text} must be what {corpus} was made of, but {manifest} lists other files, or they changed; rename the "
            f"folder of the text, remove {corpus}.*, or pass --text {corpus}"
        )


def resolved(sources: list[dict]) -> list[dict]:
    return [{**source, "path": str(Path(source["path"]).resolve())} for source in sources]


def looks_new(student: str) -> bool:
    from ted_scale.storage.hub import is_path

    return is_path(student)


def has_shards(path: str) -> bool:
    """A manifest is there for several shards, too, which are NAME-00001.idx and so on."""
    is_output = Path(f"{path}.idx").exists() or manifest_path(path).exists()
    return is_output or (Path(path).is_dir() and any(Path(path).glob("*.idx")))


def name_of(path: str) -> str:
    """The last part, as a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", Path(path).resolve().name).strip("._-") or "text"


def tokens_of(places: Places, tokenizer: Path) -> int:
    """Of shards that are there as their headers say, of text by its beginning."""
    if places.text is None:
        return count(places.corpus)
    from ted_scale.corpora.documents import find_files, read_documents, refuse
    from ted_scale.corpora.tokenizer import load_tokenizer

    files, encode = find_files([places.text]), load_tokenizer(str(tokenizer)).encode
    size, characters, tokens, consumed = sum(path.stat().st_size for path in files), 0, 0, 0
    for document in read_documents(files, on_error=refuse):
        tokens += len(encode([document.text])[0]) + 1
        characters, consumed = characters + len(document.text), document.consumed
        if characters >= SAMPLE:
            break
    return int(tokens * size / consumed) if consumed else 0


def count(corpus: str) -> int:
    from ted_scale.config.data import Streaming
    from ted_scale.corpora.corpus import read_corpus

    return sum(index.tokens for index in read_corpus(corpus, Streaming()))


def prepared(places: Places) -> Places:
    """What is not there yet is made by the commands that a user would type. They say themselves how far they are."""
    from ted_scale.commands import cut_student, tokenize_corpus

    if places.text is not None:
        if manifest_path(places.corpus).exists():
            refuse_another_text(places.text, places.corpus)
        else:
            print(f"tokenizing {places.text} ...", flush=True)
            tokenize_corpus.main(tokenize_words(places))
        places = places._replace(text=None)
    if places.layers is not None:
        print(f"cutting {places.student}, and fitting it to its teacher: minutes for 100 M parameters ...", flush=True)
        cut_student.main(cut_words(places, count(places.corpus)))
        places = places._replace(layers=None)
    return places


def tokenize_words(places: Places) -> list[str]:
    return ["--tokenizer", places.teacher, "--out", places.corpus, places.text]


def cut_words(places: Places, tokens: int) -> list[str]:
    """Blocks by influence, fitted to the teacher, on the text: the best start that was measured (docs/choosing.md)."""
    words = [places.teacher, places.student, "--layers", str(places.layers), "--text", places.corpus]
    read, row = min(REFIT_TOKENS, tokens // 4), min(REFIT_ROW, places.context or REFIT_ROW, max(1, tokens // 256))
    words += ["--tokens", str(read)] if read < REFIT_TOKENS else []
    return words + (["--seq-len", str(row)] if row < REFIT_ROW else [])


def written(places: Places, teacher, tokens: int, arguments) -> str:
    """The run file's text, after it was read and planned for the ranks here."""
    from ted_scale.commands import run_text
    from ted_scale.forecast.placement import of_this_machine

    rank = of_this_machine(arguments.ranks)
    with tempfile.TemporaryDirectory() as folder:
        shape = places.student if places.layers is None else trial(teacher, places.layers, Path(folder))
        choices = chosen(places, shape, teacher, tokens, rank, arguments)
    head = [
        f"{places.teacher} -> {places.student}, on {places.corpus}. Written by init for {arguments.ranks} "
        f"rank{'s' if arguments.ranks > 1 else ''} on {rank.device}: each value is a start by rule, with its reason above it.",
        'A line "#key = value" is a default; remove the # to change it. Every key: docs/keys.md.',
        *commands(places, Path(arguments.out), tokens, arguments.ranks),
    ]
    return run_text.text_of(choices, head)


def trial(teacher, layers: int, folder: Path) -> str:
    """The config of the student to come, for its sizes."""
    from ted_scale.commands.cutting.sizes import cut_config

    (folder / "config.json").write_text(json.dumps(cut_config(teacher, list(range(layers)), None)), encoding="utf-8")
    return str(folder)


def chosen(places: Places, shape: str, teacher, tokens: int, rank, arguments) -> dict:
    """Every choice by its dotted key. The teacher is inspected in its folder: a hub id would download its weights."""
    from ted_scale.commands.first_run import Choice, Given, of_budget, of_memory, of_model, of_text, plan_to_size
    from ted_scale.models.inspection import inspect

    student = inspect("--student", shape, needs_weights=False)
    lengths = [length for length in (student.max_length, teacher.max_length) if length]
    given = Given(tokens, min(lengths, default=None), student.parameters, rank, arguments.ranks)
    choices = of_text(given)
    validation, seq_len = choices.pop("validation"), choices["data.seq_len"].value
    corpora = [{"path": places.corpus, "validation": validation.value}]
    smallest = {
        "name": name_of(Path(arguments.out).stem), "method": arguments.method, "student": {"path": shape},
        "teacher": {"path": str(teacher.folder)}, "data": {"seq_len": seq_len, "corpora": corpora},
        "train": {"steps": 2, "micro_batch": 1, "tokens_per_step": seq_len * arguments.ranks, "lr": 1e-3},
    }  # fmt: skip
    choices |= of_model(given)
    smallest["train"]["precision"] = choices["train.precision"].value
    given = given._replace(tokens=round((1 - validation.value) * tokens))  # the others are held out
    choices |= of_memory(plan_to_size(smallest, arguments.ranks), given)
    choices |= of_budget(given, seq_len, choices["train.micro_batch"].value)
    return choices | {
        "name": Choice(smallest["name"], "of the run's folder, runs/NAME"),
        "method": Choice(
            arguments.method, "ce: the text alone; kd: with the teacher's logits; lwd: its states; ted: filtered states"
        ),
        "teacher.path": Choice(
            places.teacher,
            f"local folder or hub id: {teacher.layers} blocks, {millions(teacher.parameters, 1)} parameters",
        ),
        "student.path": Choice(
            places.student, f"{student.layers} blocks of {teacher.layers}, {millions(student.parameters, 1)} parameters"
        ),
        "data.corpora": Choice(corpora, f"validation: {validation.why}"),
    }


def commands(places: Places, out: Path, tokens: int, ranks: int) -> list[str]:
    """From here to a model."""
    pretrain = ["ted-scale", "pretrain"]
    several = ["deepspeed", "--num_gpus", str(ranks), "--module", "ted_scale.commands.pretrain"]
    todo = [["ted-scale", "tokenize", *tokenize_words(places)]] if places.text else []
    todo += [["ted-scale", "cut-student", *cut_words(places, tokens)]] if places.layers else []
    todo += [
        [*pretrain, "--config", str(out), "--dry-run", "--ranks", str(ranks)],
        [*(pretrain if ranks == 1 else several), "--config", str(out)],
        ["ted-scale", "export", f"runs/{name_of(out.stem)}"],
    ]
    return [shlex.join(words) for words in todo]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, metavar="MODEL", help="a folder or a hub id")
    parser.add_argument(
        "--text", required=True, metavar="FOLDER", help="of text files, or of shards that are tokenized already"
    )
    parser.add_argument(
        "--student", metavar="FOLDER", help="a model that is there, or where to cut one; default: models/…"
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="blocks of a student to cut; default: half of the teacher's"
    )
    parser.add_argument("--method", choices=("ce", "kd", "lwd", "ted"), default="ted")
    parser.add_argument("--out", default="run.toml", metavar="FILE", help="default: run.toml; its name is the run's")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="how many ranks will start; default: one a GPU, or one on a CPU"
    )
    parser.add_argument("--prepare", action="store_true", help="also tokenize the text and cut the student")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    arguments = parser.parse_args(argv)
    if arguments.ranks is not None and arguments.ranks < 1:
        raise UserError(f"--ranks must be at least 1, but is {arguments.ranks}; correct it")
    arguments.ranks = arguments.ranks or ranks_here()
    return arguments


def ranks_here() -> int:
    import torch

    return max(1, torch.cuda.device_count())


if __name__ == "__main__":
    run_main(main)
