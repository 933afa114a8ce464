"""transformers' configurations of CLIP, SigLIP and SigLIP 2 as ours, and back.

A ``config.json`` leaves out what is as transformers' classes have it by default; those defaults are
a table here, so that reading one needs no transformers. SigLIP 2 of a fixed size has the model type
``siglip``; ``siglip2`` is NaFlex.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from navit_clip.errors import UserError
from navit_clip.interop.families import (
    CLIP,
    SIGLIP,
    SIGMOID_MAX_SCALE,
    build_config,
    check_family,
)
from navit_clip.interop.timm_vit import mlp_ratio
from navit_clip.models.clip import CLIPConfig
from navit_clip.models.transformer import EncoderConfig

MODEL_TYPES = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}
START_ID, END_ID = 49406, 49407  # of CLIP's tokenizer
# In configurations of before 2023, where it means the highest id of a text.
_HIGHEST_ID = 2

_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# Of transformers' configuration classes.
_CLIP_ENCODER = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP_ENCODER = {
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {
        "vision_config": {
            **_CLIP_ENCODER,
            "num_attention_heads": 12,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "image_size": 224,
            "patch_size": 32,
        },
        "text_config": {
            **_CLIP_ENCODER,
            "num_attention_heads": 8,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "vocab_size": 49408,
            "max_position_embeddings": 77,
            "eos_token_id": END_ID,
        },
    },
    "siglip": {
        "vision_config": {**_SIGLIP_ENCODER, "image_size": 224, "patch_size": 16},
        "text_config": {**_SIGLIP_ENCODER, "vocab_size": 32000, "max_position_embeddings": 64},
    },
    "siglip2": {
        "vision_config": {**_SIGLIP_ENCODER, "num_patches": 256, "patch_size": 16},
        "text_config": {**_SIGLIP_ENCODER, "vocab_size": 32000, "max_position_embeddings": 64},
    },
}


def read_config(
    values: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...]
) -> CLIPConfig:
    """Our configuration of a model, from transformers' values and its pixel statistics.

    Raises:
        UserError: If the packed towers have no such model; names what stands in the way.
        ValueError: If a value is impossible.
    """
    model_type = values["model_type"]
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"it is transformers' {model_type}, the packed towers can be {', '.join(MODEL_TYPES)}"
        )
    image, text = (_part(values, model_type, name) for name in ("vision_config", "text_config"))
    naflex, clip = model_type == "siglip2", model_type == "clip"
    if clip and text["eos_token_id"] not in (_HIGHEST_ID, END_ID):
        raise UserError(f"its texts end with the id {text['eos_token_id']}, CLIP's with {END_ID}")
    if not image.get("vision_use_head", True):
        raise UserError("its image tower has no pooling head (vision_use_head=false)")
    if image.get("num_channels", 3) != 3:
        raise UserError(f"its images have {image['num_channels']} channels, packed patches have 3")
    width = text["hidden_size"]
    patch = _side(image, "patch_size")
    switches = {
        **(CLIP if clip else SIGLIP),
        "image.patch_size": patch,
        "image.position.table_side": (
            _root(image["num_patches"]) if naflex else _side(image, "image_size") // patch
        ),
        "image.position.interpolation": "bilinear" if naflex else "bicubic",
        "image.position.antialias": naflex,
        "image.pixel_mean": mean,
        "image.pixel_std": std,
        **_encoder("image.encoder", image),
        "text.vocab_size": text["vocab_size"],
        "text.context_length": text["max_position_embeddings"],
        **_encoder("text.encoder", text),
    }
    if clip:
        return build_config({**switches, "embed_dim": values.get("projection_dim", 512)})
    return build_config(
        {
            **switches,
            "embed_dim": text.get("projection_size") or width,
            "text_projection": "affine",
            "init_bias": -10.0,
            "max_scale": SIGMOID_MAX_SCALE,
        }
    )


def write_config(config: CLIPConfig) -> dict[str, Any]:
    """Transformers' values of a model of ours; the way back of `read_config`.

    Raises:
        UserError: If transformers has no such model; names the switch that stands in the way.
    """
    check_family(config, "transformers")
    position, clip = config.image.position, config.image.pooling == "cls"
    naflex = not clip and position.interpolation == "bilinear"
    refusals = {
        "text_projection": not clip and config.text_projection != "affine",
        "init_bias": (config.init_bias is None) != clip,
        "image.position.keep_aspect": position.keep_aspect,
        "image.position.antialias": naflex and not position.antialias,
        "image.position.interpolation": clip and position.interpolation == "bilinear",
    }
    for name, refused in refusals.items():
        if refused:
            raise UserError(f"transformers has no model with this {name}: it cannot be exported")
    model_type = "clip" if clip else "siglip2" if naflex else "siglip"
    patch, side = config.image.patch_size, position.table_side
    image = {"patch_size": patch, **_their_encoder(config.image.encoder)}
    image |= {"num_patches": side**2} if naflex else {"image_size": side * patch}
    text = {
        "vocab_size": config.text.vocab_size,
        "max_position_embeddings": config.text.context_length,
        **_their_encoder(config.text.encoder),
    }
    values: dict[str, Any] = {
        "architectures": [MODEL_TYPES[model_type]],
        "model_type": model_type,
        "dtype": "float32",
    }
    if clip:
        values["projection_dim"] = config.embed_dim
        image["projection_dim"] = text["projection_dim"] = config.embed_dim
        text |= {"bos_token_id": START_ID, "eos_token_id": END_ID, "pad_token_id": END_ID}
    else:
        text["projection_size"] = config.embed_dim
    for name, part, kind in (("vision_config", image, "vision"), ("text_config", text, "text")):
        values[name] = {"model_type": f"{model_type}_{kind}_model", **part}
    return values


def _part(values: Mapping[str, Any], model_type: str, name: str) -> dict[str, Any]:
    """The values of a tower, defaults included."""
    defaults = _DEFAULTS[model_type][name]
    part = {**defaults, **(values.get(name) or {})}
    # What the first versions wrote beside the former, which wins, with defaults of its own.
    if (older := values.get(f"{name}_dict")) is not None:
        part |= {**defaults, **older}
    return part


def _side(part: Mapping[str, Any], name: str) -> int:
    value = part[name]
    sides = [*value] if isinstance(value, list) else [value]
    if len({*sides}) != 1:
        raise UserError(f"its {name} is not square: {value}")
    return int(sides[0])


def _root(count: int) -> int:
    side = math.isqrt(count)
    if side**2 != count:
        raise UserError(f"its table of {count} positions (num_patches) is not square")
    return side


def _encoder(path: str, part: Mapping[str, Any]) -> dict[str, Any]:
    activation = _ACTIVATIONS.get(part["hidden_act"])
    if activation is None:
        raise UserError(f"the packed towers have no activation {part['hidden_act']}")
    return {
        f"{path}.width": part["hidden_size"],
        f"{path}.depth": part["num_hidden_layers"],
        f"{path}.heads": part["num_attention_heads"],
        f"{path}.mlp_ratio": mlp_ratio(part["intermediate_size"], part["hidden_size"]),
        f"{path}.activation": activation,
        f"{path}.norm_eps": part["layer_norm_eps"],
    }


def _their_encoder(encoder: EncoderConfig) -> dict[str, Any]:
    (activation,) = (theirs for theirs, ours in _ACTIVATIONS.items() if ours == encoder.activation)
    return {
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.mlp_width,
        "hidden_act": activation,
        "layer_norm_eps": encoder.norm_eps,
    }
