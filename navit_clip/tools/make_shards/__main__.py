"""``navit-clip data make_shards --coco FILE --images DIR --output DIR``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from navit_clip.data.annotations.caption_files import of_splits, read_caption_file
from navit_clip.data.annotations.rows import ImageList
from navit_clip.data.annotations.tables import open_table
from navit_clip.errors import UserError, one_line_errors
from navit_clip.tools.make_shards.class_folders import open_classes
from navit_clip.tools.make_shards.make import Summary, make_shards, verify_shards

_DESCRIPTION = """Makes webdataset shards of image files, which are copied byte by byte, and their
captions. After an interruption the same command continues; --verify checks the result."""

# Options that mean something for some inputs only; a silent one would be a mistake unnoticed.
_BELONGS = {
    "images": ("coco", "table"),
    "split": ("coco",),
    "image_column": ("table",),
    "caption_column": ("table",),
    "classnames": ("classes",),
    "output": ("coco", "table", "classes"),
    "samples_per_shard": ("coco", "table", "classes"),
    "shuffle_seed": ("coco", "table", "classes"),
}


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m navit_clip.tools.make_shards"
) -> int:
    """Makes or verifies shards.

    Args:
        argv: Arguments without the program's name; those of the process by default.
        prog: What the user typed before them, for messages.

    Returns:
        The exit status: 0 when all is well, 1 if a shard is damaged, 130 when interrupted. A
        mistake of the user's exits with 2.
    """
    args = _parser(prog).parse_args(argv)
    with one_line_errors(prog):
        try:
            return _verify(args) if args.verify is not None else _make(args)
        except KeyboardInterrupt:
            print("interrupted: the same command continues", file=sys.stderr)
            return 130


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=_DESCRIPTION)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--coco", type=Path, metavar="FILE", help="COCO's captions_*.json or Karpathy's dataset"
    )
    source.add_argument(
        "--table", type=Path, metavar="FILE", help="a .csv, .tsv or .parquet of paths and captions"
    )
    source.add_argument("--classes", type=Path, metavar="DIR", help="a folder of class folders")
    source.add_argument("--verify", type=Path, metavar="DIR", help="check shards made earlier")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the shards go")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="where paths begin; a table's own folder if none"
    )
    parser.add_argument("--split", nargs="+", help="splits of a Karpathy file to take")
    parser.add_argument("--image-column", help="column of the paths (default: path)")
    parser.add_argument(
        "--caption-column", action="append", help="column of captions, repeatable (caption)"
    )
    parser.add_argument(
        "--classnames", type=Path, metavar="FILE", help="a line per class (the folders' names)"
    )
    parser.add_argument("--samples-per-shard", type=int, help="rows per shard (1000)")
    parser.add_argument("--shuffle-seed", type=int, help="shuffle the rows (their own order)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    return parser


def _make(args: argparse.Namespace) -> int:
    _check(args)
    if args.output is None:
        raise UserError("--output is missing: name the folder to write")
    images = _open(args)
    for note in images.notes:
        print(note)
    summary = make_shards(
        images,
        args.output,
        samples_per_shard=1000 if args.samples_per_shard is None else args.samples_per_shard,
        shuffle_seed=args.shuffle_seed,
        workers=args.workers,
    )
    _report(args.output, summary)
    return 0


def _check(args: argparse.Namespace) -> None:
    kind = next(k for k in ("coco", "table", "classes", "verify") if getattr(args, k) is not None)
    for name, kinds in _BELONGS.items():
        if getattr(args, name) is not None and kind not in kinds:
            owners = " or ".join(f"--{owner}" for owner in kinds)
            raise UserError(f"--{name.replace('_', '-')} goes with {owners}, not with --{kind}")
    for name in ("samples_per_shard", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def _open(args: argparse.Namespace) -> ImageList:
    if args.coco is not None:
        if args.images is None:
            raise UserError("--images is missing: name the folder of the images")
        return _open_captions(args.coco, args.images, args.split or ())
    if args.table is not None:
        return open_table(
            args.table,
            args.images or args.table.parent,
            args.image_column or "path",
            args.caption_column or ["caption"],
        )
    return open_classes(args.classes, args.classnames)


def _open_captions(path: Path, images: Path, splits: Sequence[str]) -> ImageList:
    rows = read_caption_file(path)
    present = sorted({row.split for row in rows if row.split is not None})
    if len(present) > 1 and not splits:
        raise UserError(f"{path} has splits {', '.join(present)}: name those wanted with --split")
    rows = of_splits(rows, splits, path)
    if not rows:
        raise UserError(f"no image in {path}")
    return ImageList(images, rows)


def _report(output: Path, summary: Summary) -> None:
    what = f"{_describe(summary)} in {output}"
    print(f"{what}, all there already" if not summary.written else what)
    skipped = summary.skipped
    if skipped:
        print(f"skipped {skipped.total():,} of {summary.rows:,} images:")
        for reason, count in skipped.most_common():
            print(f"  {reason:<18}{count:>8,}")
        first = summary.skip_log[:5]
        print("\n".join(f"  {line}" for line in first))
        if skipped.total() > len(first):
            print(f"  … {skipped.total() - len(first):,} more")


def _describe(summary: Summary) -> str:
    plural = "" if summary.shards == 1 else "s"
    return (
        f"{summary.samples:,} samples in {summary.shards:,} shard{plural} ({_size(summary.bytes)})"
    )


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _verify(args: argparse.Namespace) -> int:
    _check(args)
    summary, problems = verify_shards(args.verify, args.workers)
    for problem in problems:
        print(f"damaged: {problem}", file=sys.stderr)
    if problems:
        print("delete damaged shards and repeat the command that made them", file=sys.stderr)
        return 1
    print(f"verified {_describe(summary)} in {args.verify}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
