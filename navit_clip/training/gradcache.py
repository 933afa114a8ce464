"""GradCache: a step over k micro-batches that equals one over a batch k times as large.

Called by `navit_clip.training.step` when a step takes several micro-batches. The contrastive loss
needs all features at once, so summing the losses of micro-batches would be another objective. Here
every micro-batch is embedded without a graph; the loss over all features of all ranks gives their
gradients; then each micro-batch is embedded again, with a graph, and takes its features' gradients
back through the towers (Gao et al., arXiv 2101.06983). Activations of one micro-batch are held at a
time, for one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from navit_clip.data.builders.pairs import PairInputs
from navit_clip.models.clip import CLIPOutput
from navit_clip.packed.batch import Batch
from navit_clip.training.parallel import ParallelModel


@dataclass(frozen=True)
class _RandomState:
    """Where the random generators stood before a forward pass, so that it can be replayed."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> _RandomState:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


def cached_backward(
    batches: Sequence[Batch[PairInputs]],
    parallel: ParallelModel,
    embed: Callable[[Batch[PairInputs]], CLIPOutput],
    loss_of: Callable[[CLIPOutput], Tensor],
) -> tuple[Tensor, CLIPOutput]:
    """Adds the gradient of the loss over all micro-batches to the parameters.

    Gradients are reduced over the ranks once, with the last micro-batch. A collective call: every
    rank brings the same number of micro-batches, of any number of pairs each.

    Args:
        batches: This rank's micro-batches, at least one, on its device.
        parallel: Says how gradients are reduced.
        embed: The forward pass through `parallel`; what is random in it (dropout) is the same in
            both passes.
        loss_of: The loss over the pairs of all ranks, of one output that holds all micro-batches.

    Returns:
        The loss, and the output over all micro-batches, in their order, without a graph.
    """
    device = parallel.model.device
    states, outputs = [], []
    with torch.no_grad():
        for batch in batches:
            states.append(_RandomState.now(device))
            outputs.append(embed(batch))
    sizes = [len(output.image_ED) for output in outputs]
    leaves = CLIPOutput(
        torch.cat([output.image_ED for output in outputs]).requires_grad_(),
        torch.cat([output.text_ED for output in outputs]).requires_grad_(),
        outputs[-1].logit_scale.detach().requires_grad_(),
        _leaf(outputs[-1].logit_bias),
    )
    outputs.clear()
    loss = loss_of(leaves)
    (loss * parallel.gradient_factor).backward()
    image_gradients, text_gradients = (_gradient(x).split(sizes) for x in leaves[:2])
    for number, (batch, state) in enumerate(zip(batches, states, strict=True), 1):
        last = number == len(batches)
        with parallel.reducing(last=last):
            state.restore(device)
            output = embed(batch)
            heads: list[Tensor] = [output.image_ED, output.text_ED]
            gradients = [image_gradients[number - 1], text_gradients[number - 1]]
            if last:  # scale and bias are the same in every micro-batch: their gradient counts once
                heads.append(output.logit_scale)
                gradients.append(_gradient(leaves.logit_scale))
                if output.logit_bias is not None and leaves.logit_bias is not None:
                    heads.append(output.logit_bias)
                    gradients.append(_gradient(leaves.logit_bias))
            # A locked tower without a projection takes no gradient.
            taking = [i for i, head in enumerate(heads) if head.requires_grad]
            if taking:
                torch.autograd.backward([heads[i] for i in taking], [gradients[i] for i in taking])
    return loss.detach(), leaves


def _leaf(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().requires_grad_()


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None  # every leaf takes part in the loss
    return leaf.grad
