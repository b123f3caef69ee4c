"""Named suites, and where lm-eval finds their tasks: its own definitions with data from the hub, or local files.

With a FOLDER of local files nothing comes from the hub: a task is a YAML file below FOLDER or one of the tasks folder here, and
the data files that it names are beside it or in FOLDER. What is missing is found from the YAML files alone, before a model is
loaded. Note: such a YAML may call Python functions, so FOLDER must come from somebody you trust.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ted_scale.base.errors import UserError, clean, shortened, shown
from ted_scale.base.packages import install_extra
from ted_scale.base.parsing import is_count
from ted_scale.config.method import Validation

OURS = Path(__file__).with_name("tasks")
LIKELIHOODS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")  # lm-eval's kinds of tasks
WRITES = "generate_until"
BOUNDS = ("until", "max_gen_toks")  # of what is written
LIKELIEST = {"do_sample": False, "temperature": 0, "num_beams": 1}  # the one way of writing that training has
METRIC = "code_eval/code_eval.py"  # what HumanEval and MBPP judge with; a script of the hub and in no package


class Suite(NamedTuple):
    tasks: tuple[str, ...]
    where_at_hand: tuple[str, ...] = ()  # tasks that a folder of local files need not have


SUITES = {
    # TED's rows in DDK's table
    "ted_public": Suite((
        "gsm8k", "mmlu", "arc_challenge", "arc_easy", "winogrande", "commonsense_qa", "humaneval", "mbpp",
    )),
    # lm-eval's wikitext is WikiText-2, whose test text is that of WikiText-103
    "ted_paper": Suite(("lambada_openai", "wikitext")),
    # what is not noise below 200M parameters
    "small": Suite(("lambada_openai", "arc_easy", "piqa"), where_at_hand=("blimp",)),
}  # fmt: skip


class Asked(NamedTuple):
    """Tasks and groups, with those that run code and therefore are left out."""

    specs: list  # lm-eval's tasks and groups
    left_out: list[str]


class Keys(NamedTuple):
    """What the user calls the two settings."""

    suite: str
    files: str


OPTIONS, SETTINGS = Keys("--suite", "--tasks"), Keys("validation.suite", "validation.suite_files")


def load(wanted: list[str], folder: Path | None, run_code: bool) -> tuple[Any, Asked]:
    """For an evaluation: (lm-eval's index of tasks, what is asked of it), with all data read."""
    index, asked_by = find(wanted, folder, OPTIONS)
    known = index.task_index
    code = [name for name in asked_by if any(known[leaf].cfg.get("unsafe_code") for leaf in leaves(name, known))]
    kept = [name for name in asked_by if run_code or name not in code]
    if folder:
        for name in {*code} & {*kept}:
            refuse_missing_metric(name, folder)
    specs = read(index, {name: asked_by[name] for name in kept}, folder, OPTIONS)
    return index, Asked(specs, [name for name in code if name not in kept])


def suite_in_training(validation: Validation, longest: int | None) -> dict:
    """Of a student whose texts have `longest` tokens at most, if it says so."""
    files = validation.suite_files
    return load_for_training(validation.suite, Path(files) if files else None, validation.suite_limit, longest)


def load_for_training(wanted: list[str], folder: Path | None, limit: int | None, longest: int | None) -> dict:
    """What lm-eval's `evaluate` takes, with all data read. Refuses tasks that have no bound, or run code."""
    index, asked_by = find(wanted, folder, SETTINGS)
    for name in asked_by:
        for leaf in leaves(name, index.task_index):
            refuse_unbounded(leaf, index.task_index[leaf].cfg, limit, longest)
    loaded = index.load(read(index, asked_by, folder, SETTINGS))
    for name, task in loaded["tasks"].items():  # also what a group defines inside itself, which the index does not name
        refuse_unbounded(name, task.dump_config() | {"output_type": task.OUTPUT_TYPE}, limit, longest)
    return loaded


def find(wanted: list[str], folder: Path | None, keys: Keys) -> tuple[Any, dict[str, str]]:
    """(lm-eval's index, what asks for each task or group); every name is in the index."""
    index = index_of(folder and folder.resolve(), keys)
    asked_by = tasks_of(wanted, index.task_index, folder, keys)
    for name, by in asked_by.items():
        refuse_unknown(name, by, index.task_index, folder, keys)
    return index, asked_by


def read(index, asked_by: dict[str, str], folder: Path | None, keys: Keys) -> list:
    if folder:
        for name, by in asked_by.items():
            refuse_missing_files(name, by, index.task_index, folder)
    return [spec for name in asked_by for spec in built(name, index, folder, keys)]


def index_of(folder: Path | None, keys: Keys):
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(f"lm-eval must be installed for {keys.suite}, but is not; {install_extra('eval')}") from None
    if folder is None:
        return TaskManager()
    if not folder.is_dir():
        raise UserError(
            f"{keys.files} must be a folder of task files, but {folder} is none; docs/evaluating.md shows one"
        )
    return TaskManager(include_path=[OURS, folder], include_defaults=False)


def tasks_of(wanted: list[str], known: dict, folder: Path | None, keys: Keys) -> dict[str, str]:
    """Each task or group once, with what asks for it."""
    found: dict[str, str] = {}
    for name in wanted:
        suite = SUITES.get(name)
        at_hand = [task for task in suite.where_at_hand if folder is None or task in known] if suite else []
        for task in (*suite.tasks, *at_hand) if suite else [name]:
            found.setdefault(task, f"suite {name}" if suite else keys.suite)
    return found


def refuse_unknown(name: str, asked_by: str, known: dict, folder: Path | None, keys: Keys) -> None:
    if name in known:
        return
    if folder is None:
        raise UserError(
            f"{asked_by} must name suites ({', '.join(SUITES)}) or tasks of lm-eval, but {name} is neither; "
            "`python -m lm_eval ls tasks` lists them"
        )
    raise UserError(
        f"{asked_by} must find the task {name} in {folder}, but no file there defines it; put {name}.yaml and its data there "
        f"(docs/evaluating.md), or leave out {keys.files}, and lm-eval takes the data from the hub"
    )


def leaves(name: str, known: dict) -> Iterator[str]:
    """The tasks of a group or a tag, or the task itself."""
    entry = known.get(name)
    if entry is None:
        return
    if entry.kind.name == "TAG":
        members = sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        members = named_in(entry.cfg["task"])
    else:
        yield name
        return
    for member in members:
        yield from leaves(member, known)


def named_in(members) -> list[str]:
    """The names in a group's list, whose members may be groups themselves that are written out."""
    found = []
    for member in as_list(members):
        inner = member if isinstance(member, str) else member.get("task") or member.get("group")
        found += [inner] if isinstance(inner, str) else named_in(inner or [])
    return found


def refuse_missing_files(name: str, asked_by: str, known: dict, folder: Path) -> None:
    place = place_of(name, known, folder)
    for leaf in leaves(name, known):
        for file in local_files(known[leaf].cfg):
            if not (place / file).exists():
                raise UserError(
                    f"{asked_by} must find the data of task {leaf}, but {place / file} is not there; docs/evaluating.md says "
                    "how to make it"
                )


def place_of(name: str, known: dict, folder: Path) -> Path:
    """Where the paths in its YAML start: the YAML's own folder if all data of the task or group are there, else FOLDER."""
    members = [known[leaf] for leaf in leaves(name, known)]
    beside = {member.yaml_path.parent for member in members}
    files = [file for member in members for file in local_files(member.cfg)]
    is_beside = len(beside) == 1 and files and all((path / file).exists() for path in beside for file in files)
    return beside.pop() if is_beside else folder


def refuse_unbounded(name: str, task: dict, limit: int | None, longest: int | None) -> None:
    """A validation must take a time that can be known. What writes, writes the likeliest tokens, so many at most."""
    kind = task.get("output_type")
    if kind in LIKELIHOODS and not task.get("unsafe_code"):
        return
    if kind != WRITES or task.get("unsafe_code"):
        does = "runs code that the model writes" if task.get("unsafe_code") else "is of another kind"
        raise UserError(
            f"validation.suite must name tasks that compare log-likelihoods or have the model write, but {name} {does}; ask it "
            "of an export, with ted-scale evaluate"
        )
    refuse_other_ways(name, task.get("generation_kwargs") or {})
    refuse_long(name, task["generation_kwargs"]["max_gen_toks"], longest)
    if not limit:
        raise UserError(
            f"validation.suite_limit must be set where the model writes its answers, as for {name}, but is not; set how many "
            "questions a validation asks"
        )


def refuse_other_ways(name: str, way: dict) -> None:
    """Training would not apply them, so its scores would not be those of the export."""
    others = [
        f"{key} = {shown(value)}" for key, value in way.items() if key not in BOUNDS and not is_likeliest(key, value)
    ]
    if others or not (is_count(way.get("max_gen_toks")) and way["max_gen_toks"]):
        raise UserError(
            "validation.suite must name tasks that write the likeliest tokens and say how many, but "
            f"{name} has {', '.join(others) or 'no max_gen_toks above 0'}; give its generation_kwargs max_gen_toks, until and "
            "do_sample: false alone, or ask it of an export, with ted-scale evaluate"
        )


def is_likeliest(key: str, value) -> bool:
    return key in LIKELIEST and value == LIKELIEST[key]


def refuse_long(name: str, tokens: int, longest: int | None) -> None:
    """A text has the prompt, too."""
    if longest and tokens >= longest:
        raise UserError(
            f"max_gen_toks of task {name} must be below the {longest:,} tokens that the student reads, but is {tokens:,}; lower it "
            "in its generation_kwargs"
        )


def local_files(task: dict) -> list[str]:
    """What a task's YAML names: files of its splits, or a folder as the hub has it."""
    path, files = task.get("dataset_path") or "", (task.get("dataset_kwargs") or {}).get("data_files") or {}
    named = (
        [file for of_split in files.values() for file in as_list(of_split)]
        if isinstance(files, dict)
        else as_list(files)
    )
    folders = [path] if path.startswith(("./", "../", "/")) else []
    return folders + [file for file in named if "://" not in file and "*" not in file]


def refuse_missing_metric(name: str, folder: Path) -> None:
    if not (folder / METRIC).exists():
        raise UserError(
            f"task {name} must find the code_eval metric, but {folder / METRIC} is not there; copy it and the execute.py beside "
            "it from the hub's space evaluate-metric/code_eval"
        )


def built(name: str, index, folder: Path | None, keys: Keys) -> list:
    """Data files are named from a folder, as for lm-eval's own command line when it is started there."""
    try:
        with contextlib.chdir(place_of(name, index.task_index, folder)) if folder else contextlib.nullcontext():
            found = index.load([name])
    except Exception as error:  # datasets and the hub's client raise many kinds
        reason = shortened(clean(": ".join([type(error).__name__, *str(error).split("\n")[:1]])), 300)
        out = "correct its files" if folder else f"put it into a folder of local files and name that with {keys.files}"
        raise UserError(f"task {name} must load with its data, but does not ({reason}); {out}") from None
    return [found["groups"][name]] if name in found.get("groups", {}) else list(found["tasks"].values())


def as_list(value) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]
