"""Rotary position embedding (Su et al., arXiv 2104.09864): queries and keys turned by position.

Given to `navit_clip.models.transformer.Encoder` by towers whose positions are not added to the
tokens. Scores then depend on differences of positions alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """Rotations of a stream's tokens, the same in all blocks.

    Each pair of dimensions (i, i + D / 2) of a head is turned by an angle of its own.

    Attributes:
        cos_TD: [T, D / 2] or, with angles of their own for each head, [T, H, D / 2].
        sin_TD: Likewise.
    """

    cos_TD: Tensor
    sin_TD: Tensor

    @classmethod
    def from_angles(cls, angles_TD: Tensor) -> Rotary:
        """By angles in radians, [T, D / 2] or [T, H, D / 2]."""
        return cls(angles_TD.cos(), angles_TD.sin())

    def split(self, sizes: Sequence[int]) -> list[Rotary]:
        """Those of consecutive chunks of the stream, of so many tokens each."""
        cos, sin = (x.split(list(sizes)) for x in self)
        return list(map(Rotary, cos, sin))

    def rotate(self, x_THD: Tensor) -> Tensor:
        """Turns queries or keys [T, H, D], in the angles' precision if that is the higher one."""
        cos, sin = (x if x.ndim == 3 else x[:, None] for x in self)
        one, other = x_THD.chunk(2, dim=-1)
        return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)
