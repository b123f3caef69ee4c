"""What power cuts and disks make of a file. Each takes a path in a checkpoint and a random generator."""

import shutil
from pathlib import Path


def cut_off(path: Path, rng) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def flip(path: Path, rng) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def blank(path: Path, rng) -> None:
    """What journaling file systems leave of a file whose data never arrived: its length, in zeros."""
    path.write_bytes(bytes(path.stat().st_size))


def lose(path: Path, rng) -> None:
    path.unlink()


def grow(path: Path, rng) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(1 + rng.randrange(9)))


def mix_up(path: Path, rng) -> None:
    """The file of the same name of the checkpoint before."""
    before = sorted(p for p in path.parents[1].iterdir() if p.name < path.parent.name)[-1]
    path.write_bytes((before / path.name).read_bytes())


DAMAGES = [cut_off, flip, blank, lose, grow, mix_up]


def copy_run(original: Path, target: Path) -> Path:
    """With files that have two names, as `cp -a` copies them."""
    names: dict[int, Path] = {}
    for path in sorted(original.rglob("*")):
        place = target / path.relative_to(original)
        if path.is_dir():
            place.mkdir(parents=True)
        elif path.stat().st_ino in names:
            place.hardlink_to(names[path.stat().st_ino])
        else:
            names[path.stat().st_ino] = shutil.copyfile(path, place)
    return target
