"""One optimiser step: both towers, the loss, the backward pass, the update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from navit_clip.clip import CLIPOutput, NaViTCLIP
from navit_clip.loss import sigmoid_contrastive_loss, softmax_contrastive_loss
from navit_clip.packing import PackedBatch
from navit_clip.ranks import Ranks
from train.config import LossConfig, OptimConfig, TrainConfig
from train.schedule import lr_share


class NonFiniteLossError(Exception):
    """The loss or the gradient is no longer a number; no update was made."""


@dataclass(frozen=True)
class StepResult:
    """What one step found.

    Attributes:
        loss: Over the pairs of all ranks.
        grad_norm: Global norm of the gradient before clipping.
        lr: Learning rate of the step.
        logit_scale: Factor on similarities before the step.
    """

    loss: float
    grad_norm: float
    lr: float
    logit_scale: float


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and tables only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def contrastive_loss(output: CLIPOutput, config: LossConfig) -> Tensor:
    """The configured loss over the pairs of all ranks."""
    if config.kind == "softmax":
        return softmax_contrastive_loss(
            output.image_ED, output.text_ED, output.logit_scale, chunk_size=config.chunk_size
        )
    assert output.logit_bias is not None  # checked by TrainConfig
    return sigmoid_contrastive_loss(
        output.image_ED,
        output.text_ED,
        output.logit_scale,
        output.logit_bias,
        chunk_size=config.chunk_size,
    )


class Stepper:
    """A model, its optimiser, and how a batch moves them.

    Args:
        model: On the ranks' device.
        config: Of the run.
        ranks: This process among all of them.
    """

    def __init__(self, model: NaViTCLIP, config: TrainConfig, ranks: Ranks) -> None:
        self.model, self.config, self.ranks = model, config, ranks
        self.optimizer = build_optimizer(model, config.optim)
        self._forward: nn.Module = model
        if ranks.world_size > 1:
            self._forward = DistributedDataParallel(model)

    def step(self, batch: PackedBatch, step: int) -> StepResult:
        """Takes one step.

        Args:
            batch: This rank's pairs, on its device.
            step: Number of the step, from 0.

        Raises:
            NonFiniteLossError: If loss or gradient is not finite, the same on all ranks.
        """
        config, optim = self.config, self.config.optim
        lr = optim.lr * lr_share(optim.schedule, step, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(
            self.ranks.device.type, torch.bfloat16, enabled=config.precision == "bf16"
        ):
            output = cast(CLIPOutput, self._forward(batch))
        loss = contrastive_loss(output, config.loss)
        # DDP averages gradients over ranks; the loss of all pairs needs their sum.
        (loss * self.ranks.world_size).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), optim.clip_norm or math.inf)
        result = StepResult(loss.item(), norm.item(), lr, output.logit_scale.item())
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise NonFiniteLossError(f"loss {result.loss}, gradient norm {result.grad_norm}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.clamp_scale()
        return result
