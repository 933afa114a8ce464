"""Resized tables against `F.interpolate` of the whole table in float64, in value and gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_examples import random_image, randomise
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from navit_clip.models.image_tower import ImageTower, ImageTowerConfig
from navit_clip.models.position import PositionConfig, build_position
from navit_clip.models.transformer import EncoderConfig
from navit_clip.packed.images import ImagePatches, pack_images
from navit_clip.packed.segments import Segments

WIDTH = 6
RESIZINGS = [(mode, antialias) for mode in ("bilinear", "bicubic") for antialias in (False, True)]
every_resizing = pytest.mark.parametrize(("mode", "antialias"), RESIZINGS)


def square(mode: str, antialias: bool, side: int, *, keep_aspect: bool = False) -> PositionConfig:
    return PositionConfig(
        "learned_1d",
        table_side=side,
        interpolation=mode,
        antialias=antialias,
        keep_aspect=keep_aspect,
    )


def factorised(mode: str, antialias: bool, side: int, **change: bool) -> PositionConfig:
    return PositionConfig(
        coordinates="interpolated",
        table_side=side,
        interpolation=mode,
        antialias=antialias,
        **change,
    )


def along_last(x_1CYX: Tensor, side: int, mode: str, antialias: bool) -> Tensor:
    size = (x_1CYX.shape[2], side)
    return F.interpolate(x_1CYX, size, mode=mode, antialias=antialias, align_corners=False)


def resized(table_YXC: Tensor, grid: tuple[int, int], mode: str, antialias: bool) -> Tensor:
    """[rows, columns, C]: the whole table in float64, one axis after the other.

    On the CPU `F.interpolate(antialias=True)` to one column and another number of rows gives all
    rows one value. Rows are therefore resized as columns, where that does not happen.
    """
    x = table_YXC.double().permute(2, 0, 1)[None]
    x = along_last(x, grid[1], mode, antialias)
    x = along_last(x.transpose(2, 3).contiguous(), grid[0], mode, antialias).transpose(2, 3)
    return x[0].permute(1, 2, 0)


def reference(module: nn.Module, config: PositionConfig, grid: tuple[int, int]) -> Tensor:
    """[rows, columns, C] positions of one grid, in float64."""
    side, (rows, columns) = config.table_side, grid
    if config.keep_aspect:
        grid = (max(grid), max(grid))
    how = (config.interpolation, config.antialias)
    if config.kind == "learned_1d":
        return resized(module.table.unflatten(0, (side, side)), grid, *how)[:rows, :columns]
    by_row = resized(module.row.table[:, None], (grid[0], 1), *how)
    by_column = resized(module.column.table[None], (1, grid[1]), *how)
    return (by_row + by_column)[:rows, :columns]


def build(config: PositionConfig, seed: int = 0) -> nn.Module:
    module = build_position(config, WIDTH)
    randomise(module, seed, std=1.0)
    return module


def patches(grids: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Coordinates and sides of every patch of every grid."""
    coords = np.concatenate([np.array(list(np.ndindex(grid)), dtype=np.int32) for grid in grids])
    sides = np.concatenate([np.full((a * b, 2), (a, b), dtype=np.int32) for a, b in grids])
    return torch.from_numpy(coords), torch.from_numpy(sides)


