"""Flags that say how tables of image files are read, for commands that take them beside shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from navit_clip.data.annotations.image_files import FilesConfig


def add_files_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags; each is None where it is not given."""
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="where paths begin; a table's own folder if none"
    )
    parser.add_argument("--image-column", help="of a table, the column of the paths (path)")
    parser.add_argument(
        "--caption-column", action="append", help="column of captions, repeatable (caption)"
    )
    parser.add_argument("--label-column", help="column of classes, as names or indices")
    parser.add_argument("--split", nargs="+", help="splits of a Karpathy file to take")


def files_of(args: argparse.Namespace) -> FilesConfig:
    """What the flags say."""
    captions = args.caption_column
    if captions is None:  # a table of classes need not have any
        captions = FilesConfig.caption_columns if args.label_column is None else ()
    return FilesConfig(
        images=args.images and str(args.images),
        image_column=args.image_column or FilesConfig.image_column,
        caption_columns=tuple(captions),
        label_column=args.label_column,
        splits=tuple(args.split or ()),
    )
