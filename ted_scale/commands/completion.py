"""Tab completion of ted-scale: eval "$(ted-scale completion bash)" in ~/.bashrc, or zsh in ~/.zshrc

Note: the options are read from the commands' source, because importing them all would take seconds; the script that is printed
knows them and starts nothing.
"""

import argparse
import ast
import re
from pathlib import Path

from ted_scale.base.exits import run_main
from ted_scale.commands.__main__ import COMMANDS

BASH = """\
_ted_scale() {{
    local words= word=${{COMP_WORDS[COMP_CWORD]}}
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    elif [[ $word == -* ]]; then
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _ted_scale ted-scale
"""
ZSH = """\
_ted_scale() {{
    local words_of=
    if (( CURRENT == 2 )); then
        words_of="{commands}"
    elif [[ $PREFIX == -* ]]; then
        case $words[2] in
{cases}
        esac
    else
        _files
        return
    fi
    compadd -- ${{=words_of}}
}}
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit; }}
compdef _ted_scale ted-scale
"""
SHELLS = {"bash": (BASH, "words"), "zsh": (ZSH, "words_of")}


def options_of(name: str) -> list[str]:
    """Of every call that begins with one, as parsers are told them; what only launchers pass has an underscore."""
    file = Path(__file__).parent / f"{COMMANDS[name][0].replace('.', '/')}.py"
    calls = (node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    firsts = (str(call.args[0].value) for call in calls if call.args and isinstance(call.args[0], ast.Constant))
    return [*(word for word in firsts if re.fullmatch(r"--[a-z][a-z0-9-]*", word)), "--help"]


def script(shell: str) -> str:
    text, variable = SHELLS[shell]
    cases = [f'            {name}) {variable}="{" ".join(options_of(name))}" ;;' for name in COMMANDS]
    return text.format(commands=" ".join([*COMMANDS, "--help", "--version"]), cases="\n".join(cases))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shell", choices=SHELLS)
    print(script(parser.parse_args(argv).shell), end="")


if __name__ == "__main__":
    run_main(main)
