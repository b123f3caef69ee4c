"""An object store that fails by rules: a proxy before moto, as a process of its own (object_server.py has moto).

A rule is about the requests whose "METHOD /bucket/key?query" matches a glob; a part of an upload has partNumber=N in its query,
a listing list-type=2. Like those of faulty_files.py, it strikes some of them by their number. What it does: slow_down (503),
expire (the credentials, 400), cut (the connection, in the middle of the body), lose_answer (the request is carried out, the
connection is cut before the answer) and delay. `POST /_rules` replaces the rules and answers with what was struck.
"""

import fnmatch
import http.client
import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench import object_server

EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
KINDS = ("slow_down", "expire", "cut", "lose_answer", "delay")


class Rule(NamedTuple):
    requests: str
    kind: str
    first: int = 0
    times: int = 1
    seconds: float = 0.0


class Rules:
    """Those of now, with the number of requests that each has seen."""

    def __init__(self, rules: list[Rule] = ()):
        self.rules, self.seen, self.log = rules, [0] * len(rules), []

    def strike(self, request: str) -> Rule | None:
        for number, rule in enumerate(self.rules):
            if fnmatch.fnmatchcase(request, rule.requests):
                self.seen[number] += 1
                if 0 <= self.seen[number] - 1 - rule.first < rule.times:
                    self.log.append(f"{rule.kind} {request}")
                    return rule
        return None


class Proxy(object_server.Proxy):
    rules, lock = Rules(), threading.Lock()

    def forward(self) -> None:
        if self.path == "/_rules":
            return self.control()
        with self.lock:
            rule = Proxy.rules.strike(f"{self.command} {self.path}")
        kind, length = rule.kind if rule else "", int(self.headers.get("Content-Length") or 0)
        if kind == "cut" and length > 1:
            self.rfile.read(length // 2)
            return self.reset()
        body = self.rfile.read(length)
        time.sleep(rule.seconds if kind == "delay" else 0)
        if kind in ("slow_down", "expire"):
            content = object_server.SLOW_DOWN if kind == "slow_down" else EXPIRED
            return self.answer(503 if kind == "slow_down" else 400, [], content)
        found, content = self.of_moto(body)
        if kind == "lose_answer":
            return self.reset()
        self.answer(found.status, found.getheaders(), content, cut=kind == "cut" and len(content) > 1)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

    def control(self) -> None:
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            before, Proxy.rules = Proxy.rules, Rules([Rule(*values) for values in wanted])
        self.answer(200, [], json.dumps(before.log).encode())


class Store(NamedTuple):
    """The running proxy, as a test uses it."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def arm(self, rules: list[Rule]) -> list[str]:
        """From now on these rules. Returns what the rules before have struck."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("POST", "/_rules", json.dumps(rules))
        return json.loads(connection.getresponse().read())


@contextmanager
def standing_before(moto_url: str):
    """A proxy before a store until the block ends."""
    command = [sys.executable, __file__, moto_url.rpartition(":")[2]]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield Store(int(process.stdout.readline()))
    finally:
        process.stdin.close()
        process.wait(timeout=10)


def main() -> None:
    object_server.moto_port = int(sys.argv[1])
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    print(proxy.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
