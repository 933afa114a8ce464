"""Splits shards that have no held-out part: ``python -m studies.split TARS --output DIR``.

Each sample goes to ``train.tar``, ``validation.tar`` or ``test.tar`` by a hash of its shard's name
and its key, so that a sample stays where it is when others are added.
"""

from __future__ import annotations

import argparse
import tarfile
import zlib
from contextlib import ExitStack
from pathlib import Path

from navit_clip.data.patterns import expand_shards
from navit_clip.data.shards import add_member
from navit_clip.errors import one_line_errors
from navit_clip.files import reading, replacing, writing

_PARTS = {"test": 15, "validation": 25, "train": 100}  # each up to this of a hundred


def split(shards: list[str], output: Path) -> None:
    """Writes the three parts; the training part last, which therefore says that all are there.

    Raises:
        UserError: If a shard is not there or a part cannot be written.
    """
    with writing(output), ExitStack() as stack:
        output.mkdir(parents=True, exist_ok=True)
        # Left in the opposite order.
        parts = {
            name: stack.enter_context(
                tarfile.open(stack.enter_context(replacing(output / f"{name}.tar")), "w")
            )
            for name in reversed(_PARTS)
        }
        for shard in expand_shards(shards):
            with reading(shard, tarfile.TarError), tarfile.open(shard) as tar:
                for member in tar:
                    if (file := tar.extractfile(member)) is not None:
                        key, _, extension = member.name.partition(".")
                        name = f"{Path(shard).stem}-{key}"
                        add_member(parts[part_of(name)], f"{name}.{extension}", file.read())


def part_of(name: str) -> str:
    """The part that a sample belongs to."""
    place = zlib.crc32(name.encode()) % 100
    return next(part for part, end in _PARTS.items() if place < end)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", nargs="+", help="tar files, folders, patterns")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    with one_line_errors("python -m studies.split"):
        split(args.shards, args.output)


if __name__ == "__main__":
    main()
