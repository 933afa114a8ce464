"""The packed stream: where examples lie, how they are laid out, and which share a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_examples import random_caption, random_image

from navit_clip.packing import (
    BatchCounts,
    Budgets,
    FirstFitPacker,
    ImagePatches,
    PackedBatch,
    PackedImages,
    PackedTexts,
    Segments,
    pack_images,
    pack_texts,
)

LENGTHS = [(1,), (3,), (1, 1, 1), (4, 1, 4, 4, 2), (1, 2, 3), (5000, 1, 5000)]


class TestSegments:
    @pytest.mark.parametrize("padding", [0, 1, 7])
    @pytest.mark.parametrize("lengths", LENGTHS)
    def test_each_token_belongs_to_its_example(self, lengths, padding):
        segments = Segments.from_lengths(lengths, padding=padding)
        expected = [i for i, length in enumerate(lengths) for _ in range(length)]
        expected += [len(lengths)] * padding
        assert segments.ids.tolist() == expected
        assert segments.num_examples == len(lengths)
        assert segments.num_tokens == len(expected)
        assert segments.num_real_tokens == sum(lengths)
        assert segments.padding == padding
        assert segments.max_length == max(*lengths, padding)

    @pytest.mark.parametrize("padding", [0, 2])
    def test_offsets_are_what_attention_kernels_take(self, padding):
        offsets = Segments.from_lengths([3, 1, 2], padding=padding).offsets
        assert offsets.dtype == torch.int32
        assert offsets.tolist() == [0, 3, 4, 6] + [6 + padding] * bool(padding)

    @pytest.mark.parametrize("padding", [0, 4])
    def test_runs_are_neighbours_of_equal_length(self, padding):
        segments = Segments.from_lengths([4, 4, 1, 4, 2, 2, 2], padding=padding)
        # The dummy is as long as an example here, and yet of no run.
        assert segments.runs == ((4, 2), (1, 1), (4, 1), (2, 3))

    @pytest.mark.parametrize("padding", [0, 3])
    def test_without_padding_keeps_the_examples(self, padding):
        stripped = Segments.from_lengths([2, 5], padding=padding).without_padding()
        assert stripped.lengths == (2, 5)
        assert stripped.offsets.tolist() == [0, 2, 7]
        assert stripped.num_examples == 2
        assert stripped.padding == 0

    def test_singles_are_examples_of_one_token(self):
        singles, expected = Segments.singles(4, "cpu"), Segments.from_lengths([1] * 4)
        assert singles.lengths == expected.lengths
        assert singles.num_examples == 4
        assert torch.equal(singles.offsets, expected.offsets)
        assert singles.offsets.dtype == torch.int32

    def test_no_example_at_all(self):
        segments = Segments.from_lengths([], padding=3)
        assert (segments.num_examples, segments.num_real_tokens, segments.padding) == (0, 0, 3)
        assert segments.runs == ()
        assert Segments.from_lengths([]).max_length == 0
        assert Segments.from_lengths([]).ids.tolist() == []

    @pytest.mark.parametrize(
        ("lengths", "padding", "message"),
        [
            ([3, 0], 0, "at least one token, got 0"),
            ([-1], 0, "at least one token, got -1"),
            ([1], -2, "padding must not be negative, got -2"),
        ],
    )
    def test_mistakes_are_named(self, lengths, padding, message):
        with pytest.raises(ValueError, match=message):
            Segments.from_lengths(lengths, padding=padding)


class TestPackImages:
    GRIDS = ((2, 3), (1, 1), (3, 2), (1, 9), (4, 4), (1, 1))

    def images(self) -> list[ImagePatches]:
        images = [random_image(seed, grid) for seed, grid in enumerate(self.GRIDS)]
        images[4] = random_image(4, (4, 4), keep=5)  # some patches dropped
        return images

    @pytest.mark.parametrize("spare", [None, 0, 1, 30])
    def test_every_image_is_found_where_order_says(self, spare):
        images = self.images()
        total = sum(len(image.patches) for image in images)
        packed = pack_images(images, budget=None if spare is None else total + spare)
        assert len(packed.patches) == total + (spare or 0)
        assert sorted(packed.order.tolist()) == list(range(len(images)))
        offsets = packed.segments.offsets.tolist()
        for image, place in zip(images, packed.order.tolist(), strict=True):
            begin, end = offsets[place : place + 2]
            assert np.array_equal(packed.patches[begin:end], image.patches)
            assert np.array_equal(packed.coords[begin:end], image.coords)
            assert tuple(packed.grids[place].tolist()) == image.grid

    def test_neighbours_are_of_equal_length(self):
        lengths = pack_images(self.images()).segments.lengths
        assert list(lengths) == sorted(lengths)

    def test_types(self):
        packed = pack_images(self.images(), budget=100)
        assert packed.patches.dtype == torch.uint8
        assert packed.coords.dtype == packed.grids.dtype == torch.int32
        assert packed.order.dtype == torch.int64

    def test_padding_is_one_dummy_segment_of_zeros(self):
        images = self.images()
        packed = pack_images(images, budget=64)
        real = packed.segments.num_real_tokens
        assert packed.segments.lengths[-1] == packed.segments.padding == 64 - real
        assert len(packed.grids) == len(packed.segments.lengths) == len(images) + 1
        assert not packed.patches[real:].any()
        assert not packed.coords[real:].any()
        # A side of zero would make fractional positions NaN.
        assert packed.grids[-1].tolist() == [1, 1]

    def test_does_not_write_into_the_images(self):
        images = self.images()
        before = [image.patches.copy() for image in images]
        pack_images(images, budget=99).patches.zero_()
        assert all(np.array_equal(a, b.patches) for a, b in zip(before, images, strict=True))

    def test_a_long_image_beside_a_short_one(self):
        packed = pack_images([random_image(0, (100, 90)), random_image(1, (1, 1))])
        assert packed.segments.lengths == (1, 9000)
        assert packed.order.tolist() == [1, 0]

    def test_mistakes_are_named(self):
        with pytest.raises(ValueError, match="at least one image"):
            pack_images([])
        with pytest.raises(ValueError, match="6 image tokens do not fit a budget of 5"):
            pack_images([random_image(0, (2, 3))], budget=5)
        with pytest.raises(ValueError, match="at least one token, got 0"):
            pack_images([random_image(0, (2, 3), keep=0), random_image(1, (1, 1))])


class TestPackTexts:
    @settings(max_examples=40, deadline=None)
    @given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), spare=st.integers(0, 5))
    def test_every_caption_is_found_where_order_says(self, lengths, spare):
        captions = [random_caption(seed, length) for seed, length in enumerate(lengths)]
        packed = pack_texts(captions, budget=sum(lengths) + spare)
        assert packed.token_ids.dtype == torch.int32
        assert packed.segments.padding == spare
        parts = packed.token_ids.split(list(packed.segments.lengths))
        assert [parts[place].tolist() for place in packed.order] == captions
        assert packed.token_ids[sum(lengths) :].tolist() == [0] * spare

    def test_without_a_budget_there_is_no_padding(self):
        assert pack_texts([[1, 2], [3]]).token_ids.tolist() == [3, 1, 2]

    def test_mistakes_are_named(self):
        with pytest.raises(ValueError, match="at least one text"):
            pack_texts([])
        with pytest.raises(ValueError, match="3 text tokens do not fit a budget of 2"):
            pack_texts([[1], [2, 3]], budget=2)
        with pytest.raises(ValueError, match="at least one token, got 0"):
            pack_texts([[1], []])


def test_a_batch_moves_whole():
    batch = PackedBatch(
        pack_images([random_image(0, (2, 2))], budget=5),
        pack_texts([[1, 2]], budget=3),
        ids=("a/b",),
        counts=BatchCounts(1, 4, 4, 2, 5, 3),
        position={"0": 1},
    )
    moved = batch.to("meta")
    for part in (moved.images, moved.texts):
        assert isinstance(part, PackedImages | PackedTexts)
        tensors = [v for v in vars(part).values() if isinstance(v, torch.Tensor)]
        assert all(t.device.type == "meta" for t in [*tensors, part.segments.offsets])
    assert moved.images.segments.lengths == batch.images.segments.lengths
    assert (moved.ids, moved.counts, moved.position) == (batch.ids, batch.counts, batch.position)


class Pair(NamedTuple):
    name: int
    image_length: int
    text_length: int


def fits(batch: Sequence[Pair], pair: Pair, budgets: Budgets) -> bool:
    return (
        len(batch) + 1 <= budgets.max_pairs
        and sum(p.image_length for p in [*batch, pair]) <= budgets.image_tokens
        and sum(p.text_length for p in [*batch, pair]) <= budgets.text_tokens
    )


Emitted = tuple[int, list[Pair]]  # how many pairs had come by then, and the batch


def simulate(pairs: Iterable[Pair], budgets: Budgets, look_ahead: int) -> Iterator[Emitted]:
    """First-fit from scratch over all that is pending, at every arrival: slow and obvious."""
    come = 0
    pending: list[Pair] = []

    def first_fit() -> tuple[list[Pair], list[Pair]]:
        batch: list[Pair] = []
        waiting: list[Pair] = []
        for pair in pending:
            (batch if fits(batch, pair, budgets) else waiting).append(pair)
        return batch, waiting

    for come, pair in enumerate(pairs, start=1):
        pending.append(pair)
        while True:
            batch, waiting = first_fit()
            full = (
                len(batch) == budgets.max_pairs
                or sum(p.image_length for p in batch) == budgets.image_tokens
                or sum(p.text_length for p in batch) == budgets.text_tokens
            )
            if not (full or len(waiting) >= look_ahead):
                break
            yield come, batch
            pending = waiting
    while pending:
        batch, pending = first_fit()
        yield come, batch


def run_packer(packer: FirstFitPacker[Pair], pairs: Iterable[Pair]) -> Iterator[Emitted]:
    come = 0
    for come, pair in enumerate(pairs, start=1):
        packer.offer(pair)
        while (batch := packer.take()) is not None:
            yield come, batch
    while (batch := packer.flush()) is not None:
        yield come, batch


def batches_of(packer: FirstFitPacker[Pair], pairs: Iterable[Pair]) -> list[list[Pair]]:
    return [batch for _, batch in run_packer(packer, pairs)]


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[Pair], Budgets, int]:
    budgets = Budgets(draw(st.integers(1, 20)), draw(st.integers(1, 12)), draw(st.integers(1, 6)))
    sizes = st.tuples(st.integers(1, budgets.image_tokens), st.integers(1, budgets.text_tokens))
    pairs = [Pair(i, *size) for i, size in enumerate(draw(st.lists(sizes, max_size=30)))]
    return pairs, budgets, draw(st.integers(1, 5))


class TestFirstFitPacker:
    @settings(max_examples=100, deadline=None)
    @given(packings())
    def test_equals_the_simulation(self, packing):
        pairs, budgets, look_ahead = packing
        packer = FirstFitPacker[Pair](budgets, look_ahead)
        assert list(run_packer(packer, pairs)) == list(simulate(pairs, budgets, look_ahead))

    @settings(max_examples=60, deadline=None)
    @given(packings())
    def test_nothing_is_lost_repeated_or_over_budget(self, packing):
        pairs, budgets, look_ahead = packing
        batches = batches_of(FirstFitPacker[Pair](budgets, look_ahead), pairs)
        assert sorted(pair for batch in batches for pair in batch) == pairs
        for batch in batches:
            assert batch
            assert fits(batch[:-1], batch[-1], budgets)
            assert [pair.name for pair in batch] == sorted(pair.name for pair in batch)

    @settings(max_examples=60, deadline=None)
    @given(packings(), st.integers(0, 30))
    def test_offering_what_is_pending_restores_the_packer(self, packing, cut):
        pairs, budgets, look_ahead = packing
        packer = FirstFitPacker[Pair](budgets, look_ahead)
        taken = 0
        for pair in pairs[:cut]:
            packer.offer(pair)
            while (batch := packer.take()) is not None:
                taken += len(batch)
        restored = FirstFitPacker[Pair](budgets, look_ahead)
        for pair in packer.pending:
            restored.offer(pair)
        assert restored.pending == packer.pending
        assert taken + len(packer.pending) == len(pairs[:cut])
        assert list(run_packer(restored, pairs[cut:])) == list(run_packer(packer, pairs[cut:]))

    def test_a_pair_as_large_as_the_budget_is_a_batch_of_its_own(self):
        packer = FirstFitPacker[Pair](Budgets(10, 5, 8), look_ahead=3)
        pairs = [Pair(0, 10, 1), Pair(1, 1, 5), Pair(2, 10, 5)]
        assert batches_of(packer, pairs) == [[pair] for pair in pairs]

    def test_none_waits_for_ever(self):
        # The large pair never fits beside small ones that keep coming.
        packer = FirstFitPacker[Pair](Budgets(10, 100, 100), look_ahead=4)
        pairs = [Pair(0, 3, 1), Pair(1, 9, 1), *(Pair(i, 3, 1) for i in range(2, 40))]
        batches = batches_of(packer, pairs)
        assert 1 in [pair.name for pair in batches[1]]

    def test_look_ahead_finds_a_pair_for_the_gap(self):
        pairs = [Pair(0, 6, 1), Pair(1, 7, 1), Pair(2, 4, 1)]
        for look_ahead, first in ((1, [0]), (2, [0, 2])):
            packer = FirstFitPacker[Pair](Budgets(10, 100, 100), look_ahead)
            batch = batches_of(packer, pairs)[0]
            assert [pair.name for pair in batch] == first

    @pytest.mark.parametrize("last", [Pair(1, 6, 1), Pair(1, 1, 3), Pair(1, 1, 1)])
    def test_a_batch_that_is_full_by_any_measure_closes_at_once(self, last):
        packer = FirstFitPacker[Pair](Budgets(10, 5, 2 if last == (1, 1, 1) else 9), look_ahead=9)
        packer.offer(Pair(0, 4, 2))
        assert packer.take() is None
        packer.offer(last)
        assert packer.take() == [Pair(0, 4, 2), last]

    def test_an_empty_packer_gives_nothing(self):
        packer = FirstFitPacker[Pair](Budgets(), look_ahead=1)
        assert packer.take() is None
        assert packer.flush() is None
        assert packer.pending == ()

    @pytest.mark.parametrize(
        ("pair", "message"),
        [
            (Pair(0, 11, 1), "11 image and 1 text tokens exceeds the budgets of 10 and 5"),
            (Pair(0, 1, 6), "1 image and 6 text tokens exceeds the budgets of 10 and 5"),
        ],
    )
    def test_a_pair_that_never_fits_is_refused_and_forgotten(self, pair, message):
        packer = FirstFitPacker[Pair](Budgets(10, 5, 8), look_ahead=1)
        with pytest.raises(ValueError, match=message):
            packer.offer(pair)
        assert packer.pending == ()

    def test_look_ahead_is_checked(self):
        with pytest.raises(ValueError, match="look_ahead must be at least 1, got 0"):
            FirstFitPacker(Budgets(), look_ahead=0)


@pytest.mark.parametrize("field", ["image_tokens", "text_tokens", "max_pairs"])
@pytest.mark.parametrize("value", [0, -1])
def test_budgets_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got {value}"):
        Budgets(**{field: value})
