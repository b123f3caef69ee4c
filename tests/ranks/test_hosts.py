"""ted_scale/ranks/hosts.py: the hosts that a command would start, what ssh says of them, and the command without the lost ones."""

import time
from pathlib import Path

import pytest

from ted_scale.base.errors import UserError
from ted_scale.ranks import hosts

SSH = """#!/usr/bin/env bash
echo "$@" >> "$ASKED"
leave() { sleep 300 & echo $! >> "$ASKED.left"; }  # it keeps what it was given open, as the ssh of a ProxyJump does
case "$*" in
*bad*) leave; echo "first line" >&2; printf 'ssh: no such \\xff host\\n' >&2; exit 255 ;;
*slow*) leave; sleep 300 ;;
*jump*) leave ;;
esac
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "hosts").write_text(
        "# mine\nnode1 slots=8\n\n  node2   slots=4 # the old one\n#node3 slots=8\nbad slots=1\n"
    )
    return str(tmp_path / "hosts")


@pytest.fixture
def asked(tmp_path, monkeypatch):
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    return tmp_path / "asked"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((), ("node1", "node2", "bad")),
        (("--include", "bad@node1:0,2"), ("node1", "bad")),
        (("-e", "node1@node2:0"), ("node2", "bad")),
        (("--num_nodes=2",), ("node1", "node2")),
        (("--num_nodes", "-1"), ("node1", "node2", "bad")),
        (("--no_ssh",), ()),
    ],
)
def test_the_hosts_are_those_that_deepspeed_starts(file, words, names):
    command = ["deepspeed", f"--hostfile={file}", *words, "launch/pretrain.py", "--config", "a.toml"]
    assert hosts.hosts_of(command).names == names


def test_a_command_without_a_hostfile_has_no_hosts_and_a_missing_file_is_a_mistake(tmp_path):
    assert hosts.hosts_of(["deepspeed", "--num_gpus", "2", "a.py"]).names == ()
    with pytest.raises(UserError, match="hosts must be a file"):
        hosts.hosts_of(["deepspeed", "-H", str(tmp_path / "hosts"), "a.py"])


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"-oProxyCommand=false slots=1\n", "names -oProxyCommand=false, which ssh takes for an option"),
        (b"node\xe9 slots=1\n", "must be UTF-8, but .*hosts is not at byte 4; correct it"),
    ],
)
def test_a_hostfile_with_an_option_or_without_an_encoding_is_a_mistake(tmp_path, line, sentence):
    (tmp_path / "hosts").write_bytes(line)
    with pytest.raises(UserError, match=sentence):
        hosts.hosts_of(["deepspeed", "-H", str(tmp_path / "hosts"), "a.py"])


@pytest.mark.parametrize("words", [("--num_nodes", "two"), ("--hostfile",)])
def test_a_command_that_deepspeed_cannot_read_is_a_mistake(words):
    with pytest.raises(UserError, match=f"but is not: argument .*{words[0]}: .*; correct it"):
        hosts.hosts_of(["deepspeed", "a.py", *words])


@pytest.mark.long  # waits for a host that does not answer
def test_every_host_is_asked_at_the_port_of_the_command_and_what_ssh_says_is_told(file, asked, monkeypatch):
    monkeypatch.setattr(hosts, "ANSWER_S", 5)
    found = hosts.hosts_of(["deepspeed", "-H", file, "--ssh_port", "2222", "a.py"])
    began, lost = time.monotonic(), hosts.unreached(found._replace(names=(*found.names, "slow", "jump")))
    assert lost == {"bad": "ssh: no such \ufffd host", "slow": "no answer within 5 s"}
    assert time.monotonic() - began < 30, "what ssh leaves behind is not waited for"
    lines = asked.read_text().splitlines()
    assert len(lines) == 5 and all("BatchMode=yes" in line and "-p 2222" in line for line in lines)
    assert all(line.endswith(f"-- {line.split()[-2]} true") for line in lines), "no name is an option"
    assert all("ControlMaster=no" in line and "ControlPath=none" in line for line in lines)
    left = Path(f"{asked}.left").read_text().split()
    assert len(left) == 3 and all(ends(pid) for pid in left)
    with pytest.raises(UserError, match=r"--hostfile must name .* but bad is not \(ssh: no such . host\); correct it"):
        hosts.refuse_unreached({"bad": lost["bad"]})


def ends(pid: str) -> bool:
    """Within 20 s. A zombie has ended: whoever adopted it has not looked yet."""
    end = time.monotonic() + 20
    while works(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not works(pid)


def works(pid: str) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_signal_ends_the_wait_for_ssh_and_nothing_is_said_of_hosts(asked):
    began, signals = time.monotonic(), [15]
    assert hosts.unreached(hosts.Hosts(("bad", "slow"), None), signals) == {}
    assert time.monotonic() - began < hosts.ANSWER_S / 2


def test_deepspeed_reads_the_command_without_lost_hosts_as_meant(file):
    from deepspeed.launcher.runner import fetch_hostfile, parse_args, parse_inclusion_exclusion

    command = hosts.without(["deepspeed", "-H", file, "a.py", "--config", "a.toml"], {"node1": "", "bad": ""})
    known = parse_args(command[1:])
    assert list(parse_inclusion_exclusion(fetch_hostfile(file), known.include, known.exclude)) == ["node2"]
    assert known.force_multi and known.user_args == ["--config", "a.toml"]


@pytest.mark.parametrize("first", ["env", "nohup", "/usr/bin/python"])
def test_hosts_are_left_out_only_of_a_command_that_begins_with_deepspeed(first):
    hosts.refuse_other_programs(["/opt/bin/deepspeed", "a.py"])
    with pytest.raises(UserError, match=f"must begin with deepspeed with --lost-hosts leave, but begins with {first};"):
        hosts.refuse_other_programs([first, "deepspeed", "a.py"])


def test_a_second_choice_of_hosts_is_refused(file):
    hosts.refuse_other_choices(["deepspeed", "-H", file, "a.py"])
    with pytest.raises(UserError, match="by --hostfile alone with --lost-hosts leave, but has --num_nodes"):
        hosts.refuse_other_choices(["deepspeed", "-H", file, "--num_nodes", "2", "a.py"])
