"""Command line of the data set: ``python -m navit_clip.tools.shapes --output data/shapes``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from navit_clip.tools.shapes.write import OutputError, ShapesConfig, write_shapes


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the data set.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status: 0 when the data set is complete, 2 on a mistake, 130 when interrupted.
    """
    defaults = ShapesConfig()
    parser = argparse.ArgumentParser(
        prog="python -m navit_clip.tools.shapes",
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
    if arguments.workers < 1:
        return _fail(f"--workers must be at least 1, got {arguments.workers}")
    try:
        config = ShapesConfig(
            seed=arguments.seed,
            train=arguments.train,
            shard_size=arguments.shard_size,
            zeroshot_per_class=arguments.zeroshot_per_class,
            retrieval=arguments.retrieval,
        )
    except ValueError as error:
        # The message starts with the field's name, which is the option's.
        return _fail(f"--{str(error).replace('_', '-')}")
    try:
        written = write_shapes(config, arguments.output, arguments.workers)
    except OutputError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"cannot write --output {arguments.output}: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command starts over", file=sys.stderr)
        return 130
    print(f"{arguments.output} {'is written' if written else 'is already there'}")
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
