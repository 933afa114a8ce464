"""open_clip's weights from its initialisation, a local file or a download; data only, never code.

Tensors keep open_clip's names here; `names` maps them to ours.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from navit_clip.errors import UserError


def initial_state(name: str) -> dict[str, Tensor]:
    """The weights that open_clip gives a new model of this name, from torch's generator."""
    import open_clip

    return open_clip.create_model(name, load_weights=False).state_dict()


def tag_config(name: str, tag: str) -> dict[str, Any] | None:
    """open_clip's entry for released weights, with their preprocessing; None if there is none.

    Raises:
        UserError: If the weights were trained with the other activation than the model's.
    """
    import open_clip

    values = open_clip.get_pretrained_cfg(name, tag)
    if not values:
        return None
    model_quick = open_clip.get_model_config(name).get("quick_gelu", False)
    if values.get("quick_gelu", False) != model_quick:
        other = name.removesuffix("-quickgelu") if model_quick else f"{name}-quickgelu"
        raise UserError(
            f"the weights {tag} of {name} were trained {'without' if model_quick else 'with'} "
            f"QuickGELU: load them as {other}"
        )
    return values


def download(name: str, tag: str, values: dict[str, Any]) -> Path:
    """Fetches released weights as open_clip does, into its cache.

    Raises:
        UserError: If they cannot be had.
    """
    import open_clip

    try:
        return Path(open_clip.download_pretrained(values))
    # Each of open_clip's ways to fetch has its own errors, and there are several.
    except Exception as error:
        raise UserError(
            f"cannot download the weights {tag} of {name}: {_brief(error)}; "
            "name a local checkpoint instead"
        ) from error


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Reads a checkpoint through open_clip's loader, which unpickles nothing but tensors.

    Args:
        path: A safetensors file by its suffix, or one of `torch.save`; of a state or of
            open_clip's trainer.

    Raises:
        UserError: If the file is missing, damaged, or holds anything else.
    """
    from open_clip.factory import load_state_dict

    try:
        state = load_state_dict(str(path), weights_only=True)
    # A damaged or hostile file fails anywhere inside torch's reader, with any error.
    except Exception as error:
        raise UserError(f"cannot read weights from {path}: {_brief(error)}") from error
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"cannot read weights from {path}: {key} is no tensor")
    return state


def fit_checkpoint(
    source: str, name: str, state: dict[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Checks that weights are this model's, down to the last one.

    Args:
        source: Where it was read, for messages.
        name: The model's, for messages.
        state: The checkpoint's tensors.
        expected: The model's tensors, whatever their values.

    Returns:
        `state`, with every tensor shaped as the model has it.

    Raises:
        UserError: If a tensor is missing, has another shape, or is unknown to the model.
    """
    state = {
        # Scalars were vectors of one number for a time.
        key: tensor.reshape(()) if key.startswith("logit_") and tensor.numel() == 1 else tensor
        for key, tensor in state.items()
    }
    misfit = f"the weights of {source} do not fit {name}"
    if missing := sorted(expected.keys() - state.keys()):
        raise UserError(f"{misfit}: they lack {_first(missing)}")
    if unknown := sorted(state.keys() - expected.keys()):
        raise UserError(f"{misfit}, which has no {_first(unknown)}")
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise UserError(
                f"{misfit}: {key} is {list(state[key].shape)} in the file, "
                f"{list(tensor.shape)} in the model"
            )
    return state


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _brief(error: Exception) -> str:
    """One line of an error that may have many."""
    return textwrap.shorten(str(error) or type(error).__name__, 300)
