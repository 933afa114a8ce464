"""The EMA of the weights, updated after each step.

Held by `step`, saved in checkpoints beside the weights, and exported in their
place: the average is usually the better model, the weights themselves remain in the checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from navit_clip.averages import local_tensor, update_averages


@dataclass(frozen=True)
class EMAConfig:
    """The EMA of the weights.

    Attributes:
        decay: Fraction of the old average kept at each step, such as 0.9999; 0 keeps none. With
            one, model/ of the run directory holds the EMA instead of the last weights.

    Raises:
        ValueError: If `decay` is not in [0, 1).
    """

    decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {self.decay}")


class EMA:
    """average ← decay · average + (1 - decay) · weights, from the first weights on.

    Not `AveragedModel`, which copies the module: a sharded one cannot be copied, and its shards
    can be averaged where they are.

    Args:
        model: Whose weights; possibly sharded, but not yet trained. Locked ones stay what they are
            and are not averaged.
        decay: Fraction of the old average kept.

    Attributes:
        weights: The averages by parameter name, sharded as the parameters are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._decay = decay

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Goes on from saved averages, sharded as these are."""
        for name, average in self.weights.items():
            local_tensor(average).copy_(local_tensor(weights[name]))

    def update(self, model: nn.Module, found_inf: Tensor) -> None:
        """Updates the averages with the weights after a step.

        Args:
            model: After the step.
            found_inf: Scalar on the weights' device, 1 if the step was not finite, which leaves the
                averages as they are; else 0.
        """
        current = (p for p in model.parameters() if p.requires_grad)
        update_averages(self.weights.values(), current, self._decay, found_inf)
