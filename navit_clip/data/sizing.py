"""Which patch grid an image gets.

Between header and pixels: samples a target resolution per image (NaViT, resolution sampling), then
picks the grid of whole patches that keeps the aspect ratio best within the token limit.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from navit_clip.data.image_header import MAX_PIXELS, check_max_pixels
from navit_clip.data.seeding import draw_weighted


@dataclass(frozen=True)
class CurriculumConfig:
    """How the largest images grow, for a model that has only seen small ones.

    Attributes:
        images: Images over which they grow, linearly; 0 has them at full size at once.
        start_side: First value of `ResolutionConfig.max_side`, in pixels; null leaves it alone.
        start_tokens: First value of `ResolutionConfig.max_tokens`; null leaves it alone.

    Raises:
        ValueError: If a field is out of range or without effect.
    """

    images: int = 0
    start_side: int | None = None
    start_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.images < 0:
            raise ValueError(f"images must not be negative, got {self.images}")
        grows = self.start_side is not None or self.start_tokens is not None
        if grows != (self.images > 0):
            raise ValueError(
                "images and start_side or start_tokens go together, got "
                f"images={self.images} start_side={self.start_side} "
                f"start_tokens={self.start_tokens}"
            )


@dataclass(frozen=True)
class ResolutionConfig:
    """How large an image becomes. "Side R" means an area of R² at the image's aspect ratio.

    Attributes:
        mode: ``sampled`` per image from a distribution; ``native``, the image's own size, up to
            `max_tokens`; ``square``, every image squashed to max_side × max_side as plain ViTs do.
        min_side: Smallest side in pixels (``sampled``).
        max_side: Largest side in pixels (``sampled``), or the side (``square``).
        distribution: u on [-1, 1], mapped linearly to [min_side, max_side]: ``uniform``, or
            ``truncated_normal``.
        mean: Of the truncated normal; below 0 favours small images. The paper's best is -0.5.
        std: Of the truncated normal.
        by: Whether u maps linearly to the ``side`` or to the ``area``.
        max_tokens: Most patches of one image, before any are dropped.
        upscale: Allow images to be enlarged past their native size.
        patch_sizes: Sides of patches in pixels and how often a sample is cut into such patches,
            {8: 1, 16: 2, 32: 1} say (FlexiViT); the model's kernel is resized to each. Samples of
            different sizes share no batch. Empty cuts all by the model's own size.
        max_pixels: Images of more pixels are skipped, as their header tells, and so are TIFFs whose
            tiles hold more together; one takes up to 27 bytes of memory per pixel. Formats that
            take more have a cap of their own: 16 million for JPEG 2000, 2 million for QOI, text PNM
            and PNM whose maxval is not 255.
        curriculum: How the limits of `max_side` and `max_tokens` are reached.
    """

    mode: Literal["sampled", "native", "square"] = "sampled"
    min_side: int = 64
    max_side: int = 256
    distribution: Literal["uniform", "truncated_normal"] = "uniform"
    mean: float = -0.5
    std: float = 1.0
    by: Literal["side", "area"] = "side"
    max_tokens: int = 1024
    upscale: bool = False
    patch_sizes: dict[int, float] = field(default_factory=dict)
    max_pixels: int = MAX_PIXELS
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.min_side <= self.max_side:
            raise ValueError(
                "min_side must be at least 1 and at most max_side, got "
                f"min_side={self.min_side} max_side={self.max_side}"
            )
        if self.std <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if not -1 <= self.mean <= 1:
            raise ValueError(f"mean must lie in [-1, 1], got {self.mean}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        for size, weight in self.patch_sizes.items():
            if size < 1 or not 0 < weight < math.inf:
                raise ValueError(
                    "patch_sizes must be sizes of at least 1 with positive weights, got "
                    f"{size}: {weight}"
                )
            if self.mode == "square" and self.max_side % size:
                raise ValueError(f"patch_sizes: {size} does not divide max_side={self.max_side}")
            if self.mode == "sampled" and size > self.min_side:
                raise ValueError(f"patch_sizes: {size} is past min_side={self.min_side}")
        check_max_pixels(self.max_pixels)
        side, tokens = self.curriculum.start_side, self.curriculum.start_tokens
        if side is not None:
            if self.mode != "sampled":
                raise ValueError(f"curriculum.start_side needs mode: sampled, got {self.mode}")
            if not self.min_side <= side <= self.max_side:
                raise ValueError(
                    f"curriculum.start_side must lie in [min_side, max_side] = [{self.min_side}, "
                    f"{self.max_side}], got {side}"
                )
        if tokens is not None:
            if self.mode == "square":
                raise ValueError("curriculum.start_tokens does nothing for mode: square")
            if not 1 <= tokens <= self.max_tokens:
                raise ValueError(
                    f"curriculum.start_tokens must lie in [1, max_tokens] = [1, {self.max_tokens}],"
                    f" got {tokens}"
                )


def ramp(images_seen: float, images: int) -> float:
    """Value of a linear ramp from 0 to 1 over so many images; 1 if there are none."""
    return min(1.0, images_seen / images) if images else 1.0


def limits(config: ResolutionConfig, images_seen: float) -> tuple[float, int]:
    """Largest side and most tokens of an image after so many images; never past the full ones."""
    curriculum = config.curriculum
    done = ramp(images_seen, curriculum.images)
    side, tokens = float(config.max_side), config.max_tokens
    if curriculum.start_side is not None:
        side = curriculum.start_side + done * (config.max_side - curriculum.start_side)
    if curriculum.start_tokens is not None:
        grown = done * (config.max_tokens - curriculum.start_tokens)
        tokens = curriculum.start_tokens + round(grown)
    return side, tokens


def default_max_tokens(config: ResolutionConfig, patch_size: int) -> int:
    """Patches of the largest images of a training run, a model's token limit at inference."""
    if config.mode == "native":
        return config.max_tokens
    return min(config.max_tokens, max(1, config.max_side // patch_size) ** 2)


def sample_patch_size(config: ResolutionConfig, own_size: int, rng: np.random.Generator) -> int:
    """Draws the side of a sample's patches; nothing is drawn where all are of `own_size`."""
    if not config.patch_sizes:
        return own_size
    return list(config.patch_sizes)[draw_weighted(list(config.patch_sizes.values()), rng)]


def sample_side(config: ResolutionConfig, max_side: float, rng: np.random.Generator) -> float:
    """Draws a side in pixels up to `max_side`, uniform or normal, linear in side or area."""
    if config.distribution == "uniform":
        u = rng.uniform(-1, 1)
    else:
        u = truncated_normal(rng, config.mean, config.std, -1, 1)
    t = (u + 1) / 2
    if config.by == "side":
        return config.min_side + t * (max_side - config.min_side)
    return math.sqrt(config.min_side**2 + t * (max_side**2 - config.min_side**2))


def truncated_normal(
    rng: np.random.Generator, mean: float, std: float, low: float, high: float
) -> float:
    """A normal draw, rejected until it lies in [low, high], which must hold some of its mass."""
    while True:
        value = rng.normal(mean, std)
        if low <= value <= high:
            return value


def sample_grid(
    config: ResolutionConfig,
    height: int,
    width: int,
    patch_size: int,
    max_grid_side: int,
    rng: np.random.Generator,
    images_seen: float = math.inf,
) -> tuple[int, int]:
    """Rows and columns of patches for an image in training; measures as in `fit_grid`.

    The curriculum goes by `images_seen`, those that all readers together have taken so far; by
    default it is over.
    """
    if config.mode == "square":
        side = max(1, config.max_side // patch_size)
        return side, side
    max_side, max_tokens = limits(config, images_seen)
    side_px = sample_side(config, max_side, rng) if config.mode == "sampled" else math.inf
    upscale = config.upscale
    return fit_grid(height, width, patch_size, max_tokens, max_grid_side, side_px, upscale=upscale)


def fit_grid(
    height: int,
    width: int,
    patch_size: int,
    max_tokens: int,
    max_grid_side: int,
    side: float = math.inf,
    *,
    upscale: bool = False,
) -> tuple[int, int]:
    """The best grid of whole patches for an image, of at most `max_tokens`.

    Among the grids around the exact size, the one that distorts the aspect ratio and the area
    least. Rounding up past the limit, as 20×29 = 580 for 576, cannot happen.

    Args:
        height: Native rows of pixels.
        width: Native columns of pixels.
        patch_size: P.
        max_tokens: Most patches.
        max_grid_side: Most rows or columns that the model's positions know.
        side: Wanted √area in pixels; infinite for native.
        upscale: Allow more pixels than the image has; an image smaller than one patch is always
            enlarged to one. Only meaningful with a finite `side`.

    Returns:
        Rows and columns.
    """
    scale = side / math.sqrt(height * width)
    if not upscale or not math.isfinite(scale):
        scale = min(scale, 1.0)
    # An image of a few pixels' height still becomes one whole row of patches.
    rows = max(height * scale / patch_size, 1.0)
    columns = max(width * scale / patch_size, 1.0)
    shrink = max(
        math.sqrt(rows * columns / max_tokens), rows / max_grid_side, columns / max_grid_side, 1.0
    )
    rows, columns = max(rows / shrink, 1.0), max(columns / shrink, 1.0)
    # A strip one patch wide cannot become thinner, only shorter.
    rows, columns = min(rows, max_tokens), min(columns, max_tokens)
    most_rows = most_columns = max_grid_side
    if not upscale:
        most_rows = min(most_rows, max(1, height // patch_size))
        most_columns = min(most_columns, max(1, width // patch_size))

    aspect, area = math.log(rows / columns), math.log(rows * columns)

    def distortion(grid: tuple[int, int]) -> float:
        row, column = grid
        return abs(math.log(row / column) - aspect) + abs(math.log(row * column) - area)

    near_rows = (math.floor(rows), math.ceil(rows))
    near_columns = (math.floor(columns), math.ceil(columns))
    # Long strips: 1.9×20.1 in 39 tokens is better as 2×19, the most that go with 2 rows, than 1×20.
    grids = [
        *itertools.product(near_rows, near_columns),
        *((row, max_tokens // row) for row in near_rows),
        *((max_tokens // column, column) for column in near_columns),
    ]
    candidates = [
        (row, column)
        for row, column in grids
        if 1 <= row <= most_rows and 1 <= column <= most_columns and row * column <= max_tokens
    ]
    # Rounding down always fits: rows and columns are at least 1 and within every limit.
    return min(candidates, key=distortion)
