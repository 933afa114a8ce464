"""Reads COCO's ``captions_*.json`` and Karpathy's ``dataset_*.json``.

Beside the shards, the other form in which captioned images come; evaluation reads it as it is,
`make_shards` makes shards of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from navit_clip.errors import UserError


@dataclass(frozen=True)
class CaptionedImage:
    """One image of a JSON of captions.

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

    Args:
        path: In COCO's or Karpathy's format, told apart by content.

    Raises:
        UserError: If the file cannot be read or has neither format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: not JSON ({error})") from error
    try:
        return _coco(content) if "annotations" in content else _karpathy(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is neither COCO's captions format nor Karpathy's: {error!r}"
        ) from error


def _coco(content: Any) -> list[CaptionedImage]:
    names = {image["id"]: image["file_name"] for image in content["images"]}
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in names:
            raise UserError(f"a caption names image {annotation['image_id']}, which is not listed")
        found[names[annotation["image_id"]]].append(annotation["caption"].strip())
    return [CaptionedImage(name, tuple(captions)) for name, captions in found.items()]


def _karpathy(content: Any) -> list[CaptionedImage]:
    return [
        CaptionedImage(
            str(Path(image.get("filepath", "")) / image["filename"]),
            tuple(sentence["raw"].strip() for sentence in image["sentences"]),
            image.get("split"),
        )
        for image in content["images"]
    ]
