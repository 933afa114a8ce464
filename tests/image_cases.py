"""Images as cameras and the web have them: turned by EXIF, textured, of impossible sizes."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from shard_factory import encode, photo

from navit_clip.data.decode import EncodedImage

# What a camera stores so that turning it as EXIF says gives the upright image.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


def sideways_file(upright: np.ndarray, orientation: int, kind: str, **options: Any) -> bytes:
    """A file that EXIF turns to become the upright image."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    return encode(stored, kind, exif=exif, **options)


def textured(height: int, width: int) -> Image.Image:
    """A photo with fine noise, which a bad resize or a bad decode shows in."""
    noise = np.random.default_rng(0).normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(photo(1, height, width)) + noise).clip(0, 255).astype("u1"))


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours of some opacity over white: float, as many channels as `rgb` has."""
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose header announces so many pixels, and whose body holds 8 × 8."""
    data = bytearray(encode(photo(0, 8, 8), "JPEG"))
    frame = data.index(b"\xff\xc0")  # baseline frame: length, precision, height, width
    data[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


def cmyk_and_ycck() -> tuple[bytes, bytes, np.ndarray]:
    """The same inks as a CMYK and as a YCCK JPEG, and their colours on paper."""
    inks = photo(3, 24, 40).convert("CMYK")
    black = Image.fromarray(np.tile(np.linspace(0, 200, 40).astype(np.uint8), (24, 1)))
    cyan, magenta, yellow, _ = inks.split()
    cmyk = Image.merge("CMYK", (cyan, magenta, yellow, black))
    options = {"quality": 100, "subsampling": 0}
    # Pillow writes CMYK inverted and without a transform. Given luma and chroma in place of the
    # inks, its file is a YCCK one as soon as the Adobe segment says so.
    luma = Image.merge("RGB", (cyan, magenta, yellow)).convert("YCbCr")
    inverted = (Image.eval(plane, lambda value: 255 - value) for plane in luma.split())
    data = bytearray(encode(Image.merge("CMYK", (*inverted, black)), "JPEG", **options))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2
    planes = np.asarray(cmyk).astype(float)
    paper = (255 - planes[..., :3]) * (255 - planes[..., 3:]) / 255
    return encode(cmyk, "JPEG", **options), bytes(data), paper


def png_16_bit(pixels_HWK: np.ndarray) -> bytes:
    """A PNG of uint16 colours, which Pillow cannot write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    height, width, _ = pixels_HWK.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels_HWK)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def pixels_of(data: bytes) -> np.ndarray:
    """Upright pixels at the native size."""
    image = EncodedImage(data)
    return image.pixels(image.height, image.width)
