"""One optimiser step: both towers, the loss, the backward pass, the update.

`Stepper` holds everything that changes from step to step (weights, optimiser, moving average,
counters) and hands it to checkpoints as one state; how the ranks share it is
`navit_clip.training.parallel`'s business, and how several micro-batches become one step is
`navit_clip.training.gradcache`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from navit_clip.data.builders.pairs import PairInputs
from navit_clip.distributed import Ranks
from navit_clip.losses.contrastive import sigmoid_contrastive_loss, softmax_contrastive_loss
from navit_clip.models.clip import CLIP, CLIPOutput
from navit_clip.packed.batch import Batch
from navit_clip.training.config import LossConfig, TrainConfig
from navit_clip.training.ema import EMA
from navit_clip.training.freeze import lock_towers
from navit_clip.training.gradcache import cached_backward
from navit_clip.training.nonfinite import NonFinite, NonFiniteGuard, find_pairs
from navit_clip.training.optim import build_optimizer, parameter_groups, set_lr
from navit_clip.training.parallel import ParallelModel, clip_gradients, global_norm, whole
from navit_clip.training.schedule import lr_share


@dataclass(frozen=True)
class StepResult:
    """What one step found.

    Attributes:
        loss: Over the pairs of all ranks.
        grad_norm: Global norm of the gradient before clipping.
        lr: Learning rate of the step, where no layer has a lower one.
        logit_scale: Factor on similarities before the step.
        measured: If the step was to be measured: ``param_norm``, the global norm of the weights
            after it, and ``update_norm``, that of what it added to them.
        nonfinite: Set if the step was skipped.
    """

    loss: float
    grad_norm: float
    lr: float
    logit_scale: float
    measured: dict[str, float] = field(default_factory=dict)
    nonfinite: NonFinite | None = None


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
    """A model, its optimiser, and how batches move them.

    Args:
        model: On the ranks' device, the same on all of them; locked and sharded in place if so
            configured.
        config: Of the run.
        ranks: This process among all of them.

    Attributes:
        model: Its weights, possibly this rank's shards of them.
        optimizer: Of those weights.
        ema: Their moving average, if the run keeps one.
        guard: What happens at a non-finite step, and how many there were.
    """

    def __init__(self, model: CLIP, config: TrainConfig, ranks: Ranks) -> None:
        self.model, self.config, self.ranks = model, config, ranks
        lock_towers(model, config.lock)  # DDP waits for the gradient of all that it finds trainable
        self._parallel = ParallelModel(
            model, config.parallel, ranks, half_blocks=config.precision == "bf16"
        )
        self._groups = parameter_groups(model, config.optim)
        self.optimizer = build_optimizer(self._groups, config.optim)
        self.ema = EMA(model, config.ema.decay) if config.ema.decay else None
        self.guard = NonFiniteGuard(config.on_nonfinite, config.max_skipped_in_row)

    def step(
        self, batches: Sequence[Batch[PairInputs]], step: int, *, measure: bool = False
    ) -> StepResult:
        """Takes one step; every rank calls it with as many micro-batches.

        Args:
            batches: This rank's micro-batches, on its device; their pairs and those of all ranks
                are one batch to the loss.
            step: Number of the step, from 0.
            measure: Also measure weights and update, for a pass and a copy of the weights more.

        Raises:
            NonFiniteError: If loss or gradient is not finite and the run must stop, the same on
                all ranks; the weights are as they were.
        """
        config, optim = self.config, self.config.optim
        lr = optim.lr * lr_share(optim.schedule, step, config.steps)
        set_lr(self.optimizer, self._groups, lr)
        loss, output = self._backward(batches)
        norm = clip_gradients(self.model.parameters(), optim.clip_norm)
        result = StepResult(loss.item(), norm.item(), lr, output.logit_scale.item())
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            return self._refuse(result, batches, step, output)
        self.guard.passed()
        before = [p.detach().clone() for p in self.model.parameters()] if measure else []
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.clamp_scale()
        if self.ema is not None:
            self.ema.update(self.model)
        if measure:
            result.measured.update(self._measure(before))
        return result

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint must keep of the training; a collective call.

        Tensors are the live ones, sharded as they are, under names that do not depend on how the
        ranks share the model.
        """
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "guard": self.guard.state()}
        if self.ema is not None:
            state["ema"] = self.ema.weights
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned, or from a checkpoint loaded into it."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.guard.load_state(state["guard"])
        if self.ema is not None:
            self.ema.load_weights(state["ema"])

    def weights(self) -> dict[str, Tensor]:
        """What the run is judged by: the averages if it keeps them, else the latest; as sharded."""
        weights = self.model.state_dict()
        return weights if self.ema is None else weights | self.ema.weights

    def export(self) -> CLIP | None:
        """The whole model for evaluation and export, on the host; a collective call.

        Returns:
            On the first rank a model with the averaged weights if the run keeps an average, else
            with the latest; None on the others.
        """
        weights = self.weights()
        # One at a time: the whole model may not fit beside its shard.
        gathered = {}
        for name, weight in weights.items():
            full = whole(weight.detach())
            if self.ranks.is_first:
                gathered[name] = full.cpu()
        if not self.ranks.is_first:
            return None
        with torch.random.fork_rng(devices=[]):  # its first weights must not cost the run a draw
            model = CLIP(self.model.config)
        model.load_state_dict(gathered)
        return model.eval()

    def _forward(self, batch: Batch[PairInputs]) -> CLIPOutput:
        with torch.autocast(
            self.ranks.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        ):
            return self._parallel(batch.inputs)

    def _loss(self, output: CLIPOutput) -> Tensor:
        return contrastive_loss(output, self.config.loss)

    def _backward(self, batches: Sequence[Batch[PairInputs]]) -> tuple[Tensor, CLIPOutput]:
        """Leaves the gradient, summed over the ranks, in the parameters."""
        if len(batches) > 1:
            loss, output = cached_backward(batches, self._parallel, self._forward, self._loss)
        else:
            with self._parallel.reducing(last=True):
                output = self._forward(batches[0])
                loss = self._loss(output)
                (loss * self._parallel.gradient_factor).backward()
        self._parallel.finish_gradients()
        return loss, output

    def _refuse(
        self,
        result: StepResult,
        batches: Sequence[Batch[PairInputs]],
        step: int,
        output: CLIPOutput,
    ) -> StepResult:
        self.optimizer.zero_grad()
        found = find_pairs(step, result.loss, result.grad_norm, batches, output, self.ranks)
        self.guard.failed(found)
        return StepResult(
            result.loss, result.grad_norm, result.lr, result.logit_scale, nonfinite=found
        )

    def _measure(self, before: list[Tensor]) -> dict[str, float]:
        weights = [p.detach() for p in self.model.parameters()]
        for old, new in zip(before, weights, strict=True):
            old.sub_(new)  # in place: no third copy of the weights
        return {
            "param_norm": global_norm(weights).item(),
            "update_norm": global_norm(before).item(),
        }
