"""Position embeddings of patches at any resolution and aspect ratio.

Added to the embedded patches at the entry of the image tower. All kinds of NaViT's ablation
(positional embeddings): factorised over rows and columns, each absolute or fractional, from a
learned table, sinusoids or learned Fourier features, summed, multiplied or stacked; and the two it
compares with, Pix2Struct's learned 2D table and ViT's learned 1D table interpolated in 2D. Every
kind is a gather by coordinate over all patches at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from navit_clip.choices import check_choices

ANY_SIDE = 1 << 20  # of positions relative to the side, which know every length
TABLE_STD = 0.02  # as ViT and big_vision initialise learned positions


@dataclass(frozen=True)
class PositionConfig:
    """Which position embedding the image tower uses.

    Attributes:
        kind: ``factorised`` over rows and columns; ``learned_2d``, one vector per (row, column)
            as Pix2Struct; ``learned_1d``, a square table interpolated to each image's grid as ViT.
        coordinates: Of ``factorised``: ``absolute`` patch index, or ``fractional`` of the side.
        embedding: Of ``factorised``: ``learned`` table, ``sinusoidal``, or learned ``fourier``.
        combine: Of ``factorised``: rows and columns are summed, multiplied (``product``), or
            stacked, each with half the width.
        max_side: Longest side in patches (maxLen); for ``learned_1d`` the side of its square.

    Raises:
        ValueError: If `max_side` is below 2 or a choice is unknown.
    """

    kind: Literal["factorised", "learned_2d", "learned_1d"] = "factorised"
    coordinates: Literal["absolute", "fractional"] = "absolute"
    embedding: Literal["learned", "sinusoidal", "fourier"] = "learned"
    combine: Literal["sum", "product", "stack"] = "sum"
    max_side: int = 64

    def __post_init__(self) -> None:
        check_choices(self)
        if self.max_side < 2:
            raise ValueError(f"max_side must be at least 2 patches, got {self.max_side}")

    @property
    def max_grid_side(self) -> int:
        """Most rows or columns of patches that have an embedding."""
        relative = self.kind == "learned_1d" or (
            self.kind == "factorised" and self.coordinates == "fractional"
        )
        return ANY_SIDE if relative else self.max_side


def build_position(config: PositionConfig, width: int) -> nn.Module:
    """The module for `config`: (coords [T, 2], sides [T, 2]) to embeddings [T, width]."""
    if config.kind == "learned_2d":
        return Learned2D(config.max_side, width)
    if config.kind == "learned_1d":
        return Interpolated1D(config.max_side, width)
    return Factorised(config, width)


class Factorised(nn.Module):
    """φ_y(row) and φ_x(column), combined (NaViT, factorised positional embeddings)."""

    def __init__(self, config: PositionConfig, width: int) -> None:
        super().__init__()
        if config.combine == "stack" and width % 2:
            raise ValueError(f"width must be even to stack positions, got {width}")
        self.combine = config.combine
        axis_width = width // 2 if config.combine == "stack" else width
        self.row = _axis(config, axis_width)
        self.column = _axis(config, axis_width)

    def forward(self, coords_T2: Tensor, sides_T2: Tensor) -> Tensor:
        """Embeds patch coordinates.

        Args:
            coords_T2: Integer [T, 2] row and column of each patch.
            sides_T2: Integer [T, 2] rows and columns of its image's grid.

        Returns:
            [T, C] float.
        """
        row = self.row(coords_T2[:, 0], sides_T2[:, 0])
        column = self.column(coords_T2[:, 1], sides_T2[:, 1])
        if self.combine == "sum":
            return row + column
        if self.combine == "product":
            return row * column
        return torch.cat([row, column], dim=-1)


def _axis(config: PositionConfig, width: int) -> nn.Module:
    if config.embedding == "fourier":
        return FourierAxis(config, width)
    if config.embedding == "sinusoidal":
        return TableAxis(config, sinusoids(config.max_side, width), learned=False)
    table = torch.empty(config.max_side, width)
    if config.combine == "product":
        # A product of two small tables would start near zero and hardly move: start near one.
        nn.init.normal_(table, mean=1.0, std=TABLE_STD)
    else:
        nn.init.normal_(table, std=TABLE_STD)
    return TableAxis(config, table, learned=True)


def sinusoids(length: int, width: int) -> Tensor:
    """[length, width] sines and cosines at geometric wavelengths from 2π to 20,000π."""
    half = (width + 1) // 2
    frequency = 10_000.0 ** (-torch.arange(half) / half)
    angle = torch.arange(length)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :width]


def _exact(index: Tensor, like: Tensor) -> Tensor:
    """Integers as floats of `like`'s precision, float32 at least.

    bfloat16 rounds index 299 up to a side of 300, and the upper neighbour is past the table.
    """
    return index.to(torch.promote_types(like.dtype, torch.float32))


class TableAxis(nn.Module):
    """One axis from a table: by index if absolute, by linear interpolation if fractional."""

    def __init__(self, config: PositionConfig, table: Tensor, *, learned: bool) -> None:
        super().__init__()
        self.fractional = config.coordinates == "fractional"
        if learned:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table, persistent=False)

    def forward(self, index_T: Tensor, side_T: Tensor) -> Tensor:
        """[T] integers to [T, C]."""
        if not self.fractional:
            return F.embedding(index_T, self.table)
        position_T = _exact(index_T, self.table) / side_T * (len(self.table) - 1)
        below = position_T.long()
        weight = (position_T - below)[:, None].to(self.table.dtype)
        # The highest fraction is below one, so the upper neighbour exists.
        return torch.lerp(
            F.embedding(below, self.table), F.embedding(below + 1, self.table), weight
        )


class FourierAxis(nn.Module):
    """Learned Fourier features: a linear map of the coordinate, then sines and cosines stacked.

    Absolute coordinates are divided by `max_side`, so that both kinds lie in [0, 1). Frequencies
    start as a normal with standard deviation max_side / 8 turns (our choice, the paper states
    none): neighbouring patches differ, and the far ends do not alias.
    """

    def __init__(self, config: PositionConfig, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width must be even for fourier positions, got {width}")
        self.max_side = None if config.coordinates == "fractional" else config.max_side
        std = config.max_side / 8
        self.frequency = nn.Parameter(torch.randn(width // 2) * std)

    def forward(self, index_T: Tensor, side_T: Tensor) -> Tensor:
        """[T] integers to [T, C]."""
        side = side_T if self.max_side is None else self.max_side
        fraction_T = _exact(index_T, self.frequency) / side
        angle = 2 * math.pi * fraction_T[:, None] * self.frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.frequency.dtype)


class Learned2D(nn.Module):
    """One learned vector per (row, column), as Pix2Struct."""

    def __init__(self, max_side: int, width: int) -> None:
        super().__init__()
        self.max_side = max_side
        self.table = nn.Parameter(torch.empty(max_side * max_side, width))
        nn.init.normal_(self.table, std=TABLE_STD)

    def forward(self, coords_T2: Tensor, sides_T2: Tensor) -> Tensor:
        """[T, 2] integers to [T, C]."""
        return F.embedding(coords_T2[:, 0] * self.max_side + coords_T2[:, 1], self.table)


class Interpolated1D(nn.Module):
    """ViT's learned table of a square grid, interpolated bilinearly to each image's grid.

    Agrees with `F.interpolate(mode="bilinear", align_corners=False)` of the square table, but is a
    weighted gather over all patches, whatever image they belong to.
    """

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.table = nn.Parameter(torch.empty(side * side, width))
        nn.init.normal_(self.table, std=TABLE_STD)

    def forward(self, coords_T2: Tensor, sides_T2: Tensor) -> Tensor:
        """[T, 2] integers to [T, C]."""
        centre_T2 = (_exact(coords_T2, self.table) + 0.5) / sides_T2
        position = (centre_T2 * self.side - 0.5).clamp(0, self.side - 1)
        below = position.long()
        above = (below + 1).clamp(max=self.side - 1)
        weight_above = (position - below).to(self.table.dtype)
        result: Tensor | int = 0
        for row, row_weight in ((below, 1 - weight_above), (above, weight_above)):
            for column, column_weight in ((below, 1 - weight_above), (above, weight_above)):
                index = row[:, 0] * self.side + column[:, 1]
                weight = row_weight[:, 0] * column_weight[:, 1]
                result = result + F.embedding(index, self.table) * weight[:, None]
        assert isinstance(result, Tensor)
        return result
