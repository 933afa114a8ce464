"""Reads JSON of captions: COCO's ``captions_*.json``, Karpathy's ``dataset_*.json``, plain lists.

Evaluation reads the images that they name as they are, `make_shards` makes shards of them. Tables
are read by `tables`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from navit_clip.data.annotations.rows import Row, merge_rows, to_text
from navit_clip.errors import UserError
from navit_clip.files import reading

_FORMS = "COCO's captions format, Karpathy's, or a list of image and caption"
_IMAGE_KEYS = ("image", "file_name", "filename", "image_path", "path")


def read_caption_file(path: Path) -> list[Row]:
    """All images of a JSON of captions, in the file's order.

    An image that is listed twice in one split becomes one with all its captions. A caption that is
    null or no text, and an image without a name, are for the reader of the rows to count.

    Args:
        path: In COCO's or Karpathy's format, or BLIP's and LAVIS's: a list of objects with
            ``image`` and ``caption``, a text or a list of them. Recognised by content.

    Raises:
        UserError: If the file cannot be read, has none of these formats, gives two images one id,
            or has a caption of an image that it does not list.
    """
    with reading(f"{path} as JSON", ValueError):
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise UserError(f"{path} is empty: expected {_FORMS}")
        content = json.loads(text)
    try:
        if isinstance(content, list):
            images = [_plain(image) for image in content]
        elif "annotations" in content:
            images = _coco(content, path)
        else:
            images = [_karpathy(image) for image in content["images"]]
        return merge_rows(images)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} has no form that is known: expected {_FORMS}: {error!r}"
        ) from error


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
    names: dict[str, str] = {}
    for image in content["images"]:
        identity, name = _identity(image["id"]), _name(image.get("file_name"))
        if names.setdefault(identity, name) != name:
            raise UserError(
                f"{path}: image {identity} is both {names[identity]} and {name}: whose its "
                "captions are is uncertain; give every image an id of its own"
            )
    found: dict[str, list[str | None]] = {identity: [] for identity in names}
    for annotation in content["annotations"]:
        identity = _identity(annotation["image_id"])
        if identity not in names:
            raise UserError(f"{path}: a caption names image {identity}, which is not listed")
        found[identity].append(to_text(annotation.get("caption")))
    return [Row(names[identity], tuple(captions)) for identity, captions in found.items()]


def _karpathy(image: Any) -> Row:
    split = image.get("split")
    return Row(
        _name(image["filename"], to_text(image.get("filepath")) or ""),
        tuple(to_text(sentence.get("raw")) for sentence in image["sentences"]),
        split=None if split is None else str(split),
    )


def _plain(image: Mapping[str, Any]) -> Row:
    name = next((image[key] for key in _IMAGE_KEYS if key in image), None)
    captions = image["caption"] if "caption" in image else image["captions"]
    if name is None and not any(key in image for key in _IMAGE_KEYS):
        raise KeyError(" or ".join(_IMAGE_KEYS))
    return Row(_name(name), tuple(map(to_text, captions if type(captions) is list else [captions])))


def _identity(value: Any) -> str:
    """An image's id: some files have it as a number in one place and as text in the other."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (int, str)) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no image id")
    return str(value)


def _name(value: Any, folder: str = "") -> str:
    name = (to_text(value) or "").strip()
    return os.path.normpath(os.path.join(folder, name)) if name and "\0" not in name else ""
