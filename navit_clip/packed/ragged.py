"""Ragged targets: as many values per example as it happens to have, end to end in one tensor.

Boxes, labels, masks, phrases: one image has none of them, the next a hundred. They travel beside
the packed inputs; a loss takes them apart by example or all at once by `Ragged.ids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from navit_clip.packed.movable import Movable


@dataclass(frozen=True, eq=False)
class Ragged(Movable):
    """Values of many examples, end to end.

    Unlike in `Segments`, where an example without tokens would leave nothing to pool, an example
    may have no values.

    Attributes:
        values: [N, ...] those of the first example first.
        ids: int64 [N], the example that each value belongs to, rising.
        lengths: Values of each of the E examples, on the host.
    """

    values: Tensor
    ids: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def from_arrays(cls, arrays: Sequence[np.ndarray]) -> Ragged:
        """Lays out the values of examples in order.

        Args:
            arrays: [n, ...] per example, equal in all but the first dimension, which may be 0.

        Raises:
            ValueError: If there is no example, or their shapes differ.
        """
        if not arrays:
            raise ValueError("nothing to pack: a batch needs at least one example")
        lengths = tuple(map(len, arrays))
        ids = np.repeat(np.arange(len(lengths)), lengths)
        return cls(torch.from_numpy(np.concatenate(arrays)), torch.from_numpy(ids), lengths)

    def __len__(self) -> int:
        """E."""
        return len(self.lengths)

    def examples(self) -> tuple[Tensor, ...]:
        """[n, ...] values of each example in order."""
        # split, not slicing: the backward of a slice writes a gradient of the full size each.
        return self.values.split(self.lengths)
