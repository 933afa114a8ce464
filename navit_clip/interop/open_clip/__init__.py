"""Released open_clip models into the packed towers, and back.

`NaViTCLIP.from_open_clip` and `to_open_clip` lead here. At a model's own square size the packed
towers give open_clip's embeddings; at any other they interpolate its positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from navit_clip.errors import UserError
from navit_clip.inference.preprocess import Preprocess
from navit_clip.interop.open_clip.architecture import (
    check_family,
    clip_config,
    model_config,
    supported_models,
)
from navit_clip.interop.open_clip.checkpoint import (
    download,
    fit_checkpoint,
    initial_state,
    read_checkpoint,
    tag_config,
)
from navit_clip.interop.open_clip.names import model_pairs, to_ours, to_theirs
from navit_clip.interop.open_clip.tokenizer import own_tokenizer
from navit_clip.models.clip import CLIP, CLIPConfig
from navit_clip.tokenizers.base import Tokenizer

__all__ = ["Parts", "config_of", "load", "state_for_open_clip", "supported_models"]

Weights = str | Path | None


class Parts(NamedTuple):
    """What a packed model is assembled of.

    Attributes:
        config: The architecture.
        state: Its weights under our names.
        tokenizer: Its own; None where that is not on this machine and no tag was named.
        preprocess: Images at the model's own square size, in patches.
    """

    config: CLIPConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer | None
    preprocess: Preprocess


def load(name: str, pretrained: Weights = None) -> Parts:
    """An open_clip model as the parts of a packed one; see `NaViTCLIP.from_open_clip`."""
    values = model_config(name)
    tag = tag_config(name, str(pretrained)) if pretrained is not None else None
    config = config_of(name, pretrained)
    path = None
    if pretrained is not None:
        path = download(name, str(pretrained), tag) if tag else _local(name, pretrained)
    # Before our model draws anything, so that a seed gives the weights that it gives in open_clip.
    state = initial_state(name) if path is None else read_checkpoint(path)
    with torch.device("meta"):  # shapes alone
        expected = state_for_open_clip(CLIP(config))
    state = fit_checkpoint(str(path or "open_clip"), name, state, expected)
    return Parts(
        config,
        to_ours(model_pairs(config), state),
        own_tokenizer(values["text_cfg"], path, download=tag is not None),
        Preprocess(config.image.position.table_side**2),
    )


def config_of(name: str, pretrained: Weights = None) -> CLIPConfig:
    """Our configuration of an open_clip model, with the pixel statistics of its weights.

    Args:
        name: As `NaViTCLIP.from_open_clip` takes it.
        pretrained: Likewise; nothing is read or downloaded, only a tag is looked up.

    Raises:
        UserError: If the model is not supported.
    """
    values = model_config(name)
    tag = tag_config(name, str(pretrained)) if pretrained is not None else None
    return clip_config(values, *_pixel_statistics(name, tag))


def state_for_open_clip(model: CLIP) -> dict[str, Tensor]:
    """A model's parameters as open_clip has them; see `NaViTCLIP.to_open_clip`."""
    check_family(model.config)
    ours = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    return to_theirs(model_pairs(model.config), ours)


def _local(name: str, pretrained: str | Path) -> Path:
    import open_clip

    path = Path(pretrained)
    if not path.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"no weights {pretrained} for {name}: neither a file nor an open_clip tag ({tags})"
        )
    return path


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
