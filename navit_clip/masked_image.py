"""NaViTMaskedImage, a pretrained image tower as users know it: features, and predicted pixels.

The tower and decoder are `navit_clip.models.masked_image.MaskedImage`'s, which the trainer trains.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from navit_clip.data.drop import hide_patches
from navit_clip.data.in_memory import ImageInput
from navit_clip.data.patches import join_patches
from navit_clip.export.card import LIBRARY, MASKED_TAGS, MASKED_TASK
from navit_clip.export.description import Description
from navit_clip.export.hub import PretrainedModel
from navit_clip.inference.images import size_images
from navit_clip.inference.preprocess import Preprocess
from navit_clip.losses.masked_pixels import restore_patches
from navit_clip.models.masked_image import MaskedImage, MaskedImageConfig
from navit_clip.packed.images import ImagePatches
from navit_clip.packed.masked import pack_masked
from navit_clip.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self

_GREY = 128  # of hidden patches in a picture


class Prediction(NamedTuple):
    """One image with hidden patches.

    Attributes:
        image: uint8 [H, W, 3] as sized for the model.
        masked: The same with grey in place of hidden patches.
        predicted: The same with the predicted pixels in their place.
    """

    image: np.ndarray
    masked: np.ndarray
    predicted: np.ndarray


class NaViTMaskedImage(
    MaskedImage,
    PretrainedModel,
    library_name=LIBRARY,
    pipeline_tag=MASKED_TASK,
    tags=list(MASKED_TAGS),
):
    """A masked image model with its preprocessing; see `PretrainedModel`.

    Args:
        config: The architecture.
        preprocess: How the model wants its images; None for one that will get none.
    """

    kind = "masked_image"

    def __init__(self, config: MaskedImageConfig, preprocess: Preprocess | None = None) -> None:
        super().__init__(config)
        self.preprocess = preprocess

    @classmethod
    def from_description(cls, description: Description, tokenizer: Tokenizer | None) -> Self:
        """A model with random weights."""
        assert isinstance(description.model, MaskedImageConfig)
        return cls(description.model, description.preprocess)

    @torch.no_grad()
    def predict(
        self,
        images: Iterable[ImageInput],
        rate: float = 0.75,
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> list[Prediction]:
        """Hides patches of images at random and predicts them.

        The model predicts a patch's pixels relative to its own mean and deviation, which are taken
        from the image to show it.

        Args:
            images: Paths, Pillow images, arrays, tensors or bytes, as `size_images` takes them.
            rate: Fraction of patches to hide, at least one of each image and not all.
            max_tokens: Most patches of one image; None for the model's own limit.
            seed: Of which patches are hidden.

        Raises:
            ValueError: If something is no image, has a single patch, or cannot be read; or the
                rate is not between 0 and 1.
            UserError: If the model has no limit of its own and none is given.
        """
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must lie in [0, 1], got {rate}")
        rng = np.random.default_rng(seed)
        found = list[Prediction]()
        for index, image in enumerate(
            size_images(images, self.config.image, self.preprocess, max_tokens, self.max_pixels)
        ):
            tokens = len(image.patches)
            if tokens < 2:
                raise ValueError(f"images[{index}] has a single patch, none to predict")
            found.append(self.predict_hidden(image, hide_patches(tokens, rate, rng)))
        return found

    @torch.no_grad()
    def predict_hidden(self, image: ImagePatches, visible: np.ndarray) -> Prediction:
        """Predicts the patches of a sized image that are not visible.

        Args:
            image: All patches.
            visible: int64 indices of the visible ones, rising.
        """
        inputs = pack_masked([image], [visible])
        with self._autocast():
            pixels_TK = self(inputs.to(self.device)).pixels_TK.float().cpu()
        hidden = inputs.weights.numpy() > 0
        masked, predicted = image.patches.copy(), image.patches.copy()
        masked[hidden] = _GREY
        predicted[hidden] = restore_patches(pixels_TK, inputs.whole.patches).numpy()[hidden]
        return Prediction(
            *(join_patches(p, image.grid) for p in (image.patches, masked, predicted))
        )
