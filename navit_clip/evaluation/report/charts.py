"""The charts of a result: accuracy against cost, and confidence against accuracy.

matplotlib draws them, as a PNG of two panels (mean tokens and GFLOPs per image) or as SVG inside
the page. Colour and marker stand for the model, dashes for the second metric, a label for the
setting, a ring for the model's own. Settings at native aspect ratio are joined in order of cost,
squares and cascades (dotted) apart from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.path import Path as LinePath
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox

from navit_clip.evaluation.calibration import Bin
from navit_clip.evaluation.report.drawing import (
    COLOURS,
    INK,
    PAPER,
    SOFT,
    STYLE,
    TOOLTIP,
    look_of,
    new_figure,
    save_figure,
    to_svg,
)
from navit_clip.evaluation.results import EvalResult, Metric, Row, shorten

Cost = Callable[[Row], float]  # 0 if not known

COSTS: tuple[tuple[str, Cost], ...] = (
    ("mean tokens per image", lambda row: row.mean_tokens),
    ("GFLOPs per image", lambda row: row.gflops or 0.0),
)
_LOG_FROM = 3.0  # ratio of largest to smallest from which a cost axis is logarithmic
# Places of a label beside its point: offset in points of 1/72 inch, and how text aligns.
_SIDES = (
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
    (8, 0, "left", "center"),
    (-8, 0, "right", "center"),
)
_DASHES = ("-", "--")  # of the first headline metric and the second
_DOTS = ":"  # of cascades
_JOINED = (("capped", "native"), ("square",), ("cascade",))  # kinds of settings
_RING: dict[str, Any] = {
    "color": INK,
    "marker": "o",
    "mfc": "none",
    "ms": 10,
    "mew": 0.9,
    "clip_on": False,
}


@dataclass(frozen=True)
class Line:
    """Points of one model and metric that are joined.

    Attributes:
        series: 0 for the model, 1 and on for baselines.
        dashed: Whether it is of the second metric.
        key: Of the metric.
        metric: Its label and format.
        rows: The settings, in order of cost.
        points: Cost and metric at each of them.
    """

    series: int
    dashed: bool
    key: str
    metric: Metric
    rows: tuple[Row, ...]
    points: tuple[tuple[float, float], ...]


def lines_of(result: EvalResult, cost: Cost) -> list[Line]:
    """What a panel draws: settings whose cost and metric are known."""
    lines = []
    for dashed, (key, metric) in enumerate(result.headline.items()):
        for series, kinds in product(result.models, _JOINED):
            rows = [
                row
                for row in sorted(result.rows, key=cost)
                if row.series == series
                and row.setting.kind in kinds
                and cost(row)
                and not math.isnan(row.metrics[key])
            ]
            if rows:
                points = tuple((cost(row), row.metrics[key]) for row in rows)
                lines.append(Line(series, bool(dashed), key, metric, tuple(rows), points))
    return lines


def draw_curve(path: Path, result: EvalResult) -> None:
    """Draws the headline metrics against mean tokens and GFLOPs per image as a PNG, atomically.

    Raises:
        UserError: If the file cannot be written.
    """
    with rc_context({**STYLE, "font.size": 10}):
        figure = new_figure(10, 4.6, dpi=150)
        panels = [
            (axes, lines_of(result, cost))
            for axes, (_, cost) in zip(figure.subplots(1, 2, sharey=True), COSTS, strict=True)
        ]
        for (axes, lines), (name, _) in zip(panels, COSTS, strict=True):
            _draw_panel(axes, lines, name)
        title = f"{result.heading} · {result.data}".removesuffix(" · ")
        figure.suptitle(shorten(title, 110), size=11)
        handles = [
            Line2D([], [], label=shorten(name, 48), lw=2, **look_of(series))
            for series, name in result.models.items()
        ]
        for dashed, metric in enumerate(result.headline.values()):
            handles.append(Line2D([], [], label=metric.name, color=INK, ls=_DASHES[dashed]))
        if any(row.setting.kind == "cascade" for row in result.rows):
            handles.append(Line2D([], [], label="cascades", color=INK, ls=_DOTS))
        handles.append(Line2D([], [], label="own setting", ls="none", **_RING))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)),
                      frameon=False, fontsize=9)  # fmt: skip
        figure.canvas.draw()  # settles the layout, on which the places of labels depend
        for axes, lines in panels:
            _label_settings(axes, lines)
        save_figure(figure, path)


def curve_svgs(result: EvalResult) -> list[Markup]:
    """The panels of `draw_curve` for the page; only those whose costs are known."""
    charts = []
    for name, cost in COSTS:
        lines = lines_of(result, cost)
        if lines:
            with rc_context(STYLE):
                figure = new_figure(4.4, 2.8)
                axes = figure.subplots()
                _draw_panel(axes, lines, name)
                figure.canvas.draw()
                _label_settings(axes, lines)
                metrics = " and ".join(dict.fromkeys(line.metric.name for line in lines))
                charts.append(to_svg(figure, f"{metrics} by {name}"))
    return charts


def reliability_svg(bins: Sequence[Bin]) -> Markup:
    """Accuracy by confidence for the page; a calibrated model's dots lie on the diagonal.

    Args:
        bins: Those that are not empty; a dot's area grows with the images in it.
    """
    most = max(one.images for one in bins)
    with rc_context(STYLE):
        figure = new_figure(4.4, 2.8)
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=SOFT, ls="--", lw=1)
        axes.plot([b.confidence for b in bins], [b.accuracy for b in bins], color=COLOURS[0])
        for one in bins:
            text = (
                f"{one.images:,} images: confidence {one.confidence:.1%}, right {one.accuracy:.1%}"
            )
            size = 3 + 10 * (one.images / most) ** 0.5
            axes.plot(one.confidence, one.accuracy, "o", ms=size, gid=TOOLTIP + text, alpha=0.75,
                      color=COLOURS[0], mew=0, clip_on=False)  # fmt: skip
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence (across) and accuracy (up)")
        axes.set(xticks=[0, 0.25, 0.5, 0.75, 1], yticks=[0, 0.5, 1])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        return to_svg(figure, "Accuracy by confidence")


def _draw_panel(axes: Axes, lines: Sequence[Line], name: str) -> None:
    """Draws lines over the cost `name`, without the names of settings."""
    axes.set_xlabel(name)
    if not lines:
        axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center")
        axes.set_xticks([])
        return
    for line in lines:
        look = look_of(line.series)
        dashes = _DOTS if line.rows[0].setting.kind == "cascade" else _DASHES[line.dashed]
        axes.plot(*zip(*line.points, strict=True), color=look["color"], ls=dashes)
        if line.dashed:
            look["mfc"] = PAPER
        for row, (x, y) in zip(line.rows, line.points, strict=True):
            value = f"{line.metric.name} {line.metric.format(y)}"
            text = f"{row.model} at {row.setting.label}: {value}, {x:,.4g} {name}"
            axes.plot(x, y, gid=TOOLTIP + text, **look)
            if row.is_own:
                axes.plot(x, y, **_RING)
    costs, values = zip(*(point for line in lines for point in line.points), strict=True)
    _scale_costs(axes, costs)
    _scale_values(axes, values, lines[0].metric)


def _scale_costs(axes: Axes, costs: Sequence[float]) -> None:
    """A positive axis with round ticks, logarithmic when the costs differ much."""
    least, most = min(costs), max(costs)
    if most / least >= _LOG_FROM:
        margin = (most / least) ** 0.08
        axes.set_xscale("log")
        axes.set_xlim(least / margin, most * margin)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most / least < 100 else (1,)))
    else:
        margin = 0.1 * (most - least) or 0.5 * most
        axes.set_xlim(max(0, least - margin), most + margin)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda tick, _: f"{tick / 1000:g}k" if tick >= 10_000 else f"{tick:g}")
    )


def _scale_values(axes: Axes, values: Sequence[float], metric: Metric) -> None:
    margin = max(0.15 * (max(values) - min(values)), 0.01)
    low, high = min(values) - margin, max(values) + margin
    if min(values) >= 0:
        low = max(0.0, low)
    ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
    top = min(high, 1.0) if metric.is_fraction else high
    ticks = [tick for tick in ticks if low - 1e-9 <= tick <= top + 1e-9]
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [f"{100 * t:.3g}%" if metric.is_fraction else f"{t:g}" for t in ticks])


def _label_settings(axes: Axes, lines: Sequence[Line]) -> None:
    """Names the settings at the points of the first metric, clear of each other and of all points.

    A label that finds no free side is left out; of several the one that crosses fewest lines is
    taken.
    """
    if not lines:
        return
    paths = [LinePath(axes.transData.transform(line.points)) for line in lines]
    corners = np.concatenate([path.vertices for path in paths])
    inside, taken = axes.get_window_extent(), list[Bbox]()
    scale = axes.figure.dpi / 72
    for line in lines:
        if line.dashed:
            continue
        for row, point in zip(line.rows, line.points, strict=True):
            found: list[tuple[int, Annotation, Bbox]] = []
            for x, y, ha, va in _SIDES:
                label = axes.annotate(
                    row.setting.label, point, (x, y), textcoords="offset points", ha=ha, va=va,
                    color=look_of(line.series)["color"], annotation_clip=False,
                )  # fmt: skip
                box = label.get_window_extent()
                if (
                    inside.contains(*box.min)
                    and inside.contains(*box.max)
                    and not box.padded(5 * scale).count_contains(corners)
                    and not any(box.overlaps(other) for other in taken)
                ):
                    crossed = sum(path.intersects_bbox(box, filled=False) for path in paths)
                    found.append((crossed, label, box))
                else:
                    label.remove()
            found.sort(key=lambda one: one[0])
            taken += [box for _, _, box in found[:1]]
            for _, label, _ in found[1:]:
                label.remove()
