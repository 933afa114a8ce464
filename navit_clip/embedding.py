"""Embedding images and captions with a trained model, packed by token budget.

What the harnesses stand on, and the way to use a model from Python: any number of images of any
size in, unit vectors in the same order out, no token of padding computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from navit_clip.data.decode import EncodedImage, patchify
from navit_clip.data.sizing import fit_grid
from navit_clip.image_tower import ImageTowerConfig
from navit_clip.interop.pretrained import Pretrained
from navit_clip.packing import ImagePatches, pack_images, pack_texts

STREAM_TOKENS = 16384  # per forward pass; bounds memory, hardly changes speed

T = TypeVar("T")


def size_image(
    image: EncodedImage, config: ImageTowerConfig, max_tokens: int, *, square: bool = False
) -> ImagePatches:
    """Resizes an image as for inference: native up to a budget, never enlarged, no drop.

    Args:
        image: The encoded image.
        config: Of the tower that will read it.
        max_tokens: Most patches.
        square: Squash to the largest square of at most `max_tokens` patches.

    Raises:
        SkipSampleError: If the pixels cannot be decoded.
    """
    patch, most = config.patch_size, config.position.max_grid_side
    if square:
        side = min(int(max_tokens**0.5), most)
        rows, columns = side, side
    else:
        rows, columns = fit_grid(image.height, image.width, patch, max_tokens, most)
    pixels = image.pixels(rows * patch, columns * patch, reduced=False)
    coords = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1).astype(np.int32)
    return ImagePatches(patchify(pixels, patch), coords, (rows, columns))


def embed_images(pretrained: Pretrained, images: Iterable[ImagePatches]) -> Tensor:
    """Embeds sized images.

    Args:
        pretrained: The model.
        images: As `size_image` makes them; consumed as a stream.

    Returns:
        float32 [E, D] unit vectors on the host, in order.
    """
    model = pretrained.model

    def embed(batch: Sequence[ImagePatches]) -> Tensor:
        return model.embed_images(pack_images(batch).to(model.device))

    return _embed(pretrained, images, lambda image: len(image.patches), embed)


def embed_texts(pretrained: Pretrained, texts: Sequence[str]) -> Tensor:
    """Embeds captions.

    Args:
        pretrained: The model and its tokenizer.
        texts: Captions of any length; cut at the model's context.

    Returns:
        float32 [E, D] unit vectors on the host, in order.
    """
    model, context = pretrained.model, pretrained.model.config.text.context_length
    ids = (pretrained.tokenizer.encode(text, context) for text in texts)

    def embed(batch: Sequence[list[int]]) -> Tensor:
        return model.embed_texts(pack_texts(batch).to(model.device))

    return _embed(pretrained, ids, len, embed)


@torch.inference_mode()
def _embed(
    pretrained: Pretrained,
    items: Iterable[T],
    length: Callable[[T], int],
    embed: Callable[[Sequence[T]], Tensor],
) -> Tensor:
    parts = [embed(batch).float().cpu() for batch in _streams(items, length)]
    return torch.cat(parts) if parts else torch.zeros(0, pretrained.model.config.embed_dim)


def _streams(items: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """Consecutive items, as many as one stream holds; a single longer one goes alone."""
    batch: list[T] = []
    tokens = 0
    for item in items:
        size = length(item)
        if batch and tokens + size > STREAM_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(item)
        tokens += size
    if batch:
        yield batch
