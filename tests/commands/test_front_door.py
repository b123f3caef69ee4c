"""`ted-scale`: every command is named once, is what its caller in tools/ starts, and is completed with all of its options."""

import importlib
import importlib.util
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import ROOT

from ted_scale.commands.__main__ import COMMANDS
from ted_scale.commands.completion import SHELLS, options_of, script

CALLERS = [
    ROOT / "launch/pretrain.py",
    ROOT / "launch/supervise.py",
    *(p for p in (ROOT / "tools").glob("*.py") if "import main" in p.read_text()),
]


def said(*words: str, code: int = 0) -> tuple[str, str]:
    command = [sys.executable, "-m", "ted_scale.commands", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def test_every_file_that_is_a_command_has_a_name():
    folder = ROOT / "ted_scale/commands"
    files = {".".join(p.relative_to(folder).with_suffix("").parts) for p in folder.rglob("*.py")
             if re.search(r"^def main\(argv", p.read_text(), re.M)}  # fmt: skip
    assert files == {module for module, _ in COMMANDS.values()}


@pytest.mark.parametrize("file", CALLERS, ids=lambda file: file.stem)
def test_a_caller_starts_a_command(file):
    spec = importlib.util.spec_from_file_location(f"caller_{file.stem}", file)
    caller = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(caller)
    name = caller.main.__module__.removeprefix("ted_scale.commands.")
    assert name.rpartition(".")[2] == file.stem and name in {module for module, _ in COMMANDS.values()}


def test_help_and_a_misspelt_name_are_answered_without_torch():
    looks = "import sys; import ted_scale.commands.__main__ as m; m.main(); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", looks], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in COMMANDS)
    assert "did you mean tokenize?" in said("tokenise", code=2)[1]


def test_a_command_s_own_usage_has_its_name():
    assert said("report", "--help")[0].startswith("usage: ted-scale report ")
    assert said("checkpoints", "/nowhere", "list", code=2)[1].startswith("error: RUN must be ")


@pytest.mark.parametrize("name", COMMANDS)
def test_completion_knows_every_option_of_a_command(name, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"ted_scale.commands.{COMMANDS[name][0]}").main(["--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    assert {*options_of(name)} - {"--help"} == {*re.findall(r"--[a-z][a-z0-9-]*", usage)} - {"--help"}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_takes_its_script(shell, tmp_path):
    (tmp_path / "script").write_text(script(shell))
    try:
        done = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip(f"{shell} is not installed")
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_completes_commands_options_and_else_files(tmp_path):
    (tmp_path / "script").write_text(script("bash"))

    def completed(*words: str) -> list[str]:
        asks = (
            f"source {tmp_path}/script; COMP_WORDS=(ted-scale {' '.join(words)}); COMP_CWORD={len(words)}; _ted_scale"
        )
        lines = subprocess.run(
            ["bash", "-c", f'{asks}; echo "${{COMPREPLY[@]}}"'], capture_output=True, text=True, check=True
        )
        return lines.stdout.split()

    assert completed("tok") == ["tokenize"]
    assert completed("pretrain", "--d") == ["--dry-run"]
    assert completed("pretrain", Path(__file__).name[:4]) == []  # then bash offers files


@pytest.mark.parametrize(("shell", "bare"), [("bash", "--norc"), ("zsh", "-f")])
def test_the_tab_key_completes_in_a_shell_at_a_terminal(shell, bare, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script(shell))
    (tmp_path / "my_texts").mkdir()
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [shell, bare, "-i"], stdin=end, stdout=end, stderr=end, cwd=tmp_path, start_new_session=True,
        env={**os.environ, "TERM": "dumb", "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path)},
    )  # fmt: skip
    try:
        os.write(terminal, b"source ./script; echo rea''dy\n")
        shown_at(terminal, "ready")
        for typed, whole in (("pla", "plan "), ("cut-student --hid", "--hidden "), ("tokenize my_te", "my_texts/")):
            os.write(terminal, f"ted-scale {typed}\t".encode())
            shown_at(terminal, whole)
            os.write(terminal, b"\x15")  # the line is taken back
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
        os.close(end)


def shown_at(terminal: int, text: str) -> None:
    """Waits until the terminal shows it."""
    seen, until = "", time.monotonic() + 60
    while text not in seen:
        readable, _, _ = select.select([terminal], [], [], max(0, until - time.monotonic()))
        assert readable, f"{text} is not in {seen!r}"
        seen += os.read(terminal, 1 << 16).decode(errors="replace")
