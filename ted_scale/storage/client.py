"""The client of S3 that all requests of this process use. Endpoint and credentials come from the AWS_* environment."""

import os
from functools import lru_cache

CONNECTIONS = 64
TIMEOUTS_S = (5, 20)  # to connect, to wait for bytes


@lru_cache(maxsize=1)
def s3_client():
    """One for all threads and shards: making one takes 10 ms, and each keeps connections of its own."""
    import boto3
    import botocore.session
    from botocore.config import Config

    connect_s, read_s = TIMEOUTS_S
    once = {"mode": "standard", "total_max_attempts": 1}  # only persist() retries
    config = Config(retries=once, connect_timeout=connect_s, read_timeout=read_s, max_pool_connections=CONNECTIONS)
    session = botocore.session.get_session()
    # The time of writing is not used, and parsing it is most of the cost of listing thousands of objects.
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
    return boto3.session.Session(botocore_session=session).client("s3", config=config)


os.register_at_fork(after_in_child=s3_client.cache_clear)
