"""A student cut from a teacher: ted-scale cut-student TEACHER OUT --layers N [--rank influence] [--hidden N] [--text ...]

Depth: N blocks spread from the first to the last, those that --keep lists, or those that change the states of --text most. Width:
hidden and FFN channels, query and key heads of the largest activations on --text. Where there is a text, the matrices of what is
kept are fitted to the teacher on it. OUT/cut.json records which blocks they were; a run uses it to match them with its teacher's.
Tensors are copied one shard at a time. Note: every per-layer list of the config is written out and cut, also a list that the
teacher's config.json leaves to a default.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main, speak
from ted_scale.commands.cutting.axes import find_heads
from ted_scale.commands.cutting.blocks import check_count, choose_blocks, influences, most_influential
from ted_scale.commands.cutting.channels import Cutter, choose_channels
from ted_scale.commands.cutting.importance import measure
from ted_scale.commands.cutting.joined import find_joined
from ted_scale.commands.cutting.refit import Walk, refit
from ted_scale.commands.cutting.report import table
from ted_scale.commands.cutting.sizes import (
    OPTIONS,
    Sizes,
    asked_sizes,
    cut_config,
    head_width,
    refuse_other_heads,
    student_sizes,
    teacher_sizes,
)
from ted_scale.commands.cutting.tensors import places_of, read
from ted_scale.commands.cutting.text import batches, held_out_loss, open_text
from ted_scale.commands.evaluate import DTYPES
from ted_scale.commands.evaluation.text import device_of, loaded
from ted_scale.data.stream import Stream
from ted_scale.distill.pairs import CUT, cut_map
from ted_scale.distill.teacher import Teacher
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.inspection import inspect
from ted_scale.models.model_folder import (
    TOKENIZER_FILES,
    Recipe,
    check_out,
    copy_files,
    new_folder,
    write_json,
    write_shards,
)
from ted_scale.storage.hub import find_folder


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", metavar="TEACHER", help="model folder or hub id")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    depth = parser.add_argument_group("depth")
    depth.add_argument(
        "--layers", type=int, metavar="N", help="the student's blocks; default: all where a width is cut"
    )
    depth.add_argument("--keep", metavar="0,2,5", help="the teacher's blocks to keep, from 0")
    depth.add_argument(
        "--rank",
        choices=("spread", "influence"),
        help="how --layers are chosen; default: influence with --text, else spread",
    )
    depth.add_argument("--free-ends", action="store_true", help="influence: the first and the last may go, too")
    width = parser.add_argument_group("width, chosen on --text")
    width.add_argument("--hidden", type=int, metavar="N", help="channels of the states")
    width.add_argument("--ffn", type=int, metavar="N", help="channels of each block's FFN")
    width.add_argument("--heads", type=int, metavar="N", help="query heads of each block")
    width.add_argument("--kv-heads", type=int, metavar="N", help="key and value heads of each block")
    add_text(parser.add_argument_group("text"))
    parser.add_argument("--max-shard-gb", type=float, default=5, help="largest file, in GB")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    arguments = parser.parse_args(argv)
    looks = arguments.text and arguments.layers is not None and arguments.keep is None
    arguments.rank = arguments.rank or ("influence" if looks else "spread")
    return arguments


def add_text(text) -> None:
    text.add_argument("--text", nargs="+", metavar="PREFIX", default=[], help="shards, as in a run file")
    text.add_argument("--tokens", type=int, default=16_384, metavar="N", help="to read at a time; default: 16384")
    text.add_argument("--seq-len", type=int, default=512, metavar="N", help="of a window; default: 512")
    text.add_argument(
        "--held-out",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="the last share, for the loss alone; default: 0.05",
    )
    text.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows at once; default: 8")
    text.add_argument("--dtype", choices=DTYPES, default="auto", help="of the forwards; default: the model's own")
    text.add_argument("--device", help="default: cuda where there is one, else cpu")
    text.add_argument("--no-refit", action="store_true", help="keep the teacher's weights as they are")


def refuse_mistakes(arguments: argparse.Namespace, teacher: Anatomy) -> None:
    asked = asked_sizes(arguments)
    if arguments.rank == "influence":
        check_count(teacher.layers, arguments.layers)
        if arguments.keep:
            raise UserError("--rank must be left out where --keep lists the blocks, but is influence")
    elif arguments.free_ends:
        raise UserError("--free-ends must come with --rank influence, but --rank is spread")
    elif arguments.layers is not None or arguments.keep is not None or not asked:
        choose_blocks(teacher.layers, arguments.layers, arguments.keep)
    needs = OPTIONS[next(iter(asked))] if asked else "--rank influence" if arguments.rank == "influence" else None
    if needs and not arguments.text:
        raise UserError(f"--text must be given with {needs}, which looks at activations, but is not; name a corpus")


def refuse_unfit(teacher: Anatomy, sizes: Sizes) -> None:
    """By a trial of the student's config, before a model is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", cut_config(teacher, list(range(teacher.layers)), sizes))
        try:
            student = inspect("the student", folder, needs_weights=False)
        except UserError:
            if sizes.hidden == sizes.heads * head_width(teacher):
                raise
            student = None  # stablelm: its positions follow the head's width in the config, its attention does not
    refuse_other_heads(teacher, student, sizes)


