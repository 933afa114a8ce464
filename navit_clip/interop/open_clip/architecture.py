"""open_clip's model configurations as ours, and why some have no counterpart.

Two families are known: CLIP (open_clip's own ViT with a class token, causal text) and SigLIP
(timm's ViT with attention pooling, text that attends to its padding). What a family fixes is one
table, read on the way in to build a configuration and on the way out to check one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from navit_clip.configs import config_from_dict
from navit_clip.errors import UserError
from navit_clip.models.clip import CLIPConfig

OPEN_CLIP_EPS = 1e-5  # of its LayerNorms, where norm_kwargs name no other
# big_vision leaves the scale of its sigmoid loss free, and released ones are past CLIP's 100.
SIGMOID_MAX_SCALE = 1000.0

_ENCODER = {
    "qk_norm": False,
    "qkv_bias": True,
    "norm_bias": True,
    "mlp_bias": True,
    "final_norm": True,
}
_IMAGE = {"position": {"kind": "learned_1d"}, "registers": 0, "pooled_norm": False}
_CLIP: dict[str, Any] = {
    "image": {
        **_IMAGE,
        "pooling": "cls",
        "class_position": True,
        "patch_bias": False,
        "encoder": {**_ENCODER, "pre_norm": True},
    },
    "text": {
        "pooling": "last",
        "fill_context": False,
        "encoder": {**_ENCODER, "pre_norm": False, "causal": True},
    },
    "image_projection": "linear",
    "text_projection": "linear",
}
_SIGLIP: dict[str, Any] = {
    "image": {
        **_IMAGE,
        "pooling": "map",
        "class_position": False,
        "patch_bias": True,
        "encoder": {**_ENCODER, "pre_norm": False},
    },
    "text": {
        "pooling": "last",
        "fill_context": True,
        "encoder": {**_ENCODER, "pre_norm": False, "causal": False},
    },
    "image_projection": "none",
}

_TANH = {"approximate": "tanh"}
_CLEANING = {"clean": "canonicalize"}

_MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias"}
_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_CLIP_IMAGE_KEYS = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
_SIGLIP_IMAGE_KEYS = {
    "image_size",
    "timm_model_name",
    "timm_model_pretrained",
    "timm_pool",
    "timm_proj",
}
_SIGLIP_TEXT_KEYS = _TEXT_KEYS | {
    "hf_tokenizer_name",
    "tokenizer_kwargs",
    "no_causal_mask",
    "pool_type",
    "proj_bias",
    "proj_type",
    "norm_kwargs",
    "act_kwargs",
}


def supported_models() -> list[str]:
    """Names of open_clip's models that the packed towers can be."""
    import open_clip

    return [
        name for name in open_clip.list_models() if _refusal(open_clip.get_model_config(name)) == ""
    ]


def model_config(name: str) -> dict[str, Any]:
    """open_clip's configuration of a supported model.

    Raises:
        UserError: If the name is unknown, or the model is of neither family; the message has the
            reason and the names that are supported.
    """
    import open_clip

    values = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    reason = "open_clip has no such model" if values is None else _refusal(values)
    if reason:
        raise UserError(
            f"cannot load {name}: {reason}; supported are {', '.join(supported_models())}"
        )
    assert values is not None
    return values


def _refusal(values: Mapping[str, Any]) -> str:
    """Why the packed towers cannot be this model; empty if they can."""
    image, text = values["vision_cfg"], values["text_cfg"]
    if "multimodal_cfg" in values:
        return "CoCa has a decoder of captions, which the packed towers have not"
    if "hf_model_name" in text:
        return f"its text tower is {text['hf_model_name']} of Hugging Face, no CLIP text tower"
    if isinstance(image.get("layers"), list):
        return "its image tower is a ResNet, no ViT"
    if not is_siglip(values):
        if "timm_model_name" in image:
            return f"its image tower is {image['timm_model_name']} of timm, no plain ViT"
        if "hf_tokenizer_name" in text:
            return f"its captions go through the tokenizer {text['hf_tokenizer_name']}"
        return _unknown(values, _MODEL_KEYS, _CLIP_IMAGE_KEYS, _TEXT_KEYS)
    if (
        text.get("pool_type") != "last"
        or not text.get("no_causal_mask")
        or text.get("act_kwargs", _TANH) != _TANH
    ):
        return "its text tower is not SigLIP's"
    if "hf_tokenizer_name" not in text or text.get("tokenizer_kwargs") != _CLEANING:
        return "its tokenizer is not SigLIP's"
    return _unknown(values, _MODEL_KEYS | {"custom_text"}, _SIGLIP_IMAGE_KEYS, _SIGLIP_TEXT_KEYS)


def _unknown(values: Mapping[str, Any], model: set[str], image: set[str], text: set[str]) -> str:
    """Names a switch that no packed tower has."""
    for known, part in ((model, values), (image, values["vision_cfg"]), (text, values["text_cfg"])):
        for key in sorted(part.keys() - known):
            return f"the packed towers have no counterpart of {key}={part[key]}"
    return ""


