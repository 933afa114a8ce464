"""Grouping of windows: each group as full as can be, nothing lost, of the least operations."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from navit_clip.packed.window_groups import (
    WindowGroups,
    attention_cost,
    best_groups,
    fill_groups,
)


def contents(groups: WindowGroups, lengths: np.ndarray) -> list[Counter[int]]:
    """The lengths of the windows of each group."""
    found = [Counter() for _ in range(groups.count)]
    for group, length in zip(groups.group_W.tolist(), lengths.tolist(), strict=True):
        found[group][length] += 1
    return found


@cache
def sums(windows: tuple[int, ...]) -> tuple[int, ...]:
    """All that can be had of some windows, by trying every choice of them."""
    chosen = np.arange(2 ** len(windows))[:, None] >> np.arange(len(windows)) & 1
    return tuple(np.unique(chosen @ np.array(windows, dtype=int)).tolist())


@pytest.mark.parametrize("known", [(1, 2, 3), (2, 5, 7), (3, 4, 9)])
def test_every_group_is_as_full_as_any_choice_of_the_windows_left(known):
    for number in range(1, 11):
        for windows in combinations_with_replacement(known, number):
            lengths = np.array(windows)
            for size in range(max(windows), min(sum(windows), 24) + 1):
                left = Counter(windows)
                for group in contents(fill_groups(lengths, size), lengths):
                    full = sum(length * count for length, count in group.items())
                    possible = sums(tuple(sorted(left.elements())))
                    assert full == max(s for s in possible if s <= size), (windows, size)
                    left -= group
                assert not left


def windows_of(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(1, rng.integers(2, 65), rng.integers(1, 200))


@pytest.mark.parametrize("seed", range(20))
def test_every_token_has_a_place_of_its_own_in_its_windows_group(seed):
    lengths = windows_of(seed)
    size = int(lengths.max()) + seed * 7
    for groups in (fill_groups(lengths, size), best_groups(lengths, 96)):
        places = groups.places(lengths)
        assert len(np.unique(places)) == len(places) == lengths.sum()
        assert (np.diff(places)[np.diff(np.arange(len(lengths)).repeat(lengths)) == 0] == 1).all()
        assert np.array_equal(places // groups.size, groups.group_W.repeat(lengths))
        assert set(groups.group_W) == set(range(groups.count))
    assert (groups.count - 1) * groups.size < 2 * lengths.sum()  # of two groups one is half full


@pytest.mark.parametrize("width", [8, 128, 1024])
@pytest.mark.parametrize("seed", range(5))
def test_no_size_costs_less(seed, width):
    lengths = windows_of(seed)[:25]
    costs = {
        size: attention_cost(fill_groups(lengths, size).count, size, width)
        for size in range(lengths.max(), lengths.sum() + 1)
    }
    groups = best_groups(lengths, width)
    assert groups.size == min(costs, key=costs.get)
    assert attention_cost(groups.count, groups.size, width) == costs[groups.size]


def test_the_cost_is_what_attention_in_groups_multiplies_and_adds():
    count, size, width = 5, 12, 24
    x_NGC = torch.randn(count, size, width)
    with FlopCounterMode(display=False) as counter:
        q, k, v = (x_NGC @ torch.randn(width, width) for _ in range(3))
        (((q @ k.mT).softmax(-1) @ v) @ torch.randn(width, width)).sum()
    assert counter.get_total_flops() == 2 * attention_cost(count, size, width)


def test_full_windows_are_groups_by_themselves():
    groups = best_groups(np.full(12, 64), 128)
    assert (groups.count, groups.size) == (12, 64)
    assert np.array_equal(groups.places(np.full(12, 64)), np.arange(12 * 64))


def test_a_size_may_be_numpys():
    lengths = np.array([70, 3, 60, 9])
    groups, expected = fill_groups(lengths, lengths.max()), fill_groups(lengths, 70)
    assert groups.count == expected.count
    assert np.array_equal(groups.group_W, expected.group_W)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_windows_without_tokens_are_refused(lengths):
    with pytest.raises(ValueError, match="at least one token each"):
        best_groups(np.array(lengths, dtype=int), 8)


def test_a_window_longer_than_a_group_is_refused():
    with pytest.raises(ValueError, match="a window of 9 tokens is longer than groups of 8"):
        fill_groups(np.array([3, 9]), 8)
