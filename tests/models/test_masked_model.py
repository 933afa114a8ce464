"""Predicting hidden patches of packed images, against one image at a time without packing."""

import numpy as np
import pytest
import torch
from masked_cases import PATCH, TOWERS, build, one_by_one
from packed_examples import random_image

from navit_clip.losses.masked_pixels import masked_pixel_loss
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.masked_image import MaskedImageConfig
from navit_clip.packed.masked import pack_masked

GRIDS = [(1, 2), (3, 5), (4, 4), (7, 1), (2, 3), (5, 5)]


def examples(seed, grids=GRIDS):
    rng = np.random.default_rng(seed)
    images = [random_image(seed + i, grid, patch_size=PATCH) for i, grid in enumerate(grids)]
    counts = [int(rng.integers(1, len(image.patches))) for image in images]
    visible = [
        np.sort(rng.permutation(len(image.patches))[:count])
        for image, count in zip(images, counts, strict=True)
    ]
    return images, visible


@pytest.mark.parametrize("budgets", [None, (70, 90)])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_packed_batch_equals_one_image_at_a_time(seed, decoder, tower, budgets):
    model = build(tower, decoder)
    images, visible = examples(seed)
    expected = one_by_one(model, images, visible)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    inputs = pack_masked(images, visible, budgets, full=not decoder)
    assert (inputs.images is None) == (not decoder)
    loss = masked_pixel_loss(model(inputs).pixels_TK, inputs.whole.patches, inputs.weights)
    loss.backward()
    # Targets are float32.
    assert torch.allclose(loss, expected, rtol=1e-5)
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max()
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("decoder", [True, False])
def test_hidden_pixels_reach_the_targets_alone(decoder, tower):
    model = build(tower, decoder)
    images, visible = examples(4)
    inputs = pack_masked(images, visible)
    before = model(inputs).pixels_TK
    inputs.whole.patches[inputs.weights > 0] = 0
    assert torch.equal(model(inputs).pixels_TK, before)
    assert inputs.weights.sum() == pytest.approx(len(images))


def test_a_flat_patch_has_a_target_of_zeros():
    flat = torch.full((1, 12), 77, dtype=torch.uint8)
    loss = masked_pixel_loss(torch.zeros(1, 12), flat, torch.ones(1))
    assert loss < 1e-6


def test_all_visible_and_none_visible_are_refused():
    image = random_image(0, (2, 2), patch_size=PATCH)
    for kept in (np.arange(4), np.arange(0)):
        with pytest.raises(ValueError, match=f"{len(kept)} of 4 patches are visible"):
            pack_masked([image], [kept])


def test_a_stem_that_would_see_hidden_patches_is_refused():
    with pytest.raises(ValueError, match=r"image\.stem must be none"):
        MaskedImageConfig(ImageTowerConfig(pooling="mean", stem="resnet50"), None)


@pytest.mark.parametrize("wrong", [{"pooling": "map"}, {"pooled_norm": True, "pooling": "mean"}])
def test_a_pooling_that_nothing_would_train_is_refused(wrong):
    with pytest.raises(ValueError, match=r"image\.pooling must be mean or cls"):
        MaskedImageConfig(ImageTowerConfig(**wrong))
