"""Released open_clip models into the packed towers, and back.

`NaViTCLIP.from_open_clip` and `to_open_clip` lead here. At a model's own square size the packed
towers give open_clip's embeddings; at any other they interpolate its positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from navit_clip.inference.preprocess import Preprocess
from navit_clip.interop.families import check_family
from navit_clip.interop.open_clip.architecture import (
    clip_config,
    model_config,
    supported_models,
)
from navit_clip.interop.open_clip.assets import (
    Weights,
    find_checkpoint,
    own_tokenizer,
    read_checkpoint,
    tag_config,
)
from navit_clip.interop.open_clip.names import model_pairs
from navit_clip.interop.weights import fit_checkpoint, to_ours, to_theirs
from navit_clip.models.clip import CLIP, CLIPConfig
from navit_clip.tokenizers.base import Tokenizer

__all__ = ["config_of", "load", "state_for_open_clip", "supported_models"]

Model = TypeVar("Model", bound=CLIP)


def load(
    name: str,
    pretrained: Weights,
    build: Callable[[CLIPConfig, Tokenizer | None, Preprocess], Model],
) -> Model:
    """An open_clip model as a packed one; see `NaViTCLIP.from_open_clip`.

    `build` makes the model that the weights are loaded into. It gets None for a tokenizer that is
    not on this machine where no tag was named.
    """
    import open_clip

    config, tag = config_of(name, pretrained), tag_config(name, pretrained)
    path = find_checkpoint(name, pretrained, tag)
    # Before our model draws anything, so that a seed gives the weights that it gives in open_clip.
    if path is None:
        state = open_clip.create_model(name, load_weights=False).state_dict()
    else:
        state = read_checkpoint(path)
    with torch.device("meta"):  # shapes alone
        expected = state_for_open_clip(CLIP(config))
    state = fit_checkpoint(str(path or "open_clip"), name, state, expected)
    tokenizer = own_tokenizer(model_config(name)["text_cfg"], path, download=tag is not None)
    model = build(config, tokenizer, Preprocess(config.image.position.table_side**2))
    model.load_state_dict(to_ours(model_pairs(config), state))
    return model


def config_of(name: str, pretrained: Weights = None) -> CLIPConfig:
    """Our configuration of an open_clip model, with the pixel statistics of its weights.

    Args:
        name: As `NaViTCLIP.from_open_clip` takes it.
        pretrained: Likewise; nothing is read or downloaded, only a tag is looked up.

    Raises:
        UserError: If the model is not supported.
    """
    values = model_config(name)
    return clip_config(values, *_pixel_statistics(name, tag_config(name, pretrained)))


def state_for_open_clip(model: CLIP) -> dict[str, Tensor]:
    """A model's parameters as open_clip has them; see `NaViTCLIP.to_open_clip`."""
    check_family(model.config, "open_clip")
    ours = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    return to_theirs(model_pairs(model.config), ours)


def _pixel_statistics(
    name: str, tag: dict[str, Any] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that the weights were trained with.

    A file does not say; if all released weights of the model agree, it has theirs, and open_clip's
    default otherwise.
    """
    import open_clip
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    default = OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    if tag is not None:
        return tuple(tag.get("mean", default[0])), tuple(tag.get("std", default[1]))
    known = {
        _pixel_statistics(name, open_clip.get_pretrained_cfg(name, other))
        for other in open_clip.list_pretrained_tags_by_model(name)
    }
    return known.pop() if len(known) == 1 else default
