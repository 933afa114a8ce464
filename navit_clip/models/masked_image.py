"""A packed image tower that sees some patches, and what predicts the pixels of the rest.

The masked autoencoder in packed form: token drop is the mask, of any rate per image, and the
decoder reads a second packed stream in which every image is whole, with one learned token in place
of each hidden patch. Without a decoder the tower itself reads those tokens, and a linear layer
predicts (SimMIM, arXiv 2111.09886): simpler, and the tower computes all patches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from navit_clip.models.image_tower import HiddenPatches, ImageTower, ImageTowerConfig
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
        decoder: The transformer over all patches; width 512, depth 8 and 16 heads are MAE's. null
            has none: the tower reads all patches, a learned token in place of each hidden one, and
            a linear layer predicts (SimMIM).
        position: Of the decoder's tokens; MAE's are fixed sinusoids.

    Raises:
        ValueError: If the tower pools with parameters or has a stem, or the decoder is causal or
            has no positions.
    """

    image: ImageTowerConfig = field(default_factory=_mean_pooled)
    decoder: EncoderConfig | None = field(default_factory=lambda: EncoderConfig(512, 8, 16))
    position: PositionConfig = field(default_factory=_fixed_positions)

    def __post_init__(self) -> None:
        if self.image.pooling not in ("mean", "cls") or self.image.pooled_norm:
            raise ValueError(
                "image.pooling must be mean or cls without image.pooled_norm, since predicting "
                f"patches trains no pooling; got {self.image.pooling} "
                f"pooled_norm={self.image.pooled_norm}"
            )
        if self.image.stem != "none":
            raise ValueError(
                "image.stem must be none: its convolutions see hidden patches beside visible ones, "
                f"got {self.image.stem}"
            )
        if self.position.kind == "none":
            raise ValueError(
                "position.kind must not be none: hidden patches differ in nothing else"
            )
        if self.decoder is not None and self.decoder.causal:
            raise ValueError("decoder.causal must be false for images: patches have no order")


class MaskedImageInputs(Protocol):
    """What the model takes; see `navit_clip.packed.masked.MaskedInputs`."""

    @property
    def images(self) -> PackedImages | None:
        """The visible patches, V tokens; a model without a decoder needs none."""

    @property
    def whole(self) -> PackedImages:
        """All patches, T tokens, of which the decoder reads coordinates only."""

    @property
    def places(self) -> Tensor | None:
        """int64 [V], where each visible patch lies in `whole`; T at padding. Likewise."""

    @property
    def weights(self) -> Tensor:
        """float32 [T], above 0 at hidden patches."""


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
        image: The tower; computes visible patches alone if there is a decoder.
        decoder: Reads all patches.
    """

    def __init__(self, config: MaskedImageConfig) -> None:
        super().__init__()
        self.config = config
        last = config.image.encoder.width
        width = last if config.decoder is None else config.decoder.width
        self.image = ImageTower(config.image)
        if config.decoder is not None:
            self.to_decoder = Linear(last, width, bias=True)
        # Without a decoder it is the tower's first stage that reads it.
        merges = config.image.hierarchy.merges if config.decoder is None else 0
        self.mask_token = nn.Parameter(torch.empty(width >> merges))
        nn.init.normal_(self.mask_token, std=TABLE_STD)
        self.decoder: Encoder | None = None
        if config.decoder is not None:
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
        """Predicts all patches from the visible ones."""
        if self.decoder is None:
            hidden = HiddenPatches(inputs.weights > 0, self.mask_token)
            return PredictedPatches(self.to_pixels(self.image.tokens(inputs.whole, hidden).x_TC))
        assert inputs.images is not None
        assert inputs.places is not None
        x_VC = self.to_decoder(self.image.tokens(inputs.images).x_TC)
        whole = inputs.whole
        # One row more, for the padding of the visible stream.
        hidden_TC = self.mask_token.to(x_VC.dtype).expand(whole.segments.num_tokens + 1, -1)
        x_TC = hidden_TC.index_copy(0, inputs.places, x_VC)[:-1]
        x_TC = x_TC + self.position(whole.coords, whole.grids[whole.segments.ids])
        return PredictedPatches(self.to_pixels(self.decoder(x_TC, whole.segments)))
