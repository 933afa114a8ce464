"""Rows of a JSON of captions, COCO's or Karpathy's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from navit_clip.data.annotations.caption_files import read_caption_file
from navit_clip.errors import UserError
from navit_clip.tools.make_shards.rows import Row, RowSource


def open_captions(path: Path, images: Path, splits: Sequence[str]) -> RowSource:
    """Rows of a JSON of captions.

    Args:
        path: The JSON file.
        images: The folder that it names files in.
        splits: Splits of a Karpathy file to take; none if it has only one, or is COCO's.

    Raises:
        UserError: If the file holds no image, or not those splits, or several and none is named.
    """
    found = read_caption_file(path)
    present = sorted({image.split for image in found if image.split is not None})
    unknown = sorted(set(splits) - set(present))
    if unknown:
        has = f"has {', '.join(present)}" if present else "has none: leave --split out"
        raise UserError(f"no split {', '.join(unknown)} in {path}: it {has}")
    if len(present) > 1 and not splits:
        raise UserError(f"{path} has splits {', '.join(present)}: name those wanted with --split")
    rows = [
        Row(image.name, image.captions) for image in found if not splits or image.split in splits
    ]
    if not rows:
        raise UserError(f"no image in {path}")
    return RowSource(images, rows)
