"""The checks of ted_scale/doctor: what they say of machines that lack something, and that none of them waits for ever."""

import http.server
import json
import os
import socket
import sys
import threading
import time

import pytest
from places import ROOT

from ted_scale.base import packages, shipped
from ted_scale.base.errors import UserError
from ted_scale.commands import doctor
from ted_scale.doctor import disk, machine, outside, ranks, software
from ted_scale.doctor.finding import MISSING, NOTE, OK, Ended, Finding, bounded, run
from ted_scale.storage import objects
from tools.bench.object_server import serving

TORCH = {"part": "torch", "version": "2.13.0", "cuda": "13.0", "hip": None, "devices": [], "cpu": "AVX2"}
GPU = {"name": "H100", "capability": "sm_90", "memory": 80 * 2**30, "free": 79 * 2**30, "works": True}


def states(findings) -> list[tuple[str, str]]:
    return [(finding.what, finding.state) for finding in findings]


def probed(*parts: dict, codes=(0,), end: str = "") -> machine.Probed:
    return machine.parts_of(Ended(list(codes), "a warning\n" + "".join(f"{json.dumps(p)}\n" for p in parts) + end))


def test_this_machine_has_what_a_run_needs_and_keeps_nothing_of_the_checks(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        doctor.main(["--json", "--folder", str(tmp_path)])
    told = json.loads(capsys.readouterr().out)
    assert (left.value.code, told["missing"]) == (0, 0), told
    names = [finding["what"] for finding in told["findings"]]
    needed = ["python", "torch", "packages", "compiler", "cpu", "memory", "disk", "W&B key", "a run"]
    assert [name for name in names if name in needed] == needed
    assert not list(tmp_path.iterdir())


def test_without_torch_it_says_so_checks_the_rest_and_exits_with_1(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch today')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ended = run([[sys.executable, "-m", "ted_scale.commands.doctor", "--folder", str(tmp_path)]], 120, [environment])
    lines = ended.said.splitlines()
    assert ended.codes == [1], ended.said
    assert any(line.startswith("missing  torch") and "no torch today" in line for line in lines)
    assert any(line.startswith("ok       disk speed") for line in lines)
    assert any(line.startswith("missing  a run") for line in lines)
    assert "Traceback" not in ended.said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--folder", "/nowhere"], "--folder must be a folder"),
        (["--url", "https://bucket"], "--url must begin with s3://"),
        (["--ranks", "0"], "--ranks must be at least 1"),
        (["--hostfile", "/nowhere"], "/nowhere must be a file"),
        (["--hostfile", "/dev/null"], "--hostfile must have a line"),
        (["--ranks", "2", "--hostfile", "hosts"], "--ranks must be left out with --hostfile"),
    ],
)
def test_a_mistake_is_said_before_anything_is_checked(words, said):
    with pytest.raises(UserError, match=said):
        doctor.main(words)


def test_a_gpu_that_torch_does_not_use_is_missing_with_the_way_out():
    found = machine.torch(probed({"part": "driver", "driver": "12.4"}, TORCH))
    assert states(found) == [("torch", MISSING)]
    assert found[0].way == "install a driver for CUDA 13.0, or torch for CUDA 12.4 or older"
    cpu_build = machine.torch(probed({"part": "driver", "driver": "13.0"}, {**TORCH, "cuda": None}))
    assert cpu_build[0].state == MISSING and "build for CUDA" in cpu_build[0].way
    assert states(machine.torch(probed({"part": "driver", "driver": None}, TORCH)))[:2] == [
        ("torch", OK),
        ("device", NOTE),
    ]


def test_a_device_that_computes_wrongly_is_missing_and_a_busy_one_a_note():
    gpus = [GPU, {**GPU, "works": False}, {**GPU, "free": 2**30}]
    found = machine.torch(probed({**TORCH, "devices": gpus}, {"part": "triton", "version": "3.7"}))
    assert states(found)[1:] == [("cuda:0", OK), ("cuda:1", MISSING), ("cuda:2", NOTE), ("triton", OK)]


