"""The table of parameters: our name and transformers', and how each tensor lies on either side."""

from __future__ import annotations

from navit_clip.interop.weights import (
    FIRST,
    KERNEL,
    ONE_TOKEN,
    OTHER_ROWS,
    Layout,
    Pair,
    layers,
    tower_pairs,
)
from navit_clip.models.clip import CLIPConfig

_ONE_NUMBER = Layout(lambda x: x.reshape(()), lambda x: x.reshape(1))


def _third(index: int) -> Layout:
    """Queries, keys or values, which are rows of one tensor of ours."""
    return Layout(lambda x: x, lambda x: x.chunk(3)[index])


_QUERIES = Layout(lambda x: x.chunk(3)[0], lambda x: x)
_KEYS_VALUES = Layout(lambda x: x[len(x) // 3 :], lambda x: x)

_BLOCK = (
    *layers(
        {
            "attention_norm": "layer_norm1",
            "attention.out": "self_attn.out_proj",
            "mlp_norm": "layer_norm2",
            "mlp.up": "mlp.fc1",
            "mlp.down": "mlp.fc2",
        }
    ),
    *(
        Pair(f"attention.qkv.{part}", f"self_attn.{name}_proj.{part}", _third(index))
        for part in ("weight", "bias")
        for index, name in enumerate("qkv")
    ),
)
_BLOCKS = "encoder.layers", _BLOCK
_CLIP_IMAGE = (
    Pair("embed.weight", "embeddings.patch_embedding.weight", KERNEL),
    Pair("class_token", "embeddings.class_embedding"),
    Pair("class_position", "embeddings.position_embedding.weight", FIRST),
    Pair("position.table", "embeddings.position_embedding.weight", OTHER_ROWS),
    # The spelling is theirs.
    *layers({"encoder.pre_norm": "pre_layrnorm", "encoder.norm": "post_layernorm"}),
)
_SIGLIP_IMAGE = (
    Pair("embed.bias", "embeddings.patch_embedding.bias"),
    Pair("position.table", "embeddings.position_embedding.weight"),
    Pair("pool.probe", "head.probe", ONE_TOKEN),
    *(
        Pair(f"pool.{ours}.{part}", f"head.attention.in_proj_{part}", layout)
        for part in ("weight", "bias")
        for ours, layout in (("q", _QUERIES), ("kv", _KEYS_VALUES))
    ),
    *layers(
        {
            "encoder.norm": "post_layernorm",
            "pool.out": "head.attention.out_proj",
            "pool.norm": "head.layernorm",
            "pool.mlp.up": "head.mlp.fc1",
            "pool.mlp.down": "head.mlp.fc2",
        }
    ),
)
_KERNEL = Pair("embed.weight", "embeddings.patch_embedding.weight", KERNEL)
_PATCHES = Pair("embed.weight", "embeddings.patch_embedding.weight")  # SigLIP 2 cuts them itself
_TEXT = (
    Pair("token", "embeddings.token_embedding.weight"),
    Pair("position", "embeddings.position_embedding.weight"),
    *layers({"encoder.norm": "final_layer_norm"}),
)


def model_pairs(config: CLIPConfig, model_type: str) -> list[Pair]:
    """All parameters of a model of one of `architecture.MODEL_TYPES`."""
    depth = config.image.encoder.depth
    if model_type == "clip":
        image = _CLIP_IMAGE
        others = [
            Pair("image_projection.weight", "visual_projection.weight"),
            Pair("text_projection.weight", "text_projection.weight"),
            Pair("log_scale", "logit_scale"),
        ]
    else:
        image = (_KERNEL if model_type == "siglip" else _PATCHES, *_SIGLIP_IMAGE)
        others = [
            *layers({"text_projection": "text_model.head"}),
            Pair("log_scale", "logit_scale", _ONE_NUMBER),
            Pair("logit_bias", "logit_bias", _ONE_NUMBER),
        ]
    return [
        *tower_pairs("image.", "vision_model.", image, _BLOCKS, depth),
        *tower_pairs("text.", "text_model.", _TEXT, _BLOCKS, config.text.encoder.depth),
        *others,
    ]
