"""Which model a folder holds, in a few letters for the log: cheap, so of the weights only names and sizes count.

Equal fingerprints do not prove equal weights; other ones prove that it is another model, or another cut of its files.
"""

import hashlib
from pathlib import Path

READ = ("config.json", "model.safetensors.index.json")


def fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name in READ or path.suffix == ".safetensors":
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        if path.name in READ:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
