"""Encoded bytes to RGB pixels at exactly the size the tower will see.

The header alone gives the size, which decides the patch grid; only then are pixels decoded, JPEGs
at the smallest DCT scale that still covers the target, so a large photo that becomes a small grid
is never decoded in full.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
MAX_PIXELS = 64_000_000  # checked from the header, before any memory is taken
MAX_BYTES = 64 << 20

# Pillow would try all it knows whatever the name says, and hand an EPS to Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class SkipSampleError(Exception):
    """This sample is unusable and is passed over.

    Attributes:
        reason: A short name that skipped samples are counted under.
        detail: What is wrong with this one.
    """

    def __init__(self, reason: str, detail: str) -> None:
        # Both, because an error from a worker process is made again from its arguments.
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class EncodedImage:
    """An image whose header is read and whose pixels are not yet.

    Args:
        data: The encoded file.

    Raises:
        SkipSampleError: ``unreadable_image`` if no decoder knows it, ``too_large`` past the byte
            or pixel cap.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) > MAX_BYTES:
            raise SkipSampleError("too_large", f"{len(data):,} bytes exceed {MAX_BYTES:,}")
        try:
            with warnings.catch_warnings():
                # Pillow warns of large images by its own measure; the cap below is ours.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                self._image = Image.open(io.BytesIO(data), formats=_FORMATS)
            width, height = self._image.size
            if width * height > MAX_PIXELS:
                raise SkipSampleError("too_large", f"{width}×{height} pixels exceed {MAX_PIXELS:,}")
            # After the cap: a PNG's EXIF may stand behind its pixels, and Pillow decodes them.
            self._orientation = self._image.getexif().get(ExifTags.Base.Orientation, 1)
        except SkipSampleError:
            raise
        except UnidentifiedImageError as error:
            # Pillow's message names the address of the buffer.
            raise SkipSampleError(
                "unreadable_image", f"no known format begins with {data[:12]!r}"
            ) from error
        except Image.DecompressionBombError as error:
            raise SkipSampleError("too_large", str(error)) from error
        # Decoders of damaged files raise whatever they stumble over.
        except Exception as error:
            raise SkipSampleError("unreadable_image", str(error)) from error
        if self._orientation in _SIDEWAYS:
            width, height = height, width
        self.height, self.width = height, width

    def pixels(self, height: int, width: int, *, reduced: bool = True) -> np.ndarray:
        """Decodes, turns upright and resizes with antialiasing.

        Args:
            height: Rows wanted.
            width: Columns wanted.
            reduced: Decode a JPEG no larger than needed. Evaluation decodes in full, once for all
                sizes, so that the pixels of one size do not depend on which others were asked for.

        Returns:
            uint8 [height, width, 3].

        Raises:
            SkipSampleError: ``unreadable_image`` if the pixels cannot be decoded.
        """
        image = self._image
        try:
            if reduced:
                sideways = self._orientation in _SIDEWAYS
                image.draft("RGB", (height, width) if sideways else (width, height))
            upright = ImageOps.exif_transpose(image)
            rgb = _to_rgb(upright)
            if rgb.size != (width, height):
                rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
            return np.asarray(rgb)
        except Exception as error:
            raise SkipSampleError("unreadable_image", str(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode: 16-bit scaled to 8, transparency laid on white."""
    if image.mode.startswith(("I", "F")):
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
    raise SkipSampleError("no_image", f"members: {', '.join(members) or 'none'}")


def patchify(pixels_HWK: np.ndarray, patch_size: int) -> np.ndarray:
    """Cuts an image into patches, row by row.

    Args:
        pixels_HWK: uint8 [rows·P, columns·P, 3].
        patch_size: P.

    Returns:
        uint8 [rows·columns, P·P·3], each patch row by row with channels last.
    """
    height, width, channels = pixels_HWK.shape
    rows, columns = height // patch_size, width // patch_size
    grid = pixels_HWK.reshape(rows, patch_size, columns, patch_size, channels)
    return grid.swapaxes(1, 2).reshape(rows * columns, patch_size * patch_size * channels)
