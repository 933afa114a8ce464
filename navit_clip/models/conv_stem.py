"""A ResNet in front of the image tower, as the hybrids of ViT's paper have it (R50+ViT-B/16).

A convolution reaches past the borders of patches, so that it cannot be packed patch by patch:
images of one grid are put together from their patches and pass it as one batch. Each cell of its
output is the token of the patch at its place. No patch may be dropped before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from navit_clip.packed.grids import plan_grids
from navit_clip.packed.images import PackedImages

STRIDE, CHANNELS = 16, 1024


class ConvStem(nn.Module):
    """A ResNet-50 without its last stage, whose blocks the third has instead.

    timm's of its hybrid ViTs: weight-standardised convolutions and group norm as in BiT, so that
    each image is seen alone.

    Args:
        pixel_mean: Mean per channel on [0, 1], subtracted from pixels.
        pixel_std: Standard deviation per channel on [0, 1], which pixels are divided by.
    """

    def __init__(self, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        super().__init__()
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        self.resnet = _build_resnet()

    def forward(self, images: PackedImages, dtype: torch.dtype) -> Tensor:
        """[T, CHANNELS], a vector for each patch of STRIDE² pixels, zero at padding.

        Args:
            images: With all patches of every image.
            dtype: Of the tower's parameters.

        Raises:
            ValueError: If patches were dropped.
        """
        plan: Any = images.plan
        if plan is None:
            plan = plan_grids(images).to(images.patches.device)
        patches_TK = images.patches.index_select(0, plan.places)
        # Filled in there: what is made of a list is copied, and waited for.
        mean_311, std_311 = (
            torch.stack([patches_TK.new_full((1, 1), x, dtype=dtype) for x in values])
            for values in (self.pixel_mean, self.pixel_std)
        )
        cells = []
        sizes = [rows * columns * count for rows, columns, count in plan.grids]
        for (rows, columns, _), group in zip(plan.grids, patches_TK.split(sizes), strict=True):
            patches = group.view(-1, rows, columns, STRIDE, STRIDE, 3)
            pixels_E3HW = patches.permute(0, 5, 1, 3, 2, 4).reshape(
                -1, 3, rows * STRIDE, columns * STRIDE
            )
            cells_ECHW = self.resnet((pixels_E3HW.to(dtype) / 255 - mean_311) / std_311)
            cells.append(cells_ECHW.flatten(2).transpose(1, 2).flatten(0, 1))
        cells_TC = torch.cat(cells)
        everywhere_TC = cells_TC.new_zeros(len(images.patches), CHANNELS)
        return everywhere_TC.index_copy(0, plan.places, cells_TC)


@cache
def stem_flops() -> int:
    """Forward FLOPs for each patch, as PyTorch counts them; the same in images of any size."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        _build_resnet()(torch.empty(1, 3, STRIDE, STRIDE))
    return counter.get_total_flops()


def _build_resnet() -> nn.Module:
    # Here, for those who use no stem: timm's models take a second to import.
    from timm.layers import StdConv2dSame
    from timm.models.resnetv2 import ResNetV2

    # As timm's `vision_transformer_hybrid` builds it, which has no public function for it.
    return ResNetV2(
        layers=[3, 4, 9],
        num_classes=0,
        global_pool="",
        preact=False,
        stem_type="same",
        conv_layer=partial(StdConv2dSame, eps=1e-8),
    )
