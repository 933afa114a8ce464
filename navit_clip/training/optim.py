"""The optimiser: AdamW, with decay where it belongs and a learning rate by depth.

`navit_clip.training.schedule` says how the learning rate moves over the steps, the groups here how
it differs between parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from navit_clip.training.schedule import ScheduleConfig


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate.

    Attributes:
        lr: Peak learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of matrices and tables; norms, biases, probe and scale have
            none.
        layer_decay: Each layer of a tower learns at this share of the rate of the one above it
            (BEiT): final norm, pooling, projection and scale at the full rate, embeddings slowest.
            1 trains all alike; fine-tuning takes 0.65 to 0.9.
        clip_norm: Gradients are scaled down to this global norm; 0 leaves them alone.
        schedule: Course of the learning rate over the steps.

    Raises:
        ValueError: If a field is out of range; the message names it.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.1
    layer_decay: float = 1.0
    clip_norm: float = 1.0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr must be positive, got {self.lr}")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay must not be negative, got {self.weight_decay}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay must lie in (0, 1], got {self.layer_decay}")
        if self.clip_norm < 0:
            raise ValueError(f"optim.clip_norm must not be negative, got {self.clip_norm}")


def build_optimizer(
    model: nn.Module, config: OptimConfig, layers_above: Callable[[str], int]
) -> tuple[torch.optim.AdamW, list[float]]:
    """AdamW over the parameters that are trained, in groups by learning rate and decay.

    Decay is for matrices and tables only. Scalars have a group of their own: under FSDP they are
    not sharded, and no operator takes sharded and other tensors together.

    Args:
        model: Possibly sharded.
        config: Of the optimiser.
        layers_above: How many layers stand above a parameter, by its name.

    Returns:
        The optimiser, and what the learning rate of each of its groups is multiplied by.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = config.layer_decay ** layers_above(name)
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((factor, decay, parameter.ndim == 0), []).append(parameter)
    options = [{"params": group, "weight_decay": decay} for (_, decay, _), group in groups.items()]
    optimizer = torch.optim.AdamW(
        options, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
    return optimizer, [factor for factor, _, _ in groups]
