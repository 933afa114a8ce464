"""timm's NaFlex ViTs, SigLIP 2 NaFlex among them, and its FlexiViTs, as packed image towers.

timm pads images to one length and masks what is padding; the packed tower takes the same patches
without padding and gives the same vectors. What a model is made of is read off timm's own module,
never off its name. Four things are rewritten on the way, none of which changes what the tower
computes: layer scales are multiplied into the layers before them, queries and keys of rotary models
are reordered, whose pairs of dimensions are neighbours there, a class token that pooling does not
read becomes a register, and the classifier is left out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from navit_clip.errors import UserError
from navit_clip.interop import timm_vit
from navit_clip.models.image_tower import ImageTower, ImageTowerConfig
from navit_clip.models.pooling import Pooling
from navit_clip.models.position import PositionConfig
from navit_clip.models.rope import RotaryConfig

_POOLINGS: dict[str, Pooling] = {"avg": "mean", "map": "map", "token": "cls"}
# Layers of ours and theirs.
_TOWER = {
    **timm_vit.TOWER,
    "embed": "embeds.proj",
    "encoder.pre_norm": "norm_pre",
    "norm": "fc_norm",
}
_BLOCK = {**timm_vit.BLOCK, "attention.q_norm": "attn.q_norm", "attention.k_norm": "attn.k_norm"}
# Scales of layers; the last name is that in the blocks of rotary models.
_SCALED = {
    "ls1.gamma": "attn.proj",
    "ls2.gamma": "mlp.fc2",
    "gamma_1": "attn.proj",
    "gamma_2": "mlp.fc2",
}
_COORDINATES: dict[str, Literal["integer", "normalised"]] = {
    "RotaryEmbeddingCat": "integer",
    "RotaryEmbeddingMixed": "integer",
    "RotaryEmbeddingDinoV3": "normalised",
}


@cache
def supported_naflex_models() -> tuple[str, ...]:
    """Names of timm's NaFlex ViTs that the packed image tower can be."""
    import timm

    names = timm.list_models("naflexvit_*")
    # No switch depends on the number of blocks.
    return tuple(name for name in names if not _unsupported(_skeleton(name, depth=1)))


def is_naflex(model: object) -> bool:
    """Whether a module is timm's NaFlex ViT, as `visual.trunk` of an open_clip model is."""
    return isinstance(model, _naflex_module().NaFlexVit)


def naflex_image_tower(
    model: nn.Module | str,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
) -> ImageTower:
    """A NaFlex ViT from timm as a packed image tower.

    Gives timm's pooled vectors for the same patches (`forward_head(..., pre_logits=True)`), of any
    grid. Dropout and the like are left out: they are settings of a training run.

    Args:
        model: timm's module, or its name, such as ``naflexvit_base_patch16_siglip`` or
            ``flexivit_base``, of which timm keeps the kernel for 16 pixels.
        state_dict: Its weights under timm's names; by default those of the module. A name needs
            some.
        pixel_mean: Mean per channel on [0, 1]; by default the one in timm's settings of the model.
        pixel_std: Standard deviation, likewise.

    Returns:
        The tower in evaluation mode, in float32 on the host.

    Raises:
        UserError: If the model has a feature that the tower lacks (the message names it and the
            models that are supported), or the weights are of another model.
    """
    name = model if isinstance(model, str) else type(model).__name__
    theirs: Any = _skeleton(model) if isinstance(model, str) else model
    if reason := _unsupported(theirs):
        supported = ", ".join(supported_naflex_models())
        raise UserError(f"cannot load {name}: {reason}; supported are {supported}")
    if state_dict is None:
        if isinstance(model, str):
            raise UserError(f"no weights for {name}: give state_dict, or timm's module itself")
        state_dict = theirs.state_dict()
    if "patch_embed.proj.weight" in state_dict:  # a plain ViT's names
        state_dict = _naflex_module().checkpoint_filter_fn(dict(state_dict), theirs)
    state = _without_head(state_dict)
    given, expected = (
        {key: tensor.shape for key, tensor in weights.items()}
        for weights in (state, _without_head(theirs.state_dict()))
    )
    different = sorted({key for key, _ in given.items() ^ expected.items()})
    if different:
        which = textwrap.shorten(", ".join(different), 150, placeholder=" ...")
        raise UserError(
            f"the weights are not of {name}: missing, unknown or of another shape are {which}"
        )
    settings = getattr(theirs, "pretrained_cfg", None) or {}
    mean = pixel_mean or settings.get("mean", (0.5, 0.5, 0.5))
    std = pixel_std or settings.get("std", (0.5, 0.5, 0.5))
    pooling = _POOLINGS[theirs.global_pool]
    tower = ImageTower(
        ImageTowerConfig(
            patch_size=theirs.embeds.patch_size[0],
            encoder=timm_vit.encoder_config(theirs),
            position=_position(theirs.embeds),
            rotary=_rotary(theirs.rope),
            pooling=pooling,
            pixel_mean=(mean[0], mean[1], mean[2]),
            pixel_std=(std[0], std[1], std[2]),
            patch_bias=theirs.embeds.proj.bias is not None,
            registers=theirs.num_prefix_tokens - (pooling == "cls"),
            pooled_norm=not isinstance(theirs.fc_norm, nn.Identity),
        )
    )
    tower.load_state_dict(_tower_weights(theirs, state))
    return tower.eval()


