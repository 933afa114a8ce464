"""Position embeddings of patches at any resolution and aspect ratio.

Added to the embedded patches at the entry of the image tower. All kinds of NaViT's ablation
(positional embeddings): factorised over rows and columns, each absolute or fractional, from a
learned table, sinusoids or learned Fourier features, summed, multiplied or stacked; and the two it
compares with, Pix2Struct's learned 2D table and ViT's learned 1D table interpolated in 2D, with
the ways in which released models resize theirs. Every kind is a gather by coordinate over all
patches at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from navit_clip.configs import check_choices
from navit_clip.models.interpolate import Interpolation, exact_dtype, resized
from navit_clip.models.weights import Constants

ANY_SIDE = 1 << 20  # the limit of positions relative to the side, which have none
TABLE_STD = 0.02  # as ViT and big_vision initialise learned positions


@dataclass(frozen=True)
class PositionConfig:
    """Which position embedding the image tower uses.

    Attributes:
        kind: ``factorised`` over rows and columns; ``learned_2d``, one vector per (row, column)
            as Pix2Struct; ``learned_1d``, a square table interpolated to each image's grid as ViT;
            or ``none``, for a tower that has rotary positions alone.
        coordinates: With ``factorised``: ``absolute`` patch index; ``fractional``, its fraction of
            the side; or ``interpolated``, each axis's table resized to the side, as in NaFlex.
        embedding: With ``factorised``: ``learned`` table, ``sinusoidal``, or learned ``fourier``.
        combine: With ``factorised``: rows and columns are summed, multiplied (``product``), or
            stacked, each with half the width.
        table_side: Rows of the table of one axis, or side of the square table, in patches. Absolute
            positions know no longer side (the paper's maxLen); tables that are resized to an
            image's grid know any.
        interpolation: How tables of ``learned_1d`` and ``interpolated`` are resized: ``bilinear``
            (SigLIP 2 NaFlex) or ``bicubic`` (open_clip, timm), as `F.interpolate` has them.
        antialias: When resizing, average more of the table where a side is shorter than it, as
            open_clip, timm and SigLIP 2 do.
        keep_aspect: Resize to the square of an image's longer side, of which the image takes the
            upper left part.

    Raises:
        ValueError: If `table_side` is below 2, a choice is unknown, or Fourier features, which have
            no table, are to be ``interpolated``.
    """

    kind: Literal["factorised", "learned_2d", "learned_1d", "none"] = "factorised"
    coordinates: Literal["absolute", "fractional", "interpolated"] = "absolute"
    embedding: Literal["learned", "sinusoidal", "fourier"] = "learned"
    combine: Literal["sum", "product", "stack"] = "sum"
    table_side: int = 64
    interpolation: Interpolation = "bilinear"
    antialias: bool = False
    keep_aspect: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        if self.table_side < 2:
            raise ValueError(f"table_side must be at least 2 patches, got {self.table_side}")
        if (
            self.kind == "factorised"
            and self.coordinates == "interpolated"
            and self.embedding == "fourier"
        ):
            raise ValueError(
                "coordinates: interpolated needs a table to resize, "
                "embedding: learned or sinusoidal, got fourier"
            )

    @property
    def width_divisor(self) -> int:
        """What the width is a multiple of: rows beside columns, sines beside cosines."""
        if self.kind != "factorised":
            return 1
        return (2 if self.combine == "stack" else 1) * (2 if self.embedding == "fourier" else 1)

    @property
    def relative(self) -> bool:
        """Whether positions are places in the image, not counted in patches."""
        factorised = self.kind == "factorised"
        return self.coordinates != "absolute" if factorised else self.kind != "learned_2d"

    @property
    def max_grid_side(self) -> int:
        """Most rows or columns of patches that have an embedding."""
        return ANY_SIDE if self.relative else self.table_side


def build_position(config: PositionConfig, width: int) -> nn.Module | None:
    """The module for `config`, if any: (coords [T, 2], sides [T, 2]) to embeddings [T, width]."""
    if config.kind == "none":
        return None
    return (Factorised if config.kind == "factorised" else SquareTable)(config, width)


class Factorised(nn.Module):
    """φ_y(row) and φ_x(column), combined (NaViT, factorised positional embeddings)."""

    def __init__(self, config: PositionConfig, width: int) -> None:
        super().__init__()
        self.combine = config.combine
        self.keep_aspect = config.coordinates == "interpolated" and config.keep_aspect
        axis_width = width // 2 if config.combine == "stack" else width
        axis = FourierAxis if config.embedding == "fourier" else TableAxis
        self.row, self.column = axis(config, axis_width), axis(config, axis_width)

    def forward(self, coords_T2: Tensor, sides_T2: Tensor) -> Tensor:
        """Integer [T, 2] row and column of each patch, and sides of its image's grid, to [T, C]."""
        if self.keep_aspect:
            sides_T2 = longer_sides(sides_T2)
        row = self.row(coords_T2[:, 0], sides_T2[:, 0])
        column = self.column(coords_T2[:, 1], sides_T2[:, 1])
        if self.combine == "sum":
            return row + column
        if self.combine == "product":
            return row * column
        return torch.cat([row, column], dim=-1)


def sinusoids(length: int, width: int) -> Tensor:
    """[length, width] sines and cosines at geometric wavelengths from 2π to 20,000π."""
    half = (width + 1) // 2
    frequency = 10_000.0 ** (-torch.arange(half) / half)
    angle = torch.arange(length)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :width]


