"""What timm's ViTs are made of, as the packed encoder's configuration and names.

Two kinds of image tower come from timm: SigLIP's in open_clip, and NaFlex ViTs.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from navit_clip.errors import UserError
from navit_clip.models.transformer import EncoderConfig

ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}

# Layers of ours and theirs; weight and bias have the same names in both.
TOWER = {
    "encoder.norm": "norm",
    "pool.q": "attn_pool.q",
    "pool.kv": "attn_pool.kv",
    "pool.out": "attn_pool.proj",
    "pool.norm": "attn_pool.norm",
    "pool.mlp.up": "attn_pool.mlp.fc1",
    "pool.mlp.down": "attn_pool.mlp.fc2",
}
BLOCK = {
    "attention_norm": "norm1",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp_norm": "norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}


def encoder_config(model: Any) -> EncoderConfig:
    """The encoder of one of timm's ViTs, read off the module itself: a name says nothing.

    Raises:
        UserError: If the packed encoder has no such activation.
    """
    block, width = model.blocks[0], model.embed_dim
    activation: Any = ACTIVATIONS.get(type(block.mlp.act).__name__)
    if activation is None:
        raise UserError(f"the packed towers have no activation {type(block.mlp.act).__name__}")
    if getattr(block.mlp.act, "approximate", "none") == "tanh":  # of torch's own GELU
        activation = "gelu_tanh"
    return EncoderConfig(
        width=width,
        depth=len(model.blocks),
        heads=block.attn.num_heads,
        mlp_ratio=mlp_ratio(block.mlp.fc1.out_features, width),
        qk_norm=not isinstance(block.attn.q_norm, nn.Identity),
        qkv_bias=block.attn.qkv.bias is not None,
        norm_bias=block.norm1.bias is not None,
        mlp_bias=block.mlp.fc1.bias is not None,
        activation=activation,
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        final_norm=not isinstance(model.norm, nn.Identity),
        norm_eps=block.norm1.eps,
    )


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio whose product with the width, cut to an integer, is the hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
