"""Rotary position embedding (Su et al., arXiv 2104.09864): queries and keys turned by position.

A tower hands its encoder one `Rotary` per block; each block turns its queries and keys by it, after
their norm, so that scores depend on differences of positions alone. Images have two axes, axial or
mixed (RoPE-ViT, Heo et al., arXiv 2403.13298), text has one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from navit_clip.configs import check_choices
from navit_clip.models.position import longer_sides

if TYPE_CHECKING:
    from navit_clip.models.transformer import EncoderConfig


@dataclass(frozen=True)
class RotaryConfig:
    """How queries and keys are turned by position, beside or without positions added to tokens.

    Attributes:
        kind: ``none``; ``axial``: half of the pairs of a head's dimensions turn by row, half by
            column, at fixed speeds (in text all of them by the token's index); ``mixed``: each pair
            turns by both, at speeds learned in each block and head (RoPE-ViT).
        coordinates: ``integer``, counted in patches of the tower's `patch_size`; or ``normalised``,
            patch centres on [-1, 1] in whole turns, as in DINOv3.
        keep_aspect: Normalise both axes by the longer side, so that a step is as long on either.
        theta: Speeds fall geometrically from 1 to about 1 / theta. RoPE-ViT has 100, with ``mixed``
            10; vision-language models have 10,000.

    Raises:
        ValueError: If a choice is unknown, or `theta` is not above 1.
    """

    kind: Literal["none", "axial", "mixed"] = "none"
    coordinates: Literal["integer", "normalised"] = "integer"
    keep_aspect: bool = False
    theta: float = 100.0

    def __post_init__(self) -> None:
        check_choices(self)
        if not 1 < self.theta < math.inf:
            raise ValueError(f"theta must be above 1, got {self.theta}")

    def check_width(self, encoder: EncoderConfig, axes: int) -> None:
        """Refuses heads whose dimensions cannot be distributed over the axes in pairs.

        Raises:
            ValueError: Naming the fields.
        """
        if self.kind != "none" and encoder.head_width % (2 * axes):
            raise ValueError(
                f"rotary.kind: {self.kind} needs heads of a width divisible by {2 * axes}, got "
                f"encoder.width={encoder.width} / encoder.heads={encoder.heads} = "
                f"{encoder.head_width}"
            )

    def positions(
        self, coords_T2: Tensor, sides_T2: Tensor, scale: float, dtype: torch.dtype
    ) -> Tensor:
        """Where patches are, [T, 2] in the unit that the speeds are per.

        Args:
            coords_T2: Integer row and column of each patch.
            sides_T2: Sides of its image's grid.
            scale: Side of a patch over the tower's `patch_size`, which integer coordinates count.
            dtype: Of the result.
        """
        centres_T2 = coords_T2.to(dtype) + 0.5
        if self.coordinates == "integer":
            return centres_T2 * scale - 0.5
        if self.keep_aspect:
            sides_T2 = longer_sides(sides_T2)
        return 2 * math.pi * (2 * centres_T2 / sides_T2 - 1)


class Rotary(NamedTuple):
    """Rotations of a stream's tokens in one block.

    Dimensions i and i + D / 2 of a head are turned by an angle, the sum of position times speed
    over the axes.

    Attributes:
        positions_TA: [T, A] on each axis, float32 at least; a token at 0 is not turned.
        speeds_AHD: [A, H, D / 2] radians per unit of position; H is 1 if they are the same in all
            heads.
    """

    positions_TA: Tensor
    speeds_AHD: Tensor

    def split(self, sizes: Sequence[int]) -> list[Rotary]:
        """Those of consecutive chunks of the stream, of so many tokens each."""
        return [Rotary(part, self.speeds_AHD) for part in self.positions_TA.split(list(sizes))]

    def rotate(self, *inputs_THD: Tensor) -> tuple[Tensor, ...]:
        """Turns queries and keys [T, H, D], in the angles' precision if that is the higher one."""
        # Not a matrix product, which autocast would round to bfloat16.
        angles_THD = sum(
            position_T[:, None, None] * speed_HD
            for position_T, speed_HD in zip(
                self.positions_TA.unbind(1), self.speeds_AHD, strict=True
            )
        )
        assert isinstance(angles_THD, Tensor)
        cos, sin = angles_THD.cos(), angles_THD.sin()
        halves = (x_THD.chunk(2, dim=-1) for x_THD in inputs_THD)
        return tuple(
            torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)
            for one, other in halves
        )


class RotarySpeeds(nn.Module):
    """How fast each pair of dimensions turns on each axis, in every block of an encoder.

    Args:
        config: Of kind axial or mixed.
        encoder: Whose queries and keys are turned.
        axes: A; 2 if mixed.
    """

    def __init__(self, config: RotaryConfig, encoder: EncoderConfig, axes: int) -> None:
        super().__init__()
        self.theta, self.axes, self.depth = config.theta, axes, encoder.depth
        self.pairs = encoder.head_width // 2
        self.learned: nn.Parameter | None = None
        if config.kind == "mixed":
            # As RoPE-ViT: two perpendicular directions in each head, at a random angle.
            angle_LH1 = 2 * math.pi * torch.rand(encoder.depth, encoder.heads, 1)
            angle_LH2 = torch.cat([angle_LH1, angle_LH1 + math.pi / 2], -1)
            angle_LHD = angle_LH2.repeat_interleave(self.pairs // 2, -1)
            speeds_D = self._geometric(angle_LHD.dtype, angle_LHD.device).repeat(2)
            speeds_LAHD = speeds_D * torch.stack([angle_LHD.cos(), angle_LHD.sin()], 1)
            self.learned = nn.Parameter(speeds_LAHD.flatten())  # a vector: no weight decay

    def _geometric(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[D / 2A] speeds of the pairs of one axis."""
        count = self.pairs // self.axes
        return self.theta ** (-torch.arange(count, dtype=dtype, device=device) / count)

    def forward(self, positions_TA: Tensor) -> list[Rotary]:
        """The rotations of each block."""
        if self.learned is not None:
            speeds_LAHD = self.learned.view(self.depth, self.axes, -1, self.pairs)
            return [Rotary(positions_TA, speeds_AHD) for speeds_AHD in speeds_LAHD.unbind()]
        speeds_1D = self._geometric(positions_TA.dtype, positions_TA.device)[None]
        speeds_AHD = torch.block_diag(*[speeds_1D] * self.axes)[:, None]
        return [Rotary(positions_TA, speeds_AHD)] * self.depth


def build_rotary(config: RotaryConfig, encoder: EncoderConfig, axes: int) -> RotarySpeeds | None:
    """The module for `config`, if any: positions [T, A] to the `Rotary` of each block."""
    return None if config.kind == "none" else RotarySpeeds(config, encoder, axes)
