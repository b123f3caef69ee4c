"""tools/bench/gpu.py: a part that fails or hangs loses only its own rows, a second call continues, and parts c and d run on a
CPU, before they run on a GPU."""

import csv
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import torch
from plain import build, make_batch, make_world, run_step
from torch.autograd import DeviceType

from tools.bench import gpu, gpu_losses, gpu_report, gpu_task, gpu_teacher, gpu_trace, plain_step
from tools.bench.gpu_report import PART, Row

SCRIPT = Path(gpu.__file__)
FACTS = dict.fromkeys(gpu_report.FACTS, "x") | {"tiny": ""}


def call(*arguments, timeout: float = 900) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def arguments_of(out: Path, minutes: float = 1.0):
    out.mkdir(exist_ok=True)
    return types.SimpleNamespace(out=out, minutes=minutes, tiny=False, only=[], commit="c0ffee", resume=None)


def ended(out: Path) -> dict[str, dict]:
    return {row["part"]: row for row in gpu_report.read(out / "rows.csv") if row["figure"] == PART}


def program(name: str, out: Path) -> str:
    """What stands in a part's place: it writes a row, and then ends as its name says."""
    row = f"from pathlib import Path; from tools.bench import gpu_report as r; facts = {FACTS!r};"
    row += f"r.append(Path({str(out / 'rows.csv')!r}), [r.Row({name!r}, 'time', value=1.0)], facts);"
    below = (
        "import subprocess, sys, time;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True);"
        f"Path({str(out / name)!r}).write_text(str(p.pid));"
    )
    ends = {
        "hangs": below + "time.sleep(600)",
        "dies": below + "import os; os.abort()",
        "floods": f"print('word ' * 1_000_000); r.append(Path({str(out / 'rows.csv')!r}), [r.Row({name!r}, 'part')], facts)",
    }
    return row + ends[name]


def has_ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_part_that_hangs_or_dies_loses_only_its_own_rows(tmp_path, monkeypatch):
    out, names = tmp_path / "out", ["hangs", "dies", "floods"]
    monkeypatch.setattr(gpu, "PARTS", [gpu.Part(name, 5, "", "", {}) for name in names])
    monkeypatch.setattr(gpu, "NAMES", names)
    monkeypatch.setattr(gpu, "LEAST", 1.0)
    monkeypatch.setattr(gpu, "command", lambda part, *_: [sys.executable, "-c", program(part.name, out)])
    gpu.run_all(arguments_of(out), tmp_path)
    rows = gpu_report.read(out / "rows.csv")
    assert [row["part"] for row in rows if row["figure"] == "time"] == names
    ends = {name: (row["status"], row["reason"]) for name, row in ended(out).items()}
    assert ends["hangs"] == ("failed", "killed at its limit of 5 s")
    assert ends["dies"][0] == "failed" and "exit code -6" in ends["dies"][1]
    assert ends["floods"] == ("ok", "")
    assert all(has_ended(int((out / name).read_text())) for name in ("hangs", "dies"))
    assert (out / "log.txt").stat().st_size < 2 * gpu.LOG_BYTES
    page = (out / "summary.md").read_text()
    assert "| hangs | failed |" in page and "killed at its limit" in page and "| floods | ok |" in page


def test_no_part_starts_without_enough_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_in_its_process", lambda *_: pytest.fail("it began"))
    gpu.run_all(arguments_of(tmp_path, minutes=0.3), tmp_path)
    assert "Nothing was measured yet" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("raised", "end"),
    [
        (None, ("ok", "")),
        (gpu_task.Skipped("the GPU has 8"), ("skipped", "the GPU has 8")),
        (gpu_task.Late("the rest wants a second call"), ("late", "the rest wants a second call")),
        (ValueError("of\nany kind"), ("failed", "ValueError: of any kind")),
    ],
)
def test_a_part_reports_how_it_ended(tmp_path, monkeypatch, raised, end):
    def part(task, write):
        write("time", 2.5, "ms", arm="ours")
        if raised:
            raise raised

    monkeypatch.setitem(sys.modules, "tools.bench.gpu_fake", types.SimpleNamespace(part=part))
    task = gpu_task.Task(part="p", out=tmp_path, work=tmp_path, limit=9.0, tiny=True, commit="c0ffee")
    gpu_task.run(task, "gpu_fake", "part", {})
    first, last = gpu_report.read(tmp_path / "rows.csv")
    assert (first["value"], first["unit"], first["arm"], first["tiny"], first["commit"]) == (
        "2.5",
        "ms",
        "ours",
        "tiny",
        "c0ffee",
    )
    assert first["hardware"] and first["torch"] == torch.__version__
    assert (last["figure"], last["status"], last["reason"]) == (PART, *end)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_a_part_is_skipped_with_the_reason(tmp_path):
    task = gpu_task.Task(part="a.machine", out=tmp_path, work=tmp_path, limit=9.0, tiny=False, commit="")
    gpu_task.run(task, "gpu_machine", "machine", {})
    (row,) = gpu_report.read(tmp_path / "rows.csv")
    assert row["status"] == "skipped" and "no CUDA device" in row["reason"]


