"""GradCache: a step over k micro-batches that equals one over a batch k times as large.

Called by `step` for a task whose loss couples examples. Such a loss needs all outputs at once;
summing the losses of micro-batches would be another objective. Here every micro-batch is embedded
without a graph; the loss over all outputs of all ranks gives their gradients; then each micro-batch
is embedded again, with a graph, and takes its outputs' gradients back through the model (Gao et
al., arXiv 2101.06983). Activations of one micro-batch are held at a time, for one more forward
pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from navit_clip.checkpoints.rank_state import generator_states, set_generators
from navit_clip.packed.batch import Inputs
from navit_clip.tasks.base import Loss
from navit_clip.training.parallel import ParallelModel


def cached_backward(
    inputs: Sequence[Inputs],
    parallel: ParallelModel,
    embed: Callable[[Inputs], Any],
    loss_of: Callable[[Any], Loss],
    device: torch.device,
) -> tuple[Loss, Any]:
    """Adds the gradient of the loss over all micro-batches to the parameters.

    Gradients are reduced over the ranks once, with the last micro-batch. A collective call: every
    rank brings the same number of micro-batches, of any number of examples each.

    Args:
        inputs: Of this rank's micro-batches, at least one, on its device.
        parallel: Says how gradients are reduced.
        embed: The forward pass through `parallel`, to a NamedTuple of tensors [E, …], scalars and
            None; what is random in it (dropout) is the same in both passes.
        loss_of: The loss over the examples of all ranks, of one output that holds all
            micro-batches.
        device: Of the inputs.

    Returns:
        The loss, and the output over all micro-batches, in their order, without a graph.
    """
    states, outputs = [], []
    with torch.no_grad():
        for part in inputs:
            states.append(generator_states(device))
            outputs.append(embed(part))
    sizes = [next(len(v) for v in output if v is not None and v.ndim) for output in outputs]
    whole = concatenate(outputs)
    leaves = list(whole)
    outputs.clear()
    loss = loss_of(whole)
    (loss.total * parallel.gradient_factor).backward()
    gradients = [None if leaf is None else leaf.grad for leaf in leaves]
    for number, (part, state) in enumerate(zip(inputs, states, strict=True)):
        last = number == len(inputs) - 1
        with parallel.reducing(last=last):
            set_generators(state, device)
            heads, head_gradients = [], []
            for value, gradient in zip(embed(part), gradients, strict=True):
                # A frozen part of the model takes no gradient.
                if gradient is None or not value.requires_grad:
                    continue
                if value.ndim:
                    gradient = gradient.split(sizes)[number]
                elif not last:  # the same in every micro-batch: its gradient counts once
                    continue
                heads.append(value)
                head_gradients.append(gradient)
            if heads:
                torch.autograd.backward(heads, head_gradients)
    return Loss(loss.total.detach(), loss.metrics), whole


def concatenate(outputs: Sequence[Any]) -> Any:
    """A model's outputs for several micro-batches as one; its tensors are leaves of a new graph."""
    return type(outputs[0])(*(_leaf(values) for values in zip(*outputs, strict=True)))


def _leaf(values: Sequence[Tensor | None]) -> Tensor | None:
    """One field of all micro-batches' outputs: rows concatenated, a scalar as it is."""
    first = values[-1]
    if first is None:
        return None
    if not first.ndim:
        return first.detach().requires_grad_()
    return torch.cat([value for value in values if value is not None]).requires_grad_()
