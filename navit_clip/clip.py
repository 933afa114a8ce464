"""NaViTCLIP: two packed towers, their projections, and the temperature.

What the trainer trains and the harnesses judge. It maps packed images and packed captions to unit
vectors of one space; comparing them is the loss's task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from navit_clip.image_tower import ImageTower, ImageTowerConfig
from navit_clip.packing import PackedBatch, PackedImages, PackedTexts
from navit_clip.text_tower import TextTower, TextTowerConfig
from navit_clip.transformer import linear


@dataclass(frozen=True)
class CLIPConfig:
    """Shape of the whole model.

    Attributes:
        embed_dim: D, width of the shared space.
        image: The image tower.
        text: The text tower.
        init_scale: First value of the factor on cosine similarities (1 / temperature).
        max_scale: The factor never exceeds this; CLIP clamps at 100.
        init_bias: First value of the bias that the sigmoid loss adds to logits (SigLIP: -10);
            null for the softmax loss, which has none.

    Raises:
        ValueError: If `embed_dim` is below 1 or the scales are not 0 < init ≤ max.
    """

    embed_dim: int = 512
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    init_scale: float = 1 / 0.07
    max_scale: float = 100.0
    init_bias: float | None = None

    def __post_init__(self) -> None:
        if self.embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1, got {self.embed_dim}")
        if not 0 < self.init_scale <= self.max_scale:
            raise ValueError(
                "init_scale must be positive and at most max_scale, got "
                f"init_scale={self.init_scale} max_scale={self.max_scale}"
            )


class CLIPOutput(NamedTuple):
    """Embeddings of one batch and what the loss multiplies and adds.

    Attributes:
        image_ED: [E, D] unit vectors.
        text_ED: [E, D] unit vectors.
        logit_scale: Scalar factor on similarities.
        logit_bias: Scalar added to logits by the sigmoid loss, None without one.
    """

    image_ED: Tensor
    text_ED: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None


class NaViTCLIP(nn.Module):
    """A packed image tower and a packed text tower with one embedding space."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.image = ImageTower(config.image)
        self.text = TextTower(config.text)
        self.image_projection = linear(config.image.encoder.width, config.embed_dim, bias=False)
        self.text_projection = linear(config.text.encoder.width, config.embed_dim, bias=False)
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

    def forward(self, batch: PackedBatch) -> CLIPOutput:
        """Embeds both sides of a batch.

        Scale and bias are outputs, not attributes read from outside, because DDP only reduces
        gradients of parameters that its forward used.
        """
        return CLIPOutput(
            self.embed_images(batch.images),
            self.embed_texts(batch.texts),
            self.log_scale.exp(),
            self.logit_bias,
        )

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keeps the scale within its maximum; called after each optimiser step.

        Clamped here and not in `forward`, where a parameter past the maximum would get no
        gradient and never return.
        """
        self.log_scale.clamp_(max=math.log(self.config.max_scale))


def _unit(x_ED: Tensor) -> Tensor:
    """Unit vectors, in float32 at least: similarities are multiplied by up to 100."""
    return F.normalize(x_ED.to(torch.promote_types(x_ED.dtype, torch.float32)), dim=-1)