def test_a_second_call_starts_with_new_parts_and_skips_successful_ones(tmp_path):
    names = gpu.NAMES
    rows = [Row(names[0], PART, status="failed"), Row(names[1], PART), Row(names[2], PART, status="skipped")]
    gpu_report.append(tmp_path / "rows.csv", rows, FACTS)
    gpu_report.append(tmp_path / "rows.csv", [Row(names[5], PART)], FACTS | {"tiny": "tiny"})
    left = [part.name for part in gpu.todo(gpu_report.read(tmp_path / "rows.csv"), arguments_of(tmp_path))]
    assert left == [*names[3:], names[0], names[2]]


def test_rows_of_another_folder_are_copied_but_never_mixed(tmp_path):
    gpu_report.append(tmp_path / "old.csv", [Row("a.machine", PART)], FACTS)
    gpu.take_over(tmp_path / "old.csv", tmp_path / "rows.csv")
    assert gpu_report.read(tmp_path / "rows.csv") == gpu_report.read(tmp_path / "old.csv")
    with pytest.raises(gpu.UserError, match="must come with a new --out"):
        gpu.take_over(tmp_path / "old.csv", tmp_path / "rows.csv")
    with pytest.raises(gpu.UserError, match="is not a file"):
        gpu.take_over(tmp_path / "none.csv", tmp_path / "rows.csv")


def test_an_incomplete_last_row_is_ignored(tmp_path):
    path = tmp_path / "rows.csv"
    gpu_report.append(path, [Row("a.machine", "cores", value=2)], FACTS)
    path.write_text(path.read_text() + "a.machine,co")
    assert [row["figure"] for row in gpu_report.read(path)] == ["cores"]


def test_the_page_compares_targets_with_the_last_measurement(tmp_path):
    def page(facts, *rows) -> str:
        path = tmp_path / "rows.csv"
        gpu_report.append(path, list(rows), facts)
        gpu_report.write_page(tmp_path / "summary.md", gpu_report.read(path), gpu.NAMES)
        path.unlink()
        return (tmp_path / "summary.md").read_text()

    slow, fast = (Row("b.kl_ce", "time", "ours-chunked", value, "ms") for value in (50.0, 30.0))
    end = Row("b.kl_ce", PART)
    assert "| ≤ 39 | 50 ms | MISSED |" in page(FACTS, slow, end)
    assert "| ≤ 39 | 30 ms | met |" in page(FACTS, slow, end, fast, end)
    assert "| ≥ 1.3 | not measured |  |" in page(FACTS, slow, end)
    rehearsed = page(FACTS | {"tiny": "tiny"}, slow, end)
    assert "MISSED" not in rehearsed and "A rehearsal" in rehearsed


def test_the_device_is_idle_where_no_stream_has_a_kernel():
    assert gpu_trace.idle_share([(0, 4), (2, 3), (3, 5), (10, 15)]) == pytest.approx(1 / 3)
    assert gpu_trace.idle_share([(0, 2), (2, 4)]) == 0


def test_a_trace_counts_only_device_work_and_waits_of_the_steps():
    def event(device, name, start, end):
        return types.SimpleNamespace(
            device_type=device, name=name, time_range=types.SimpleNamespace(start=start, end=end)
        )

    cpu, cuda, wait = DeviceType.CPU, DeviceType.CUDA, gpu_trace.WAITS[0]
    host = [
        event(cpu, gpu_trace.MARK, 10, 50),
        event(cpu, wait, 20, 21),
        event(cpu, wait, 60, 61),
        event(cpu, "aten::mm", 12, 13),
    ]
    device = [
        event(cuda, gpu_trace.MARK, 10, 50),
        event(cuda, "gemm", 15, 25),
        event(cuda, "gemm", 30, 34),
        event(cuda, "copy", 40, 41),
    ]
    spans = gpu_trace.kernels(host + device, host)
    assert spans == [("gemm", 15, 25), ("gemm", 30, 34), ("copy", 40, 41)]
    assert gpu_trace.longest(spans) == [("gemm", (0.014, 2)), ("copy", (0.001, 1))]
    assert len(gpu_trace.waits_of(host)) == 1


@pytest.mark.parametrize("part", ["row_kernel", "chunk_sizes"])
def test_parts_that_call_the_kernels_themselves_run_on_a_cpu(part):
    """Only the soak runs them whole: a changed signature must not wait for it."""
    task, rows = types.SimpleNamespace(tiny=True, device=lambda: "cpu"), []
    getattr(gpu_losses, part)(task, lambda *row, **where: rows.append((row, where)))
    assert rows and not [where for _, where in rows if where.get("status") == "failed"]


