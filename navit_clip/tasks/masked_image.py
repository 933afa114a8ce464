"""Masked image pretraining (MAE): the pixels of dropped patches are predicted from the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from navit_clip.data.builders.masked import MaskedBuilder
from navit_clip.data.config import DataConfig
from navit_clip.losses.masked_pixels import masked_pixel_loss
from navit_clip.models.flops import LengthSums, backward_flops, decoder_flops, tower_flops
from navit_clip.models.masked_image import MaskedImage, MaskedImageConfig, PredictedPatches
from navit_clip.packed.batch import Inputs
from navit_clip.packed.masked import MaskedInputs
from navit_clip.tasks.base import Loss
from navit_clip.tasks.images import (
    ImageTask,
    ImageTaskConfig,
    check_sizes,
    refuse_captions,
    refuse_mixing,
)
from navit_clip.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class MaskedImageTaskConfig(ImageTaskConfig):
    """Masked image pretraining; data.drop says which patches are hidden.

    Attributes:
        kind: ``masked_image``.
        model: Architecture of tower and decoder; that of `init` for the tower if it is given.
        mask: ``sample`` draws for each image which patches are hidden; ``batch`` hides the same
            ones of all images of a batch that have one grid, as models must whose batches are
            tensors of equal images. For comparison.
    """

    predicts_dropped = True

    kind: Literal["masked_image"] = "masked_image"
    model: MaskedImageConfig = field(default_factory=MaskedImageConfig)
    mask: Literal["sample", "batch"] = "sample"

    def check(self, data: DataConfig) -> None:
        """Compares budgets and sizes with what tower and decoder take."""
        if data.drop.kind == "none":
            raise ValueError(
                "data.drop.kind must not be none for task.kind masked_image, which predicts the "
                "dropped patches; MAE has fixed with data.drop.rate 0.75"
            )
        limit = data.resolution.max_tokens, "data.resolution.max_tokens"
        full = self.model.decoder is None
        streams = ("image",) if full else ("image", "decoder")
        data.budget.check(dict.fromkeys(streams, limit))
        if full and data.packing != "fill":
            raise ValueError(
                f"data.packing={data.packing} drops patches of images that task.model without a "
                "decoder reads whole: use fill"
            )
        if self.mask == "batch" and (data.drop.kind != "fixed" or data.packing != "fill"):
            raise ValueError(
                "task.mask=batch needs as many visible patches of all images of one grid: "
                f"data.drop.kind fixed and data.packing fill, got {data.drop.kind} and "
                f"{data.packing}"
            )
        if self.mask == "batch" and (data.drop.schedule != "constant" or data.drop.ramp_images):
            raise ValueError(
                "task.mask=batch needs a rate that is the same for all images of a batch: "
                "data.drop.schedule constant and no data.drop.ramp_images"
            )
        check_sizes(data, self.model.image, math.inf if full else self.model.position.max_grid_side)
        refuse_captions(data, self.kind)
        refuse_mixing(data, self.kind)
        if data.resolution.patch_sizes:
            raise ValueError(
                "data.resolution.patch_sizes: task.kind masked_image predicts pixels of patches of "
                "one size: leave it out"
            )

    def build(self, data: DataConfig) -> MaskedImageTask:
        """The task on this data."""
        return MaskedImageTask(self, data)


class MaskedImageTask(ImageTask):
    """A tower on visible patches, a decoder, and a loss that is a mean over images.

    Args:
        config: The model.
        data: How images are sized, and how many of their patches are hidden.
    """

    def build_model(self) -> MaskedImage:
        """A new model with random weights, on the host."""
        return MaskedImage(self.config.model)

    def build_samples(self, tokenizer: Tokenizer | None, seed: int) -> MaskedBuilder:
        """What makes images with hidden patches of samples."""
        model = self.config.model
        side = model.image.position.max_grid_side
        if model.decoder is not None:
            side = min(side, model.position.max_grid_side)
        return MaskedBuilder(
            self.data.resolution,
            self.data.drop,
            model.image.patch_size,
            side,
            seed,
            augment=self.data.augment,
            planner=self.planner,
            full=model.decoder is None,
            shared=self.config.mask == "batch",
        )

    def count(self, inputs: Inputs) -> float:
        """Images."""
        assert isinstance(inputs, MaskedInputs)
        return inputs.whole.segments.num_examples

    def loss(
        self, outputs: PredictedPatches, inputs: Sequence[Inputs], counts: Sequence[float]
    ) -> Loss:
        """The mean over the images of all ranks; this micro-batch's part of it.

        Of each image the mean over its hidden patches first: else long images would count most.
        """
        (part,) = inputs
        assert isinstance(part, MaskedInputs)
        # The squares of small errors vanish in half precision.
        with torch.autocast(outputs.pixels_TK.device.type, enabled=False):
            total = masked_pixel_loss(outputs.pixels_TK, part.whole.patches, part.weights)
        return Loss(total / sum(counts), {})

    def flops(self, inputs: Inputs) -> float:
        """FLOPs of one forward and one backward pass, the decoder included."""
        assert isinstance(inputs, MaskedInputs)
        visible, whole = (
            LengthSums.of(packed.segments.lengths[: packed.segments.num_examples])
            for packed in (inputs.images or inputs.whole, inputs.whole)
        )
        tower = tower_flops(self.config.model.image, 0, visible)
        return (
            sum(tower)
            + backward_flops(tower)
            + 3 * decoder_flops(self.config.model, visible, whole)
        )
