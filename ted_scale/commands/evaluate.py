"""Judge models: ted-scale evaluate MODEL ... [--corpora PREFIX ...] [--suite NAME ...]

--corpora: loss and bits a byte on held-out shards. --suite: tasks of EleutherAI's lm-eval, by a suite's name (ted_public,
ted_paper, small) or by their own; with --tasks FOLDER they need no network. Models stand side by side in the table. MODEL is a
Hugging Face folder or a hub id. docs/evaluating.md says what is counted and how local task files are made.
"""

import argparse
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import NamedTuple

from ted_scale.base.errors import UserError, files_at
from ted_scale.base.exits import run_main
from ted_scale.commands.evaluation import results
from ted_scale.commands.evaluation.results import Result
from ted_scale.config.data import Data
from ted_scale.evaluation import suites
from ted_scale.evaluation.scores import Score
from ted_scale.storage.hub import find_folder

DTYPES = ("auto", "float32", "bfloat16", "float16")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a Hugging Face folder or hub id")
    text = parser.add_argument_group("held-out text")
    text.add_argument(
        "--corpora", nargs="+", metavar="PREFIX", default=[], help="shards, as in a run file; each a domain"
    )
    text.add_argument(
        "--held-out", type=float, default=0.0, metavar="SHARE", help="only this last share of each; default: all of it"
    )
    text.add_argument("--tokens", type=int, metavar="N", help="at most so many of each corpus; default: all")
    text.add_argument("--seq-len", type=int, default=1024, metavar="N", help="of a window; default: 1024")
    text.add_argument("--attention", choices=("causal", "document"), default="causal", help="default: causal")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--suite", nargs="+", metavar="NAME", default=[], help=f"{', '.join(suites.SUITES)}, or tasks")
    tasks.add_argument("--tasks", type=Path, metavar="FOLDER", help="task files and their data, instead of the hub")
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N of each task, to try it out")
    tasks.add_argument("--shots", type=int, metavar="N", help="examples in each prompt; default: the task's own")
    tasks.add_argument("--run-code", action="store_true", help="run code that the models write (humaneval, mbpp)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts at once; default: 8")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the model's own")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every score there")
    parser.add_argument("--wandb", metavar="PROJECT", help="a W&B run for each model; without a key it stays offline")
    arguments = parser.parse_args(argv)
    refuse_mistakes(arguments)
    return arguments


def refuse_mistakes(arguments: argparse.Namespace) -> None:
    if not arguments.corpora and not arguments.suite:
        raise UserError("--corpora or --suite must be given, but neither is; --suite small fits a small model")
    if arguments.tasks and not arguments.suite:
        raise UserError("--suite must name what to take from --tasks, but is not given")
    for name, least in (("tokens", 1), ("seq_len", 1), ("limit", 1), ("shots", 0), ("batch_size", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be {least} or more, but is {value}")
    if not 0 <= arguments.held_out < 1:
        raise UserError(f"--held-out must be at least 0 and below 1, but is {arguments.held_out}")


def folder_of(model: str) -> Path:
    """A model that a run is still training is not a Hugging Face folder yet."""
    path = Path(model)
    if (path / "run.toml").is_file() or (path / "progress.json").is_file():
        raise UserError(
            f"MODEL must be a Hugging Face folder, but {model} is a run's; make one of it with `ted-scale export "
            f"{model}` and name that"
        )
    folder = find_folder("MODEL", model).resolve()
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise UserError(
            f"MODEL must hold a config.json and *.safetensors, but {folder} does not; save it with save_pretrained"
        )
    return folder


def data_of(arguments: argparse.Namespace) -> Data | None:
    if not arguments.corpora:
        return None
    corpora = [{"path": path, "validation": arguments.held_out} for path in arguments.corpora]
    twice = [path for path in arguments.corpora if names_alike(path, arguments.corpora)]
    if twice:
        raise UserError(f"--corpora must end in another name each, but {' and '.join(twice)} do not")
    return Data.model_validate({"corpora": corpora, "seq_len": arguments.seq_len, "attention": arguments.attention})


def names_alike(path: str, paths: list[str]) -> bool:
    return sum(Path(other).name == Path(path).name for other in paths) > 1


def refuse_unwritable(file: Path) -> None:
    with files_at(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"--json must be a file that this user can write, but {file} is not; name another")


class Plan(NamedTuple):
    """All that is asked for, with no mistake left that can be found before a model is loaded."""

    folders: list[Path]
    readings: list  # of each model, what it reads of the corpora
    index: object  # lm-eval's
    asked: suites.Asked
    device: str


def make_plan(arguments: argparse.Namespace) -> Plan:
    folders, data = [folder_of(model) for model in arguments.models], data_of(arguments)
    if arguments.json:
        refuse_unwritable(arguments.json)

    from ted_scale.commands.evaluation import text  # imports torch: a mistake should not wait for it

    tokenizers = [text.tokenizer_in(folder) for folder in folders]  # also for lm-eval, which checks nothing in them
    readings = [
        text.plan(folder, tokenizer, data, arguments.tokens) if data else None
        for folder, tokenizer in zip(folders, tokenizers, strict=True)
    ]
    index, asked = None, suites.Asked([], [])
    if arguments.suite:
        index, asked = suites.load(arguments.suite, arguments.tasks, arguments.run_code)
    return Plan(folders, readings, index, asked, text.device_of(arguments.device))


def scores_of(arguments: argparse.Namespace, plan: Plan, number: int) -> list[Score]:
    from ted_scale.commands.evaluation import harness, text

    scores, dtype, batch = [], arguments.dtype, arguments.batch_size
    if plan.readings[number]:
        scores += text.measure(plan.readings[number], dtype, batch, plan.device)
    if plan.asked.specs:
        scores += harness.evaluate(
            plan.folders[number], plan.index, plan.asked, dtype=dtype, batch=batch, device=plan.device,
            limit=arguments.limit, shots=arguments.shots, run_code=arguments.run_code,
        )  # fmt: skip
    return scores


def settings_of(arguments: argparse.Namespace, plan: Plan) -> dict:
    """What a reader of the scores must know to get them again."""
    packages = ("ted_scale", "torch", "transformers", "lm_eval")
    own = {key: value for key, value in vars(arguments).items() if key not in ("models", "json", "wandb", "tasks")}
    return own | {
        "device": plan.device, "tasks": str(arguments.tasks or ""), "left_out": plan.asked.left_out,
        "versions": {name: version for name in packages if (version := version_of(name))},
    }  # fmt: skip


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    plan = make_plan(arguments)
    for name in plan.asked.left_out:
        print(f"{name} is left out: it runs code that a model wrote, which needs --run-code", file=sys.stderr)
    found, settings = [], settings_of(arguments, plan)
    try:
        for number, name in enumerate(results.names([str(folder) for folder in plan.folders])):
            found.append(Result(name, str(plan.folders[number]), scores_of(arguments, plan, number)))
            if arguments.json:
                results.write_json(arguments.json, found, settings)
    finally:  # a model's failure takes nothing away from those before it
        print(results.table(found) if found else "", end="")
    for result in found if arguments.wandb else ():
        results.track(arguments.wandb, result, settings)


if __name__ == "__main__":
    run_main(main)
