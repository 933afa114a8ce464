"""Which pairs share a batch: budgets, order, look-ahead, and the three modes."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_examples import random_caption, random_image

from navit_clip.data.builders.pairs import Origin
from navit_clip.data.builders.pairs import Pair as DataPair
from navit_clip.data.packer import Budgets, Packer, PackingMode, share_cut

MODES: tuple[PackingMode, ...] = ("greedy", "exact", "constant")


@dataclass(frozen=True)
class Pair:
    """Sizes alone; `whole` is what it had before it was trimmed."""

    name: int
    image_length: int
    text_length: int
    whole: int

    def trimmed(self, tokens: int) -> Pair:
        return replace(self, image_length=tokens)


def pairs_of(sizes: Iterable[tuple[int, int]]) -> list[Pair]:
    return [Pair(name, image, text, image) for name, (image, text) in enumerate(sizes)]


def random_pairs(
    count: int, image: tuple[int, int], text: tuple[int, int], seed: int = 0
) -> list[Pair]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers((image[0], text[0]), (image[1] + 1, text[1] + 1), (count, 2))
    return pairs_of(map(tuple, sizes.tolist()))


def taken(packer: Packer[Pair], pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    for pair in pairs:
        packer.offer(pair)
        while (batch := packer.take()) is not None:
            yield batch


def flushed(packer: Packer[Pair]) -> Iterator[list[Pair]]:
    while (batch := packer.flush()) is not None:
        yield batch


def image_tokens(batch: list[Pair]) -> int:
    return sum(pair.image_length for pair in batch)


def text_tokens(batch: list[Pair]) -> int:
    return sum(pair.text_length for pair in batch)


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[Pair], Budgets, int, PackingMode]:
    budgets = Budgets(draw(st.integers(1, 30)), draw(st.integers(1, 15)), draw(st.integers(1, 6)))
    # Sometimes only small pairs, of which many fit.
    image = draw(st.integers(1, budgets.image_tokens))
    text = draw(st.integers(1, budgets.text_tokens))
    sizes = st.tuples(st.integers(1, image), st.integers(1, text))
    pairs = pairs_of(draw(st.lists(sizes, max_size=40)))
    return pairs, budgets, draw(st.integers(0, 12)), draw(st.sampled_from(MODES))


class TestEveryMode:
    @settings(max_examples=150, deadline=None)
    @given(packings())
    def test_nothing_is_lost_repeated_or_over_budget(self, packing):
        pairs, budgets, look_ahead, mode = packing
        packer = Packer[Pair](budgets, look_ahead, mode)
        batches = [*taken(packer, pairs), *flushed(packer)]
        assert sorted(pair.name for batch in batches for pair in batch) == list(range(len(pairs)))
        for batch in batches:
            names = [pair.name for pair in batch]
            assert batch
            assert names == sorted(names)
            assert len(batch) <= budgets.max_pairs
            assert image_tokens(batch) <= budgets.image_tokens
            assert text_tokens(batch) <= budgets.text_tokens

    @settings(max_examples=150, deadline=None)
    @given(packings())
    def test_images_are_cut_only_to_fill_the_budget(self, packing):
        pairs, budgets, look_ahead, mode = packing
        packer = Packer[Pair](budgets, look_ahead, mode)
        for batch in [*taken(packer, pairs), *flushed(packer)]:
            cut = [pair for pair in batch if pair.image_length != pair.whole]
            assert all(1 <= pair.image_length < pair.whole for pair in cut)
            if cut:
                assert mode != "greedy"
                assert image_tokens(batch) == budgets.image_tokens
                assert sum(pair.whole for pair in batch) <= 1.25 * budgets.image_tokens

    @settings(max_examples=100, deadline=None)
    @given(packings())
    def test_the_oldest_pair_leaves_with_each_batch(self, packing):
        pairs, budgets, look_ahead, mode = packing
        packer = Packer[Pair](budgets, look_ahead, mode)
        oldest = 0
        left = set()
        for batch in [*taken(packer, pairs), *flushed(packer)]:
            assert batch[0].name == oldest
            left |= {pair.name for pair in batch}
            oldest = next(name for name in range(len(pairs) + 1) if name not in left)

    @settings(max_examples=60, deadline=None)
    @given(packings(), st.integers(0, 40))
    def test_offering_what_is_pending_restores_the_packer(self, packing, cut):
        pairs, budgets, look_ahead, mode = packing
        packer = Packer[Pair](budgets, look_ahead, mode)
        given_out = sum(len(batch) for batch in taken(packer, pairs[:cut]))
        restored = Packer[Pair](budgets, look_ahead, mode)
        for pair in packer.pending:
            restored.offer(pair)
        assert restored.pending == packer.pending
        assert given_out + len(packer.pending) == len(pairs[:cut])
        # Pending pairs are whole, so that a cut is made of the same image again.
        assert all(pair.image_length == pair.whole for pair in packer.pending)
        futures = [([*taken(p, pairs[cut:]), *flushed(p)], p.pending) for p in (restored, packer)]
        assert futures[0] == futures[1]

    @pytest.mark.parametrize("mode", MODES)
    def test_restored_between_any_two_batches_of_a_long_stream(self, mode):
        pairs = random_pairs(600, (1, 40), (1, 12))
        budgets, look_ahead = Budgets(410, 132, 20), 24
        packer = Packer[Pair](budgets, look_ahead, mode)
        whole: list[list[Pair]] = []
        cuts: list[tuple[int, tuple[Pair, ...]]] = []
        for offered, pair in enumerate(pairs, start=1):
            packer.offer(pair)
            while (batch := packer.take()) is not None:
                whole.append(batch)
                cuts.append((offered, packer.pending))
        assert len(whole) > 20
        for done, (offered, pending) in enumerate(cuts, start=1):
            restored = Packer[Pair](budgets, look_ahead, mode)
            for pair in pending:
                restored.offer(pair)
            # It may hold a whole batch already, and gives it before anything else is offered.
            now = list(iter(restored.take, None))
            assert now + list(taken(restored, pairs[offered:])) == whole[done:]

    @pytest.mark.parametrize("mode", MODES)
    def test_none_waits_long(self, mode):
        pairs = random_pairs(4000, (1, 200), (6, 24))
        packer = Packer[Pair](Budgets(4096, 620, 41), 64, mode)
        begun = {}
        longest = batches = 0
        for pair in pairs:
            begun[pair.name] = batches
            for batch in taken(packer, [pair]):
                longest = max(longest, *(batches - begun[pair.name] for pair in batch))
                batches += 1
        # A quarter of each batch is the oldest of about 40 + 64 pairs.
        assert longest <= 11

    @pytest.mark.parametrize("mode", MODES)
    def test_a_pair_as_large_as_the_budgets_is_a_batch_of_its_own(self, mode):
        pairs = pairs_of([(10, 5)] * 7)
        packer = Packer[Pair](Budgets(10, 5, 8), 3, mode)
        assert [*taken(packer, pairs), *flushed(packer)] == [[pair] for pair in pairs]

    @pytest.mark.parametrize("mode", MODES)
    def test_budgets_of_one(self, mode):
        pairs = pairs_of([(1, 1)] * 7)
        packer = Packer[Pair](Budgets(1, 1, 1), 1, mode)
        assert list(taken(packer, pairs)) == [[pair] for pair in pairs[:6]]
        assert packer.pending == (pairs[6],)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_huge_pair_among_small_ones_leaves_in_its_turn(self, mode):
        sizes = [(3, 2)] * 300
        sizes[40] = (100, 2)  # as large as the whole budget
        packer = Packer[Pair](Budgets(100, 70, 33), 16, mode)
        batches = list(taken(packer, pairs_of(sizes)))
        (place,) = (i for i, batch in enumerate(batches) if 40 in [pair.name for pair in batch])
        assert place <= 5
        # No other batch suffers.
        others = [len(batch) for i, batch in enumerate(batches) if i != place]
        assert min(others) >= 32

    @pytest.mark.parametrize("look_ahead", [0, 1, 7])
    @pytest.mark.parametrize("mode", MODES)
    def test_waits_for_look_ahead_pairs_beyond_a_batch(self, mode, look_ahead):
        packer = Packer[Pair](Budgets(100, 50, 10), look_ahead, mode)
        pairs = pairs_of([(10, 5)] * (10 + look_ahead))
        assert not list(taken(packer, pairs[:-1]))
        packer.offer(pairs[-1])
        assert packer.take() == pairs[:10]
        assert packer.take() is None

    @pytest.mark.parametrize("mode", MODES)
    def test_an_empty_packer_gives_nothing(self, mode):
        packer = Packer[Pair](Budgets(), 1, mode)
        assert packer.take() is None
        assert packer.flush() is None
        assert packer.pending == ()

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            ((11, 1), "11 image and 1 text tokens exceeds the budgets of 10 and 5"),
            ((1, 6), "1 image and 6 text tokens exceeds the budgets of 10 and 5"),
        ],
    )
    def test_a_pair_that_never_fits_is_refused_and_forgotten(self, size, message):
        packer = Packer[Pair](Budgets(10, 5, 8), look_ahead=1)
        with pytest.raises(ValueError, match=message):
            packer.offer(pairs_of([size])[0])
        assert packer.pending == ()


def training_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Sizes as in training: 16 to 256 patches, captions of 6 to 24 tokens."""
    rng = np.random.default_rng(seed)
    images = np.round((rng.uniform(64, 256, count) / 16) ** 2).astype(int)
    texts = np.clip(np.round(rng.normal(14, 4, count)), 6, 24).astype(int)
    return pairs_of(zip(images.tolist(), texts.tolist(), strict=True))


