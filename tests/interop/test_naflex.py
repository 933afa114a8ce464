"""timm's NaFlex ViTs as packed image towers, against timm itself, one image at a time."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from packed_examples import random_image, randomise
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from navit_clip.configs import config_from_dict
from navit_clip.data.patches import cut_patches
from navit_clip.errors import UserError
from navit_clip.interop.naflex import is_naflex, naflex_image_tower, supported_naflex_models
from navit_clip.models.image_tower import ImageTower, ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.packed.images import ImagePatches, pack_images

PATCH = 2
SMALL = {"patch_size": PATCH, "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2.5}
# The table's own grid, grids with one and with both sides longer or shorter, and strips. One
# column is left out: F.interpolate with antialiasing on the CPU gives such an image one value in
# all rows, see test_interpolate.
GRIDS = [(5, 5), (3, 8), (9, 2), (1, 7), (2, 2), (12, 11), (5, 4)]

VARIANTS: dict[str, dict[str, Any]] = {
    "siglip": {"act_layer": "gelu_tanh", "pos_embed_interp_mode": "bilinear"},
    "mean": {"global_pool": "avg"},
    "mean-registers": {"global_pool": "avg", "reg_tokens": 3, "class_token": True},
    "mean-norm-first": {"global_pool": "avg", "fc_norm": False},
    "map-registers": {"reg_tokens": 2, "init_values": 0.1},
    "map-norm-after": {"fc_norm": True},
    "class-token": {"global_pool": "token", "class_token": True, "reg_tokens": 2},
    "no-norm": {"global_pool": "token", "class_token": True, "final_norm": False},
    "prefix-of-none": {"pool_include_prefix": True},
    "factorised": {"pos_embed": "factorized"},
    "factorised-aspect": {"pos_embed": "factorized", "pos_embed_ar_preserving": True},
    "aspect": {"pos_embed_ar_preserving": True},
    "sharp": {"pos_embed_antialias": False},
    "sharp-bilinear": {"pos_embed_antialias": False, "pos_embed_interp_mode": "bilinear"},
    "by-point": {"pos_embed_use_grid_sample": True},
    "by-point-factorised": {"pos_embed_use_grid_sample": True, "pos_embed": "factorized"},
    "bare": {"qkv_bias": False, "proj_bias": False, "global_pool": "avg", "init_values": 0.1},
    "query-key-norm": {"qk_norm": True},
    "pre-norm": {"pre_norm": True},
    "quick-gelu": {"act_layer": "quick_gelu"},
    "exact-gelu": {"act_layer": "gelu"},
    "tanh-module": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "epsilon": {"norm_layer": partial(nn.LayerNorm, eps=1e-2)},
    "norms-without-bias": {"norm_layer": partial(nn.LayerNorm, bias=False)},
    "axial": {"rope_type": "axial"},
    "axial-alone": {"rope_type": "axial", "pos_embed": "none", "rope_temperature": 50.0},
    "axial-half": {"rope_type": "axial", "rope_rotate_half": True, "qk_norm": True},
    "axial-columns-first": {"rope_type": "axial", "rope_grid_indexing": "xy", "init_values": 0.1},
    "mixed": {"rope_type": "mixed", "qk_norm": True, "reg_tokens": 2, "rope_temperature": 10.0},
    "mixed-columns-first": {
        "rope_type": "mixed",
        "rope_grid_indexing": "xy",
        "pos_embed": "factorized",
    },
    "dinov3": {"rope_type": "dinov3", "rope_temperature": 100.0, "pos_embed": "none"},
    "dinov3-class-token": {
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "rope_grid_indexing": "xy",
        "global_pool": "token",
        "class_token": True,
        "reg_tokens": 4,
    },
    "odd-mlp": {"embed_dim": 52, "mlp_ratio": 213.1 / 52},
}


def build(**changes: Any) -> NaFlexVit:
    """A small model, no parameter of which is a zero or a one."""
    torch.manual_seed(0)
    config = NaFlexVitCfg(**{**SMALL, "pos_embed_grid_size": (5, 5), **changes})
    return perturbed(NaFlexVit(config, num_classes=3))


def perturbed(model: nn.Module, std: float = 0.2) -> Any:
    randomise(model, seed=1, std=std)
    # Of a million values one may be rounded to 1.
    assert all(((p == 0) | (p == 1)).double().mean() < 1e-3 for p in model.parameters())
    return model.eval()


def images(patch_size: int = PATCH) -> list[ImagePatches]:
    return [random_image(i, grid, patch_size=patch_size) for i, grid in enumerate(GRIDS)]


def pixels(image: ImagePatches, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[n, P·P, 3] as timm's own pipeline normalises them."""
    values = torch.from_numpy(image.patches).unflatten(1, (-1, 3)) / 255
    return (values - torch.tensor(mean)) / torch.tensor(std)


