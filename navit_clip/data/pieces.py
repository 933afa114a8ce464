"""Image files in place of shards: the rows of a table or a folder, cut into pieces read as shards.

A piece stands in the list of shards as the path of a tar does, and yields the samples that the tar
would hold which `make_shards` writes of the same rows. Orders, mixtures and resume know no
difference.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from navit_clip.data.annotations.arrow import ArrowFile
from navit_clip.data.annotations.image_files import FilesConfig, check_files, open_images
from navit_clip.data.annotations.members import make_members, read_members
from navit_clip.data.annotations.rows import Row, to_text
from navit_clip.data.annotations.tables import ARROW, check_columns, to_texts
from navit_clip.data.image_header import MOST_PIXELS
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.seeding import generator
from navit_clip.errors import SkipSampleError, UserError
from navit_clip.files import reading

_TAIL = 32768  # bytes of a table that a fingerprint knows


class Piece(str):
    """Some rows of a table or a folder; its text, such as ``photos.csv/00012``, names it.

    Args:
        path: Its text.
        first: Index of the first row among all; keys count from it.
        size: How many rows.
        classnames: Class names by label, none if rows have no labels.
    """

    def __new__(cls, path: str, *_: object) -> Piece:
        """The text alone, with which a copy begins."""
        return super().__new__(cls, path)

    def __init__(self, path: str, first: int, size: int, classnames: Sequence[str]) -> None:
        self.first, self.size, self.classnames = first, size, classnames

    def samples(self, name: str, wanted: Container[int] | None) -> Iterator[RawSample]:
        """Yields samples in order; one of a missing or broken file with its problem.

        Args:
            name: What ids begin with.
            wanted: Indices to yield; what others consist of is not read.

        Raises:
            OSError: If the table itself cannot be read any more.
        """
        for index, read in enumerate(self._rows()):
            if wanted is not None and index not in wanted:
                continue
            members, problem = dict[str, bytes](), None
            try:
                members = read()
            except SkipSampleError as error:
                problem = error
            yield RawSample(f"{name}/{self.first + index:09d}", index, members, problem)

    def _rows(self) -> Iterator[Callable[[], dict[str, bytes]]]:
        """What reads the members of each row."""
        raise NotImplementedError

    def digest(self) -> str:
        """A hash of the rows."""
        raise NotImplementedError

    def head(self, size: int) -> bytes:
        """The first bytes of the first image, none if it is not there."""
        raise NotImplementedError


class FilesPiece(Piece):
    """Rows that name image files.

    Args:
        path: As of `Piece`.
        first: As of `Piece`.
        classnames: As of `Piece`.
        images: The folder that the rows' names are relative to.
        rows: At least one.
    """

    def __init__(
        self, path: str, first: int, classnames: Sequence[str], images: Path, rows: Sequence[Row]
    ) -> None:
        super().__init__(path, first, len(rows), classnames)
        self.images = images
        # One object, not thousands: forked readers would copy each of those that they look at.
        lines = ([row.name, row.captions, row.label, row.sidecars] for row in rows)
        self.lines = "\n".join(map(json.dumps, lines)).encode()

    def _rows(self) -> Iterator[Callable[[], dict[str, bytes]]]:
        return (partial(self._read, line) for line in self.lines.split(b"\n"))

    def _read(self, line: bytes) -> dict[str, bytes]:
        row = _row(line)
        try:
            return read_members(self.images, row, MOST_PIXELS)
        except SkipSampleError as error:
            detail = f"{row.name or 'a row'}: {error.detail}"
            raise SkipSampleError(error.reason, detail) from error

    def digest(self) -> str:
        """A hash of what the rows say."""
        return _hash(self.lines)

    def head(self, size: int) -> bytes:
        """The first bytes of the first image, none if it is not there."""
        first = _row(self.lines.partition(b"\n")[0])
        # ValueError: as in `read_members`.
        with suppress(OSError, ValueError), open(self.images / first.name, "rb") as file:
            return file.read(size)
        return b""


class StoredPiece(Piece):
    """Rows of a Parquet or Arrow table that holds the images itself.

    Args:
        path: As of `Piece`.
        first: As of `Piece`.
        size: As of `Piece`.
        classnames: As of `Piece`.
        table: The file.
        chunk: Number of its chunk, see `ArrowFile`.
        config: Which columns are read.
    """

    def __init__(
        self,
        path: str,
        first: int,
        size: int,
        classnames: Sequence[str],
        table: Path,
        chunk: int,
        config: FilesConfig,
    ) -> None:
        super().__init__(path, first, size, classnames)
        self.table, self.chunk, self.config = table, chunk, config

    def _rows(self) -> Iterator[Callable[[], dict[str, bytes]]]:
        file = ArrowFile(self.table, self.config.samples_per_shard)
        rows = file.rows(self.chunk, self.config.columns)
        return (partial(self._read, values) for values in rows)

    def _read(self, values: Callable[[], list[Any]]) -> dict[str, bytes]:
        image, *texts = values()
        label = texts.pop(0) if self.config.label_column is not None else None
        row = Row("", tuple(to_texts(texts)), label)
        if isinstance(image, dict):
            row, image = replace(row, name=to_text(image.get("path")) or ""), image.get("bytes")
        if image is None:  # beside the table, perhaps
            return read_members(self.table.parent, row, MOST_PIXELS)
        return make_members(image, row, MOST_PIXELS)

    def digest(self) -> str:
        """A hash of the table's size and its end, which in Parquet describes all that is in it."""
        with open(self.table, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            return _hash(str(size).encode() + file.read())

    def head(self, size: int) -> bytes:
        """Nothing: the table is one file."""
        return b""


def _row(line: bytes) -> Row:
    name, captions, label, sidecars = json.loads(line)
    return Row(name, tuple(captions), label, sidecars=sidecars)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


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
    if path.lower().endswith(ARROW):
        with reading(path, ValueError):
            file = ArrowFile(Path(path), config.samples_per_shard)
        check_columns(Path(path), file.columns, config.columns)
        if not sum(file.counts):
            raise UserError(f"{path} has no row")
        if file.holds_bytes(config.image_column):
            return tuple(_stored(path, file, config))
    images = open_images(Path(path), config)
    check_files(images, "data.files.images")
    rows = shuffle_rows(images.rows, config.shuffle_seed)
    starts = range(0, len(rows), config.samples_per_shard)
    return tuple(
        FilesPiece(
            os.path.join(path, *config.splits, shard_name(number, len(starts))),
            start,
            images.classnames,
            images.folder,
            rows[start : start + config.samples_per_shard],
        )
        for number, start in enumerate(starts)
    )


def _stored(path: str, file: ArrowFile, config: FilesConfig) -> Iterator[Piece]:
    label = config.label_column
    names = file.class_names(label) if label is not None else []
    first = 0
    for number, size in enumerate(file.counts):
        name = os.path.join(path, shard_name(number, len(file.counts)))
        yield StoredPiece(name, first, size, names, Path(path), number, config)
        first += size


def shuffle_rows(rows: Sequence[Row], seed: int | None) -> list[Row]:
    """Rows in a random order, the same for the same seed; None keeps their own."""
    if seed is None:
        return list(rows)
    order = generator(seed, "make_shards").permutation(len(rows))
    return [rows[index] for index in order.tolist()]


def shard_name(number: int, count: int) -> str:
    """What a shard of `count` is called; wide enough that names sort in their order."""
    return f"{number:0{max(5, len(str(count - 1)))}d}"
