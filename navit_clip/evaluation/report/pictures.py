"""The pixels of a few images of a dataset, as thumbnails at their own aspect ratio."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Collection
from dataclasses import dataclass

from PIL import Image

from navit_clip.data.decode import EncodedImage
from navit_clip.data.image_header import MOST_PIXELS
from navit_clip.errors import SkipSampleError
from navit_clip.evaluation.datasets import EvalDataset, FileDataset
from navit_clip.evaluation.embed import Embedded
from navit_clip.files import storable

_BOX = (240, 180)  # width and height that a report's thumbnail fits in


@dataclass(frozen=True)
class Picture:
    """One image as a report shows it.

    Attributes:
        name: File or sample.
        height: Of the original, upright, in pixels.
        width: Of the original.
        thumbnail: WebP, never larger than the original; None where the dataset no longer has it.
        thumbnail_size: Width and height of the thumbnail.
    """

    name: str
    height: int
    width: int
    thumbnail: bytes | None = None
    thumbnail_size: tuple[int, int] = (0, 0)

    @property
    def uri(self) -> str:
        """The thumbnail as a ``data:`` address."""
        return "data:image/webp;base64," + b64encode(self.thumbnail or b"").decode()


def read_images(dataset: EvalDataset, names: Collection[str]) -> dict[str, bytes]:
    """The encoded images of a dataset that have these names; files of others are not touched."""
    wanted = set(names)
    if isinstance(dataset, FileDataset):
        dataset = FileDataset([path for path in dataset.paths if storable(path) in wanted])
    found: dict[str, bytes] = {}
    for item in dataset.read(0, 1) if wanted else ():
        if item.name in wanted and isinstance(item.data, bytes):
            found[item.name] = item.data
            if len(found) == len(wanted):
                break
    return found


def thumbnail(encoded: bytes, width: int, height: int) -> Image.Image | None:
    """Shrinks an image into a box at its own aspect ratio; a small one stays as it is.

    Returns:
        None if it cannot be decoded: a cached evaluation may outlive its images.
    """
    try:
        image = EncodedImage(encoded, MOST_PIXELS)
        scale = min(width / image.width, height / image.height, 1.0)
        rows, columns = round(image.height * scale), round(image.width * scale)
        return Image.fromarray(image.pixels(max(1, rows), max(1, columns)))
    except SkipSampleError:
        return None


def read_pictures(
    dataset: EvalDataset, data: Embedded, indices: Collection[int]
) -> dict[int, Picture]:
    """Thumbnails of some images of an embedded dataset, by index.

    Raises:
        UserError: If the dataset itself can no longer be read.
    """
    encoded = read_images(dataset, {data.names[i] for i in indices})
    pictures = {}
    for i in indices:
        name, (height, width) = data.names[i], data.sizes[i]
        pictures[i] = Picture(name, height, width)
        if thumb := thumbnail(encoded.get(name, b""), *_BOX):
            file = io.BytesIO()
            thumb.save(file, format="WEBP", quality=78)
            pictures[i] = Picture(name, height, width, file.getvalue(), thumb.size)
    return pictures
