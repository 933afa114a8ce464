"""The packed stream: where examples lie, and how they are laid out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_examples import random_caption, random_image

from navit_clip.data.builders.pairs import PairInputs
from navit_clip.packed.batch import Batch, BatchCounts, StreamCounts
from navit_clip.packed.images import ImagePatches, PackedImages, pack_images
from navit_clip.packed.segments import LENGTH_CLASSES, Segments
from navit_clip.packed.texts import PackedTexts, pack_texts

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
        assert segments.max_length == max(lengths)
        ends = [
            sum(max(lengths[: i + 1]) <= longest for i in range(len(lengths)))
            for longest in LENGTH_CLASSES
        ]
        sums = [len(lengths), sum(lengths), max(lengths)]
        assert segments.layout.tolist() == [*sums, *ends, *lengths]

    @pytest.mark.parametrize("padding", [0, 2])
    def test_offsets_are_what_attention_kernels_take(self, padding):
        offsets = Segments.from_lengths([3, 1, 2], padding=padding).offsets
        assert offsets.dtype == torch.int32
        assert offsets.tolist() == [0, 3, 4, 6] + [6 + padding] * bool(padding)

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

    def test_padding_is_one_segment_of_zeros(self):
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
    batch = Batch(
        PairInputs(
            pack_images([random_image(0, (2, 2))], budget=5), pack_texts([[1, 2]], budget=3)
        ),
        ids=("a/b",),
        counts=BatchCounts(1, {"image": StreamCounts(4, 4, 5, 5)}),
        state={"0": 1},
    )
    moved = batch.to("meta")
    for part in (moved.inputs.images, moved.inputs.texts):
        assert isinstance(part, PackedImages | PackedTexts)
        tensors = [v for v in vars(part).values() if isinstance(v, torch.Tensor)]
        assert all(t.device.type == "meta" for t in [*tensors, part.segments.offsets])
    assert moved.inputs.images.segments.lengths == batch.inputs.images.segments.lengths
    assert (moved.ids, moved.counts, moved.state) == (batch.ids, batch.counts, batch.state)
