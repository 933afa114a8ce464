"""Counted floating-point operations of the towers: accuracy against cost, and the trainer's MFU.

A multiply–add counts as two. Matrix products only, attention's included, as is usual; norms,
activations, rotations, gathers and the resize of a kernel are left out (below 1%), and causal
attention counts whole. What a packed stream costs depends on how many examples it holds and on the
sums of their lengths and of their squares (`LengthSums`): nothing is counted token by token.
Padding costs time, but no FLOPs here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from navit_clip.models.clip import CLIPConfig
from navit_clip.models.conv_stem import CHANNELS, stem_flops
from navit_clip.models.hierarchical_tower import HierarchyConfig
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.masked_image import MaskedImageConfig
from navit_clip.models.text_tower import TextTowerConfig
from navit_clip.models.transformer import EncoderConfig


class LengthSums(NamedTuple):
    """All that the cost of a packed stream depends on.

    Attributes:
        examples: How many there are.
        tokens: Sum of their lengths.
        squares: Sum of the squares of their lengths.
    """

    examples: int
    tokens: int
    squares: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> LengthSums:
        """Sums over examples of the given lengths in tokens."""
        return cls(len(lengths), sum(lengths), sum(length**2 for length in lengths))

    def longer(self, added: int) -> LengthSums:
        """Sums over the same examples with so many more tokens each."""
        squares = self.squares + 2 * added * self.tokens + added**2 * self.examples
        return LengthSums(self.examples, self.tokens + added * self.examples, squares)


class TowerFlops(NamedTuple):
    """Forward FLOPs of one tower by what its backward pass may leave out.

    Attributes:
        embed: Embedding of patches; looking up token ids is no product.
        blocks: All blocks of the encoder.
        pool: Pooling.
        projection: To the shared space.
    """

    embed: int
    blocks: int
    pool: int
    projection: int


def encoder_flops(config: EncoderConfig, sums: LengthSums) -> int:
    """Forward FLOPs of the encoder: two per weight and token, 4·n²·C for attention's products."""
    width = config.width
    weights = 4 * width**2 + 2 * width * config.mlp_width
    return config.depth * (2 * weights * sums.tokens + 4 * width * sums.squares)


def hierarchy_flops(hierarchy: HierarchyConfig, last: EncoderConfig, units: LengthSums) -> int:
    """Forward FLOPs of a hierarchical encoder, by the sums over units.

    Windows are counted as if they were whole, unless there is but one. What smaller ones spare is
    0.4% of a Swin-T on whole images of 224 pixels, and 2% with three quarters of the units dropped.
    """
    total = 0
    for stage, config in enumerate(hierarchy.stages(last)):
        cells = 4 ** (hierarchy.merges - stage)
        tokens, width = cells * units.tokens, config.width
        weights = 4 * width**2 + 2 * width * config.mlp_width
        pairs = min(tokens * hierarchy.window**2, cells**2 * units.squares)
        total += config.depth * (2 * weights * tokens + 4 * width * pairs)
        total += 4 * width**2 * tokens * (stage > 0)  # merging
    return total


def tower_flops(
    config: ImageTowerConfig | TextTowerConfig, embed_dim: int, sums: LengthSums
) -> TowerFlops:
    """Forward FLOPs of a tower for images of so many patches, or captions of so many tokens, each.

    Args:
        config: The tower's architecture.
        embed_dim: Width of the shared space; 0 without a projection.
        sums: Sums over the examples' lengths, class token and registers left out.
    """
    width, embed, blocks = config.encoder.width, 0, 0
    if isinstance(config, ImageTowerConfig):
        hierarchy = config.hierarchy
        embed = 2 * 3 * config.patch_size**2 * (width >> hierarchy.merges) * sums.tokens
        added = (config.pooling == "cls") + config.registers
        if hierarchy.depths:
            blocks = hierarchy_flops(hierarchy, config.encoder, sums)
        else:
            blocks = encoder_flops(config.encoder, sums.longer(added))
        if config.stem != "none":  # like blocks, it takes gradients of weights and of inputs
            embed = 2 * CHANNELS * width * sums.tokens
            blocks += stem_flops() * sums.tokens
    else:
        blocks = encoder_flops(config.encoder, sums)
    return TowerFlops(
        embed,
        blocks,
        _pooling_flops(config.encoder, config.pooling, sums),
        2 * width * embed_dim * sums.examples,
    )


def decoder_flops(config: MaskedImageConfig, visible: LengthSums, whole: LengthSums) -> int:
    """Forward FLOPs of what predicts pixels, by the sums over visible and over all patches."""
    if config.decoder is None:
        return 6 * config.image.encoder.width * config.image.patch_size**2 * whole.tokens
    width = config.decoder.width
    return (
        2 * config.image.encoder.width * width * visible.tokens
        + encoder_flops(config.decoder, whole)
        + 6 * width * config.image.patch_size**2 * whole.tokens
    )


def _pooling_flops(config: EncoderConfig, pooling: str, sums: LengthSums) -> int:
    if pooling != "map":
        return 0
    width = config.width
    keys_values, scores = 4 * width**2 * sums.tokens, 4 * width * sums.tokens
    each = 2 * width**2 + 4 * width * config.mlp_width
    # The probe is projected once for all.
    return keys_values + scores + each * sums.examples + 2 * width**2


def image_flops(config: ImageTowerConfig, embed_dim: int, tokens: int) -> int:
    """Forward FLOPs of the image tower and projection for one image of so many patches.

    A projection is counted whether a model has one or not (below 0.1%).
    """
    return sum(tower_flops(config, embed_dim, LengthSums.of([tokens])))


def forward_flops(
    config: CLIPConfig, images: LengthSums, texts: LengthSums
) -> dict[str, TowerFlops]:
    """Forward FLOPs of both towers, ``image`` and ``text``, for one batch."""
    image_dim, text_dim = (
        0 if kind == "none" else config.embed_dim
        for kind in (config.image_projection, config.text_projection)
    )
    return {
        "image": tower_flops(config.image, image_dim, images),
        "text": tower_flops(config.text, text_dim, texts),
    }


def backward_flops(
    forward: TowerFlops, *, trained_fraction: float | None = None, adapted: bool = False
) -> float:
    """FLOPs of a tower's backward pass: one product each for the weights' and inputs' gradients.

    Args:
        forward: Forward FLOPs of the same tower and batch.
        trained_fraction: Fraction of a locked tower's blocks that are trained, the last ones; with
            0 pooling is locked too and the projection's input takes no gradient. None if the
            tower is not locked; then everything is trained, and only patches take no gradient.
        adapted: The tower learns by adapters alone: its own weights take no gradient, but what
            flows through them does. The adapters' products are left out.
    """
    if adapted:
        return forward.blocks + forward.pool + 2 * forward.projection
    if trained_fraction is None:
        return forward.embed + 2 * (forward.blocks + forward.pool + forward.projection)
    if trained_fraction == 0:
        return forward.projection
    return 2 * (forward.blocks * trained_fraction + forward.pool + forward.projection)
