"""Reads COCO's ``captions_*.json`` and Karpathy's ``dataset_*.json``.

Beside the shards, the other form in which captioned images come; evaluation reads it as it is,
`make_shards` makes shards of it. Tables are read by `make_shards.tables`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from navit_clip.errors import UserError
from navit_clip.files import reading


@dataclass(frozen=True)
class CaptionedImage:
    """One image of a file of captions.

    Attributes:
        name: Path below the folder of images.
        captions: Its captions, stripped; there may be none.
        split: The split that Karpathy's file puts it in; COCO's has none.
    """

    name: str
    captions: tuple[str, ...]
    split: str | None = None


def read_caption_file(path: Path) -> list[CaptionedImage]:
    """All images of a JSON of captions, in the file's order.

    An image that is listed twice in one split becomes one with all its captions: twice, each would
    be the other's negative.

    Args:
        path: In COCO's or Karpathy's format, told apart by content.

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
        return _merged(images)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is neither COCO's captions format nor Karpathy's: {error!r}"
        ) from error


def _coco(content: Any, path: Path) -> list[CaptionedImage]:
    names = {image["id"]: str(Path(image["file_name"])) for image in content["images"]}
    found: dict[Any, list[str]] = {identity: [] for identity in names}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in names:
            raise UserError(
                f"{path}: a caption names image {annotation['image_id']}, which is not listed"
            )
        found[annotation["image_id"]].append(annotation["caption"].strip())
    return [CaptionedImage(names[i], tuple(captions)) for i, captions in found.items()]


def _karpathy(content: Any) -> list[CaptionedImage]:
    return [
        CaptionedImage(
            str(Path(image.get("filepath", "")) / image["filename"]),
            tuple(sentence["raw"].strip() for sentence in image["sentences"]),
            image.get("split"),
        )
        for image in content["images"]
    ]


def _merged(images: Iterable[CaptionedImage]) -> list[CaptionedImage]:
    found: dict[tuple[str, str | None], tuple[str, ...]] = {}
    for image in images:
        place = image.name, image.split
        found[place] = found.get(place, ()) + image.captions
    return [CaptionedImage(name, captions, split) for (name, split), captions in found.items()]
