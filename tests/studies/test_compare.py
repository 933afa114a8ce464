"""Accuracies, differences and compute with their intervals, against loops and simulations."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from studies import compare
from studies.compare import Curves, Estimate, Spread, reach


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


def difference_slowly(accuracy):
    """Variance of a difference from seed to seed and its degrees of freedom, by [arm][seed]."""
    arms, seeds = len(accuracy), len(accuracy[0])
    of_arm = [sum(row) / seeds for row in accuracy]
    of_seed = [sum(row[s] for row in accuracy) / arms for s in range(seeds)]
    mean = sum(of_arm) / arms
    total = sum(
        (accuracy[a][s] - of_arm[a] - of_seed[s] + mean) ** 2
        for a in range(arms)
        for s in range(seeds)
    )
    free = (arms - 1) * (seeds - 1)
    return 2 * total / free if free else 0.0, free


def interval_slowly(right_SN, queries_N, spread):
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
    free = [images - 1, spread[1], (seeds - 1) * (images - 1)]
    means = [seeds * sum(x * x for x in of_image) / free[0], images * spread[0],
             sum(x * x for x in rest) / max(1, free[2])]  # fmt: skip
    if means[1] <= means[2]:
        means[1:] = [0, 0]
    total = means[0] + means[1] - means[2]
    freedom = total**2 / sum(m * m / f for m, f in zip(means, free, strict=True) if f)
    return scipy.stats.t.ppf(0.975, freedom) * (total / seeds / images) ** 0.5


@pytest.mark.parametrize("seeds", [1, 2, 3])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_intervals_are_those_of_the_variance_components(seeds, spread):
    rng = np.random.default_rng(10 + seeds)  # other numbers may tie, and roundings break ties
    levels = 0.5 + spread * np.linspace(-1, 1, seeds)
    hits = {arm: rng.random((seeds, 2, 12)) < levels[:, None, None] for arm in "abcd"}
    own = {arm: range(seeds) for arm in hits}
    hits["other"], own["other"] = hits["a"][:1], [7]  # of another seed: no peer
    curves = curves_of(hits, own)
    right = {arm: hits[arm].reshape(seeds, 2, 6, 2).sum(-1) for arm in "ab"}
    queries = np.full(6, 2)
    for point, found in enumerate(curves.accuracy("a")):
        by_seed = hits["a"][:, point].mean(1)
        spread = (by_seed.var(ddof=1) if seeds > 1 else 0, seeds - 1)
        width = interval_slowly(right["a"][:, point], queries, spread)
        value = hits["a"][:, point].mean()
        assert found == pytest.approx((value, value - width, value + width))
    more = right["b"][:, -1] - right["a"][:, -1]
    spread = difference_slowly([hits[arm][:, -1].mean(1) for arm in "abcd"])
    value, width = more.sum() / seeds / 12, interval_slowly(more, queries, spread)
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
        _, low, high = Estimate.of_mean(found, np.ones(images), Spread.of_arm(found.mean(1)))
        held += low <= 0 <= high
    assert 0.91 < held / 600 < 0.99


@pytest.mark.parametrize(
    ("images", "sds", "least"),
    [
        (500, [0.015] * 2, 0.92),
        (500, [0.015] * 6, 0.92),
        (150, [0.0] * 6, 0.92),
        # Where arms differ in how much their seeds do, the least steady one is told too surely.
        (400, [0.04, 0.01, 0.02, 0.02, 0.02, 0.02], 0.88),
    ],
)
def test_intervals_of_differences_hold_what_they_say(images, sds, least):
    rng, held = np.random.default_rng(0), 0
    for _ in range(600):
        shared = rng.normal(0, 0.2, images) + rng.normal(0, 0.02, (3, 1))
        noise = (rng.normal(0, sd, (3, 1)) + rng.normal(0, 0.4, (3, images)) for sd in sds)
        found = np.array([shared + one for one in noise])
        spread = Spread.of_difference(found.mean(-1))
        _, low, high = Estimate.of_mean(found[0] - found[1], np.ones(images), spread)
        held += low <= 0 <= high
    assert least < held / 600 < 0.99


def test_all_right_or_all_wrong_has_no_width():
    assert Estimate.of_mean(np.ones((3, 5)), np.ones(5), Spread(0.0, 2)) == (1, 1, 1)


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