def longer_sides(sides_T2: Tensor) -> Tensor:
    """The longer side of each patch's grid, on both axes."""
    return sides_T2.amax(1, keepdim=True).expand(-1, 2)


class TableAxis(Constants):
    """One axis from a table: by index, by linear interpolation if fractional, or resized."""

    table: Tensor

    def __init__(self, config: PositionConfig, width: int) -> None:
        super().__init__()
        self.config, self._width = config, width
        self.make_constants()
        if config.embedding != "sinusoidal":
            self.table = nn.Parameter(torch.empty(config.table_side, width))
            # A product of two small tables would start near zero and hardly move: start near one.
            mean = 1.0 if config.combine == "product" else 0.0
            nn.init.normal_(self.table, mean, TABLE_STD)

    def constants(self) -> dict[str, Tensor]:
        """The table, unless it is learned."""
        if self.config.embedding != "sinusoidal":
            return {}
        return {"table": sinusoids(self.config.table_side, self._width)}

    def forward(self, index_T: Tensor, side_T: Tensor) -> Tensor:
        """[T] integers to [T, C]."""
        config = self.config
        if config.coordinates == "absolute":
            return F.embedding(index_T, self.table)
        if config.coordinates == "interpolated":
            coords_T1, sides_T1 = index_T[:, None], side_T[:, None]
            return resized(
                self.table, coords_T1, sides_T1, config.interpolation, antialias=config.antialias
            )
        position_T = index_T.to(exact_dtype(self.table.dtype)) / side_T * (len(self.table) - 1)
        below = position_T.long()
        weight = (position_T - below)[:, None].to(self.table.dtype)
        # The highest fraction is below one, so the upper neighbour exists.
        return torch.lerp(
            F.embedding(below, self.table), F.embedding(below + 1, self.table), weight
        )


class FourierAxis(nn.Module):
    """Learned Fourier features: a linear map of the coordinate, then sines and cosines stacked.

    Absolute coordinates are divided by `table_side`, so that both kinds lie in [0, 1). Frequencies
    start as a normal with standard deviation table_side / 8 turns (our choice, the paper states
    none): neighbouring patches differ, and the far ends do not alias.
    """

    def __init__(self, config: PositionConfig, width: int) -> None:
        super().__init__()
        self.table_side = None if config.coordinates == "fractional" else config.table_side
        std = config.table_side / 8
        self.frequency = nn.Parameter(torch.randn(width // 2) * std)

    def forward(self, index_T: Tensor, side_T: Tensor) -> Tensor:
        """[T] integers to [T, C]."""
        side = side_T if self.table_side is None else self.table_side
        fraction_T = index_T.to(exact_dtype(self.frequency.dtype)) / side
        angle = 2 * math.pi * fraction_T[:, None] * self.frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.frequency.dtype)


class SquareTable(nn.Module):
    """One learned vector per (row, column): as it is (Pix2Struct), or resized to a grid (ViT)."""

    def __init__(self, config: PositionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Parameter(torch.empty(config.table_side**2, width))
        nn.init.normal_(self.table, std=TABLE_STD)

    def forward(self, coords_T2: Tensor, sides_T2: Tensor) -> Tensor:
        """[T, 2] integers to [T, C]."""
        config = self.config
        if config.kind == "learned_2d":
            return F.embedding(coords_T2[:, 0] * config.table_side + coords_T2[:, 1], self.table)
        if config.keep_aspect:
            sides_T2 = longer_sides(sides_T2)
        return resized(
            self.table, coords_T2, sides_T2, config.interpolation, antialias=config.antialias
        )
