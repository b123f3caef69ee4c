"""A run's student as a Hugging Face folder: ted-scale export RUN_OR_CHECKPOINT [OUT]

Verifies the digests of the ranks' files, and reads and writes shard by shard: no GPU, no process group, one output shard in
memory. Note: a bf16 run is exported in bf16, whatever type the student was saved in, because its forward ran in
bf16; --dtype fp32 gives the master weights.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from ted_scale.base import sealed
from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main
from ted_scale.checkpoints import copies
from ted_scale.checkpoints import folder as files
from ted_scale.checkpoints.progress import read_progress
from ted_scale.config.run import Run
from ted_scale.config.run_file import load_run

NETWORK = "network."  # the student's name inside the trained module, which also has filters and the loss's head


def find_checkpoint(source: Path, which: str = "newest") -> tuple[Path, Path]:
    """(checkpoint, run folder) of a run folder or of one of its checkpoints."""
    source = source.resolve()
    checkpoint, folder = source, source.parent.parent
    if (source / "run.toml").is_file() and which == "best":
        checkpoint, folder = best_checkpoint(source), source
    elif (source / "run.toml").is_file():
        checkpoint, folder = files.newest_checkpoint(source), source
        for damaged in files.first_whole(source)[1]:
            print(files.skipped(damaged.path, damaged.fault), file=sys.stderr)
        print("".join(f"{line}\n" for line in files.renamed(source)), end="", file=sys.stderr)
        if checkpoint is None:
            raise UserError(f"RUN must have a checkpoint, but {source} has none yet; train it, then export it")
    if not (checkpoint / "progress.json").is_file():
        raise UserError(
            f"RUN must be a run folder (with a run.toml) or a checkpoint (with a progress.json), but {source} is not"
        )
    if not (folder / "run.toml").is_file():
        raise UserError(f"a checkpoint must be in its run folder, but {folder} has no run.toml; copy that, too")
    return checkpoint, folder


def named_by_run(path: str, run: Run, folder: Path) -> str:
    """A path of the run file, which counts from where the run was started: the folder in which RUN is runs/NAME."""
    parts, here = run.folder.parts, folder.resolve()
    is_below = not run.folder.is_absolute() and here.parts[-len(parts) :] == parts
    started_in = here.parents[len(parts) - 1] if is_below else None
    return str(started_in / path) if started_in and (started_in / path).is_dir() else path


def best_checkpoint(folder: Path) -> Path:
    """By the number that the run file names. Copies in object storage count, too: a run that lost its folder has only the newest
    checkpoints in the new one."""
    run = load_run(folder / "run.toml")
    if not run.checkpoint.judged_by:
        raise UserError(
            f"checkpoint.best must be set for --checkpoint best, but is not in {folder}/run.toml; leave --checkpoint out"
        )
    whole = {c.path.name: c.manifest for c in files.published(folder) if c.fault is None}
    copied = copies.all_copies(place) if (place := copies.place_of(run)) else {}
    name = files.best_of(
        {name: copy.manifest for name, copy in copied.items() if copy.is_whole} | whole, run.checkpoint
    )
    if name is None:
        raise UserError(
            f"RUN must have a checkpoint with {run.checkpoint.judged_by} for --checkpoint best, but {folder} has none; leave "
            "--checkpoint out"
        )
    if name not in whole:
        here = files.checkpoints_of(folder) / name
        raise UserError(
            f"the best checkpoint must be in {here.parent}, but is only its copy {place}/{name}; fetch it first: aws s3 cp "
            f"--recursive {place}/{name} {here}"
        )
    return files.checkpoints_of(folder) / name


def check_trained(run: Run, checkpoint: Path) -> None:
    from ted_scale.distill.stages import stages_of

    step, first = read_progress(checkpoint).step, stages_of(run)[0]
    if first.learns_filters and step <= first.last_step:
        raise UserError(
            f"a checkpoint to export must be of stage II, but {checkpoint.name} is at step {step} of stage I "
            f"({first.steps} steps), which does not train the student; continue the run, or export a later checkpoint"
        )


def open_state(checkpoint: Path):
    """The trained module's tensors, in the ranks' files."""
    from ted_scale.checkpoints.state import State

    if fault := files.check_digests(checkpoint):
        raise UserError(
            f"{checkpoint} must be a whole checkpoint, but is not: {fault}; copy it again, or name an earlier one"
        )
    return State(checkpoint, sealed.read_manifest(checkpoint))


def recipes(state, student: Path, dtype, is_whole: bool = True) -> list:
    """The network's tensors under their family's names, and nothing else of the trained module. A checkpoint that is not whole has
    adapters beside the student's own."""
    import torch

    from ted_scale.models.inspection import empty_model, read_config
    from ted_scale.models.model_folder import Recipe, saved_tensors

    with torch.device("meta"):
        model = empty_model(read_config("student.path", student))
    found = []
    for name, target in saved_tensors(model).items():
        theirs, shape = state.shapes.get(NETWORK + name), tuple(target.shape)
        if is_whole and (theirs is None or tuple(theirs) != shape):
            has = "does not have it" if theirs is None else f"has {tuple(theirs)}"
            raise UserError(
                f"{state.checkpoint} must hold {name} of shape {shape}, as {student} says, but {has}; name the "
                "folder the run started from with --student"
            )
        kept = dtype if target.is_floating_point() else target.dtype
        found.append(Recipe(name, shape, kept))
    return found


