"""A packed image tower that sees some patches, and a decoder that predicts the pixels of the rest.

The masked autoencoder in packed form: token drop is the mask, of any rate per image, and the
decoder reads a second packed stream in which every image is whole, with one learned token in place
of each hidden patch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from navit_clip.models.image_tower import ImageTower, ImageTowerConfig
from navit_clip.models.linear import Linear
from navit_clip.models.position import TABLE_STD, PositionConfig, build_position
from navit_clip.models.transformer import Encoder, EncoderConfig
from navit_clip.packed.images import PackedImages


def _mean_pooled() -> ImageTowerConfig:
    return ImageTowerConfig(pooling="mean")


def _fixed_positions() -> PositionConfig:
    return PositionConfig(embedding="sinusoidal", combine="stack")


@dataclass(frozen=True)
class MaskedImageConfig:
    """Architecture of an image tower and the decoder it is pretrained with.

    Attributes:
        image: The image tower, the part that is used afterwards. Its pooling takes no part in the
            pretraining and must have no parameters: ``mean``, or ``cls``, whose token the patches
            attend to.
        decoder: The transformer over all patches; width 512, depth 8 and 16 heads are MAE's.
        position: Of the decoder's tokens; MAE's are fixed sinusoids.

    Raises:
        ValueError: If the tower pools with parameters, or the decoder is causal or has no
            positions.
    """

    image: ImageTowerConfig = field(default_factory=_mean_pooled)
    decoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(512, 8, 16))
    position: PositionConfig = field(default_factory=_fixed_positions)

    def __post_init__(self) -> None:
        if self.image.pooling not in ("mean", "cls") or self.image.pooled_norm:
            raise ValueError(
                "image.pooling must be mean or cls without image.pooled_norm, since predicting "
                f"patches trains no pooling; got {self.image.pooling} "
                f"pooled_norm={self.image.pooled_norm}"
            )
        if self.position.kind == "none":
            raise ValueError(
                "position.kind must not be none: hidden patches differ in nothing else"
            )
        if self.decoder.causal:
            raise ValueError("decoder.causal must be false for images: patches have no order")


class MaskedImageInputs(Protocol):
    """What the model takes; see `navit_clip.packed.masked.MaskedInputs`."""

    @property
    def images(self) -> PackedImages:
        """The visible patches, V tokens."""

    @property
    def whole(self) -> PackedImages:
        """All patches, T tokens, of which the decoder reads coordinates only."""

    @property
    def places(self) -> Tensor:
        """int64 [V], where each visible patch lies in `whole`; T at padding."""


class PredictedPatches(NamedTuple):
    """What the decoder makes of a batch.

    Attributes:
        pixels_TK: [T, P·P·3] normalised pixels of each patch of `MaskedImageInputs.whole`, visible
            ones and padding included.
    """

    pixels_TK: Tensor


class MaskedImage(nn.Module):
    """Predicts the pixels of hidden patches from visible ones.

    Attributes:
        image: The tower; computes visible patches alone.
        decoder: Reads all patches.
    """

    def __init__(self, config: MaskedImageConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder.width
        self.image = ImageTower(config.image)
        self.to_decoder = Linear(config.image.encoder.width, width, bias=True)
        self.mask_token = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.mask_token, std=TABLE_STD)
        position = build_position(config.position, width)
        assert position is not None  # checked by MaskedImageConfig
        self.position = position
        self.decoder = Encoder(config.decoder)
        self.to_pixels = Linear(width, 3 * config.image.patch_size**2, bias=True)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.mask_token.device

    def forward(self, inputs: MaskedImageInputs) -> PredictedPatches:
        """Encodes the visible patches and predicts all."""
        x_VC = self.to_decoder(self.image.tokens(inputs.images).x_TC)
        whole = inputs.whole
        # One row more, for the padding of the visible stream.
        hidden_TC = self.mask_token.to(x_VC.dtype).expand(whole.segments.num_tokens + 1, -1)
        x_TC = hidden_TC.index_copy(0, inputs.places, x_VC)[:-1]
        x_TC = x_TC + self.position(whole.coords, whole.grids[whole.segments.ids])
        return PredictedPatches(self.to_pixels(self.decoder(x_TC, whole.segments)))
