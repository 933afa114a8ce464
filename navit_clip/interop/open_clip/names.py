"""The table of parameters: our name and open_clip's, and how each tensor lies on either side."""

from __future__ import annotations

from navit_clip.interop import timm_vit
from navit_clip.interop.weights import (
    FIRST,
    KERNEL,
    ONE_TOKEN,
    OTHER_ROWS,
    TRANSPOSED,
    Pair,
    layers,
    tower_pairs,
)
from navit_clip.models.clip import CLIPConfig

# Where a tower keeps its blocks, and one block's pairs.
OPEN_CLIP_BLOCKS = (
    "transformer.resblocks",
    (
        *layers({"attention_norm": "ln_1", "attention.out": "attn.out_proj"}),
        Pair("attention.qkv.weight", "attn.in_proj_weight"),
        Pair("attention.qkv.bias", "attn.in_proj_bias"),
        *layers({"mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}),
    ),
)
TIMM_BLOCKS = "blocks", layers(timm_vit.BLOCK)
CLIP_IMAGE = (
    Pair("embed.weight", "conv1.weight", KERNEL),
    Pair("class_token", "class_embedding"),
    Pair("class_position", "positional_embedding", FIRST),
    Pair("position.table", "positional_embedding", OTHER_ROWS),
    *layers({"encoder.pre_norm": "ln_pre", "encoder.norm": "ln_post"}),
)
TIMM_IMAGE = (  # with attention pooling, as SigLIP's
    Pair("embed.weight", "patch_embed.proj.weight", KERNEL),
    Pair("embed.bias", "patch_embed.proj.bias"),
    Pair("position.table", "pos_embed", FIRST),
    Pair("pool.probe", "attn_pool.latent", ONE_TOKEN),
    *layers(timm_vit.TOWER),
)
TEXT = (
    Pair("token", "token_embedding.weight"),
    Pair("position", "positional_embedding"),
    *layers({"encoder.norm": "ln_final"}),
)


def model_pairs(config: CLIPConfig) -> list[Pair]:
    """All parameters of a model of either family."""
    depth = config.image.encoder.depth
    if config.image.pooling == "cls":
        text = ""
        pairs = tower_pairs("image.", "visual.", CLIP_IMAGE, OPEN_CLIP_BLOCKS, depth)
        pairs.append(Pair("image_projection.weight", "visual.proj", TRANSPOSED))
    else:  # open_clip keeps the text beside a tower of timm's in a tower of its own
        text = "text."
        pairs = tower_pairs("image.", "visual.trunk.", TIMM_IMAGE, TIMM_BLOCKS, depth)
    pairs += tower_pairs("text.", text, TEXT, OPEN_CLIP_BLOCKS, config.text.encoder.depth)
    projection = f"{text}text_projection"
    if config.text_projection == "linear":
        pairs.append(Pair("text_projection.weight", projection, TRANSPOSED))
    elif config.text_projection == "affine":
        pairs += layers({"text_projection": projection})
    pairs.append(Pair("log_scale", "logit_scale"))
    if config.init_bias is not None:
        pairs.append(Pair("logit_bias", "logit_bias"))
    return pairs
