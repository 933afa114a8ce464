"""A packed image tower with a linear head over classes.

What the trainer trains for classification. With class names and preprocessing around it, it is
`navit_clip.classifier.NaViTClassifier`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from navit_clip.configs import check_choices
from navit_clip.models.image_tower import ImageTower, ImageTowerConfig
from navit_clip.models.linear import Linear
from navit_clip.packed.images import PackedImages

Output = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class ClassifierConfig:
    """Architecture of a classifier; how many classes it has is told by the list of their names.

    Attributes:
        image: The image tower.
        output: What logits become, and with it the loss: ``softmax`` takes one class for each
            image, ``sigmoid`` each class by itself, any number of them for an image.
        init_bias: First value of the head's bias; null takes −ln(classes), which is ImageNet-1k's
            -6.9 and ImageNet-21k's and JFT's -10 in big_vision. At 0 the wrong classes of a sigmoid
            would be all that the first steps learn.
        hidden: Width of a layer with a hyperbolic tangent before the classes, which ViT's own
            pretraining has, and leaves behind for fine-tuning; 0 has none.

    Raises:
        ValueError: If `output` is unknown or `hidden` negative.
    """

    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    output: Output = "softmax"
    init_bias: float | None = None
    hidden: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        if self.hidden < 0:
            raise ValueError(f"hidden must not be negative, got {self.hidden}")


class ClassifierOutput(NamedTuple):
    """What a classifier makes of a batch.

    Attributes:
        logits_EL: [E, L] of each image and class.
    """

    logits_EL: Tensor


class ClassifierInputs(Protocol):
    """What the model takes."""

    @property
    def images(self) -> PackedImages:
        """All images, packed."""


class Classifier(nn.Module):
    """An image tower, and a head that begins at zero.

    Args:
        config: The architecture.
        classes: L, at least 2.
    """

    def __init__(self, config: ClassifierConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.image = ImageTower(config.image)
        width = config.image.encoder.width
        self.hidden = Linear(width, config.hidden, bias=True) if config.hidden else None
        self.head = Linear(config.hidden or width, classes, bias=True)
        nn.init.zeros_(self.head.weight)
        bias = -math.log(classes) if config.init_bias is None else config.init_bias
        nn.init.constant_(self.head.bias, bias)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.head.bias.device

    def forward(self, inputs: ClassifierInputs) -> ClassifierOutput:
        """Logits of a batch, in the order in which the images were packed."""
        return ClassifierOutput(self.head(self.before_head(self.image(inputs.images))))

    def before_head(self, features_EC: Tensor) -> Tensor:
        """What the head multiplies, of the image tower's vectors: these, or the hidden layer's."""
        if self.hidden is None:
            return features_EC
        hidden_EC: Tensor = self.hidden(features_EC)
        return hidden_EC.tanh()

    def probabilities(self, features_EC: Tensor) -> Tensor:
        """[E, L] of the image tower's vectors, in float32 at least."""
        logits_EL: Tensor = self.head(self.before_head(features_EC))
        logits_EL = logits_EL.to(torch.promote_types(logits_EL.dtype, torch.float32))
        return logits_EL.softmax(-1) if self.config.output == "softmax" else logits_EL.sigmoid()