def test_what_was_found_before_the_probe_died_counts():
    dead = probed({**TORCH, "devices": [GPU]}, codes=[-11], end="Segmentation error\n")
    assert states(machine.torch(dead)) == [("torch", OK), ("cuda:0", OK), ("triton", MISSING)]
    assert "Segmentation error" in machine.what_runs(dead)[0].said
    hung = probed(codes=[None])
    assert "no answer within" in machine.torch(hung)[0].said


def test_a_package_out_of_its_range_is_named_and_one_of_an_extra_is_a_note(monkeypatch):
    asked = [("torch>=99", ""), ("numpy>=1", ""), ("nobody-has-this>=1", ""), ("nor-this>=1", "report")]
    monkeypatch.setattr(software, "asked_for", lambda: asked)
    found = software.packages()
    assert states(found) == [
        ("packages", MISSING),
        ("torch", MISSING),
        ("nobody-has-this", MISSING),
        ("nor-this", NOTE),
    ]
    assert found[1].said.endswith("but must be torch>=99") and found[2].way == 'pip install "nobody-has-this>=1"'


def test_ranges_without_a_checkout_are_those_of_the_installed_package(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "PROJECT", tmp_path / "pyproject.toml")
    monkeypatch.setattr(packages.importlib.metadata, "requires", lambda _: ["torch>=2", 'bokeh>=3; extra == "report"'])
    assert packages.asked_for() == [("torch>=2", ""), ("bokeh>=3", "report")]


def test_without_a_checkout_the_way_to_a_package_is_pip_with_its_name(monkeypatch, tmp_path):
    asked = ["nobody-has-this>=1", 'nor[this]>=1; extra == "report"', 'nor-that; extra == "docs"']
    monkeypatch.setattr(packages.importlib.metadata, "requires", lambda _: asked)
    monkeypatch.setattr(shipped, "PROJECT", tmp_path / "pyproject.toml")
    found = {each.what: each.way for each in software.packages()}
    nobody = 'pip install "nobody-has-this>=1"'
    assert found == {
        "packages": nobody, "nobody-has-this": nobody, "nor": 'pip install "nor[this]>=1", for the page of a run'
    }  # fmt: skip
    assert machine.torch(probed())[0].way == 'pip install "torch"'
    assert packages.install_extra("report") == 'pip install "nor[this]>=1"'


def test_a_bare_copy_of_the_package_knows_no_ranges_and_still_says_a_way(monkeypatch, tmp_path):
    def unknown(name):
        raise packages.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.importlib.metadata, "requires", unknown)
    monkeypatch.setattr(shipped, "PROJECT", tmp_path / "pyproject.toml")
    assert packages.asked_for() == [] and packages.requirement_of("torch") == "torch"
    assert packages.install_extra("report").endswith("pyproject.toml lists under report")


def test_every_extra_of_a_user_says_what_it_is_for():
    assert {extra for _, extra in packages.asked_for()} - {"", "docs"} == set(software.FOR)


def test_a_compiler_without_python_h_is_missing(monkeypatch, tmp_path):
    assert software.compiler()[0].state == OK
    monkeypatch.setattr(software.sysconfig, "get_path", lambda _: str(tmp_path))
    assert software.compiler()[0].state == MISSING and "Python.h" in software.compiler()[0].said


def test_a_check_that_hangs_is_left_behind_and_one_that_breaks_is_said():
    began = time.monotonic()
    assert bounded("disk", lambda: time.sleep(60), 0.2)[0].said == "no answer within 0.2 s"
    assert time.monotonic() - began < 10
    assert "OSError: gone" in bounded("disk", lambda: exec("raise OSError('gone')"), 10)[0].said


def test_no_process_outlives_its_time_and_one_that_fails_ends_the_others():
    sleeps = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
    ended = run([sleeps], 5)
    assert ended.codes == [None]
    with pytest.raises(ProcessLookupError):
        os.kill(int(ended.said), 0)
    began = time.monotonic()
    assert run([sleeps, [sys.executable, "-c", "raise SystemExit(3)"]], 300).codes == [None, 3]
    assert time.monotonic() - began < 60


