"""Image files in place of shards: what a table, a JSON or a folder says of them.

The one way in for `navit_clip.data.pieces`, which training reads, and for `make_shards`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from navit_clip.data.annotations.caption_files import of_splits, read_caption_file
from navit_clip.data.annotations.folders import read_folder
from navit_clip.data.annotations.rows import ImageList, Row
from navit_clip.data.annotations.tables import open_table
from navit_clip.errors import UserError

_LOOKED_FOR = 100  # files, before anything is read


@dataclass(frozen=True)
class FilesConfig:
    """How a table, a JSON or a folder of image files is read, in place of shards.

    Attributes:
        images: The folder that paths in a table or a JSON begin at; null is its own.
        image_column: Column of a table that holds the path, or the image itself.
        caption_columns: Columns of a table that hold captions; none, ``[]``, reads images alone, or
            with their classes.
        label_column: Column of a table that holds the class, as an index or a name.
        splits: Splits of a Karpathy JSON to take.
        samples_per_shard: Images that are read together as a shard would be.
        shuffle_seed: Puts image files into a random order before that, once and for all epochs;
            null keeps their own, in which neighbours may be alike.
    """

    images: str | None = None
    image_column: str = "path"
    caption_columns: tuple[str, ...] = ("caption",)
    label_column: str | None = None
    splits: tuple[str, ...] = ()
    samples_per_shard: int = 1000
    shuffle_seed: int | None = 0

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, got {self.samples_per_shard}")

    @property
    def columns(self) -> list[str]:
        """Of a table, those that are read: of the image, perhaps the label, the captions."""
        labels = [] if self.label_column is None else [self.label_column]
        return [self.image_column, *labels, *self.caption_columns]


def open_images(path: Path, config: FilesConfig) -> ImageList:
    """The images of a table, a JSON of captions or a folder, in its order.

    Raises:
        UserError: If it cannot be read or names no image.
    """
    if path.is_dir():
        return read_folder(path)
    folder = path.parent if config.images is None else Path(config.images)
    if path.suffix.lower() == ".json":
        return ImageList(folder, _rows_of_splits(path, config.splits))
    return open_table(
        path, folder, config.image_column, config.caption_columns, config.label_column
    )


def _rows_of_splits(path: Path, splits: Sequence[str]) -> list[Row]:
    rows = read_caption_file(path)
    present = sorted({row.split for row in rows if row.split is not None})
    if len(present) > 1 and not splits:
        raise UserError(
            f"{path} has splits {', '.join(present)}: name those wanted, by --split {present[0]}, "
            f"in a training by --data.files.splits '[{present[0]}]'"
        )
    rows = of_splits(rows, splits, path)
    if not rows:
        raise UserError(f"no image in {path}")
    return rows


def check_files(images: ImageList, flag: str) -> None:
    """Finds out whether the folder was moved, before every image is skipped.

    Args:
        images: The list.
        flag: Names the folder.

    Raises:
        UserError: If the folder does not exist, or none of the first images does.
    """
    if not images.folder.is_dir():
        raise UserError(f"no folder at {images.folder}: check {flag}")
    first = [row.name for row in images.rows[:_LOOKED_FOR] if row.name]
    if first and not any(os.path.exists(images.folder / name) for name in first):
        raise UserError(
            f"none of the first {len(first)} images exists, such as {images.folder / first[0]}: "
            f"check {flag}"
        )
