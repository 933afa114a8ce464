"""What tasks with an image tower share: checks of sizes, preprocessing, depths of parameters."""

from __future__ import annotations

import re

from torch import nn

from navit_clip.data.config import DataConfig
from navit_clip.data.sizing import default_max_tokens
from navit_clip.inference.preprocess import Preprocess
from navit_clip.models.image_tower import ImageTowerConfig

_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")


def check_sizes(data: DataConfig, image: ImageTowerConfig) -> None:
    """Compares sizes of images and patches with what the tower takes.

    Raises:
        ValueError: If it cannot read patches of a size, or squares have more of them than allowed
            or than positions know; names the fields.
    """
    resolution = data.resolution
    for size in resolution.patch_sizes or [image.patch_size]:
        try:
            image.check_patch_size(size)
        except ValueError as error:
            raise ValueError(f"data.resolution.patch_sizes: {error}") from error
        square = max(1, resolution.max_side // size)
        if resolution.mode == "square" and (
            square**2 > resolution.max_tokens or square > image.position.max_grid_side
        ):
            raise ValueError(
                f"data.resolution.max_side={resolution.max_side} makes {square}×{square} patches, "
                f"past data.resolution.max_tokens={resolution.max_tokens} or "
                f"task.model.image.position.table_side={image.position.table_side}"
            )


def take_weights(model: nn.Module, source: nn.Module) -> None:
    """Copies weights into a model that may have rotary positions beside; see `InitConfig.check`."""
    model.load_state_dict({**model.state_dict(), **source.state_dict()})


def preprocess_of(data: DataConfig, image: ImageTowerConfig) -> Preprocess:
    """How a trained model wants its images: as large as the largest of training."""
    resolution = data.resolution
    return Preprocess(
        default_max_tokens(resolution, image.patch_size), square=resolution.mode == "square"
    )


def layers_above(name: str, depth: int) -> int:
    """How many layers of its tower stand above a parameter.

    Final norm and pooling have none above them; embeddings lie one layer below the first block.

    Args:
        name: Within the tower.
        depth: Blocks of the tower.
    """
    if name.startswith(("encoder.norm.", "pool.")):
        return 0
    block = _BLOCK.match(name)
    return depth - int(block[1]) if block else depth + 1
