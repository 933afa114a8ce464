"""The packed NaViT image tower: patches of many images in, one vector per image out.

Takes `PackedImages` as the data pipeline left them (uint8), embeds patches, adds positions by
coordinate, encodes the stream and pools each image; or leaves out the last step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from navit_clip.configs import check_choices
from navit_clip.models.conv_stem import CHANNELS, STRIDE, ConvStem
from navit_clip.models.hierarchical_tower import HierarchicalEncoder, HierarchyConfig
from navit_clip.models.interpolate import exact_dtype
from navit_clip.models.linear import Linear
from navit_clip.models.patch_embed import PatchEmbed
from navit_clip.models.pooling import Pooling, build_pooling
from navit_clip.models.position import TABLE_STD, PositionConfig, build_position
from navit_clip.models.rope import RotaryConfig, RotarySpeeds, build_rotary
from navit_clip.models.transformer import Encoder, EncoderConfig, LayerNorm
from navit_clip.packed.grids import plan_grids
from navit_clip.packed.images import PackedImages, Planner
from navit_clip.packed.segments import Segments


@dataclass(frozen=True)
class ImageTowerConfig:
    """Architecture of the image tower.

    Attributes:
        patch_size: P, side of a patch in pixels, for which the kernel is stored. For patches of
            another size it is resized, if `position` does not count patches.
        encoder: The transformer over the patches.
        position: The position embedding of patches.
        pooling: How an image's tokens become one vector; ``cls`` puts a learned class token
            before each image's patches.
        pixel_mean: Mean per channel on [0, 1], subtracted from pixels.
        pixel_std: Standard deviation per channel on [0, 1], which pixels are divided by.
        patch_bias: A bias in the embedding of patches.
        class_position: The class token has a position of its own, as in ViT and CLIP; needs
            ``cls`` pooling.
        registers: Learned tokens between class token and patches, which the encoder reads and
            pooling leaves out.
        pooled_norm: Normalise the pooled vector too; models with mean pooling often do so in
            place of `encoder.final_norm`.
        rotary: Rotations of queries and keys by position, beside `position` or without it.
        hierarchy: Stages of window attention in place of a plain encoder. Windows know how their
            tokens lie to each other, by a bias or, with `rotary`, by integer coordinates within a
            window: such a tower has no other positions, no class token and no registers.
        stem: What patches pass before they are embedded: ``resnet50``, the convolutions of ViT's
            hybrid R50+B/16, at patches of 16 pixels and of whole images alone.

    Raises:
        ValueError: If `patch_size` is below 1, a `pixel_std` is not positive, the encoder is
            causal or of a width that its positions cannot have, `pooling` is unknown,
            `class_position` is set without a class token, `registers` is negative, heads are too
            narrow for `rotary`, or `hierarchy` or `stem` does not fit the rest.
    """

    patch_size: int = 16
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    position: PositionConfig = field(default_factory=PositionConfig)
    pooling: Pooling = "map"
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    patch_bias: bool = True
    class_position: bool = False
    registers: int = 0
    pooled_norm: bool = False
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    hierarchy: HierarchyConfig = field(default_factory=HierarchyConfig)
    stem: Literal["none", "resnet50"] = "none"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {self.patch_size}")
        if min(self.pixel_std) <= 0:
            raise ValueError(f"pixel_std must be positive, got {self.pixel_std}")
        if self.encoder.causal:
            raise ValueError("encoder.causal must be false for images: patches have no order")
        position, width = self.position, self.encoder.width
        if width % position.width_divisor:
            raise ValueError(
                f"encoder.width must be a multiple of {position.width_divisor} for "
                f"position.combine={position.combine} position.embedding={position.embedding}, "
                f"got {width}"
            )
        if self.class_position and self.pooling != "cls":
            raise ValueError(f"class_position needs pooling: cls, got pooling={self.pooling}")
        if self.registers < 0:
            raise ValueError(f"registers must not be negative, got {self.registers}")
        self.rotary.check_width(self.encoder, axes=2)
        self.hierarchy.check(self.patch_size, self.encoder)
        if self.hierarchy.depths and (
            self.position.kind != "none"
            or self.rotary.coordinates != "integer"
            or self.pooling == "cls"
            or self.registers
        ):
            raise ValueError(
                "hierarchy.depths needs position.kind none, rotary.coordinates integer, pooling "
                f"mean or map and registers 0, got {position.kind}, {self.rotary.coordinates}, "
                f"{self.pooling} and {self.registers}"
            )
        if self.stem != "none" and (self.patch_size != STRIDE or self.hierarchy.depths):
            raise ValueError(
                f"stem: {self.stem} needs patch_size {STRIDE} and no hierarchy.depths, got "
                f"{self.patch_size} and {list(self.hierarchy.depths)}"
            )

    def check_patch_size(self, size: int) -> None:
        """Refuses patches that the tower cannot read.

        Raises:
            ValueError: Naming what stands in the way.
        """
        if size < 1:
            raise ValueError(f"patch sizes must be at least 1, got {size}")
        self.hierarchy.check(size, self.encoder)
        if size != self.patch_size and self.stem != "none":
            raise ValueError(f"stem: {self.stem} has patches of {STRIDE} pixels, got {size}")
        if size != self.patch_size and not self.position.relative:
            raise ValueError(
                f"patches of {size} pixels need positions that do not count patches of "
                f"{self.patch_size}: image.position.coordinates fractional or interpolated, or "
                "kind learned_1d or none"
            )

    def planner(self, *, grouped: bool = False) -> Planner | None:
        """What makes `PackedImages.plan` for this tower; None if it needs none.

        Args:
            grouped: See `plan_windows`.
        """
        if self.hierarchy.depths:
            return self.hierarchy.planner(self.encoder, grouped=grouped)
        return None if self.stem == "none" else plan_grids

    def with_patch_size(self, size: int) -> ImageTowerConfig:
        """How the same tower sees images that are cut into patches of another size.

        Raises:
            ValueError: If it cannot read them.
        """
        self.check_patch_size(size)
        return self if size == self.patch_size else replace(self, patch_size=size)


class ImageTokens(NamedTuple):
    """Encoded patches of many images, for models that read more than one vector per image.

    Attributes:
        x_TC: [T, C] the encoder's outputs at the patches; class token and registers left out.
        segments: Where each image lies, in the order of `PackedImages.segments`; its `order` is
            not applied.
        coords_T2: int32 [T, 2] row and column of each patch on its image's grid.
    """

    x_TC: Tensor
    segments: Segments
    coords_T2: Tensor


class HiddenPatches(NamedTuple):
    """Patches that a tower does not see, though it computes them.

    Attributes:
        mask_T: bool [T].
        token_C: [C] stands in place of each after the embedding, of all patches of a unit in a
            hierarchical tower.
    """

    mask_T: Tensor
    token_C: Tensor

    def replace(self, x_TC: Tensor) -> Tensor:
        """Puts the token in the place of what the hidden patches were embedded to."""
        mask_T = self.mask_T.repeat_interleave(len(x_TC) // len(self.mask_T))
        return torch.where(mask_T[:, None], self.token_C.to(x_TC.dtype), x_TC)


class ImageTower(nn.Module):
    """Encodes packed images to one vector of the encoder's width each, or to their tokens.

    Attributes:
        stem: Patches of pixels to vectors; None without.
        embed: Patches of pixels, or these vectors, to tokens.
        position: Embeds a patch's row and column; None without.
        rotary: How queries and keys turn by them; None without, and where the encoder has it.
        encoder: The transformer over the patches, class token and registers included.
        pool: (tokens [T, C], segments) to [E, C], one vector per image.
    """

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.encoder.width
        merges = config.hierarchy.merges
        self.stem: ConvStem | None = None
        self.embed: Linear
        if config.stem == "none":
            self.embed = PatchEmbed(
                config.patch_size >> merges,
                width >> merges,
                config.pixel_mean,
                config.pixel_std,
                bias=config.patch_bias,
            )
        else:
            self.stem = ConvStem(config.pixel_mean, config.pixel_std)
            self.embed = Linear(CHANNELS, width, bias=config.patch_bias)
        self.position = build_position(config.position, width)
        self.class_token: nn.Parameter | None = None
        if config.pooling == "cls":
            self.class_token = nn.Parameter(torch.zeros(width))
        self.class_position: nn.Parameter | None = None
        if config.class_position:
            self.class_position = nn.Parameter(torch.empty(width))
            nn.init.normal_(self.class_position, std=TABLE_STD)
        self.registers: nn.Parameter | None = None
        if config.registers:
            # Alike at first, they would stay alike.
            self.registers = nn.Parameter(torch.empty(config.registers, width))
            nn.init.normal_(self.registers, std=TABLE_STD)
        self.rotary: RotarySpeeds | None = None
        self.encoder: Encoder
        if config.hierarchy.depths:
            self.encoder = HierarchicalEncoder(config.encoder, config.hierarchy, config.rotary)
        else:
            self.rotary = build_rotary(config.rotary, config.encoder, axes=2)
            self.encoder = Encoder(config.encoder)
        self.pool = build_pooling(config.pooling, config.encoder)
        self.norm = LayerNorm(width, config.encoder) if config.pooled_norm else nn.Identity()

    def forward(self, images: PackedImages) -> Tensor:
        """[E, C]: one vector per image, in the order in which the images were packed."""
        if self.class_token is None:
            x_TC, segments, _ = self.tokens(images)
        else:  # which pooling reads
            x_TC, segments, _ = self._encode(images)
        return self.norm(self.pool(x_TC, segments))[images.order]

    def tokens(self, images: PackedImages, hidden: HiddenPatches | None = None) -> ImageTokens:
        """Encodes packed images without pooling them."""
        x_TC, _, places_T = self._encode(images, hidden)
        if places_T is not None:
            x_TC = x_TC.index_select(0, places_T)
        return ImageTokens(x_TC, images.segments, images.coords)

    def _encode(
        self, images: PackedImages, hidden: HiddenPatches | None = None
    ) -> tuple[Tensor, Segments, Tensor | None]:
        """The encoder's whole output: class token, registers and patches.

        Returns:
            The stream, its segments, and where each patch lies on it; None if the patches are all.
        """
        segments = images.segments
        self.config.check_patch_size(images.patch_size)
        patches_TK = self.config.hierarchy.cut(images.patches)
        if self.stem is not None:
            patches_TK = self.stem(images, self.embed.weight.dtype)
        x_TC = self.embed(patches_TK)
        if hidden is not None:
            x_TC = hidden.replace(x_TC)
        if isinstance(self.encoder, HierarchicalEncoder):
            return self.encoder(x_TC.to(self.embed.weight.dtype), images), segments, None
        sides_T2 = images.grids[segments.ids]
        if self.position is not None:
            x_TC = x_TC + self.position(images.coords, sides_T2)
        else:  # under autocast, positions keep the residual stream in the parameters' precision
            x_TC = x_TC.to(self.embed.weight.dtype)
        positions_T2 = None
        if self.rotary is not None:
            positions_T2 = self.config.rotary.positions(
                images.coords,
                sides_T2,
                scale=images.patch_size / self.config.patch_size,
                dtype=exact_dtype(self.embed.weight.dtype),
            )
        places_T, prefix = None, self._prefix()
        if prefix:
            x_TC, segments, places_T = _prepend(torch.stack(prefix), x_TC, segments)
            if positions_T2 is not None:  # what is no patch stays unturned
                everywhere_T2 = positions_T2.new_zeros(len(x_TC), 2)
                positions_T2 = everywhere_T2.index_copy(0, places_T, positions_T2)
        rotary = () if self.rotary is None else self.rotary(positions_T2)
        return self.encoder(x_TC, segments, rotary), segments, places_T

    def _prefix(self) -> list[Tensor]:
        """The tokens before each image's patches, [C] each."""
        prefix: list[Tensor] = []
        if self.class_token is not None:
            token_C: Tensor = self.class_token
            if self.class_position is not None:
                token_C = token_C + self.class_position
            prefix.append(token_C)
        if self.registers is not None:
            prefix.extend(self.registers)
        return prefix


def _prepend(
    prefix_RC: Tensor, x_TC: Tensor, segments: Segments
) -> tuple[Tensor, Segments, Tensor]:
    """Puts the same tokens before each example's; padding stays at the end as it is.

    Returns:
        The longer stream, its segments, and int64 [T] where each token of `x_TC` is in it.
    """
    count, added = segments.num_examples, len(prefix_RC)
    ids = segments.ids.clamp(max=count - 1)
    with_prefix = segments.lengthened(added)
    out_TC = x_TC.new_empty(with_prefix.num_tokens, x_TC.shape[-1])
    index = torch.arange(max(added, len(x_TC)), device=x_TC.device)
    starts_E1 = with_prefix.offsets[:count, None].long()
    out_TC = out_TC.index_copy(
        0, (starts_E1 + index[:added]).flatten(), prefix_RC.to(x_TC.dtype).repeat(count, 1)
    )
    places_T = index[: len(x_TC)] + added * (ids + 1)
    return out_TC.index_copy(0, places_T, x_TC), with_prefix, places_T
