"""Accuracies, differences and compute with their intervals, against loops and simulations."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from studies import compare
from studies.compare import Curves, Estimate, reach


def run_with(hits: np.ndarray, flops: list[float], seed: int) -> dict[str, object]:
    """A result of [points, queries], two queries to an image."""
    sizes, image_of = [[10, 10]] * (hits.shape[1] // 2), [i // 2 for i in range(hits.shape[1])]
    scores = [
        {"own": "9", "sizes": sizes, "image_of": {"T→I": image_of},
         "ranks": {"9": {"T→I": (1 - row).tolist()}}}
        for row in hits.astype(int)
    ]  # fmt: skip
    return {
        "seed": seed,
        "points": [
            {"flops": used, "scores": {"t": one}} for used, one in zip(flops, scores, strict=True)
        ],
    }


def curves_of(hits, seeds):
    """Of [seeds, points, queries] by arm."""
    results = {
        arm: [run_with(one, [1e3, 1e4], s) for one, s in zip(hits[arm], seeds[arm], strict=True)]
        for arm in hits
    }
    return Curves(results, "t", "T→I", 1)


def interval_slowly(right_SN, queries_N):
    """Half the width: of the two-way table of deviations, effect by effect."""
    seeds, images = right_SN.shape
    value = right_SN.sum() / seeds / queries_N.sum()
    table = [
        [(right_SN[s, n] - value * queries_N[n]) * images / queries_N.sum() for n in range(images)]
        for s in range(seeds)
    ]
    of_seed = [sum(row) / images for row in table]
    of_image = [sum(row[n] for row in table) / seeds for n in range(images)]
    rest = [table[s][n] - of_seed[s] - of_image[n] for s in range(seeds) for n in range(images)]
    squares = [seeds * sum(x * x for x in of_image), images * sum(x * x for x in of_seed),
               sum(x * x for x in rest)]  # fmt: skip
    free = [images - 1, seeds - 1, (seeds - 1) * (images - 1)]
    means = [x / f if f else 0 for x, f in zip(squares, free, strict=True)]
    if means[1] <= means[2]:
        means[1:] = [0, 0]
    total = means[0] + means[1] - means[2]
    freedom = total**2 / sum(m * m / f for m, f in zip(means, free, strict=True) if f)
    return scipy.stats.t.ppf(0.975, freedom) * (total / seeds / images) ** 0.5


@pytest.mark.parametrize("seeds", [1, 2, 3])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_intervals_are_those_of_the_variance_components(seeds, spread):
    rng = np.random.default_rng(seeds)
    levels = 0.5 + spread * np.linspace(-1, 1, seeds)
    hits = {arm: rng.random((seeds, 2, 12)) < levels[:, None, None] for arm in "ab"}
    curves = curves_of(hits, {arm: range(seeds) for arm in hits})
    right = {arm: hits[arm].reshape(seeds, 2, 6, 2).sum(-1) for arm in hits}
    queries = np.full(6, 2)
    for point, found in enumerate(curves.accuracy("a")):
        width = interval_slowly(right["a"][:, point], queries)
        value = hits["a"][:, point].mean()
        assert found == pytest.approx((value, value - width, value + width))
    more = right["b"][:, -1] - right["a"][:, -1]
    value, width = more.sum() / seeds / 12, interval_slowly(more, queries)
    assert curves.gain("b", "a") == pytest.approx((value, value - width, value + width))
    assert curves.at("b", "9", "a") == pytest.approx(curves.gain("b", "a"))


@pytest.mark.parametrize(
    ("seeds", "images", "sd"), [(3, 500, 0.015), (3, 150, 0.0), (3, 400, 0.03)]
)
def test_intervals_hold_what_they_say(seeds, images, sd):
    rng, held = np.random.default_rng(0), 0
    for _ in range(600):
        found = rng.normal(0, sd, (seeds, 1)) + rng.normal(0, 0.2, images)
        found = found + rng.normal(0, 0.4, (seeds, images))
        _, low, high = Estimate.of_mean(found, np.ones(images))
        held += low <= 0 <= high
    assert 0.91 < held / 600 < 0.99


def test_all_right_or_all_wrong_has_no_width():
    assert Estimate.of_mean(np.ones((3, 5)), np.ones(5)) == (1, 1, 1)


def test_seeds_are_paired_by_their_number():
    rng = np.random.default_rng(0)
    hits = {"a": rng.random((2, 2, 12)) < 0.4, "b": rng.random((3, 2, 12)) < 0.6}
    curves = curves_of(hits, {"a": [0, 2], "b": [0, 1, 2]})
    of_both = hits["b"][[0, 2]][:, -1].mean() - hits["a"][:, -1].mean()
    assert curves.gain("b", "a").value == pytest.approx(of_both)
    assert curves.accuracy("b")[-1].value == pytest.approx(hits["b"][:, -1].mean())
    one = curves_of(hits, {"a": [0, 2], "b": [2, 3, 4]})
    only = hits["b"][0, -1].mean() - hits["a"][1, -1].mean()
    assert one.gain("b", "a").value == pytest.approx(only)


def test_what_is_drawn_are_seeds_and_images_one_by_one():
    rng = np.random.default_rng(0)
    hits = {"a": rng.random((3, 2, 12)) < 0.3, "b": rng.random((3, 2, 12)) < 0.6}
    curves = curves_of(hits, {arm: range(3) for arm in hits})
    images = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), compare.DRAWS)
    seeds = np.random.default_rng(1).multinomial(3, np.full(3, 1 / 3), compare.DRAWS)
    found = curves._drawn("b", [0, 1, 2])
    np.testing.assert_allclose(found[0], hits["b"].mean((0, 2)))
    for number, (image, seed) in enumerate(zip(images, seeds, strict=True), start=1):
        drawn = [q for i, n in enumerate(image) for _ in range(n) for q in (2 * i, 2 * i + 1)]
        by_seed = hits["b"][:, :, drawn].mean(-1)
        apart = by_seed - by_seed.mean(0)
        expected = by_seed.mean(0) + seed @ apart * 1.5**0.5 / 3
        np.testing.assert_allclose(found[number], expected, atol=1e-11)
    low, high = curves.compute_to_reach("b", "a")[1:]
    assert low <= curves.compute_to_reach("b", "a").value <= high


def test_compute_to_reach():
    flops = np.array([1e2, 1e4, 1e6])
    curve = np.array([0.1, 0.5, 0.4])
    assert reach(curve, flops, 0.05) == 1e2
    assert reach(curve, flops, 0.3) == pytest.approx(1e3)
    assert reach(curve, flops, 0.5) == pytest.approx(1e4)
    assert reach(curve, flops, 0.6) == np.inf
    assert Estimate.of(np.array([1.0] + [np.inf] * 500 + [2.0] * 500)) == (1.0, 2.0, np.inf)
