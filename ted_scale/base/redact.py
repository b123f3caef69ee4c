"""Secrets are kept out of everything that is written: logs, errors, the run file's copy, checkpoints, Weights & Biases.

A secret is known by its place (an environment variable whose name says so) or by its shape (a password in a URL, a signed
address, a key of a well-known kind). A run file that holds one is refused; in texts of others it becomes ***. A secret
that is not in the environment and has no known shape cannot be found.
"""

import contextlib
import logging
import os
import re
import traceback
from pathlib import Path
from urllib.parse import quote

HIDDEN = "***"
SHORTEST = 12  # characters of a variable's value: a shorter one occurs in texts by chance
NAMES = re.compile(
    r"SECRET|TOKEN(?!S|IZ)|PASSW|PASSPHRASE|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIAL|JWT", re.IGNORECASE
)
PLACES = re.compile(r"_(FILE|PATH|DIR|URI|URL|NAME)S?$", re.IGNORECASE)  # where a secret is stored, not the secret

# Group 1 of each is the part to hide. Repetitions are bounded, because a hostile text must not cost much time.
SHAPES = [
    re.compile(pattern)
    for pattern in (
        r"[A-Za-z][A-Za-z0-9+.-]{0,30}://([^\s/@:'\"]{0,500}:(?!\d{1,5}/)[^\s@'\"]{1,500})@",  # AWS keys hold slashes
        r"[A-Za-z][A-Za-z0-9+.-]{0,30}://([^\s/@:'\"]{1,500})@",
        r"(?i)[?&;](?:x-(?:amz|goog)-(?:signature|credential|security-token)|awsaccesskeyid|signature|sig|access_token|"
        r"token|api_?key|key|password|secret)=([^&\s'\"]+)",
        r"(?i)\bauthorization['\"]?\s*[:=]\s*['\"]?((?:bearer|basic|aws4-hmac-sha256)\s+[^\s'\"]+)",
        r"(?i)\b(?:[a-z]+_)*(?:secret_access_key|session_token|password|passwd|api_?key|access_token|auth_token)\b"
        r"['\"]?\s*=\s*['\"]?([^\s'\",;&]{4,})",
        r"\b((?:AKIA|ASIA)[0-9A-Z]{16})\b",
        r"\b(hf_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|wandb_v\d+_\w{20,})",
        r"\b(sk-(?:proj-|ant-)?[A-Za-z0-9_]{24,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{35})",
        r"\b(eyJ[\w-]{8,2000}\.[\w-]{8,2000}\.[\w-]{8,})",
        r"(-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z))",
    )
]  # fmt: skip


def printable(text: str, keeps: str = "") -> str:
    """Characters that are not printable are escaped: a name of somebody else's file moves no cursor and begins no line."""
    return "".join(c if c.isprintable() or c in keeps else c.encode("unicode_escape").decode() for c in text)


def is_secret_name(name: str) -> bool:
    return bool(NAMES.search(name)) and not PLACES.search(name)


def known() -> list[str]:
    """The secrets in the environment, as they are and as a URL spells them; the longest first."""
    values = {v for n, v in os.environ.items() if len(v) >= SHORTEST and is_secret_name(n) and not is_place(v)}
    return sorted(values | {quote(v, safe="") for v in values}, key=len, reverse=True)


def is_place(value: str) -> bool:
    return value.isdecimal() or (value.startswith("/") and Path(value).exists())


def redact(text: str) -> str:
    """The text with *** in place of every known secret."""
    for secret in known():
        text = text.replace(secret, HIDDEN)
    for shape in SHAPES:
        text = shape.sub(lambda found: found[0].replace(found[1], HIDDEN), text)
    return text


def holds_secret(text: str) -> bool:
    return redact(text) != text


def cleaned(values):
    """The same tables and lists with every text redacted."""
    if isinstance(values, dict):
        return {cleaned(key): cleaned(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [cleaned(value) for value in values]
    return redact(values) if isinstance(values, str) else values


def where_secret(values, name: str = "") -> str | None:
    """The dotted name of the first text in a run file's tables that holds a secret."""
    if isinstance(values, str):
        return name if holds_secret(values) else None
    rows = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    names = ((f"{name}[{key}]" if isinstance(key, int) else f"{name}.{key}".lstrip("."), value) for key, value in rows)
    return next((found for n, value in names if (found := where_secret(value, n))), None)


def watch_logs() -> None:
    """From now on every record of every logger in this process is redacted, with its traceback."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def record(*arguments, **named):
        made = make(*arguments, **named)
        with contextlib.suppress(
            TypeError, ValueError, KeyError
        ):  # a message that does not fit its arguments: logging reports it
            made.msg, made.args = printable(redact(made.getMessage()), "\n\t"), ()
        if made.exc_info and made.exc_info[0]:
            made.exc_text = redact("".join(traceback.format_exception(*made.exc_info))).rstrip("\n")
        return made

    record.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)


@contextlib.contextmanager
def out_of_the_environment(prefix: str):
    """Take secrets with this prefix out of the environment: the library called inside copies all variables with it."""
    hidden = {n: v for n, v in os.environ.items() if n.startswith(prefix) and is_secret_name(n)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
