"""One training batch of one rank: packed inputs, counts, and the state of the data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from navit_clip.packed.images import PackedImages
from navit_clip.packed.texts import PackedTexts


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
