"""Masked prediction of features, beside what else an image tower is trained on.

Some patches of an image are hidden from the tower, a learned token in the place of each; at these
places it predicts what a teacher, an EMA of itself, makes of the whole image (as SigLIP 2, arXiv
2502.14786, does after TIPS, arXiv 2410.16512). Features are regressed, their targets normalised, as
in data2vec (arXiv 2202.03555): prototypes, temperatures and centering, which keep a teacher without
labels from collapsing, have nothing to do where texts train it.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from navit_clip.averages import update_averages
from navit_clip.models.image_tower import HiddenPatches, ImageTower
from navit_clip.models.interpolate import exact_dtype
from navit_clip.models.linear import Linear
from navit_clip.models.position import TABLE_STD
from navit_clip.packed.images import PackedImages


@dataclass(frozen=True)
class MaskedFeaturesConfig:
    """Masked prediction of a teacher's features beside another loss. Off by default.

    Attributes:
        weight: Of its loss; SigLIP 2 has 0.25, MaskCLIP 0.05. 0 leaves all of it out, and its cost:
            a forward pass of the image tower for the teacher, and another pass forward and
            backward.
        rate: Fraction of an image's patches that are hidden, of those that data.drop has left.
        start_step: Steps before it begins; SigLIP 2 has it in the last 20% of the training.
        decay: Of the teacher, an EMA of the image tower from the first step on: fraction kept at
            each step.
    """

    weight: float = 0.0
    rate: float = 0.5
    start_step: int = 0
    decay: float = 0.999

    def __post_init__(self) -> None:
        for name in ("weight", "start_step"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must lie in (0, 1), got {self.rate}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")


class MaskedFeatures(nn.Module):
    """What an image tower needs to predict the features of hidden patches.

    Args:
        tower: The tower, which it does not hold.

    Attributes:
        teacher: Its EMA, without pooling.
        token: [C] in place of a hidden patch, or of all patches of a hidden unit.
        head: Of the tower's outputs, at first the identity.
        active: Whether there is anything to predict yet.
    """

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.active = False
        self.teacher = deepcopy(tower)
        self.teacher.pool = self.teacher.norm = nn.Identity()
        self.teacher.encoder.drop_path = 0.0
        self.teacher.requires_grad_(False)
        config, weight = tower.config, tower.embed.weight
        width = config.encoder.width
        # Of a generator of its own: that of the process is another one on each rank by now.
        drawn = torch.randn(
            width >> config.hierarchy.merges, generator=torch.Generator().manual_seed(0)
        )
        self.token = nn.Parameter(TABLE_STD * drawn)
        self.head = Linear(width, width, bias=True)
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(weight.device, weight.dtype)

    def forward(self, tower: ImageTower, images: PackedImages, weights_T: Tensor) -> Tensor:
        """[E]: how far the predictions for each image are from the teacher's features.

        Args:
            tower: The tower.
            images: What the teacher sees.
            weights_T: float32, above 0 at what is hidden from the tower; see `hidden_weights`.
        """
        if not self.active:
            # DDP waits for a gradient of each parameter.
            unused = self.token.sum() + self.head.weight.sum() + self.head.bias.sum()
            return (0 * unused).expand(images.segments.num_examples)
        with torch.no_grad():
            target_TC = self.teacher.tokens(images).x_TC
        hidden = HiddenPatches(weights_T > 0, self.token)
        predicted_TC = self.head(tower.tokens(images, hidden).x_TC)
        # The squares of small errors vanish in half precision.
        with torch.autocast(target_TC.device.type, enabled=False):
            error_T = feature_errors(predicted_TC, target_TC) * weights_T
        error_E = error_T.new_zeros(len(images.segments.lengths))
        return error_E.index_add(0, images.segments.ids, error_T)[images.order]

    def follow(self, tower: ImageTower, decay: float, found_inf: Tensor) -> None:
        """Updates the teacher after a step, see `update_averages`."""
        weights = dict(tower.named_parameters())
        averages = dict(self.teacher.named_parameters())
        update_averages(averages.values(), (weights[name] for name in averages), decay, found_inf)


def feature_errors(predicted_TC: Tensor, target_TC: Tensor) -> Tensor:
    """[T] mean squared differences to the targets, each normalised to mean 0 and variance 1."""
    dtype = exact_dtype(target_TC.dtype)
    target_TC = F.layer_norm(target_TC.to(dtype), target_TC.shape[-1:])
    return (predicted_TC.to(dtype) - target_TC).square().mean(-1)
