"""Embedding images and captions with a trained model, packed by token budget.

What the evaluation, `navit_clip.model` and `navit_clip.classifier` stand on: any number of images
of any size in, vectors in the same order out, no token of padding computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from navit_clip.data.decode import EncodedImage, OpenedImage
from navit_clip.data.patches import cut_patches
from navit_clip.data.sizing import fit_grid
from navit_clip.models.clip import CLIP
from navit_clip.models.image_tower import ImageTower, ImageTowerConfig
from navit_clip.packed.images import ImagePatches, pack_images
from navit_clip.packed.texts import pack_texts
from navit_clip.tokenizers.base import Tokenizer

STREAM_TOKENS = 16384  # per forward pass; bounds memory, hardly changes speed

T = TypeVar("T")


def size_image(
    image: EncodedImage | OpenedImage,
    config: ImageTowerConfig,
    max_tokens: int,
    *,
    square: bool = False,
) -> ImagePatches:
    """Resizes an image for inference: its own size up to a token limit, never enlarged, no drop.

    Args:
        image: The image, encoded or in memory.
        config: Architecture of the tower that will read it.
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
    return cut_patches(pixels, patch)


def image_vectors(model: CLIP, images: Iterable[ImagePatches], *, normalize: bool = True) -> Tensor:
    """Embeds sized images, as many per forward pass as `STREAM_TOKENS` hold.

    Args:
        model: On any device.
        images: As `size_image` makes them; consumed as a stream.
        normalize: Unit vectors; else the projections as they are.

    Returns:
        float32 [E, D] on the host, in order.
    """
    planner = model.config.image.planner()  # on the host, else the tower would wait for its copy

    def embed(batch: Sequence[ImagePatches]) -> Tensor:
        packed = pack_images(batch, planner=planner).to(model.device)
        if normalize:
            return model.embed_images(packed)
        return model.image_projection(model.image(packed))

    return embed_streams(model.config.embed_dim, images, lambda image: len(image.patches), embed)


def feature_vectors(tower: ImageTower, images: Iterable[ImagePatches]) -> Tensor:
    """What a head reads of each image, float32 [E, C], as `image_vectors` are made."""
    device, planner = tower.embed.weight.device, tower.config.planner()

    def embed(batch: Sequence[ImagePatches]) -> Tensor:
        vectors: Tensor = tower(pack_images(batch, planner=planner).to(device))
        return vectors

    width = tower.config.encoder.width
    return embed_streams(width, images, lambda image: len(image.patches), embed)


def text_vectors(
    model: CLIP, tokenizer: Tokenizer, texts: Iterable[str], *, normalize: bool = True
) -> Tensor:
    """Embeds captions of any length, cut at the model's context, as `image_vectors` does images."""
    context = model.config.text.context_length
    ids = (tokenizer.encode(text, context) for text in texts)
    return ids_vectors(model, ids, normalize=normalize)


def ids_vectors(
    model: CLIP, captions: Iterable[Sequence[int]], *, normalize: bool = True
) -> Tensor:
    """Embeds token ids of captions that fit the model's context, as `image_vectors` are made."""

    def embed(batch: Sequence[Sequence[int]]) -> Tensor:
        packed = pack_texts(batch).to(model.device)
        if normalize:
            return model.embed_texts(packed)
        return model.text_projection(model.text(packed))

    return embed_streams(model.config.embed_dim, captions, len, embed)


# Not inference_mode: its tensors could not be trained on, by a linear probe for one.
@torch.no_grad()
def embed_streams(
    width: int,
    items: Iterable[T],
    length: Callable[[T], int],
    embed: Callable[[Sequence[T]], Tensor],
) -> Tensor:
    """Vectors of items, as many per forward pass as `STREAM_TOKENS` hold.

    Args:
        width: Of a vector.
        items: Consumed as a stream.
        length: Tokens of an item.
        embed: Of several at once.

    Returns:
        float32 [E, width] on the host, in order.
    """
    parts = [embed(batch).float().cpu() for batch in _streams(items, length)]
    return torch.cat(parts) if parts else torch.zeros(0, width)


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
