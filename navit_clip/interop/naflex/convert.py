"""A NaFlex ViT's architecture and weights as the packed image tower's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from navit_clip.interop.naflex.supported import ACTIVATIONS, POOLINGS, table_sides
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.transformer import EncoderConfig

# Modules of theirs and ours; weight and bias have the same names in both.
_TOWER = {
    "embeds.proj": "embed",
    "norm_pre": "encoder.pre_norm",
    "norm": "encoder.norm",
    "fc_norm": "norm",
    "attn_pool.q": "pool.q",
    "attn_pool.kv": "pool.kv",
    "attn_pool.proj": "pool.out",
    "attn_pool.norm": "pool.norm",
    "attn_pool.mlp.fc1": "pool.mlp.up",
    "attn_pool.mlp.fc2": "pool.mlp.down",
}
_BLOCK = {
    "norm1": "attention_norm",
    "attn.qkv": "attention.qkv",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "attn.proj": "attention.out",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}
_SCALED = {"ls1": "attn.proj", "ls2": "mlp.fc2"}


def tower_config(model: Any, mean: Sequence[float], std: Sequence[float]) -> ImageTowerConfig:
    """The image tower's configuration.

    Args:
        model: timm's module, which `unsupported` has no objection to.
        mean: Mean of pixels, per channel on [0, 1].
        std: Standard deviation, likewise.
    """
    block, width = model.blocks[0], model.embed_dim
    pooling = POOLINGS[model.global_pool]
    activation: Any = ACTIVATIONS[type(block.mlp.act).__name__]
    if activation == "gelu" and getattr(block.mlp.act, "approximate", "none") == "tanh":
        activation = "gelu_tanh"
    return ImageTowerConfig(
        patch_size=model.embeds.patch_size[0],
        encoder=EncoderConfig(
            width=width,
            depth=len(model.blocks),
            heads=block.attn.num_heads,
            mlp_ratio=_ratio(block.mlp.fc1.out_features, width),
            qk_norm=not isinstance(block.attn.q_norm, nn.Identity),
            qkv_bias=block.attn.qkv.bias is not None,
            norm_bias=block.norm1.bias is not None,
            mlp_bias=block.mlp.fc1.bias is not None,
            activation=activation,
            pre_norm=not isinstance(model.norm_pre, nn.Identity),
            final_norm=not isinstance(model.norm, nn.Identity),
            norm_eps=block.norm1.eps,
        ),
        position=_position(model.embeds),
        pooling=pooling,
        pixel_mean=(mean[0], mean[1], mean[2]),
        pixel_std=(std[0], std[1], std[2]),
        patch_bias=model.embeds.proj.bias is not None,
        registers=model.num_prefix_tokens - (pooling == "cls"),
        pooled_norm=not isinstance(model.fc_norm, nn.Identity),
    )


def _ratio(hidden: int, width: int) -> float:
    """The ratio whose product with the width, cut to an integer, is the hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _position(embeds: Any) -> PositionConfig:
    table_side, _ = table_sides(embeds)
    if embeds.pos_embed_type == "factorized":
        return PositionConfig(
            coordinates="interpolated",
            table_side=table_side,
            keep_aspect=embeds.pos_embed_ar_preserving,
        )
    # Sampling point by point, another way to the same values, cannot average.
    by_point = getattr(embeds, "pos_embed_use_grid_sample", False)
    return PositionConfig(
        "learned_1d",
        table_side=table_side,
        interpolation=embeds.pos_embed_interp_mode,
        # timm before this switch had it on.
        antialias=not by_point and getattr(embeds, "pos_embed_antialias", True),
        keep_aspect=embeds.pos_embed_ar_preserving,
    )


def without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without those of timm's classifier."""
    return {key: value for key, value in state.items() if not key.startswith("head.")}


def tower_weights(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Timm's weights under our names."""
    theirs = without_head(state)
    _fold_layer_scales(theirs)
    names = dict(_TOWER)
    for i in range(len(model.blocks)):
        names |= {
            f"blocks.{i}.{one}": f"encoder.blocks.{i}.{other}" for one, other in _BLOCK.items()
        }
    ours = {
        f"{other}.{part}": theirs[f"{one}.{part}"]
        for one, other in names.items()
        for part in ("weight", "bias")
        if f"{one}.{part}" in theirs
    }
    ours["embed.weight"] = _pixels_first(model.embeds, ours["embed.weight"])
    if "embeds.pos_embed" in theirs:
        ours["position.table"] = theirs["embeds.pos_embed"].flatten(0, 2)
    else:
        ours["position.row.table"] = theirs["embeds.pos_embed_y"][0]
        ours["position.column.table"] = theirs["embeds.pos_embed_x"][0]
    if "attn_pool.latent" in theirs:
        ours["pool.probe"] = theirs["attn_pool.latent"][0, 0]
    prefix = [
        theirs[f"embeds.{part}"][0]
        for part in ("cls_token", "reg_token")
        if f"embeds.{part}" in theirs
    ]
    if model.global_pool == "token":
        ours["class_token"] = prefix.pop(0)[0]
    if prefix:
        ours["registers"] = torch.cat(prefix)
    return ours


def _fold_layer_scales(theirs: dict[str, Tensor]) -> None:
    """Multiplies each layer scale into the layer before it, within the dictionary."""
    for key in [key for key in theirs if key.endswith(".gamma")]:
        block, scale, _ = key.rsplit(".", 2)
        # In float64, so that the product is rounded once.
        gamma = theirs.pop(key).double()
        layer = f"{block}.{_SCALED[scale]}"
        theirs[f"{layer}.weight"] = gamma[:, None] * theirs[f"{layer}.weight"]
        if f"{layer}.bias" in theirs:
            theirs[f"{layer}.bias"] = gamma * theirs[f"{layer}.bias"]


def _pixels_first(embeds: Any, weight: Tensor) -> Tensor:
    """The patch embedding over pixels row by row, channels last, as packed patches are."""
    side = embeds.patch_size[0]
    if weight.ndim == 4:
        channels_first = weight
    elif getattr(embeds, "channels_last", True):
        return weight
    else:
        channels_first = weight.unflatten(1, (3, side, side))
    return channels_first.permute(0, 2, 3, 1).flatten(1)
