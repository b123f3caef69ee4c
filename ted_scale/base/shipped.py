"""Files that come with the project: ds_configs/, and the run files and plans of launch/. In a checkout they stand beside the
package, in a wheel inside it (setup.py)."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
PROJECT = PACKAGE.parent / "pyproject.toml"  # of a checkout
HOME = PACKAGE if (PACKAGE / "ds_configs").is_dir() else PACKAGE.parent


def found(path: str | Path) -> Path:
    """Relative to the current folder, where a user's own file comes first; else the file that comes with the project."""
    return HOME / path if not Path(path).exists() and (HOME / path).is_file() else Path(path)
