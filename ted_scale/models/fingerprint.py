"""Which model a folder holds, in a few letters: cheap, so of the weights only names and sizes count, or samples of their bytes.

Equal fingerprints do not prove equal weights; other ones prove that it is another model, or another cut of its files. Equal samples
prove it as well as 16 places of each file can: any training changes all of them.
"""

import hashlib
import os
from pathlib import Path

from ted_scale.base.errors import files_at
from ted_scale.base.paths import open_file

READ = ("config.json", "model.safetensors.index.json")
PLACES, PIECE = 16, 2**16  # of each file of weights, bytes of each


def fingerprint(folder: Path) -> str:
    """Of the texts that decide what the model is, and of the names and sizes of its weights, which are not read."""
    digest = hashlib.sha256()
    with files_at(folder):
        for path in sorted(folder.iterdir()):
            if path.name in READ or path.suffix == ".safetensors":
                digest.update(os.fsencode(path.name) + f" {path.stat().st_size}\n".encode())
            if path.name in READ:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def sampled(folder: Path) -> str:
    """Of the weights alone, for a checkpoint that has none of them: every version of transformers writes another config.json."""
    digest = hashlib.sha256()
    with files_at(folder):
        for path in sorted(folder.glob("*.safetensors")):
            descriptor = open_file(path.resolve())  # the hub keeps links
            try:
                size = os.fstat(descriptor).st_size
                digest.update(os.fsencode(path.name) + f" {size}\n".encode())
                last = max(0, size - PIECE)
                for place in range(PLACES):
                    digest.update(os.pread(descriptor, PIECE, last * place // (PLACES - 1)))
            finally:
                os.close(descriptor)
    return digest.hexdigest()[:16]
