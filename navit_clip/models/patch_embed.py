"""Patches of pixels to tokens: the first layer of every tower that reads packed images.

The kernel has one size; for patches of another it is resized (FlexiViT, Beyer et al., arXiv
2212.08013), always from the one that is stored, to which the gradient goes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from navit_clip.models.linear import Linear
from navit_clip.models.weights import Constants

_CONSTANTS = ("pixel_scale", "pixel_shift")


class PatchEmbed(Linear, Constants):
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
        self.patch_size = patch_size
        self._pixel_mean, self._pixel_std = tuple(pixel_mean), tuple(pixel_std)
        self.make_constants()

    def constants(self) -> dict[str, Tensor]:
        """(x/255 - mean) / std as one multiply and one add over a whole patch."""
        std, mean = torch.tensor(self._pixel_std), torch.tensor(self._pixel_mean)
        pixels = self.patch_size**2
        values = (1 / (255 * std)).repeat(pixels), (-mean / std).repeat(pixels)
        return dict(zip(_CONSTANTS, values, strict=True))

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
        """uint8 [T, P·P·3], each patch row by row with channels last, of any P, to [T, C]."""
        scale, shift = self.pixel_scale, self.pixel_shift
        pixels = patches_TK.shape[1] // 3
        if resized := pixels != self.patch_size**2:
            scale, shift = scale[:3].repeat(pixels), shift[:3].repeat(pixels)
        pixels_TK = torch.addcmul(shift, patches_TK.to(scale.dtype), scale).to(self.weight.dtype)
        if not resized:
            return super().forward(pixels_TK)
        kernel_CK = resize_kernel(self.weight, self.patch_size, math.isqrt(pixels))
        return F.linear(pixels_TK, kernel_CK, self.bias)


def resize_kernel(kernel_CK: Tensor, from_size: int, to_size: int) -> Tensor:
    """A kernel for patches of another size: FlexiViT's PI-resize, w' = (Bᵀ)⁺ w.

    B resizes a patch of `from_size` to `to_size`. A patch that is enlarged by it becomes the same
    token as before; of a smaller one w' is the best approximation for random pixels.

    Args:
        kernel_CK: [C, from_size² · 3], pixels row by row with channels last.
        from_size: Side of its patches.
        to_size: Side of the patches wanted.

    Returns:
        [C, to_size² · 3] in the kernel's precision; multiplied in float32 at least.
    """
    dtype = torch.promote_types(kernel_CK.dtype, torch.float32)
    inverse_QP = _inverse(from_size, to_size, dtype, kernel_CK.device)
    kernel_CP3 = kernel_CK.to(dtype).unflatten(1, (-1, 3))
    with torch.autocast(kernel_CK.device.type, enabled=False):
        resized_CQ3 = torch.einsum("qp,cpk->cqk", inverse_QP, kernel_CP3)
    return resized_CQ3.flatten(1).to(kernel_CK.dtype)


@lru_cache(maxsize=32)
def _inverse(from_size: int, to_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(Bᵀ)⁺ [to_size², from_size²], computed in float64; B is bilinear without antialiasing."""
    # It is kept, also for trainings, which a tensor made in inference mode has no place in.
    with torch.inference_mode(False):
        pixels_P1HW = torch.eye(from_size**2, dtype=torch.float64).view(-1, 1, from_size, from_size)
        resized_P1HW = F.interpolate(pixels_P1HW, (to_size, to_size), mode="bilinear")
        return torch.linalg.pinv(resized_P1HW.flatten(1)).to(device, dtype)
