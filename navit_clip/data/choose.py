"""The choice of a batch out of a pool of waiting examples: the oldest, improved by exchanges.

The arithmetic behind `navit_clip.data.packer`, which holds the pools.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from navit_clip.data.budgets import Budgets, PackingMode

# A budget further than this from what the pool's means fill is not aimed at: the pool would only
# collect examples that do not help.
_REACH = 0.4
# The most that the first stream may overshoot before it is trimmed.
_OVERSHOOT = 0.25
# A surplus of the first stream up to this stays in the pool, against a dearth to come, before any
# example is trimmed.
_STORE = 0.1
# This part of a batch is the oldest examples, whatever their sizes, so that none waits forever.
_OLDEST_PART = 4
# A few dozen suffice while the pool is balanced; the limit bounds the time.
_MOST_EXCHANGES = 192
# Exchanges looked at in one go: larger arrays would leave the cache, and the allocator's keeping.
_BLOCK = 16384


class _Price(NamedTuple):
    """What a token off the aim costs, below it and above it."""

    short: float
    over: float


# Of tokens of the first stream and of the others. Beyond `fill` an overshoot of the first is
# trimmed, and so is cheap; and a constant number of examples fixes how much text there is on
# average, so nothing is paid to fill.
_PRICES: dict[PackingMode, tuple[_Price, _Price]] = {
    "fill": (_Price(1, 4), _Price(1, 4)),
    "exact": (_Price(16, 1), _Price(16, 64)),
    "constant": (_Price(16, 1), _Price(0, 64)),
}
# Of a budget out of reach: worth keeping steady, but no token of another stream.
_OUT_OF_REACH = _Price(1 / 16, 1 / 16)


def choose(sizes: np.ndarray, budgets: Budgets, mode: PackingMode) -> np.ndarray:
    """Chooses which examples of a pool make the next batch.

    The oldest examples, as many as fill the budgets on average; then, one at a time, the exchange
    of one of them for one that waits (or an addition, or a removal) that brings all totals nearest
    to their budgets. The oldest quarter always stays.

    Args:
        sizes: int64 [M, k] tokens of each example in the pool in each stream, oldest first.
        budgets: What the batch may hold, in the order of the streams.
        mode: See `Packer`. Beyond ``fill`` the first stream may overshoot, to be trimmed.

    Returns:
        bool [M], at least one of them true.
    """
    count, aims = _plan(sizes, budgets, mode)
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[:count] = True
    limits = np.array(budgets.limits)
    oldest = (np.cumsum(sizes, axis=0) * _OLDEST_PART <= limits).all(axis=1).sum()
    fixed = max(1, min(int(oldest), budgets.most_examples // _OLDEST_PART, count))
    _exchange(sizes, chosen, fixed, aims, budgets, mode)
    if mode != "fill":
        limits[0] = int(limits[0] * (1 + _OVERSHOOT))
    if (sizes[chosen].sum(axis=0) > limits).any():
        return _first_fit(sizes, chosen, limits, budgets.most_examples)
    return chosen


def expected_examples(
    budgets: Budgets, mode: PackingMode, count: int, totals: Sequence[int]
) -> float:
    """How many examples of mean size a batch holds, what may be trimmed included."""
    expected: float = budgets.most_examples
    slack = 1.0 if mode == "fill" else 1 + _OVERSHOOT  # of the first stream
    for stream, budget in enumerate(budgets.limits):
        fitting = budget * count / totals[stream] * slack
        if fitting < expected:
            expected = fitting
        slack = 1.0
    return expected


def _plan(sizes: np.ndarray, budgets: Budgets, mode: PackingMode) -> tuple[int, list[int]]:
    """How many of the oldest examples to begin with, and the tokens of each stream to aim at."""
    waiting, most = len(sizes), budgets.most_examples
    limits = budgets.limits
    until = np.cumsum(sizes, axis=0).T  # [k, M]
    means = [int(total) / waiting for total in until[:, -1]]
    reach = _REACH if mode == "fill" else _OVERSHOOT
    # The streams that nothing is trimmed of decide how many examples there are; one alone does.
    others = range(1, len(limits)) if len(limits) > 1 else range(1)
    aims: list[float]
    if mode == "constant":
        aims = [_within_reach(limits[0], most * means[0], reach), *limits[1:]]
        count, expected = most, float(most)
    else:
        fitting = [min(limit / mean, most) for limit, mean in zip(limits, means, strict=True)]
        if mode == "exact":
            # As many as need no trimming once the pool has stored all it may.
            fitting[0] = min(fitting[0] * (1 + _STORE), most)
        aims = []
        for stream, (limit, mean) in enumerate(zip(limits, means, strict=True)):
            elsewhere = min(fitting[:stream] + fitting[stream + 1 :], default=most)
            aims.append(_within_reach(limit, elsewhere * mean, reach))
        expected = min(aims[stream] / means[stream] for stream in others)
        if mode == "exact":
            count = min(int(np.searchsorted(until[stream], aims[stream])) for stream in others)
        else:
            filled = sum(tokens / aim for tokens, aim in zip(until, aims, strict=True))
            count = int(np.searchsorted(filled, len(limits), side="right"))
    if mode != "fill":
        aims[0] = max(aims[0], expected * means[0] / (1 + _STORE))
    return max(1, min(count, most, waiting)), [round(aim) for aim in aims]


def _within_reach(budget: int, offered: float, reach: float) -> float:
    """The budget, unless the pool offers far less; then, the less the sooner, what it offers."""
    return min(budget, max(offered, 2 * (1 + reach) * offered - budget))


def _exchange(
    sizes: np.ndarray,
    chosen: np.ndarray,
    fixed: int,
    aims: Sequence[int],
    budgets: Budgets,
    mode: PackingMode,
) -> None:
    """Improves the choice in place, by the best exchange of all until none is an improvement.

    The first `fixed` examples stay. Among equals the newest leaves and the oldest joins. float32
    holds tokens precisely up to 2^24, so that a cost of 0 is exactly the aim.
    """
    # A slot before the examples and one behind them stand for nobody who leaves or joins.
    tokens_kS = np.zeros((sizes.shape[1], len(sizes) + 2), dtype=np.float32)
    tokens_kS[:, 1:-1] = sizes.T
    stays, waits = np.zeros((2, len(sizes) + 2), dtype=bool)
    stays[1 + fixed : -1] = chosen[fixed:]
    waits[1:-1] = ~chosen
    waits[-1] = mode != "constant"
    count = int(chosen.sum())
    first, other = _PRICES[mode]
    slopes = []
    for stream, (aim, budget) in enumerate(zip(aims, budgets.limits, strict=True)):
        price = (other if stream else first) if aim >= budget else _OUT_OF_REACH
        slopes.append((np.float32(price.short / aim), np.float32(-price.over / aim)))

    def cost(gaps: Iterable[np.ndarray]) -> np.ndarray:
        # One stream after the other, and the gaps overwritten: more memory would leave the cache.
        total = None
        for gap, (short, over) in zip(gaps, slopes, strict=True):
            costs = gap * short
            gap *= over
            np.maximum(costs, gap, out=gap)
            total = gap if total is None else np.add(total, gap, out=gap)
        assert total is not None
        return total

    gap = (np.array(aims) - sizes[chosen].sum(axis=0)).astype(np.float32)
    lowest = cost(gap[:, None].copy())
    for _ in range(_MOST_EXCHANGES):
        stays[0] = mode != "constant" and count < budgets.most_examples
        leaving, joining = stays.nonzero()[0][::-1], waits.nonzero()[0]
        if lowest == 0 or not len(joining):
            break
        best = None
        left = (gap[:, None] + tokens_kS.take(leaving, axis=1))[:, :, None]
        joined = tokens_kS.take(joining, axis=1)
        rows = max(1, _BLOCK // len(joining))
        for start in range(0, len(leaving), rows):
            costs = cost(map(np.subtract, left[:, start : start + rows], joined))
            row, column = divmod(int(costs.argmin()), len(joining))
            if costs[row, column] < lowest:
                lowest = costs[row, column]
                best = leaving[start + row], joining[column]
        if best is None:
            break
        leaves, joins = best
        gap += tokens_kS[:, leaves] - tokens_kS[:, joins]
        if leaves:
            stays[leaves], waits[leaves] = False, True
            count -= 1
        if joins <= len(sizes):
            stays[joins], waits[joins] = True, False
            count += 1
    chosen[fixed:] = stays[1 + fixed : -1]


def _first_fit(sizes: np.ndarray, chosen: np.ndarray, limits: np.ndarray, most: int) -> np.ndarray:
    """Those of the chosen that fit, oldest first, then others that do.

    For pools that no exchanges bring within the limits, such as one of a few huge images.
    """
    within = np.zeros_like(chosen)
    waiting, left = np.argsort(~chosen, kind="stable"), limits
    while most and len(waiting):
        fits = (np.cumsum(sizes[waiting], axis=0) <= left).all(axis=1)
        joining = waiting[: min(int(np.logical_and.accumulate(fits).sum()), most)]
        within[joining] = True
        left = left - sizes[joining].sum(axis=0)
        most -= len(joining)
        waiting = waiting[len(joining) :]
        waiting = waiting[(sizes[waiting] <= left).all(axis=1)]
    return within


def trim_lengths(lengths: Sequence[int], total: int) -> list[int]:
    """Trims examples to a total so that none loses a larger fraction of its tokens than it must.

    Args:
        lengths: Tokens of each example.
        total: Tokens to be left, at least one per example.

    Returns:
        Tokens of each example afterwards, at least 1; `lengths` if they are within the total.

    Raises:
        ValueError: If the total is below one token per example.
    """
    whole = sum(lengths)
    if whole <= total:
        return list(lengths)
    if total < len(lengths):
        raise ValueError(f"{len(lengths)} examples cannot be trimmed to {total} tokens")
    # Each loses at least the common fraction, rounded down; the rest goes token by token, from
    # whichever example loses the smallest fraction with it.
    kept = [-(-length * total // whole) for length in lengths]
    next_loss = [
        ((length - keep + 1) / length, example)
        for example, (length, keep) in enumerate(zip(lengths, kept, strict=True))
        if keep > 1
    ]
    heapq.heapify(next_loss)
    for _ in range(sum(kept) - total):
        example = next_loss[0][1]
        kept[example] -= 1
        if kept[example] > 1:
            loss = (lengths[example] - kept[example] + 1) / lengths[example]
            heapq.heapreplace(next_loss, (loss, example))
        else:
            heapq.heappop(next_loss)
    return kept
