"""Encoded bytes to RGB pixels at exactly the size the tower will see.

The header alone gives the size, which decides the patch grid; only then are pixels decoded. Nearly
all photos of the web are JPEGs, and a loader's time is theirs: libjpeg-turbo decodes them, at a
smaller DCT scale where the grid is much smaller than the photo, and a vectorised resize with
antialiasing makes them fit. All other files, and whatever libjpeg-turbo objects to, go through
Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from navit_clip.data.image_header import (
    JPEG,
    MAX_PIXELS,
    may_have_exif,
    open_image,
    read_header,
    unreadable,
)
from navit_clip.errors import SkipSampleError

# A sample's image is the first of these members.
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp"),
    *("jpe", "jfif", "tif", "tiff", "avif", "jp2", "j2k", "ppm", "pgm", "pbm", "pnm", "qoi"),
)
_EXTENSIONS = {"TIFF": "tif", "JPEG2000": "jp2", "MPO": "jpg", "JPEG": "jpg"}  # else the format's
# EXIF orientations of files that store the picture upside down, mirrored, and on its side.
_UPSIDE_DOWN, _MIRRORED, _SIDEWAYS = (3, 4, 6, 7), (2, 3, 7, 8), (5, 6, 7, 8)

_DCT_SCALES = (4, 2)
# A decode at DCT scale cuts frequencies off sharply where a full decode and a resize fade them
# out. At the size asked for, the two differ by 28 dB on the worst of COCO's photos, at twice that
# size by 36 dB.
_DCT_MARGIN = 2
CROP_STEP = max(_DCT_SCALES)
"""A crop from a multiple of it, in rows and columns, begins with a whole pixel at every scale."""


class Box(NamedTuple):
    """A part of an image, in pixels of the upright one."""

    top: int
    left: int
    height: int
    width: int


class EncodedImage:
    """An image whose header is read and whose pixels are not yet.

    Args:
        data: The encoded file.
        max_pixels: Pixel cap.

    Raises:
        SkipSampleError: ``unreadable_image`` if no decoder knows it, ``too_large`` past the byte
            or pixel cap.
    """

    def __init__(self, data: bytes, max_pixels: int = MAX_PIXELS) -> None:
        header = read_header(data, max_pixels)
        self._data, self._jpeg = data, header.jpeg
        if header.image is not None:
            self._image = header.image
        height, width = header.height, header.width
        self._orientation = 1
        try:
            # A PNG's EXIF may stand behind its pixels, and Pillow decodes them.
            if header.image is not None or may_have_exif(data):
                self._orientation = self._image.getexif().get(ExifTags.Base.Orientation, 1)
            if header.image is not None and header.image.format == "TIFF":
                # Pillow turns it while it loads; before, some versions give the size turned.
                height, width = ImageOps.exif_transpose(header.image).size[::-1]
                self._orientation = 1
        except Exception as error:
            raise unreadable(error, data) from error
        if self._orientation in _SIDEWAYS:
            width, height = height, width
        self.height, self.width = height, width

    @property
    def extension(self) -> str:
        """The one of the file's content, whatever its name says."""
        form = "JPEG" if self._jpeg else self._image.format or ""
        return _EXTENSIONS.get(form, form.lower())

    def pixels(
        self, height: int, width: int, *, crop: Box | None = None, reduced: bool = True
    ) -> np.ndarray:
        """Decodes, turns upright, crops and resizes with antialiasing (bicubic).

        Args:
            height: Rows wanted.
            width: Columns wanted.
            crop: The part that is wanted, within the image; None wants all of it.
            reduced: Decode a JPEG no larger than needed. Evaluation decodes in full, once for all
                sizes, so that the pixels of one size do not depend on which others were asked for.

        Returns:
            uint8 [height, width, 3], perhaps read-only.

        Raises:
            SkipSampleError: ``unreadable_image`` if the pixels cannot be decoded.
        """
        try:
            if reduced and self._jpeg:
                sideways = self._orientation in _SIDEWAYS
                wanted = (width, height) if sideways else (height, width)
                box = crop or Box(0, 0, self.height, self.width)
                box = _as_stored(box, self._jpeg, self._orientation)
                stored = _read_jpeg(self._data, self._jpeg, box, wanted)
                if stored is not None:
                    return _upright(stored, self._orientation)
            if self._data.startswith(JPEG):
                self._whole_jpeg  # noqa: B018  raises if it is not
            return OpenedImage(self._image).pixels(height, width, crop=crop)
        except SkipSampleError:
            raise
        except Exception as error:
            raise unreadable(error, self._data) from error

    @cached_property
    def _whole_jpeg(self) -> bool:
        """Decodes an eighth of the size: Pillow would fill what is missing with grey."""
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(self._data)
            simplejpeg.decode_jpeg(
                self._data,
                colorspace="CMYK" if colours in ("CMYK", "YCCK") else "RGB",
                min_height=math.ceil(height / 8),
                min_width=math.ceil(width / 8),
            )
        except (ValueError, KeyError) as error:  # as in `_jpeg_size`
            _refuse_cut(error)
        return True

    @cached_property
    def _image(self) -> Image.Image:
        return open_image(self._data)