def pooled(model: Any, image: ImagePatches, mean=(0.5,) * 3, std=(0.5,) * 3) -> Tensor:
    """Pooled vector of one image by timm."""
    patches = pixels(image, mean, std)
    if not model.embeds.channels_last:
        patches = patches.transpose(1, 2)
    features = model.forward_features(
        patches.flatten(1)[None],
        patch_coord=torch.from_numpy(image.coords)[None].long(),
        patch_valid=torch.ones(1, len(patches), dtype=torch.bool),
    )
    return model.forward_head(**features, pre_logits=True)


@torch.no_grad()
def check(tower: ImageTower, model: Any, pictures: list[ImagePatches], **statistics: Any) -> None:
    expected = torch.cat([pooled(model, image, **statistics) for image in pictures])
    # Else a constant embedding would pass.
    assert torch.pdist(expected).min() > 1e-2
    budget = sum(len(image.patches) for image in pictures) + 5
    actual = tower(pack_images(pictures, budget=budget))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_mixed_sizes_in_one_stream_equal_timm_one_by_one(changes):
    model = build(**changes)
    check(naflex_image_tower(model), model, images())


@pytest.mark.parametrize("name", supported_naflex_models())
def test_models_of_timm_made_small(name):
    torch.manual_seed(0)
    model = perturbed(timm.create_model(name, **SMALL, pos_embed_grid_size=(5, 5)))
    tower = naflex_image_tower(model)
    settings = model.pretrained_cfg
    check(tower, model, images(), mean=settings["mean"], std=settings["std"])


def test_siglip_2_naflex_in_its_full_size():
    name = "naflexvit_base_patch16_siglip"
    torch.manual_seed(0)
    model = perturbed(timm.create_model(name), std=0.01)
    tower = naflex_image_tower(name, model.state_dict())
    assert tower.config.position == PositionConfig(
        "learned_1d", table_side=16, interpolation="bilinear", antialias=True
    )
    some = [random_image(i, grid, patch_size=16) for i, grid in enumerate([(7, 5), (2, 20)])]
    check(tower, model, some)


def test_dropped_patches_keep_their_places():
    # Of timm's ways to positions the one that reads coordinates of patches; it takes an image to
    # end at its last patches, so the last one stays.
    model = build(pos_embed_use_grid_sample=True)
    kept = [0, 3, 9, 11, 23]
    image = images()[1]
    some = ImagePatches(image.patches[kept], image.coords[kept], image.grid)
    check(naflex_image_tower(model), model, [some, *images()])


def test_patches_with_channels_first_are_reordered():
    model = build(patchify_channels_last=False)
    check(naflex_image_tower(model), model, images())


@torch.no_grad()
def test_a_convolution_over_pixels_is_the_same_product():
    model = build(embed_proj_type="conv")
    tower = naflex_image_tower(model)
    for image in images():
        rows, columns = image.grid
        picture = pixels(image, (0.5,) * 3, (0.5,) * 3).unflatten(1, (PATCH, PATCH))
        picture = picture.unflatten(0, (rows, columns)).permute(4, 0, 2, 1, 3)
        picture = picture.reshape(1, 3, rows * PATCH, columns * PATCH)
        expected = model.forward_head(model.forward_features(picture), pre_logits=True)
        torch.testing.assert_close(tower(pack_images([image])), expected, rtol=1e-5, atol=1e-5)


def test_weights_of_one_module_in_the_shape_of_another():
    shape, weights = build(), build(pos_embed_interp_mode="bilinear")
    randomise(weights, seed=2)
    tower = naflex_image_tower(shape, weights.state_dict())
    shape.load_state_dict(weights.state_dict())
    check(tower, shape, images())


def test_half_precision_weights_are_read_as_they_are():
    model = build(init_values=0.1).to(torch.bfloat16)
    tower = naflex_image_tower(model)
    check(tower, model.float(), images())


def test_pixel_statistics_may_be_given():
    model = build()
    statistics = {"mean": (0.1, 0.4, 0.7), "std": (0.2, 0.3, 0.4)}
    tower = naflex_image_tower(model, pixel_mean=(0.1, 0.4, 0.7), pixel_std=(0.2, 0.3, 0.4))
    check(tower, model, images(), **statistics)


