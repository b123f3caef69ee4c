"""Show and verify a corpus: ted-scale inspect PATH [--verify] [--picture FILE.svg] [--tokenizer T]

Counts, a histogram of document lengths and a few documents as text. --verify reads every byte and exits with 1 if something
is damaged. PATH is the same as in a run file: a prefix, a shard, or a folder, on disk or under s3:// or msc://. Note: shards
of other tools have neither digests nor a vocabulary, so less of them can be verified; the last line says how much was.
"""

import argparse
import collections
import hashlib
import random
import sys
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy

from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main
from ted_scale.base.redact import printable
from ted_scale.commands import targets
from ted_scale.commands.length_picture import Lengths, bins, picture, subtitle
from ted_scale.commands.origin import origin
from ted_scale.config.data import Streaming
from ted_scale.corpora.corpus import manifest_files, prefixes_of, read_shards
from ted_scale.corpora.local import SHARD_NUMBER
from ted_scale.corpora.output import TOTALS, read_manifest
from ted_scale.corpora.reader import Shard, reading
from ted_scale.corpora.shards import (
    ShardIndex,
    check_digest,
    check_recorded,
    document_borders,
    out_of_vocabulary,
    sidecar_of,
    tokenizer_of,
)
from ted_scale.corpora.tokenizer import Tokenizer, digest, load_tokenizer
from ted_scale.storage import objects

SHOWN = 400  # characters of a document
LONGEST = 1000  # characters of a token
BAR = 50
CHUNK = 1 << 24  # tokens in memory at once
STREAM = Streaming()  # says where indices of a remote corpus are kept


def lengths_of(indices: list[ShardIndex]) -> Lengths:
    """Of all documents, exactly; one shard's index is in memory at a time."""
    counts: collections.Counter[int] = collections.Counter()
    for index in indices:
        values, times = numpy.unique(numpy.diff(document_borders(index)), return_counts=True)
        counts.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
    values = numpy.array(sorted(counts))
    return Lengths(values, numpy.array([counts[value] for value in values.tolist()]))


def summary(path: str, indices: list[ShardIndex], manifests: dict[str, dict]) -> str:
    tokens, size = sum(i.tokens for i in indices), sum(i.files.bin_bytes for i in indices)
    lines = [
        f"{path}: {len(indices):,} shard(s), {sum(i.documents for i in indices):,} documents, {tokens:,} tokens, "
        f"{size:,} bytes of {'/'.join(sorted({i.dtype.name for i in indices}))}"
    ]
    if masked := [index for index in indices if index.has_targets]:
        lines.append(targets.share_of(masked, tokens))
    named = {"tokenizer", "tokenizer_digest", "vocab_size", "eod_id"}
    sidecars = (sidecar_of(index.files) or {} for index in indices)
    if first := next((sidecar for sidecar in sidecars if named <= sidecar.keys()), None):
        lines.append(
            f"tokenizer {first['tokenizer']}: vocabulary {first['vocab_size']:,}, documents end with {first['eod_id']}, "
            f"digest {first['tokenizer_digest'][:12]}"
        )
    for name, manifest in manifests.items():
        lines.append(
            f"{name} is made of {len(manifest['sources']):,} file(s), {sum(s['bytes'] for s in manifest['sources']):,} "
            f"bytes; {manifest['empty']:,} empty and {manifest['skipped']:,} unreadable documents left out"
        )
    return "\n".join(lines)


def histogram(lengths: Lengths) -> str:
    found = bins(lengths, 1)
    most = max(count for _, _, count in found)
    rows = [
        f"{begin:>13,} to {end - 1:<13,} {'#' * round(BAR * count / most):<{BAR}} {count:,}"
        for begin, end, count in found
    ]
    return "\n".join([subtitle(lengths).replace(" (dashed)", ""), *rows])


