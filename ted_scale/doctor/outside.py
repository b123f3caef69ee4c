"""What a run asks of the network: names of hosts, Weights & Biases, and object storage.

Note: any answer of W&B's host, also a refusal, says that it can be reached; only a run learns whether the key is right.
"""

import contextlib
import os
import secrets
import socket
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from ted_scale.base.errors import SENTENCES
from ted_scale.doctor.finding import MISSING, NOTE, OK, Finding

NAMES_S, WANDB_S, S3_S = 60, 20, 60
SLOW_NAME_S, LOOKUPS = 1.0, 3
CONNECT_S, PATIENCE_S = 5, 10  # of a connection to W&B; of a request to a store
WAY_TO_A_KEY = "wandb login, or set WANDB_API_KEY; without a key a run is offline, and wandb sync uploads it later"


def names() -> list[Finding]:
    """Torch's store looks up the name of every rank that connects, as an IPv6 address, and serves nobody meanwhile."""
    address, slowest = own_address(), 0.0
    for _ in range(LOOKUPS):
        if slowest < SLOW_NAME_S:
            slowest = max(slowest, seconds_of_a_name(address))
    if slowest < SLOW_NAME_S:
        return [Finding("names", OK, f"the name of {address} is looked up in {slowest:.3f} s")]
    way = 'a start waits so long for each rank; RES_OPTIONS="timeout:1 attempts:1" shortens that, as docs/nodes.md says'
    return [
        Finding("names", NOTE, f"the name of {address} was looked up for {slowest:.1f} s: DNS is slow or silent", way)
    ]


def own_address() -> str:
    """The loopback's address, if nobody knows this host's name."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def seconds_of_a_name(address: str) -> float:
    began = time.monotonic()
    with contextlib.suppress(OSError):
        socket.getnameinfo((f"::ffff:{address}", 0, 0, 0), socket.NI_NUMERICSERV)
    return time.monotonic() - began


def wandb() -> list[Finding]:
    """None of it is needed: a run does not wait for W&B."""
    from ted_scale.metrics import wandb_connection

    address = os.environ.get("WANDB_BASE_URL") or f"https://{wandb_connection.HOSTS[0]}"
    host = urlsplit(address).netloc
    key = (
        Finding("W&B key", OK, "there is one")
        if wandb_connection.has_key()
        else Finding("W&B key", NOTE, "there is none", WAY_TO_A_KEY)
    )
    why = unreached(address)
    if why:
        way = "look at the network, https_proxy and WANDB_BASE_URL; a run goes on offline"
        return [key, Finding("W&B host", NOTE, f"{host} cannot be reached ({why})", way)]
    return [key, Finding("W&B host", OK, f"{host} answers")]


def unreached(address: str) -> str | None:
    """Why nothing answers there."""
    try:
        urllib.request.urlopen(address, timeout=CONNECT_S).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None


def s3(url: str) -> list[Finding]:
    """Credentials, a listing, and a small object that is written, read and deleted, by a run's own requests."""
    from ted_scale.storage import objects

    found = []
    for what, step in (
        ("S3 package and credentials", credentials),
        ("S3 list", listing),
        ("S3 write, read, delete", note),
    ):
        try:
            objects.check_package(url, "--url")
            found.append(Finding(what, OK, step(url)))
        except SENTENCES as error:
            return [*found, Finding(what, MISSING, str(error))]
    return found


def credentials(url: str) -> str:
    from ted_scale.storage.client import s3_client

    client = s3_client()
    signer = client._request_signer._credentials
    where = client.meta.endpoint_url
    if signer is None:
        return f"no credentials; {where} is asked without"
    return f"credentials by {signer.method}, for {where}"


def listing(url: str) -> str:
    from ted_scale.storage import objects

    names = objects.listed(url.rstrip("/"), "", PATIENCE_S)
    return f"{url} has {len(names):,} objects, without those of folders in it"


def note(url: str) -> str:
    from ted_scale.storage import objects

    place, text = f"{url.rstrip('/')}/.ted_scale_doctor_{secrets.token_hex(6)}", secrets.token_hex(16)
    objects.put_note(place, text, None, f"{place} must be written", PATIENCE_S)
    try:
        found = objects.note(place, f"{place} must be read", PATIENCE_S)
    finally:
        objects.delete(place, f"{place} must be deleted", PATIENCE_S)
    if found is None or found.text != text:
        raise_other(place)
    return f"all three below {url}"


def raise_other(place: str) -> None:
    from ted_scale.base.errors import Gone

    raise Gone(f"{place} must hold what was just written, but does not; ask who runs this store")