def means(pairs: list[Pair]) -> tuple[float, float]:
    return image_tokens(pairs) / len(pairs), text_tokens(pairs) / len(pairs)


class TestFill:
    def test_greedy_fills_both_budgets_that_match(self):
        pairs = training_pairs(12_000)
        image, text = means(pairs)
        budgets = Budgets(16384, round(16384 * text / image), 4096)
        batches = list(taken(Packer[Pair](budgets, 256), pairs))
        counts = [len(batch) for batch in batches]
        assert 1 - np.mean([*map(image_tokens, batches)]) / budgets.image_tokens < 0.002
        assert 1 - np.mean([*map(text_tokens, batches)]) / budgets.text_tokens < 0.002
        assert np.std(counts) / np.mean(counts) < 0.03

    def test_look_ahead_is_what_fills_them(self):
        pairs = training_pairs(6000)
        image, text = means(pairs)
        budgets = Budgets(8192, round(8192 * text / image), 4096)

        def padding(look_ahead: int) -> float:
            batches = list(taken(Packer[Pair](budgets, look_ahead), pairs))
            return 1 - np.mean([*map(text_tokens, batches)]) / budgets.text_tokens

        assert padding(128) < padding(16) < padding(2)

    @pytest.mark.parametrize("text_share", [0.4, 2.5])
    def test_greedy_fills_the_tower_that_runs_out_first(self, text_share):
        pairs = training_pairs(6000)
        image, text = means(pairs)
        budgets = Budgets(16384, round(16384 * text / image * text_share), 4096)
        batches = list(taken(Packer[Pair](budgets, 128), pairs))
        counts = [len(batch) for batch in batches]
        scarce, budget = (
            (image_tokens, budgets.image_tokens)
            if text_share > 1
            else (text_tokens, budgets.text_tokens)
        )
        assert 1 - np.mean([*map(scarce, batches)]) / budget < 0.001
        assert np.std(counts) / np.mean(counts) < 0.05

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("surplus", [1.01, 1.06])
    def test_exact_leaves_no_padding_while_images_are_in_surplus(self, surplus, seed):
        pairs = training_pairs(8000, seed)
        image, text = means(pairs)
        budgets = Budgets(16384, round(16384 * text / image * surplus), 4096)
        batches = list(taken(Packer[Pair](budgets, 256, "exact"), pairs))
        assert len(batches) > 40
        assert {image_tokens(batch) for batch in batches} == {budgets.image_tokens}
        assert {text_tokens(batch) for batch in batches} == {budgets.text_tokens}
        whole = sum(pair.whole for batch in batches for pair in batch)
        kept = sum(image_tokens(batch) for batch in batches)
        assert 1 - kept / whole < surplus - 1 + 0.01

    def test_exact_keeps_every_patch_where_text_is_out_of_reach(self):
        pairs = training_pairs(3000)
        packer = Packer[Pair](Budgets(16384, 16384, 4096), 128, "exact")
        batches = list(taken(packer, pairs))
        cut = sum(pair.whole - pair.image_length for batch in batches for pair in batch)
        assert cut / sum(map(image_tokens, batches)) < 0.002
        assert all(image_tokens(batch) == 16384 for batch in batches)

    def test_exact_pads_what_cannot_be_met(self):
        # Captions fill their budget with half the images that it takes.
        pairs = training_pairs(3000)
        packer = Packer[Pair](Budgets(16384, 1024, 4096), 128, "exact")
        for batch in taken(packer, pairs):
            assert text_tokens(batch) == 1024
            assert image_tokens(batch) < 0.6 * 16384
            assert all(pair.image_length == pair.whole for pair in batch)

    @pytest.mark.parametrize("seed", range(3))
    def test_constant_is_constant(self, seed):
        pairs = training_pairs(8000, seed)
        image, text = means(pairs)
        count = round(16384 / image * 1.01)
        budgets = Budgets(16384, round(count * text * 1.02), count)
        batches = list(taken(Packer[Pair](budgets, 256, "constant"), pairs))
        assert {len(batch) for batch in batches} == {count}
        assert 1 - np.mean([*map(image_tokens, batches)]) / budgets.image_tokens < 0.002
        assert 1 - np.mean([*map(text_tokens, batches)]) / budgets.text_tokens < 0.025

    def test_constant_has_fewer_pairs_only_where_so_many_do_not_fit(self):
        pairs = training_pairs(3000)
        _, text = means(pairs)
        packer = Packer[Pair](Budgets(16384, 1024, 400), 128, "constant")
        for batch in taken(packer, pairs):
            assert len(batch) == pytest.approx(1024 / text, rel=0.15)
            assert 1024 - text_tokens(batch) < 24


