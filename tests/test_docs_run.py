"""Every command of README, docs and run files' headers does what a document says that it does: it is run on tiny inputs, or
dry-run, a run with hollow models; the rest is listed with its reason in harness/documented.py.

A command that is new in a document needs a line in READS there, or in ONLY_PARSED. test_docs_commands.py gives all of them to
their parsers.
"""

import argparse
import functools
import importlib
import logging
import re
from itertools import pairwise
from pathlib import Path

import pytest
from documented import ONLY_PARSED, READS, RUN_ELSEWHERE, TINY, Place, make_world
from places import ROOT
from test_docs import DOCUMENTS
from test_docs_commands import HEADERS, commands

from ted_scale.commands.__main__ import COMMANDS
from ted_scale.commands.comparison import plan as plans
from ted_scale.commands.comparison import starts
from ted_scale.config.run_file import load_run
from ted_scale.corpora.tasks import TASKS
from ted_scale.doctor import machine
from ted_scale.evaluation.suites import SUITES, Asked
from ted_scale.forecast import machine as sheets
from ted_scale.models.inspection import inspect

DRY = ("pretrain", "plan", "compare")  # with hollow models; what they start is stopped, or never begun
PRETRAIN = ("launch/pretrain.py", "ted_scale.commands.pretrain")
PROBED = functools.cache(machine.probe)  # of this machine, once
LOOKED_AT = functools.cache(inspect)  # of hollow models in one folder, whose many plans look at few models
RANKS = re.compile(r"--num_gpus[ =](\d+)|--nproc_per_node[ =](\d+)")


