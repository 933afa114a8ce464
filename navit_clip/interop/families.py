"""The two families of models that other libraries have: what is fixed in each, as our switches.

One table for each family, read on the way in to build a configuration and on the way out to check
one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from navit_clip.configs import config_from_dict
from navit_clip.errors import UserError
from navit_clip.models.clip import CLIPConfig

# big_vision leaves the scale of its sigmoid loss free, and released ones are past CLIP's 100.
SIGMOID_MAX_SCALE = 1000.0

_BOTH = {
    "image.position.kind": "learned_1d",
    "image.rotary.kind": "none",
    "image.registers": 0,
    "image.stem": "none",
    "image.pooled_norm": False,
    "image.encoder.qk_norm": False,
    "image.encoder.qkv_bias": True,
    "image.encoder.norm_bias": True,
    "image.encoder.mlp_bias": True,
    "image.encoder.final_norm": True,
    "text.position": "learned",
    "text.rotary.kind": "none",
    "text.pooling": "last",
    "text.encoder.qk_norm": False,
    "text.encoder.qkv_bias": True,
    "text.encoder.norm_bias": True,
    "text.encoder.mlp_bias": True,
    "text.encoder.final_norm": True,
    "text.encoder.pre_norm": False,
}
CLIP = {
    **_BOTH,
    "image.pooling": "cls",
    "image.class_position": True,
    "image.patch_bias": False,
    "image.encoder.pre_norm": True,
    "text.fill_context": False,
    "text.encoder.causal": True,
    "image_projection": "linear",
    "text_projection": "linear",
}
SIGLIP = {
    **_BOTH,
    "image.pooling": "map",
    "image.class_position": False,
    "image.patch_bias": True,
    "image.encoder.pre_norm": False,
    "text.fill_context": True,
    "text.encoder.causal": False,
    "image_projection": "none",
}


def build_config(switches: Mapping[str, Any]) -> CLIPConfig:
    """A configuration from values by dotted path, such as ``image.encoder.width``."""
    nested: dict[str, Any] = {}
    for path, value in switches.items():
        *parts, field = path.split(".")
        config = nested
        for part in parts:
            config = config.setdefault(part, {})
        config[field] = value
    return config_from_dict(CLIPConfig, nested)


def check_family(config: CLIPConfig, library: str) -> None:
    """Refuses a model of which a library has no counterpart.

    Raises:
        UserError: Naming the first switch that stands in the way.
    """
    family, fixed = ("CLIP", CLIP) if config.image.pooling == "cls" else ("SigLIP", SIGLIP)
    for path, expected in fixed.items():
        value = attrgetter(path)(config)
        if value != expected:
            raise UserError(
                f"{library}'s {family} models have {path}={json.dumps(expected)}, this model has "
                f"{json.dumps(value)}: it cannot be exported to {library}"
            )