def _naflex_module() -> Any:
    """Timm's module of NaFlex ViTs; a `UserError` if timm is missing or has none."""
    try:
        from timm.models import naflexvit
    except ImportError as error:
        raise UserError("NaFlex models need timm 1.0.16 or newer: pip install -U timm") from error
    return naflexvit


def _skeleton(name: str, **changes: Any) -> nn.Module:
    """Timm's module without memory for its weights."""
    import timm

    _naflex_module()
    if name in timm.list_models("flexivit_*"):
        # What the released ones want, as timm resizes their positions in its plain ViT.
        changes |= {"pos_embed_interp_mode": "bilinear", "pos_embed_antialias": False}
        changes["use_naflex"] = True
    elif name not in timm.list_models("naflexvit_*"):
        supported = ", ".join(supported_naflex_models())
        raise UserError(f"timm has no NaFlex model {name!r}; supported are {supported}, flexivit_*")
    with torch.device("meta"):
        return timm.create_model(name, **changes)


def _without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without those of timm's classifier."""
    return {key: value for key, value in state.items() if not key.startswith("head.")}


def _unsupported(model: Any) -> str:
    """Why the packed image tower cannot be this model; empty if it can."""
    if not is_naflex(model):
        return "it is no NaFlex ViT from timm"
    return (
        _embedding_reason(model)
        or _rotary_reason(model.rope)
        or _encoder_reason(model)
        or _pooling_reason(model)
    )


def _embedding_reason(model: Any) -> str:
    embeds = model.embeds
    if model.in_chans != 3:
        return f"its images have {model.in_chans} channels, packed patches have 3"
    if embeds.patch_size[0] != embeds.patch_size[1]:
        return f"its patches are not square: {tuple(embeds.patch_size)}"
    if embeds.norm_input is not None or not isinstance(embeds.norm, nn.Identity):
        return "it normalises patches before or after their embedding"
    if embeds.pos_embed_type == "none":
        return "" if model.rope is not None else "it has no position embedding"
    rows, columns = _table_sides(embeds)
    if rows != columns:
        return f"its table of positions is {rows} x {columns}, not square"
    if rows < 2:
        return "its table of positions has a single place"
    if embeds.pos_embed_type == "learned":
        if embeds.pos_embed_interp_mode not in ("bilinear", "bicubic"):
            return f"it resizes positions by {embeds.pos_embed_interp_mode} interpolation"
        # timm before this switch had it off.
        if getattr(embeds, "pos_embed_align_corners", False):
            return "it resizes positions with aligned corners"
    return ""


def _rotary_reason(rope: Any) -> str:
    if rope is None:
        return ""
    if type(rope).__name__ not in _COORDINATES:
        return f"its attention rotates queries and keys by {type(rope).__name__}"
    if getattr(rope, "ref_feat_shape", None) is not None:
        return "its rotations are scaled to a grid of reference"
    # Tokens before the patches are not turned: the distance from them would be another.
    if getattr(rope, "grid_offset", 0.0):
        return "its rotations have an offset"
    return ""


def _encoder_reason(model: Any) -> str:
    from timm.layers import Attention, AttentionRope, LayerScale, Mlp
    from timm.models.eva import EvaBlock
    from timm.models.vision_transformer import Block

    for block in model.blocks:
        parts = type(block), type(block.attn), type(block.mlp)
        if parts not in ((Block, Attention, Mlp), (EvaBlock, AttentionRope, Mlp)):
            return (
                f"its blocks are {type(block).__name__} of {type(block.attn).__name__} and "
                f"{type(block.mlp).__name__}, not plain ones"
            )
        if block.attn.qkv is None:
            return "its queries, keys and values have layers of their own"
        if block.attn.qkv.out_features != 3 * model.embed_dim:
            return "its attention is not as wide as the tower"
        if getattr(block.attn, "gate", None) is not None:
            return "its attention is gated"
        inner = getattr(block.attn, "norm", None), getattr(block.mlp, "norm", None)
        if any(not isinstance(norm, (nn.Identity, type(None))) for norm in inner):
            return "it normalises within attention or MLP"
        scales = [getattr(block, name, None) for name in ("ls1", "ls2")]
        if any(not isinstance(scale, (nn.Identity, LayerScale, type(None))) for scale in scales):
            return "it scales layers in a way of its own"
        if type(block.mlp.act).__name__ not in timm_vit.ACTIVATIONS:
            return f"its activation is {type(block.mlp.act).__name__}"
    named = [module for path, module in model.named_modules() if "norm" in path.split(".")[-1]]
    norms = [norm for norm in named if not isinstance(norm, nn.Identity)]
    if any(not isinstance(norm, nn.LayerNorm) or norm.weight is None for norm in norms):
        return "it has norms other than LayerNorm with weights"
    if len({(norm.eps, norm.bias is None) for norm in norms}) > 1:
        return "its LayerNorms differ in epsilon or bias"
    return ""