def front_door(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words of ted-scale behind launchers and callers; empty for another program."""
    if "--" in words:  # a supervisor's
        return front_door(words[words.index("--") + 1 :])
    for place, word in enumerate(words):
        if word in PRETRAIN or word.endswith(".sbatch"):
            ranks = RANKS.search(" ".join(words[:place]))
            return "pretrain", *words[place + 1 :], *(("--ranks", ranks[1] or ranks[2]) if ranks else ())
    if words[0] == "python" and (called := caller(words[1])):
        return called, *words[2:]
    return words[1:] if words[0] == "ted-scale" else ()


def caller(file: str) -> str | None:
    """The command that a program of tools/ starts."""
    text = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).is_file() else ""
    found = re.search(r"^from ted_scale\.commands\.([\w.]+) import main$", text, re.M)
    return next((name for name, (module, _) in COMMANDS.items() if found and module == found[1]), None)


def reason(words: tuple[str, ...]) -> str | None:
    line = " ".join(words)
    return next((why for start, why in ONLY_PARSED.items() if f"{line} ".startswith(start)), None)


def is_run_file_alone(words: tuple[str, ...]) -> bool:
    """tests/launch/test_run_files.py dry-runs each as it is."""
    return words[:2] == ("pretrain", "--config") and "--set" not in words and (ROOT / words[2]).is_file()


DOCUMENTED = sorted({tuple(words) for document in [*DOCUMENTS, *HEADERS] for words in commands(document)})
OWN = sorted({front_door(words) for words in DOCUMENTED if front_door(words) and not reason(words)})


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Place:
    """Where plans and dry runs share their hollow models, on a machine that was calibrated."""
    place = Place(tmp_path_factory.mktemp("hollow") / "checkout")
    sheets.write(place.folder / "runs" / sheets.FILE, sheets.named("h100", "bf16"))
    return place


@pytest.fixture
def alone(monkeypatch):
    """Signals and logs of this process stay as they are, and no command starts a program or asks a network."""
    monkeypatch.setattr("ted_scale.ranks.signals.listen", lambda: None)
    monkeypatch.setattr("ted_scale.metrics.console.choose_level", lambda _: None)
    monkeypatch.setattr("ted_scale.ranks.capacity.of_a_rank", lambda ranks: ("cuda", 80e9))
    monkeypatch.setattr(logging, "disable", lambda _: None)
    monkeypatch.setattr("ted_scale.evaluation.suites.load", asked_of_known_names)
    monkeypatch.setattr("ted_scale.doctor.machine.probe", PROBED)
    for check in ("ranks.over", "outside.wandb"):  # other machines; tests/doctor has both
        monkeypatch.setattr(f"ted_scale.doctor.{check}", lambda *_: [])


def asked_of_known_names(wanted: list[str], folder: Path | None, run_code: bool) -> tuple[None, Asked]:
    """lm-eval's tasks are not installed everywhere, and their data not here: tests/commands/test_evaluate.py asks them. A document
    names suites, or what `ted-scale task` makes, and for that a folder."""
    made = {f"{name}_{end}" for name in TASKS for end in ("split", "held_out")}
    assert {name for name in wanted if not name.isupper()} <= {*SUITES, *made} and (folder or not made & {*wanted})
    return None, Asked([], [])


@pytest.fixture
def planned(checkout, alone, monkeypatch) -> Place:
    monkeypatch.chdir(checkout.folder)
    monkeypatch.setattr("ted_scale.plan.inspect", LOOKED_AT)
    return checkout


class Begun(Exception):
    """The first runs of a comparison: all that comes before has passed."""


@pytest.mark.parametrize("words", [w for w in OWN if w[0] in READS], ids=" ".join)
def test_a_command_runs(words, world, tmp_path, alone, monkeypatch):
    place = Place(tmp_path / "place", world)
    monkeypatch.chdir(place.folder)
    start(words, place, monkeypatch)


@pytest.mark.parametrize("words", [w for w in OWN if w[0] == "plan"], ids=" ".join)
def test_a_run_is_forecast(words, planned, monkeypatch, capsys):
    planned.run_file(Path(words[1]))
    start(words, planned, monkeypatch)
    assert "days" in capsys.readouterr().out


@pytest.mark.parametrize("words", [w for w in OWN if w[0] == "pretrain" and not is_run_file_alone(w)], ids=" ".join)
def test_a_run_is_planned(words, planned, monkeypatch, capsys):
    config = Path(next(after for word, after in pairwise(words) if word == "--config"))
    planned.run_file(config)
    planned.hollow(load_run(config, [after for word, after in pairwise(words) if word == "--set"]))
    start((*words, *([] if "--dry-run" in words else ["--dry-run"])), planned, monkeypatch)
    assert "GiB" in capsys.readouterr().out


@pytest.mark.parametrize("words", [w for w in OWN if w[0] == "compare"], ids=" ".join)
def test_a_comparison_is_planned(words, planned, monkeypatch):
    """Up to the first run that it starts."""
    planned.plan(Path(words[1]))
    plan = plans.load(words[1])
    for arm in plan.arms:
        planned.hollow(plans.of_arm(plan, arm))

    def begin(plan, jobs):
        raise Begun(*jobs)

    monkeypatch.setattr(starts, "run_all", begin)
    with pytest.raises(Begun) as begun:
        start(words, planned, monkeypatch)
    assert len(begun.value.args) >= len(plan.arms)


def start(words: tuple[str, ...], place: Place, monkeypatch) -> None:
    """By its main, with tiny sizes, after what it reads was made. It ends well, or the test fails."""
    name, *rest = words
    parse = argparse.ArgumentParser.parse_args

    def tiny(parser, args=None, namespace=None):
        asked = parse(parser, args, namespace)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        for key, value in vars(asked).items():
            shrunk = TINY.get(name, {}).get(key, value) if value is not None else None
            setattr(asked, key, prepared(shrunk, getattr(place, READS.get(name, {}).get(key, ""), None)))
        return asked

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", tiny)
    try:
        importlib.import_module(f"ted_scale.commands.{COMMANDS[name][0]}").main(rest)
    except SystemExit as end:
        assert not end.code


def prepared(value, make):
    """The argument, once what it names is there. A shell's star becomes a name; dots stand for more of the same."""
    if isinstance(value, list):
        return [prepared(each, make) for each in value if not str(each).strip("[").endswith(("...", "...]"))]
    if make is None or value is None:
        return value
    path = type(value)(re.sub(r"step_\d+", "step_00000002", str(value).replace("*", "1")))
    make(Path(path))
    return path


def test_what_is_only_parsed_has_its_reason_and_none_of_it_is_a_command_of_ted_scale():
    rest = [words for words in DOCUMENTED if not front_door(words) or reason(words)]
    assert not [words for words in rest if reason(words) is None or words[0] == "ted-scale"]
    assert {name for name, *_ in OWN} <= {*READS, *DRY, *RUN_ELSEWHERE}
