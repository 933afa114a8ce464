"""What a view costs: the part of an entry that both harnesses report beside their scores."""

from __future__ import annotations

from collections import Counter
from typing import Any

from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.models import Model
from navit_clip.evaluation.settings import View


def describe_view(model: Model, data: Embedded, view: View) -> dict[str, Any]:
    """Plain values for JSON: which view it is, and the tokens and FLOPs of an image at it.

    Args:
        model: Whose view it is.
        data: Images embedded at it.
        view: One of `data`.
    """
    lengths = data.lengths[view]
    flops = sum(n * model.image_flops(tokens) for tokens, n in Counter(lengths).items())
    return {
        "view": view.kind,
        "label": view.label,
        "max_tokens": view.max_tokens,
        "side": view.side,
        "own": view == model.own_view,
        "mean_tokens": sum(lengths) / len(lengths),
        "padding": data.padding[view],
        "flops_per_image": flops / len(lengths),
    }
