"""Patches with their coordinates and per-token targets, through dropping, trimming and packing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.pairs import Pair
from navit_clip.data.patches import cut_patches
from navit_clip.packed.images import ImagePatches, pack_images

PATCH = 4


def labelled(seed: int, rows: int, columns: int, keep: np.ndarray | None = None) -> ImagePatches:
    """An image whose targets are the two first values of each patch."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (rows * PATCH, columns * PATCH, 3), dtype=np.uint8)
    targets = cut_patches(pixels, PATCH).patches[:, :2].astype(np.float32)
    return cut_patches(pixels, PATCH, keep, targets)


def belongs(image: ImagePatches) -> bool:
    assert image.targets is not None
    return np.array_equal(image.targets, image.patches[:, :2])


def test_coordinates_are_those_of_the_kept_patches():
    keep = np.array([1, 3, 5])
    image = labelled(0, 2, 3, keep)
    assert image.grid == (2, 3)
    assert image.coords.tolist() == [[0, 1], [1, 0], [1, 2]]
    assert labelled(0, 2, 3).coords.tolist() == [[r, c] for r in range(2) for c in range(3)]


def test_targets_are_dropped_and_trimmed_with_their_patches():
    keep = np.array([0, 2, 3, 7, 11])
    image = labelled(1, 3, 4, keep)
    assert len(image.patches) == len(image.targets) == 5
    assert belongs(image)
    trimmed = Pair("a/b", Origin(0, 0, 0, 0), image, [1], seed=0).trimmed(3).image
    assert len(trimmed.targets) == 3
    assert belongs(trimmed)


def test_targets_are_packed_in_the_order_of_their_patches_and_zero_at_padding():
    images = [labelled(i, *grid) for i, grid in enumerate([(3, 3), (1, 2), (2, 2)])]
    packed = pack_images(images, budget=20)
    assert packed.targets.shape == (20, 2)
    assert torch.equal(packed.targets[:15], packed.patches[:15, :2].float())
    assert not packed.targets[15:].any()
    start = packed.segments.offsets[packed.order[0]]
    np.testing.assert_array_equal(packed.targets[start : start + 9].numpy(), images[0].targets)
    moved = packed.to("meta")
    assert moved.targets.device.type == "meta"


def test_without_targets_there_are_none():
    images = [replace(labelled(i, 1, 2), targets=None) for i in range(2)]
    assert pack_images(images).targets is None
    with pytest.raises(ValueError, match="1 of 2 images have targets"):
        pack_images([images[0], labelled(0, 1, 1)])
