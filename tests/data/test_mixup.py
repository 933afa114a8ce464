"""Mixup and CutMix against whole images in floats, of which patches are dropped afterwards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from shard_factory import encode, photo

from navit_clip.data.augment import AugmentConfig
from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.labelled import LabelledBuilder
from navit_clip.data.drop import DropConfig
from navit_clip.data.labels import LabelReader
from navit_clip.data.mixup import partners
from navit_clip.data.patches import cut_patches, join_patches
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.seeding import generator
from navit_clip.data.sizing import ResolutionConfig

NAMES = ("a", "b", "c", "d")
SIZES = ((24, 40), (40, 24), (32, 32), (24, 40), (24, 40), (40, 24))


def builder(augment, drop="beta", resolution=None, seed=0):
    resolution = resolution or ResolutionConfig("native", max_tokens=99)
    reader = LabelReader("json.tags", NAMES, False)
    return LabelledBuilder(resolution, DropConfig(drop), 8, 32, seed, reader, augment=augment)


def samples(build, count=11, epoch=0):
    """Images of three grids, with none to three labels each."""
    found = []
    for index in range(count):
        tags = str([*range(index % 4)]).encode()
        members = {"png": encode(photo(index, *SIZES[index % 6])), "json": b'{"tags": %s}' % tags}
        found.append(build(RawSample(f"s/{index}", index, members), Origin(epoch, 0, index, 0)))
    return found


def unpacked(inputs):
    """Patches of each image, in the order in which the images came."""
    parts = inputs.images.patches.split(inputs.images.segments.lengths)
    return [parts[place].numpy() for place in inputs.images.order]


def targets_of(inputs):
    """[E, L] dense."""
    found = torch.zeros(len(inputs.labels), len(NAMES))
    index = inputs.labels.ids, inputs.labels.values
    return found.index_put(index, inputs.weights, accumulate=True).numpy()


def mixed_slowly(augment, one, other, seed):
    """Pixels of the whole mixed image, and which of them are the first one's."""
    mine, theirs = (join_patches(part.whole, part.image.grid) for part in (one, other))
    rng = generator(seed, one.origin.epoch, "mix", one.id)
    cuts = augment.cutmix > 0
    if augment.mixup and augment.cutmix:
        cuts = rng.random() < 0.5
    alpha = augment.cutmix if cuts else augment.mixup
    own = rng.beta(alpha, alpha)
    if not cuts:
        return np.rint(own * mine + (1 - own) * theirs), np.full(mine.shape[:2], own)
    height, width, _ = mine.shape
    middle = rng.integers(height), rng.integers(width)
    pixels, share = mine.copy(), np.ones((height, width))
    for y in range(height):
        for x in range(width):
            down, right = abs(y + 0.5 - middle[0]), abs(x + 0.5 - middle[1])
            if max(2 * down / height, 2 * right / width) < (1 - own) ** 0.5:
                pixels[y, x], share[y, x] = theirs[y, x], 0
    return pixels, share


@pytest.mark.parametrize("drop", ["none", "beta"])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.3, 0), (0, 1), (0.3, 1)])
def test_patches_and_targets_are_those_of_whole_images_mixed(mixup, cutmix, drop):
    augment = AugmentConfig(mixup=mixup, cutmix=cutmix)
    build = builder(augment, drop, seed=5)
    batch = samples(build, epoch=2)
    inputs = build.collate(batch, None)
    assert inputs.weights.dtype == torch.float32
    targets, kinds = targets_of(inputs), set()
    for index, (one, patches) in enumerate(zip(batch, unpacked(inputs), strict=True)):
        alike = [other for other in batch if other.image.grid == one.image.grid]
        other = alike[(alike.index(one) + 1) % len(alike)]
        pixels, share = mixed_slowly(augment, one, other, 5)
        keep = one.image.coords[:, 0] * one.image.grid[1] + one.image.coords[:, 1]
        expected = cut_patches(pixels.astype(np.uint8), 8, keep).patches
        np.testing.assert_allclose(patches.astype(int), expected.astype(int), atol=1)
        seen = [share[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] for y, x in one.image.coords]
        own, dense = np.mean(seen), np.zeros(len(NAMES))
        dense[one.labels] += own
        dense[other.labels] += 1 - own
        np.testing.assert_allclose(targets[index], dense, atol=1e-6)
        kinds.add(len(np.unique(share)) == 2)
    assert kinds == ({True, False} if mixup and cutmix else {cutmix > 0})


def test_each_is_mixed_with_the_next_of_its_grid():
    grids = [(1, 2), (2, 1), (1, 2), (3, 3), (1, 2), (2, 1)]
    assert partners(grids) == [2, 5, 4, 3, 0, 1]


def test_an_image_without_its_like_stays_as_it_is():
    build = builder(AugmentConfig(mixup=1.0), "none")
    batch = samples(build, 3)
    inputs = build.collate(batch, (64,))
    for one, patches, row in zip(batch, unpacked(inputs), targets_of(inputs), strict=False):
        np.testing.assert_array_equal(patches, one.image.patches)
        np.testing.assert_array_equal(row, np.isin(range(len(NAMES)), one.labels))


def test_a_trimmed_image_is_mixed_at_the_places_that_it_keeps():
    build = builder(AugmentConfig(mixup=1.0), "none")
    batch = [samples(build)[i] for i in (0, 3)]
    whole = unpacked(build.collate(batch, None))[0]
    trimmed = [batch[0].trimmed(4), batch[1].trimmed(7)]
    places = trimmed[0].image.coords @ [5, 1]
    np.testing.assert_array_equal(unpacked(build.collate(trimmed, None))[0], whole[places])


def test_the_mix_depends_on_seed_epoch_and_ids_alone():
    augment = AugmentConfig(mixup=1.0, cutmix=1.0)

    def weights(seed, epoch):
        build = builder(augment, "none", seed=seed)
        return build.collate(samples(build, epoch=epoch), None).weights.tolist()

    assert weights(0, 0) == weights(0, 0)
    assert weights(0, 0) != weights(1, 0)
    assert weights(0, 0) != weights(0, 1)


def test_sizes_and_kept_patches_are_those_of_a_run_without():
    plain, mixing = builder(AugmentConfig()), builder(AugmentConfig(mixup=1.0))
    for one, other in zip(samples(plain), samples(mixing), strict=True):
        assert one.whole is None
        np.testing.assert_array_equal(one.image.patches, other.image.patches)
        np.testing.assert_array_equal(one.image.coords, other.image.coords)
        assert replace(other, image=one.image).full_lengths == one.full_lengths
    assert plain.collate(samples(plain), None).weights is None
