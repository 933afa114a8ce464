"""Which of timm's NaFlex ViTs the packed image tower can be, and why it cannot be the others."""

from __future__ import annotations

from typing import Any

from torch import nn

from navit_clip.errors import UserError
from navit_clip.models.pooling import Pooling

POOLINGS: dict[str, Pooling] = {"avg": "mean", "map": "map", "token": "cls"}
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}
_INTERPOLATIONS = ("bilinear", "bicubic")


def naflex_module() -> Any:
    """Timm's module of NaFlex ViTs.

    Raises:
        UserError: If timm is missing or has none.
    """
    try:
        from timm.models import naflexvit
    except ImportError as error:
        raise UserError("NaFlex models need timm 1.0.16 or newer: pip install -U timm") from error
    return naflexvit


def is_naflex(model: object) -> bool:
    """Whether a module is timm's NaFlex ViT, as `visual.trunk` of an open_clip model is."""
    return isinstance(model, naflex_module().NaFlexVit)


def unsupported(model: Any) -> str:
    """Why the packed image tower cannot be this model; empty if it can."""
    if not is_naflex(model):
        return "it is no NaFlex ViT from timm"
    return _embedding_reason(model) or _encoder_reason(model) or _pooling_reason(model)


def _embedding_reason(model: Any) -> str:
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
    rows, columns = table_sides(embeds)
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


def _encoder_reason(model: Any) -> str:
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
        if type(block.mlp.act).__name__ not in ACTIVATIONS:
            return f"its activation is {type(block.mlp.act).__name__}"
    named = [module for path, module in model.named_modules() if "norm" in path.split(".")[-1]]
    norms = [norm for norm in named if not isinstance(norm, nn.Identity)]
    if any(not isinstance(norm, nn.LayerNorm) or norm.weight is None for norm in norms):
        return "it has norms other than LayerNorm with weights"
    if len({(norm.eps, norm.bias is None) for norm in norms}) > 1:
        return "its LayerNorms differ in epsilon or bias"
    return ""


def _pooling_reason(model: Any) -> str:
    if model.global_pool not in POOLINGS:
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


def table_sides(embeds: Any) -> tuple[int, int]:
    """Rows and columns of the table of positions."""
    if embeds.pos_embed_type == "learned":
        return embeds.pos_embed.shape[1], embeds.pos_embed.shape[2]
    return embeds.pos_embed_y.shape[1], embeds.pos_embed_x.shape[1]
