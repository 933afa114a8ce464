"""Accuracy against cost: the points, and a PNG of them.

Two panels, mean tokens and GFLOPs per image. Colour and marker say the model, the line's dashes
the metric, a label the setting, a ring the model's own. Settings at native aspect ratio are joined
in order of cost, squares apart from them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from navit_clip.evaluation.report.axes import cost_axis, format_tick, place_labels, share_axis
from navit_clip.evaluation.results import EvalResult, Metric, Row
from navit_clip.files import write_output

COSTS: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
    ("mean tokens per image", lambda row: row.mean_tokens),
    ("GFLOPs per image", lambda row: row.gflops),
)
_COLOURS = ("#2563eb", "#c2570c", "#0f8a6a", "#9333a8", "#6b7280")
_MARKERS = ("o", "s", "^", "D", "v")
_INK, _GRID = "#1f2328", "#e3e6ea"


@dataclass(frozen=True)
class Line:
    """Points of one model and metric that are joined.

    Attributes:
        series: 0 for the model, 1 and on for baselines.
        second: Whether it is the second of the two metrics, drawn dashed.
        key: Of the metric.
        metric: How it is shown.
        rows: The settings, in order of cost.
    """

    series: int
    second: bool
    key: str
    metric: Metric
    rows: tuple[Row, ...]

    def values(self) -> list[float]:
        """The metric at each setting."""
        return [row.metrics[self.key] for row in self.rows]


def lines_of(result: EvalResult, cost: Callable[[Row], float | None]) -> list[Line]:
    """What a panel draws: settings whose cost and metric are known."""
    lines = []
    for second, (key, metric) in enumerate(result.headline.items()):
        for series in result.models:
            for square in (False, True):
                rows = [
                    row
                    for row in result.rows
                    if row.series == series
                    and (row.setting.kind == "square") == square
                    and cost(row)
                    and not math.isnan(row.metrics[key])
                ]
                rows.sort(key=lambda row: cost(row) or 0.0)
                if rows:
                    lines.append(Line(series, bool(second), key, metric, tuple(rows)))
    return lines


def draw_curve(path: Path, result: EvalResult) -> None:
    """Draws the headline metrics against mean tokens and against GFLOPs per image.

    Args:
        path: PNG file to write; it appears whole, folders are made.
        result: What is drawn.

    Raises:
        UserError: If the file cannot be written.
    """
    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    drawn = [_draw_panel(axes, result, *cost) for axes, cost in zip(panels, COSTS, strict=True)]
    title = f"{result.heading} · {result.data}".removesuffix(" · ")
    figure.suptitle(_shorten(title, 110), size=11)
    handles = [
        Line2D([], [], color=_colour(s), marker=_marker(s), lw=2, label=_shorten(name, 48))
        for s, name in result.models.items()
    ]
    for second, metric in enumerate(result.headline.values()):
        style = "--" if second else "-"
        handles.append(Line2D([], [], color=_INK, lw=1.5, ls=style, label=metric.name))
    ring = {"marker": "o", "mfc": "none", "mec": _INK, "ms": 12, "ls": "none"}
    handles.append(Line2D([], [], label="own setting", **ring))  # type: ignore[arg-type]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)),
                  frameon=False, fontsize=9)  # fmt: skip
    canvas.draw()  # settles the layout, so that labels know where the points are
    for axes, lines, (_, cost) in zip(panels, drawn, COSTS, strict=True):
        _label_settings(axes, lines, cost)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a picture as PNG; it appears whole, folders are made.

    Raises:
        UserError: If it cannot be written.
    """
    file = io.BytesIO()
    figure.savefig(file, format="png")
    write_output(path, file.getvalue())


def _draw_panel(
    axes: Axes, result: EvalResult, name: str, cost: Callable[[Row], float | None]
) -> list[Line]:
    lines = lines_of(result, cost)
    axes.set_xlabel(name, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    axes.tick_params(color=_GRID, labelcolor=_INK)
    axes.grid(color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    if not lines:
        axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center", color=_INK)
        axes.set_xticks([])
        return lines
    for line in lines:
        xs, colour = [cost(row) or 0.0 for row in line.rows], _colour(line.series)
        axes.plot(
            xs, line.values(), color=colour, lw=2, ls="--" if line.second else "-",
            marker=_marker(line.series), ms=6, mfc="white" if line.second else colour, mew=1.5,
        )  # fmt: skip
        for x, y, row in zip(xs, line.values(), line.rows, strict=True):
            if row.is_own:
                axes.plot(x, y, "o", mfc="none", mec=_INK, ms=13, mew=1)
    across = cost_axis([cost(row) or 0.0 for line in lines for row in line.rows])
    axes.set_xscale("log" if across.log else "linear")
    axes.set_xlim(across.low, across.high)
    axes.set_xticks(across.ticks, [format_tick(tick) for tick in across.ticks])
    axes.minorticks_off()
    up = share_axis([value for line in lines for value in line.values()])
    axes.set_ylim(up.low, up.high)
    axes.set_yticks(up.ticks, [f"{tick:.3g}%" for tick in (100 * t for t in up.ticks)])
    return lines


def _label_settings(axes: Axes, lines: Sequence[Line], cost: Callable[[Row], float | None]) -> None:
    """Names the settings at the points of the first metric."""
    box = axes.get_window_extent()

    def pixel(line: Line) -> list[tuple[float, float]]:
        data = [(cost(r) or 0.0, v) for r, v in zip(line.rows, line.values(), strict=True)]
        return [(x - box.x0, box.y1 - y) for x, y in axes.transData.transform(data)] if data else []

    named = [line for line in lines if not line.second]
    points = [point for line in named for point in pixel(line)]
    rows = [(row, line.series) for line in named for row in line.rows]
    centres = place_labels(
        points,
        [row.setting.label for row, _ in rows],
        [pixel(line) for line in lines],
        width=11,
        height=18,
        gap=17,
        bounds=(box.width, box.height),
    )
    for centre, (row, series) in zip(centres, rows, strict=True):
        if centre is not None:
            place = axes.transData.inverted().transform((box.x0 + centre[0], box.y1 - centre[1]))
            axes.text(
                place[0],
                place[1],
                row.setting.label,
                color=_colour(series),
                size=9,
                ha="center",
                va="center",
            )


def _colour(series: int) -> str:
    return _COLOURS[series % len(_COLOURS)]


def _marker(series: int) -> str:
    return _MARKERS[series % len(_MARKERS)]


def _shorten(text: str, most: int) -> str:
    """Keeps the end, which tells paths apart."""
    return text if len(text) <= most else "…" + text[1 - most :]
