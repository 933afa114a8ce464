"""What a setting costs: the part of an entry that both harnesses report beside their scores."""

from __future__ import annotations

from collections import Counter
from typing import Any

from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.models import Model
from navit_clip.evaluation.settings import EvalSetting


def describe_setting(model: Model, data: Embedded, setting: EvalSetting) -> dict[str, Any]:
    """Plain values for JSON: which setting it is, and the tokens and FLOPs of an image at it.

    Args:
        model: Whose setting it is.
        data: Images embedded at it.
        setting: One of `data`.
    """
    lengths = data.lengths[setting]
    flops = sum(n * model.image_flops(tokens) for tokens, n in Counter(lengths).items())
    return {
        "view": setting.kind,
        "label": setting.label,
        "max_tokens": setting.max_tokens,
        "side": setting.side,
        "own": setting == model.own_setting,
        "mean_tokens": sum(lengths) / len(lengths),
        "padding": data.padding[setting],
        "flops_per_image": flops / len(lengths),
    }
