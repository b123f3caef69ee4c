"""`ted-scale COMMAND ...`: the way in to all commands, each a file beside this one.

Note: only the chosen command is imported, and nothing here needs torch, so that help and a misspelt name are answered at once.
"""

import difflib
import importlib
import sys

import ted_scale
from ted_scale.base.errors import MEANINGS, UserError, shown
from ted_scale.base.exits import run_main

COMMANDS = {  # in the order in which a run needs them: the file, and what it does
    "doctor": ("doctor", "what this machine has, and what is missing"),
    "init": ("init", "a commented run file for a teacher and a text"),
    "train-tokenizer": ("train_tokenizer", "a tokenizer from texts"),
    "task": ("task", "pairs to train on and a judge, from a task's data"),
    "tokenize": ("tokenize_corpus", "text in, shards out"),
    "inspect": ("inspect_corpus", "show and verify a corpus"),
    "new-model": ("new_model", "a model folder without weights"),
    "cut-student": ("cut_student", "a student cut from a teacher"),
    "plan": ("plan", "what a run needs, how fast it is and which way is best, without a GPU"),
    "pretrain": ("pretrain", "train the run of a run file on one rank; DeepSpeed's launcher starts several"),
    "supervise": ("supervise", "start a run again after failures, and give its ranks time to save"),
    "checkpoints": ("checkpoints", "list, verify or prune a run's checkpoints"),
    "report": ("report", "a page of a run or of several"),
    "compare": ("compare", "methods under equal conditions"),
    "export": ("export_hf", "a run's student as a Hugging Face folder"),
    "evaluate": ("evaluate", "judge models on tasks and held-out text"),
    "goodput": ("planning.goodput", "the share of a cluster's time that trains, and how often to save"),
    "wandb-workspace": ("wandb_workspace", "a run's panels in Weights & Biases"),
    "completion": ("completion", "tab completion for bash or zsh"),
}


def main() -> None:
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(f"ted-scale {ted_scale.__version__}")
    else:
        module = module_of(name)
        sys.argv[0] = f"ted-scale {name}"  # argparse's usage begins with it
        importlib.import_module(module).main(words)


def module_of(name: str) -> str:
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        way = f"did you mean {close[0]}?" if close else "ted-scale --help lists them"
        raise UserError(f"COMMAND must be one of ted-scale's, but is {shown(name)}; {way}")
    return f"ted_scale.commands.{COMMANDS[name][0]}"


def help_text() -> str:
    commands = [f"  {name:<17}{what}" for name, (_, what) in COMMANDS.items()]
    codes = [f"  {code:<4}{meaning}" for code, meaning in MEANINGS.items()]
    return "\n".join([
        "usage: ted-scale COMMAND ...", "       ted-scale COMMAND --help | --help | --version", "",
        "commands:", *commands, "", "exit codes:", *codes,
        "  1 is also what plan says of a run that does not fit, doctor of a machine that lacks something, "
        "and inspect and checkpoints of what is damaged",
    ])  # fmt: skip


def start() -> None:
    run_main(main)


if __name__ == "__main__":
    start()
