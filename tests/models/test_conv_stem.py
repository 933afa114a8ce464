"""The hybrid tower: a ResNet per group of equal grids, against images alone and timm's model."""

from __future__ import annotations

import pytest
import timm
import torch
from packed_examples import random_image, randomise
from torch.utils.flop_counter import FlopCounterMode

from navit_clip.data.config import DataConfig
from navit_clip.data.drop import DropConfig
from navit_clip.data.patches import join_patches
from navit_clip.interop.timm_vit import BLOCK
from navit_clip.models.conv_stem import CHANNELS, ConvStem
from navit_clip.models.flops import image_flops
from navit_clip.models.image_tower import ImageTower, ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.packed.images import pack_images
from navit_clip.tasks.images import check_sizes

ENCODER = EncoderConfig(32, 1, 2, qk_norm=False, qkv_bias=True, norm_bias=True)
CONFIG = ImageTowerConfig(
    16,
    ENCODER,
    PositionConfig("learned_1d", table_side=3),
    "cls",
    class_position=True,
    stem="resnet50",
)
GRIDS = [(2, 3), (1, 1), (3, 2), (2, 3), (1, 6), (3, 3)]  # three of six patches, of two shapes


@pytest.fixture(scope="module")
def tower() -> ImageTower:
    torch.manual_seed(0)
    found = ImageTower(CONFIG).double()
    randomise(found, 0, std=0.02)
    return found.eval()


@pytest.fixture(scope="module")
def images():
    return [random_image(i, grid, patch_size=16) for i, grid in enumerate(GRIDS)]


def test_each_patch_has_the_vector_that_it_has_in_its_image_alone(tower, images):
    packed = pack_images(images, budget=40)
    with torch.no_grad():
        found = tower.stem(packed, torch.float64)
        assert found.shape == (40, CHANNELS)
        parts = found.split(packed.segments.lengths)
        assert not parts[-1].any()
        for image, place in zip(images, packed.order, strict=True):
            pixels = torch.from_numpy(join_patches(image.patches, image.grid).copy())
            upright = (pixels.permute(2, 0, 1)[None].double() / 255 - 0.5) / 0.5
            (expected,) = tower.stem.resnet(upright)
            expected = torch.stack([expected[:, row, column] for row, column in image.coords])
            torch.testing.assert_close(parts[place], expected)


def test_images_of_other_grids_change_neither_vectors_nor_gradients(tower, images):
    gradients, few = [], images[:3]
    together = tower(pack_images(few))
    alone = torch.cat([tower(pack_images([image])) for image in few])
    torch.testing.assert_close(together, alone)
    for vectors in (together, alone):
        tower.zero_grad()
        vectors.square().sum().backward()
        gradients.append([parameter.grad for parameter in tower.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_it_is_timms_hybrid(tower, images):
    theirs = (
        timm.create_model(
            "vit_base_r50_s16_224", img_size=48, embed_dim=32, depth=1, num_heads=2, num_classes=0
        )
        .double()
        .eval()
    )
    own = tower.state_dict()
    state = {
        "cls_token": own["class_token"][None, None],
        "pos_embed": torch.cat([own["class_position"][None], own["position.table"]])[None],
        "patch_embed.proj.weight": own["embed.weight"][:, :, None, None],
        "patch_embed.proj.bias": own["embed.bias"],
        "norm.weight": own["encoder.norm.weight"],
        "norm.bias": own["encoder.norm.bias"],
    }
    for name, value in own.items():
        if name.startswith("stem.resnet."):
            state[name.replace("stem.resnet", "patch_embed.backbone")] = value
        elif name.startswith("encoder.blocks."):
            _, _, number, *layer, kind = name.split(".")
            state[f"blocks.{number}.{BLOCK['.'.join(layer)]}.{kind}"] = value
    theirs.load_state_dict(state)
    pixels = torch.from_numpy(join_patches(images[-1].patches, (3, 3)).copy())
    with torch.no_grad():
        expected = theirs((pixels.permute(2, 0, 1)[None].double() / 255 - 0.5) / 0.5)
        torch.testing.assert_close(tower(pack_images(images[-1:])), expected)


def test_flops_are_those_that_are_counted(tower):
    image = random_image(0, (4, 6), patch_size=16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(pack_images([image]))
    assert image_flops(CONFIG, 0, 24) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_dropped_patches_are_refused(tower):
    image = random_image(0, (3, 3), patch_size=16, keep=7)
    with pytest.raises(ValueError, match="whole images, got 7 of 3×3"):
        tower(pack_images([image]))
    for change in ({"drop": DropConfig("beta")}, {"packing": "exact"}):
        with pytest.raises(ValueError, match=r"image\.stem=resnet50 reads whole images"):
            check_sizes(DataConfig(**change), CONFIG)
    check_sizes(DataConfig(), CONFIG)


def test_what_does_not_fit_a_stem_is_refused():
    with pytest.raises(ValueError, match="stem: resnet50 needs patch_size 16"):
        ImageTowerConfig(32, stem="resnet50")
    with pytest.raises(ValueError, match="patches of 16 pixels, got 8"):
        CONFIG.with_patch_size(8)


def test_the_stem_is_that_of_the_paper():
    with torch.device("meta"):
        stem = ConvStem((0.5,) * 3, (0.5,) * 3)
    assert [len(stage.blocks) for stage in stem.resnet.stages] == [3, 4, 9]
