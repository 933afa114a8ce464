"""The packed stream: segments and packed batches.

Stands between the packer, which decides which pairs share a batch, and the towers, which read one
long stream of tokens. `pack_images` and `pack_texts` lay the tokens of a batch end to end;
`Segments` says where each example begins and ends. No mask over tokens is ever built (NaViT packs
into rows with a mask; a single stream with variable-length attention needs neither).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

PART_TOKENS = 2048  # of `Segments.parts`


# Not frozen: of a frozen dataclass that it passes on, torch.compile in 2.11 guards all fields,
# and compiles anew for each batch.
@dataclass(eq=False)
class Segments:
    """Where each example lies on a packed axis of T tokens; never changed once made.

    Examples come first; what a fixed token budget leaves unused is one dummy segment at the end,
    which attention keeps to itself and pooling and loss ignore.

    Attributes:
        lengths: Tokens of each segment, on the host; the dummy segment last, if there is one.
        offsets: int32 [len(lengths) + 1] on the device, cumulative lengths from 0 (cu_seqlens).
        num_examples: E, the number of real examples; `len(lengths)` is E or E + 1.
    """

    lengths: tuple[int, ...]
    offsets: Tensor
    num_examples: int

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], *, padding: int = 0, device: torch.device | str | None = None
    ) -> Segments:
        """Lays out examples of the given lengths, then `padding` unused tokens.

        Args:
            lengths: Tokens of each example, each at least 1.
            padding: Unused tokens at the end of the stream.
            device: Where `offsets` lives.

        Raises:
            ValueError: If an example is empty or `padding` is negative.
        """
        if any(length < 1 for length in lengths):
            raise ValueError(f"every segment needs at least one token, got {min(lengths)}")
        if padding < 0:
            raise ValueError(f"padding must not be negative, got {padding}")
        full = (*lengths, padding) if padding else tuple(lengths)
        offsets = torch.from_numpy(np.cumsum([0, *full], dtype=np.int32))
        return cls(full, offsets.to(device), len(lengths))

    @classmethod
    def singles(cls, count: int, device: torch.device | str) -> Segments:
        """`count` examples of one token each, made on the device without a host sync."""
        return cls((1,) * count, torch.arange(count + 1, dtype=torch.int32, device=device), count)

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return sum(self.lengths)

    @property
    def num_real_tokens(self) -> int:
        """Tokens that belong to an example."""
        return sum(self.lengths[: self.num_examples])

    @property
    def padding(self) -> int:
        """Unused tokens at the end of the stream."""
        return self.num_tokens - self.num_real_tokens

    @property
    def max_length(self) -> int:
        """Tokens of the longest segment, 0 without any."""
        return max(self.lengths, default=0)

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Neighbouring examples of equal length as (length, count), dummy left out."""
        return tuple(
            (length, len(list(group)))
            for length, group in groupby(self.lengths[: self.num_examples])
        )

    @cached_property
    def ids(self) -> Tensor:
        """int64 [T]: the segment each token belongs to, computed without a host sync."""
        index = torch.arange(len(self.lengths), device=self.offsets.device)
        return index.repeat_interleave(
            self.offsets.diff().to(torch.int64), output_size=self.num_tokens
        )

    @cached_property
    def parts(self) -> tuple[Segments, ...]:
        """The same examples on several short streams, laid end to end; padding in the last."""
        parts: list[Segments] = []
        lengths: list[int] = []
        total = 0
        for length in self.lengths[: self.num_examples]:
            if lengths and total + length > PART_TOKENS:
                parts.append(Segments.from_lengths(lengths, device=self.offsets.device))
                lengths, total = [], 0
            lengths.append(length)
            total += length
        last = Segments.from_lengths(lengths, padding=self.padding, device=self.offsets.device)
        return (*parts, last)

    def without_padding(self) -> Segments:
        """The same examples on a stream that ends with the last of them."""
        if not self.padding:
            return self
        end = self.num_examples
        return Segments(self.lengths[:end], self.offsets[: end + 1], end)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """The same segments with `offsets` on another device."""
        return replace(self, offsets=self.offsets.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Segments:
        """The same segments with `offsets` in page-locked memory."""
        return replace(self, offsets=self.offsets.pin_memory())


@dataclass(frozen=True)
class ImagePatches:
    """One image, cut into patches, perhaps with some of them dropped.

    Attributes:
        patches: uint8 [n, P·P·3] kept patches, each row by row with channels last.
        coords: int32 [n, 2] row and column of each kept patch on the image's own grid.
        grid: Rows and columns of the whole grid, before any patch was dropped.
    """

    patches: np.ndarray
    coords: np.ndarray
    grid: tuple[int, int]

    @property
    def tokens_before_drop(self) -> int:
        """Patches of the whole grid."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class PackedImages:
    """Patches of many images, end to end.

    Attributes:
        patches: uint8 [T, P·P·3]; normalised on the device by the image tower.
        coords: int32 [T, 2] row and column of each patch on its image's grid.
        grids: int32 [len(segments.lengths), 2] rows and columns of each image's whole grid.
        segments: Where each image lies; sorted by length, see `pack_images`.
        order: int64 [E]: the caller's i-th image is segment `order[i]`.
    """

    patches: Tensor
    coords: Tensor
    grids: Tensor
    segments: Segments
    order: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedImages:
        """The same images on another device."""
        return PackedImages(
            self.patches.to(device, non_blocking=non_blocking),
            self.coords.to(device, non_blocking=non_blocking),
            self.grids.to(device, non_blocking=non_blocking),
            self.segments.to(device, non_blocking),
            self.order.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> PackedImages:
        """The same images in page-locked memory."""
        return PackedImages(
            self.patches.pin_memory(),
            self.coords.pin_memory(),
            self.grids.pin_memory(),
            self.segments.pin_memory(),
            self.order.pin_memory(),
        )


@dataclass(frozen=True)
class PackedTexts:
    """Token ids of many captions, end to end.

    Attributes:
        token_ids: int32 [T].
        segments: Where each caption lies; sorted by length, see `pack_images`.
        order: int64 [E]: the caller's i-th caption is segment `order[i]`.
    """

    token_ids: Tensor
    segments: Segments
    order: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedTexts:
        """The same captions on another device."""
        return PackedTexts(
            self.token_ids.to(device, non_blocking=non_blocking),
            self.segments.to(device, non_blocking),
            self.order.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> PackedTexts:
        """The same captions in page-locked memory."""
        return PackedTexts(
            self.token_ids.pin_memory(), self.segments.pin_memory(), self.order.pin_memory()
        )


@dataclass(frozen=True)
class BatchCounts:
    """What went into one batch, for logs and dashboards.

    Attributes:
        pairs: Image–caption pairs.
        image_tokens: Real image tokens, after token drop.
        image_tokens_before_drop: Patches of the whole grids.
        text_tokens: Real text tokens.
        image_budget: Image tokens the batch may hold.
        text_budget: Text tokens the batch may hold.
        sources: Pairs by source.
        skipped: Samples passed over since the reader's previous batch, by reason.
        skip_log: A line for the first few of them, naming each.
    """

    pairs: int
    image_tokens: int
    image_tokens_before_drop: int
    text_tokens: int
    image_budget: int
    text_budget: int
    sources: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    skip_log: tuple[str, ...] = ()


@dataclass(frozen=True)
class PackedBatch:
    """One training batch of one rank.

    Attributes:
        images: All images, packed.
        texts: Their captions, packed.
        ids: A stable id per pair, ``shard/key``.
        counts: What the batch holds and what was skipped on the way.
        position: Where the loader stands once this batch is consumed, by reader.
    """

    images: PackedImages
    texts: PackedTexts
    ids: tuple[str, ...]
    counts: BatchCounts
    position: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device."""
        return replace(
            self,
            images=self.images.to(device, non_blocking),
            texts=self.texts.to(device, non_blocking),
        )

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory; called by `torch.utils.data.DataLoader`."""
        return replace(self, images=self.images.pin_memory(), texts=self.texts.pin_memory())


def pack_images(images: Sequence[ImagePatches], *, budget: int | None = None) -> PackedImages:
    """Lays the patches of many images end to end.

    Segments are sorted by length, so that images of equal length lie side by side and attention
    without a variable-length kernel can take each run of them as one batched call. `order`
    undoes the sorting after pooling.

    Args:
        images: At least one image.
        budget: Pad the stream to this many tokens, so that its shape never changes.

    Raises:
        ValueError: If there is no image, or more tokens than `budget`.
    """
    lengths = [len(image.patches) for image in images]
    sort, padding = _layout("image", lengths, budget)
    rows = [images[i] for i in sort]
    patches = _concatenate([image.patches for image in rows], padding)
    coords = _concatenate([image.coords for image in rows], padding)
    grids = np.array([image.grid for image in rows] + [(1, 1)] * bool(padding), dtype=np.int32)
    return PackedImages(
        torch.from_numpy(patches),
        torch.from_numpy(coords),
        torch.from_numpy(grids),
        Segments.from_lengths([lengths[i] for i in sort], padding=padding),
        torch.from_numpy(np.argsort(sort)),
    )


def pack_texts(token_ids: Sequence[Sequence[int]], *, budget: int | None = None) -> PackedTexts:
    """Lays the tokens of many captions end to end, sorted as in `pack_images`.

    Args:
        token_ids: At least one caption of at least one token.
        budget: Pad the stream to this many tokens with id 0.

    Raises:
        ValueError: If there is no caption, or more tokens than `budget`.
    """
    lengths = [len(ids) for ids in token_ids]
    sort, padding = _layout("text", lengths, budget)
    stream = np.concatenate([np.asarray(token_ids[i], dtype=np.int32) for i in sort])
    return PackedTexts(
        torch.from_numpy(np.pad(stream, (0, padding))),
        Segments.from_lengths([lengths[i] for i in sort], padding=padding),
        torch.from_numpy(np.argsort(sort)),
    )


def _concatenate(parts: Sequence[np.ndarray], padding: int) -> np.ndarray:
    """Joins along the first axis and adds rows of zeros, in one copy of what may be 12 MB."""
    total = sum(map(len, parts))
    joined = np.empty((total + padding, *parts[0].shape[1:]), parts[0].dtype)
    np.concatenate(parts, out=joined[:total])
    joined[total:] = 0
    return joined


def _layout(tower: str, lengths: Sequence[int], budget: int | None) -> tuple[np.ndarray, int]:
    """The stable order by length, and the tokens left unused."""
    if not lengths:
        raise ValueError(f"nothing to pack: a batch needs at least one {tower}")
    total = sum(lengths)
    if budget is not None and total > budget:
        raise ValueError(f"{total} {tower} tokens do not fit a budget of {budget}")
    return np.argsort(lengths, kind="stable"), 0 if budget is None else budget - total
