"""What the first bytes of an encoded image say: its size, and whether it may be decoded at all.

Caps are checked here, before `navit_clip.data.decode` takes memory for a single pixel.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import NamedTuple

import simplejpeg
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from navit_clip.errors import SkipSampleError

# Caps, checked from the header. Within them an image takes at most 1.7 GB, a hostile one 4 s.
MAX_PIXELS = 64_000_000
# By Pillow's decoder: JPEG 2000 takes up to 91 bytes a pixel, in blocks of 4 × 4 coefficients, and
# QOI and all but 8-bit binary PNM are read in Python, at half a megapixel a second.
_MAX_PIXELS_OF = {"jpeg2k": 16_000_000} | dict.fromkeys(("qoi", "ppm", "ppm_plain"), 2_000_000)
MAX_BYTES = 64 << 20
MOST_PIXELS = 178_956_970  # Pillow refuses more
_MAX_SIDE = 65_535  # resizing takes tables as long as a side
_MAX_SCANNED = 1_000_000_000  # pixels times scans of a JPEG, each of which reads all of them again

# Pillow would try all it knows whatever the name says, and hand an EPS to Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI")
_TIFF_SIDES = (256, 257, 322, 323)  # tags: width and length of the image, and of its tiles
_JPEG_COLOURS = ("YCbCr", "RGB", "Gray")  # the others need conversions that only Pillow has
JPEG = b"\xff\xd8"
_APP1, _SCAN = 0xE1, 0xDA  # JPEG markers: of EXIF and XMP, and of where pixels begin
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # of the size, and how pixels are coded
_PROGRESSIVE = (0xC2, 0xCA)


class Header(NamedTuple):
    """What is known of an image before it is decoded.

    Attributes:
        jpeg: Height and width of a JPEG that libjpeg-turbo may be able to read.
        image: Anything else as Pillow opened it.
        height: Rows as stored, which EXIF may turn into columns.
        width: Columns as stored.
    """

    jpeg: tuple[int, int] | None
    image: Image.Image | None
    height: int
    width: int

    @property
    def cost(self) -> int:
        """Pixels; those of a format whose cap is lower than `MAX_PIXELS` count as much more."""
        pixels = self.height * self.width
        if self.image is None:
            return pixels
        return pixels * MAX_PIXELS // min(MAX_PIXELS, _cap(self.image, MAX_PIXELS))


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Opens an encoded image.

    Raises:
        SkipSampleError: ``unreadable_image`` if no decoder knows it, ``too_large`` past the byte
            or pixel cap.
    """
    if len(data) > MAX_BYTES:
        raise SkipSampleError("too_large", f"{len(data):,} bytes exceed {MAX_BYTES:,}")
    try:
        jpeg, image = _jpeg_size(data), None
        if jpeg is not None:
            height, width = jpeg
        else:
            image = open_image(data)
            width, height = image.size
        if width * height > max_pixels:
            problem = f"{width}×{height} pixels exceed max_pixels={max_pixels}"
            raise SkipSampleError("too_large", problem)
        if image is not None:
            _check_cost(image, max_pixels)
        if max(width, height) > _MAX_SIDE:
            raise SkipSampleError("too_large", f"{width}×{height}: a side exceeds {_MAX_SIDE}")
        if data.startswith(JPEG) and width * height * (scans := _scans(data)) > _MAX_SCANNED:
            found = f"{scans} scans of {width}×{height} pixels"
            raise SkipSampleError("too_large", f"{found} exceed {_MAX_SCANNED:,} in all")
    except SkipSampleError:
        raise
    except Exception as error:
        raise unreadable(error, data) from error
    return Header(jpeg, image, height, width)


def open_image(data: bytes) -> Image.Image:
    """As Pillow opens it, nothing decoded."""
    with warnings.catch_warnings():
        # Pillow warns of large images at a limit of its own; ours is the cap.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        Image.init()
        known = [form for form in _FORMATS if form in Image.OPEN]
        return Image.open(io.BytesIO(data), formats=known)


def _check_cost(image: Image.Image, max_pixels: int) -> None:
    """Refuses what takes far more than its pixels would.

    Raises:
        SkipSampleError: ``too_large``.
    """
    limit = _cap(image, max_pixels)
    if image.width * image.height > limit:
        problem = f"{image.width}×{image.height} pixels exceed {limit:,} of {image.format}"
        raise SkipSampleError("too_large", problem)
    if isinstance(image, TiffImageFile) and _TIFF_SIDES[-1] in image.tag_v2:
        # A tile may be larger than the image, and all may share one piece of data.
        width, height, *sides = (image.tag_v2[tag] for tag in _TIFF_SIDES)
        decoded = math.prod(sides) * math.ceil(width / sides[0]) * math.ceil(height / sides[1])
        if decoded > max_pixels:
            problem = f"its tiles of {sides[0]}×{sides[1]} pixels exceed max_pixels={max_pixels}"
            raise SkipSampleError("too_large", problem)


def _cap(image: Image.Image, otherwise: int) -> int:
    tile = getattr(image, "tile", [])  # of any file, though not of an image in memory
    return _MAX_PIXELS_OF.get(tile[0][0] if tile else "", otherwise)


def unreadable(error: Exception, data: bytes) -> SkipSampleError:
    """Why an image is skipped: decoders of damaged files raise whatever they stumble over."""
    if isinstance(error, UnidentifiedImageError):
        # Pillow's message names the address of the buffer.
        return SkipSampleError("unreadable_image", f"no known format begins with {data[:12]!r}")
    bomb = isinstance(error, Image.DecompressionBombError)
    return SkipSampleError("too_large" if bomb else "unreadable_image", str(error))


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Stored height and width of a JPEG that libjpeg-turbo may be able to read."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    # KeyError: a rare subsampling that simplejpeg has no name for.
    except (ValueError, KeyError):
        return None
    return (height, width) if colours in _JPEG_COLOURS else None


def may_have_exif(data: bytes) -> bool:
    """Whether a JPEG has an EXIF or XMP segment, or may have one for all its markers show."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        if marker in (_APP1, _SCAN):
            return marker == _APP1
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def _scans(data: bytes) -> int:
    """At least as many scans as a JPEG has; 1 if its first one holds all, as nearly all have it."""
    at, components = 2, 0
    while data[at : at + 1] == b"\xff" and at + 10 <= len(data):
        marker = data[at + 1]
        if marker in _FRAMES:
            components = 0 if marker in _PROGRESSIVE else data[at + 9]
        elif marker == _SCAN and data[at + 4] == components:
            return 1
        if marker < 0xC0 or 0xD0 <= marker <= _SCAN:  # no segment of a header
            break
        # A marker may have more than one byte 255 before it.
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.count(bytes((0xFF, _SCAN)), at)


def check_max_pixels(value: int) -> None:
    """Checks a pixel cap.

    Raises:
        ValueError: If it is out of range.
    """
    if not 1 <= value <= MOST_PIXELS:
        raise ValueError(f"max_pixels must be between 1 and {MOST_PIXELS}, got {value}")
