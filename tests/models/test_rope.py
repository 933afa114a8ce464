"""Rotary positions: what they depend on; `encoder_cases` has the slow reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from packed_examples import random_image, randomise

from navit_clip.models.image_tower import ImageTower, ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.rope import Rotary, RotaryConfig
from navit_clip.models.text_tower import TextTowerConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.packed.images import PackedImages, pack_images

ENCODER = EncoderConfig(width=16, depth=2, heads=2, mlp_ratio=1.5)
KINDS = [
    RotaryConfig(kind, coordinates, theta=theta)
    for kind, theta in (("axial", 100.0), ("mixed", 10.0))
    for coordinates in ("integer", "normalised")
]
every_kind = pytest.mark.parametrize("rotary", KINDS, ids=lambda c: f"{c.kind}-{c.coordinates}")


def tower(rotary: RotaryConfig, pooling: str = "map") -> ImageTower:
    torch.manual_seed(0)
    config = ImageTowerConfig(2, ENCODER, PositionConfig("none"), pooling, rotary=rotary)
    model = ImageTower(config)
    randomise(model, seed=1)
    return model


def packed() -> PackedImages:
    return pack_images([random_image(0, (3, 4)), random_image(1, (1, 7)), random_image(2, (5, 5))])


@torch.no_grad()
@every_kind
def test_an_image_without_class_token_depends_on_offsets_alone(rotary):
    model, images = tower(rotary), packed()
    expected = model(images)
    moves = torch.tensor([[3, 40], [17, 0], [8, 9]], dtype=torch.int32)
    moved = replace(images, coords=images.coords + moves[images.segments.ids])
    torch.testing.assert_close(model(moved), expected, rtol=0, atol=1e-5)
    mirrored = replace(images, coords=images.coords.flip(1))
    assert (model(mirrored) - expected).abs().max() > 1e-3


@every_kind
def test_images_of_one_stream_do_not_see_each_other(rotary):
    model = tower(rotary, "cls").double()
    images = packed()
    x, segments, _ = model.tokens(images)
    (x[: segments.lengths[0]] ** 2).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = model.tokens(pack_images([random_image(1, (1, 7))])).x_TC
    (alone**2).sum().backward()
    for name, parameter in model.named_parameters():
        if expected[name] is not None:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_equal_steps_are_equal_turns_on_both_axes_if_the_aspect_is_kept():
    coords, sides = torch.tensor([[0, 0], [1, 1]]), torch.tensor([[2, 8], [2, 8]])
    for keep, ratio in ((True, 1), (False, 4)):
        config = RotaryConfig("axial", "normalised", keep_aspect=keep)
        row, column = config.positions(coords, sides, 1.0, torch.float64).diff(dim=0)[0]
        torch.testing.assert_close(row, ratio * column)


@pytest.mark.parametrize("config", KINDS[:2], ids=lambda c: c.coordinates)
def test_the_middle_of_four_patches_is_where_one_of_twice_the_side_is(config):
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    small = torch.stack([rows, columns], -1)
    large = small[:2, :3].flatten(0, 1)
    sides = torch.tensor([2, 3])
    fine = config.positions(small, 2 * sides, 0.5, torch.float64)
    middles = fine.unflatten(1, (3, 2)).unflatten(0, (2, 2)).mean((1, 3)).flatten(0, 1)
    torch.testing.assert_close(middles, config.positions(large, sides, 1.0, torch.float64))


def test_angles_are_float32_under_autocast():
    positions = torch.tensor([[1000.0, 999.0]])
    speeds = torch.tensor([[[1.0]], [[0.5]]])
    x = torch.tensor([[[1.0, 0.0]]], dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        (turned,) = Rotary(positions, speeds).rotate(x)
    angle = torch.tensor(1499.5, dtype=torch.float64)
    expected = torch.stack([angle.cos(), angle.sin()])[None, None].float()
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_tower_without_a_table_keeps_its_stream_in_float32_under_autocast():
    model, images = tower(KINDS[0]), packed()
    with torch.autocast("cpu", torch.bfloat16):
        found = model.tokens(images).x_TC
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model.tokens(images).x_TC, rtol=0.1, atol=0.1)


def test_learned_speeds_start_as_in_the_paper_and_have_no_weight_decay():
    config = ImageTowerConfig(2, ENCODER, rotary=RotaryConfig("mixed", theta=10.0))
    learned = ImageTower(config).rotary.learned
    assert learned.ndim == 1  # decay is for matrices
    by_row, by_column = learned.view(2, 2, 2, 4).unbind(1)
    length = torch.hypot(by_row, by_column)
    torch.testing.assert_close(length, torch.tensor([1, 10**-0.5] * 2).expand(2, 2, -1))
    first, second = torch.complex(by_row, by_column).split(2, dim=-1)
    torch.testing.assert_close(second, 1j * first)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: ImageTowerConfig(
                encoder=EncoderConfig(width=18, heads=3), rotary=RotaryConfig("axial")
            ),
            r"rotary.kind: axial .* divisible by 4, got encoder.width=18 / encoder.heads=3 = 6",
        ),
        (
            lambda: TextTowerConfig(
                encoder=EncoderConfig(width=9, heads=3), rotary=RotaryConfig("axial")
            ),
            "divisible by 2, got encoder.width=9",
        ),
        (lambda: TextTowerConfig(rotary=RotaryConfig("mixed")), "rotary.kind axial and"),
        (
            lambda: TextTowerConfig(rotary=RotaryConfig("axial", "normalised")),
            "what text takes, got axial and normalised",
        ),
        (lambda: RotaryConfig("spiral"), "kind must be one of none, axial, mixed"),
        (lambda: RotaryConfig(theta=1.0), "theta must be above 1, got 1.0"),
    ],
)
def test_what_cannot_be_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
