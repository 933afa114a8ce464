"""Axes and labels of a plot, shared by the picture and the page's inline drawings.

A log axis whose ticks are round numbers even over less than a decade, and labels that avoid each
other: what plotting libraries do badly for a handful of points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_LOG_FROM = 3.0  # ratio of largest to smallest from which an axis is logarithmic


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high` with round ticks.

    Attributes:
        low: Value at the start.
        high: Value at the end.
        log: Whether the scale is logarithmic.
        ticks: Round values within.
    """

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """0 at the start, 1 at the end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def cost_axis(values: Sequence[float]) -> Axis:
    """An axis for tokens or FLOPs: positive, logarithmic when they differ much."""
    least, most = min(values), max(values)
    if most / least >= _LOG_FROM:
        margin = (most / least) ** 0.08
        low, high = least / margin, most * margin
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        multiples = (1, 2, 5) if high / low < 200 else (1,)
        ticks = [m * 10.0**e for e in exponents for m in multiples]
        return Axis(low, high, True, _within(ticks, low, high))
    margin = 0.1 * (most - least) or 0.5 * most
    low, high = max(0.0, least - margin), most + margin
    return Axis(low, high, False, _within(_round_steps(low, high), low, high))


def share_axis(values: Sequence[float]) -> Axis:
    """An axis for shares of one: linear, around the values."""
    margin = max(0.15 * (max(values) - min(values)), 0.01)
    low, high = max(0.0, min(values) - margin), max(values) + margin
    return Axis(low, high, False, _within(_round_steps(low, high), low, min(1.0, high)))


def format_tick(value: float) -> str:
    """A cost in few characters: ``0.05``, ``2000``, ``15k``."""
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def place_labels(
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    lines: Sequence[Sequence[tuple[float, float]]],
    *,
    width: float,
    height: float,
    gap: float,
    bounds: tuple[float, float],
) -> list[tuple[float, float] | None]:
    """Centres of labels beside their points, clear of each other and of all points.

    Args:
        points: Pixel coordinates, y downwards.
        labels: One per point; earlier ones choose first.
        lines: All lines drawn; labels keep clear of their points, and of the rest where they can.
        width: Of a character, in pixels.
        height: Of a line, in pixels.
        gap: From a point to its label.
        bounds: Width and height of the plot, from 0, 0.

    Returns:
        A centre per label, None where no side is free.
    """
    corners = [corner for line in lines for corner in line]
    between = [place for line in lines for place in _along(line, height / 2)]
    placed: list[tuple[float, float, float]] = []  # centre and half width
    centres: list[tuple[float, float] | None] = []
    for (x, y), label in zip(points, labels, strict=True):
        half, above = width * len(label) / 2, gap + height / 2

        def covers(
            place: tuple[float, float], cx: float, cy: float, margin: float, half: float = half
        ) -> bool:
            return abs(cx - place[0]) < half + margin and abs(cy - place[1]) < height / 2 + margin

        best, fewest = None, math.inf
        for dx, dy in ((0.0, -above), (0.0, above), (gap + half, 0.0), (-gap - half, 0.0)):
            cx, cy = x + dx, y + dy
            free = (
                half <= cx <= bounds[0] - half
                and height / 2 <= cy <= bounds[1] - height / 2
                and not any(covers(corner, cx, cy, 0.9 * gap) for corner in corners)
                and all(abs(cx - px) > half + p or abs(cy - py) > height for px, py, p in placed)
            )
            crossed = sum(covers(place, cx, cy, 3) for place in between)
            if free and crossed < fewest:
                best, fewest = (cx, cy), crossed
        if best is not None:
            placed.append((*best, half))
        centres.append(best)
    return centres


def _along(line: Sequence[tuple[float, float]], step: float) -> list[tuple[float, float]]:
    """Places on a line, so many pixels apart."""
    places = []
    for (x0, y0), (x1, y1) in pairwise(line):
        count = max(1, round(math.hypot(x1 - x0, y1 - y0) / step))
        places += [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count)]
    return places


def _round_steps(low: float, high: float) -> list[float]:
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _within(ticks: Sequence[float], low: float, high: float) -> tuple[float, ...]:
    slack = 1e-9 * (high - low)
    inside = tuple(round(t, 9) for t in ticks if low - slack <= t <= high + slack)
    return inside or (low, high)
