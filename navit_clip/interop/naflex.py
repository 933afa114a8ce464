"""timm's NaFlex ViTs, SigLIP 2 NaFlex among them, as packed image tower.

timm pads images to one length and masks what is padding; the packed tower takes the same patches
without padding and gives the same vectors. What a model is made of is read off timm's own module,
never off its name. Three things are rewritten on the way, none of which changes what the tower
computes: layer scales are multiplied into the layers before them, a class token that pooling does
not read becomes a register, and the classifier is left out.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from navit_clip.errors import UserError
from navit_clip.models.image_tower import ImageTower, ImageTowerConfig
from navit_clip.models.pooling import Pooling
from navit_clip.models.position import PositionConfig
from navit_clip.models.transformer import EncoderConfig

_POOLINGS: dict[str, Pooling] = {"avg": "mean", "map": "map", "token": "cls"}
_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}
_INTERPOLATIONS = ("bilinear", "bicubic")

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


def is_naflex(model: object) -> bool:
    """Whether a module is a NaFlex ViT of timm's, as `visual.trunk` of an open_clip model is."""
    return isinstance(model, _timm().NaFlexVit)


@cache
def supported_naflex_models() -> tuple[str, ...]:
    """Names of timm's NaFlex ViTs that the packed image tower can be."""
    import timm

    names = timm.list_models("naflexvit_*")
    # No switch depends on the number of blocks.
    return tuple(name for name in names if not _refusal(_skeleton(name, depth=1)))


def naflex_image_tower(
    model: nn.Module | str,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
) -> ImageTower:
    """A NaFlex ViT of timm's as packed image tower.

    Gives timm's pooled vectors for the same patches (`forward_head(..., pre_logits=True)`), of any
    grid. Dropout and the like are left out: they are settings of a training run.

    Args:
        model: timm's module, or its name, such as ``naflexvit_base_patch16_siglip``.
        state_dict: Its weights under timm's names; by default those of the module. A name needs
            some.
        pixel_mean: Mean per channel on [0, 1]; by default what timm's own settings of the model
            say.
        pixel_std: Standard deviation, likewise.

    Returns:
        The tower in evaluation mode, in float32 on the host.

    Raises:
        UserError: If the model has a switch that the tower has not (the message names it and the
            models that are supported), or the weights are of another model.
    """
    name = model if isinstance(model, str) else type(model).__name__
    theirs = _skeleton(model) if isinstance(model, str) else model
    if reason := _refusal(theirs):
        supported = ", ".join(supported_naflex_models())
        raise UserError(f"cannot load {name}: {reason}; supported are {supported}")
    if state_dict is None:
        if isinstance(model, str):
            raise UserError(f"no weights for {name}: give state_dict, or timm's module itself")
        state_dict = theirs.state_dict()
    _check_weights(name, theirs, state_dict)
    settings = getattr(theirs, "pretrained_cfg", None) or {}
    tower = ImageTower(
        _config(
            theirs,
            pixel_mean or settings.get("mean", (0.5, 0.5, 0.5)),
            pixel_std or settings.get("std", (0.5, 0.5, 0.5)),
        )
    )
    tower.load_state_dict(_weights(theirs, state_dict))
    return tower.eval()


def _timm() -> Any:
    try:
        from timm.models import naflexvit
    except ImportError as error:
        raise UserError("NaFlex models need timm 1.0.16 or newer: pip install -U timm") from error
    return naflexvit


def _skeleton(name: str, **changes: Any) -> nn.Module:
    """A module of timm's without memory for its weights."""
    import timm

    _timm()
    if name not in timm.list_models("naflexvit_*"):
        supported = ", ".join(supported_naflex_models())
        raise UserError(f"timm has no NaFlex model {name!r}; supported are {supported}")
    with torch.device("meta"):
        return timm.create_model(name, **changes)


def _refusal(model: Any) -> str:
    """Why the packed image tower cannot be this model; empty if it can."""
    if not is_naflex(model):
        return "it is no NaFlex ViT of timm's"
    return _embedding_refusal(model) or _encoder_refusal(model) or _pooling_refusal(model)


