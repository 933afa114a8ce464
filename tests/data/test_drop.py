"""Token drop: rates as the paper's distributions and schedules have them, and a uniform choice."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from navit_clip.data.drop import DropConfig, keep_patches, mean_rate, sample_rate

DRAWS = 20_000


def rates(config: DropConfig, tokens: int = 100, images_seen: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([sample_rate(config, tokens, images_seen, rng) for _ in range(DRAWS)])


def standard_error(variance: float) -> float:
    return math.sqrt(variance / DRAWS)


def test_no_drop_and_a_fixed_rate():
    assert set(rates(DropConfig(kind="none"))) == {0.0}
    assert set(rates(DropConfig(kind="fixed", rate=0.37))) == {0.37}


def test_a_rate_without_a_kind_is_remarked():
    assert DropConfig().remark() is None
    assert DropConfig(kind="fixed", rate=0.3).remark() is None
    assert "(unused: rate, low_tokens)" in DropConfig(rate=0.3, low_tokens=9).remark()


@pytest.mark.parametrize(("rate", "max_rate"), [(0.5, 0.9), (0.53, 0.9), (0.1, 0.5), (0.7, 0.8)])
def test_beta_rates_have_the_papers_mean_and_variance(rate, max_rate):
    drawn = rates(DropConfig(kind="beta", rate=rate, max_rate=max_rate))
    assert drawn.min() >= 0
    assert drawn.max() <= max_rate
    u = rate / max_rate
    variance = max_rate**2 * 0.3 * u * (1 - u)
    assert abs(drawn.mean() - rate) < 4 * standard_error(variance)
    squares = (drawn - rate) ** 2
    assert abs(squares.mean() - variance) < 4 * standard_error(squares.var())


@pytest.mark.parametrize(
    ("tokens", "mean"), [(16, 0.2), (136, 0.5), (256, 0.8), (4, 0.2), (1000, 0.8)]
)
def test_resolution_dependent_rates_are_linear_in_the_length(tokens, mean):
    config = DropConfig(
        kind="resolution", low_rate=0.2, high_rate=0.8, low_tokens=16, high_tokens=256
    )
    drawn = rates(config, tokens)
    assert np.abs(drawn - mean).max() <= 0.04 + 1e-12  # two deviations of 0.02
    # Variance of a normal cut at ±2 deviations: 1 - 4·φ(2) / (2·Φ(2) - 1).
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    variance = 0.02**2 * (1 - 4 * density / math.erf(math.sqrt(2)))
    assert abs(drawn.mean() - mean) < 4 * standard_error(variance)
    assert abs(drawn.std() / math.sqrt(variance) - 1) < 0.03


def test_resolution_dependent_rates_stay_shares_at_the_edge():
    drawn = rates(DropConfig(kind="resolution", low_rate=0.0, high_rate=0.99))
    assert drawn.min() >= 0


SCHEDULE = {"schedule": "sigmoid", "schedule_images": 1000}


@pytest.mark.parametrize(("width", "midpoint"), [(-0.2, 2 / 3), (-0.1, 0.5), (0.1, 0.5)])
def test_the_schedule_is_the_papers_sigmoid(width, midpoint):
    config = DropConfig(kind="fixed", schedule_width=width, schedule_midpoint=midpoint, **SCHEDULE)
    seen = np.arange(0, 1001)
    course = np.array([mean_rate(config, n) for n in seen])
    wanted = 0.2 + 0.6 / (1 + np.exp(-(seen / 1000 - midpoint) / width))
    np.testing.assert_allclose(course, wanted, rtol=1e-12)
    assert mean_rate(config, midpoint * 1000) == pytest.approx(0.5)
    steps = np.diff(course)
    assert (steps < 0).all() if width < 0 else (steps > 0).all()


@pytest.mark.parametrize(("width", "start", "end"), [(-0.01, 0.8, 0.2), (0.01, 0.2, 0.8)])
def test_the_schedule_ends_at_its_limits_however_long_training_goes_on(width, start, end):
    config = DropConfig(kind="fixed", schedule_width=width, schedule_midpoint=0.5, **SCHEDULE)
    assert mean_rate(config, 0) == pytest.approx(start)
    assert mean_rate(config, 1000) == pytest.approx(end)
    assert mean_rate(config, 1e9) == end


def test_beta_follows_the_schedule():
    config = DropConfig(kind="beta", schedule_width=-0.01, schedule_midpoint=0.5, **SCHEDULE)
    for images_seen, mean in ((0, 0.8), (500, 0.5), (10**9, 0.2)):
        assert rates(config, images_seen=images_seen).mean() == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "fixed", "rate": 0.4},
        {"kind": "beta", "rate": 0.3},
        {"kind": "beta", "schedule_width": -0.1, **SCHEDULE},
        {"kind": "resolution", "low_tokens": 20, "high_tokens": 200},
    ],
)
@given(tokens=st.integers(1, 400), seen=st.integers(0, 400), seed=st.integers(0, 1000))
def test_during_a_ramp_every_rate_is_drawn_as_without_it_and_scaled(options, tokens, seen, seed):
    def draw(ramp_images):
        config = DropConfig(**options, ramp_images=ramp_images)
        return sample_rate(config, tokens, seen, np.random.default_rng(seed))

    full = draw(0)
    assert draw(200) == pytest.approx(full * seen / 200 if seen < 200 else full)
    assert draw(1) == (full if seen else 0.0)


@given(st.integers(1, 400), st.floats(0, 1), st.integers(0, 1000))
def test_kept_patches_are_sorted_distinct_and_as_many_as_the_rate_says(tokens, rate, seed):
    kept = keep_patches(tokens, rate, np.random.default_rng(seed))
    assert len(kept) >= 1
    assert abs(len(kept) - tokens * (1 - rate)) <= 0.5 or len(kept) == 1
    assert (np.diff(kept) > 0).all()
    assert kept[0] >= 0
    assert kept[-1] < tokens


def test_nothing_is_dropped_at_rate_zero_and_all_but_one_at_rate_one():
    rng = np.random.default_rng(0)
    assert keep_patches(20, 0.0, rng).tolist() == list(range(20))
    assert len(keep_patches(20, 1.0, rng)) == 1
    assert keep_patches(1, 0.9, rng).tolist() == [0]


def test_every_subset_is_kept_equally_often():
    tokens, kept, draws = 6, 3, 8000
    rng = np.random.default_rng(0)
    counts = Counter(tuple(keep_patches(tokens, 0.5, rng).tolist()) for _ in range(draws))
    subsets = list(itertools.combinations(range(tokens), kept))
    assert set(counts) == set(subsets)
    expected = draws / len(subsets)
    chi_squared = sum((counts[s] - expected) ** 2 / expected for s in subsets)
    freedom = len(subsets) - 1
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("rate", {"rate": 1.0}),
        ("low_rate", {"low_rate": -0.1}),
        ("max_rate", {"kind": "beta", "rate": 0.9, "max_rate": 0.9}),
        ("rate", {"kind": "beta", "rate": 0.0}),
        ("schedule_low", {"kind": "beta", "schedule_low": 0.0, **SCHEDULE}),
        ("schedule_low", {"kind": "fixed", "schedule_low": 0.9, **SCHEDULE}),
        ("max_rate", {"kind": "beta", "max_rate": 0.7, **SCHEDULE}),
        ("low_tokens", {"low_tokens": 256}),
        ("schedule_images", {"kind": "fixed", "schedule": "sigmoid"}),
        ("schedule_width", {"kind": "fixed", "schedule_width": 0.0, **SCHEDULE}),
        ("schedule", {"kind": "resolution", **SCHEDULE}),
        ("ramp_images", {"kind": "fixed", "ramp_images": -1}),
        ("ramp_images", {"ramp_images": 10}),
    ],
)
def test_bad_fields_are_named(field, values):
    with pytest.raises(ValueError, match=field):
        DropConfig(**values)
