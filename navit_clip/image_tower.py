"""The packed NaViT image tower: patches of many images in, one vector per image out.

Takes `PackedImages` as the data pipeline left them (uint8), normalises pixels on the device,
embeds patches, adds positions by coordinate, encodes the stream and pools each image.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from navit_clip.choices import check_choices
from navit_clip.packing import PackedImages, Segments
from navit_clip.pooling import Pooling, build_pooling
from navit_clip.position import PositionConfig, build_position
from navit_clip.transformer import Encoder, EncoderConfig, linear


@dataclass(frozen=True)
class ImageTowerConfig:
    """Shape of the image tower.

    Attributes:
        patch_size: P, side of a patch in pixels.
        encoder: The transformer over the patches.
        position: How a patch knows where it lies.
        pooling: How one vector is made of an image's tokens; ``cls`` puts a learned class token
            before each image's patches.
        pixel_mean: Mean per channel on [0, 1], subtracted from pixels.
        pixel_std: Standard deviation per channel on [0, 1], which pixels are divided by.

    Raises:
        ValueError: If `patch_size` is below 1, a `pixel_std` is not positive, the encoder is
            causal, or `pooling` is unknown.
    """

    patch_size: int = 16
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    position: PositionConfig = field(default_factory=PositionConfig)
    pooling: Pooling = "map"
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {self.patch_size}")
        if min(self.pixel_std) <= 0:
            raise ValueError(f"pixel_std must be positive, got {self.pixel_std}")
        if self.encoder.causal:
            raise ValueError("encoder.causal must be false for images: patches have no order")


class ImageTower(nn.Module):
    """Encodes packed images to one vector of the encoder's width each."""

    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        self.config = config
        width, pixels = config.encoder.width, config.patch_size**2
        std, mean = torch.tensor(config.pixel_std), torch.tensor(config.pixel_mean)
        # (x/255 - mean) / std as one multiply and one add over a whole patch.
        self.register_buffer("pixel_scale", (1 / (255 * std)).repeat(pixels), persistent=False)
        self.register_buffer("pixel_shift", (-mean / std).repeat(pixels), persistent=False)
        self.embed = linear(3 * pixels, width, bias=True)
        self.position = build_position(config.position, width)
        self.class_token: nn.Parameter | None = None
        if config.pooling == "cls":
            self.class_token = nn.Parameter(torch.zeros(width))
        self.encoder = Encoder(config.encoder)
        self.pool = build_pooling(config.pooling, config.encoder)

    def forward(self, images: PackedImages) -> Tensor:
        """Encodes packed images.

        Args:
            images: Patches on the tower's device.

        Returns:
            [E, C] one vector per image, in the order in which the images were packed.
        """
        segments = images.segments
        pixels_TK = images.patches.to(self.pixel_scale.dtype)
        x_TC = self.embed(torch.addcmul(self.pixel_shift, pixels_TK, self.pixel_scale))
        sides_T2 = images.grids[segments.ids]
        x_TC = x_TC + self.position(images.coords, sides_T2)
        if self.class_token is not None:
            x_TC, segments = _prepend(self.class_token, x_TC, segments)
        return self.pool(self.encoder(x_TC, segments), segments)[images.order]


def _prepend(token_C: Tensor, x_TC: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
    """Puts one token before each example's; padding stays at the end as it is."""
    count = segments.num_examples
    ids = segments.ids.clamp(max=count - 1)
    with_token = Segments.from_lengths(
        [length + 1 for length in segments.lengths[:count]],
        padding=segments.padding,
        device=x_TC.device,
    )
    out_TC = x_TC.new_empty(with_token.num_tokens, x_TC.shape[-1])
    out_TC = out_TC.index_copy(
        0, with_token.offsets[:count].long(), token_C.to(x_TC.dtype).expand(count, -1)
    )
    moved = torch.arange(len(x_TC), device=x_TC.device) + ids + 1
    return out_TC.index_copy(0, moved, x_TC), with_token
