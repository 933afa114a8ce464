"""``navit-clip data shapes --output data/shapes``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from navit_clip.errors import UserError, one_line_errors
from navit_clip.files import writing
from navit_clip.tools.shapes.write_shapes import ShapesConfig, write_shapes

_HELP = {
    "seed": "seed of everything",
    "train": "training pictures",
    "shard_size": "pictures per training shard",
    "zeroshot_per_class": "zero-shot pictures of each class",
    "retrieval": "retrieval pictures",
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m navit_clip.tools.shapes") -> int:
    """Writes the data set.

    Args:
        argv: Arguments without the program's name; those of the process by default.
        prog: What the user typed before them, for messages.

    Returns:
        The exit status: 0 when the data set is complete, 2 on a mistake, 130 when interrupted.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Writes pictures of shapes with captions: training shards, a zero-shot set "
        "and a retrieval set. Does nothing if they are already there.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    for f in fields(ShapesConfig):
        flag = f"--{f.name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=f.default, help=_HELP[f.name])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    arguments = parser.parse_args(argv)
    with one_line_errors(prog):
        if arguments.workers < 1:
            raise UserError(f"--workers must be at least 1, got {arguments.workers}")
        try:
            config = ShapesConfig(**{name: getattr(arguments, name) for name in _HELP})
        except ValueError as error:
            # The message starts with the field's name, which is the option's.
            raise UserError(f"--{str(error).replace('_', '-')}") from error
        try:
            with writing(f"--output {arguments.output}"):
                written = write_shapes(config, arguments.output, arguments.workers)
        except KeyboardInterrupt:
            print("interrupted; the same command starts over", file=sys.stderr)
            return 130
    print(f"{arguments.output} {'is written' if written else 'is already there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
