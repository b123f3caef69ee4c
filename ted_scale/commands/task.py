"""Data of a task in, pairs to train on and a judge out: ted-scale task NAME --data PATH ... --out FOLDER

FOLDER/train.jsonl has prompts and completions for `ted-scale tokenize --targets completion`, FOLDER/held_out.jsonl what the
judge asks, and FOLDER/TASK.yaml is lm-eval's task of it. Note: without --held-out a fifth of the items is held out, and TASK is
NAME_split, because such scores are no scores of the public task.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from ted_scale.base.durable import write_durably
from ted_scale.base.errors import UserError, files_at
from ted_scale.base.exits import run_main
from ted_scale.base.parsing import parse_json
from ted_scale.corpora import sides, task_files
from ted_scale.corpora.documents import find_files, read_documents
from ted_scale.corpora.tasks import TASKS, Item, Task, item_of

YAML = """\
# Made by `ted-scale task {name}`: {what}
task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {{validation: held_out.jsonl}}
validation_split: validation
doc_to_text: prompt
target_delimiter: ""
{judge}metadata:
  version: 1.0
"""
CHOICES = """\
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITES = """\
output_type: generate_until
doc_to_target: "{{answers[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 32, do_sample: false}
process_results: !function ted_scale.evaluation.answers.judged
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: f1, aggregation: mean, higher_is_better: true}
"""
OWN_SPLIT = "a split of its own, whose scores never stand beside those of the public task."
GIVEN = "the held-out items that were given."


def items_in(name: str, inputs: list[str]) -> list[Item]:
    """All of the files, in their order."""
    items = [item_at(TASKS[name], place, row) for place, row in rows_in(name, inputs)]
    if not items:
        raise UserError(
            f"{' '.join(inputs)} must hold rows of {name}, but holds none; name its train or validation split"
        )
    return items


def rows_in(name: str, inputs: list[str]) -> Iterator[tuple[str, dict]]:
    """(where it is, row); the data sets' own files are read only where they are named."""
    for path in find_files(inputs):
        yield from task_files.rows_of(path, name) if task_files.is_own(path, name) else records(path, TASKS[name])


def records(path: Path, task: Task) -> Iterator[tuple[str, dict]]:
    for document in read_documents([path], (*task.asks, *task.columns), on_error=refuse):
        place = f"{path}:{document.line}"
        yield place, row_of(place, document.text)


def refuse(error: UserError) -> None:
    raise UserError(str(error).replace(" or pass --on-error skip", ""))


def row_of(place: str, record: str) -> dict:
    try:
        row = parse_json(record)
    except ValueError as error:
        raise UserError(f"{place} must be a JSON object, but is not ({error}); correct it") from None
    if not isinstance(row, dict):
        raise UserError(
            f"{place} must be a JSON object, but is {type(row).__name__}; name JSON lines, Parquet or Arrow"
        )
    return row


def item_at(task: Task, place: str, row: dict) -> Item:
    try:
        return item_of(task, row)
    except ValueError as error:
        raise UserError(f"{place} {error}") from None


def written_to(folder: Path, args: argparse.Namespace, train: list[Item], held_out: list[Item]) -> Path:
    """The judge's file, which is written last."""
    name, own_split = args.name, not args.held_out
    task = f"{name}_split" if own_split else f"{name}_held_out"
    chooses = held_out[0].right is not None
    judge, what = CHOICES if chooses else WRITES, OWN_SPLIT if own_split else GIVEN
    for old in judges_of(folder, name):
        old.unlink(missing_ok=True)  # it would ask these items by the name of others
    write_lines(folder / "train.jsonl", map(conversation if args.conversations else pair, train))
    write_lines(folder / "held_out.jsonl", map(asked, held_out))
    file = folder / f"{task}.yaml"
    write_durably(file, YAML.format(name=name, task=task, what=what, judge=judge))
    return file


def pair(item: Item) -> dict:
    return {"prompt": item.prompt, "completion": item.completion}


def conversation(item: Item) -> dict:
    """The item as chat messages. The chat template adds the space between turns."""
    turns = (("user", item.prompt), ("assistant", item.completion.strip()))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def asked(item: Item) -> dict:
    """A pair, too, so that its loss can be measured beside the judge's scores."""
    answers = {"answers": item.answers} if item.right is None else {"choices": item.answers, "answer": item.right}
    return {**pair(item), **answers}


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    write_durably(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=TASKS, metavar="NAME", help=", ".join(TASKS))
    files = "folders of Hugging Face datasets, .jsonl, .parquet, .arrow; GLUE's own .tsv, SQuAD's .json"
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help=files)
    parser.add_argument("--held-out", nargs="+", metavar="PATH", help="the held-out items; default: a fifth of --data")
    parser.add_argument("--conversations", action="store_true", help="train.jsonl has messages of user and assistant")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    return parser.parse_args(argv)


def refuse_other_task(folder: Path, name: str) -> None:
    """Two tasks in one folder would have one train.jsonl."""
    mine = judges_of(folder, name)
    if others := [file.name for file in folder.glob("*.yaml") if file not in mine]:
        raise UserError(f"--out must be a folder of {name} alone, but {folder} has {others[0]}; name another folder")


def judges_of(folder: Path, name: str) -> list[Path]:
    """Of a split of its own, and of items that were given."""
    return [folder / f"{name}_{kind}.yaml" for kind in ("split", "held_out")]


def two_sides(args: argparse.Namespace) -> tuple[list[Item], list[Item]]:
    items = items_in(args.name, args.data)
    if args.held_out:
        held_out = items_in(args.name, args.held_out)
        if prompts_of(held_out) <= prompts_of(items):
            raise UserError(
                "--held-out must have items that --data has not, but has none; name another split, or leave it out for a fifth "
                "of --data"
            )
        return items, held_out
    marks = sides.is_held_out([item.texts for item in items])
    train, held_out = ([i for i, mark in zip(items, marks, strict=True) if mark is side] for side in (False, True))
    if not train or not held_out:
        raise UserError(
            f"--data must have items that are unlike enough to hold some out, but all {len(items):,} fall on one side; add "
            "data, or give --held-out"
        )
    return train, held_out


def prompts_of(items: list[Item]) -> set[str]:
    return {item.prompt for item in items}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with files_at(args.out):
        refuse_other_task(args.out, args.name)
        train, held_out = two_sides(args)
        args.out.mkdir(parents=True, exist_ok=True)
        file = written_to(args.out, args, train, held_out)
    print(f"{len(train):,} items of {args.name} to train on, {len(held_out):,} held out -> {args.out}; judge: {file}")
    if twice := len(prompts_of(train) & prompts_of(held_out)):
        print(
            f"{twice:,} prompts are on both sides: take other items for --held-out, or the judge asks what was learned"
        )
    if not args.held_out:
        print(f"{file.stem} is {OWN_SPLIT}")


if __name__ == "__main__":
    run_main(main)
