"""Which examples share a batch: budgets, order, look-ahead, buckets, and the three modes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import MODES, budgets_of

from navit_clip.data.budgets import Budgets, PackingMode
from navit_clip.data.packer import Packer


@dataclass(frozen=True)
class Pair:
    """Sizes alone; `whole` is what it had before it was trimmed."""

    name: int
    lengths: tuple[int, ...]
    whole: int
    bucket: Hashable = ()

    def trimmed(self, tokens: int) -> Pair:
        return replace(self, lengths=(tokens, *self.lengths[1:]))


def pairs_of(sizes: Iterable[tuple[int, ...]]) -> list[Pair]:
    return [Pair(name, lengths, lengths[0]) for name, lengths in enumerate(sizes)]


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
    return sum(pair.lengths[0] for pair in batch)


def text_tokens(batch: list[Pair]) -> int:
    return sum(pair.lengths[1] for pair in batch)


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[Pair], Budgets, int, PackingMode]:
    tokens = [draw(st.integers(1, most)) for most in (30, 15, 12)[: draw(st.integers(1, 3))]]
    budgets = budgets_of(*tokens, most=draw(st.integers(1, 6)))
    # Sometimes only small examples, of which many fit.
    sizes = st.tuples(*(st.integers(1, draw(st.integers(1, budget))) for budget in tokens))
    pairs = pairs_of(draw(st.lists(sizes, max_size=40)))
    buckets = draw(st.integers(1, 2))
    pairs = [replace(pair, bucket=draw(st.integers(1, buckets))) for pair in pairs]
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
            assert len({pair.bucket for pair in batch}) == 1
            assert len(batch) <= budgets.max_examples
            totals = np.sum([pair.lengths for pair in batch], axis=0)
            assert (totals <= [*budgets.tokens.values()]).all()

    @settings(max_examples=150, deadline=None)
    @given(packings())
    def test_the_first_stream_is_trimmed_only_to_fill_its_budget(self, packing):
        pairs, budgets, look_ahead, mode = packing
        packer = Packer[Pair](budgets, look_ahead, mode)
        for batch in [*taken(packer, pairs), *flushed(packer)]:
            cut = [pair for pair in batch if pair.lengths[0] != pair.whole]
            assert all(1 <= pair.lengths[0] < pair.whole for pair in cut)
            if cut:
                assert mode != "fill"
                budget = budgets.tokens["image"]
                assert image_tokens(batch) == budget
                assert sum(pair.whole for pair in batch) <= 1.25 * budget

    @settings(max_examples=100, deadline=None)
    @given(packings())
    def test_the_oldest_pair_of_a_bucket_leaves_with_each_batch(self, packing):
        pairs, budgets, look_ahead, mode = packing
        packer = Packer[Pair](budgets, look_ahead, mode)
        waiting = {pair.name: pair.bucket for pair in pairs}
        for batch in [*taken(packer, pairs), *flushed(packer)]:
            bucket = batch[0].bucket
            assert batch[0].name == min(name for name, other in waiting.items() if other == bucket)
            for pair in batch:
                del waiting[pair.name]

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
        # Pending pairs are whole, so that the same image is trimmed again.
        assert all(pair.lengths[0] == pair.whole for pair in packer.pending)
        futures = [([*taken(p, pairs[cut:]), *flushed(p)], p.pending) for p in (restored, packer)]
        assert futures[0] == futures[1]

    @pytest.mark.parametrize("mode", MODES)
    def test_restored_between_any_two_batches_of_a_long_stream(self, mode):
        pairs = random_pairs(600, (1, 40), (1, 12))
        budgets, look_ahead = budgets_of(410, 132, most=20), 24
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
        packer = Packer[Pair](budgets_of(4096, 620, most=41), 64, mode)
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
        packer = Packer[Pair](budgets_of(10, 5, most=8), 3, mode)
        assert [*taken(packer, pairs), *flushed(packer)] == [[pair] for pair in pairs]

    @pytest.mark.parametrize("mode", MODES)
    def test_budgets_of_one(self, mode):
        pairs = pairs_of([(1, 1)] * 7)
        packer = Packer[Pair](budgets_of(1, 1, most=1), 1, mode)
        assert list(taken(packer, pairs)) == [[pair] for pair in pairs[:6]]
        assert packer.pending == (pairs[6],)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_huge_pair_among_small_ones_leaves_in_its_turn(self, mode):
        sizes = [(3, 2)] * 300
        sizes[40] = (100, 2)  # as large as the whole budget
        packer = Packer[Pair](budgets_of(100, 70, most=33), 16, mode)
        batches = list(taken(packer, pairs_of(sizes)))
        (place,) = (i for i, batch in enumerate(batches) if 40 in [pair.name for pair in batch])
        assert place <= 5
        # No other batch suffers.
        others = [len(batch) for i, batch in enumerate(batches) if i != place]
        assert min(others) >= 32

    @pytest.mark.parametrize("look_ahead", [0, 1, 7])
    @pytest.mark.parametrize("mode", MODES)
    def test_waits_for_look_ahead_pairs_beyond_a_batch(self, mode, look_ahead):
        packer = Packer[Pair](budgets_of(100, 50, most=10), look_ahead, mode)
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
            ((11, 1), "an example of 11 image tokens exceeds the budget of 10"),
            ((1, 6), "an example of 6 text tokens exceeds the budget of 5"),
        ],
    )
    def test_a_pair_that_never_fits_is_refused_and_forgotten(self, size, message):
        packer = Packer[Pair](budgets_of(10, 5, most=8), look_ahead=1)
        with pytest.raises(ValueError, match=message):
            packer.offer(pairs_of([size])[0])
        assert packer.pending == ()


class TestStreamsAndBuckets:
    @pytest.mark.parametrize("mode", MODES)
    def test_one_stream_is_filled(self, mode):
        pairs = pairs_of((n,) for n in np.random.default_rng(0).integers(16, 257, 4000).tolist())
        count = round(8192 / np.mean([pair.whole for pair in pairs]))
        packer = Packer[Pair](
            budgets_of(8192, most=count if mode == "constant" else 4096), 64, mode
        )
        batches = list(taken(packer, pairs))
        assert len(batches) > 50
        assert {image_tokens(batch) for batch in batches[:-1]} == {8192}
        cut = sum(pair.whole - pair.lengths[0] for batch in batches for pair in batch)
        assert (cut > 0) == (mode == "constant")
        if mode == "constant":
            assert {len(batch) for batch in batches} == {count}

    def test_three_streams_are_filled(self):
        rng = np.random.default_rng(0)
        pairs = pairs_of(map(tuple, rng.integers((16, 6, 20), (257, 25, 61), (6000, 3)).tolist()))
        means = np.mean([pair.lengths for pair in pairs], axis=0)
        tokens = np.round(8192 / means[0] * means).astype(int)
        batches = list(taken(Packer[Pair](budgets_of(*tokens.tolist()), 256), pairs))
        totals = np.array([np.sum([pair.lengths for pair in batch], axis=0) for batch in batches])
        assert (totals.mean(axis=0) / tokens > 0.997).all()

    @pytest.mark.parametrize("mode", MODES)
    def test_each_bucket_is_packed_as_if_it_were_alone(self, mode):
        pairs = [
            replace(pair, bucket=("small", "large")[pair.name % 3 == 0])
            for pair in random_pairs(900, (1, 40), (1, 12))
        ]
        budgets = budgets_of(410, 132, most=20)
        batches = list(taken(Packer[Pair](budgets, 24, mode), pairs))
        for bucket in ("small", "large"):
            own = [pair for pair in pairs if pair.bucket == bucket]
            alone = list(taken(Packer[Pair](budgets, 24, mode), own))
            assert [batch for batch in batches if batch[0].bucket == bucket] == alone
            assert len(alone) > 10


def training_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Sizes as in training: 16 to 256 patches, captions of 6 to 24 tokens."""
    rng = np.random.default_rng(seed)
    images = np.round((rng.uniform(64, 256, count) / 16) ** 2).astype(int)
    texts = np.clip(np.round(rng.normal(14, 4, count)), 6, 24).astype(int)
    return pairs_of(zip(images.tolist(), texts.tolist(), strict=True))


