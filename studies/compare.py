"""What the runs of a study show together, with 95% intervals over seeds and images.

Seeds and test images are both samples of what there might have been, and every seed answers the
same images: two crossed random effects. Accuracies and differences have the interval of their
variance components, with the degrees of freedom of Satterthwaite (Biometrics Bulletin 2, 1946): a
few seeds are few, and a bootstrap of three would not know it. How much differences vary with the
seed is pooled over all arms, as an analysis of variance does. The compute to reach something is no
mean; its interval has the percentiles of a bootstrap of both. A caption goes with its image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from navit_clip.evaluation.breakdown import break_down

DRAWS = 1000

Result = Mapping[str, Any]  # of a run, as `runs` writes it


class Spread(NamedTuple):
    """How much an accuracy, or a difference of two, varies from seed to seed.

    Attributes:
        variance: Of one seed.
        free: Degrees of freedom that it was found with.
    """

    variance: float
    free: int

    @classmethod
    def of_arm(cls, accuracy_S: np.ndarray) -> Spread:
        """Of an arm's accuracy, from that of each seed."""
        return cls(float(accuracy_S.var(ddof=1)), len(accuracy_S) - 1)

    @classmethod
    def of_difference(cls, accuracy_AS: np.ndarray) -> Spread:
        """Of the difference between any two arms, from all arms' accuracies with each seed.

        What all arms share of a seed is no difference.
        """
        apart_AS = accuracy_AS - accuracy_AS.mean(1, keepdims=True) - accuracy_AS.mean(0)
        free = (accuracy_AS.shape[0] - 1) * (accuracy_AS.shape[1] - 1)
        return cls(float(2 * ((apart_AS + accuracy_AS.mean()) ** 2).sum() / free), free)


class Estimate(NamedTuple):
    """A number and its 95% interval; infinite where something was never reached."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: np.ndarray) -> Estimate:
        """Of what was drawn, behind what it is without drawing."""
        low, high = np.quantile(draws[1:], [0.025, 0.975], method="nearest")
        return cls(float(draws[0]), float(low), float(high))

    @classmethod
    def of_mean(
        cls, right_SN: np.ndarray, queries_N: np.ndarray, spread: Spread | None
    ) -> Estimate:
        """Of a fraction, or a difference of two.

        Args:
            right_SN: Right answers by seed and image, or how many more.
            queries_N: Queries by image.
            spread: Over seeds; of one seed none, and the interval is over images alone.
        """
        seeds, images = right_SN.shape
        value = right_SN.sum() / (seeds * queries_N.sum())
        rest_SN = (right_SN - value * queries_N) / queries_N.mean()
        by_seed_S1, by_image_N = rest_SN.mean(1, keepdims=True), rest_SN.mean(0)
        variance = seeds * (by_image_N**2).sum() / (images - 1)
        terms = variance**2 / (images - 1)
        if spread is not None:
            of_seeds = images * spread.variance
            free = (seeds - 1) * (images - 1)
            of_both = ((rest_SN - by_seed_S1 - by_image_N) ** 2).sum() / free
            if of_seeds > of_both:  # else seeds differ by no more than their answers would anyway
                variance += of_seeds - of_both
                terms += of_seeds**2 / spread.free + of_both**2 / free
        if not variance:
            return cls(float(value), float(value), float(value))
        error = np.sqrt(variance / (seeds * images)) * student.ppf(0.975, variance**2 / terms)
        return cls(float(value), float(value - error), float(value + error))


class Curves:
    """One way of one test: how many queries each arm answers right as its training goes on.

    Arms are compared over the seeds that both have.

    Args:
        results: By arm, what its runs found, one for each seed.
        test: Its name.
        way: ``top-1``, ``I→T`` or ``T→I``.
        right: A query counts as right if its answer is among so many nearest.

    Attributes:
        flops: By arm, training FLOPs at each point, mean of the seeds.
    """

    def __init__(
        self, results: Mapping[str, Sequence[Result]], test: str, way: str, right: int
    ) -> None:
        self._runs = {arm: {run["seed"]: run for run in runs} for arm, runs in results.items()}
        self._asked = test, way, right
        self._known: dict[tuple[str, int, str | None], np.ndarray] = {}
        self.flops = {
            arm: np.mean([[p["flops"] for p in run["points"]] for run in runs], axis=0)
            for arm, runs in results.items()
        }
        some = last(next(iter(results.values()))[0], test)
        self._image_of = np.array(some["image_of"][way])
        self._queries_N = np.bincount(self._image_of, minlength=len(some["sizes"]))
        self._draws_DN = _weights(np.random.default_rng(0), len(self._queries_N))

    def accuracy(self, arm: str) -> list[Estimate]:
        """At each point."""
        right_PSN = self._right(arm, self._shared(arm, arm)).swapaxes(0, 1)
        return [self._estimate({arm: right_SN}, arm) for right_SN in right_PSN]

    def gain(self, arm: str, baseline: str) -> Estimate:
        """How much more of the queries an arm answers right at the end."""
        seeds = self._shared(arm, baseline)
        right = {peer: self._right(peer, seeds)[:, -1] for peer in self._peers(seeds)}
        return self._estimate(right, arm, baseline)

    def at(self, arm: str, setting: str, baseline: str | None = None) -> Estimate:
        """Accuracy of an arm at the end at a setting, or how much more it is than another's."""
        seeds = self._shared(arm, baseline or arm)
        right = {peer: self._right(peer, seeds, setting) for peer in self._peers(seeds, setting)}
        return self._estimate(right, arm, baseline)

    def compute_to_reach(self, arm: str, baseline: str) -> Estimate:
        """Compute with which an arm is as good as the baseline ever gets, relative to the latter's.

        Between two points accuracy is a line over the logarithm of the compute.
        """
        ratios, seeds = [], self._shared(arm, baseline)
        for curve, base in zip(self._drawn(arm, seeds), self._drawn(baseline, seeds), strict=True):
            best = int(base.argmax())
            used = reach(curve, self.flops[arm], base[best])
            ratios.append(used / self.flops[baseline][best])
        return Estimate.of(np.array(ratios))

    def _estimate(
        self, right: Mapping[str, np.ndarray], arm: str, baseline: str | None = None
    ) -> Estimate:
        """Of an arm, or of how much more it has right, from [seeds, images] of it and its peers."""
        right_SN, spread = right[arm], None
        accuracy = {peer: one.sum(-1) / self._queries_N.sum() for peer, one in right.items()}
        if len(right_SN) > 1:
            spread = Spread.of_arm(accuracy[arm])
        if baseline is not None:
            right_SN = right_SN - right[baseline]
            if spread is not None:
                spread = Spread.of_difference(np.array(list(accuracy.values())))
        return Estimate.of_mean(right_SN, self._queries_N, spread)

    def _shared(self, arm: str, other: str) -> list[int]:
        return sorted(self._runs[arm].keys() & self._runs[other].keys())

    def _peers(self, seeds: Sequence[int], setting: str | None = None) -> list[str]:
        """Arms that have all these seeds, evaluated at this setting."""
        test = self._asked[0]
        return [
            arm
            for arm, runs in self._runs.items()
            if runs.keys() >= set(seeds)
            and (setting is None or setting in last(runs[seeds[0]], test)["ranks"])
        ]

    def _right(self, arm: str, seeds: Iterable[int], setting: str | None = None) -> np.ndarray:
        """Right answers by seed, point and image at an arm's own setting, or at the end at one."""
        return np.array([self._right_of(arm, seed, setting) for seed in seeds])

    def _right_of(self, arm: str, seed: int, setting: str | None) -> np.ndarray:
        found = self._known.get((arm, seed, setting))
        if found is None:
            test, way, right = self._asked
            run = self._runs[arm][seed]
            points = [point["scores"][test] for point in run["points"]]
            if setting is not None:
                found = self._by_image(hits(points[-1], way, right, setting))
            else:
                found = np.array([self._by_image(hits(point, way, right)) for point in points])
            self._known[arm, seed, setting] = found
        return found

    def _by_image(self, hits_Q: np.ndarray) -> np.ndarray:
        return np.bincount(self._image_of, hits_Q, minlength=len(self._queries_N))

    def _drawn(self, arm: str, seeds: Sequence[int]) -> np.ndarray:
        """Accuracy at each point, [1 + DRAWS, points]; first without drawing."""
        seeds_DS = _weights(np.random.default_rng(1), len(seeds))
        if len(seeds) > 1:  # a mean of S that are drawn varies by (S - 1) / S of what it should
            seeds_DS = 1 + (seeds_DS - 1) * np.sqrt(len(seeds) / (len(seeds) - 1))
        right_DP = np.einsum(
            "ds,spn,dn->dp", seeds_DS, self._right(arm, seeds), self._draws_DN, optimize=True
        )
        queries_D1 = (self._draws_DN @ self._queries_N)[:, None]
        # Rounded, so that points that are equally good stay so on every CPU: the first is the best.
        return np.round(right_DP / (len(seeds) * queries_D1), 12)


