"""Drawings inside the page: curves and the reliability diagram as SVG that follows its colours.

Colours are classes of the page's style sheet (``s0``, ``s1``, … for models), so that the drawings
change with a reader's light or dark scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from navit_clip.evaluation.calibration import Bin
from navit_clip.evaluation.report.axes import cost_axis, format_tick, place_labels, share_axis
from navit_clip.evaluation.report.curve import COSTS, Line, lines_of
from navit_clip.evaluation.results import EvalResult, Row

SERIES = 5  # colours and markers before they repeat, as in the style sheet
_WIDTH, _HEIGHT = 440, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 18, 14, 40
_PLOT = (_WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM)
_MARKERS = {
    0: "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",
    1: "M-3.7-3.7h7.4v7.4h-7.4Z",
    2: "M0-4.8 4.6 3.4h-9.2Z",
    3: "M0-5.2 5.2 0 0 5.2-5.2 0Z",
    4: "M0 4.8 4.6-3.4h-9.2Z",
}


def marker_svg(series: int, *, hollow: bool = False, at: tuple[float, float] = (0, 0)) -> Markup:
    """The mark of a model."""
    return Markup('<path class="mark s{}{}" transform="translate({:.1f} {:.1f})" d="{}"/>').format(
        series % SERIES, " hollow" if hollow else "", *at, _MARKERS[series % SERIES]
    )


def curve_svgs(result: EvalResult) -> list[Markup]:
    """Accuracy or recall against each cost; only those that are known."""
    drawings = []
    for name, cost in COSTS:
        lines = lines_of(result, cost)
        if lines:
            drawings.append(_curve(lines, name, cost))
    return drawings


def reliability_svg(bins: Sequence[Bin]) -> Markup:
    """Accuracy by confidence; a calibrated model's dots lie on the diagonal.

    Args:
        bins: That are not empty; a dot's area grows with the images in it.
    """
    most = max(b.images for b in bins)
    parts = _frame(
        "confidence (across) and accuracy (up)",
        [(t, f"{t:.0%}") for t in (0.0, 0.25, 0.5, 0.75, 1.0)],
        (0.0, 0.5, 1.0),
    )
    parts.append(
        Markup('<line class="ideal" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
            *_at(0, 0), *_at(1, 1)
        )
    )
    points = " ".join("{:.1f},{:.1f}".format(*_at(b.confidence, b.accuracy)) for b in bins)
    parts.append(Markup('<polyline class="line s0" points="{}"/>').format(points))
    for b in bins:
        parts.append(
            Markup('<circle class="dot s0" cx="{:.1f}" cy="{:.1f}" r="{:.1f}">{}</circle>').format(
                *_at(b.confidence, b.accuracy),
                2 + 7 * (b.images / most) ** 0.5,
                _tooltip(
                    f"{b.images:,} images: confidence {b.confidence:.1%}, right {b.accuracy:.1%}"
                ),
            )
        )
    return _drawing("Accuracy by confidence", parts)


def _curve(lines: Sequence[Line], name: str, cost: Callable[[Row], float | None]) -> Markup:
    across = cost_axis([cost(row) or 0.0 for line in lines for row in line.rows])
    up = share_axis([value for line in lines for value in line.values()])

    def points(line: Line) -> list[tuple[float, float]]:
        pairs = zip(line.rows, line.values(), strict=True)
        return [_at(across.place(cost(row) or 0.0), up.place(value)) for row, value in pairs]

    parts = _frame(
        name,
        [(across.place(tick), format_tick(tick)) for tick in across.ticks],
        [up.place(tick) for tick in up.ticks],
        [f"{100 * tick:.3g}%" for tick in up.ticks],
    )
    for line in lines:
        style = f"line s{line.series % SERIES}{' second' if line.second else ''}"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points(line))
        parts.append(Markup('<polyline class="{}" points="{}"/>').format(style, path))
    for line in lines:
        for row, value, at in zip(line.rows, line.values(), points(line), strict=True):
            if row.is_own:
                parts.append(
                    Markup('<circle class="own" cx="{:.1f}" cy="{:.1f}" r="9"/>').format(*at)
                )
            tooltip = (
                f"{row.model} at {row.setting.label}: {line.metric.name} "
                f"{line.metric.format(value)}, {cost(row):,.4g} {name}"
            )
            mark = marker_svg(line.series, hollow=line.second, at=at)
            parts.append(Markup("<g>{}{}</g>").format(_tooltip(tooltip), mark))
    parts += _setting_labels([line for line in lines if not line.second], lines, points)
    return _drawing(f"{' and '.join(dict.fromkeys(x.metric.name for x in lines))} by {name}", parts)


def _setting_labels(
    named: Sequence[Line],
    lines: Sequence[Line],
    points: Callable[[Line], list[tuple[float, float]]],
) -> list[Markup]:
    rows = [(row, line.series) for line in named for row in line.rows]
    centres = place_labels(
        [(x - _LEFT, y - _TOP) for line in named for x, y in points(line)],
        [row.setting.label for row, _ in rows],
        [[(x - _LEFT, y - _TOP) for x, y in points(line)] for line in lines],
        width=6.5,
        height=12,
        gap=10,
        bounds=_PLOT,
    )
    return [
        Markup('<text class="setting s{}" x="{:.1f}" y="{:.1f}">{}</text>').format(
            series % SERIES, centre[0] + _LEFT, centre[1] + _TOP + 4, row.setting.label
        )
        for centre, (row, series) in zip(centres, rows, strict=True)
        if centre is not None
    ]


def _frame(
    name: str,
    across: Sequence[tuple[float, str]],
    up: Sequence[float],
    up_labels: Sequence[str] | None = None,
) -> list[Markup]:
    """Grid and ticks, at places from 0 to 1, and the name of the x axis."""
    grid = Markup('<line class="grid" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
    tick = Markup('<text class="tick {}" x="{:.1f}" y="{:.1f}">{}</text>')
    parts = []
    for place, label in across:
        x, y = _at(place, 0)
        parts += [grid.format(x, _TOP, x, y), tick.format("x", x, y + 15, label)]
    for place, label in zip(up, up_labels or [f"{p:.0%}" for p in up], strict=True):
        x, y = _at(0, place)
        parts += [grid.format(x, y, _WIDTH - _RIGHT, y), tick.format("y", x - 6, y + 4, label)]
    parts.append(tick.format("x", _LEFT + _PLOT[0] / 2, _HEIGHT - 6, name))
    return parts


def _at(x: float, y: float) -> tuple[float, float]:
    """Pixels of a place from 0 to 1, y upwards."""
    return _LEFT + x * _PLOT[0], _TOP + (1 - y) * _PLOT[1]


def _tooltip(text: str) -> Markup:
    return Markup("<title>{}</title>").format(text)


def _drawing(title: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, title, Markup("").join(parts)
    )
