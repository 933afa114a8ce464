"""LoRA: what a tower learns as products of two thin matrices, beside weights that stay as they are.

``y = W·x + alpha/rank · B·A·x`` for linear layers of the encoders (Hu et al., arXiv 2106.09685), by
peft. The task adds the adapters to its first weights and the trainer trains them like anything
else; `merge_adapters` makes a plain model of the weights for evaluation and export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from navit_clip.configs import config_from_dict
from navit_clip.errors import UserError
from navit_clip.files import reading
from navit_clip.models.clip import CLIP

RUN_LORA = "lora.json"  # in a checkpoint of a model with adapters
_LAYERS = ("qkv", "out", "up", "down")
_BASE = ".base_layer."  # peft's name of the layer that an adapter stands beside


@dataclass(frozen=True)
class LoraConfig:
    """Adapters (LoRA) beside linear layers of a tower, whose own weights then stay as they are.

    Attributes:
        image: Which layers of each block of the image tower have one, of ``qkv`` and ``out`` (in
            and out of attention), ``up`` and ``down`` (of the MLP); none leaves the tower alone.
        text: Likewise of the text tower.
        rank: Inner width of an adapter.
        alpha: What adapters add is multiplied by alpha / rank.
        dropout: Fraction of an adapter's inputs that is zeroed in training.

    Raises:
        ValueError: If a layer is unknown, or a number out of range.
    """

    image: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for tower, layers in self.towers.items():
            for layer in layers:
                if layer not in _LAYERS:
                    known = ", ".join(_LAYERS)
                    raise ValueError(f"{tower} may hold {known}, got {layer!r}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def towers(self) -> dict[str, list[str]]:
        """The layers of each tower that has adapters."""
        layers = {"image": self.image, "text": self.text}
        return {tower: names for tower, names in layers.items() if names}

    @property
    def scale(self) -> float:
        """What the adapters' products are multiplied by."""
        return self.alpha / self.rank

    def write(self, folder: Path) -> None:
        """Writes into a checkpoint what `read_lora` reads.

        Raises:
            OSError: If the disk does not take it.
        """
        if self.towers:
            (folder / RUN_LORA).write_text(json.dumps(asdict(self)))


def read_lora(folder: Path) -> LoraConfig | None:
    """The adapters of a checkpoint, None of one without.

    Raises:
        UserError: If the file is damaged.
    """
    path = folder / RUN_LORA
    if not path.is_file():
        return None
    with reading(path, ValueError, TypeError):
        return config_from_dict(LoraConfig, json.loads(path.read_text()), "lora")


def add_adapters(model: CLIP, config: LoraConfig) -> None:
    """Adds adapters that change nothing yet, and locks the towers that they stand in, in place.

    What they draw comes from PyTorch's generator.

    Raises:
        UserError: If peft is not installed.
    """
    if not config.towers:
        return
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "task.lora needs peft, which is not installed: pip install 'navit-clip[lora]'"
        ) from error
    for name, layers in config.towers.items():
        tower = getattr(model, name)
        tower.requires_grad_(False)
        adapter = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(layers),
        )
        peft.inject_adapter_in_model(adapter, tower.encoder)


def merge_adapters(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights of the plain model that computes what one with adapters does.

    Args:
        weights: Of the model with adapters, in full, by name.
        scale: Of the adapters.

    Returns:
        All weights by their names in a plain model; those without an adapter are not copied.
    """
    merged = {}
    for name, weight in weights.items():
        layer, base, kind = name.rpartition(_BASE)
        if ".lora_" in name:
            continue
        if base and kind == "weight":
            a_RC, b_DR = (weights[f"{layer}.lora_{side}.default.weight"] for side in "AB")
            weight = weight + scale * (b_DR @ a_RC)
        merged[name.replace(_BASE, ".")] = weight
    return merged