def _embedding_refusal(model: Any) -> str:
    embeds = model.embeds
    if model.in_chans != 3:
        return f"its images have {model.in_chans} channels, packed patches have 3"
    if embeds.patch_size[0] != embeds.patch_size[1]:
        return f"its patches are not square: {tuple(embeds.patch_size)}"
    if embeds.norm_input is not None or not isinstance(embeds.norm, nn.Identity):
        return "it normalises patches before or after their embedding"
    if model.rope is not None:
        return "its attention rotates queries and keys by position (rope)"
    if embeds.pos_embed_type == "none":
        return "it has no position embedding"
    rows, columns = _table_sides(embeds)
    if rows != columns:
        return f"its table of positions is {rows} x {columns}, not square"
    if rows < 2:
        return "its table of positions has a single place"
    if embeds.pos_embed_type == "learned":
        if embeds.pos_embed_interp_mode not in _INTERPOLATIONS:
            return f"it resizes positions by {embeds.pos_embed_interp_mode} interpolation"
        # timm before this switch had it off.
        if getattr(embeds, "pos_embed_align_corners", False):
            return "it resizes positions with aligned corners"
    return ""


def _encoder_refusal(model: Any) -> str:
    from timm.layers import Attention, LayerScale, Mlp
    from timm.models.vision_transformer import Block

    for block in model.blocks:
        if (type(block), type(block.attn), type(block.mlp)) != (Block, Attention, Mlp):
            return (
                f"its blocks are {type(block).__name__} of {type(block.attn).__name__} and "
                f"{type(block.mlp).__name__}, not plain ones"
            )
        if block.attn.qkv.out_features != 3 * model.embed_dim:
            return "its attention is not as wide as the tower"
        if getattr(block.attn, "gate", None) is not None:
            return "its attention is gated"
        inner = getattr(block.attn, "norm", None), getattr(block.mlp, "norm", None)
        if any(not isinstance(norm, (nn.Identity, type(None))) for norm in inner):
            return "it normalises within attention or MLP"
        if any(
            not isinstance(scale, (nn.Identity, LayerScale)) for scale in (block.ls1, block.ls2)
        ):
            return "it scales layers in a way of its own"
        if type(block.mlp.act).__name__ not in _ACTIVATIONS:
            return f"its activation is {type(block.mlp.act).__name__}"
    named = [module for path, module in model.named_modules() if "norm" in path.split(".")[-1]]
    norms = [norm for norm in named if not isinstance(norm, nn.Identity)]
    if any(not isinstance(norm, nn.LayerNorm) or norm.weight is None for norm in norms):
        return "it has norms other than LayerNorm with weights"
    if len({(norm.eps, norm.bias is None) for norm in norms}) > 1:
        return "its LayerNorms differ in epsilon or bias"
    return ""


def _pooling_refusal(model: Any) -> str:
    if model.global_pool not in _POOLINGS:
        return f"it pools by {model.global_pool or 'nothing'}, not by avg, map or token"
    prefix = model.num_prefix_tokens
    if model.global_pool != "token" and prefix and getattr(model, "pool_include_prefix", False):
        return "it pools class token and registers with the patches"
    if model.attn_pool is None:
        return ""
    pool, block = model.attn_pool, model.blocks[0]
    if pool.num_heads != block.attn.num_heads:
        return f"it pools with {pool.num_heads} heads, its blocks have {block.attn.num_heads}"
    if pool.mlp.fc1.out_features != block.mlp.fc1.out_features:
        return "the MLP of its pooling has another width than its blocks'"
    if block.mlp.fc1.bias is None:
        return "its pooling has biases, its blocks have none"
    return ""


def _table_sides(embeds: Any) -> tuple[int, int]:
    if embeds.pos_embed_type == "learned":
        return embeds.pos_embed.shape[1], embeds.pos_embed.shape[2]
    return embeds.pos_embed_y.shape[1], embeds.pos_embed_x.shape[1]


def _config(model: Any, mean: Sequence[float], std: Sequence[float]) -> ImageTowerConfig:
    block, width = model.blocks[0], model.embed_dim
    pooling = _POOLINGS[model.global_pool]
    activation: Any = _ACTIVATIONS[type(block.mlp.act).__name__]
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
    table_side, _ = _table_sides(embeds)
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


def _check_weights(name: str, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuses weights whose names or shapes are not the model's, whatever their classifier."""
    expected = {key: value.shape for key, value in _without_head(model.state_dict()).items()}
    given = {key: value.shape for key, value in _without_head(state).items()}
    different = sorted(
        key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key)
    )
    if different:
        which = textwrap.shorten(", ".join(different), 150, placeholder=" ...")
        raise UserError(
            f"the weights are not of {name}: missing, unknown or of another shape are {which}"
        )


def _without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("head.")}


def _weights(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of timm's under our names."""
    theirs = _without_head(state)
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
