"""timm's NaFlex ViTs, SigLIP 2 NaFlex among them, as packed image towers.

timm pads images to one length and masks what is padding; the packed tower takes the same patches
without padding and gives the same vectors. What a model is made of is read off timm's own module,
never off its name. Three things are rewritten on the way, none of which changes what the tower
computes: layer scales are multiplied into the layers before them, a class token that pooling does
not read becomes a register, and the classifier is left out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from navit_clip.errors import UserError
from navit_clip.interop.naflex.convert import tower_config, tower_weights, without_head
from navit_clip.interop.naflex.supported import is_naflex, naflex_module, unsupported
from navit_clip.models.image_tower import ImageTower

__all__ = ["is_naflex", "naflex_image_tower", "supported_naflex_models"]


@cache
def supported_naflex_models() -> tuple[str, ...]:
    """Names of timm's NaFlex ViTs that the packed image tower can be."""
    import timm

    names = timm.list_models("naflexvit_*")
    # No switch depends on the number of blocks.
    return tuple(name for name in names if not unsupported(_skeleton(name, depth=1)))


def naflex_image_tower(
    model: nn.Module | str,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
) -> ImageTower:
    """A NaFlex ViT from timm as a packed image tower.

    Gives timm's pooled vectors for the same patches (`forward_head(..., pre_logits=True)`), of any
    grid. Dropout and the like are left out: they are settings of a training run.

    Args:
        model: timm's module, or its name, such as ``naflexvit_base_patch16_siglip``.
        state_dict: Its weights under timm's names; by default those of the module. A name needs
            some.
        pixel_mean: Mean per channel on [0, 1]; by default the one in timm's settings of the model.
        pixel_std: Standard deviation, likewise.

    Returns:
        The tower in evaluation mode, in float32 on the host.

    Raises:
        UserError: If the model has a feature that the tower lacks (the message names it and the
            models that are supported), or the weights are of another model.
    """
    name = model if isinstance(model, str) else type(model).__name__
    theirs = _skeleton(model) if isinstance(model, str) else model
    if reason := unsupported(theirs):
        supported = ", ".join(supported_naflex_models())
        raise UserError(f"cannot load {name}: {reason}; supported are {supported}")
    if state_dict is None:
        if isinstance(model, str):
            raise UserError(f"no weights for {name}: give state_dict, or timm's module itself")
        state_dict = theirs.state_dict()
    _check_weights(name, theirs, state_dict)
    settings = getattr(theirs, "pretrained_cfg", None) or {}
    tower = ImageTower(
        tower_config(
            theirs,
            pixel_mean or settings.get("mean", (0.5, 0.5, 0.5)),
            pixel_std or settings.get("std", (0.5, 0.5, 0.5)),
        )
    )
    tower.load_state_dict(tower_weights(theirs, state_dict))
    return tower.eval()


def _skeleton(name: str, **changes: Any) -> nn.Module:
    """Timm's module without memory for its weights."""
    import timm

    naflex_module()
    if name not in timm.list_models("naflexvit_*"):
        supported = ", ".join(supported_naflex_models())
        raise UserError(f"timm has no NaFlex model {name!r}; supported are {supported}")
    with torch.device("meta"):
        return timm.create_model(name, **changes)


def _check_weights(name: str, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuses weights whose names or shapes are not the model's, whatever their classifier."""
    expected = {key: value.shape for key, value in without_head(model.state_dict()).items()}
    given = {key: value.shape for key, value in without_head(state).items()}
    different = sorted(
        key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key)
    )
    if different:
        which = textwrap.shorten(", ".join(different), 150, placeholder=" ...")
        raise UserError(
            f"the weights are not of {name}: missing, unknown or of another shape are {which}"
        )
