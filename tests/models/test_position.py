"""Position embeddings against slow loops over patches and channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packed_examples import FACTORISED, POSITIONS, position_name, randomise
from torch import Tensor, nn

from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.position import (
    ANY_SIDE,
    Factorised,
    FourierAxis,
    PositionConfig,
    SquareTable,
    build_position,
)
from navit_clip.models.transformer import EncoderConfig

WIDTH = 8
GRIDS = [(1, 1), (3, 3), (2, 9), (9, 1), (4, 4), (5, 7)]


every_config = pytest.mark.parametrize("config", POSITIONS, ids=position_name)


def all_patches(grids: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Coordinates and sides of every patch of every grid, in one stream."""
    patches = [(cell, grid) for grid in grids for cell in np.ndindex(grid)]
    coords, sides = zip(*patches, strict=True)
    return torch.tensor(coords, dtype=torch.int32), torch.tensor(sides, dtype=torch.int32)


def build(config: PositionConfig, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = build_position(config, WIDTH)
    randomise(module, seed)
    return module


def axis_value(config: PositionConfig, axis: nn.Module, width: int, index: int, side: int) -> list:
    """φ(index) of one axis, one channel at a time."""
    fractional = config.coordinates == "fractional"
    if config.embedding == "fourier":
        turns = index / (side if fractional else config.table_side)
        angles = [2 * math.pi * f * turns for f in axis.frequency.tolist()]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    if config.embedding == "learned":
        table = axis.table.tolist()
    else:
        half = width // 2
        angles = [[i / 10_000 ** (j / half) for j in range(half)] for i in range(config.table_side)]
        table = [[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angles]
    if not fractional:
        return table[index]
    places = range(config.table_side)
    position = index / side * (config.table_side - 1)
    return [np.interp(position, places, channel) for channel in zip(*table, strict=True)]


@pytest.mark.parametrize("config", FACTORISED, ids=position_name)
def test_factorised_is_a_function_of_row_and_of_column(config):
    module = build(config)
    assert isinstance(module, Factorised)
    width = WIDTH // 2 if config.combine == "stack" else WIDTH
    coords, sides = all_patches(GRIDS)
    expected = []
    for (row, column), (rows, columns) in zip(coords.tolist(), sides.tolist(), strict=True):
        y = axis_value(config, module.row, width, row, rows)
        x = axis_value(config, module.column, width, column, columns)
        if config.combine == "stack":
            expected.append([*y, *x])
        elif config.combine == "sum":
            expected.append([a + b for a, b in zip(y, x, strict=True)])
        else:
            expected.append([a * b for a, b in zip(y, x, strict=True)])
    torch.testing.assert_close(
        module(coords, sides), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=2e-5
    )


def test_learned_2d_is_one_vector_per_cell():
    module = build(PositionConfig("learned_2d", table_side=9))
    assert isinstance(module, SquareTable)
    coords, sides = all_patches(GRIDS)
    table = module.table.unflatten(0, (9, 9))
    expected = torch.stack([table[row][column] for row, column in coords.tolist()])
    assert torch.equal(module(coords, sides), expected)


@pytest.mark.parametrize("side", [2, 5, 14])
@pytest.mark.parametrize("grid", [(1, 1), (5, 5), (3, 8), (1, 20), (30, 2), (14, 14), (6, 5)])
def test_learned_1d_is_bilinear_interpolation_of_the_square_table(side, grid):
    module = build(PositionConfig("learned_1d", table_side=side))
    assert isinstance(module, SquareTable)
    square = module.table.T.unflatten(1, (side, side))[None]
    expected = F.interpolate(square, size=grid, mode="bilinear", align_corners=False)
    expected = expected[0].flatten(1).T
    actual = module(*all_patches([grid]))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad((actual * weight).sum(), module.table)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), module.table)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)


def test_learned_1d_is_the_table_itself_on_its_own_grid():
    module = build(PositionConfig("learned_1d", table_side=4))
    torch.testing.assert_close(module(*all_patches([(4, 4)])), module.table.detach())


@every_config
def test_many_images_at_once_are_each_image_alone(config):
    module = build(config)
    alone = [module(*all_patches([grid])) for grid in GRIDS]
    torch.testing.assert_close(module(*all_patches(GRIDS)), torch.cat(alone))


@every_config
def test_the_grid_matters_to_relative_positions_only(config):
    module = build(config)
    coords = torch.tensor([[1, 2], [1, 2]], dtype=torch.int32)
    sides = torch.tensor([[3, 3], [6, 9]], dtype=torch.int32)
    small, large = module(coords, sides)
    assert torch.equal(small, large) == (config.max_grid_side < ANY_SIDE)


