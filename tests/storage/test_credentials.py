"""Credentials that come late, expire or are replaced in mid-run are waited for; where none can come, nobody waits."""

import http.server
import json
import os
import threading
import time

import pytest

from ted_scale.base.errors import UserError
from ted_scale.storage import objects, retries
from ted_scale.storage.client import s3_client

KEYS = {
    "Code": "Success",
    "AccessKeyId": "good",
    "SecretAccessKey": "secret",
    "Token": "t",
    "Expiration": "2099-01-01T00:00:00Z",
}
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
EMPTY = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"


class Machine(http.server.BaseHTTPRequestHandler):
    """A machine's metadata service, and a store that only knows the keys named `good`."""

    def do_PUT(self):
        if self.path.endswith("/api/token"):
            time.sleep(self.server.late_s)
        return self.say(200, b"token")

    def do_GET(self):
        if self.path.startswith("/latest/"):
            if "X-aws-ec2-metadata-token" not in self.headers:
                return self.say(401, b"")
            self.server.asked += 1
            is_role = self.path.endswith("/security-credentials/")
            said = b"role" if is_role else json.dumps(KEYS).encode()
            return self.say(503 if self.server.asked <= self.server.busy else 200, said)
        is_known = "Credential=good/" in self.headers.get("Authorization", "")
        return self.say(200, EMPTY) if is_known else self.say(400, EXPIRED)

    def say(self, status: int, content: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:
            pass

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def machine(monkeypatch, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Machine)
    server.busy, server.late_s, server.asked = 0, 0.0, 0
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for key in [key for key in os.environ if key.startswith("AWS_")]:
        monkeypatch.delenv(key)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    for key, value in {
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": url, "AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/nowhere", "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    s3_client.cache_clear()
    yield server
    s3_client.cache_clear()
    server.shutdown()
    server.server_close()


def ask() -> dict:
    return objects.listed("s3://bucket/corpus", "", 20)


def put_keys(tmp_path, name: str) -> None:
    (tmp_path / "credentials").write_text(f"[default]\naws_access_key_id={name}\naws_secret_access_key=secret\n")


def test_a_machine_s_credentials_that_come_late_are_waited_for(machine):
    machine.late_s = 1.5
    assert ask() == {}


def test_a_service_that_is_asked_too_often_is_asked_again(machine, monkeypatch):
    monkeypatch.setenv("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "1")
    machine.busy = 5
    assert ask() == {}
    assert machine.asked > 5


def test_a_machine_without_a_role_is_one_sentence_after_a_while(machine, monkeypatch):
    monkeypatch.setattr(retries, "KEYS_S", 0.5)
    machine.busy = 10**6
    with pytest.raises(UserError, match="there are no credentials; set AWS_ACCESS_KEY_ID"):
        ask()
    assert machine.asked > 2


@pytest.mark.parametrize("off", ["AWS_EC2_METADATA_DISABLED", "AWS_EC2_METADATA_SERVICE_ENDPOINT"])
def test_where_no_service_gives_credentials_nobody_waits(machine, monkeypatch, off):
    monkeypatch.setenv(off, "true" if off.endswith("DISABLED") else "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    with pytest.raises(UserError, match="there are no credentials"):
        ask()


def test_keys_that_are_replaced_in_mid_run_are_read_again(machine, monkeypatch, tmp_path):
    put_keys(tmp_path, "good")
    assert ask() == {}
    put_keys(tmp_path, "old")
    s3_client.cache_clear()
    timer = threading.Timer(0.3, put_keys, [tmp_path, "good"])
    timer.start()
    assert ask() == {}
    timer.join()


def test_keys_that_stay_expired_are_one_sentence(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(retries, "KEYS_S", 0.3)
    put_keys(tmp_path, "old")
    with pytest.raises(
        UserError, match=r"its credentials have expired or were replaced \(ExpiredToken\); set new ones"
    ):
        ask()
