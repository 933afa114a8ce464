"""Segments: where each example lies on a packed axis.

No mask over tokens is ever built (NaViT packs into rows with a mask; a single stream with
variable-length attention needs neither).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from navit_clip.packed.movable import Movable

CHUNK_TOKENS = 2048  # of `Segments.chunks`
LENGTH_CLASSES = (16, 32, 64, 128, 256)
"""Longest segment of each class for which there are kernels; see `Segments.layout`."""
LAYOUT_HEAD = 3 + len(LENGTH_CLASSES)
"""Numbers in `Segments.layout` before the lengths."""


# Not frozen: of a frozen dataclass that it passes on, torch.compile in 2.11 guards all fields,
# and compiles again for each batch.
@dataclass(eq=False)
class Segments(Movable):
    """Where each example lies on a packed axis of T tokens; never changed once made.

    Examples come first; what a fixed token budget leaves unused is one padding segment at the
    end, which attention keeps to itself and pooling and loss ignore.

    Attributes:
        lengths: Tokens of each segment, on the host; the padding segment last, if there is one.
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

    @cached_property
    def num_tokens(self) -> int:
        """T, padding included."""
        return sum(self.lengths)

    @cached_property
    def num_real_tokens(self) -> int:
        """Tokens that belong to an example."""
        return sum(self.lengths[: self.num_examples])

    @cached_property
    def padding(self) -> int:
        """Unused tokens at the end of the stream."""
        return self.num_tokens - self.num_real_tokens

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest example, 0 without any."""
        return max(self.lengths[: self.num_examples], default=0)

    @cached_property
    def layout(self) -> Tensor:
        """int32 [LAYOUT_HEAD + E], always on the host, for operators that take tensors alone.

        The number of examples, their tokens in all, those of the longest; for each of
        LENGTH_CLASSES where it ends among the segments, of which a longer one in front of others
        lifts those to its class; and the tokens of each example. Never as long as `offsets`: a
        compiler would take two sizes for one that are the same at first.
        """
        lengths = np.array(self.lengths[: self.num_examples], dtype=np.int32)
        ends = np.searchsorted(np.maximum.accumulate(lengths), LENGTH_CLASSES, side="right")
        sums = [self.num_examples, self.num_real_tokens, self.max_length]
        return torch.from_numpy(np.concatenate([sums, ends, lengths], dtype=np.int32))

    @cached_property
    def ids(self) -> Tensor:
        """int64 [T]: the segment each token belongs to, computed without a host sync."""
        index = torch.arange(len(self.lengths), device=self.offsets.device)
        return index.repeat_interleave(
            self.offsets.diff().to(torch.int64), output_size=self.num_tokens
        )

    @cached_property
    def chunks(self) -> tuple[Segments, ...]:
        """The same examples on several short streams, laid end to end; padding in the last."""
        chunks: list[Segments] = []
        lengths: list[int] = []
        total = 0
        for length in self.lengths[: self.num_examples]:
            if lengths and total + length > CHUNK_TOKENS:
                chunks.append(Segments.from_lengths(lengths, device=self.offsets.device))
                lengths, total = [], 0
            lengths.append(length)
            total += length
        last = Segments.from_lengths(lengths, padding=self.padding, device=self.offsets.device)
        return (*chunks, last)

    def lengthened(self, added: int) -> Segments:
        """Every example longer by as many tokens, laid out on the device without a host sync."""
        end = self.num_examples
        lengths = (*(length + added for length in self.lengths[:end]), *self.lengths[end:])
        before = torch.arange(len(self.offsets), dtype=torch.int32, device=self.offsets.device)
        return Segments(lengths, self.offsets + added * before.clamp(max=end), end)

    def without_padding(self) -> Segments:
        """The same examples on a stream that ends with the last of them."""
        if not self.padding:
            return self
        end = self.num_examples
        return Segments(self.lengths[:end], self.offsets[: end + 1], end)


def order_by_length(
    tower: str, lengths: Sequence[int], budget: int | None
) -> tuple[np.ndarray, Segments, Tensor]:
    """Lays out examples in the stable order of their lengths.

    Returns:
        int64 [E], the example in each segment; the segments, padded to the budget if there is one;
        and int64 [E], the segment of each example.
    """
    if not lengths:
        raise ValueError(f"nothing to pack: a batch needs at least one {tower}")
    total = sum(lengths)
    if budget is not None and total > budget:
        raise ValueError(f"{total} {tower} tokens do not fit a budget of {budget}")
    sort = np.argsort(lengths, kind="stable")
    padding = 0 if budget is None else budget - total
    segments = Segments.from_lengths([lengths[i] for i in sort], padding=padding)
    return sort, segments, torch.from_numpy(np.argsort(sort))