class Text(NamedTuple):
    """What is read, and how."""

    stream: Stream
    arguments: argparse.Namespace
    device: str

    def batches(self):
        return batches(self.stream, self.arguments.tokens, self.arguments.batch_size, self.device)

    def model(self, anatomy: Anatomy) -> Teacher:
        return loaded(anatomy, self.arguments.dtype, self.device)

    def loss(self, model: Teacher) -> float:
        return held_out_loss(model, self.stream, self.arguments.tokens, self.arguments.batch_size, self.device)


class Cut(NamedTuple):
    blocks: list[int]
    sizes: Sizes | None  # None: the teacher's widths
    cutter: Cutter | None


def cut_of(arguments: argparse.Namespace, teacher: Anatomy, sizes: Sizes | None, text: Text | None, model) -> Cut:
    if arguments.rank == "influence":

        def influence(kept: list[int]) -> dict[int, float]:
            speak(f"looking for the block that does least: {len(kept)} are left, {arguments.layers} stay")
            return influences(model.body.network, teacher, text.batches(), kept)

        blocks = most_influential(influence, teacher.layers, arguments.layers, ends=not arguments.free_ends)
    elif sizes and arguments.layers is None and arguments.keep is None:
        blocks = list(range(teacher.layers))
    else:
        blocks = choose_blocks(teacher.layers, arguments.layers, arguments.keep)
    return Cut(blocks, sizes, cutter_of(teacher, sizes, text, model.body.network, blocks) if sizes else None)


def cutter_of(teacher: Anatomy, sizes: Sizes, text: Text, network, blocks: list[int]) -> Cutter:
    own = teacher_sizes(teacher)
    speak(f"measuring channels and heads of {len(blocks)} blocks")
    heads = find_heads(network, teacher, own.heads)
    importance = measure(network, teacher, text.batches(), heads, own, blocks)
    by_name = {found.name: (number, found) for number, found in enumerate(heads)}
    joined = find_joined(network, teacher, heads, own.ffn) if sizes.ffn != own.ffn else {}
    return Cutter(teacher, own, sizes, choose_channels(importance, own, sizes), by_name, joined)


def write(arguments: argparse.Namespace, teacher: Anatomy, cut: Cut, text: Text | None, model) -> None:
    with new_folder(arguments.out, overwrite=arguments.overwrite, sources=[teacher.folder]) as part:
        write_json(part / "config.json", cut_config(teacher, cut.blocks, cut.sizes))
        inspect("a cut of TEACHER", str(part), needs_weights=False)
        places = places_of(teacher, part, cut.blocks, cut.cutter)
        recipes = [Recipe(name, place.shape, place.entry.dtype) for name, place in places.items()]
        write_shards(part, recipes, partial(read, places), arguments.max_shard_gb * 1e9)
        if text and not arguments.no_refit:
            fitted = refitted(part, teacher, cut, text, model)
            write_shards(part, recipes, partial(read, places, fitted=fitted), arguments.max_shard_gb * 1e9)
        copy_files(teacher.folder, part, [*TOKENIZER_FILES, "generation_config.json"])
        write_json(part / CUT, cut_map(teacher, cut.blocks))


def refitted(folder: Path, teacher: Anatomy, cut: Cut, text: Text, model) -> dict:
    """By name, the tensors of the student in `folder` that are fitted to its teacher."""
    student = inspect("a cut of TEACHER", str(folder))
    models = ((model, teacher), (text.model(student), student))
    walks = [Walk(of.body.network, anatomy, text.batches()) for of, anatomy in models]
    return refit(*walks, cut.blocks, cut.cutter)


def prepare(arguments: argparse.Namespace) -> tuple[Anatomy, Sizes | None, Text | None]:
    """The teacher, the student's widths if they are others, and the text: with no mistake left that can be found by now."""
    teacher = inspect("TEACHER", str(find_folder("TEACHER", arguments.teacher)))
    refuse_mistakes(arguments, teacher)
    check_out(arguments.out.resolve(), arguments.overwrite, [teacher.folder])
    asked = asked_sizes(arguments)
    sizes = student_sizes(teacher, asked) if asked else None
    if sizes:
        refuse_unfit(teacher, sizes)
    stream = open_text(arguments, teacher)
    return teacher, sizes, Text(stream, arguments, device_of(arguments.device)) if stream else None


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    teacher, sizes, text = prepare(arguments)
    model = text and text.model(teacher)
    cut = cut_of(arguments, teacher, sizes, text, model)
    write(arguments, teacher, cut, text, model)
    student = inspect("OUT", str(arguments.out))
    if text:
        speak("measuring the loss of teacher and student on held-out text")
    losses = [text.loss(model), text.loss(text.model(student))] if text else [None, None]
    print(f"blocks {', '.join(map(str, cut.blocks))} of {teacher.layers} of {teacher.folder} -> {arguments.out}")
    print(table({"teacher": (teacher, losses[0]), "student": (student, losses[1])}))
    print(f"train it with:\n  student.path = {json.dumps(str(arguments.out))}")


if __name__ == "__main__":
    run_main(main)
