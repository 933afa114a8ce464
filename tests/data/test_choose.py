"""Which of the waiting examples make the next batch, and what trimming takes of them."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_examples import random_caption, random_image
from packing_cases import MODES, budgets_of

from navit_clip.data.budgets import Budgets
from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.pairs import Pair as DataPair
from navit_clip.data.choose import choose, trim_lengths


class TestChoose:
    """Against every step written out, one example and one exchange at a time."""

    SHORT_AND_OVER: ClassVar = {
        "fill": ((1, 4), (1, 4)),
        "exact": ((16, 1), (16, 64)),
        "constant": ((16, 1), (0, 64)),
    }

    @classmethod
    def reference(cls, sizes: list[tuple[int, ...]], budgets: Budgets, mode: str) -> list[bool]:
        limits = [*budgets.tokens.values()]
        most = min(budgets.max_examples, *limits)
        count, aims = cls.plan(sizes, limits, most, mode)
        chosen = [i < count for i in range(len(sizes))]
        running = np.cumsum(sizes, axis=0)
        oldest = sum(all(4 * running[i] <= limits) for i in range(len(sizes)))
        fixed = max(1, min(oldest, most // 4, count))
        costs = [
            cls.SHORT_AND_OVER[mode][min(stream, 1)] if aim >= limit else (1 / 16, 1 / 16)
            for stream, (aim, limit) in enumerate(zip(aims, limits, strict=True))
        ]
        slopes = [
            (np.float32(short / aim), np.float32(-over / aim))
            for (short, over), aim in zip(costs, aims, strict=True)
        ]

        def cost(total: list[int]) -> np.float32:
            found = np.float32(0)
            for aim, tokens, (short, over) in zip(aims, total, slopes, strict=True):
                gap = np.float32(aim - tokens)
                found += max(gap * short, gap * over)
            return found

        nobody = (0,) * len(limits)
        for _ in range(192):
            total = [sum(size[s] for size, c in zip(sizes, chosen, strict=True) if c)
                     for s in range(len(limits))]  # fmt: skip
            best, move = cost(total), None
            leaving = [i for i in reversed(range(fixed, len(sizes))) if chosen[i]]
            joining = [i for i in range(len(sizes)) if not chosen[i]]
            if mode != "constant":
                leaving += [None] if sum(chosen) < most else []
                joining += [None]
            for out, into in itertools.product(leaving, joining):
                minus = nobody if out is None else sizes[out]
                plus = nobody if into is None else sizes[into]
                after = cost([t - m + p for t, m, p in zip(total, minus, plus, strict=True)])
                if after < best:
                    best, move = after, (out, into)
            if move is None:
                break
            for example, there in zip(move, (False, True), strict=True):
                if example is not None:
                    chosen[example] = there
        if mode != "fill":
            limits[0] = int(limits[0] * 1.25)
        if all(np.sum([z for z, c in zip(sizes, chosen, strict=True) if c], axis=0) <= limits):
            return chosen
        left, fits = list(limits), [False] * len(sizes)
        for i in sorted(range(len(sizes)), key=lambda i: not chosen[i]):
            if sum(fits) < most and all(a <= b for a, b in zip(sizes[i], left, strict=True)):
                fits[i] = True
                left = [b - a for a, b in zip(sizes[i], left, strict=True)]
        return fits

    @staticmethod
    def plan(
        sizes: list[tuple[int, ...]], limits: list[int], most: int, mode: str
    ) -> tuple[int, list[int]]:
        """How many of the oldest to begin with, and the tokens to aim at."""
        means = [sum(tokens) / len(sizes) for tokens in zip(*sizes, strict=True)]
        reach = 0.4 if mode == "fill" else 0.25

        def reachable(limit: int, offered: float) -> float:
            return min(limit, max(offered, 2 * (1 + reach) * offered - limit))

        fitting = [min(limit / mean, most) for limit, mean in zip(limits, means, strict=True)]
        if mode == "exact":
            fitting[0] = min(fitting[0] * 1.1, most)
        deciding = [*range(1, len(limits))] or [0]
        if mode == "constant":
            aims = [reachable(limits[0], most * means[0]), *limits[1:]]
            count = expected = most
        else:
            aims = [
                reachable(limits[s], min([f for t, f in enumerate(fitting) if t != s] or [most])
                          * means[s])
                for s in range(len(limits))
            ]  # fmt: skip
            expected = min(aims[s] / means[s] for s in deciding)
            running = np.cumsum(sizes, axis=0)
            if mode == "exact":  # one fewer than reach the aim of the first stream to do so
                count = min(sum(running[:, s] < aims[s]) for s in deciding)
            else:
                count = sum(sum(r / a for r, a in zip(row, aims, strict=True)) <= len(aims)
                            for row in running)  # fmt: skip
        if mode != "fill":
            aims[0] = max(aims[0], expected * means[0] / 1.1)
        return max(1, min(int(count), most, len(sizes))), [round(aim) for aim in aims]

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("streams", [1, 2, 3])
    def test_is_the_reference(self, streams, mode):
        rng = np.random.default_rng(streams)
        for _ in range(60):
            most = rng.integers(1, (40, 12, 6))[:streams]
            sizes = rng.integers(1, most + 1, (int(rng.integers(1, 40)), streams))
            budgets = budgets_of(
                *(most * rng.integers(1, 15, streams)).tolist(), most=int(rng.integers(1, 20))
            )
            expected = self.reference([*map(tuple, sizes.tolist())], budgets, mode)
            assert choose(sizes, budgets, mode).tolist() == expected


class TestTrimLengths:
    @staticmethod
    def one_by_one(lengths: list[int], total: int) -> list[int]:
        """Takes token after token from the image that has lost the smallest fraction with it."""
        left = list(lengths)
        heap = [(1 / n, i) for i, n in enumerate(lengths) if n > 1]
        heapq.heapify(heap)
        for _ in range(sum(lengths) - total):
            _, i = heapq.heappop(heap)
            left[i] -= 1
            if left[i] > 1:
                heapq.heappush(heap, ((lengths[i] - left[i] + 1) / lengths[i], i))
        return left

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.data())
    def test_no_image_loses_more_than_it_must(self, lengths, data):
        total = data.draw(st.integers(len(lengths), sum(lengths)))
        after = trim_lengths(lengths, total)
        reference = self.one_by_one(lengths, total)
        assert sum(after) == total
        assert all(1 <= new <= old for new, old in zip(after, lengths, strict=True))

        def most_lost(left: list[int]) -> float:
            return max(1 - new / old for new, old in zip(left, lengths, strict=True))

        assert most_lost(after) == pytest.approx(most_lost(reference))

    def test_within_the_total_nothing_is_cut(self):
        assert trim_lengths([3, 1, 4], 8) == [3, 1, 4]
        assert trim_lengths([3, 1, 4], 9) == [3, 1, 4]

    def test_fewer_tokens_than_images(self):
        with pytest.raises(ValueError, match="3 examples cannot be trimmed to 2 tokens"):
            trim_lengths([3, 1, 4], 2)


class TestTrimmedPair:
    def pair(self, *, seed: int = 0, epoch: int = 0, id_: str = "a/b") -> DataPair:
        image = random_image(0, (6, 7), keep=30)
        return DataPair(id_, Origin(epoch, 0, 0, 0), image, random_caption(0, 5), seed)

    def test_keeps_a_subset_in_order(self):
        pair = self.pair()
        trimmed = pair.trimmed(11)
        assert trimmed.lengths == (len(trimmed.image.coords), 5) == (11, 5)
        assert trimmed.full_lengths == pair.full_lengths == (42, 5)
        whole = [*map(tuple, pair.image.coords.tolist())]
        places = [whole.index(tuple(place)) for place in trimmed.image.coords.tolist()]
        assert places == sorted(set(places))
        assert np.array_equal(trimmed.image.patches, pair.image.patches[places])
        assert trimmed.image.coords.dtype == np.int32
        assert (trimmed.image.grid, trimmed.token_ids) == (pair.image.grid, pair.token_ids)
        assert (trimmed.id, trimmed.origin) == (pair.id, pair.origin)

    def test_is_a_function_of_seed_epoch_and_id(self):
        def kept(**fields: int | str) -> list[list[int]]:
            return self.pair(**fields).trimmed(15).image.coords.tolist()

        assert kept() == kept()
        others = [kept(seed=1), kept(epoch=1), kept(id_="a/c")]
        assert kept() not in others

    def test_every_patch_is_as_likely_to_stay(self):
        counts = np.zeros((6, 7))
        for number in range(600):
            pair = replace(self.pair(id_=str(number)), image=random_image(0, (6, 7)))
            counts[tuple(pair.trimmed(21).image.coords.T)] += 1
        # Binomial(600, ½): a deviation of 12; five of them.
        assert np.abs(counts - 300).max() < 61
