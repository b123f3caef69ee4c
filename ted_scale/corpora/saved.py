"""Folders of Hugging Face `datasets`: what save_to_disk writes, and the layout of the hub.

Only their JSON is read, and no code of theirs is run. Note: state.json says which .arrow files are the data, because a folder
may also hold a cache beside them.
"""

from pathlib import Path

from ted_scale.base.errors import UserError
from ted_scale.base.parsing import parse_json
from ted_scale.base.paths import inside

STATE, SPLITS = "state.json", "dataset_dict.json"
LARGEST = 2**24  # bytes of either
CARD, FRONT_MATTER = "README.md", b"---"
DATA = ("*.parquet", "*.jsonl", "*.jsonl.*", "*.arrow")


def files_of(folder: Path) -> list[Path] | None:
    """The files of a saved dataset, in its order; None if the folder is no such dataset."""
    if (folder / SPLITS).is_file():
        return files_of_splits(folder)
    if not (folder / STATE).is_file() or not any(folder.glob("*.arrow")):
        return None
    state = read(folder / STATE)
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder} must hold its rows in their order, but is a selection of others'; save it with "
            "flatten_indices().save_to_disk()"
        )
    try:
        files = [inside(folder, entry["filename"], folder / STATE) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise not_saved(folder / STATE) from None
    if missing := [path.name for path in files if not path.is_file()]:
        raise UserError(f"{folder} must hold all files that its {STATE} names, but has no {missing[0]}; copy it again")
    return files


def files_of_splits(folder: Path) -> list[Path]:
    """Several splits are not mixed: one of them is for a test, as a rule."""
    splits = read(folder / SPLITS).get("splits")
    if not isinstance(splits, list) or not splits:
        raise not_saved(folder / SPLITS)
    places = [inside(folder, name, folder / SPLITS) for name in splits]
    if len(places) > 1:
        names = ", ".join(place.name for place in places)
        raise UserError(f"input {folder} must be one split, but has {names}; name one, or several: {places[0]}")
    if (files := files_of(places[0])) is None:
        raise not_saved(folder / SPLITS)
    return files


def read(path: Path) -> dict:
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        found = parse_json(path.read_bytes())
    except ValueError:
        raise not_saved(path) from None
    if not isinstance(found, dict):
        raise not_saved(path)
    return found


def not_saved(path: Path) -> UserError:
    return UserError(
        f"{path} must be as datasets' save_to_disk writes it, but is not; save it again, or name the files"
    )


def is_card(path: Path) -> bool:
    """A README.md that describes data beside it, as on the hub, and is no text to learn from."""
    if path.name != CARD or not any(any(path.parent.glob(f"{below}{kind}")) for below in ("", "*/") for kind in DATA):
        return False
    with path.open("rb") as file:
        return file.read(len(FRONT_MATTER)) == FRONT_MATTER
