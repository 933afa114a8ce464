"""Token ids of many captions, end to end in one stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from navit_clip.packed.movable import Movable
from navit_clip.packed.segments import Segments, order_by_length


@dataclass(frozen=True)
class PackedTexts(Movable):
    """Token ids of many captions, end to end.

    Attributes:
        token_ids: int32 [T].
        segments: Where each caption lies; sorted by length, see `pack_images`.
        order: int64 [E]: the caller's i-th caption is segment `order[i]`.
    """

    token_ids: Tensor
    segments: Segments
    order: Tensor

    def caption(self, index: int) -> list[int]:
        """Token ids of the caller's caption of this index; waits for the device."""
        segment = int(self.order[index])
        begin, end = self.segments.offsets[segment : segment + 2].tolist()
        ids: list[int] = self.token_ids[begin:end].tolist()
        return ids


def pack_texts(token_ids: Sequence[Sequence[int]], *, budget: int | None = None) -> PackedTexts:
    """Lays the tokens of many captions end to end, sorted as in `pack_images`.

    Args:
        token_ids: At least one caption of at least one token.
        budget: Pad the stream to this many tokens with id 0.

    Raises:
        ValueError: If there is no caption, or more tokens than `budget`.
    """
    sort, segments, order = order_by_length("text", [len(ids) for ids in token_ids], budget)
    stream = np.concatenate([np.asarray(token_ids[i], dtype=np.int32) for i in sort])
    return PackedTexts(torch.from_numpy(np.pad(stream, (0, segments.padding))), segments, order)
