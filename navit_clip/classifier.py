"""NaViTClassifier, the model as users know it: images in, probabilities of named classes out.

The tower and head are `navit_clip.models.classifier.Classifier`'s, which the trainer trains; here
stands what a user needs around them, as in `navit_clip.model` for CLIP.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from navit_clip.data.in_memory import ImageInput
from navit_clip.export.card import CLASSIFIER_TAGS, CLASSIFIER_TASK, LIBRARY
from navit_clip.export.description import Description
from navit_clip.export.hub import PretrainedModel
from navit_clip.inference.cascade import classify_twice
from navit_clip.inference.preprocess import Preprocess
from navit_clip.models.classifier import Classifier, ClassifierConfig
from navit_clip.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self


class NaViTClassifier(
    Classifier,
    PretrainedModel,
    library_name=LIBRARY,
    pipeline_tag=CLASSIFIER_TASK,
    tags=list(CLASSIFIER_TAGS),
):
    """A classifier with the names of its classes and its preprocessing; see `PretrainedModel`.

    Args:
        config: The architecture.
        classes: Names by index, at least two.
        preprocess: How the model wants its images; None for one that will get none.
    """

    kind = "classifier"

    def __init__(
        self,
        config: ClassifierConfig,
        classes: Sequence[str],
        preprocess: Preprocess | None = None,
    ) -> None:
        super().__init__(config, len(classes))
        self.classes, self.preprocess = tuple(classes), preprocess

    @classmethod
    def from_description(cls, description: Description, tokenizer: Tokenizer | None) -> Self:
        """A model with random weights."""
        assert isinstance(description.model, ClassifierConfig)
        return cls(description.model, description.classes, description.preprocess)

    @torch.no_grad()
    def classify(
        self,
        images: Iterable[ImageInput],
        max_tokens: int | None = None,
        patch_size: int | None = None,
        *,
        cascade: tuple[int, int] | None = None,
        share: float = 0.3,
    ) -> Tensor:
        """Which of `classes` each image shows; any size, each at its own aspect ratio.

        Args:
            images: Paths, Pillow images, arrays, tensors or bytes, as `size_images` takes them.
            max_tokens: Most patches of one image; None for the model's own limit.
            patch_size: Side of a patch in pixels, as in `NaViTCLIP.encode_image`.
            cascade: Instead of `max_tokens`: a limit for all images and a larger one for those that
                the model is then least sure of, such as (64, 256).
            share: Of `cascade`: the share of the images that is classified again, rounded up.

        Returns:
            float32 [E, classes] on the host: rows sum to 1 for a softmax, and are independent
            probabilities for a sigmoid.

        Raises:
            ValueError: If something is no image or cannot be read, names its index; or if limits or
                share of a cascade are out of range.
            UserError: If the model has no limit of its own and none is given.
        """

        def classify(images: Iterable[ImageInput], max_tokens: int | None) -> Tensor:
            features_EC = self.features(images, max_tokens, patch_size)
            return self.probabilities(features_EC.to(self.device)).cpu()

        if cascade is not None:
            return classify_twice(classify, images, cascade, share)
        return classify(images, max_tokens)