def is_siglip(values: Mapping[str, Any]) -> bool:
    """Whether open_clip's configuration has a timm tower that pools by attention, as SigLIP."""
    image = values["vision_cfg"]
    return image.get("timm_pool") == "map" and image.get("timm_proj") == "none"


def clip_config(
    values: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...]
) -> CLIPConfig:
    """Our configuration of a model that `model_config` accepted.

    Args:
        values: open_clip's configuration.
        mean: Mean of pixels, per channel on [0, 1].
        std: Standard deviation, likewise.
    """
    siglip = is_siglip(values)
    image = _timm_image(values["vision_cfg"]) if siglip else _clip_image(values)
    image |= {"pixel_mean": mean, "pixel_std": std}
    image["position"] |= {"interpolation": "bicubic", "antialias": True}
    sizes: dict[str, Any] = {
        "embed_dim": values["embed_dim"],
        "image": image,
        "text": _text(values),
    }
    if siglip:
        sizes["text_projection"] = _text_projection(values["text_cfg"])
    if "init_logit_bias" in values:
        sizes["init_bias"] = float(values["init_logit_bias"])
        sizes["max_scale"] = SIGMOID_MAX_SCALE
    return config_from_dict(CLIPConfig, _merged(_SIGLIP if siglip else _CLIP, sizes))


def _merged(fixed: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**fixed, **sizes}
    for key in fixed.keys() & sizes.keys():
        merged[key] = _merged(fixed[key], sizes[key])
    return merged


def _clip_image(values: Mapping[str, Any]) -> dict[str, Any]:
    from open_clip import CLIPVisionCfg

    image = CLIPVisionCfg(**values["vision_cfg"])
    return {
        "patch_size": image.patch_size,
        "position": {"table_side": image.image_size // image.patch_size},
        "encoder": {
            "width": image.width,
            "depth": image.layers,
            "heads": image.width // image.head_width,
            "mlp_ratio": float(image.mlp_ratio),
            "activation": "quick_gelu" if values.get("quick_gelu") else "gelu",
            "norm_eps": OPEN_CLIP_EPS,
        },
    }


def _timm_image(image: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes read off timm's own model, built without memory: its name alone says nothing."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    name = image["timm_model_name"]
    with torch.device("meta"):
        trunk = timm.create_model(name, num_classes=0, global_pool="map", weight_init="skip")
    if not isinstance(trunk, VisionTransformer):
        raise UserError(f"cannot load {name} of timm: it is no plain ViT")
    block: Any = trunk.blocks[0]
    rows, columns = trunk.patch_embed.grid_size
    patch_rows, patch_columns = trunk.patch_embed.patch_size
    if rows != columns or patch_rows != patch_columns:
        raise UserError(f"cannot load {name} of timm: its images or patches are not square")
    return {
        "patch_size": patch_rows,
        "position": {"table_side": rows},
        "encoder": {
            "width": trunk.embed_dim,
            "depth": len(trunk.blocks),
            "heads": block.attn.num_heads,
            "mlp_ratio": block.mlp.fc1.out_features / trunk.embed_dim,
            "activation": _timm_activation(block.mlp.act),
            "norm_eps": trunk.norm.eps,
        },
    }


def _timm_activation(module: torch.nn.Module) -> str:
    from timm.layers.activations import GELU, GELUTanh

    if isinstance(module, GELUTanh):
        return "gelu_tanh"
    if isinstance(module, (GELU, torch.nn.GELU)):
        return "gelu"
    raise UserError(f"the packed towers have no activation {type(module).__name__}")


def _text(values: Mapping[str, Any]) -> dict[str, Any]:
    from open_clip import CLIPTextCfg

    text = CLIPTextCfg(**values["text_cfg"])
    activation = "quick_gelu" if values.get("quick_gelu") else "gelu"
    if text.act_kwargs == _TANH:
        activation = "gelu_tanh"
    return {
        "vocab_size": text.vocab_size,
        "context_length": text.context_length,
        "encoder": {
            "width": text.width,
            "depth": text.layers,
            "heads": text.heads,
            "mlp_ratio": float(text.mlp_ratio),
            "activation": activation,
            "norm_eps": (text.norm_kwargs or {}).get("eps", OPEN_CLIP_EPS),
        },
    }


def _text_projection(text: Mapping[str, Any]) -> str:
    if text.get("proj_type") == "none":
        return "none"
    return "affine" if text.get("proj_bias") else "linear"


def check_family(config: CLIPConfig) -> None:
    """Refuses a model of which open_clip has no counterpart.

    Raises:
        UserError: Naming the first switch that stands in the way.
    """
    family, fixed = ("CLIP", _CLIP) if config.image.pooling == "cls" else ("SigLIP", _SIGLIP)
    _check(config, fixed, f"open_clip's {family} models", "")


def _check(config: Any, fixed: Mapping[str, Any], whose: str, path: str) -> None:
    for name, expected in fixed.items():
        value = getattr(config, name)
        if isinstance(expected, Mapping):
            _check(value, expected, whose, f"{path}{name}.")
        elif value != expected:
            raise UserError(
                f"{whose} have {path}{name}={json.dumps(expected)}, this model has "
                f"{json.dumps(value)}: it cannot be exported to open_clip"
            )