def _pooling_reason(model: Any) -> str:
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
    """Rows and columns of the table of positions."""
    if embeds.pos_embed_type == "learned":
        return embeds.pos_embed.shape[1], embeds.pos_embed.shape[2]
    return embeds.pos_embed_y.shape[1], embeds.pos_embed_x.shape[1]


def _rotary(rope: Any) -> RotaryConfig:
    if rope is None:
        return RotaryConfig()
    return RotaryConfig(
        "mixed" if hasattr(rope, "freqs") else "axial",
        _COORDINATES[type(rope).__name__],
        keep_aspect=getattr(rope, "normalize_coords", "separate") == "max",
        theta=float(rope.temperature),
    )


def _position(embeds: Any) -> PositionConfig:
    if embeds.pos_embed_type == "none":
        return PositionConfig("none")
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


def _tower_weights(model: Any, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Timm's weights under our names."""
    _fold_layer_scales(theirs)
    _order_pairs(model, theirs)
    names = dict(_TOWER)
    for i in range(len(model.blocks)):
        names |= {
            f"encoder.blocks.{i}.{our}": f"blocks.{i}.{their}" for our, their in _BLOCK.items()
        }
    ours = {
        f"{our}.{part}": theirs[f"{their}.{part}"]
        for our, their in names.items()
        for part in ("weight", "bias")
        if f"{their}.{part}" in theirs
    }
    ours["embed.weight"] = _pixels_first(model.embeds, ours["embed.weight"])
    if "embeds.pos_embed" in theirs:
        ours["position.table"] = theirs["embeds.pos_embed"].flatten(0, 2)
    elif "embeds.pos_embed_y" in theirs:
        ours["position.row.table"] = theirs["embeds.pos_embed_y"][0]
        ours["position.column.table"] = theirs["embeds.pos_embed_x"][0]
    if "rope.freqs" in theirs:
        by_axis = theirs["rope.freqs"].unbind()
        by_axis = by_axis if model.rope.grid_indexing == "ij" else by_axis[::-1]
        ours["rotary.learned"] = torch.stack(by_axis, 1).flatten()
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
    for key in [key for key in theirs if key.endswith(tuple(_SCALED))]:
        scale = next(scale for scale in _SCALED if key.endswith(scale))
        # In float64, so that the product is rounded once.
        gamma = theirs.pop(key).double()
        layer = key.removesuffix(scale) + _SCALED[scale]
        theirs[f"{layer}.weight"] = gamma[:, None] * theirs[f"{layer}.weight"]
        if f"{layer}.bias" in theirs:
            theirs[f"{layer}.bias"] = gamma * theirs[f"{layer}.bias"]


def _order_pairs(model: Any, theirs: dict[str, Tensor]) -> None:
    """Puts the dimensions that a rotary model turns together where ours are, in the dictionary.

    Scores are sums over dimensions, whose order is free as long as queries and keys share it.
    """
    if model.rope is None:
        return
    attention = model.blocks[0].attn
    width = attention.head_dim
    # Pairs are neighbours, or dimensions half a head apart as ours; those of the first axis first.
    pairs = (
        torch.arange(width).view(2, -1)
        if attention.rotate_half
        else torch.arange(width).view(-1, 2).T
    )
    if model.rope.grid_indexing == "xy" and not hasattr(model.rope, "freqs"):
        pairs = pairs.roll(width // 4, dims=1)
    order = pairs.flatten()
    for key in list(theirs):
        if key.endswith((".attn.qkv.weight", ".attn.qkv.bias")):
            q, k, v = theirs[key].unflatten(0, (3, -1, width))
            theirs[key] = torch.stack([q[:, order], k[:, order], v]).flatten(0, 2)
        elif ".attn.q_norm." in key or ".attn.k_norm." in key:
            theirs[key] = theirs[key][order]


def _pixels_first(embeds: Any, weight: Tensor) -> Tensor:
    """The patch embedding over pixels row by row, channels last, as packed patches are."""
    if weight.ndim == 2:
        if getattr(embeds, "channels_last", True):
            return weight
        weight = weight.unflatten(1, (3, *embeds.patch_size))
    return weight.permute(0, 2, 3, 1).flatten(1)
