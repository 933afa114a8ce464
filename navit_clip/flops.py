"""Counted floating-point operations of the towers, for reports of accuracy against cost.

A multiply–add counts as two. Matrix products only, as is usual; norms, activations and gathers
are left out (below 1%).
"""

from __future__ import annotations

from collections.abc import Iterable

from navit_clip.image_tower import ImageTowerConfig
from navit_clip.text_tower import TextTowerConfig
from navit_clip.transformer import EncoderConfig


def encoder_flops(config: EncoderConfig, tokens: int) -> int:
    """Forward FLOPs of the encoder for one segment.

    Two per weight and token, and attention's two products of 2·n²·C each.
    """
    width = config.width
    weights = 4 * width**2 + 2 * width * config.mlp_width
    return config.depth * (2 * weights * tokens + 4 * width * tokens**2)


def image_flops(config: ImageTowerConfig, embed_dim: int, tokens: int) -> int:
    """Forward FLOPs of the image tower and projection for one image of so many patches."""
    width = config.encoder.width
    embed = 2 * 3 * config.patch_size**2 * width * tokens
    sequence = tokens + (config.pooling == "cls")
    return (
        embed
        + encoder_flops(config.encoder, sequence)
        + _pooling_flops(config.encoder, config.pooling, sequence)
        + 2 * width * embed_dim
    )


def text_flops(config: TextTowerConfig, embed_dim: int, tokens: int) -> int:
    """Forward FLOPs of the text tower and projection for one caption of so many tokens."""
    return (
        encoder_flops(config.encoder, tokens)
        + _pooling_flops(config.encoder, config.pooling, tokens)
        + 2 * config.encoder.width * embed_dim
    )


def _pooling_flops(config: EncoderConfig, pooling: str, tokens: int) -> int:
    if pooling != "map":
        return 0
    width = config.width
    keys_values, scores = 4 * width**2 * tokens, 4 * width * tokens
    return keys_values + scores + 4 * width**2 + 4 * width * config.mlp_width


def mean_image_flops(config: ImageTowerConfig, embed_dim: int, lengths: Iterable[int]) -> float:
    """Mean forward FLOPs over images of the given lengths in patches."""
    costs = [image_flops(config, embed_dim, tokens) for tokens in lengths]
    return sum(costs) / len(costs)