def test_a_teacher_s_forward_is_measured_in_bf16_and_what_cannot_be_is_said(tmp_path):
    task = types.SimpleNamespace(tiny=True, device=lambda: "cpu", work=tmp_path, part="c.teacher.8b")
    rows = []
    gpu_teacher.measure(task, lambda figure, value=None, unit="", **more: rows.append((figure, value, more)), "8b")
    measured = {more["arm"]: value for figure, value, more in rows if figure == "teacher forward" and value}
    reasons = {more["arm"]: more["reason"] for _, value, more in rows if value is None}
    assert measured["bf16"] > 0 and measured.keys() | reasons.keys() == {f"{p}{c}" for p in ("bf16", "fp8", "int8")
                                                                       for c in ("", " compiled")}  # fmt: skip
    assert reasons["fp8"].startswith("teacher.precision must be ")


def test_needs_lists_packages_that_the_other_machine_lacks(tmp_path):
    (tmp_path / "freeze.txt").write_text("torch==2.11.0\ntyping_extensions==4\nPyYAML\n")
    done = call("--needs", tmp_path / "freeze.txt")
    names = [line.partition("==")[0] for line in done.stdout.splitlines()]
    assert {"deepspeed", "hjson", "megatron-core", "pydantic-core", "huggingface-hub"} <= set(names)
    assert not {"torch", "typing-extensions", "pyyaml", "wandb", "ted-scale"} & set(names)


def test_mistakes_are_one_sentence(tmp_path):
    for words, sentence in (
        ([], "--out must name a folder"),
        (["--out", tmp_path, "--only", "z"], "--only must name parts"),
    ):
        done = call(*words)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr


def test_plain_losses_equal_ours(tmp_path):
    """The baseline computes the same loss as ours: total and gradients of a TED step, in fp32 on the same weights."""
    sections = {"pairs": {"explicit": [[0, 1], [1, 3]], "skip_last": 1}, "loss": {"kl": 0.7, "layer": 0.3}}
    parts = build(make_world(tmp_path), **sections)
    batch, weights = make_batch(), parts.stage.weights(parts.stage.first_step)
    (ours,), gradients = run_step(parts, [batch], weights)
    student, teacher = parts.student.network, parts.teacher.engine.network
    filters = [(parts.student.filters_s[0], parts.student.filters_t[0])]
    student.zero_grad()
    wants = {"use_cache": False, "output_hidden_states": True}
    out, said = (network(batch.tokens_BT, **wants) for network in (student, teacher))
    total = plain_step.losses(parts.plan, weights, batch, out, said, filters)
    assert total.item() == pytest.approx(ours.total.item(), rel=1e-5)
    total.backward()
    for name, parameter in student.named_parameters():
        assert torch.allclose(parameter.grad, gradients[f"network.{name}"], rtol=1e-3, atol=1e-6), name


def test_parts_c_and_d_run_on_a_cpu(tmp_path):
    done = call("--tiny", "--out", tmp_path / "out", "--only", "c.smollm2.ted", "d.students")
    assert done.returncode == 0, done.stderr
    ends = ended(tmp_path / "out")
    assert [row["status"] for row in ends.values()] == ["ok", "ok"], (tmp_path / "out" / "log.txt").read_text()[-3000:]
    rows = gpu_report.read(tmp_path / "out" / "rows.csv")
    step = {(row["figure"], row["arm"]): row for row in rows if row["part"].startswith("c.")}
    for arm in ("plain", "ours"):
        assert all(
            float(step[figure, arm]["value"]) > 0 for figure in ("tokens/s", "part: backward", "peak memory", "op 01")
        )
        assert step["MFU", arm]["status"] == "skipped"
    assert float(step["loss", "ours"]["value"]) == pytest.approx(float(step["loss", "plain"]["value"]), rel=0.05)
    learnt = {row["arm"]: float(row["value"]) for row in rows if row["figure"] == "held-out loss"}
    assert set(learnt) == {"teacher", "ce", "kd", "ted", "hint"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"rows.csv", "summary.md", "log.txt"}


@pytest.mark.soak
def test_the_whole_bench_is_rehearsed_in_five_minutes(tmp_path):
    began = time.monotonic()
    done = call("--tiny", "--minutes", "5", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 320
    assert {name: row["status"] for name, row in ended(tmp_path).items()} == dict.fromkeys(gpu.NAMES, "ok"), done.stdout
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert {row["tiny"] for row in csv.DictReader(file)} == {"tiny"}
    assert len(list(tmp_path.iterdir())) <= 6 and all(p.stat().st_size < 10e6 for p in tmp_path.iterdir())