@pytest.mark.parametrize(
    "config", [c for c in FACTORISED if c.coordinates == "fractional"], ids=position_name
)
def test_fractional_positions_know_no_scale(config):
    module = build(config)
    coords, sides = all_patches([(3, 5)])
    torch.testing.assert_close(module(coords, sides), module(4 * coords, 4 * sides))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 9),
        ({"embedding": "sinusoidal"}, 9),
        ({"embedding": "fourier"}, 9),
        ({"coordinates": "fractional"}, ANY_SIDE),
        ({"kind": "learned_2d"}, 9),
        ({"kind": "learned_2d", "coordinates": "fractional"}, 9),  # coordinates: factorised only
        ({"kind": "learned_1d"}, ANY_SIDE),
        ({"coordinates": "interpolated"}, ANY_SIDE),
    ],
)
def test_longest_side_that_has_positions(change, expected):
    assert replace(PositionConfig(table_side=9), **change).max_grid_side == expected


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_longest_side_is_within_every_table(config, dtype):
    module = build(config).to(dtype)
    limit = config.max_grid_side
    side = torch.tensor([limit, limit], dtype=torch.int32)
    # Sides just past a power of two are where half precision rounds an index up to the side.
    sides = torch.stack([side, side.clamp(max=300), side.clamp(max=600)])
    out = module(sides - 1, sides)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


@every_config
def test_half_precision_does_not_blur_coordinates(config):
    side = min(config.max_grid_side, 400)
    coords, sides = all_patches([(1, side)])
    module = build(config)
    half = build(config).to(torch.bfloat16)
    # Learned frequencies are themselves blurred by the cast: compare at the same values.
    module.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    torch.testing.assert_close(
        half(coords, sides).float(), module(coords, sides), rtol=0, atol=0.05
    )


@every_config
def test_every_learned_parameter_gets_a_gradient(config):
    module = build(config)
    out = module(*all_patches([(9, 9)]))
    assert out.shape == (81, WIDTH)
    learned = list(module.parameters())
    assert bool(learned) == (config.kind != "factorised" or config.embedding != "sinusoidal")
    if learned:
        (out.sin().sum()).backward()
    assert all(p.grad.abs().sum(-1).min() > 0 for p in learned)


def test_a_product_starts_near_one_and_a_sum_near_zero():
    for combine, centre in (("product", 1.0), ("sum", 0.0)):
        torch.manual_seed(0)
        module = build_position(PositionConfig(combine=combine), 64)
        values = module(*all_patches([(8, 8)]))
        assert (values - centre).abs().max() < 0.2


def test_fourier_features_tell_neighbours_apart_and_do_not_alias():
    torch.manual_seed(0)
    axis = FourierAxis(PositionConfig(embedding="fourier", table_side=32), 64)
    side = torch.tensor([32])
    features = axis(torch.arange(32), side)
    distance = torch.cdist(features, features) + 10 * torch.eye(32)
    assert distance.min() > 0.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PositionConfig(combine="stack"), "must be a multiple of 2 for position.combine=stack"),
        (PositionConfig(embedding="fourier"), "must be a multiple of 2 .* position.embedding=four"),
        (PositionConfig(combine="stack", embedding="fourier"), "must be a multiple of 4 "),
    ],
)
def test_widths_are_refused_where_parts_of_them_are_needed(config, message):
    encoder = EncoderConfig(width=2 * 5 if config.width_divisor == 4 else 7, heads=1)
    with pytest.raises(ValueError, match=rf"^encoder\.width {message}"):
        ImageTowerConfig(position=config, encoder=encoder)
    ImageTowerConfig(position=replace(config, kind="learned_2d"), encoder=encoder)


def test_max_side_is_checked():
    with pytest.raises(ValueError, match="table_side must be at least 2 patches, got 1"):
        PositionConfig(table_side=1)


def test_features_without_a_table_cannot_be_interpolated():
    with pytest.raises(ValueError, match=r"coordinates: interpolated needs a table .* got fourier"):
        PositionConfig(coordinates="interpolated", embedding="fourier")
    # Another kind has no such coordinates.
    PositionConfig("learned_2d", coordinates="interpolated", embedding="fourier")


@pytest.mark.parametrize("width", [1, 7])
def test_sinusoids_of_odd_width_are_whole(width):
    module = build_position(PositionConfig(embedding="sinusoidal", table_side=9), width)
    out = module(*all_patches([(3, 3)]))
    assert out.shape == (9, width)
    assert torch.isfinite(out).all()
