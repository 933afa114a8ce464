"""One optimiser step: forward pass, loss, backward pass, update.

`Stepper` holds everything that changes from step to step (weights, optimiser, EMA, counters) and
hands it to checkpoints as one state. What is computed is the task's; how the ranks share the model
is `parallel`'s business, and how several micro-batches become one loss over coupled examples is
`gradcache`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from navit_clip.distributed import Announcement, Ranks
from navit_clip.packed.batch import Batch, Inputs
from navit_clip.precision import Precision, autocast
from navit_clip.tasks.base import Loss, Task
from navit_clip.training.ema import EMA, EMAConfig
from navit_clip.training.gradcache import cached_backward
from navit_clip.training.late import LateScalars
from navit_clip.training.length import RunLength
from navit_clip.training.nonfinite import NonFinite, NonFiniteGuard, find_examples
from navit_clip.training.optim import OptimConfig, build_optimizer
from navit_clip.training.optimizers import update
from navit_clip.training.parallel import (
    ParallelConfig,
    ParallelModel,
    clip_gradients,
    full_tensor,
    global_norm,
)
from navit_clip.training.schedule import lr_multiplier

_LOSS, _GRAD_NORM = "loss", "grad_norm"


@dataclass(frozen=True)
class StepResult:
    """Metrics of one step.

    Attributes:
        loss: Over the examples of all ranks.
        grad_norm: Global norm of the gradient before clipping.
        lr: Learning rate of the step, where no layer has a lower one.
        metrics: Of the task, by name.
        measured: If the step was to be measured: ``param_norm``, the global norm of the trained
            weights after it, and ``update_norm``, that of what it added to them.
        nonfinite: Set if the step was skipped.
    """

    loss: float
    grad_norm: float
    lr: float
    metrics: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    nonfinite: NonFinite | None = None


@dataclass(frozen=True)
class PendingStep:
    """A step that the device may still be working on, see `Stepper.begin`.

    Attributes:
        number: Of the step, from 1.
        lr: Its learning rate, where no layer has a lower one.
        scalars: Loss, gradient norm, and the task's metrics.
        measured: Norms, if the step is measured.
        batches: Of this rank, kept for as long as the device may read them.
        outputs: The model's for these.
    """

    number: int
    lr: float
    scalars: LateScalars
    measured: LateScalars | None
    batches: Sequence[Batch]
    outputs: list[Any]


class Stepper:
    """A model, its optimiser, and how batches move them.

    Args:
        task: Whose model and loss.
        model: On the ranks' device, the same on all of them; frozen and sharded in place if so
            configured.
        ranks: This process among all of them.
        length: Of the whole run, which its schedule is stretched over.
        optim: Optimiser and learning rate.
        parallel: How the ranks share the model.
        ema: Whether the run keeps an average of the weights.
        guard: What happens at a non-finite step.
        precision: ``bf16`` runs forward passes under autocast; parameters stay float32.

    Attributes:
        model: Its weights, possibly this rank's shards of them.
        optimizer: Of those weights.
        ema: Their EMA, if the run keeps one.
        guard: How many non-finite steps there were.
        kernels: What the encoders run on, in words.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        ranks: Ranks,
        *,
        length: RunLength,
        optim: OptimConfig,
        parallel: ParallelConfig,
        ema: EMAConfig,
        guard: NonFiniteGuard,
        precision: Precision,
    ) -> None:
        self.task, self.model, self.ranks = task, model, ranks
        self.length, self.optim, self.precision = length, optim, precision
        self._exported = set(model.state_dict())
        task.prepare(model)  # DDP waits for the gradient of all that it finds trainable
        self._parallel = ParallelModel(model, parallel, ranks, bf16_blocks=precision == "bf16")
        self.kernels = self._parallel.kernels
        # Looking them up takes milliseconds.
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer, self._lr_factors = build_optimizer(model, optim, task)
        self.ema = EMA(model, ema.decay) if ema.decay else None
        self.guard = guard
        self._found_inf = torch.zeros((), device=ranks.device)

    def announce(self, inputs: Sequence[Inputs], more: Sequence[float] = ()) -> Announcement:
        """Begins to tell the ranks what this one brings to the next step; every rank calls it.

        Args:
            inputs: Of the micro-batches of that step, best on the host still.
            more: Whatever else the ranks should know, as many numbers on all.

        Returns:
            Of each rank the task's count, then those numbers.
        """
        count = sum(self.task.count(part) for part in inputs)
        return self.ranks.announce([count, *map(float, more)])

    def step(self, batches: Sequence[Batch], step: int, *, measure: bool = False) -> StepResult:
        """`begin` and `finish` in one."""
        announced = self.announce([batch.inputs for batch in batches])
        return self.finish(self.begin(batches, step, announced, measure=measure))

    def begin(
        self,
        batches: Sequence[Batch],
        step: int,
        announced: Announcement,
        *,
        seen: int = 0,
        measure: bool = False,
    ) -> PendingStep:
        """Begins one step; every rank calls it with as many micro-batches.

        Nothing waits for the device, unless the optimiser is another than fused AdamW. Whether the
        step was finite is decided there: if not, weights, moments, step counters and averages stay
        as they are.

        Args:
            batches: This rank's micro-batches, on its device; their examples and those of all ranks
                are one batch to the loss.
            step: Number of the step, from 0.
            announced: From `announce`.
            seen: Samples of all ranks before this step.
            measure: Also measure weights and update, for a pass and a copy of the weights more.

        Returns:
            The step, for `finish`; before a state is taken, and at the latest after `begin` of the
            next step.
        """
        steps = self.length.expected_steps(step, seen)
        lr = self.optim.lr * lr_multiplier(self.optim.schedule, step, steps, seen)
        for group, factor in zip(self.optimizer.param_groups, self._lr_factors, strict=True):
            group["lr"] = lr * factor
        self.task.before_step(self.model, step)
        loss, outputs = self._backward([batch.inputs for batch in batches], announced)
        norm = clip_gradients(self._parameters, self.optim.clip_norm)
        finite = torch.isfinite(loss.total.detach()) & torch.isfinite(norm)
        found_inf = 1 - finite.float()
        if self.guard.policy == "stop":
            # Nor does what is begun before the host knows change the weights.
            found_inf = self._found_inf = torch.maximum(found_inf, self._found_inf)
        before = [p.detach().clone() for p in self._parameters] if measure else []
        update(self.optimizer, found_inf)
        self.optimizer.zero_grad()
        self.task.after_step(self.model, found_inf)
        if self.ema is not None:
            self.ema.update(self.model, found_inf)
        return PendingStep(
            number=step + 1,
            lr=lr,
            scalars=LateScalars({_LOSS: loss.total, _GRAD_NORM: norm, **loss.metrics}),
            measured=LateScalars(self._measure(before)) if measure else None,
            batches=batches,
            outputs=outputs,
        )

    def finish(self, pending: PendingStep) -> StepResult:
        """Waits for a step and returns its metrics; every rank calls it, step after step.

        Raises:
            NonFiniteError: If loss or gradient is not finite and the run must stop, the same on
                all ranks; the weights are as they were.
        """
        metrics = pending.scalars.read()
        result = StepResult(metrics.pop(_LOSS), metrics.pop(_GRAD_NORM), pending.lr, metrics)
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            names = [name for batch in pending.batches for name in batch.ids]
            ids = find_examples(names, pending.outputs, self.ranks)
            found = NonFinite(pending.number, result.loss, result.grad_norm, *ids)
            self.guard.failed(found)
            return replace(result, nonfinite=found)
        self.guard.in_row = 0
        return replace(result, measured=pending.measured.read() if pending.measured else {})

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint must keep of the training; a collective call.

        Tensors are the live ones, sharded as they are, under names that do not depend on how the
        ranks share the model.
        """
        model, optimizer = get_state_dict(self.model, self.optimizer)
        # Apart from the model as it is read without a trainer.
        added = {name: model.pop(name) for name in list(model) if name not in self._exported}
        state = {"model": model, "optimizer": optimizer, "guard": self.guard.state()}
        if added:
            state["added"] = added
        if self.ema is not None:
            state["ema"] = self.ema.weights
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned, or from a checkpoint loaded into it.

        Decay, momentum and what else the configuration says of the optimiser is as it says now.
        """
        configured = [
            {name: group[name] for name in self.optimizer.defaults}
            for group in self.optimizer.param_groups
        ]
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"] | state.get("added", {}),
            optim_state_dict=state["optimizer"],
        )
        for group, values in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(values)
        self.guard = replace(self.guard, **state["guard"])
        if self.ema is not None:
            self.ema.load_weights(state["ema"])

    def weights(self) -> dict[str, Tensor]:
        """What is evaluated and exported: the EMA if there is one, else the latest; as sharded."""
        weights = self.model.state_dict()
        if self.ema is not None:
            weights |= self.ema.weights
        return {name: weights[name] for name in weights if name in self._exported}

    def full_weights(self) -> dict[str, Tensor]:
        """`weights` in full on every rank's device; a collective call.

        Weights that this rank holds in full are shared, not copied; shards are gathered, all of
        them at once. What a task adds for the training is merged, see `Task.plain_weights`.
        """
        full = {name: full_tensor(weight.detach()) for name, weight in self.weights().items()}
        return self.task.plain_weights(full)

    def host_weights(self) -> dict[str, Tensor] | None:
        """A copy of `full_weights` on the host of rank 0, None on others; a collective call."""
        gathered = {}
        for name, weight in self.weights().items():
            # One at a time: the whole model may not fit beside its shard.
            full = full_tensor(weight.detach())
            if self.ranks.is_first:
                gathered[name] = full.cpu()
        return self.task.plain_weights(gathered) if self.ranks.is_first else None

    def autocast(self) -> torch.autocast:
        """The precision of forward passes, as a context."""
        return autocast(self.precision, self.ranks.device)

    def _forward(self, inputs: Inputs) -> Any:
        with self.autocast():
            return self._parallel(inputs)

    def _backward(
        self, inputs: Sequence[Inputs], announced: Announcement
    ) -> tuple[Loss, list[Any]]:
        """Leaves the gradient, summed over the ranks, in the parameters."""
        if not self.task.couples_examples:
            loss, outputs = self._uncoupled_backward(inputs, announced)
        elif len(inputs) == 1:
            loss, output = self._one_backward(inputs, announced, last=True)
            outputs = [output]
        else:
            loss, output = cached_backward(
                inputs,
                self._parallel,
                self._forward,
                lambda whole: self._loss(whole, inputs, announced),
                self.ranks.device,
            )
            outputs = [_detached(output)]
        self._parallel.finish_gradients()
        return loss, outputs

    def _loss(self, output: Any, inputs: Sequence[Inputs], announced: Announcement) -> Loss:
        # Only here: the ranks' counts travel while the forward pass runs.
        counts = [count for count, *_ in announced.wait()]
        with self.autocast():
            return self.task.loss(output, inputs, counts)

    def _one_backward(
        self, inputs: Sequence[Inputs], announced: Announcement, *, last: bool
    ) -> tuple[Loss, list[Tensor]]:
        with self._parallel.reducing(last=last):
            output = self._forward(inputs[0])
            loss = self._loss(output, inputs, announced)
            (loss.total * self._parallel.gradient_factor).backward()
        return loss, _detached(output)

    def _uncoupled_backward(
        self, inputs: Sequence[Inputs], announced: Announcement
    ) -> tuple[Loss, list[Any]]:
        """Adds up the gradients of micro-batches, each a share of one mean over all ranks."""
        losses, outputs = [], []
        for number, part in enumerate(inputs, 1):
            loss, output = self._one_backward([part], announced, last=number == len(inputs))
            losses.append(loss)
            outputs.append(output)
        names = list(losses[0].metrics)
        shares = [
            torch.stack([loss.total.detach(), *(loss.metrics[name].detach() for name in names)])
            for loss in losses
        ]
        sums = torch.stack(shares).sum(0)
        if self.ranks.world_size > 1:
            dist.all_reduce(sums)
        total, *metrics = sums
        return Loss(total, dict(zip(names, metrics, strict=True))), outputs

    def _measure(self, before: list[Tensor]) -> dict[str, Tensor]:
        weights = [p.detach() for p in self._parameters]
        for old, new in zip(before, weights, strict=True):
            old.sub_(new)  # in place: no third copy of the weights
        return {"param_norm": global_norm(weights), "update_norm": global_norm(before)}


def _detached(output: Sequence[object]) -> list[Tensor]:
    """The tensors of a model's output, without their graph."""
    return [value.detach() for value in output if isinstance(value, Tensor)]
