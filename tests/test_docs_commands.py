"""Every command in README, docs and the headers of run files is one that its program takes. Each is read by the program's own
parser and goes no further; a run's --set words are put on its run file. test_docs_run.py runs those of ted-scale.

A command is a line of an ```sh block, or code in a sentence that begins with the name of a program and has an option. Of programs
that are not this project's only the name is checked.
"""

import argparse
import re
import runpy
import shlex
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from test_docs import DOCUMENTS, ROOT

from ted_scale.config.run_file import load_run

HEADERS = sorted([*ROOT.glob("launch/runs/*.toml"), *ROOT.glob("launch/plans/*.toml")])
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.M | re.S)
PROGRAMS = "python|deepspeed|torchrun|pytest|make|sbatch|pip|ted-scale"
SENTENCE = re.compile(rf"(?<!`)`((?:{PROGRAMS})\s[^`…]*\s-[^`…]+)`(?!`)")
HEADER = re.compile(rf"^# {{3,}}((?:{PROGRAMS}|for|hf|apt-get) .*(?:(?:(?<=\\)|(?<=do))\n# {{5,}}.*)*)", re.M)
HEREDOC = re.compile(r"<<'(\w+)'([^\n]*)\n(.*?)^\1$", re.M | re.S)
OTHERS = {
    "apt-get",
    "cat",
    "cc",
    "cd",
    "cp",
    "dpkg-deb",
    "export",
    "git",
    "hf",
    "jq",
    "mkdir",
    "npm",
    "rm",
    "tar",
    "unzip",
    "wandb",
    ".",
}
REFUSALS = (Exception, SystemExit, pytest.fail.Exception)
SEPARATORS = {"&&", "||", ";", "|", "&"}


class Accepted(BaseException):
    """Of a command line, by the parser of its program."""


def commands(document: Path) -> list[list[str]]:
    text = document.read_text(encoding="utf-8")
    if document.suffix == ".toml":
        found = [re.sub(r"\n# +", "\n", block) for block in HEADER.findall(text)]
    else:
        found = BLOCK.findall(text) + [" ".join(words.split()) for words in SENTENCE.findall(text)]
    return [words for block in found for words in split(block)]


def split(block: str) -> list[list[str]]:
    """The simple commands of shell lines, without loops, variables and redirections; a program in a heredoc must be Python."""
    for _, _, program in HEREDOC.findall(block):
        compile(program, "heredoc", "exec")
    block = HEREDOC.sub(r"\2", block).replace("\\\n", " ")
    out = []
    for line in block.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        words = [re.sub(r"\$\w+", "1", word) for word in lexer]
        while words:
            end = next((n for n, word in enumerate(words) if word in SEPARATORS), len(words))
            out.append(simple(words[:end]))
            words = words[end + 1 :]
    return [words for words in out if words]


def simple(words: list[str]) -> list[str]:
    redirected = next((n for n, word in enumerate(words) if set(word) <= set("<>") and word), len(words))
    words = words[:redirected]
    while words and (words[0] in ("do", "then") or re.fullmatch(r"[A-Z_]+=.*", words[0])):
        words = words[1:]
    return [] if words and words[0] in ("for", "done", "fi") else words