def test_gradients_of_a_padded_stream_equal_timms():
    model = build(reg_tokens=2)
    tower = naflex_image_tower(model)
    total = sum(len(image.patches) for image in images())
    tower(pack_images(images(), budget=total + 9)).sin().sum().backward()
    torch.cat([pooled(model, image) for image in images()]).sin().sum().backward()
    pairs = [
        (tower.position.table, model.embeds.pos_embed.grad.flatten(0, 2)),
        (tower.registers, model.embeds.reg_token.grad[0]),
        (tower.embed.weight, model.embeds.proj.weight.grad),
        (tower.pool.probe, model.attn_pool.latent.grad[0, 0]),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"rope_type": "mrope", "rope_mrope_section": (2, 2, 2)},
            "queries and keys by RotaryEmbeddingMRope",
        ),
        ({"rope_type": "axial", "rope_grid_offset": 1.0}, "rotations have an offset"),
        ({"rope_type": "axial", "rope_ref_feat_shape": (4, 4)}, "grid of reference"),
        ({"rope_type": "axial", "qkv_fused": False}, "layers of their own"),
        ({"pos_embed": "none"}, "no position embedding"),
        ({"pos_embed_grid_size": (4, 6)}, "positions is 4 x 6, not square"),
        ({"pos_embed_grid_size": (1, 1)}, "positions has a single place"),
        ({"pos_embed_align_corners": True}, "aligned corners"),
        ({"pos_embed_interp_mode": "nearest"}, "resizes positions by nearest"),
        ({"patch_size": (2, 4)}, r"patches are not square: \(2, 4\)"),
        ({"embed_norm_layer": "layernorm"}, "normalises patches"),
        ({"global_pool": "avgmax"}, "pools by avgmax"),
        ({"global_pool": ""}, "pools by nothing"),
        ({"reg_tokens": 1, "pool_include_prefix": True}, "pools class token and registers"),
        ({"attn_pool_num_heads": 3}, "pools with 3 heads, its blocks have 2"),
        ({"attn_pool_mlp_ratio": 3.0}, "MLP of its pooling"),
        ({"proj_bias": False}, "pooling has biases"),
        ({"swiglu_mlp": True}, "blocks are EvaBlock"),
        ({"attn_layer": "diff"}, "blocks are Block of DiffAttention"),
        ({"scale_mlp_norm": True}, "normalises within"),
        ({"scale_attn_inner_norm": True}, "normalises within"),
        ({"norm_layer": "rmsnorm"}, "norms other than LayerNorm"),
        ({"act_layer": "relu"}, "activation is ReLU"),
    ],
)
def test_a_switch_without_counterpart_is_named(changes, reason):
    model = NaFlexVit(NaFlexVitCfg(**{**SMALL, "pos_embed_grid_size": (5, 5), **changes}))
    with pytest.raises(UserError, match=reason) as refusal:
        naflex_image_tower(model)
    assert "supported are naflexvit_base_patch16_gap, " in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_grey_images_and_other_models_are_refused():
    grey = NaFlexVit(NaFlexVitCfg(**SMALL), in_chans=1)
    with pytest.raises(UserError, match="images have 1 channels"):
        naflex_image_tower(grey)
    with pytest.raises(UserError, match="cannot load Linear: it is no NaFlex ViT from timm"):
        naflex_image_tower(nn.Linear(2, 2))
    assert is_naflex(grey)
    assert not is_naflex(nn.Linear(2, 2))


def test_a_name_must_be_known_and_have_weights():
    with pytest.raises(UserError, match="no NaFlex model 'vit_base'; supported are naflexvit_b"):
        naflex_image_tower("vit_base", {})
    with pytest.raises(UserError, match="no weights for naflexvit_base_patch16_map: give state"):
        naflex_image_tower("naflexvit_base_patch16_map")
    with pytest.raises(UserError, match="radio_v3: it resizes positions with aligned corners"):
        naflex_image_tower("naflexvit_base_patch16_radio_v3", {})


@torch.no_grad()
def test_flexivit_in_patches_of_several_sizes():
    torch.manual_seed(0)
    shape = {"depth": 1}
    model = perturbed(timm.create_model("flexivit_small", **shape), std=0.05)
    with patch.object(timm, "create_model", partial(timm.create_model, depth=1)):
        tower = naflex_image_tower("flexivit_small", model.state_dict())
    assert tower.config.patch_size == 16
    picture = np.random.default_rng(0).integers(0, 256, (240, 240, 3), dtype=np.uint8)
    for size in (16, 8, 30):
        plain = timm.create_model("flexivit_small", **shape, patch_size=size).eval()
        bilinear = {"interpolation": "bilinear", "antialias": False}
        plain.load_state_dict(checkpoint_filter_fn(model.state_dict(), plain, **bilinear))
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
        expected = plain.forward_head(plain.forward_features(pixels), pre_logits=True)
        actual = tower(pack_images([cut_patches(picture, size)]))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_weights_of_another_model_are_refused(damage):
    model = build()
    state = model.state_dict()
    if damage == "missing":
        del state["norm.weight"]
    elif damage == "unknown":
        state["norm.scale"] = torch.ones(24)
    else:
        state["norm.weight"] = torch.ones(25)
    with pytest.raises(UserError, match=r"not of NaFlexVit: .* are norm\.(weight|scale)$"):
        naflex_image_tower(model, state)


def test_the_shape_survives_a_file():
    config = naflex_image_tower(build(reg_tokens=2, global_pool="avg")).config
    assert config.registers == 2
    assert config.pooled_norm
    assert config_from_dict(ImageTowerConfig, json.loads(json.dumps(asdict(config)))) == config


def test_registers_are_counted_from_zero():
    with pytest.raises(ValueError, match="registers must not be negative, got -1"):
        ImageTowerConfig(registers=-1)


def test_the_classifier_does_not_matter():
    model = build()
    state = {key: value for key, value in model.state_dict().items() if "head" not in key}
    check(naflex_image_tower(model, state), model, images())
