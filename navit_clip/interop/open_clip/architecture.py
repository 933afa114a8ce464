"""open_clip's model configurations as ours, and why some have no counterpart.

Two families are known: CLIP (open_clip's own ViT with a class token, causal text) and SigLIP
(timm's ViT with attention pooling, text that attends to its padding).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from navit_clip.errors import UserError
from navit_clip.interop.families import CLIP, SIGLIP, SIGMOID_MAX_SCALE, build_config
from navit_clip.interop.timm_vit import encoder_config
from navit_clip.models.clip import CLIPConfig

OPEN_CLIP_EPS = 1e-5  # of its LayerNorms, where norm_kwargs name no other

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
    """Our configuration of a model that `model_config` accepted, with these pixel statistics."""
    switches: dict[str, Any] = {
        **(SIGLIP if is_siglip(values) else CLIP),
        **(_timm_image(values["vision_cfg"]) if is_siglip(values) else _clip_image(values)),
        **_text(values),
        "embed_dim": values["embed_dim"],
        "image.pixel_mean": mean,
        "image.pixel_std": std,
        "image.position.interpolation": "bicubic",
        "image.position.antialias": True,
    }
    if "init_logit_bias" in values:
        switches |= {"init_bias": float(values["init_logit_bias"]), "max_scale": SIGMOID_MAX_SCALE}
    return build_config(switches)


def _clip_image(values: Mapping[str, Any]) -> dict[str, Any]:
    from open_clip import CLIPVisionCfg

    image = CLIPVisionCfg(**values["vision_cfg"])
    return {
        "image.patch_size": image.patch_size,
        "image.position.table_side": image.image_size // image.patch_size,
        "image.encoder.width": image.width,
        "image.encoder.depth": image.layers,
        "image.encoder.heads": image.width // image.head_width,
        "image.encoder.mlp_ratio": float(image.mlp_ratio),
        "image.encoder.activation": "quick_gelu" if values.get("quick_gelu") else "gelu",
        "image.encoder.norm_eps": OPEN_CLIP_EPS,
    }


def _timm_image(image: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's own model has, built without memory."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    name = image["timm_model_name"]
    with torch.device("meta"):
        trunk = timm.create_model(name, num_classes=0, global_pool="map", weight_init="skip")
    if not isinstance(trunk, VisionTransformer):
        raise UserError(f"cannot load {name} of timm: it is no plain ViT")
    rows, columns = trunk.patch_embed.grid_size
    patch_rows, patch_columns = trunk.patch_embed.patch_size
    if rows != columns or patch_rows != patch_columns:
        raise UserError(f"cannot load {name} of timm: its images or patches are not square")
    encoder = asdict(encoder_config(trunk))
    return {
        "image.patch_size": patch_rows,
        "image.position.table_side": rows,
        **{f"image.encoder.{field}": value for field, value in encoder.items()},
    }


def _text(values: Mapping[str, Any]) -> dict[str, Any]:
    from open_clip import CLIPTextCfg

    text = CLIPTextCfg(**values["text_cfg"])
    activation = "quick_gelu" if values.get("quick_gelu") else "gelu"
    projection = "affine" if text.proj_bias else "linear"
    return {
        "text.vocab_size": text.vocab_size,
        "text.context_length": text.context_length,
        "text.encoder.width": text.width,
        "text.encoder.depth": text.layers,
        "text.encoder.heads": text.heads,
        "text.encoder.mlp_ratio": float(text.mlp_ratio),
        "text.encoder.activation": "gelu_tanh" if text.act_kwargs == _TANH else activation,
        "text.encoder.norm_eps": (text.norm_kwargs or {}).get("eps", OPEN_CLIP_EPS),
        "text_projection": "none" if text.proj_type == "none" else projection,
    }
