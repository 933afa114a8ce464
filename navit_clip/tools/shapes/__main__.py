"""``navit-clip data shapes --output data/shapes``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from navit_clip.commands import Parser, number, run_command
from navit_clip.files import writing
from navit_clip.tools.shapes.write_shapes import write_shapes


def main(argv: Sequence[str] | None = None, prog: str = "python -m navit_clip.tools.shapes") -> int:
    """Writes the data set, see `run_command`."""
    parser = Parser(
        prog=prog,
        description="Writes pictures of shapes with captions: training shards, a zero-shot set "
        "and a retrieval set. Does nothing if they are already there.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    for flag, least, default, text in (
        ("--seed", 0, 0, "seed of everything"),
        ("--train", 0, 24_000, "training pictures"),
        ("--shard-size", 1, 1000, "pictures per training shard"),
        ("--zeroshot-per-class", 0, 20, "zero-shot pictures of each class"),
        ("--retrieval", 0, 1000, "retrieval pictures"),
        ("--workers", 1, os.cpu_count() or 1, "processes"),
    ):
        parser.add_argument(flag, type=number(least), default=default, help=text)
    parser.add_argument(
        "--hard",
        action="store_true",
        help="small marks, fine textures and long strips, whose labels need resolution",
    )
    return run_command(parser, _write, argv, "interrupted; the same command starts over")


def _write(args: argparse.Namespace) -> int:
    with writing(f"--output {args.output}"):
        written = write_shapes(**vars(args))
    print(f"{args.output} {'is written' if written else 'is already there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
