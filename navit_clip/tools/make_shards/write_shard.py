"""Writes one shard: files read, checked and put into a tar as they are.

The bytes of a shard follow from its rows and files alone, so that whoever writes it again, after
an interruption or on another machine, gets the same.
"""

from __future__ import annotations

import os
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from navit_clip.data.annotations.members import read_members
from navit_clip.data.annotations.rows import Row, usable_captions
from navit_clip.data.decode import EncodedImage, find_image
from navit_clip.data.shards import add_member
from navit_clip.data.skip_log import SkipLog
from navit_clip.errors import SkipSampleError
from navit_clip.files import sha256_of


@dataclass(frozen=True)
class ShardTask:
    """What one shard is made of.

    Attributes:
        path: The tar to write.
        images: Folder that the rows' names are relative to.
        first: Index of the first row among all rows; keys count from it.
        rows: What goes in.
    """

    path: Path
    images: Path
    first: int
    rows: list[Row]


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest records of one shard.

    Attributes:
        shard: File name; there is no file if `samples` is 0.
        samples: Samples in it.
        bytes: Size of the file.
        sha256: Of the file, in hexadecimal digits.
        skipped: Rows that gave no sample, by reason.
        skip_log: A line for each of the first few of them.
        captions_skipped: Captions of samples in it that were left out, by reason.
    """

    shard: str
    samples: int
    bytes: int
    sha256: str
    skipped: dict[str, int] = field(default_factory=dict)
    skip_log: list[str] = field(default_factory=list)
    captions_skipped: dict[str, int] = field(default_factory=dict)


def write_shard(task: ShardTask) -> ShardRecord:
    """Writes a shard atomically: it gets its name once it is complete and on the disk.

    Raises:
        OSError: If the disk does not take it.
    """
    skips, samples, without = SkipLog(sys.maxsize), 0, Counter[str]()
    partial = task.path.with_name(task.path.name + ".partial")
    with partial.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for index, row in enumerate(task.rows, task.first):
                try:
                    unusable = _check_captions(row)
                    members = read_members(task.images, row)
                    image = EncodedImage(find_image(members))
                    # The header does not show whether all pixels are there; decoding an eighth of
                    # them does.
                    image.pixels(max(1, image.height // 8), max(1, image.width // 8))
                except SkipSampleError as error:
                    skips.skip_sample(row.name or "a row", error)
                    continue
                without += unusable
                for extension, content in members.items():
                    add_member(tar, f"{index:09d}.{extension}", content)
                samples += 1
        file.flush()
        os.fsync(file.fileno())
    counts, lines = skips.take()
    record = ShardRecord(
        task.path.name,
        samples=0,
        bytes=0,
        sha256="",
        skipped=dict(sorted(counts.items())),
        skip_log=list(lines),
        captions_skipped=dict(sorted(without.items())),
    )
    if not samples:
        partial.unlink()
        task.path.unlink(missing_ok=True)
        return record
    size, digest = partial.stat().st_size, sha256_of(partial)
    partial.replace(task.path)
    return replace(record, samples=samples, bytes=size, sha256=digest)


def _check_captions(row: Row) -> Counter[str]:
    """How many of a row's captions cannot be used, by reason.

    Raises:
        SkipSampleError: If all are empty or missing, and nothing else is known of the image.
    """
    captions, unusable = usable_captions(row.captions)
    known = captions or row.label is not None or row.sidecars is not None
    if row.name and not known and not unusable["bad_caption"]:
        raise SkipSampleError("no_caption", "every caption is empty or missing")
    return unusable
