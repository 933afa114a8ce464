"""The optimiser, AdamW or another, with decay where it belongs and a learning rate by depth.

`navit_clip.training.schedule` says how the learning rate moves over the steps, the groups here how
it differs between parameters; others than AdamW are made by `optimizers`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from navit_clip.errors import UserError
from navit_clip.tasks.base import Task
from navit_clip.training.optimizers import ADAMW, check_optimizer, make_optimizer
from navit_clip.training.schedule import ScheduleConfig


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its learning rate.

    Attributes:
        name: ``adamw``, any of timm's (`timm.optim.list_optimizers`: lion, lamb, muon, sgd, …, with
            the defaults of its `create_optimizer_v2`), or a class of PyTorch's such as
            ``torch.SGD``. Those of muon take it for the matrices of linear layers below the head,
            AdamW for the rest.
        lr: Peak learning rate.
        betas: Of adamw: decay of the first and second moment.
        eps: Of adamw: added to the root of the second moment.
        args: Further arguments of the optimiser by name, such as {momentum: 0.9}; betas and eps of
            another than adamw too.
        weight_decay: Decay of matrices and tables, decoupled unless the optimiser has another kind
            (sgd adds it to the gradient); norms, biases, probe and scale have none.
        head_weight_decay: That of a head over classes instead; null is `weight_decay`.
        layer_decay: Each layer of a tower learns at this share of the rate of the one above it
            (BEiT): final norm, pooling, projection and scale at the full rate, embeddings slowest.
            1 trains all alike; fine-tuning takes 0.65 to 0.9.
        clip_norm: Gradients are scaled down to this global norm; 0 leaves them alone.
        schedule: Course of the learning rate over the steps.
    """

    name: str = ADAMW
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    args: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.1
    head_weight_decay: float | None = None
    layer_decay: float = 1.0
    clip_norm: float = 1.0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        for name in ("weight_decay", "head_weight_decay"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {self.layer_decay}")
        if self.clip_norm < 0:
            raise ValueError(f"clip_norm must not be negative, got {self.clip_norm}")
        check_optimizer(self.name, self.args)


def build_optimizer(
    model: nn.Module, config: OptimConfig, task: Task
) -> tuple[torch.optim.Optimizer, list[float]]:
    """An optimiser of the parameters that are trained, in groups by learning rate and decay.

    Decay is for matrices and tables only. Scalars have a group of their own: under FSDP they are
    not sharded, and no operator takes sharded and other tensors together.

    Args:
        model: Possibly sharded.
        config: Of the optimiser.
        task: Says of a parameter, by its name, how many layers stand above it and whether it is of
            a head.

    Returns:
        The optimiser, and what the learning rate of each of its groups is multiplied by.

    Raises:
        UserError: If this optimiser cannot be used, see `make_optimizer`, or there is a decay for
            heads and no head.
    """
    heads = {name for name, _ in model.named_parameters() if task.is_head(name)}
    if config.head_weight_decay is not None and not heads:
        raise UserError("optim.head_weight_decay: the model has no head: leave it out")
    hidden = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    hidden -= {parameter for name, parameter in model.named_parameters() if name in heads}
    muon = config.name.endswith("muon")
    # By what a parameter is, not by the value of its decay, which may change when a run goes on.
    groups: dict[tuple[float, bool, int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = config.layer_decay ** task.layers_above(name)
            fallback = muon and parameter not in hidden
            # Windows' attention has a table of biases, which Swin does not decay either.
            ndim = min(parameter.ndim, 1 if name.endswith(".bias") else 2)
            kind = (factor, name in heads, ndim, fallback)
            groups.setdefault(kind, []).append(parameter)
    head_decay = config.head_weight_decay
    if head_decay is None:
        head_decay = config.weight_decay
    options: list[dict[str, Any]] = []
    for (_, head, ndim, fallback), group in groups.items():
        decay = head_decay if head else config.weight_decay
        options.append({"params": group, "weight_decay": decay if ndim == 2 else 0.0})
        if fallback:
            options[-1]["use_fallback"] = True  # AdamW in timm's Muon
    factors = [factor for factor, *_ in groups]
    if config.name != ADAMW:
        return make_optimizer(config.name, options, config.lr, config.args), factors
    args: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "fused": True}
    if config.args:
        return make_optimizer(ADAMW, options, config.lr, args | config.args), factors
    return torch.optim.AdamW(options, lr=config.lr, **args), factors
