"""The hierarchical tower against the same on whole grids with masks, and against timm's Swin."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hierarchical_cases import dense_tokens, random_tower, swin_config, swin_weights, tower_config
from packed_examples import random_image, randomise
from timm.models.swin_transformer import SwinTransformer
from torch._dynamo.utils import counters

from navit_clip.data.patches import cut_patches
from navit_clip.inference.embed import feature_vectors
from navit_clip.models.hierarchical_tower import HierarchyConfig
from navit_clip.models.image_tower import ImageTower
from navit_clip.models.rope import RotaryConfig
from navit_clip.models.transformer import compiled_block
from navit_clip.packed.images import pack_images


def some_images(patch_size, seed, *, hide=True, count=4):
    """Random grids, the smallest among them; with `hide`, random units of each."""
    rng = np.random.default_rng(seed)
    grids = [(1, 1), *((int(r), int(c)) for r, c in rng.integers(1, 5, (count - 1, 2)))]
    return [
        random_image(i, (r, c), patch_size=patch_size, keep=rng.integers(1, r * c + 1))
        if hide
        else random_image(i, (r, c), patch_size=patch_size)
        for i, (r, c) in enumerate(grids)
    ]


def check(config, images, padding=0, *, grouped=False):
    """Compares packed images with each on its own grid, tokens and gradients."""
    tower = random_tower(config)
    budget = sum(len(image.patches) for image in images) + padding
    planner = config.planner(grouped=True) if grouped else None
    packed = pack_images(images, budget=budget, planner=planner)
    tokens = tower.tokens(packed).x_TC.split(packed.segments.lengths)
    actual = [tokens[i] for i in packed.order]
    expected = [dense_tokens(tower, image) for image in images]
    sums = []
    for some in (actual, expected):
        generator = torch.Generator().manual_seed(0)
        factors = (torch.randn(x_TC.shape, generator=generator).double() for x_TC in some)
        sums.append(sum((x * factor).sum() for x, factor in zip(some, factors, strict=True)))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(total, tower.parameters()) for total in sums]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("hide", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize(
    ("depths", "window"), [((2, 2, 3), 3), ((2, 3), 4), ((3, 2), 7), ((1, 2, 2), 1), ((3,), 2)]
)
def test_packed_images_are_as_each_on_its_own_grid(depths, window, hide):
    config = tower_config(depths, window)
    for seed in range(2):
        check(config, some_images(config.patch_size, seed, hide=hide), padding=3 * seed)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", ["axial", "mixed"])
def test_rotations_in_place_of_a_bias(kind, grouped):
    config = tower_config((2, 2), width=32, rotary=RotaryConfig(kind))
    check(config, some_images(config.patch_size, 4), padding=2, grouped=grouped)


@pytest.mark.parametrize("hide", [True, False], ids=["sparse", "dense"])
def test_windows_put_together_in_groups_give_the_same(hide):
    config = tower_config()
    check(config, some_images(config.patch_size, 5, hide=hide), padding=2, grouped=True)


def test_unit_sized_windows_stay_where_they_are():
    config = tower_config((2, 2, 2), 4)
    check(config, some_images(config.patch_size, 3))


@pytest.mark.parametrize(
    ("depths", "size"), [((2, 2, 2, 2), (224, 224)), ((2, 3), (56, 112)), ((2, 2), (112, 56))]
)
def test_dense_images_are_as_in_timms_swin(depths, size):
    config = swin_config(8, depths, (1, 2, 4, 8)[: len(depths)])
    swin = SwinTransformer(size, 4, 3, 0, "avg", 8, depths, (1, 2, 4, 8)[: len(depths)]).eval()
    randomise(swin, 0)
    tower = ImageTower(config)
    tower.load_state_dict(swin_weights(swin), strict=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    images = pack_images([cut_patches(image, config.patch_size) for image in pixels])
    inputs = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    torch.testing.assert_close(tower(images), swin(inputs), rtol=1e-5, atol=1e-5)


def test_patches_of_another_size_are_read_by_a_resized_kernel():
    config = tower_config((1, 1))
    tower = ImageTower(config)
    images = [random_image(0, (2, 3), patch_size=2 * config.patch_size)]
    assert tower(pack_images(images)).shape == (1, config.encoder.width)
    with pytest.raises(ValueError, match="multiple of 2 for 2 stages, got 3"):
        config.with_patch_size(3)


def test_bf16_is_near():
    config = tower_config()
    images = pack_images(some_images(config.patch_size, 0))
    tower = ImageTower(config)
    exact = tower(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tower(images)
        rounded.float().square().sum().backward()
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())


@pytest.mark.parametrize("kind", [pytest.param("none", marks=pytest.mark.slow), "axial"])
def test_compiled_blocks_compute_the_same_and_are_few_graphs(monkeypatch, kind):
    monkeypatch.setattr(
        "navit_clip.models.transformer.torch.compile", partial(torch.compile, backend="aot_eager")
    )
    config = tower_config((1, 1), rotary=RotaryConfig(kind))
    tower, compiled = random_tower(config), random_tower(config)
    compiled.load_state_dict(tower.state_dict())
    compiled.encoder.compile_blocks()
    compiled_block.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for seed in range(3):
        images = pack_images(some_images(config.patch_size, seed), budget=60)
        results = []
        for model in (tower, compiled):
            out = model(images)
            grads = torch.autograd.grad(out.square().sum(), model.parameters())
            results.append((out, grads))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
        graphs.append(counters["stats"]["unique_graphs"])
    compiled_block.cache_clear()
    # One for each stage; and where its windows happen to lie end to end already, another.
    assert 2 <= graphs[0] <= graphs[-1] <= 4


def test_recomputed_blocks_have_the_same_gradient():
    config = tower_config()
    tower = random_tower(config)
    images = pack_images(some_images(config.patch_size, 0))
    grads = []
    for recompute in (False, True):
        tower.encoder.activation_checkpointing = recompute
        grads.append(torch.autograd.grad(tower(images).square().sum(), tower.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hierarchy": HierarchyConfig((2, 2))}, "must add up to encoder.depth=7"),
        ({"patch_size": 6}, "patch_size must be a multiple of 4 for 3 stages, got 6"),
        ({"registers": 2}, "hierarchy.depths needs .* registers 0, got none, integer, mean and 2"),
        ({"pooling": "cls"}, "pooling mean or map"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(tower_config(), **change)


def test_limits_of_stages():
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        HierarchyConfig((2, 2), 0)
    with pytest.raises(ValueError, match="depths must be at least 1"):
        HierarchyConfig((2, 0))


def test_inference_lays_out_windows_before_its_images_are_on_the_device():
    tower, plans = random_tower(tower_config()).float(), []
    tower.register_forward_pre_hook(lambda _, args: plans.append(args[0].plan))
    images = some_images(tower.config.patch_size, 6)
    vectors = feature_vectors(tower, images)
    assert plans
    assert None not in plans
    expected = tower(pack_images(images)).detach()
    torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=1e-5)
