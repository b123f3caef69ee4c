"""A model or a tokenizer by its name: a local folder, or OWNER/NAME on the hub.

A name that can only be a path is never requested from the hub: without a network its client retries for 90 seconds.
"""

import difflib
from pathlib import Path

from ted_scale.base.errors import UserError, files_at, shortened

MODEL = ("*.safetensors", "*.json", "*.model", "*.txt")
TOKENIZER = ("*.json", "*.model", "*.txt")
FILES = (".gguf", ".safetensors", ".model", ".json", ".bin", ".pt")


def find_folder(key: str, name: str, wanted: tuple[str, ...] = MODEL) -> Path:
    """The local folder: `name` itself, or a snapshot from the hub with the `wanted` files. Sentences call it `key`."""
    with files_at(f"{key} {name}"):
        if Path(name).is_dir():
            return Path(name)
        refuse_what_is_no_id(key, name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(wanted)))
    except Exception as error:  # the hub's client raises many kinds
        reason = shortened(": ".join([type(error).__name__, *str(error).split("\n")[:1]]), 120)
        raise UserError(
            f"{key} must be a local folder or a hub id that can be reached, but {name} is no folder, and the hub does not give "
            f"it ({reason}); check its spelling and the network"
        ) from None


def refuse_what_is_no_id(key: str, name: str) -> None:
    path = Path(name)
    if path.is_file():
        raise UserError(f"{key} must be a folder, but {name} is a {file_of(path)}")
    if is_path(name):
        close = difflib.get_close_matches(path.name, names_beside(path), n=1)
        out = f"did you mean {path.with_name(close[0])}?" if close else "correct it; a hub id is OWNER/NAME"
        raise UserError(f"{key} must be a folder that is there, but {name} does not exist; {out}")


def is_path(name: str) -> bool:
    """Whether no hub id looks like it, or its parent folder exists."""
    parent, ending = Path(name).parent, Path(name).suffix
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or ending in FILES or parent.is_dir()


def names_beside(path: Path) -> list[str]:
    return [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []


def file_of(path: Path) -> str:
    if path.suffix == ".gguf":
        return "GGUF file, whose weights are rounded for inference; name the folder of the model that it was made of"
    return "file; name the folder that it is in"