class OpenedImage:
    """An image in memory; sized like an `EncodedImage`.

    Args:
        image: A Pillow image of any mode with a defined range, turned upright here if its EXIF
            data says so.

    Raises:
        ValueError: If it has no pixels, or a mode without a defined range.
    """

    def __init__(self, image: Image.Image) -> None:
        if image.mode in ("F", "I"):
            raise ValueError(
                f"mode {image.mode} has no range that says what is white: convert it to RGB"
            )
        if 0 in image.size:
            raise ValueError(f"it has no pixels: {image.width}×{image.height}")
        self._rgb = _to_rgb(ImageOps.exif_transpose(image))
        self.height, self.width = self._rgb.height, self._rgb.width

    def pixels(
        self, height: int, width: int, *, crop: Box | None = None, reduced: bool = False
    ) -> np.ndarray:
        """As of an `EncodedImage`, but there is nothing left to decode, reduced or not."""
        rgb = self._rgb
        if crop is not None:
            rgb = rgb.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
        if rgb.size != (width, height):
            rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(rgb)


def _read_jpeg(
    data: bytes, stored: tuple[int, int], box: Box, wanted: tuple[int, int]
) -> np.ndarray | None:
    """Pixels not yet upright, decoded at reduced scale; None if Pillow has to try instead.

    Sizes are height and width, `stored` in the file and `wanted` of the result; `box` is the part
    that is wanted, as stored.
    """
    shrink = min(box.height / wanted[0], box.width / wanted[1])
    scale = next(
        (
            k
            for k in _DCT_SCALES
            # A box that began within a pixel would be moved by up to half of one.
            if shrink >= k * _DCT_MARGIN and box.top % k == box.left % k == 0
        ),
        1,
    )
    try:
        pixels_HWK = simplejpeg.decode_jpeg(
            data, min_height=math.ceil(stored[0] / scale), min_width=math.ceil(stored[1] / scale)
        )
    except ValueError as error:
        _refuse_cut(error)
        return None
    true_size = box.height / scale, box.width / scale
    top, left = box.top // scale, box.left // scale
    part_HWK = pixels_HWK[
        top : top + math.ceil(true_size[0]), left : left + math.ceil(true_size[1])
    ]
    return _resize(np.ascontiguousarray(part_HWK), true_size, wanted)


def _refuse_cut(error: Exception) -> None:
    # What follows is grey, and Pillow does not mind.
    if "premature end" in str(error).lower():
        raise SkipSampleError("unreadable_image", str(error)) from error


def _resize(
    pixels_HWK: np.ndarray, true_size: tuple[float, float], wanted: tuple[int, int]
) -> np.ndarray:
    """Bicubic with antialiasing: Pillow's pixels to a rounding error, in a quarter of its time.

    Args:
        pixels_HWK: uint8, contiguous.
        true_size: Rows and columns that the photo or its part fills. Where that is no multiple of
            the DCT scale, the last row or column is partial, and to take it for a whole one would
            stretch the picture.
        wanted: Height and width to return.
    """
    if pixels_HWK.shape[:2] == wanted:
        return pixels_HWK
    import torch  # the tools that only read headers need none
    from torch.nn import functional as F

    # The batch axis comes before the permutation, else the result is laid out channel by channel.
    image_1KHW = torch.from_numpy(pixels_HWK)[None].permute(0, 3, 1, 2)
    # Height and width become the size times the factor, rounded down: no digit may be missing.
    factors = [(to + 1e-6) / true for to, true in zip(wanted, true_size, strict=True)]
    resized_1KHW = F.interpolate(
        image_1KHW,
        scale_factor=factors,
        mode="bicubic",
        antialias=True,
        recompute_scale_factor=False,
    )
    return resized_1KHW[0].permute(1, 2, 0).numpy()


def _as_stored(box: Box, stored: tuple[int, int], orientation: int) -> Box:
    """Where a part of the upright image is in the file, whose height and width are `stored`."""
    top, left, height, width = box
    if orientation in _SIDEWAYS:
        top, left, height, width = left, top, width, height
    if orientation in _UPSIDE_DOWN:
        top = stored[0] - top - height
    if orientation in _MIRRORED:
        left = stored[1] - left - width
    return Box(top, left, height, width)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of pixels as stored, turned as EXIF says."""
    if orientation in _UPSIDE_DOWN:
        pixels = pixels[::-1]
    if orientation in _MIRRORED:
        pixels = pixels[:, ::-1]
    return pixels.swapaxes(0, 1) if orientation in _SIDEWAYS else pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode: 16-bit scaled to 8, transparency laid on white."""
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        grey = np.asarray(image).astype(np.float32)
        image = Image.fromarray((grey / 257).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer)
    return image.convert("RGB")


def find_image(members: dict[str, bytes]) -> bytes:
    """The image member of a sample.

    Raises:
        SkipSampleError: ``no_image`` if there is none.
    """
    for extension in IMAGE_EXTENSIONS:
        if extension in members:
            return members[extension]
    raise SkipSampleError("no_image", describe_members(members))


def describe_members(members: Mapping[str, bytes]) -> str:
    """The members of a sample that lacks one, for a message."""
    text = f"members: {', '.join(members) or 'none'}"
    if members.keys() <= {*IMAGE_EXTENSIONS} or members.keys() <= {"txt", "json", "cls"}:
        # As where a tar holds all images first and all captions behind them.
        text += "; those of one sample must be neighbours in the tar: a.jpg, a.txt, b.jpg, b.txt"
    return text
