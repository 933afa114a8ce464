"""Image files in place of shards: the rows of a table or a folder, cut into pieces read as shards.

A piece stands in the list of shards as the path of a tar does, and yields the samples that the tar
would hold which `make_shards` writes of the same rows. Orders, mixtures and resume know no
difference.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from navit_clip.data.annotations.image_files import FilesConfig, check_files, open_images
from navit_clip.data.annotations.members import read_members
from navit_clip.data.annotations.rows import Row
from navit_clip.data.decode import MOST_PIXELS
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.seeding import generator
from navit_clip.errors import SkipSampleError


class Piece(str):
    """Some rows of a table or a folder; its text, such as ``photos.csv/00012``, names it.

    Args:
        path: Its text.
        images: The folder that the rows' names are relative to.
        first: Index of the first row among all; keys count from it.
        rows: What it holds.
        classnames: Class names by label, none if rows have no labels.

    Attributes:
        count: How many rows.
    """

    def __new__(cls, path: str, *_: object) -> Piece:
        """The text alone, with which a copy begins."""
        return super().__new__(cls, path)

    def __init__(
        self, path: str, images: Path, first: int, rows: Sequence[Row], classnames: Sequence[str]
    ) -> None:
        self.images, self.first, self.count = images, first, len(rows)
        self.classnames = classnames
        # One object, not thousands: forked readers would copy each of those that they look at.
        lines = ([row.name, row.captions, row.label, row.sidecars] for row in rows)
        self._rows = "\n".join(map(json.dumps, lines)).encode()

    def samples(self, name: str, wanted: Container[int] | None) -> Iterator[RawSample]:
        """Yields samples in order; one of a missing or broken file with its problem.

        Args:
            name: What ids begin with.
            wanted: Indices to yield; the files of all others are not opened.
        """
        for index, line in enumerate(self._rows.split(b"\n")):
            if wanted is not None and index not in wanted:
                continue
            row, members, problem = _row(line), dict[str, bytes](), None
            try:
                members = read_members(self.images, row, MOST_PIXELS)
            except SkipSampleError as error:
                problem = SkipSampleError(error.reason, f"{row.name or 'a row'}: {error.detail}")
            yield RawSample(f"{name}/{self.first + index:09d}", index, members, problem)

    def digest(self) -> str:
        """A hash of the rows."""
        return hashlib.blake2b(self._rows, digest_size=8).hexdigest()

    def head(self, size: int) -> bytes:
        """The first bytes of the first image, none if it is not there."""
        first = _row(self._rows.partition(b"\n")[0])
        # ValueError: as in `read_members`.
        with suppress(OSError, ValueError), open(self.images / first.name, "rb") as file:
            return file.read(size)
        return b""


def _row(line: bytes) -> Row:
    name, captions, label, sidecars = json.loads(line)
    return Row(name, tuple(captions), label, sidecars=sidecars)


def split_files(path: str, config: FilesConfig) -> list[str]:
    """A table, a JSON of captions or a folder of images as a list of pieces.

    Raises:
        UserError: If it cannot be read, names no image, or none of the first ones exists.
    """
    if os.path.isdir(path):  # whose own time of change says nothing about folders in it
        return list(_split(path, config))
    found = os.stat(path)
    return list(_split_table(path, config, found.st_mtime_ns, found.st_size))


@lru_cache(maxsize=8)
def _split_table(path: str, config: FilesConfig, *_: int) -> tuple[str, ...]:
    """Once for a table, which training looks up several times, unless it has changed."""
    return _split(path, config)


def _split(path: str, config: FilesConfig) -> tuple[str, ...]:
    images = open_images(Path(path), config)
    check_files(images, "data.files.images")
    rows = shuffle_rows(images.rows, config.shuffle_seed)
    starts = range(0, len(rows), config.samples_per_shard)
    return tuple(
        Piece(
            os.path.join(path, shard_name(number, len(starts))),
            images.folder,
            start,
            rows[start : start + config.samples_per_shard],
            images.classnames,
        )
        for number, start in enumerate(starts)
    )


def shuffle_rows(rows: Sequence[Row], seed: int | None) -> list[Row]:
    """Rows in a random order, the same for the same seed; None keeps their own."""
    if seed is None:
        return list(rows)
    order = generator(seed, "make_shards").permutation(len(rows))
    return [rows[index] for index in order.tolist()]


def shard_name(number: int, count: int) -> str:
    """What a shard of `count` is called; wide enough that names sort in their order."""
    return f"{number:0{max(5, len(str(count - 1)))}d}"
