"""What is in the object store, seen without faults and without the project's own functions: which copies are whole."""

import json
import os
from functools import cache

BUCKET = "bucket"
PLACE = f"s3://{BUCKET}/runs"


@cache
def client():
    """To moto itself; the program that is tested goes through the proxy, AWS_ENDPOINT_URL."""
    import boto3

    return boto3.session.Session().client("s3", endpoint_url=os.environ["MOTO_URL"])


def whole_copies(run: str) -> dict[str, dict]:
    """Manifests by name of those copies that have every file in its size."""
    prefix, sizes = f"runs/{run}/checkpoints/", {}
    for page in client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
        for entry in page.get("Contents", ()):
            name, _, file = entry["Key"].removeprefix(prefix).partition("/")
            sizes.setdefault(name, {})[file] = entry["Size"]
    found = {}
    for name, there in sizes.items():
        if "manifest.json" in there:
            body = client().get_object(Bucket=BUCKET, Key=f"{prefix}{name}/manifest.json")["Body"].read()
            manifest = json.loads(body)["content"]
            if all(there.get(file) == size for file, (size, _) in manifest["files"].items()):
                found[name] = manifest
    return found
