"""Secrets planted wherever they come from, and looked for in everything that is written."""

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
from places import ROOT
from tiny import make_corpus, make_model, make_run, run_values, write_run
from wandb_file import read_records

from ted_scale.base import redact
from ted_scale.base.errors import RunStopped, UserError
from ted_scale.config.run_file import load_run
from ted_scale.metrics import wandb_connection
from ted_scale.storage import objects

PLANTED = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED01",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret/0123456789",
    "AWS_SESSION_TOKEN": "planted-session-token-0123456789",
    "HF_TOKEN": "hf_plantedplantedplantedplanted01",
    "SLURM_JWT": "planted-slurm-jwt-0123456789",
    "MY_DATABASE_PASSWORD": "planted password 0123456789",
}
GIT = "ghp_plantedplantedplantedplanted02"
TEXTS = {  # a text and what of it must not be left
    "s3 path": ("s3://AKIAPLANTEDPLANTED02:a/b+c@bucket/corpora", "a/b+c"),
    "password in a URL": ("https://user:hunter2hunter2@host/x", "hunter2hunter2"),
    "token in a URL": (f"https://{GIT}@github.com/a/b", GIT),
    "signed address": ("https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature=abcdef0123&x=1", "abcdef0123"),
    "credential of one": ("https://h/k?X-Amz-Credential=AKIAPLANTED%2F20260101&x=1", "AKIAPLANTED%2F20260101"),
    "blob storage's": ("https://h/k?sv=2020&sig=abcdefg%3D", "abcdefg%3D"),
    "header": ("Authorization: Bearer abcdefgh.ijkl", "abcdefgh"),
    "setting": ("aws_secret_access_key = abcdefghijkl", "abcdefghijkl"),
    "key id": ("The key AKIAPLANTEDPLANTED03 does not exist", "AKIAPLANTEDPLANTED03"),
    "Hugging Face": ("token hf_abcdefghijklmnopqrstuvwxyz", "hf_abcdefghijklmnopqrstuvwxyz"),
    "JWT": ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN", "dozjgNryP4J3jVmN"),
    "private key": ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "MIIE"),
}  # fmt: skip
PLAIN = [
    "s3://bucket/corpora/web", "s3://bucket/a@b:c", "msc://profile/web", "http://localhost:9000/a@b", "http://h/x?page=2",
    "runs/secret-sauce", "step 5 loss/kl 1.25", "the tokenizer must have a token for it",
    "/data/risk-free-corpus-of-the-world-2026",
    "models/Qwen--Qwen3-0.6B", "tokens_per_step = 2097152", "2f9a8f1c2b0d4e6f8a1b3c5d7e9f0a2b4c6d8e0f",
]  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("text", "secret"), TEXTS.values(), ids=TEXTS)
def test_a_secret_is_known_by_its_shape(text, secret):
    hidden = redact.redact(f"it was {text} there")
    assert secret not in hidden and "***" in hidden
    assert hidden.startswith("it was ") and redact.redact(hidden) == hidden


@pytest.mark.parametrize("text", PLAIN)
def test_text_without_a_secret_is_not_changed(text):
    assert redact.redact(text) == text


def test_a_secret_is_known_from_the_environment(environment, monkeypatch):
    for value in PLANTED.values():
        assert redact.redact(f"x{value}x") == "x***x"
    assert "planted" not in redact.redact("key=planted%2Faws%2Bsecret%2F0123456789&")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(Path(__file__)))
    monkeypatch.setenv("TOKENS_PER_STEP", "123456789012")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalsefalse")
    assert redact.redact(f"{__file__} 123456789012 falsefalsefalse") == f"{__file__} 123456789012 falsefalsefalse"


WRITTEN = {
    "data.corpora[0].path": "data.corpora=[{path='s3://AKIAPLANTEDPLANTED02:a/b+c@bucket/x'}]",
    "teacher.path": f"teacher.path=https://{GIT}@huggingface.co/a",
    "wandb.notes": "wandb={project='p', notes='my key is wandb_v1_plantedplantedplantedplanted'}",
    "wandb.tags[1]": "wandb={project='p', tags=['a', 'AKIAPLANTEDPLANTED02']}",
    "filters.from": "filters.from=https://h/k?X-Amz-Signature=abcdef0123",
    "train.lr": "train.lr=hf_plantedplantedplantedplanted01",
    "zzz": "zzz=hf_plantedplantedplantedplanted01",
}