def means(pairs: list[Pair]) -> tuple[float, float]:
    return image_tokens(pairs) / len(pairs), text_tokens(pairs) / len(pairs)


class TestFill:
    def test_fill_fills_both_budgets_that_match(self):
        pairs = training_pairs(12_000)
        image, text = means(pairs)
        budgets = budgets_of(16384, round(16384 * text / image))
        batches = list(taken(Packer[Pair](budgets, 256), pairs))
        counts = [len(batch) for batch in batches]
        assert 1 - np.mean([*map(image_tokens, batches)]) / budgets.tokens["image"] < 0.002
        assert 1 - np.mean([*map(text_tokens, batches)]) / budgets.tokens["text"] < 0.002
        assert np.std(counts) / np.mean(counts) < 0.03

    def test_look_ahead_is_what_fills_them(self):
        pairs = training_pairs(6000)
        image, text = means(pairs)
        budgets = budgets_of(8192, round(8192 * text / image))

        def padding(look_ahead: int) -> float:
            batches = list(taken(Packer[Pair](budgets, look_ahead), pairs))
            return 1 - np.mean([*map(text_tokens, batches)]) / budgets.tokens["text"]

        assert padding(128) < padding(16) < padding(2)

    @pytest.mark.parametrize("text_share", [0.4, 2.5])
    def test_fill_fills_the_tower_that_runs_out_first(self, text_share):
        pairs = training_pairs(6000)
        image, text = means(pairs)
        budgets = budgets_of(16384, round(16384 * text / image * text_share))
        batches = list(taken(Packer[Pair](budgets, 128), pairs))
        counts = [len(batch) for batch in batches]
        scarce, budget = (
            (image_tokens, budgets.tokens["image"])
            if text_share > 1
            else (text_tokens, budgets.tokens["text"])
        )
        assert 1 - np.mean([*map(scarce, batches)]) / budget < 0.001
        assert np.std(counts) / np.mean(counts) < 0.05

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("surplus", [1.01, 1.06])
    def test_exact_leaves_no_padding_while_images_are_in_surplus(self, surplus, seed):
        pairs = training_pairs(8000, seed)
        image, text = means(pairs)
        budgets = budgets_of(16384, round(16384 * text / image * surplus))
        batches = list(taken(Packer[Pair](budgets, 256, "exact"), pairs))
        assert len(batches) > 40
        assert {image_tokens(batch) for batch in batches} == {budgets.tokens["image"]}
        assert {text_tokens(batch) for batch in batches} == {budgets.tokens["text"]}
        whole = sum(pair.whole for batch in batches for pair in batch)
        kept = sum(image_tokens(batch) for batch in batches)
        assert 1 - kept / whole < surplus - 1 + 0.01

    def test_exact_keeps_every_patch_where_text_is_out_of_reach(self):
        pairs = training_pairs(3000)
        packer = Packer[Pair](budgets_of(16384, 16384), 128, "exact")
        batches = list(taken(packer, pairs))
        cut = sum(pair.whole - pair.lengths[0] for batch in batches for pair in batch)
        assert cut / sum(map(image_tokens, batches)) < 0.002
        assert all(image_tokens(batch) == 16384 for batch in batches)

    def test_exact_pads_what_cannot_be_met(self):
        # Captions fill their budget with half the images that it takes.
        pairs = training_pairs(3000)
        packer = Packer[Pair](budgets_of(16384, 1024), 128, "exact")
        for batch in taken(packer, pairs):
            assert text_tokens(batch) == 1024
            assert image_tokens(batch) < 0.6 * 16384
            assert all(pair.lengths[0] == pair.whole for pair in batch)

    @pytest.mark.parametrize("seed", range(3))
    def test_constant_is_constant(self, seed):
        pairs = training_pairs(8000, seed)
        image, text = means(pairs)
        count = round(16384 / image * 1.01)
        budgets = budgets_of(16384, round(count * text * 1.02), most=count)
        batches = list(taken(Packer[Pair](budgets, 256, "constant"), pairs))
        assert {len(batch) for batch in batches} == {count}
        assert 1 - np.mean([*map(image_tokens, batches)]) / budgets.tokens["image"] < 0.002
        assert 1 - np.mean([*map(text_tokens, batches)]) / budgets.tokens["text"] < 0.025

    def test_constant_has_fewer_pairs_only_where_so_many_do_not_fit(self):
        pairs = training_pairs(3000)
        _, text = means(pairs)
        packer = Packer[Pair](budgets_of(16384, 1024, most=400), 128, "constant")
        for batch in taken(packer, pairs):
            assert len(batch) == pytest.approx(1024 / text, rel=0.15)
            assert 1024 - text_tokens(batch) < 24


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="look_ahead must not be negative, got -1"):
        Packer(Budgets(), look_ahead=-1)
    with pytest.raises(ValueError, match="mode must be one of fill, exact, constant, got lazy"):
        Packer(Budgets(), 1, "lazy")


@pytest.mark.parametrize("value", [0, -1])
def test_budgets_name_the_field(value):
    with pytest.raises(ValueError, match=rf"tokens\.text must be at least 1, got {value}"):
        Budgets({"image": 1, "text": value})
    with pytest.raises(ValueError, match=f"max_examples must be at least 1, got {value}"):
        Budgets(max_examples=value)


def test_budgets_are_those_of_the_tasks_streams():
    budgets = budgets_of(30, 15)
    assert list(budgets.ordered(("text", "image")).tokens.items()) == [("text", 15), ("image", 30)]
    for streams in (("image",), ("image", "text", "audio"), ("image", "audio")):
        with pytest.raises(ValueError, match=r"data\.budget\.tokens must name the streams image"):
            budgets.ordered(streams)
    budgets.check({"text": (15, "context"), "image": (30, "max_tokens")})
    with pytest.raises(ValueError, match=r"tokens\.text=15 cannot hold one example of context=16"):
        budgets.check({"text": (16, "context"), "image": (30, "max_tokens")})
