"""Windows of uneven lengths put together into groups of one size (GreenMIM, arXiv 2205.13515).

A hierarchical tower that sees few of an image's tokens has windows of any length. Attention in
segments takes them as they are; attention in equal batches wants groups of whole windows, each
padded to one size, with a mask between windows. Groups are filled one after another, each as full
as the windows that are left allow (a subset-sum problem, solved exactly), and the size is the one
of the least operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_Fills = tuple[tuple[dict[int, int], int], ...]


@dataclass(frozen=True)
class WindowGroups:
    """Which group each of W windows lies in, and where.

    Attributes:
        count: Groups.
        size: Tokens of a group, padding included.
        group_W: int64 [W], the group of each window.
        start_W: int64 [W], the place in its group at which each window begins.
    """

    count: int
    size: int
    group_W: np.ndarray
    start_W: np.ndarray

    def places(self, lengths_W: np.ndarray) -> np.ndarray:
        """int64 [T]: where each token lies in the groups end to end, ``count·size`` places.

        Args:
            lengths_W: Of the windows, whose tokens lie end to end in their order.
        """
        ends_W = lengths_W.cumsum()
        shift_W = self.group_W * self.size + self.start_W - (ends_W - lengths_W)
        return np.arange(ends_W[-1]) + shift_W.repeat(lengths_W)


def attention_cost(count: int, size: int, width: int) -> int:
    """Multiply-adds of attention in groups, padding included.

    Four projections of each token, and of each pair of places in a group one product for its
    weight and one for its value: count·(4·size·width² + 2·size²·width).
    """
    return count * (4 * size * width**2 + 2 * size**2 * width)


def fill_groups(lengths_W: np.ndarray, size: int) -> WindowGroups:
    """Groups of one size.

    Each group in turn is as full as any choice of the windows left would make it. That does not
    always give the fewest groups, which would be bin packing. Of equally full choices it takes one
    of long windows, since short ones fill later gaps.

    Args:
        lengths_W: int64 [W] tokens of each window, at least one.
        size: Tokens of a group; at least the longest window's.

    Raises:
        ValueError: If there is no window, or one that is empty or longer than a group.
    """
    lengths_W, size = _checked(lengths_W), int(size)  # NumPy's would not hold 2 to its power
    if lengths_W.max() > size:
        raise ValueError(f"a window of {lengths_W.max()} tokens is longer than groups of {size}")
    return _assign(lengths_W, size, _fills(_histogram(lengths_W), size))


def best_groups(lengths_W: np.ndarray, width: int) -> WindowGroups:
    """Groups of the size that costs least by `attention_cost`, the smallest of equal ones.

    Args:
        lengths_W: int64 [W] tokens of each window, at least one.
        width: Of a token.

    Raises:
        ValueError: If there is no window, or one that is empty.
    """
    lengths_W = _checked(lengths_W)
    return _assign(lengths_W, *_best_fills(_histogram(lengths_W), width))


def _checked(lengths_W: np.ndarray) -> np.ndarray:
    lengths_W = np.asarray(lengths_W, dtype=np.int64)
    if not len(lengths_W) or lengths_W.min() < 1:
        raise ValueError("there must be windows, of at least one token each")
    return lengths_W


def _histogram(lengths_W: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Each length and how many windows have it, the longest first."""
    lengths, counts = np.unique(lengths_W, return_counts=True)
    return tuple(zip(lengths.tolist()[::-1], counts.tolist()[::-1], strict=True))


@lru_cache(maxsize=256)  # whole images of one size have the same windows in every batch
def _best_fills(histogram: tuple[tuple[int, int], ...], width: int) -> tuple[int, _Fills]:
    """The size that costs least, and what its groups hold."""
    total = sum(length * count for length, count in histogram)
    best: tuple[int, int, _Fills] | None = None
    for size in range(histogram[0][0], total + 1):
        # Groups without padding would be no cheaper; and of larger ones not even those.
        if best is not None and attention_cost(1, size, width) * total >= best[0] * size:
            break
        if best is not None and attention_cost(-(-total // size), size, width) >= best[0]:
            continue
        fills = _fills(histogram, size)
        cost = attention_cost(sum(times for _, times in fills), size, width)
        if best is None or cost < best[0]:
            best = cost, size, fills
    assert best is not None
    return best[1:]


def _fills(histogram: tuple[tuple[int, int], ...], size: int) -> _Fills:
    """What groups hold, windows by length, and how many groups in a row hold the same."""
    left, fills = dict(histogram), []
    while left:
        fill = _fullest(left, size)
        # No choice was fuller when there were more windows: none is now.
        times = min(left[length] // count for length, count in fill.items())
        fills.append((fill, times))
        for length, count in fill.items():
            left[length] -= times * count
            if not left[length]:
                del left[length]
    return tuple(fills)


def _fullest(left: dict[int, int], size: int) -> dict[int, int]:
    """Windows by length whose sum comes closest to a size from below.

    The table of the dynamic programme has a row for 1, 2, 4, … windows of each length, and a row
    is an integer whose bit t says whether t tokens can be had of the windows so far. `left` has the
    longest windows first.
    """
    rows, reachable, within = [], 1, (1 << size + 1) - 1
    for length, count in left.items():
        count, many = min(count, size // length), 1
        while count:
            many = min(many, count)
            rows.append((reachable, length, many))
            reachable |= reachable << many * length & within
            count, many = count - many, 2 * many
        if reachable >> size:
            break
    tokens, fill = reachable.bit_length() - 1, dict[int, int]()
    for reachable, length, many in reversed(rows):
        if not reachable >> tokens & 1:
            fill[length] = fill.get(length, 0) + many
            tokens -= many * length
    return fill


def _assign(lengths_W: np.ndarray, size: int, fills: _Fills) -> WindowGroups:
    """Gives the places in groups to windows of their lengths, in the windows' order."""
    count, group_W, start_W = 0, np.empty_like(lengths_W), np.empty_like(lengths_W)
    waiting = {length: np.flatnonzero(lengths_W == length) for length in np.unique(lengths_W)}
    for fill, times in fills:
        start = 0
        for length, many in fill.items():
            taken, waiting[length] = np.split(waiting[length], [times * many])
            group_W[taken] = count + np.arange(times).repeat(many)
            start_W[taken] = start + length * np.tile(np.arange(many), times)
            start += length * many
        count += times
    return WindowGroups(count, size, group_W, start_W)
