"""Images and texts of any form in, vectors or probabilities out: what `NaViTCLIP` offers its users.

Plain functions of a model, its tokenizer and its preprocessing; arguments, results and errors are
described at the methods of `NaViTCLIP`. They check and size what comes in; packing and the towers'
forward passes are `navit_clip.inference.embed`'s, which the evaluation uses too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from navit_clip.data.in_memory import ImageInput, open_image
from navit_clip.errors import SkipSampleError, UserError
from navit_clip.inference.embed import image_vectors, size_image, text_vectors
from navit_clip.inference.preprocess import Preprocess
from navit_clip.models.clip import CLIP
from navit_clip.packed.images import ImagePatches
from navit_clip.tokenizers.base import Tokenizer

PLAIN_TEMPLATE = "a photo of a {}."

_WINDOW = 256  # images that are sized and wait for the towers; bounds memory
_THREADS = 8  # Pillow decodes and resizes without the interpreter's lock
_PROMPTS = 4096  # whose vectors are held at once


def encode_images(
    model: CLIP,
    preprocess: Preprocess | None,
    images: Iterable[ImageInput],
    max_tokens: int | None = None,
    *,
    normalize: bool = True,
) -> Tensor:
    """`NaViTCLIP.encode_image` of a model on any device."""
    if isinstance(images, str | bytes | os.PathLike | Image.Image) or (
        isinstance(images, np.ndarray | Tensor) and images.ndim < 4
    ):
        raise ValueError(f"images must be a list, got one {type(images).__name__}")
    if max_tokens is None:
        if preprocess is None:
            raise UserError(
                "this model has no preprocess to say how large images may be: give max_tokens"
            )
        max_tokens = preprocess.max_tokens
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    square = preprocess is not None and preprocess.square

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


def encode_texts(
    model: CLIP, tokenizer: Tokenizer | None, texts: Iterable[str], *, normalize: bool = True
) -> Tensor:
    """`NaViTCLIP.encode_text` of a model on any device."""
    if tokenizer is None:
        raise UserError(
            "this model has no tokenizer: load it with NaViTCLIP.from_pretrained, or set "
            "model.tokenizer"
        )
    return text_vectors(model, tokenizer, _strings(texts, "texts"), normalize=normalize)


def encode_labels(
    model: CLIP,
    tokenizer: Tokenizer | None,
    labels: Sequence[str],
    templates: Sequence[str] | None = None,
) -> Tensor:
    """The labels' vectors [labels, D] that `NaViTCLIP.classify` compares images with."""
    labels = list(_strings(labels, "labels"))
    templates = list(_strings((PLAIN_TEMPLATE,) if templates is None else templates, "templates"))
    for name, given in (("labels", labels), ("templates", templates)):
        if not given:
            raise ValueError(f"{name} is empty: nothing to choose from")
    for index, template in enumerate(templates):
        if "{}" not in template:
            raise ValueError(f"templates[{index}] has no {{}} for the label: {template!r}")
    size = max(1, _PROMPTS // len(templates))
    vectors = []
    for start in range(0, len(labels), size):
        group = labels[start : start + size]
        prompts = [template.replace("{}", label) for label in group for template in templates]
        prompts_LTD = encode_texts(model, tokenizer, prompts).unflatten(0, (len(group), -1))
        vectors.append(F.normalize(prompts_LTD.mean(1), dim=-1))
    return torch.cat(vectors)


def _strings(texts: Iterable[Any], name: str) -> Iterator[str]:
    """The same, each checked when its turn comes."""
    if isinstance(texts, str | bytes):
        raise ValueError(f"{name} must be a list of strings, got one {type(texts).__name__}")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{index}]: {type(text).__name__} is no string")
        yield text
