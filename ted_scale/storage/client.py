"""The client of S3 that all requests of this process use, and its credentials. All settings come from the AWS_* environment.

Note: a client keeps the credentials, or the lack of them, that its session found when it was made. So when they come late, or
have expired, `anew` lets the next request make another one.
"""

import os
import socket
from functools import lru_cache
from urllib.parse import urlsplit

CONNECTIONS = 64
TIMEOUTS_S = (5, 20)  # to connect, to wait for bytes
# Services that give credentials to a container, a pod or a machine.
SERVICES = (
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
)
METADATA, KNOCK_S = "http://169.254.169.254", 1.0
# Of the machine's service, if hundreds of processes ask it at once; botocore's defaults are 1 s and one try.
PATIENT = {"metadata_service_timeout": 5, "metadata_service_num_attempts": 3}


@lru_cache(maxsize=1)
def s3_client():
    """One for all threads and shards: making one takes 10 ms, and each keeps connections of its own."""
    import boto3
    from botocore.config import Config

    connect_s, read_s = TIMEOUTS_S
    once = {"mode": "standard", "total_max_attempts": 1}  # only persist() retries
    config = Config(retries=once, connect_timeout=connect_s, read_timeout=read_s, max_pool_connections=CONNECTIONS)
    session = new_session({})
    if session.get_credentials() is None and may_come():
        session = new_session(PATIENT)
    # The time of writing is not used, and parsing it is most of the cost of listing thousands of objects.
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
    return boto3.session.Session(botocore_session=session).client("s3", config=config)


def new_session(settings: dict[str, int]):
    """A botocore session with these settings. The user's own settings win."""
    import botocore.session

    session = botocore.session.get_session()
    for name, value in settings.items():
        if f"AWS_{name.upper()}" not in os.environ and name not in session.get_scoped_config():
            session.set_config_variable(name, value)
    return session


def may_come() -> bool:
    """Whether some service may still give credentials. Where none is, nobody should wait for them."""
    if any(os.environ.get(key) for key in SERVICES):
        return True
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    service = urlsplit(os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or METADATA)
    try:
        socket.create_connection((service.hostname, service.port or 80), KNOCK_S).close()
    except OSError:
        return False
    return True


def anew() -> None:
    s3_client.cache_clear()


os.register_at_fork(after_in_child=anew)
