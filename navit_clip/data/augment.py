"""Random crops, flips and colours of training images: off by default, since NaViT has none.

Crops are drawn between header and pixels, since they decide which grids an image may have; flips
and colours follow once it is decoded and small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from navit_clip.data.decode import CROP_STEP, Box

_TRIES = 10
# A shift of a crop by less than CROP_STEP is not seen in images of so many pixels on each side.
_LARGE = 64 * CROP_STEP
_ENHANCE = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are varied, drawn per sample and epoch. By default they are not.

    Attributes:
        min_area: Random crops (Inception's) of at least this fraction of an image; 1 crops nothing.
            ViT has 0.05, timm 0.08. A crop is from then on the image: without upscale it may not be
            enlarged.
        max_stretch: A crop is at most so many times as wide or as tall for its area as the image
            is; with mode ``square``, as a square is.
        flip: Probability of a mirror image. Captions that say left or right become wrong.
        brightness: Colours times a factor from [1 - x, 1 + x].
        contrast: Likewise, their distance from the image's mean grey.
        saturation: Likewise, that from the grey of each pixel.
        hue: Turned by a fraction of the circle of hues from [-x, x].
        mixup: α of Mixup, for tasks with classes: images of a batch with the same grid are blended
            by λ ~ Beta(α, α), and so are their labels; 0 leaves it out.
        cutmix: α of CutMix, which pastes a part of one into the other. With both, each image gets
            one of them, as likely as the other.
    """

    min_area: float = 1.0
    max_stretch: float = 4 / 3
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= 1:
            raise ValueError(f"min_area must lie in (0, 1], got {self.min_area}")
        if not 1 <= self.max_stretch < math.inf:
            raise ValueError(f"max_stretch must be at least 1, got {self.max_stretch}")
        for name, most in {"flip": 1, **dict.fromkeys(_ENHANCE, 1), "hue": 0.5}.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in [0, {most}], got {getattr(self, name)}")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


def sample_crop(
    config: AugmentConfig, height: int, width: int, aspect: float, rng: np.random.Generator
) -> Box | None:
    """Draws a part of an image, as torchvision's ``RandomResizedCrop`` does; None takes all of it.

    Args:
        config: Its fields of crops.
        height: Rows of the image.
        width: Columns.
        aspect: Width over height of a crop that is not stretched.
        rng: Drawn from if there are crops.
    """
    if config.min_area == 1:
        return None
    step = CROP_STEP if min(height, width) >= _LARGE else 1
    stretch = math.log(config.max_stretch)
    for _ in range(_TRIES):
        area = height * width * rng.uniform(config.min_area, 1)
        ratio = aspect * math.exp(rng.uniform(-stretch, stretch))
        # In steps as well, so that it also begins with a whole pixel in files stored upside down.
        rows, columns = (
            step * round(math.sqrt(square) / step) for square in (area / ratio, area * ratio)
        )
        if 1 <= rows <= height and 1 <= columns <= width:
            top, left = (
                step * int(rng.integers(rest // step + 1))
                for rest in (height - rows, width - columns)
            )
            return Box(top, left, rows, columns)
    # The middle, as much of it as the ratios allow.
    ratio = min(max(width / height, aspect / config.max_stretch), aspect * config.max_stretch)
    rows = max(1, min(height, round(width / ratio)))
    columns = max(1, min(width, round(height * ratio)))
    return Box((height - rows) // 2, (width - columns) // 2, rows, columns)


def vary(pixels_HWK: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Mirrors an image and changes its colours, these in random order, as far as configured.

    Args:
        pixels_HWK: uint8 RGB.
        config: Its fields of flips and colours.
        rng: Drawn from for those that are on.

    Returns:
        uint8 of the same shape.
    """
    if config.flip and rng.random() < config.flip:
        pixels_HWK = pixels_HWK[:, ::-1]
    names = [name for name in (*_ENHANCE, "hue") if getattr(config, name)]
    if not names:
        return pixels_HWK
    image = Image.fromarray(np.ascontiguousarray(pixels_HWK))
    for name in rng.permutation(names):
        change = rng.uniform(-1, 1) * getattr(config, name)
        image = (
            _turned(image, change) if name == "hue" else _ENHANCE[name](image).enhance(1 + change)
        )
    return np.asarray(image)


def _turned(image: Image.Image, turn: float) -> Image.Image:
    """All hues turned by a fraction of their circle."""
    hue, saturation, value = image.convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + np.uint8(round(turn * 255) % 256))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
