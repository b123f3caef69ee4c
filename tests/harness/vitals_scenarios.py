"""Scenarios of ranks.py about vitals: the same run with and without them, where the first rank alone measures."""

from scenarios import TEN_STEPS, start

from ted_scale.checkpoints.folder import newest_checkpoint


def vitals(folder, device):
    """The digests of what is checkpointed of a run that measures at every step, and of one that never does."""
    import hashlib

    found = {}
    for every in (1, 0):
        name = f"vitals_{every}"
        student = {"gradient_checkpointing": True}
        start(folder, device, name=name, **TEN_STEPS, student=student, vitals={"every": every})
        files = sorted(newest_checkpoint(folder / "runs" / name).glob("*.safetensors"))
        found[every] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return found
