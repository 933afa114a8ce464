"""Images as Python programs hold them: Pillow images, arrays, tensors, files' bytes and paths.

The embedding API's way in. What is in memory already becomes RGB by the rules of
`navit_clip.data.decode` and from there on is sized, resized and patchified as files are.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from torch import Tensor

from navit_clip.data.decode import EncodedImage, OpenedImage
from navit_clip.data.image_header import MAX_PIXELS
from navit_clip.errors import SkipSampleError

ImageInput = Image.Image | np.ndarray | Tensor | bytes | IO[bytes] | str | os.PathLike[str]

WANTED = (
    "a PIL image, a uint8 array [H, W, 3], a tensor [3, H, W] (uint8, or float in [0, 1]), an "
    "encoded file's bytes, or its path"
)
_CHANNELS = (1, 3, 4)  # grey, RGB, RGB with opacity


def open_image(image: ImageInput, max_pixels: int = MAX_PIXELS) -> EncodedImage | OpenedImage:
    """Whatever holds an image, ready to be sized.

    Args:
        image: A Pillow image; a uint8 array [H, W, C] or [H, W]; a tensor [C, H, W] or [H, W] on
            any device; both uint8 or floating point in [0, 1] (rounded to 8 bits, as files have
            them); an encoded file as bytes, opened in binary mode, or its path. C is 1 (grey), 3
            (RGB) or 4 (RGB and opacity).
        max_pixels: Encoded images of more are refused.

    Raises:
        ValueError: If it is none of these, or cannot be read; names the mistake.
    """
    try:
        if isinstance(image, Image.Image):
            return OpenedImage(image)
        if isinstance(image, np.ndarray):
            return OpenedImage(_from_array(image))
        if isinstance(image, Tensor):
            return OpenedImage(_from_array(_to_array(image), "tensor"))
        if isinstance(image, bytes):
            return EncodedImage(image, max_pixels)
        if hasattr(image, "read"):
            data = image.read()
            if not isinstance(data, bytes):
                raise ValueError("a file opened as text: open it with mode 'rb'")
            return EncodedImage(data, max_pixels)
        if isinstance(image, str) and image.lower().startswith(("http://", "https://", "data:")):
            raise ValueError("a web address: download it, and give its bytes or its path")
        if isinstance(image, str | os.PathLike):
            return EncodedImage(Path(image).read_bytes(), max_pixels)
    except SkipSampleError as error:
        raise ValueError(error.detail) from error
    except OSError as error:
        # Of a path that is not there, or of a Pillow image that reads its file only now.
        # A caption or a base64 text given as a path is long.
        name = f": {str(error.filename)[:80]!r}" if error.filename else ""
        raise ValueError(f"cannot read it: {error.strerror or error}{name}") from error
    raise ValueError(f"{type(image).__name__} is no image: give {WANTED}")


def _from_array(pixels: np.ndarray, what: str = "array") -> Image.Image:
    """A Pillow image of uint8, or floats in [0, 1], [H, W, C] or [H, W]."""
    if np.issubdtype(pixels.dtype, np.floating):
        if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):  # or not a number
            raise ValueError(
                f"a float {what} with values from {pixels.min():.3g} to {pixels.max():.3g}: give "
                "[0, 1], not normalised by mean and deviation"
            )
        pixels = (pixels.astype(np.float32) * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ValueError(f"{what} of {pixels.dtype}: give uint8 in [0, 255], or float in [0, 1]")
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in _CHANNELS):
        raise ValueError(f"array of shape {pixels.shape}: give [H, W, 3]")
    if 0 in pixels.shape:
        raise ValueError(f"it has no pixels: {pixels.shape[0]} rows and {pixels.shape[1]} columns")
    if pixels.shape[2:] == (1,):
        pixels = pixels[..., 0]
    return Image.fromarray(np.ascontiguousarray(pixels))


def _to_array(tensor: Tensor) -> np.ndarray:
    """[H, W, C] or [H, W] of a tensor with the channels first."""
    shape = tuple(tensor.shape)
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and shape[0] not in _CHANNELS):
        raise ValueError(f"tensor of shape {shape}: give [3, H, W]")
    # Moved before it is converted: not every device knows every type. NumPy has no bfloat16.
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()
    return (tensor.permute(1, 2, 0) if tensor.ndim == 3 else tensor).numpy()
