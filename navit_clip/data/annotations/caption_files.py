"""Reads COCO's ``captions_*.json`` and Karpathy's ``dataset_*.json``.

Evaluation reads the images that they name as they are, `make_shards` makes shards of them. Tables
are read by `tables`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from navit_clip.data.annotations.rows import Row, merge_rows
from navit_clip.errors import UserError
from navit_clip.files import reading


def read_caption_file(path: Path) -> list[Row]:
    """All images of a JSON of captions, in the file's order; captions are stripped.

    An image that is listed twice in one split becomes one with all its captions.

    Args:
        path: In COCO's or Karpathy's format, recognised by content.

    Raises:
        UserError: If the file cannot be read, has neither format, or has a caption of an image
            that it does not list.
    """
    with reading(f"{path} as JSON", ValueError, RecursionError):
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise UserError(f"{path} is empty: expected COCO's captions format or Karpathy's")
        content = json.loads(text)
    try:
        images = _coco(content, path) if "annotations" in content else _karpathy(content)
        return merge_rows(images)
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"{path} is neither COCO's captions format nor Karpathy's: {error!r}"
        raise UserError(problem) from error


def of_splits(rows: Sequence[Row], splits: Sequence[str], path: Path) -> list[Row]:
    """Rows of some splits, or of all if none is named; `path` is for messages.

    Raises:
        UserError: If a split does not occur.
    """
    present = {row.split for row in rows if row.split is not None}
    if unknown := sorted(set(splits) - present):
        has = f"the file has {', '.join(sorted(present))}" if present else "leave --split out"
        raise UserError(f"no split {', '.join(map(repr, unknown))} in {path}: {has}")
    return [row for row in rows if not splits or row.split in splits]


def _coco(content: Any, path: Path) -> list[Row]:
    names = {image["id"]: str(Path(image["file_name"])) for image in content["images"]}
    found: dict[Any, list[str]] = {identity: [] for identity in names}
    for annotation in content["annotations"]:
        identity = annotation["image_id"]
        if identity not in names:
            raise UserError(f"{path}: a caption names image {identity}, which is not listed")
        found[identity].append(annotation["caption"].strip())
    return [Row(names[identity], tuple(captions)) for identity, captions in found.items()]


def _karpathy(content: Any) -> list[Row]:
    return [
        Row(
            str(Path(image.get("filepath", "")) / image["filename"]),
            tuple(sentence["raw"].strip() for sentence in image["sentences"]),
            split=image.get("split"),
        )
        for image in content["images"]
    ]
