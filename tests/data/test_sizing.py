"""Image sizes: drawn as the paper says, and turned into the best grid of whole patches."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from navit_clip.data.sizing import (
    CurriculumConfig,
    ResolutionConfig,
    default_max_tokens,
    fit_grid,
    sample_grid,
    sample_patch_size,
    sample_side,
    truncated_normal,
)

DRAWS = 20_000


def assert_moments(values: np.ndarray, mean: float, variance: float) -> None:
    """Mean and variance within four standard errors (of a variance: for kurtosis up to 3)."""
    assert abs(values.mean() - mean) < 4 * math.sqrt(variance / len(values))
    assert abs(values.var() - variance) < 4 * variance * math.sqrt(2 / len(values))


def moments_of_truncated_normal(mean, std, low, high):
    a, b = (low - mean) / std, (high - mean) / std
    density = [math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) for z in (a, b)]
    mass = (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2))) / 2
    shift = (density[0] - density[1]) / mass
    spread = 1 + (a * density[0] - b * density[1]) / mass - shift**2
    return mean + std * shift, std**2 * spread


def sides(config: ResolutionConfig) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([sample_side(config, config.max_side, rng) for _ in range(DRAWS)])


def test_uniform_sides():
    drawn = sides(ResolutionConfig(min_side=64, max_side=256))
    assert drawn.min() >= 64
    assert drawn.max() <= 256
    assert_moments(drawn, (64 + 256) / 2, (256 - 64) ** 2 / 12)


def test_uniform_areas():
    areas = sides(ResolutionConfig(min_side=64, max_side=384, by="area")) ** 2
    low, high = 64**2, 384**2
    assert_moments(areas, (low + high) / 2, (high - low) ** 2 / 12)


@pytest.mark.parametrize("mean", [-0.5, 0.0, 0.5])
def test_truncated_normal_sides(mean):
    config = ResolutionConfig(
        min_side=64, max_side=384, distribution="truncated_normal", mean=mean, std=1.0
    )
    u = (sides(config) - 64) / (384 - 64) * 2 - 1
    assert np.abs(u).max() <= 1
    assert_moments(u, *moments_of_truncated_normal(mean, 1.0, -1, 1))


def test_truncated_normal_areas():
    config = ResolutionConfig(
        min_side=64, max_side=384, distribution="truncated_normal", mean=-0.5, std=0.5, by="area"
    )
    u = (sides(config) ** 2 - 64**2) / (384**2 - 64**2) * 2 - 1
    assert_moments(u, *moments_of_truncated_normal(-0.5, 0.5, -1, 1))


def test_a_narrow_window_far_from_the_mean_is_respected():
    rng = np.random.default_rng(0)
    drawn = np.array([truncated_normal(rng, 0.0, 1.0, 1.0, 1.5) for _ in range(2000)])
    assert drawn.min() >= 1.0
    assert drawn.max() <= 1.5


def target(height, width, patch, max_tokens, max_grid_side, side, upscale):
    """Rows and columns as real numbers: wanted area at the native aspect, then every limit."""
    area = height * width
    if math.isfinite(side) and (upscale or side**2 < area):
        area = side**2
    aspect = height / width
    rows = max(math.sqrt(area * aspect) / patch, 1.0)
    columns = max(math.sqrt(area / aspect) / patch, 1.0)
    while rows * columns > max_tokens * (1 + 1e-12) or max(rows, columns) > max_grid_side:
        excess = math.sqrt(rows * columns / max_tokens)
        shrink = max(excess, rows / max_grid_side, columns / max_grid_side)
        rows, columns = max(rows / shrink, 1.0), max(columns / shrink, 1.0)
    return rows, columns


def errors_of_all_grids(height, width, patch, max_tokens, max_grid_side, side, upscale):
    """|log aspect| + |log area| against the target, for every grid that is allowed."""
    rows, columns = target(height, width, patch, max_tokens, max_grid_side, side, upscale)
    most = min(max_tokens, max_grid_side)
    r, c = np.meshgrid(np.arange(1, most + 1), np.arange(1, most + 1), indexing="ij")
    aspect = np.log(r / c) - np.log(rows / columns)
    area = np.log(r * c) - np.log(rows * columns)
    allowed = r * c <= max_tokens
    if not upscale:
        allowed &= (r <= max(1, height // patch)) & (c <= max(1, width // patch))
    return np.where(allowed, np.abs(aspect) + np.abs(area), np.inf)


@settings(max_examples=300)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    patch=st.sampled_from([1, 7, 14, 16, 32]),
    max_tokens=st.integers(1, 300),
    max_grid_side=st.integers(1, 80) | st.just(1 << 20),
    side=st.integers(1, 600) | st.just(math.inf),
    upscale=st.booleans(),
)
@example(40, 404, 16, 39, 64, math.inf, False)  # 2×19 fits 39 patches, and is far better than 1×20
@example(30000, 20, 16, 256, 1 << 20, math.inf, False)
@example(1, 4000, 16, 64, 1 << 20, 128, True)
def test_no_grid_fits_better(height, width, patch, max_tokens, max_grid_side, side, upscale):
    rows, columns = fit_grid(height, width, patch, max_tokens, max_grid_side, side, upscale=upscale)
    assert rows >= 1
    assert columns >= 1
    assert rows * columns <= max_tokens
    assert max(rows, columns) <= max_grid_side
    if not upscale:
        assert rows <= max(1, height // patch)
        assert columns <= max(1, width // patch)
    errors = errors_of_all_grids(height, width, patch, max_tokens, max_grid_side, side, upscale)
    assert errors[rows - 1, columns - 1] <= errors.min() + 1e-9


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 32))
def test_native_size_loses_less_than_a_patch_per_side(height, width, patch):
    rows, columns = fit_grid(height, width, patch, 10**9, 10**9)
    assert (rows, columns) == (max(1, height // patch), max(1, width // patch))


@pytest.mark.parametrize(
    ("size", "max_tokens", "max_grid_side", "grid"),
    [
        ((480, 640), 256, 64, (14, 18)),
        ((480, 640), 1200, 64, (30, 40)),  # native
        ((480, 640), 576, 64, (21, 27)),  # 20.8×27.7; up on both sides would be 588
        ((16, 16), 256, 64, (1, 1)),
        ((3, 5), 256, 64, (1, 1)),
        ((1, 4000), 256, 64, (1, 64)),
        ((4000, 1), 256, 64, (64, 1)),
        ((4000, 1), 8, 64, (8, 1)),
        ((1, 4000), 256, 1 << 20, (1, 250)),
        ((30000, 20), 256, 64, (64, 1)),
        ((30000, 20), 256, 1 << 20, (256, 1)),
        ((20, 30000), 1000, 1 << 20, (1, 1000)),
        ((1000, 1000), 1, 64, (1, 1)),
    ],
)
def test_known_grids(size, max_tokens, max_grid_side, grid):
    assert fit_grid(*size, 16, max_tokens, max_grid_side) == grid


def test_enlarging_needs_to_be_asked_for():
    assert fit_grid(40, 40, 16, 256, 64, 128.0) == (2, 2)
    assert fit_grid(40, 40, 16, 256, 64, 128.0, upscale=True) == (8, 8)
    assert fit_grid(40, 80, 16, 256, 64, math.inf, upscale=True) == (3, 5)  # of 2.5×5


def test_the_side_is_the_root_of_the_area():
    for height, width in ((2048, 2048), (1024, 4096), (2720, 1536)):
        rows, columns = fit_grid(height, width, 16, 1024, 64, 128.0)
        assert rows * columns * 16**2 == pytest.approx(128**2, rel=0.15)
        assert rows / columns == pytest.approx(height / width, rel=0.15)


def test_sampled_grids_cover_the_range_and_keep_limits():
    config = ResolutionConfig(min_side=64, max_side=256, max_tokens=200)
    rng = np.random.default_rng(0)
    tokens = [math.prod(sample_grid(config, 2000, 2000, 16, 64, rng)) for _ in range(2000)]
    assert min(tokens) == 16  # 64²
    assert 190 < max(tokens) <= 200  # 256² is 256 patches, past the limit
    assert len(set(tokens)) > 8


def test_native_mode_draws_nothing():
    config = ResolutionConfig(mode="native", max_tokens=1024)
    rng = np.random.default_rng(0)
    assert sample_grid(config, 480, 320, 16, 64, rng) == (30, 20)
    assert rng.uniform() == np.random.default_rng(0).uniform()


def test_square_mode_squashes_everything():
    config = ResolutionConfig(mode="square", max_side=224)
    rng = np.random.default_rng(0)
    for size in ((3, 3), (480, 640), (30000, 20)):
        assert sample_grid(config, *size, 16, 64, rng) == (14, 14)


def test_the_same_generator_gives_the_same_grid():
    config = ResolutionConfig(distribution="truncated_normal")
    first, second = (
        [sample_grid(config, 900, 700, 16, 64, rng) for _ in range(20)]
        for rng in (np.random.default_rng(7), np.random.default_rng(7))
    )
    assert first == second


@given(
    mode=st.sampled_from(["sampled", "native"]),
    start_side=st.integers(64, 300) | st.none(),
    start_tokens=st.integers(1, 256) | st.none(),
    by=st.sampled_from(["side", "area"]),
    seen=st.integers(0, 150),
    seed=st.integers(0, 1000),
)
def test_during_a_curriculum_images_are_sized_as_by_its_limits_of_the_moment(
    mode, start_side, start_tokens, by, seen, seed
):
    if mode == "native":
        start_side = None
    assume(start_side or start_tokens)
    full = {"mode": mode, "min_side": 64, "max_side": 300, "max_tokens": 256, "by": by}
    curriculum = CurriculumConfig(101, start_side, start_tokens)
    done, limits = Fraction(min(seen, 101), 101), {}
    for name, start, end in (("max_side", start_side, 300), ("max_tokens", start_tokens, 256)):
        if start is not None:
            limits[name] = start + done * (end - start)
    max_side = float(limits.get("max_side", 300))
    max_tokens = round(limits.get("max_tokens", 256))
    # A fractional side cannot be configured: the draw is compared by itself, the grid below.
    config = ResolutionConfig(**full, curriculum=curriculum)
    side = math.inf
    if mode == "sampled":
        side = sample_side(ResolutionConfig(**full), max_side, np.random.default_rng(seed))
    expected = fit_grid(700, 900, 16, max_tokens, 64, side)
    grid = sample_grid(config, 700, 900, 16, 64, np.random.default_rng(seed), seen)
    assert grid == expected
    later = sample_grid(config, 700, 900, 16, 64, np.random.default_rng(seed))
    without = sample_grid(
        ResolutionConfig(**full), 700, 900, 16, 64, np.random.default_rng(seed), seen
    )
    assert later == without
    assert math.prod(grid) <= max_tokens


def test_a_curriculum_does_not_change_what_the_model_is_judged_at():
    config = ResolutionConfig(max_side=256, curriculum=CurriculumConfig(100, start_side=64))
    assert default_max_tokens(config, 16) == 256


def test_a_models_default_budget():
    assert default_max_tokens(ResolutionConfig(max_side=256), 16) == 256
    assert default_max_tokens(ResolutionConfig(max_side=256, max_tokens=100), 16) == 100
    assert default_max_tokens(ResolutionConfig(mode="native", max_tokens=576), 16) == 576
    assert default_max_tokens(ResolutionConfig(mode="square", max_side=224), 16) == 196


def test_patch_sizes_are_drawn_by_their_weights():
    config = ResolutionConfig(patch_sizes={8: 1, 32: 3})
    rng = np.random.default_rng(0)
    drawn = [sample_patch_size(config, 16, rng) for _ in range(2000)]
    assert set(drawn) == {8, 32}
    assert drawn.count(32) / 2000 == pytest.approx(0.75, abs=0.04)
    assert sample_patch_size(ResolutionConfig(), 16, None) == 16  # nothing is drawn


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("min_side", {"min_side": 0}),
        ("min_side", {"min_side": 300, "max_side": 200}),
        ("std", {"std": 0.0}),
        ("mean", {"mean": 1.5}),
        ("max_tokens", {"max_tokens": 0}),
        ("start_side", {"curriculum": CurriculumConfig(9, start_side=63)}),
        ("start_side", {"curriculum": CurriculumConfig(9, start_side=257)}),
        ("start_side", {"mode": "native", "curriculum": CurriculumConfig(9, start_side=128)}),
        ("start_tokens", {"curriculum": CurriculumConfig(9, start_tokens=0)}),
        ("start_tokens", {"curriculum": CurriculumConfig(9, start_tokens=1025)}),
        ("start_tokens", {"mode": "square", "curriculum": CurriculumConfig(9, start_tokens=9)}),
        ("patch_sizes .* 0: 1", {"patch_sizes": {0: 1}}),
        ("patch_sizes .* 8: 0", {"patch_sizes": {8: 0}}),
        ("patch_sizes: 65 is past min_side=64", {"patch_sizes": {8: 1, 65: 1}}),
        (
            "patch_sizes: 16 does not divide max_side=200",
            {"mode": "square", "max_side": 200, "patch_sizes": {8: 1, 16: 1}},
        ),
    ],
)
def test_bad_fields_are_named(field, values):
    with pytest.raises(ValueError, match=field):
        ResolutionConfig(**values)


@pytest.mark.parametrize("values", [(-1,), (5,), (0, 64), (0, None, 64)])
def test_a_curriculum_needs_a_length_and_a_start(values):
    with pytest.raises(ValueError, match=r"^images "):
        CurriculumConfig(*values)