def read(state, tensors: dict) -> None:
    """Fill the tensors of an output shard, which opens each rank's file once."""
    from ted_scale.checkpoints.state import Part

    state.fill([Part("fp32", NETWORK + name, 0, tensor.view(-1)) for name, tensor in tensors.items()])


def write_config(student: Path, target: Path, dtype) -> None:
    """The student's own config.json except the dtype: settings that training switched off, like dropout, keep their values."""
    from ted_scale.models.model_folder import write_json

    values = json.loads((student / "config.json").read_text(encoding="utf-8"))
    for key in {"dtype", "torch_dtype"} & values.keys() or {"dtype"}:
        values[key] = name_of(dtype)
    write_json(target / "config.json", values)


def name_of(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def copy_tokenizer(run: Run, folder: Path, student: Path, target: Path) -> None:
    """The student's tokenizer, or the teacher's, which is the same, if the student has none. Also the record of the cut, for
    runs that start from the export."""
    from ted_scale.distill.pairs import CUT
    from ted_scale.models.model_folder import TOKENIZER_FILES, copy_files
    from ted_scale.storage.hub import find_folder

    copy_files(student, target, ["generation_config.json", CUT])
    if not copy_files(student, target, TOKENIZER_FILES) and run.teacher:
        teacher = find_folder("teacher.path", named_by_run(run.teacher.path, run, folder))
        copy_files(teacher, target, TOKENIZER_FILES)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run folder, or a checkpoint in one")
    parser.add_argument(
        "--checkpoint", choices=("newest", "best"), default="newest", help="of a run folder; best: by checkpoint.best"
    )
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="default: export in the run folder")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: the run's train.precision")
    parser.add_argument("--max-shard-gb", type=float, default=5, help="largest file, in GB")
    parser.add_argument("--student", help="the folder the run started from; default: the run's student.path")
    parser.add_argument("--adapters", action="store_true", help="also write OUT/adapters, as peft reads them")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--wandb-artifact", action="store_true", help="add OUT to the run's own W&B run")
    arguments = parser.parse_args(argv)
    if arguments.checkpoint == "best" and not (arguments.source / "run.toml").is_file():
        raise UserError(f"--checkpoint best must come with a run folder, but {arguments.source} is none; leave it out")
    if arguments.max_shard_gb <= 0:
        raise UserError(f"--max-shard-gb must be above 0, but is {arguments.max_shard_gb}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    checkpoint, folder = find_checkpoint(arguments.source, arguments.checkpoint)
    run = load_run(folder / "run.toml")
    check_trained(run, checkpoint)
    if arguments.adapters and run.student.lora is None:
        raise UserError(
            "--adapters must be left out for a run without student.lora, but is set; its export is the model itself"
        )
    if arguments.wandb_artifact:
        from ted_scale.metrics import wandb_export

        wandb_export.check(run, read_progress(checkpoint), folder)

    import torch  # imports take seconds; a wrong folder should not wait for them

    from ted_scale.commands import merged
    from ted_scale.commands.model_card import write_card
    from ted_scale.models.model_folder import new_folder, write_shards
    from ted_scale.storage.hub import find_folder

    student = find_folder("student.path", arguments.student or named_by_run(run.student.path, run, folder))
    base = merged.open_base(checkpoint, student, run.student.lora, NETWORK) if run.student.lora else None
    fill = partial(merged.read, base) if base else read
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.dtype or run.train.precision]
    out = arguments.out or folder / "export"
    with new_folder(out, overwrite=arguments.overwrite, sources=(student, folder)) as part:
        state = open_state(checkpoint)
        shards = recipes(state, student, dtype, is_whole=base is None)
        size = write_shards(part, shards, partial(fill, state), arguments.max_shard_gb * 1e9)
        if arguments.adapters:
            merged.write_adapters(part / "adapters", state, base)
        write_config(student, part, dtype)
        copy_tokenizer(run, folder, student, part)
        write_card(part, folder, checkpoint, run, student, name_of(dtype))
    print(f"{checkpoint.name} of {run.name} -> {out}, {size / 1e6:,.1f} MB in {name_of(dtype)}; load it:")
    print("  from transformers import AutoModelForCausalLM")
    print(f'  model = AutoModelForCausalLM.from_pretrained("{out}", dtype="auto")')
    if run.checkpoint.best and arguments.checkpoint != "best":
        print(
            f"it is the checkpoint that was named, or the newest; --checkpoint best takes the best by {run.checkpoint.judged_by}"
        )
    if arguments.wandb_artifact:
        print(wandb_export.add(run, read_progress(checkpoint), folder, out))


if __name__ == "__main__":
    run_main(main)
