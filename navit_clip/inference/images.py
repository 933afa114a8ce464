"""Images of a user's, in whatever form, checked and sized for a tower."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from PIL import Image
from torch import Tensor

from navit_clip.data.in_memory import ImageInput, open_image
from navit_clip.errors import SkipSampleError, UserError
from navit_clip.inference.embed import size_image
from navit_clip.inference.preprocess import Preprocess
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.packed.images import ImagePatches

_ONE_IMAGE = (str, bytes, os.PathLike, Image.Image)
_WINDOW = 256  # images that are sized and wait for the tower; bounds memory
_THREADS = 8  # Pillow decodes and resizes without the interpreter's lock


def size_images(
    images: Iterable[ImageInput],
    config: ImageTowerConfig,
    preprocess: Preprocess | None,
    max_tokens: int | None,
    max_pixels: int,
    patch_size: int | None = None,
) -> Iterator[ImagePatches]:
    """Sizes images by `size_image`, in threads, a few hundred ahead of the consumer.

    Args:
        images: Pillow images of any mode; uint8 arrays [H, W, 3]; tensors [3, H, W], uint8 or
            float in [0, 1]; bytes of encoded files; or paths. Grey and opacity are understood.
        config: Of the tower.
        preprocess: Of the model.
        max_tokens: Most patches of one image; None for the model's own limit, at another
            `patch_size` for as many as cover the same area.
        patch_size: P; None for that of the tower.
        max_pixels: Encoded images of more are refused.

    Raises:
        ValueError: If something is no image or cannot be read; names its index. What is wrong with
            the arguments themselves, such as a `patch_size` that the tower cannot read, is raised
            at once, not with the first image.
        UserError: If the model has no limit of its own and none is given.
    """
    if (
        isinstance(images, _ONE_IMAGE)
        or hasattr(images, "read")
        or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4)
    ):
        raise ValueError(f"images must be a list, got one {type(images).__name__}: give [image]")
    own_size = config.patch_size
    if patch_size is not None:
        config = config.with_patch_size(patch_size)
    if max_tokens is None:
        if preprocess is None:
            raise UserError(
                "this model has no preprocess to say how large images may be: give max_tokens"
            )
        max_tokens = preprocess.tokens_at(config.patch_size / own_size)
    if not isinstance(max_tokens, int) or not 1 <= max_tokens < 1 << 31:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens!r}")
    square = preprocess is not None and preprocess.square

    def size(numbered: tuple[int, ImageInput]) -> ImagePatches:
        index, image = numbered
        try:
            opened = open_image(image, max_pixels)
            return size_image(opened, config, max_tokens, square=square)
        except SkipSampleError as error:
            raise ValueError(f"images[{index}]: {error.detail}") from error
        except ValueError as error:
            raise ValueError(f"images[{index}]: {error}") from error

    def sized() -> Iterator[ImagePatches]:
        waiting = enumerate(images)
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
            while window := list(islice(waiting, _WINDOW)):
                yield from threads.map(size, window)

    return sized()
