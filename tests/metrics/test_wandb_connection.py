"""What Weights & Biases gets, read from its own file, and that its trouble neither keeps a run from starting nor slows it."""

import contextlib
import http.server
import socket
import threading
import time

import pytest
import wandb
from test_metrics import metrics, rows_of, take_steps
from tiny import make_run
from wandb_file import finished, read_config, read_records, read_rows

from ted_scale.metrics import wandb_connection
from ted_scale.metrics.wandb_connection import WandbRun, has_key, open_wandb

SECTION = {
    "project": "ted", "mode": "offline", "entity": "lab", "group": "arms", "tags": ["tiny", "cpu"], "notes": "Größe 😀",
}  # fmt: skip


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """(run, W&B ids, records) of two processes: one takes six steps and validates, the other resumes from step 6."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_API_KEY", raising=False)
        run = make_run(tmp_path_factory.mktemp("offline"), wandb=SECTION, log_every=2)
        ids = []
        for first, last in ((1, 6), (7, 10)):
            wandb_run = open_wandb(run, ids[0] if ids else None)
            ids.append(wandb_run.id)
            numbers = metrics(run, step=first - 1, wandb_run=wandb_run)
            take_steps(numbers, first, last)
            numbers.write(last, last * 256, {"val/loss": 1.5})
            numbers.alert("loss spike", f"step {last}: loss/total is 9")
            numbers.close()
            time.sleep(1.1)  # W&B names its folders by the second
    files = sorted((run.folder / "wandb").glob("offline-run-*/*.wandb"))
    return run, ids, [finished(file) for file in files]


def test_a_resumed_run_keeps_its_wandb_id(offline):
    run, ids, lives = offline
    assert ids[0] == ids[1] and len(lives) == 2
    headers = [r.run for records in lives for r in records if r.WhichOneof("record_type") == "run"]
    assert {h.run_id for h in headers} == {ids[0]}
    assert all((run.folder / "wandb").glob(f"offline-run-*-{ids[0]}"))


def test_a_start_that_made_no_checkpoint_leaves_its_id_to_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_connection, "WandbRun", lambda run_id, *_: run_id)
    monkeypatch.setattr(wandb_connection, "start_service", lambda: None)
    run = make_run(tmp_path, wandb=SECTION)
    lost = open_wandb(run, None)  # no folder yet: nothing is kept, and nothing fails
    run.folder.mkdir(parents=True)
    first = open_wandb(run, None)
    assert first != lost and open_wandb(run, None) == first
    assert open_wandb(run, "of-a-checkpoint") == "of-a-checkpoint" == open_wandb(run, None)


@pytest.mark.parametrize("content", ["", "../other", "two words", "a" * 65, "é"])
def test_an_id_file_that_holds_no_id_is_written_anew(tmp_path, content):
    file = tmp_path / wandb_connection.ID_FILE
    file.write_text(content, encoding="utf-8")
    assert wandb_connection.id_in(tmp_path) is None
    wandb_connection.keep_id(tmp_path, "an-id")
    assert file.read_text() == "an-id"


def test_wandb_has_the_settings_of_the_run_file(offline):
    run, _, (records, _) = offline
    header = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (header.project, header.entity, header.run_group, header.display_name) == ("ted", "lab", "arms", "tiny")
    assert (list(header.tags), header.notes) == (["tiny", "cpu"], "Größe 😀")
    config = read_config(records)
    assert config["train"] == run.model_dump(mode="json")["train"]
    assert config["filters"]["from"] is None and config["method"] == "ted"


def test_the_end_of_a_run_waits_for_wandb_at_most_30_s(offline):
    """W&B records its settings."""
    for records in offline[2]:
        features = [r.telemetry.feature for r in records if r.WhichOneof("record_type") == "telemetry"]
        assert any(f.finish_timeout for f in features) and any(f.finish_timeout_raises for f in features)


def test_wandb_gets_the_rows_of_the_file(offline):
    run, _, lives = offline
    told = [{k: v for k, v in row.items() if not k.startswith("_")} for records in lives for row in read_rows(records)]
    assert told == rows_of(run)
    assert [row["step"] for row in told] == [2, 4, 6, 6, 8, 10, 10]
    assert {"val/loss": 1.5, "step": 6, "tokens": 1536} in told


def test_a_spike_is_a_wandb_alert(offline):
    _, _, lives = offline
    alerts = [[r.alert for r in records if r.WhichOneof("record_type") == "alert"] for records in lives]
    assert [[(a.title, a.text, a.level) for a in life] for life in alerts] == [
        [
            ("loss spike", f"step {step}: loss/total is 9", "WARN"),
            ("the run is finished", f"it is at step {step}", "INFO"),
        ]
        for step in (6, 10)
    ]


def test_wandb_plots_over_steps_and_has_tokens_as_another_axis(offline):
    _, _, (records, _) = offline
    axes = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    assert {m.name for m in axes} >= {"step", "tokens"}
    assert {m.step_metric for m in axes if m.glob_name == "*" or m.name.startswith("loss/")} == {"step"}
    assert all("tokens" in row and "step" in row for row in read_rows(records))


def test_without_a_wandb_section_nothing_is_opened(tmp_path):
    assert open_wandb(make_run(tmp_path), None) is None


def test_a_key_is_found_in_the_environment_or_in_netrc(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not has_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert not has_key()
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert has_key()


# W&B's trouble


WRONG_KEY = "it refuses the API key (CommError: Failed to get resume status for run our-id: returned error 401"


@contextlib.contextmanager
def server(answer: int | None):
    """The address of a stand-in for W&B that answers every request with this status, or accepts connections and is silent."""
    if answer is None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield f"http://127.0.0.1:{silent.getsockname()[1]}"
        return

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(answer)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as answers:
        threading.Thread(target=answers.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{answers.server_address[1]}"
        answers.shutdown()


@pytest.mark.parametrize("answer", [None, 503, 401], ids=["silent", "503", "wrong key"])
def test_a_run_starts_at_once_without_wandb_and_loses_no_row(tmp_path, monkeypatch, caplog, answer):
    caplog.set_level("INFO", logger="ted_scale")
    monkeypatch.setattr(wandb_connection, "ATTEMPT_S", 1.0)
    monkeypatch.setattr(wandb_connection, "PATIENCE_S", 0.0)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    wandb.teardown()  # it keeps the settings of its first run
    run = make_run(tmp_path, wandb={"project": "p", "mode": "online"})
    with server(answer) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        began = time.monotonic()
        wandb_run = open_wandb(run, "our-id")
        numbers = metrics(run, wandb_run=wandb_run)
        take_steps(numbers, 1, 10)
        assert time.monotonic() - began < 3  # most of it starts W&B's process
        numbers.close()
    wandb.teardown()
    assert wandb_run.id == "our-id"
    (file,) = (run.folder / "wandb").glob("offline-run-*-our-id/*.wandb")
    assert [row["step"] for row in read_rows(list(read_records(file)))] == list(range(1, 11))
    (line,) = [record.message for record in caplog.records if "W&B" in record.message]
    reason = WRONG_KEY if answer == 401 else "it could not be reached (CommError: "
    assert line.startswith(f"W&B is offline, because {reason}") and "upload with `wandb sync" in line


def test_rows_wait_until_the_wandb_run_is_open_and_arrive_in_order(tmp_path):
    ready, arrived = threading.Event(), []

    class Opened:
        def log(self, row):
            arrived.append(row["step"])

        def alert(self, title, text, level):
            arrived.append(title)

        def finish(self):
            arrived.append("end")

    numbers = metrics(make_run(tmp_path), wandb_run=WandbRun("id", lambda closing: ready.wait(10) and Opened()))
    take_steps(numbers, 1, 4)
    assert arrived == []
    ready.set()
    numbers.close()
    assert arrived == [1, 2, 3, 4, "the run is finished", "end"]


def test_what_waits_for_wandb_is_bounded_which_is_logged_once(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="ted_scale")
    monkeypatch.setattr(wandb_connection, "KEPT", 3)
    ready, arrived = threading.Event(), []
    wandb_run = WandbRun("id", lambda closing: ready.wait(10) and arrived)
    for number in range(6):
        wandb_run.tell(lambda opened, number=number: opened.append(number))
    ready.set()
    wandb_run.actions.put(None)
    wandb_run.thread.join(10)
    assert arrived == [0, 1, 2]
    assert [r.message for r in caplog.records] == [
        "W&B is behind by 3 rows and misses some from here on; metrics.jsonl has every number"
    ]


class Lost:
    """A W&B run whose process was killed."""

    def __getattr__(self, name):
        raise ConnectionResetError("Connection lost")


def test_a_run_whose_wandb_process_is_killed_keeps_its_numbers_and_logs_it_once(tmp_path, caplog):
    caplog.set_level("INFO", logger="ted_scale")
    run = make_run(tmp_path)
    numbers = metrics(run, wandb_run=WandbRun("id", lambda closing: Lost()))
    take_steps(numbers, 1, 4)
    numbers.alert("a spike", "a loss spiked")
    numbers.close()
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4]
    said = [record.message for record in caplog.records]
    lost = "W&B is lost until the next start (ConnectionResetError: Connection lost); metrics.jsonl has every number"
    assert said.count(lost) == 1 and "a loss spiked" in said


def test_an_alert_contains_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-in-an-alert")
    told = []

    class Run:
        def alert(self, title, text, level):
            told.append(text)

        def finish(self):
            pass

    numbers = metrics(make_run(tmp_path), wandb_run=WandbRun("id", lambda closing: Run()))
    numbers.alert("a spike", "denied for planted-in-an-alert")
    numbers.close()
    assert told == ["denied for ***", "it is at step 0"]
