"""The harness that lets files and object stores fail, itself: every rule does what it says, to the call that it names."""

import errno
import http.client
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import faulty_files
import faulty_store
import pytest
from faulty_files import Faults

PROBE = """
import os, sys
from pathlib import Path
here = Path(sys.argv[1])
def tried(name, action):
    try:
        answer = action()
    except OSError as error:
        answer = os.strerror(error.errno)
    print(name, answer, flush=True)
tried("open", lambda: (here / "absent").open())
tried("read", lambda: os.read(os.open(here / "file", os.O_RDONLY), 6))
tried("again", lambda: os.read(os.open(here / "file", os.O_RDONLY), 6))
tried("vector", lambda: os.preadv(os.open(here / "vector", os.O_RDONLY), [bytearray(6)], 0))
tried("rename", lambda: (here / "a").rename(here / "b"))
tried("listed", lambda: sorted(os.listdir(here / "folder")))
tried("stat", lambda: (here / "stale").exists())
made = os.open(here / "made", os.O_WRONLY | os.O_CREAT)
os.write(made, b"content")
tried("fsync", lambda: os.fsync(made))
tried("close", lambda: os.close(made))
tried("made", (here / "made").read_bytes)
(here / "made").unlink()
print("not killed")
"""


@pytest.mark.skipif(faulty_files.COMPILER is None, reason="there is no C compiler for faulty_files.c")
def test_rules_fail_shorten_age_lose_and_kill_what_they_name(tmp_path):
    (tmp_path / "file").write_text("sixsix")
    (tmp_path / "vector").write_text("sixsix")
    (tmp_path / "a").touch()
    (tmp_path / "folder" / "young").mkdir(parents=True)
    faults = Faults(tmp_path / "faults")
    faults.arm(
        [
            faulty_files.Rule("open", "*/absent", "fail", errno.EIO),
            faulty_files.Rule("read", "*/file", "short"),
            faulty_files.Rule("read", "*/vector", "fail", errno.EIO),
            faulty_files.Rule("rename", "*/a", "twice", errno.ENOENT),
            faulty_files.Rule("list", "*/folder", "stale", 60),
            faulty_files.Rule("stat", "*/stale", "fail", errno.ESTALE),
            faulty_files.Rule("fsync", "*/made", "lost", errno.EIO),
            faulty_files.Rule("close", "*/made", "fail", errno.EDQUOT),
            faulty_files.Rule("open", "*", "fail", errno.EIO, rank=1),
            faulty_files.Rule("unlink", "*/made", "kill"),
        ]
    )
    environment = {**os.environ, **faults.environment()}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [
        "open Input/output error", "read b'six'", "again b'sixsix'", "vector Input/output error",
        "rename No such file or directory", "listed []",
        "stat Stale file handle", "fsync Input/output error", "close Disk quota exceeded", f"made {bytes(7)}",
    ]  # fmt: skip
    assert done.returncode == -9 and (tmp_path / "b").exists() and (tmp_path / "made").exists()
    assert len(faults.log()) == 9


class Origin(BaseHTTPRequestHandler):
    """A store that only counts."""

    protocol_version, asked = "HTTP/1.1", 0

    def do_PUT(self) -> None:
        Origin.asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"done")

    def log_message(self, *_) -> None:
        pass


def put(store, query: str):
    """(status, body), or the name of what the client meets."""
    connection = http.client.HTTPConnection("127.0.0.1", store.port, timeout=10)
    try:
        connection.request("PUT", f"/bucket/key?{query}", b"content")
        answer = connection.getresponse()
        return answer.status, answer.read()[:30]
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()


def test_a_store_refuses_cuts_expires_and_loses_answers_of_the_part_that_a_rule_names():
    origin = ThreadingHTTPServer(("127.0.0.1", 0), Origin)
    Thread(target=origin.serve_forever, daemon=True).start()
    with faulty_store.standing_before(f"http://127.0.0.1:{origin.server_address[1]}") as store:
        store.arm(
            [
                faulty_store.Rule("PUT *partNumber=2", "slow_down", first=1),
                faulty_store.Rule("PUT *partNumber=3", "expire"),
                faulty_store.Rule("PUT *partNumber=4", "cut"),
                faulty_store.Rule("PUT *partNumber=5", "lose_answer"),
            ]
        )
        assert [put(store, "partNumber=2") for _ in range(3)] == [
            (200, b"done"), (503, b"<Error><Code>SlowDown</Code><M"), (200, b"done")
        ]  # fmt: skip
        assert put(store, "partNumber=3") == (400, b"<Error><Code>ExpiredToken</Cod")
        asked = Origin.asked
        assert put(store, "partNumber=4") in ("ConnectionResetError", "RemoteDisconnected", "BrokenPipeError")
        assert Origin.asked == asked
        assert put(store, "partNumber=5") in ("ConnectionResetError", "RemoteDisconnected")
        assert Origin.asked == asked + 1
        assert len(store.arm([])) == 4
    origin.shutdown()