def choose_tokenizer(arguments, indices: list[ShardIndex]) -> Tokenizer | None:
    """The one on the command line, or, to show documents, the one that the corpus names. It must be the corpus's own."""
    written = tokenizer_of(f"corpus {arguments.path}", indices)
    sidecars = (sidecar_of(index.files) or {} for index in indices)
    named = next((sidecar["tokenizer"] for sidecar in sidecars if "tokenizer" in sidecar), None)
    shows = arguments.documents or arguments.document is not None
    path = arguments.tokenizer or (named if shows else None)
    if path is None:
        if shows:
            raise UserError(
                f"corpus {arguments.path} must name its tokenizer to be shown as text, but does not; pass --tokenizer, or "
                "--documents 0"
            )
        return None
    if (
        path != arguments.tokenizer and not Path(path).exists()
    ):  # a corpus must not decide what is downloaded from a hub
        raise UserError(
            f"corpus {arguments.path} must name a tokenizer that is on this machine to be shown as text, but names {path}; pass "
            "--tokenizer, or --documents 0"
        )
    tokenizer = load_tokenizer(path)
    if written and digest(tokenizer) != written[1]:
        raise UserError(
            f"--tokenizer must be the one that {written[0]} is written with ({named}), but is another, {path}; name that one"
        )
    return tokenizer


def chosen(arguments, documents: int) -> list[int]:
    """The numbers of the documents to show, of all shards one after another."""
    if arguments.document is None:
        return sorted(random.Random(arguments.seed).sample(range(documents), min(arguments.documents, documents)))
    if arguments.document >= documents:
        raise UserError(
            f"--document must be below the {documents:,} documents of {arguments.path}, but is {arguments.document}; the first "
            "has number 0"
        )
    return [arguments.document]


def show_documents(indices: list[ShardIndex], tokenizer: Tokenizer, arguments) -> None:
    """Print the beginnings of documents, or the whole document that the user named."""
    starts = list(accumulate((i.documents for i in indices), initial=0))
    for document in chosen(arguments, starts[-1]):
        shard = bisect_right(starts, document) - 1
        index, number = indices[shard], document - starts[shard]
        begin, end = document_borders(index)[number:][:2].tolist()
        most = SHOWN if arguments.document is None else LONGEST * (end - begin)
        marks = reading(index, Shard.targets, begin, end) if index.has_targets else None
        first = 0 if marks is None else targets.first_shown(marks, most)
        ids = tokens_of(index, begin + first, end).tolist()
        if strange := [i for i in ids[: 4 * most] if not 0 <= i < len(tokenizer.pieces)]:
            raise out_of_vocabulary(index.prefix, strange[0], len(tokenizer.pieces))
        head = f"document {number:,} of {index.prefix}, {end - begin:,} tokens{origin(index, number)}"
        print(f"\n{printable(head)}")
        if marks is not None:
            print(targets.as_text(tokenizer, ids, marks[first:], most, first > 0))
            continue
        words = tokenizer.decode([i for i in ids[: 4 * most] if i != tokenizer.eod])
        for line in (words[:most] + " …" * (len(words) > most)).splitlines():
            print(f"    {printable(line)}")


def tokens_of(index: ShardIndex, begin: int, end: int) -> numpy.ndarray:
    if thing := index.files.remote_bin:
        what, size = f"corpus shard {index.prefix} must be readable", index.dtype.itemsize
        return numpy.frombuffer(objects.read(thing, begin * size, end * size, what, STREAM.patience_s), index.dtype)
    return reading(index, Shard.tokens, begin, end)


def read_shard(prefix: str) -> ShardIndex:
    (index,) = read_shards(prefix, STREAM)
    return index


def damages(prefixes: list[str], names: list[str], vocabulary: int | None) -> list[str]:
    """One sentence for every shard and manifest that is damaged."""
    here = (Path(prefix + ending).exists() for prefix in prefixes for ending in (".bin", ".idx"))
    if not objects.is_remote(prefixes[0]) and not any(here):
        read_shard(prefixes[0])  # an empty path is a mistake and not damage
    checks: list[tuple] = [(check_shard, (prefix, vocabulary)) for prefix in prefixes]
    checks += [(check_manifest, (name, prefixes)) for name in names]
    found = []
    for check, arguments in checks:
        try:
            check(*arguments)
        except UserError as error:
            found.append(str(error))
    return found


def check_shard(prefix: str, vocabulary: int | None) -> None:
    index = read_shard(prefix)
    sidecar = sidecar_of(index.files) or {}
    check_recorded(index.files, sidecar, idx_digest(index) if "idx_sha256" in sidecar else None)
    document_borders(index)
    vocabulary, digest, outside = vocabulary or sidecar.get("vocab_size"), hashlib.sha256(), []
    for begin in range(0, index.tokens, CHUNK):
        chunk = tokens_of(index, begin, min(begin + CHUNK, index.tokens))
        digest.update(chunk.data)
        outside += [t for t in (int(chunk.min()), int(chunk.max())) if vocabulary and not 0 <= t < vocabulary]
    targets.check(index, sidecar)
    if "bin_sha256" in sidecar:
        check_digest(prefix + ".bin", digest.hexdigest(), sidecar["bin_sha256"])
    if outside:
        raise out_of_vocabulary(prefix, outside[0], vocabulary)


