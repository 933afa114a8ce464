"""CLIP: two packed towers, their projections, and the temperature.

What the trainer trains. It maps packed images and packed captions to unit vectors of one space;
comparing them is the loss's task. With tokenizer and preprocessing around it, it is
`navit_clip.model.NaViTCLIP`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from navit_clip.configs import check_choices
from navit_clip.models.image_tower import ImageTower, ImageTowerConfig
from navit_clip.models.linear import Linear
from navit_clip.models.masked_features import MaskedFeatures
from navit_clip.models.text_tower import TextTower, TextTowerConfig
from navit_clip.packed.images import PackedImages
from navit_clip.packed.texts import PackedTexts

Projection = Literal["linear", "affine", "none"]


@dataclass(frozen=True)
class CLIPConfig:
    """Architecture of the whole model.

    Attributes:
        embed_dim: D, width of the shared space.
        image: The image tower.
        text: The text tower.
        init_scale: First value of the factor on cosine similarities (1 / temperature).
        max_scale: The factor never exceeds this; CLIP clamps at 100.
        init_bias: First value of the bias that the sigmoid loss adds to logits: about minus the
            logarithm of the pairs in a step, as SigLIP's -10 is for 32,768. null for the softmax
            loss, which has none.
        image_projection: From the image tower to the shared space: ``linear``, ``affine`` (with
            a bias), or ``none`` where the tower's vectors are the embeddings.
        text_projection: Likewise from the text tower.

    Raises:
        ValueError: If `embed_dim` is below 1, the scales are not 0 < init ≤ max, a projection is
            unknown, or there is none and the widths differ.
    """

    embed_dim: int = 512
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    init_scale: float = 1 / 0.07
    max_scale: float = 100.0
    init_bias: float | None = None
    image_projection: Projection = "linear"
    text_projection: Projection = "linear"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1, got {self.embed_dim}")
        if not 0 < self.init_scale <= self.max_scale:
            raise ValueError(
                "init_scale must be positive and at most max_scale, got "
                f"init_scale={self.init_scale} max_scale={self.max_scale}"
            )
        for name, tower in (("image", self.image), ("text", self.text)):
            width = tower.encoder.width
            if getattr(self, f"{name}_projection") == "none" and width != self.embed_dim:
                raise ValueError(
                    f"{name}_projection: none needs embed_dim equal to {name}.encoder.width, got "
                    f"embed_dim={self.embed_dim} width={width}"
                )


class CLIPOutput(NamedTuple):
    """Embeddings of one batch and what the loss multiplies and adds.

    Attributes:
        image_ED: [E, D] unit vectors.
        text_ED: [E, D] unit vectors.
        logit_scale: Scalar factor on similarities.
        logit_bias: Scalar added to logits by the sigmoid loss, None without one.
        masked_E: [E] errors of `MaskedFeatures`, None without.
    """

    image_ED: Tensor
    text_ED: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None
    masked_E: Tensor | None = None


class CLIPInputs(Protocol):
    """What the model takes: packed images and as many packed captions, in the same order."""

    @property
    def images(self) -> PackedImages:
        """All images, packed."""

    @property
    def texts(self) -> PackedTexts:
        """Their captions, packed."""

    @property
    def hidden(self) -> Tensor | None:
        """What `CLIP.masked` wants to know of the images' patches."""


class CLIP(nn.Module):
    """A packed image tower and a packed text tower with one embedding space.

    Attributes:
        masked: Masked prediction, which a task may add for its training; None without.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.image = ImageTower(config.image)
        self.text = TextTower(config.text)
        self.image_projection = _projection(
            config.image_projection, config.image.encoder.width, config.embed_dim
        )
        self.text_projection = _projection(
            config.text_projection, config.text.encoder.width, config.embed_dim
        )
        self.masked: MaskedFeatures | None = None
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.init_scale)))
        # A bias that no loss uses would stall DDP, which waits for its gradient.
        self.logit_bias: nn.Parameter | None = None
        if config.init_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(config.init_bias))

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.log_scale.device

    def embed_images(self, images: PackedImages) -> Tensor:
        """[E, D] unit vectors of packed images, in the order in which they were packed."""
        return _unit(self.image_projection(self.image(images)))

    def embed_texts(self, texts: PackedTexts) -> Tensor:
        """[E, D] unit vectors of packed captions, in the order in which they were packed."""
        return _unit(self.text_projection(self.text(texts)))

    def forward(self, inputs: CLIPInputs) -> CLIPOutput:
        """Embeds both sides of a batch.

        Scale and bias are outputs, not attributes read from outside, because DDP only reduces
        gradients of parameters that its forward used.
        """
        masked_E = None
        if self.masked is not None:
            assert inputs.hidden is not None
            masked_E = self.masked(self.image, inputs.images, inputs.hidden)
        return CLIPOutput(
            self.embed_images(inputs.images),
            self.embed_texts(inputs.texts),
            self.log_scale.exp(),
            self.logit_bias,
            masked_E,
        )

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keeps the scale within its maximum; called after each optimiser step.

        Clamped here and not in `forward`, where a parameter past the maximum would get no
        gradient and never return.
        """
        self.log_scale.clamp_(max=math.log(self.config.max_scale))


def _projection(kind: Projection, width: int, embed_dim: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    return Linear(width, embed_dim, bias=kind == "affine")


def _unit(x_ED: Tensor) -> Tensor:
    """Unit vectors, in float32 at least: similarities are multiplied by up to 100."""
    return F.normalize(x_ED.to(torch.promote_types(x_ED.dtype, torch.float32)), dim=-1)
