"""An S3 endpoint with faults, for tests and stream.py: moto's server, behind a proxy that delays and fails.

It is a process of its own, so that it does not slow the reader's interpreter. It prints the ports of the proxy and of moto,
and exits when its standard input closes. The proxy accepts POST /_faults {"latency_ms", "fail", "remember"}: a share `fail` of
the requests for objects and listings gets a 503, half of the body, or a broken connection, in turn. `remember` caches pages
of listings, because moto reads the whole bucket for each of them.
"""

import http.client
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

faults = {"latency_ms": 0.0, "fail": 0.0, "remember": False}
pages: dict[str, tuple] = {}
counts = {"requests": 0, "failed": 0}
draws, lock, moto_port = random.Random(7), threading.Lock(), 0
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


def drawn_fault() -> int:
    """0: none, 1: 503, 2: half a body, 3: a broken connection."""
    with lock:
        counts["requests"] += 1
        if draws.random() >= faults["fail"]:
            return 0
        counts["failed"] += 1
        return 1 + counts["failed"] % 3


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments) -> None:
        pass

    def control(self) -> None:
        faults.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        with lock:
            said = json.dumps(counts).encode()
            counts.update(requests=0, failed=0)
        self.answer(200, [], said)

    def forward(self) -> None:
        if self.path == "/_faults":
            return self.control()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = drawn_fault() if self.command == "GET" else 0
        time.sleep(faults["latency_ms"] / 1000)
        if fault == 1:
            return self.answer(503, [], SLOW_DOWN)
        if fault == 3:
            return self.reset()
        found, content = self.of_moto(body)
        self.answer(found.status, found.getheaders(), content, cut=fault == 2 and len(content) > 1)

    def of_moto(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        is_page = faults["remember"] and "list-type=2" in self.path
        if is_page and self.path in pages:
            return pages[self.path]
        moto = http.client.HTTPConnection("127.0.0.1", moto_port)
        moto.request(self.command, self.path, body, dict(self.headers))
        found = moto.getresponse()
        answer = found, found.read()
        moto.close()
        if is_page:
            pages[self.path] = answer
        return answer

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

    def answer(self, status: int, headers, content: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        length = {k.lower(): v for k, v in headers}.get("content-length", len(content))
        for key, value in headers:
            if key.lower() not in ("content-length", "connection", "transfer-encoding", "server"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()  # without FIN: the other side sees a reset


def main() -> None:
    global moto_port
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    moto_port = moto.get_host_and_port()[1]
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    print(proxy.server_address[1], moto_port, flush=True)
    sys.stdin.read()
    os._exit(0)


class Endpoint:
    """The running server, as a test uses it."""

    def __init__(self, proxy_port: int, port: int):
        self.url, self.port = f"http://127.0.0.1:{proxy_port}", proxy_port
        self.moto = f"http://127.0.0.1:{port}"

    def faults(self, latency_ms: float = 0.0, fail: float = 0.0, remember: bool = False) -> dict:
        """Set the faults; returns the counts since the last call."""
        wanted = {"latency_ms": latency_ms, "fail": fail, "remember": remember}
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("POST", "/_faults", json.dumps(wanted))
        return json.loads(connection.getresponse().read())

    def client(self):
        """Straight to moto, without faults, to put objects there."""
        import boto3

        return boto3.session.Session().client("s3", endpoint_url=self.moto)

    def put_folder(self, folder: Path, bucket: str, key: str = "") -> None:
        client = self.client()
        client.create_bucket(Bucket=bucket)
        for path in sorted(folder.iterdir()):
            client.put_object(Bucket=bucket, Key=key + path.name, Body=path.read_bytes())


@contextmanager
def serving():
    """A server until the block ends, and the environment that its readers need."""
    needed = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    command = [sys.executable, str(Path(__file__).resolve())]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    before = dict(os.environ)
    try:
        endpoint = Endpoint(*map(int, process.stdout.readline().split()))
        os.environ.update(needed, AWS_ENDPOINT_URL=endpoint.url)
        yield endpoint
    finally:
        for key in (*needed, "AWS_ENDPOINT_URL"):
            os.environ.pop(key, None)
        os.environ.update(before)
        process.stdin.close()
        process.wait(timeout=10)


if __name__ == "__main__":
    main()