def idx_digest(index: ShardIndex) -> str:
    with Path(index.files.path(".idx")).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_manifest(name: str, prefixes: list[str]) -> None:
    path, folder = f"{name}.manifest.json", name[: name.rfind("/") + 1]
    manifest = read_manifest(manifest_files(name, [name], STREAM)[name], path)
    listed = [folder + shard["name"] for shard in manifest["shards"]]
    ours = [prefix for prefix in prefixes if SHARD_NUMBER.sub("", prefix) == name]
    for prefix in sorted(set(listed) ^ set(ours)):
        state = "is missing" if prefix in listed else "is not listed"
        raise UserError(f"the shards of {path} must be those beside it, but {prefix} {state}; copy the corpus again")
    indices = [read_shard(prefix) for prefix in listed]
    for index, shard in zip(indices, manifest["shards"], strict=True):
        sidecar = Path(index.files.path(".json"))
        if not sidecar.is_file() or hashlib.sha256(sidecar.read_bytes()).hexdigest() != shard["sidecar_sha256"]:
            raise UserError(
                f"{index.prefix}.json must have the digest that {path} records, but has another; copy it again"
            )
    for key in TOTALS:
        if manifest[key] != (total := sum(getattr(index, key) for index in indices)):
            raise UserError(f"{path} must count {total} {key} as its shards do, but counts {manifest[key]}")


def outputs_of(prefixes: list[str]) -> list[str]:
    """Outputs that have a manifest and all of their shards in `prefixes`: one shard alone is not compared with the manifest."""
    names = sorted({SHARD_NUMBER.sub("", prefix) for prefix in prefixes})
    return [
        name
        for name in names
        if manifest_files(name, [name], STREAM) and set(prefixes_of(name, STREAM)) <= set(prefixes)
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Show what a corpus holds, and verify it.")
    parser.add_argument("path", metavar="PATH", help="prefix of shards, one shard, or a folder")
    parser.add_argument("--tokenizer", help="for decoding; default: the one that the corpus names")
    parser.add_argument("--documents", type=int, default=3, help="random documents to print as text")
    parser.add_argument(
        "--document", type=int, metavar="N", help="print the whole of document N, the first of which is 0"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of documents")
    parser.add_argument("--verify", action="store_true", help="check digests, sizes and ids; exit code 1 for damage")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw the distribution of document lengths")
    arguments = parser.parse_args(argv)
    for name in ("documents", "document"):
        if (given := getattr(arguments, name) or 0) < 0:
            raise UserError(f"--{name} must be 0 or more, but is {given}; leave it out")
    if arguments.picture and (arguments.picture.suffix != ".svg" or not arguments.picture.parent.is_dir()):
        raise UserError(
            f"--picture must be an .svg file in a folder that exists, but is {arguments.picture}; rename it"
        )
    return arguments


def verify(arguments, prefixes: list[str], names: list[str]) -> None:
    vocabulary = len(load_tokenizer(arguments.tokenizer).pieces) if arguments.tokenizer else None
    found = damages(prefixes, names, vocabulary)
    for sentence in found:
        print(f"damaged: {sentence}", file=sys.stderr)
    if found:
        sys.exit(1)
    signed = sum(read_shard(prefix).recorded is not None for prefix in prefixes)
    print(
        f"verified: {len(prefixes):,} shard(s), digests of {signed:,}, {len(names):,} manifest(s); nothing is damaged"
    )


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    prefixes = prefixes_of(arguments.path, STREAM)
    names = outputs_of(prefixes)
    if arguments.verify:
        verify(arguments, prefixes, names)
    indices = read_shards(arguments.path, STREAM)
    tokenizer = choose_tokenizer(arguments, indices)
    lengths = lengths_of(indices)
    manifests = {name: read_manifest(manifest_files(name, [name], STREAM)[name]) for name in names}
    print(printable(summary(arguments.path, indices, manifests), "\n"))
    print(histogram(lengths))
    if arguments.picture:
        arguments.picture.write_text(picture(f"Document lengths of {arguments.path}", lengths), encoding="utf-8")
    if tokenizer:
        show_documents(indices, tokenizer, arguments)


if __name__ == "__main__":
    run_main(main)
