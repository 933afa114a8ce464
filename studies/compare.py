"""What the runs of a study show together, with 95% intervals over seeds and images.

Intervals are percentiles of a bootstrap: each time seeds and test images are drawn with
replacement, the same ones for all arms, which are compared on them. A caption is drawn with its
image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from navit_clip.evaluation.breakdown import break_down

DRAWS = 1000

Result = Mapping[str, Any]  # of a run, as `runs` writes it


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


class Curves:
    """One way of one test: how many queries each arm answers right as its training goes on.

    Args:
        results: By arm, what its runs found, one for each seed.
        test: Its name.
        way: ``top-1``, ``I→T`` or ``T→I``.
        right: A query counts as right if its answer is among so many nearest.

    Attributes:
        flops: By arm, training FLOPs at each point, mean of the seeds.
        draws: By arm, accuracy at its own setting, [1 + DRAWS, points]; first without drawing.
    """

    def __init__(
        self, results: Mapping[str, Sequence[Result]], test: str, way: str, right: int
    ) -> None:
        self._results, self._asked = results, (test, way, right)
        self.flops = {
            arm: np.mean([[p["flops"] for p in run["points"]] for run in runs], axis=0)
            for arm, runs in results.items()
        }
        some = last(next(iter(results.values()))[0], test)
        rng, images = np.random.default_rng(0), len(some["sizes"])
        self._seeds = min(map(len, results.values()))
        self._queries_DQ = _weights(rng, images)[:, some["image_of"][way]]
        self._seeds_DS = _weights(rng, self._seeds)
        self.draws = {}
        for arm, runs in results.items():
            points = [[p["scores"][test] for p in run["points"]] for run in runs[: self._seeds]]
            self.draws[arm] = self._draw([[hits(p, way, right) for p in run] for run in points])

    def _draw(self, hits_SPQ: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        # Counted in whole numbers, which are exact in any order of summing: points that are equally
        # good stay so on every CPU, and the first of them is the best.
        drawn_SPD = np.array(hits_SPQ) @ self._queries_DQ.T
        right_DP = np.einsum("ds,spd->dp", self._seeds_DS, drawn_SPD)
        return right_DP / (self._seeds * self._queries_DQ.sum(1, keepdims=True))

    def accuracy(self, arm: str) -> list[Estimate]:
        """At each point."""
        return [Estimate.of(draws) for draws in self.draws[arm].T]

    def gain(self, arm: str, baseline: str) -> Estimate:
        """How much more of the queries an arm answers right at the end."""
        return Estimate.of(self.draws[arm][:, -1] - self.draws[baseline][:, -1])

    def at(self, arm: str, setting: str, baseline: str | None = None) -> Estimate:
        """Accuracy of an arm at the end at a setting, or how much more it is than another's."""
        test, way, right = self._asked
        found, *others = (
            self._draw([[hits(last(r, test), way, right, setting)] for r in runs[: self._seeds]])
            for runs in (self._results[name] for name in (arm, baseline) if name is not None)
        )
        return Estimate.of((found - others[0] if others else found)[:, 0])

    def compute_to_reach(self, arm: str, baseline: str) -> Estimate:
        """Compute with which an arm is as good as the baseline ever gets, relative to the latter's.

        Between two points accuracy is a line over the logarithm of the compute.
        """
        ratios = []
        for curve, base in zip(self.draws[arm], self.draws[baseline], strict=True):
            best = int(base.argmax())
            used = reach(curve, self.flops[arm], base[best])
            ratios.append(used / self.flops[baseline][best])
        return Estimate.of(np.array(ratios))


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
