"""The way to use a model from Python: pictures and sentences in, vectors or probabilities out.

A part of `NaViTCLIP`, apart from it because towers know nothing of files and tokenizers. Sizing and
packing are `navit_clip.inference.embed`'s, the same that the harnesses use.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from navit_clip.data.decode import SkipSampleError
from navit_clip.data.in_memory import ImageInput, open_image
from navit_clip.errors import UserError
from navit_clip.inference.embed import image_vectors, size_image, text_vectors
from navit_clip.packed.images import ImagePatches

if TYPE_CHECKING:
    from navit_clip.export.pretrained import Preprocess
    from navit_clip.models.clip import NaViTCLIP
    from navit_clip.tokenizers.base import Tokenizer

PLAIN_TEMPLATE = "a photo of a {}."

_WINDOW = 256  # images that are sized and wait for the towers; bounds memory
_THREADS = 8  # Pillow decodes and resizes without the interpreter's lock
_PROMPTS = 4096  # whose vectors are held at once


class EncodeMixin:
    """Embeds images and texts with the model that it is a part of.

    All methods work without gradients and on the model's device; results are float32 on the host.
    Put the model into ``eval()`` and, on a GPU, calls into ``torch.autocast`` for speed.

    Attributes:
        tokenizer: For texts; None for a model that was built, not loaded.
        preprocess: How the model wants its images; None likewise.
    """

    tokenizer: Tokenizer | None = None
    preprocess: Preprocess | None = None

    def encode_image(
        self,
        images: Iterable[ImageInput],
        max_tokens: int | None = None,
        normalize: bool = True,
    ) -> Tensor:
        """Embeds images of any size, each at its own aspect ratio and never enlarged.

        Args:
            images: Pillow images of any mode; uint8 arrays [H, W, 3]; tensors [3, H, W], uint8 or
                float in [0, 1]; bytes of encoded files; or paths. Grey and opacity are
                understood. An iterator is consumed a few hundred at a time.
            max_tokens: Most patches of one image; None for the model's own budget.
            normalize: Unit vectors, whose products are cosines; else the projections as they are.

        Returns:
            float32 [E, D] on the host, in the order of `images`.

        Raises:
            ValueError: If something is no image or cannot be read; names its index.
            UserError: If the model has no budget of its own and none is given.
        """
        model = self._model
        if isinstance(images, str | bytes | os.PathLike | Image.Image) or (
            isinstance(images, np.ndarray | Tensor) and images.ndim < 4
        ):
            raise ValueError(f"images must be a list, got one {type(images).__name__}")
        if max_tokens is None:
            if self.preprocess is None:
                raise UserError(
                    "this model has no preprocess to say how large images may be: give max_tokens"
                )
            max_tokens = self.preprocess.max_tokens
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        square = self.preprocess is not None and self.preprocess.square

        def size(numbered: tuple[int, ImageInput]) -> ImagePatches:
            index, image = numbered
            try:
                return size_image(open_image(image), model.config.image, max_tokens, square=square)
            except SkipSampleError as error:
                raise ValueError(f"images[{index}]: {error.detail}") from error
            except ValueError as error:
                raise ValueError(f"images[{index}]: {error}") from error

        def sized() -> Iterator[ImagePatches]:
            waiting = enumerate(images)
            with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
                while window := list(islice(waiting, _WINDOW)):
                    yield from threads.map(size, window)

        return image_vectors(model, sized(), normalize=normalize)

    def encode_text(self, texts: Iterable[str], normalize: bool = True) -> Tensor:
        """Embeds texts, cut at the model's context.

        Args:
            texts: Captions.
            normalize: Unit vectors, whose products are cosines; else the projections as they are.

        Returns:
            float32 [E, D] on the host, in the order of `texts`.

        Raises:
            ValueError: If something is no string; names its index.
            UserError: If the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError(
                "this model has no tokenizer: load it with NaViTCLIP.from_pretrained, or set "
                "model.tokenizer"
            )
        checked = _strings(texts, "texts")
        return text_vectors(self._model, self.tokenizer, checked, normalize=normalize)

    def similarity(
        self, images: Iterable[ImageInput], texts: Iterable[str], max_tokens: int | None = None
    ) -> Tensor:
        """Cosine similarity of every image with every text, not scaled.

        Args:
            images: As in `encode_image`.
            texts: As in `encode_text`.
            max_tokens: As in `encode_image`.

        Returns:
            float32 [E, T] in [-1, 1], images by texts.
        """
        return self.encode_image(images, max_tokens) @ self.encode_text(texts).T

    def classify(
        self,
        images: Iterable[ImageInput],
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
        max_tokens: int | None = None,
    ) -> Tensor:
        """Zero-shot classification: which of the labels an image shows.

        Each label is the mean of its prompts' unit vectors, normalised again, as CLIP has it. The
        probabilities are a softmax over the labels at the model's scale; a model of the sigmoid
        loss is read the same way, where its bias cancels.

        Args:
            images: As in `encode_image`.
            labels: What to choose from.
            templates: Prompts with ``{}`` in the label's place; None for ``a photo of a {}.``.
            max_tokens: As in `encode_image`.

        Returns:
            float32 [E, labels]; rows sum to 1.

        Raises:
            ValueError: If there is no label or template, or a template without ``{}``.
        """
        labels = list(_strings(labels, "labels"))
        templates = list(
            _strings((PLAIN_TEMPLATE,) if templates is None else templates, "templates")
        )
        for name, given in (("labels", labels), ("templates", templates)):
            if not given:
                raise ValueError(f"{name} is empty: nothing to choose from")
        for index, template in enumerate(templates):
            if "{}" not in template:
                raise ValueError(f"templates[{index}] has no {{}} for the label: {template!r}")
        group = max(1, _PROMPTS // len(templates))
        labels_CD = torch.cat(
            [
                self._label_vectors(labels[start : start + group], templates)
                for start in range(0, len(labels), group)
            ]
        )
        scale = self._model.log_scale.detach().float().exp().cpu()
        return (scale * self.encode_image(images, max_tokens) @ labels_CD.T).softmax(-1)

    def _label_vectors(self, labels: Sequence[str], templates: Sequence[str]) -> Tensor:
        prompts = [template.replace("{}", label) for label in labels for template in templates]
        vectors = self.encode_text(prompts).unflatten(0, (len(labels), len(templates)))
        return F.normalize(vectors.mean(1), dim=-1)

    @property
    def _model(self) -> NaViTCLIP:
        return cast("NaViTCLIP", self)


def _strings(texts: Iterable[Any], name: str) -> Iterator[str]:
    """The same, each checked when its turn comes."""
    if isinstance(texts, str | bytes):
        raise ValueError(f"{name} must be a list of strings, got one {type(texts).__name__}")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{index}]: {type(text).__name__} is no string")
        yield text