def check(words: list[str], monkeypatch) -> None:
    program, *arguments = words
    if program == "python":
        check_python(arguments, monkeypatch)
    elif program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        known = parse_args(arguments)
        check_python([*(["-m"] if known.module else []), known.user_script, *known.user_args], monkeypatch)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        known = get_args_parser().parse_args(arguments)
        check_python([known.training_script, *known.training_script_args], monkeypatch)
    elif program == "sbatch":
        script = next(n for n, word in enumerate(arguments) if word.endswith(".sbatch"))
        assert (ROOT / arguments[script]).is_file()
        check_python(["launch/pretrain.py", *arguments[script + 1 :]], monkeypatch)
    elif program == "pytest":
        check_pytest(arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert {word for word in arguments if "=" not in word and word != "&&"} <= set(targets)
    elif program == "pip":
        asked = {extra for word in arguments for extra in re.findall(r"\.\[([\w,]+)\]", word)}
        assert asked <= set(project()["optional-dependencies"])
    elif program == "ted-scale":
        module, _, function = project()["scripts"]["ted-scale"].partition(":")
        start(
            lambda: getattr(__import__(module, fromlist=[function]), function)(), ["ted-scale", *arguments], monkeypatch
        )
    else:
        assert program in OTHERS


def check_python(arguments: list[str], monkeypatch) -> None:
    file, *rest = arguments
    if file == "-c":
        compile(rest[0], "-c", "exec")
    elif file == "-m":
        if rest[0] == "pytest":
            check_pytest(rest[1:])
        elif rest[0] not in ("lm_eval", "pip", "venv", "sphinx"):
            start(lambda: runpy.run_module(rest[0], run_name="__main__"), rest, monkeypatch)
    elif file != "-":
        path = ROOT / file
        assert path.is_file()
        own = rest[: rest.index("--")] if "--" in rest else rest
        if "argparse" in path.read_text(encoding="utf-8") or "import main" in path.read_text(encoding="utf-8"):
            start(lambda: runpy.run_path(str(path), run_name="__main__"), [str(path), *rest], monkeypatch)
        check_run_file(own)
        if "--" in rest:
            check(rest[rest.index("--") + 1 :], monkeypatch)


def start(program, words: list[str], monkeypatch) -> None:
    """Until its parser has taken the words."""
    parse = argparse.ArgumentParser.parse_args

    def accept(parser, args=None, namespace=None):
        parse(parser, args, namespace)
        raise Accepted

    with monkeypatch.context() as patched, pytest.raises(Accepted):
        patched.setattr(argparse.ArgumentParser, "parse_args", accept)
        patched.setattr("ted_scale.ranks.signals.listen", lambda: None)
        patched.setattr(sys, "argv", words)
        patched.setattr(sys, "excepthook", sys.excepthook)
        program()


def check_run_file(arguments: list[str]) -> None:
    """A run file that is named is there, or its name is in capitals; it takes the command's --set words."""
    pairs = list(pairwise(arguments))
    files = [Path(word) for word in arguments if word.endswith(".toml")]
    assert all((ROOT / file).is_file() or file.stem.isupper() for file in files)
    for option, file in pairs:
        if option == "--config" and (ROOT / file).is_file():
            load_run(ROOT / file, [word for option, word in pairs if option == "--set"])


def check_pytest(arguments: list[str]) -> None:
    assert all((ROOT / word.partition("::")[0]).exists() for word in arguments if word.startswith("tests"))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("document", [*DOCUMENTS, *HEADERS], ids=lambda document: str(document.relative_to(ROOT)))
def test_every_command_in_a_document_is_taken_by_its_program(document, monkeypatch, capsys):
    refused = {}
    for words in commands(document):
        try:
            check(words, monkeypatch)
        except REFUSALS as error:
            refused[" ".join(words)] = f"{type(error).__name__}: {error} {capsys.readouterr().err[-200:]}"
    assert not refused


def test_commands_are_found_in_blocks_sentences_and_headers():
    assert ["make", "demo"] in commands(ROOT / "README.md")
    assert ["ted-scale", "goodput", "--mtbf-hours", "8090"] in commands(ROOT / "docs/goodput.md")
    loop = "for d in a b; do\n  X=1 deepspeed launch/pretrain.py \\\n --config NAME.toml > log # why\ndone"
    assert split(loop) == [["deepspeed", "launch/pretrain.py", "--config", "NAME.toml"]]
    assert all(commands(header) for header in HEADERS)


def test_a_command_that_its_program_refuses_is_found(monkeypatch):
    for line in (
        "python tools/plan.py RUN.toml --gpu-count 8", "python tools/nothing.py", "make nothing", "pip install -e '.[nothing]'",
        "deepspeed launch/pretrain.py --config launch/runs/demo_ted.toml --set train.stepps=3",
        "python launch/supervise.py -- deepspeed launch/pretrain.py --confg RUN.toml", "nothing at all",
    ):  # fmt: skip
        with pytest.raises(REFUSALS):
            check(split(line)[0], monkeypatch)