class TestShareCut:
    @staticmethod
    def one_by_one(lengths: list[int], total: int) -> list[int]:
        """Takes token after token from the image that has lost the least share with it."""
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
        after = share_cut(lengths, total)
        reference = self.one_by_one(lengths, total)
        assert sum(after) == total
        assert all(1 <= new <= old for new, old in zip(after, lengths, strict=True))

        def most_lost(left: list[int]) -> float:
            return max(1 - new / old for new, old in zip(left, lengths, strict=True))

        assert most_lost(after) == pytest.approx(most_lost(reference))

    def test_within_the_total_nothing_is_cut(self):
        assert share_cut([3, 1, 4], 8) == [3, 1, 4]
        assert share_cut([3, 1, 4], 9) == [3, 1, 4]

    def test_fewer_tokens_than_images(self):
        with pytest.raises(ValueError, match="3 images cannot be cut to 2 tokens"):
            share_cut([3, 1, 4], 2)


class TestTrimmedPair:
    def pair(self, *, seed: int = 0, epoch: int = 0, id_: str = "a/b") -> DataPair:
        image = random_image(0, (6, 7), keep=30)
        return DataPair(id_, Origin(epoch, 0, 0, 0), image, random_caption(0, 5), seed)

    def test_keeps_a_subset_in_order(self):
        pair = self.pair()
        trimmed = pair.trimmed(11)
        assert trimmed.image_length == len(trimmed.image.coords) == 11
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


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="look_ahead must not be negative, got -1"):
        Packer(Budgets(), look_ahead=-1)
    with pytest.raises(ValueError, match="mode must be one of greedy, exact, constant, got lazy"):
        Packer(Budgets(), 1, "lazy")


@pytest.mark.parametrize("field", ["image_tokens", "text_tokens", "max_pairs"])
@pytest.mark.parametrize("value", [0, -1])
def test_budgets_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got {value}"):
        Budgets(**{field: value})