def test_a_disk_that_fails_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.os, "fsync", lambda _: exec("raise OSError(5, 'Input/output error')"))
    found = bounded("disk", lambda: disk.check(tmp_path), 60)
    assert states(found) == [("disk", MISSING)] and "Input/output error" in found[0].said
    assert not list(tmp_path.iterdir())


class Refuses(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(403)

    def log_message(self, *_):
        pass


def test_a_host_that_refuses_is_reached_and_one_that_says_nothing_is_not(monkeypatch):
    monkeypatch.setattr(outside, "CONNECT_S", 0.5)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    with http.server.HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        assert states(outside.wandb()) == [("W&B key", OK), ("W&B host", OK)]
        server.shutdown()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert states(outside.wandb())[1] == ("W&B host", NOTE)


def test_dns_that_does_not_answer_is_a_note_with_what_it_costs_a_start(monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getnameinfo", lambda address, flags: asked.append(address[0]))
    assert states(outside.names()) == [("names", OK)]
    assert asked[0].startswith("::ffff:")  # as the store asks, which no line of /etc/hosts answers

    def silent(address, flags):
        time.sleep(0.2)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getnameinfo", silent)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: silent(name, 0))
    monkeypatch.setattr(outside, "SLOW_NAME_S", 0.1)
    began = time.monotonic()
    (found,) = outside.names()
    assert found.state == NOTE and "127.0.0.1" in found.said and "RES_OPTIONS" in found.way
    assert time.monotonic() - began < 0.55  # one lookup is enough: three would pass the time of the check


def test_a_store_is_listed_written_read_and_left_as_it_was(monkeypatch):
    monkeypatch.setattr(outside, "PATIENCE_S", 1)
    objects.s3_client.cache_clear()
    with serving() as endpoint:
        endpoint.client().create_bucket(Bucket="bucket")
        endpoint.client().put_object(Bucket="bucket", Key="runs/a", Body=b"a")
        found = outside.s3("s3://bucket/runs")
        assert [finding.state for finding in found] == [OK] * 3 and "has 1 objects" in found[1].said
        kept = endpoint.client().list_objects_v2(Bucket="bucket")["Contents"]
        assert [entry["Key"] for entry in kept] == ["runs/a"]
        found = outside.s3("s3://nobody/runs")
        assert states(found)[1:] == [("S3 list", MISSING)] and "its bucket does not exist" in found[1].said
    objects.s3_client.cache_clear()


def test_ranks_here_meet_and_add_up():
    found = ranks.here(2)
    assert states(found) == [("gloo", OK)], found
    assert "2 ranks on" in found[0].said and "GB/s" in found[0].said


def test_a_rank_that_dies_is_said_in_its_own_words(tmp_path, monkeypatch):
    (tmp_path / "reduce.py").write_text("raise RuntimeError('no network today')")
    monkeypatch.setattr(ranks, "SCRIPT", tmp_path / "reduce.py")
    found = ranks.here(2)
    assert states(found) == [("ranks", MISSING)] and "no network today" in found[0].said


def test_a_wrong_sum_is_missing_and_more_ranks_than_gpus_are_a_mistake():
    each = {"right": False, "one_s": 1e-3, "bytes_per_s": 1e9}
    assert ranks.of_backend("nccl", each, {"ranks": 2, "hosts": ["a", "b"]}).state == MISSING
    with pytest.raises(UserError, match="at most the GPUs"):
        ranks.refuse_too_many(3, 2)
    ranks.refuse_too_many(3, 0)


def test_what_others_say_moves_no_cursor_and_holds_no_secret(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a secret of some length")
    told = doctor.line(Finding("ssh", MISSING, "\x1b[2J a secret of some length", "go"))
    assert "\x1b" not in told and "a secret" not in told and "-> go" in told