def reach(curve: np.ndarray, flops: np.ndarray, target: float) -> float:
    """FLOPs at which a curve first is as high as a target; infinite if it never is."""
    above = np.flatnonzero(curve >= target)
    if not len(above):
        return float("inf")
    first = int(above[0])
    if not first:
        return float(flops[0])
    part = (target - curve[first - 1]) / (curve[first] - curve[first - 1])
    return float(flops[first - 1] ** (1 - part) * flops[first] ** part)


def last(run: Result, test: str) -> Result:
    """What a run found at its end."""
    found: Result = run["points"][-1]["scores"][test]
    return found


def hits(found: Result, way: str, right: int, setting: str | None = None) -> np.ndarray:
    """Whether each query was answered right, at a run's own setting or another."""
    return np.array(found["ranks"][setting or found["own"]][way]) < right


def by_group(
    runs: Sequence[Result], test: str, way: str, right: int, breakdown: str
) -> dict[str, float]:
    """Accuracy at an arm's own setting by ``by_aspect`` or ``by_size`` of the images."""
    some = last(runs[0], test)
    image_of = np.array(some["image_of"][way])
    found = np.mean([hits(last(run, test), way, right) for run in runs], axis=0)
    groups = break_down(
        some["sizes"], lambda index: {way: float(found[np.isin(image_of, index)].mean())}
    )
    return {f"{g.label} ({g.images:,})": g.metrics[way] for g in groups[breakdown]}


def _weights(rng: np.random.Generator, count: int) -> np.ndarray:
    """How often each of so many is drawn, [1 + DRAWS, count]; the first time each once."""
    drawn = rng.multinomial(count, np.full(count, 1 / count), DRAWS)
    return np.concatenate([np.ones((1, count)), drawn])
