"""Patches of pixels to tokens: the first layer of every tower that reads packed images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from navit_clip.models.linear import Linear

_CONSTANTS = ("pixel_scale", "pixel_shift")


class PatchEmbed(Linear):
    """Normalises pixels, uint8 as the data pipeline left them, and maps each patch to a token.

    Args:
        patch_size: P, side of a patch in pixels.
        width: C, of a token.
        pixel_mean: Mean per channel on [0, 1], subtracted from pixels.
        pixel_std: Standard deviation per channel on [0, 1], which pixels are divided by.
        bias: Whether there is a bias.
    """

    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(
        self,
        patch_size: int,
        width: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        *,
        bias: bool,
    ) -> None:
        pixels = patch_size**2
        super().__init__(3 * pixels, width, bias=bias)
        std, mean = torch.tensor(pixel_std), torch.tensor(pixel_mean)
        # (x/255 - mean) / std as one multiply and one add over a whole patch.
        self.register_buffer("pixel_scale", (1 / (255 * std)).repeat(pixels), persistent=False)
        self.register_buffer("pixel_shift", (-mean / std).repeat(pixels), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PatchEmbed:
        """Moves and converts the module; the constants stay in float32 at least."""
        before = {name: getattr(self, name) for name in _CONSTANTS}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = getattr(self, name)
            # Rounded to bfloat16, the scale would make all pixels 0.4% larger.
            if moved.dtype.itemsize < 4:
                setattr(self, name, value.to(moved.device, torch.float32))
        return self

    def forward(self, patches_TK: Tensor) -> Tensor:
        """uint8 [T, P·P·3], each patch row by row with channels last, to [T, C]."""
        pixels_TK = patches_TK.to(self.pixel_scale.dtype)
        pixels_TK = torch.addcmul(self.pixel_shift, pixels_TK, self.pixel_scale)
        return super().forward(pixels_TK.to(self.weight.dtype))
