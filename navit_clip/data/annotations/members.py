"""An image file and what is known of it as the files of one sample, as shards hold them.

`make_shards` writes them into tars; training without shards reads them one by one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from navit_clip.data.annotations.rows import Row, usable_captions
from navit_clip.data.decode import EncodedImage
from navit_clip.data.image_header import MAX_BYTES, MAX_PIXELS
from navit_clip.errors import SkipSampleError
from navit_clip.files import storable


def read_members(images: Path, row: Row, max_pixels: int = MAX_PIXELS) -> dict[str, bytes]:
    """The files of one sample, by extension.

    Args:
        images: Folder that the row's name is relative to.
        row: Names the image.
        max_pixels: Of an image.

    Raises:
        SkipSampleError: If there is no image, or as `make_members`; the reason says why.
    """
    _usable_captions(row)
    if not row.name:
        raise SkipSampleError("no_path", "names no image")
    path = images / row.name
    data = _read(path, "missing_image")
    if row.sidecars is None:
        return make_members(data, row, max_pixels)
    members = {path.suffix[1:].lower(): data}
    for extension in row.sidecars:
        beside = path.with_suffix(f".{extension}")
        members[extension.lower()] = _read(beside, "unreadable_member")
    return members


def make_members(data: bytes, row: Row, max_pixels: int = MAX_PIXELS) -> dict[str, bytes]:
    """The files of one sample, by extension: image, captions, label.

    Args:
        data: The image, encoded.
        row: What is known of it.
        max_pixels: Of an image.

    Raises:
        SkipSampleError: If the image's header cannot be read or is past a cap, or no caption is
            text.
    """
    captions = _usable_captions(row)
    image = EncodedImage(data, max_pixels)
    fields: dict[str, Any] = {
        "captions": captions,
        "width": image.width,
        "height": image.height,
        "file_name": storable(row.name),
    }
    members = {
        image.extension: data,
        "json": json.dumps(fields, ensure_ascii=False).encode(),
    }
    if captions:
        members["txt"] = captions[0].encode()
    if row.label is not None:
        members["cls"] = str(row.label).encode()
    return members


def _usable_captions(row: Row) -> tuple[str, ...]:
    captions, unusable = usable_captions(row.captions)
    if not captions and unusable["bad_caption"]:
        raise SkipSampleError("bad_caption", "no caption is text in UTF-8")
    return captions


def _read(path: Path, reason: str) -> bytes:
    try:
        with path.open("rb") as file:
            # One byte past the cap is enough to be refused by it.
            return file.read(MAX_BYTES + 1)
    # ValueError: a path with a zero byte.
    except (OSError, ValueError) as error:
        detail = getattr(error, "strerror", None) or str(error)
        raise SkipSampleError(reason, detail) from error
