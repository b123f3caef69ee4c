"""A local stand-in for W&B's API: enough of it that wandb.init is online, and it keeps what a run sends.

W&B's client asks in GraphQL, streams rows to /files/.../file_stream, and puts files where it is told. Note: answers are found by
the names in a question, because the client asks for more than what it needs; null is an answer to the rest.
"""

import base64
import contextlib
import gzip
import http.server
import json
import re
import threading
import time
from collections.abc import Iterator

PROJECT = {"id": "project", "name": "ted", "entity": {"id": "entity", "name": "lab"}}


class Server(http.server.ThreadingHTTPServer):
    """`key`: the only one that it takes. `slow_s`: what every answer takes once `is_slow` is set."""

    daemon_threads = True

    def __init__(self, key: str, slow_s: float = 0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.key, self.slow_s, self.is_slow = key, slow_s, threading.Event()
        self.asked: list[tuple[str, dict]] = []  # (the question's name, its variables)
        self.lines: list[str] = []  # of the history
        self.files: dict[str, bytes] = {}
        self.runs: set[str] = set()

    def handle_error(self, request, client_address):
        """W&B's process closes its connections as it likes."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def said(self, name: str) -> list[dict]:
        return [variables for asked, variables in self.asked if asked == name]

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.lines]

    def answer(self, name: str, variables: dict) -> dict:
        self.asked.append((name, variables))
        if name == "UpsertBucket":
            is_new = variables["name"] not in self.runs
            self.runs.add(variables["name"])
            return {"upsertBucket": {"bucket": self.bucket(variables["name"]), "inserted": is_new}}
        if name == "RunResumeStatus":
            known = variables["name"] in self.runs
            return {"model": {"id": "project", "name": "ted", "entity": PROJECT["entity"],
                              "bucket": self.resumed(variables["name"]) if known else None}}  # fmt: skip
        if name == "CreateRunFiles":
            places = [{"name": file, "uploadUrl": f"{self.address}/put/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": places}}
        if name == "ArtifactType":  # None: no artifact has this name yet
            return {"project": {"artifact": None}}
        if name == "CreateArtifact":  # committed: the client has nothing more to send
            kept = {
                "id": "artifact",
                "state": "COMMITTED",
                "artifactSequence": {"id": "sequence", "latestArtifact": None},
            }
            return {"createArtifact": {"artifact": kept}}
        if name == "UpsertView2":
            return {"upsertView": {"view": {"id": "view", "name": variables["name"]}, "inserted": True}}
        if name in ("Viewer", "GetDefaultEntity"):
            return {"viewer": {"id": "me", "entity": "lab", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def bucket(self, run: str) -> dict:
        return {"id": f"bucket-{run}", "name": run, "displayName": run, "description": None, "config": "{}",
                "sweepName": None, "project": PROJECT, "historyLineCount": len(self.lines)}  # fmt: skip

    def resumed(self, run: str) -> dict:
        last = self.lines[-1:] or ["{}"]
        return {**self.bucket(run), "logLineCount": 0, "eventsLineCount": 0, "historyTail": json.dumps(last),
                "summaryMetrics": last[0], "eventsTail": "[]", "tags": [], "wandbConfig": '{"t": 1}'}  # fmt: skip


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.body()
        if self.key() != self.server.key:
            self.say(401, {"errors": [{"message": "the key is not known"}]})
        elif self.path.endswith("/file_stream"):
            self.server.lines += json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.say(200, {})
        else:
            asked = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            self.say(200, {"data": self.server.answer(name[1] if name else "", asked.get("variables") or {})})

    def do_PUT(self):
        self.server.files[self.path.removeprefix("/put/")] = self.body()
        self.say(200, {})

    def do_GET(self):
        self.say(404, {})

    def body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def key(self) -> str:
        return base64.b64decode(self.headers.get("Authorization", "").partition(" ")[2]).decode().rpartition(":")[2]

    def say(self, status: int, answer: dict) -> None:
        if self.server.is_slow.is_set():
            time.sleep(self.server.slow_s)
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # nobody waits any more
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serving(key: str, slow_s: float = 0.0) -> Iterator[Server]:
    with Server(key, slow_s) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
