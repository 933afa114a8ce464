"""Curves of runs: one metric over an axis, a colour for each run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter, ScalarFormatter

from navit_clip.evaluation.report.drawing import (
    COLOURS,
    SOFT,
    STYLE,
    TOOLTIP,
    look_of,
    new_figure,
    to_svg,
)

MOST_POINTS = 400  # of all runs in a chart; more are averaged
_FEW = 24  # points that are marked one by one
_OUTER = 0.01  # of many values that may lie outside a chart at either end, such as a first step's
_THOUSANDS = 10_000  # from which ticks are written as 10k


class Curve(NamedTuple):
    """A metric of one run.

    Attributes:
        series: Number of the run, which its colour stands for.
        name: Of the run, for tooltips.
        points: In the order of the run.
    """

    series: int
    name: str
    points: Sequence[tuple[float, float]]


def curve_svg(
    key: str, axis: str, curves: Sequence[Curve], *, percent: bool, marks: Sequence[float] = ()
) -> Markup:
    """Draws a metric over an axis; `marks` are places on it where something was changed."""
    with rc_context(STYLE):
        figure = new_figure(4.4, 2.3)
        figure.set_layout_engine("none")  # which would take half of the time
        axes = figure.add_axes((0.15, 0.18, 0.82, 0.7))
        axes.set_title(key, loc="left", size=9, parse_math=False)
        axes.set_xlabel(axis.replace("_", " "))
        for mark in marks:
            axes.axvline(mark, color=SOFT, ls=":", lw=1)
        for curve in curves:
            points = thin(curve.points, max(20, MOST_POINTS // len(curves)))
            look = look_of(curve.series) | {"ls": "--" if curve.series >= len(COLOURS) else "-"}
            marker = look.pop("marker")
            axes.plot(*zip(*points, strict=True), **look | {"clip_on": True})
            for x, y in points if len(points) <= _FEW else ():
                text = f"{curve.name}: {100 * y:.4g}%" if percent else f"{curve.name}: {y:,.5g}"
                axes.plot(x, y, marker, gid=f"{TOOLTIP}{text} at {axis} {x:,.0f}", **look)
        values = np.array([y for curve in curves for _, y in curve.points])
        low, high = np.quantile(values, [_OUTER, 1 - _OUTER]) if len(values) > 50 else (
            values.min(), values.max(),
        )  # fmt: skip
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
        axes.set_ylim(low - margin if low < 0 or low > margin else -0.02 * margin, high + margin)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_formatter(
            PercentFormatter(1)
            if percent
            else EngFormatter(sep="")
            if high >= _THOUSANDS
            else ScalarFormatter(useOffset=False)
        )
        if len({x for curve in curves for x, _ in curve.points}) == 1:
            axes.set_xticks([curves[0].points[0][0]])
        return to_svg(figure, f"{key} over {axis}")


def histogram_svg(name: str, counts: Sequence[float], edges: Sequence[float]) -> Markup:
    """Draws a histogram of as many counts as edges but one."""
    with rc_context(STYLE):
        figure = new_figure(4.4, 1.8)
        axes = figure.subplots()
        axes.set_title(name.replace("_", " "), loc="left", size=9, parse_math=False)
        axes.stairs(counts, edges, fill=True, color=COLOURS[0])
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        return to_svg(figure, f"{name}: how many of each value")


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many points, each the mean of as many neighbours."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(float(x), float(y)) for x, y in (np.mean(group, axis=0) for group in groups)]