def gradients(module: nn.Module, out: Tensor, seed: int = 0) -> list[Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    return list(torch.autograd.grad((out * weight).sum(), list(module.parameters())))


def check(config: PositionConfig, grids: Sequence[tuple[int, int]], kept: Tensor, seed: int):
    module = build(config, seed)
    coords, sides = patches(grids)
    actual = module(coords[kept], sides[kept])
    expected = torch.cat([reference(module, config, grid).flatten(0, 1) for grid in grids])[kept]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    pairs = zip(gradients(module, actual), gradients(module, expected), strict=True)
    for grad, expected_grad in pairs:
        # Sums of as many terms as there are patches, some of which cancel.
        scale = max(1.0, float(expected_grad.abs().max()))
        torch.testing.assert_close(grad, expected_grad.float(), rtol=0, atol=1e-5 * scale)


sides_of_grids = st.one_of(st.just(1), st.integers(1, 40))


@settings(max_examples=60)
@given(
    resizing=st.sampled_from(RESIZINGS),
    kind=st.sampled_from([square, factorised]),
    side=st.integers(2, 20),
    keep_aspect=st.booleans(),
    grids=st.lists(st.tuples(sides_of_grids, sides_of_grids), min_size=1, max_size=4),
    own=st.booleans(),
    keep=st.floats(0.01, 1),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients(resizing, kind, side, keep_aspect, grids, own, keep, seed):
    grids = [*grids, (side, side)] if own else grids
    count = sum(rows * columns for rows, columns in grids)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    kept = order[: max(1, int(keep * count))]
    check(kind(*resizing, side, keep_aspect=keep_aspect), grids, kept, seed)


@every_resizing
@pytest.mark.parametrize("kind", [square, factorised])
@pytest.mark.parametrize(
    ("side", "grid"),
    [
        (2, (1, 1)),
        (2, (3000, 1)),
        (16, (1, 5000)),
        (16, (1, 16)),
        (37, (2, 3)),
        (24, (1, 1)),
        (14, (90, 50)),
        (32, (31, 33)),
    ],
)
def test_grids_far_from_the_tables_own(mode, antialias, kind, side, grid):
    check(kind(mode, antialias, side), [grid], torch.arange(grid[0] * grid[1]), 0)


@every_resizing
@pytest.mark.parametrize("grid", [(9, 14), (30, 2), (1, 9), (5, 5)])
def test_the_reference_is_interpolation_of_both_axes_at_once(mode, antialias, grid):
    table = torch.randn(5, 5, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    x = table.permute(2, 0, 1)[None]
    whole = F.interpolate(x, grid, mode=mode, antialias=antialias, align_corners=False)[0]
    torch.testing.assert_close(resized(table, grid, mode, antialias), whole.permute(1, 2, 0))


@every_resizing
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [2, 7, 16])
def test_the_tables_own_grid_is_the_table_bit_for_bit(mode, antialias, dtype, side):
    module = build(square(mode, antialias, side)).to(dtype)
    coords, sides = patches([(side, side)])
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = module(coords, sides)
    for out in (module(coords, sides), under_autocast):
        assert out.dtype == dtype
        assert torch.equal(out, module.table)


@every_resizing
@pytest.mark.parametrize("kind", [square, factorised])
def test_precisions(mode, antialias, kind):
    config = kind(mode, antialias, 7)
    grids = [(3, 11), (7, 7), (20, 2)]
    coords, sides = patches(grids)
    module = build(config)
    single = module(coords, sides)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(coords, sides), single)
    double = build(config).double()
    expected = torch.cat([reference(double, config, grid).flatten(0, 1) for grid in grids])
    torch.testing.assert_close(double(coords, sides), expected)
    half = build(config).to(torch.bfloat16)
    # The same values of the table, in float32; a factorised value is a sum of two rounded ones.
    exact = build(config)
    exact.load_state_dict(half.state_dict())
    torch.testing.assert_close(
        half(coords, sides).float(), exact(coords, sides), rtol=2**-7, atol=2**-7
    )


@every_resizing
@pytest.mark.parametrize("kind", [square, factorised])
def test_nothing_is_read_back_to_the_host(mode, antialias, kind):
    with FakeTensorMode():  # tensors without values: an operation that needs one raises
        module = build_position(kind(mode, antialias, 5), WIDTH)
        coords, sides = torch.zeros(2, 24, 2, dtype=torch.int32)
        out = module(coords, sides)
        out.sum().backward()
        with pytest.raises(DataDependentOutputException):
            out[0, 0].item()
    assert out.shape == (24, WIDTH)
    assert all(p.grad.shape == p.shape for p in module.parameters())


def test_antialiasing_and_interpolation_change_small_grids():
    coords, sides = patches([(3, 3)])
    values = [build(square(*resizing, 9))(coords, sides) for resizing in RESIZINGS]
    for i, one in enumerate(values):
        assert all((one - other).abs().max() > 0.01 for other in values[:i])


def tower_reference(tower: ImageTower, image: ImagePatches) -> Tensor:
    """One image with the table resized for it alone, in float64, and added to its patches."""
    config, embed = tower.config, tower.embed
    pixels = torch.from_numpy(image.patches).float() * embed.pixel_scale + embed.pixel_shift
    whole = reference(tower.position, config.position, image.grid)
    rows, columns = torch.from_numpy(image.coords).long().unbind(1)
    x = F.linear(pixels, embed.weight, embed.bias) + whole[rows, columns].float()
    if tower.class_token is not None:
        x = torch.cat([(tower.class_token + tower.class_position)[None], x])
    segments = Segments.from_lengths([len(x)])
    return tower.pool(tower.encoder(x, segments), segments)


@torch.no_grad()
@pytest.mark.parametrize(
    ("pooling", "position"),
    [
        ("cls", square("bicubic", True, 7)),  # CLIP in open_clip
        ("map", square("bilinear", True, 7)),  # SigLIP 2 NaFlex
        ("mean", square("bicubic", True, 7, keep_aspect=True)),
        ("map", factorised("bilinear", False, 7)),
    ],
)
def test_embeddings_of_any_size_are_those_of_a_table_resized_for_each_image(pooling, position):
    torch.manual_seed(0)
    encoder = EncoderConfig(width=WIDTH * 4, depth=2, heads=2)
    tower = ImageTower(
        ImageTowerConfig(2, encoder, position, pooling, class_position=pooling == "cls")
    )
    randomise(tower, seed=1)
    images = [
        random_image(0, (7, 7)),
        random_image(1, (3, 12)),
        random_image(2, (20, 1)),
        random_image(3, (1, 30)),
        random_image(4, (9, 8), keep=11),
        random_image(5, (2, 2)),
        random_image(6, (1, 1)),
    ]
    expected = torch.cat([tower_reference(tower, image) for image in images])
    assert torch.pdist(expected).min() > 1e-2
    torch.testing.assert_close(tower(pack_images(images)), expected, rtol=1e-4, atol=1e-4)
