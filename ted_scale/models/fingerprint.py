"""Which model a folder holds, in a few letters for the log: cheap, so of the weights only names and sizes count.

Equal fingerprints do not prove equal weights; other ones prove that it is another model, or another cut of its files.
"""

import hashlib
import os
from pathlib import Path

from ted_scale.base.errors import files_at

READ = ("config.json", "model.safetensors.index.json")


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
