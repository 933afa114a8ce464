"""Which pairs share a batch: the packer, over both token budgets at once.

Stands between the pairs that a reader builds and the streams that `packing` lays out. NaViT packs
by greedy first-fit, which fills one tower and leaves the other to chance: 200 pairs of random sizes
miss a budget by 4%. Here a few hundred pairs wait, and a batch is the oldest of them, improved by
exchanges with the others until both budgets are full.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

PackingMode = Literal["greedy", "exact", "constant"]


@dataclass(frozen=True)
class Budgets:
    """What one batch of one rank may hold.

    Attributes:
        image_tokens: Image tokens per batch.
        text_tokens: Text tokens per batch.
        max_pairs: Pairs per batch.

    Raises:
        ValueError: If any of them is below 1.
    """

    image_tokens: int = 16384
    text_tokens: int = 4096
    max_pairs: int = 512

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def most_pairs(self) -> int:
        """Pairs that can fit, each being at least one token in each tower."""
        return min(self.max_pairs, self.image_tokens, self.text_tokens)


Item = TypeVar("Item", bound="Packable")


class Packable(Protocol):
    """Anything with a cost in both towers."""

    @property
    def image_length(self) -> int:
        """Image tokens, at least 1."""

    @property
    def text_length(self) -> int:
        """Text tokens, at least 1."""

    def trimmed(self: Item, tokens: int) -> Item:
        """The same with only so many image tokens; never asked for in mode ``greedy``."""


class Packer(Generic[Item]):
    """Packs pairs into batches that fill both token budgets, with look-ahead.

    Pairs wait in a pool in the order they came. Once it holds a batch and `look_ahead` pairs more,
    `choose` takes the batch out of it. That is a function of the pool alone, so the batches are one
    of the pairs offered, and the pool is all there is to restore.

    The sizes seen so far never match two budgets precisely. What one tower is ahead of the other is
    a random walk, which the pool holds up to a point: the larger `look_ahead`, the less padding.

    Modes:
        ``greedy``: Neither budget is exceeded; what is left of them is padding.
        ``exact``: No padding. The choice of captions meets the text budget exactly; where images
            overshoot theirs, by a quarter at most, they lose a few more patches (NaViT names the
            idea, a drop rate chosen to fill the sequence, and skips it). It takes images in slight
            surplus: text tokens 2% above what matches. Whatever cannot be met becomes padding.
        ``constant``: Every batch has `max_pairs` pairs, since a contrastive loss depends on their
            number; it has fewer only where that many do not fit. Images may overshoot by a quarter
            and are cut, captions may not, so this takes some room for text: 2% above the mean.

    Args:
        budgets: What one batch may hold.
        look_ahead: Pairs that wait beyond those of a batch, to choose from; with 0 a batch closes
            with the pair that fills it.
        mode: What is kept exactly.

    Raises:
        ValueError: If `look_ahead` is negative or the mode is unknown.
    """

    def __init__(self, budgets: Budgets, look_ahead: int, mode: PackingMode = "greedy") -> None:
        if look_ahead < 0:
            raise ValueError(f"look_ahead must not be negative, got {look_ahead}")
        if mode not in _PRICES:
            raise ValueError(f"mode must be one of {', '.join(_PRICES)}, got {mode}")
        self.budgets = budgets
        self.look_ahead = look_ahead
        self.mode: PackingMode = mode
        self._pool: list[Item] = []
        self._sizes: list[tuple[int, int]] = []
        self._image_tokens = self._text_tokens = 0

    @property
    def pending(self) -> tuple[Item, ...]:
        """Every pair taken in but not yet given out; offering them again restores the packer."""
        return tuple(self._pool)

    def offer(self, item: Item) -> None:
        """Takes in one pair.

        Raises:
            ValueError: If the pair alone exceeds a budget.
        """
        budgets = self.budgets
        image_length, text_length = item.image_length, item.text_length
        if image_length > budgets.image_tokens or text_length > budgets.text_tokens:
            raise ValueError(
                f"a pair of {image_length} image and {text_length} text tokens exceeds "
                f"the budgets of {budgets.image_tokens} and {budgets.text_tokens}"
            )
        self._pool.append(item)
        self._sizes.append((image_length, text_length))
        self._image_tokens += image_length
        self._text_tokens += text_length

    def take(self) -> list[Item] | None:
        """A batch in the order its pairs came, or None while too few wait to choose from."""
        waiting = len(self._pool)
        if not waiting:
            return None
        totals = self._image_tokens, self._text_tokens
        if waiting < self.look_ahead + _expected_pairs(self.budgets, self.mode, waiting, totals):
            return None
        return self.flush()

    def flush(self) -> list[Item] | None:
        """A batch of what there is, full or not; None once nothing is pending."""
        if not self._pool:
            return None
        chosen = choose(np.array(self._sizes), self.budgets, self.mode).tolist()
        batch: list[Item] = []
        lengths: list[int] = []
        pool, sizes = self._pool, self._sizes
        self._pool, self._sizes = [], []
        for item, size, leaves in zip(pool, sizes, chosen, strict=True):
            if leaves:
                batch.append(item)
                lengths.append(size[0])
                self._image_tokens -= size[0]
                self._text_tokens -= size[1]
            else:
                self._pool.append(item)
                self._sizes.append(size)
        kept = share_cut(lengths, self.budgets.image_tokens)
        return [
            item if keep == length else item.trimmed(keep)
            for item, keep, length in zip(batch, kept, lengths, strict=True)
        ]


# A budget further than this from what the pool's means fill is not aimed at: the pool would only
# collect pairs that do not help.
_REACH = 0.4
# The most that images may overshoot before they are cut.
_OVERSHOOT = 0.25
# A surplus of images up to this stays in the pool, against a dearth to come, before any are cut.
_STORE = 0.1
# This part of a batch is the oldest pairs, whatever their sizes, so that none waits for ever.
_OLDEST_PART = 4
# A few dozen suffice while the pool is balanced; the limit bounds the time.
_MOST_EXCHANGES = 192
# Exchanges looked at in one go: larger arrays would leave the cache, and the allocator's keeping.
_BLOCK = 16384


class _Price(NamedTuple):
    """What a token off the aim costs, below it and above it."""

    short: float
    over: float


# Of image and text tokens. Beyond `greedy` an overshoot of images is cut, and so is cheap; and a
# constant number of pairs fixes how much text there is on average, so nothing is paid to fill.
_PRICES: dict[PackingMode, tuple[_Price, _Price]] = {
    "greedy": (_Price(1, 4), _Price(1, 4)),
    "exact": (_Price(16, 1), _Price(16, 64)),
    "constant": (_Price(16, 1), _Price(0, 64)),
}
# Of a budget out of reach: worth keeping steady, but no token of the other tower.
_OUT_OF_REACH = _Price(1 / 16, 1 / 16)


def choose(sizes: np.ndarray, budgets: Budgets, mode: PackingMode) -> np.ndarray:
    """Chooses which pairs of a pool make the next batch.

    The oldest pairs, as many as fill the budgets on average; then, one at a time, the exchange of
    one of them for one that waits (or an addition, or a removal) that brings both totals nearest
    to their budgets. The oldest quarter always stays.

    Args:
        sizes: int64 [M, 2] image and text tokens of each pair in the pool, oldest first.
        budgets: What the batch may hold.
        mode: See `Packer`. Beyond ``greedy`` the images may overshoot, to be cut.

    Returns:
        bool [M], at least one of them true.
    """
    count, aims = _plan(sizes, budgets, mode)
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[:count] = True
    limits = np.array([budgets.image_tokens, budgets.text_tokens])
    oldest = (np.cumsum(sizes, axis=0) * _OLDEST_PART <= limits).all(axis=1).sum()
    fixed = max(1, min(int(oldest), budgets.most_pairs // _OLDEST_PART, count))
    _exchange(sizes, chosen, fixed, aims, budgets, mode)
    if mode != "greedy":
        limits[0] = int(limits[0] * (1 + _OVERSHOOT))
    if (sizes[chosen].sum(axis=0) > limits).any():
        return _first_fit(sizes, chosen, limits, budgets.most_pairs)
    return chosen


def _expected_pairs(
    budgets: Budgets, mode: PackingMode, pairs: int, totals: tuple[int, int]
) -> float:
    """How many pairs of mean size a batch holds, what may be cut included."""
    by_image = budgets.image_tokens * pairs / totals[0]
    by_text = budgets.text_tokens * pairs / totals[1]
    if mode != "greedy":
        by_image *= 1 + _OVERSHOOT
    return min(by_image, by_text, budgets.most_pairs)


def _plan(sizes: np.ndarray, budgets: Budgets, mode: PackingMode) -> tuple[int, tuple[int, int]]:
    """How many of the oldest pairs to begin with, and the image and text tokens to aim at."""
    pairs, most = len(sizes), budgets.most_pairs
    image_until, text_until = np.cumsum(sizes, axis=0).T
    image_mean, text_mean = int(image_until[-1]) / pairs, int(text_until[-1]) / pairs
    reach = _REACH if mode == "greedy" else _OVERSHOOT
    if mode == "constant":
        image_aim = _within_reach(budgets.image_tokens, most * image_mean, reach)
        text_aim: float = budgets.text_tokens
        count, expected = most, float(most)
    else:
        by_image = min(budgets.image_tokens / image_mean, most)
        by_text = min(budgets.text_tokens / text_mean, most)
        if mode == "exact":
            # As many as need no cutting once the pool has stored all it may.
            by_image = min(by_image * (1 + _STORE), most)
        image_aim = _within_reach(budgets.image_tokens, by_text * image_mean, reach)
        text_aim = _within_reach(budgets.text_tokens, by_image * text_mean, reach)
        expected = text_aim / text_mean
        if mode == "exact":
            count = int(np.searchsorted(text_until, text_aim))
        else:
            filled = image_until / image_aim + text_until / text_aim
            count = int(np.searchsorted(filled, 2, side="right"))
    if mode != "greedy":
        image_aim = max(image_aim, expected * image_mean / (1 + _STORE))
    return max(1, min(count, most, pairs)), (round(image_aim), round(text_aim))


def _within_reach(budget: int, offered: float, reach: float) -> float:
    """The budget, unless the pool offers far less; then, the less the sooner, what it offers."""
    return min(budget, max(offered, 2 * (1 + reach) * offered - budget))


def _exchange(
    sizes: np.ndarray,
    chosen: np.ndarray,
    fixed: int,
    aims: tuple[int, int],
    budgets: Budgets,
    mode: PackingMode,
) -> None:
    """Improves the choice in place, by the best exchange of all until none is an improvement.

    The first `fixed` pairs stay. Among equals the newest leaves and the oldest joins. float32 holds
    tokens precisely up to 2^24, so that a cost of 0 is exactly the aim.
    """
    nobody = len(sizes)  # in place of a pair that leaves or joins
    image, text = np.append(sizes, [[0, 0]], axis=0).T.astype(np.float32)
    full = budgets.image_tokens, budgets.text_tokens
    prices = [
        price if aim >= budget else _OUT_OF_REACH
        for price, aim, budget in zip(_PRICES[mode], aims, full, strict=True)
    ]
    slopes = [(p.short / aim, -p.over / aim) for p, aim in zip(prices, aims, strict=True)]
    (image_short, image_over), (text_short, text_over) = np.array(slopes, dtype=np.float32)

    def cost(image_gap: np.ndarray, text_gap: np.ndarray) -> np.ndarray:
        of_image = np.maximum(image_gap * image_short, image_gap * image_over)
        of_image += np.maximum(text_gap * text_short, text_gap * text_over)
        return of_image

    image_gap, text_gap = (np.array(aims) - sizes[chosen].sum(axis=0)).astype(np.float32)
    lowest = cost(image_gap, text_gap)
    for _ in range(_MOST_EXCHANGES):
        leaving = np.flatnonzero(chosen[fixed:])[::-1] + fixed
        joining = np.flatnonzero(~chosen)
        if mode != "constant":
            if fixed + len(leaving) < budgets.most_pairs:
                leaving = np.append(leaving, nobody)
            joining = np.append(joining, nobody)
        if lowest == 0 or not len(joining):
            return
        best = None
        rows = max(1, _BLOCK // len(joining))
        for start in range(0, len(leaving), rows):
            leaves = leaving[start : start + rows]
            costs = cost(
                (image_gap + image[leaves])[:, None] - image[joining],
                (text_gap + text[leaves])[:, None] - text[joining],
            )
            row, column = divmod(int(costs.argmin()), len(joining))
            if costs[row, column] < lowest:
                lowest = costs[row, column]
                best = leaves[row], joining[column]
        if best is None:
            return
        leaves, joins = best
        image_gap += image[leaves] - image[joins]
        text_gap += text[leaves] - text[joins]
        if leaves != nobody:
            chosen[leaves] = False
        if joins != nobody:
            chosen[joins] = True


def _first_fit(
    sizes: np.ndarray, chosen: np.ndarray, limits: np.ndarray, most_pairs: int
) -> np.ndarray:
    """Those of the chosen that fit, oldest first, then others that do.

    For pools that no exchanges bring within the limits, such as one of a few huge images.
    """
    image_left, text_left = limits.tolist()
    within = np.zeros_like(chosen)
    for pair in (*np.flatnonzero(chosen), *np.flatnonzero(~chosen)):
        image_length, text_length = sizes[pair].tolist()
        if image_length <= image_left and text_length <= text_left:
            within[pair] = True
            image_left, text_left = image_left - image_length, text_left - text_length
            most_pairs -= 1
            if not most_pairs:
                break
    return within


def share_cut(lengths: Sequence[int], total: int) -> list[int]:
    """Cuts images to a total so that none loses a larger share of its tokens than it must.

    Args:
        lengths: Tokens of each image.
        total: Tokens to be left, at least one per image.

    Returns:
        Tokens of each image afterwards, at least 1; `lengths` if they are within the total.

    Raises:
        ValueError: If the total is below one token per image.
    """
    if sum(lengths) <= total:
        return list(lengths)
    if total < len(lengths):
        raise ValueError(f"{len(lengths)} images cannot be cut to {total} tokens")
    whole = sum(lengths)
    # Each loses at least the common share, rounded down; the rest goes token by token, from
    # whichever image it costs the least share.
    kept = [-(-length * total // whole) for length in lengths]
    next_loss = [
        ((length - keep + 1) / length, image)
        for image, (length, keep) in enumerate(zip(lengths, kept, strict=True))
        if keep > 1
    ]
    heapq.heapify(next_loss)
    for _ in range(sum(kept) - total):
        image = next_loss[0][1]
        kept[image] -= 1
        if kept[image] > 1:
            loss = (lengths[image] - kept[image] + 1) / lengths[image]
            heapq.heapreplace(next_loss, (loss, image))
        else:
            heapq.heappop(next_loss)
    return kept
