"""The page of one run or several: one file, nothing fetched, no scripts; all of it escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from navit_clip.errors import printable
from navit_clip.evaluation.report.html import page_environment, versions
from navit_clip.evaluation.results import Metric, percent
from navit_clip.files import write_output
from navit_clip.training.history import flat
from navit_clip.training.report.charts import Curve, curve_svg, histogram_svg
from navit_clip.training.report.read import Run
from navit_clip.training.sections import AXES, SECTIONS, is_fraction, section_of

_UNCOMPARED = {"run_dir", "log.wandb_name"}
_LONGEST = 200  # characters of a value of a configuration
_MOST_MEDIA = 600_000  # characters of a run's pictures and tables in the page


class Evaluated(NamedTuple):
    """A metric of evaluations during the training.

    Attributes:
        label: Of the evaluator and the metric.
        metric: How it is displayed.
        best: Of each run, the best value and its step; None without any.
        last: Of each run, the last value.
    """

    label: str
    metric: Metric
    best: list[tuple[float, float] | None]
    last: list[float]


def write_run_report(path: Path, runs: Sequence[Run], axis: str, command: str = "") -> None:
    """Writes runs as one HTML file, atomically; `axis`, of `AXES`, is what curves are drawn over.

    Raises:
        UserError: If the file cannot be written.
    """
    environment = page_environment(Path(__file__).parent)
    environment.filters["number"] = _number
    environment.filters["duration"] = _duration
    evaluated = _evaluated(runs)
    page = environment.get_template("run.html").render(
        runs=runs,
        axis=axis,
        sections=_sections(runs, axis, evaluated),
        evaluated=evaluated,
        differences=_differences(runs),
        media=[(run.name, _media(run), _histograms(run)) for run in runs if run.media],
        settings={name: _shown(value) for name, value in flat(runs[0].config).items()},
        command=command,
        versions=versions(),
    )
    write_output(path, page)


def _sections(
    runs: Sequence[Run], axis: str, evaluated: dict[str, Evaluated]
) -> list[tuple[str, list[Markup]]]:
    """Title and charts of each section that has any."""
    keys = dict.fromkeys(key for run in runs for key in run.keys)
    headline = [key for key, one in evaluated.items() if one.metric.is_headline]
    sections = []
    for section in SECTIONS:
        if section.name == "eval":
            own = headline
        else:
            own = [k for k in keys if section_of(k) == section and _is_drawn(k)]
            order = {key: i for i, key in enumerate(section.keys)}
            own.sort(key=lambda key: order.get(key, len(order)))
        charts = []
        for key in own:
            curves = [Curve(i, run.name, run.curve(key, axis)) for i, run in enumerate(runs)]
            curves = [curve for curve in curves if curve.points]
            if curves:
                marks = runs[0].changes if len(runs) == 1 and axis == "step" else ()
                as_percent = is_fraction(key)
                if key in evaluated:
                    as_percent = evaluated[key].metric.is_fraction
                charts.append(curve_svg(key, axis, curves, percent=as_percent, marks=tuple(marks)))
        if charts:
            sections.append((section.title, charts))
    return sections


def _is_drawn(key: str) -> bool:
    return key not in AXES and not key.endswith("/seconds")


def _evaluated(runs: Sequence[Run]) -> dict[str, Evaluated]:
    metrics: dict[str, tuple[str, Metric]] = {}
    for run in runs:
        for key, name, metric in run.evaluated():
            metrics.setdefault(key, (f"{name} {metric.name}".strip(), metric))
    found = {}
    for key, (label, metric) in metrics.items():
        sign = -1 if metric.lower_is_better else 1
        points = [run.curve(key, "step") for run in runs]
        best = [max(own, key=lambda p: sign * p[1], default=None) for own in points]
        last = [own[-1][1] if own else math.nan for own in points]
        found[key] = Evaluated(label, metric, best, last)
    return found


def _differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Values of the configurations that differ between the runs, by name."""
    configs = [flat(run.config) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    return {
        name: [_shown(config.get(name, "–")) for config in configs]
        for name in names
        if name not in _UNCOMPARED
        and any(config.get(name) != configs[0].get(name) for config in configs)
    }


def _media(run: Run) -> dict[str, dict[str, Any]]:
    """As many of a run's pictures and tables as have room."""
    shown, room = {}, _MOST_MEDIA
    for name, content in run.media.items():
        room -= len(str(content))
        if room >= 0 and "counts" not in content:
            shown[name] = content
    return shown


def _histograms(run: Run) -> list[Markup]:
    return [
        histogram_svg(name, content["counts"], content["edges"])
        for name, content in run.media.items()
        if "counts" in content
    ]


def _shown(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _number(value: float) -> str:
    """Four digits, thousands apart; a dash for NaN."""
    if math.isnan(value):
        return percent(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _duration(hours: float) -> str:
    for count, unit in ((hours, "h"), (60 * hours, "min")):
        if count >= 1:
            return f"{count:.3g}\N{NO-BREAK SPACE}{unit}"
    return f"{3600 * hours:.0f}\N{NO-BREAK SPACE}s"
