"""A model or a tokenizer by its name: a local folder, or OWNER/NAME on the hub.

A name that can only be a path is never requested from the hub. Note: without an answer the hub's client may wait for minutes, so it
gets ten seconds for a first one, and then only what an earlier call fetched is taken.
"""

import contextlib
import difflib
import logging
import threading
from pathlib import Path

from ted_scale.base.errors import UserError, files_at, shortened
from ted_scale.base.paths import NoFile, refuse_no_file

log = logging.getLogger("ted_scale")

MODEL = ("*.safetensors", "*.json", "*.model", "*.txt")
TOKENIZER = ("*.json", "*.model", "*.txt", "*.jinja")
TEXTS = (".json", ".model", ".txt", ".spm", ".tiktoken", ".jinja")  # are read whole, by libraries
LARGEST_TEXT = 2**28  # bytes; the largest tokenizers have a tenth
ANSWER_S = 10  # for the hub's first answer
FILES = (".gguf", ".safetensors", ".model", ".json", ".bin", ".pt")


def find_folder(key: str, name: str, wanted: tuple[str, ...] = MODEL) -> Path:
    """The local folder: `name` itself, or a snapshot from the hub with the `wanted` files. Sentences call it `key`."""
    with files_at(f"{key} {name}"):
        if Path(name).is_dir():
            return Path(name)
        refuse_what_is_no_id(key, name)
    try:
        return Path(fetched(name, list(wanted)))
    except Exception as error:  # the hub's client raises many kinds
        reason = shortened(": ".join([type(error).__name__, *str(error).split("\n")[:1]]), 120)
        raise UserError(
            f"{key} must be a local folder or a hub id that can be reached, but {name} is no folder, and the hub does not give "
            f"it ({reason}); check its spelling and the network, and that a path counts from {Path.cwd()}"
        ) from None


def fetched(name: str, wanted: list[str]) -> str:
    """The folder of a snapshot; what is raised is of many kinds."""
    from huggingface_hub import HfApi, snapshot_download

    fault = fault_of(lambda: HfApi().repo_info(name, timeout=ANSWER_S))
    if fault is None:
        return snapshot_download(name, allow_patterns=wanted)
    with contextlib.suppress(Exception):
        folder = snapshot_download(name, allow_patterns=wanted, local_files_only=True)
        if "*.safetensors" not in wanted or any(Path(folder).glob("*.safetensors")):  # a plan fetches configs alone
            log.warning(
                f"the hub does not answer for {name} ({shortened(str(fault), 80)}): what was fetched before is taken"
            )
            return folder
    raise fault


def fault_of(question) -> Exception | None:
    """Of a question to the network. A name server that hangs knows no time limit, so a thread that is left behind asks."""
    faults: list[Exception | None] = []

    def ask() -> None:
        try:
            question()
            faults.append(None)
        except Exception as error:
            faults.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    return faults[0] if faults else TimeoutError(f"no answer within {ANSWER_S:g} s")


def check_texts(must: str, folder: Path) -> None:
    """Refuse what would hold a library for ever, or fill the memory: pipes, devices, files of a terabyte."""
    with files_at(folder):
        for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
            if path.suffix in TEXTS and path.exists() and not path.is_dir():
                check_text(must, path)


def check_text(must: str, path: Path) -> None:
    """A UserError, which begins with `must`, where a text is no plain file or too large to be one."""
    try:
        size = refuse_no_file(path.stat()).st_size
    except NoFile as error:
        raise UserError(f"{must}, of plain files, but {path} is {error}; remove it") from None
    if size > LARGEST_TEXT:
        raise UserError(
            f"{must}, of files of at most {LARGEST_TEXT:,} bytes, but {path} has {size:,}; copy it again, or remove it"
        )


def refuse_what_is_no_id(key: str, name: str) -> None:
    path = Path(name)
    if path.is_file():
        raise UserError(f"{key} must be a folder, but {name} is a {file_of(path)}")
    if is_path(name):
        close = difflib.get_close_matches(path.name, names_beside(path), n=1)
        out = (
            f"did you mean {path.with_name(close[0])}?"
            if close
            else f"correct it; {counted(path)}a hub id is OWNER/NAME"
        )
        raise UserError(f"{key} must be a folder that is there, but {name} does not exist; {out}")


def counted(path: Path) -> str:
    """From where, for who names a run file of another folder."""
    return "" if path.is_absolute() else f"a path counts from the current folder, {Path.cwd()}, and "


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
