"""``navit-clip data make_shards --coco FILE --images DIR --output DIR``."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from navit_clip.commands import Parser, number, run_command
from navit_clip.data.annotations.class_names import read_class_names
from navit_clip.data.annotations.folders import read_class_folders, read_folder
from navit_clip.data.annotations.image_files import open_images
from navit_clip.data.annotations.rows import ImageList, Row
from navit_clip.errors import UserError, printable
from navit_clip.tools.files_flags import add_files_flags, files_of
from navit_clip.tools.make_shards.make import make_shards, verify_shards
from navit_clip.tools.make_shards.merge import merge_parts
from navit_clip.tools.make_shards.write_shard import ShardRecord

_DESCRIPTION = """Makes webdataset shards of image files, which are copied byte by byte, and their
captions. After an interruption the same command continues; --verify checks the result. With --part
several machines share the work, and --merge puts together and checks what they wrote."""

_SOURCES = ("coco", "table", "folder", "classes")
# Options that mean something for some inputs only; a silent one would be a mistake unnoticed.
_BELONGS = {
    "images": ("coco", "table"),
    "split": ("coco",),
    "image_column": ("table",),
    "caption_column": ("table",),
    "label_column": ("table",),
    "classnames": ("classes",),
    "output": (*_SOURCES, "merge"),
    "part": _SOURCES,
    "samples_per_shard": _SOURCES,
    "shuffle_seed": _SOURCES,
}


_SHOWN = 5  # skipped images and files


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m navit_clip.tools.make_shards"
) -> int:
    """Makes or verifies shards, see `run_command`; the exit status is 1 if a shard is damaged."""
    parser = Parser(prog=prog, description=_DESCRIPTION)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--coco", type=Path, metavar="FILE", help="COCO's captions_*.json or Karpathy's dataset"
    )
    source.add_argument(
        "--table", type=Path, metavar="FILE", help="a .csv, .tsv, .jsonl or .parquet"
    )
    source.add_argument(
        "--folder", type=Path, metavar="DIR", help="images with captions in files beside them"
    )
    source.add_argument("--classes", type=Path, metavar="DIR", help="a folder of class folders")
    source.add_argument("--verify", type=Path, metavar="DIR", help="check shards made earlier")
    source.add_argument(
        "--merge", type=Path, nargs="+", metavar="DIR", help="put parts together in --output"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the shards go")
    add_files_flags(parser)
    parser.add_argument(
        "--classnames", type=Path, metavar="FILE", help="a line per class (the folders' names)"
    )
    parser.add_argument("--samples-per-shard", type=number(1), help="rows per shard (1000)")
    parser.add_argument("--shuffle-seed", type=int, help="shuffle the rows (their own order)")
    parser.add_argument(
        "--part", type=_part, metavar="K/N", help="make the K-th of N parts, each in its --output"
    )
    parser.add_argument("--workers", type=number(1), default=os.cpu_count() or 1, help="processes")
    return run_command(parser, _run, argv, "interrupted: the same command continues")


def _run(args: argparse.Namespace) -> int:
    kind = next(k for k in (*_SOURCES, "verify", "merge") if getattr(args, k) is not None)
    for name, kinds in _BELONGS.items():
        if getattr(args, name) is not None and kind not in kinds:
            owners = " or ".join(f"--{owner}" for owner in kinds)
            raise UserError(f"--{name.replace('_', '-')} goes with {owners}, not with --{kind}")
    if args.verify is not None:
        return _verify(args)
    if args.output is None:
        raise UserError("--output is missing: name the folder to write")
    if args.merge is not None:
        records = merge_parts(args.merge, args.output, args.workers)
        print(f"merged and verified {_describe(records)} in {args.output}")
        return 0
    return _make(args)


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text}: expected such as 3/16, the third of 16 parts")
    return int(part), int(parts)


def _make(args: argparse.Namespace) -> int:
    images = _open(args)
    for note in images.notes:
        print(printable(note))
    records, written = make_shards(
        images,
        args.output,
        samples_per_shard=args.samples_per_shard or 1000,
        shuffle_seed=args.shuffle_seed,
        part=args.part or (1, 1),
        workers=args.workers,
    )
    what = f"{_describe(records)} in {args.output}"
    print(what if written else f"{what}, all there already")
    skipped = sum((Counter(record.skipped) for record in records), Counter[str]())
    first = [line for record in records for line in record.skip_log]
    _print_skipped(f"{skipped.total():,} of {len(images.rows):,} images", skipped, first)
    captions = sum((Counter(record.captions_skipped) for record in records), Counter[str]())
    _print_skipped(f"{captions.total():,} captions of samples that have others", captions)
    files = Counter(images.skipped)
    _print_skipped(f"{files.total():,} files that are no image of a class", files, images.skips)
    return 0


def _print_skipped(what: str, counts: Counter[str], examples: Sequence[str] = ()) -> None:
    if not counts:
        return
    print(f"skipped {what}:")
    for reason, count in counts.most_common():
        print(f"  {reason:<18}{count:>8,}")
    for line in examples[:_SHOWN]:
        print(f"  {line}")
    if counts.total() > _SHOWN:
        print(f"  … {counts.total() - _SHOWN:,} more")


def _open(args: argparse.Namespace) -> ImageList:
    if args.classes is not None:
        return _open_classes(args.classes, args.classnames)
    if args.folder is not None:
        return read_folder(args.folder)
    if args.images is None and args.coco is not None:
        raise UserError("--images is missing: name the folder of the images")
    return open_images(args.coco or args.table, files_of(args))


def _open_classes(folder: Path, names: Path | None) -> ImageList:
    """Rows of class folders: the label is the folder's index in sorted order."""
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}: check --classes")
    found = read_class_folders(folder)
    classnames = found.captions
    if names is not None:
        classnames = read_class_names(str(names), found.names)
    rows = [Row(name, (classnames[label],), label) for name, label in found.images]
    used = {label for _, label in found.images}
    empty = [name for label, name in enumerate(found.names) if label not in used]
    notes = [f"no image of {len(empty)} of {len(found.names)} classes: {', '.join(empty[:_SHOWN])}"]
    return ImageList(
        folder,
        rows,
        classnames,
        notes=notes if empty else [],
        skipped=found.skipped,
        skips=found.skips,
    )


def _verify(args: argparse.Namespace) -> int:
    records, problems = verify_shards(args.verify, args.workers)
    for problem in problems:
        print(f"damaged: {printable(str(problem))}", file=sys.stderr)
    if problems:
        print("delete damaged shards and repeat the command that made them", file=sys.stderr)
        return 1
    print(f"verified {_describe(records)} in {args.verify}")
    return 0


def _describe(records: Sequence[ShardRecord]) -> str:
    samples = sum(record.samples for record in records)
    shards = sum(record.samples > 0 for record in records)
    size = tqdm.format_sizeof(sum(record.bytes for record in records), "B")
    return f"{samples:,} samples in {shards:,} shard{'' if shards == 1 else 's'} ({size})"


if __name__ == "__main__":
    sys.exit(main())
