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


def main(argv: Sequence[str] | None = None, prog: str = "python -m navit_clip.tools.shapes") -> int:
    """Writes the data set.

    Args:
        argv: Arguments without the program's name; those of the process by default.
        prog: What the user typed before them, for messages.

    Returns:
        The exit status: 0 when the data set is complete, 2 on a mistake, 130 when interrupted.
    """
    defaults = ShapesConfig()
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Writes pictures of shapes with captions: training shards, a zero-shot set "
        "and a retrieval set. Does nothing if they are already there.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of everything")
    parser.add_argument("--train", type=int, default=defaults.train, help="training pictures")
    parser.add_argument(
        "--shard-size", type=int, default=defaults.shard_size, help="pictures per training shard"
    )
    parser.add_argument(
        "--zeroshot-per-class",
        type=int,
        default=defaults.zeroshot_per_class,
        help="zero-shot pictures of each class",
    )
    parser.add_argument(
        "--retrieval", type=int, default=defaults.retrieval, help="retrieval pictures"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    arguments = parser.parse_args(argv)
    with one_line_errors(prog):
        if arguments.workers < 1:
            raise UserError(f"--workers must be at least 1, got {arguments.workers}")
        try:
            names = [f.name for f in fields(ShapesConfig)]
            config = ShapesConfig(**{name: getattr(arguments, name) for name in names})
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
