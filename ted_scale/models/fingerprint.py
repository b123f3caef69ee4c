"""A short fingerprint of the model in a folder. It must be cheap, so it uses only names and sizes of weights, or samples of bytes.

Equal fingerprints do not prove equal weights. Different ones prove another model, or another split of its files. Samples come
from 16 places of each file, and any training changes all of them.
"""

import hashlib
import os
from pathlib import Path

from ted_scale.base.errors import files_at
from ted_scale.base.paths import open_file

READ = ("config.json", "model.safetensors.index.json")
PLACES, PIECE = 16, 2**16  # places in each file of weights, bytes at each place


def fingerprint(folder: Path) -> str:
    """A digest of the texts that define the model, and of the names and sizes of its weights. The weights are not read."""
    digest = hashlib.sha256()
    with files_at(folder):
        for path in sorted(folder.iterdir()):
            if path.name in READ or path.suffix == ".safetensors":
                digest.update(os.fsencode(path.name) + f" {path.stat().st_size}\n".encode())
            if path.name in READ:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def sampled(folder: Path) -> str:
    """A digest of the weights alone, for a checkpoint that does not hold them. config.json is left out, because every version of
    transformers writes another one."""
    digest = hashlib.sha256()
    with files_at(folder):
        for path in sorted(folder.glob("*.safetensors")):
            descriptor = open_file(path.resolve())  # the hub's cache has links
            try:
                size = os.fstat(descriptor).st_size
                digest.update(os.fsencode(path.name) + f" {size}\n".encode())
                last = max(0, size - PIECE)
                for place in range(PLACES):
                    digest.update(os.pread(descriptor, PIECE, last * place // (PLACES - 1)))
            finally:
                os.close(descriptor)
    return digest.hexdigest()[:16]