@pytest.mark.parametrize("key", WRITTEN)
def test_a_run_file_with_a_secret_is_refused_by_its_key_without_showing_it(tmp_path, key):
    values = run_values(tmp_path)
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(values))
    with pytest.raises(
        UserError, match="must hold no credentials, but does; they belong into the environment"
    ) as caught:
        load_run(path, [WRITTEN[key]])
    assert f"{key} must hold" in str(caught.value)
    assert not any(word in str(caught.value).lower() for word in ("planted", "a/b+c", "abcdef0123"))


@pytest.mark.parametrize("text", ["a" * 200_000, "a://b:" * 30_000, "-eyJabcdefgh" * 15_000, "password " * 20_000])
def test_redacting_a_long_hostile_text_is_fast(text):
    """Python's lock is held meanwhile, and a rank that holds it is taken for dead."""
    began = time.monotonic()
    redact.redact(text)
    assert time.monotonic() - began < 3
    began = time.monotonic()
    assert len(str(UserError(text * 10))) < 4100
    assert time.monotonic() - began < 1


def test_the_traceback_of_a_thread_is_redacted(environment):
    code = (
        "import os, threading\nfrom ted_scale.base.exits import run_main\n"
        "def fail(): raise KeyError(os.environ['HF_TOKEN'])\n"
        "def main():\n    t = threading.Thread(target=fail)\n    t.start()\n    t.join()\nrun_main(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "KeyError: '***'" in done.stderr and "planted" not in done.stderr


def test_an_error_sentence_is_redacted_and_one_line(environment):
    for kind in (UserError, RunStopped):
        said = str(kind(f"x must be y, but is {PLANTED['HF_TOKEN']}\nand \x1b[2J s3://k:s@b"))
        assert said == "x must be y, but is ***\\nand \\x1b[2J s3://***@b"


def test_an_error_of_a_store_s_library_is_redacted():
    def request():
        raise OSError("GET https://b.s3.amazonaws.com/k?X-Amz-Signature=abcdef0123 failed for s3://key:secretsecret@b")

    with pytest.raises(UserError) as caught:
        objects.persist("corpus s3://b/k must be readable", request, 1.0)
    assert (
        "failed for" in str(caught.value)
        and "abcdef0123" not in str(caught.value)
        and "secretsecret" not in str(caught.value)
    )


@pytest.mark.parametrize("path", ["s3://key:secretsecret@bucket/x", "msc://key:secretsecret@profile/x"])
def test_a_tool_refuses_credentials_in_a_path(path):
    with pytest.raises(UserError, match="must hold no credentials, but does") as caught:
        objects.check_package(path)
    assert "secretsecret" not in str(caught.value)


def test_records_of_every_logger_and_their_tracebacks_are_redacted(environment, tmp_path):
    factory = logging.getLogRecordFactory()
    handler = logging.FileHandler(tmp_path / "log")
    logger = logging.getLogger("somebody.else")
    logger.addHandler(handler)
    try:
        redact.watch_logs()
        redact.watch_logs()
        logger.warning("at %s with %s", "s3://key:secretsecret@b", PLANTED["HF_TOKEN"])
        try:
            raise ValueError(f"denied: {PLANTED['AWS_SECRET_ACCESS_KEY']}")
        except ValueError:
            logger.exception("it failed")
    finally:
        logging.setLogRecordFactory(factory)
        logger.removeHandler(handler)
        handler.close()
    text = (tmp_path / "log").read_text()
    assert "at s3://***@b with ***" in text and "ValueError: denied: ***" in text and "Traceback" in text
    assert "secretsecret" not in text and "planted" not in text


def test_the_traceback_of_an_unexpected_exception_is_redacted(environment):
    code = (
        "import os\nfrom ted_scale.base.exits import run_main\n"
        "def main(): raise KeyError(os.environ['HF_TOKEN'] + 's3://k:secretsecret@b')\nrun_main(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "KeyError: '***s3://***@b'" in done.stderr
    assert "planted" not in done.stderr and "secretsecret" not in done.stderr


def make_repository(folder: Path, remote: str) -> None:
    commands = ["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "m"], ["remote", "add", "origin", remote]
    for command in commands:
        subprocess.run(["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e", *command], check=True)


def test_the_git_remote_is_reported_without_its_credentials(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    repository.mkdir()
    make_repository(repository, f"https://{GIT}:x-oauth-basic@github.com/a/b.git")
    (repository / "pyproject.toml").touch()
    monkeypatch.setattr(wandb_connection, "__file__", str(repository / "ted_scale" / "metrics" / "wandb_connection.py"))
    facts = wandb_connection.git_facts()
    assert facts["git_remote_url"] == "https://***@github.com/a/b.git" and len(facts["git_commit"]) == 40


def test_a_package_that_is_installed_in_a_users_repository_reports_nothing_of_it(tmp_path, monkeypatch):
    make_repository(tmp_path, "https://github.com/user/private.git")
    (tmp_path / "pyproject.toml").touch()
    installed = tmp_path / ".venv" / "site-packages" / "ted_scale" / "metrics" / "wandb_connection.py"
    monkeypatch.setattr(wandb_connection, "__file__", str(installed))
    installed.parent.mkdir(parents=True)
    assert wandb_connection.git_facts() == {"disable_git": True}


def leaks(folder: Path, secrets) -> list[str]:
    """Files below that hold one of the secrets, and links and names too."""
    found = []
    for path in folder.rglob("*"):
        content = str(path).encode() + (path.read_bytes() if path.is_file() else b"")
        found += [f"{path}: {secret}" for secret in secrets if secret.encode() in content]
    return found


SPEAKS = """
import logging, os, runpy, sys
sys.path.insert(0, os.getcwd())
from ted_scale import run_folder
claim = run_folder.claim_folder
def claim_and_speak(plan):
    found = claim(plan)
    logging.getLogger("ted_scale").warning("said with " + os.environ["HF_TOKEN"])
    return found
run_folder.claim_folder = claim_and_speak
runpy.run_path("launch/pretrain.py", run_name="__main__")
"""


def checkout_with_a_token(folder: Path) -> Path:
    """The code in a git repository whose remote holds a token."""
    for name in ("ted_scale", "launch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    make_repository(folder, f"https://{GIT}@h/a")
    (folder / "speaks.py").write_text(SPEAKS)
    return folder


def test_a_whole_run_writes_no_secret_anywhere(tmp_path):
    """Of the environment, of the code's git remote and of what the program says: a run with W&B offline from start to end,
    then one that is refused."""
    checkout, home, runs = checkout_with_a_token(tmp_path / "checkout"), tmp_path / "home", tmp_path / "runs"
    home.mkdir()
    make_model(tmp_path / "student", "gpt2", num_hidden_layers=2)
    make_corpus(tmp_path / "corpus")
    wandb = {"project": "p", "mode": "offline"}
    config = write_run(
        tmp_path / "run.toml", make_run(tmp_path, method="ce", train={"steps": 4}, wandb=wandb, teacher=None)
    )
    env = {"WANDB_CACHE_DIR": str(home), "WANDB_CONFIG_DIR": str(home), "WANDB_DATA_DIR": str(home)}
    inherited = {
        name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"
    }  # another test's W&B process
    env |= {**inherited, **PLANTED, "SLURM_JOB_ID": "jobnumber77", "PYTHONPATH": str(checkout)}
    (checkout / "pyproject.toml").touch()  # as a checkout has it

    def start(script, *arguments):
        command = [sys.executable, script, "--config", str(config), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=checkout, timeout=180, check=False)

    done = start("speaks.py")
    assert done.returncode == 0, done.stderr[-2000:]
    again = start("launch/pretrain.py", "--set", f"student.path=https://{GIT}@h/x")
    assert again.returncode == 2 and "student.path must hold no credentials" in again.stderr

    assert "said with ***" in (runs / "tiny" / "log.txt").read_text()
    (path,) = (runs / "tiny" / "wandb").glob("offline-run-*/*.wandb")
    told = b"".join(record.SerializeToString() for record in read_records(path))  # the file cuts them into blocks
    assert b"https://***@h/a" in told and b"jobnumber77" in told
    assert not any(secret.encode() in told for secret in [*PLANTED.values(), GIT])
    secrets = [*PLANTED.values(), GIT]
    assert leaks(runs, secrets) + leaks(home, secrets) == []
    assert not any(secret in done.stdout + done.stderr + again.stdout + again.stderr for secret in secrets)
