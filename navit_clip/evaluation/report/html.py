"""The page: one file, nothing fetched, no scripts; everything in it that came from data escaped."""

from __future__ import annotations

import platform
from collections import Counter
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from navit_clip.evaluation.report.charts import curve_svgs, reliability_svg
from navit_clip.evaluation.report.drawing import COLOURS
from navit_clip.evaluation.report.samples import ReportSamples
from navit_clip.evaluation.results import BREAKDOWNS, EvalResult, Group, Metric, Row, percent
from navit_clip.files import write_output

_PACKAGES = ("navit-clip", "torch", "open_clip_torch", "pillow")


def write_report(
    path: Path, result: EvalResult, samples: ReportSamples, *, command: str = ""
) -> None:
    """Writes a result and the command that made it as one HTML file, atomically.

    Raises:
        UserError: If the file cannot be written.
    """
    environment = page_environment()
    metrics = result.measured
    groups = Counter(metric.group for metric in metrics.values() if metric.group)
    page = environment.get_template("page.html").render(
        result=result,
        samples=samples,
        metrics=metrics,
        metric_groups=groups,
        curves=curve_svgs(result),
        reliability=reliability_svg(samples.calibration) if samples.calibration else None,
        breakdowns=_breakdowns(result),
        worst=sorted(result.own.per_class.items(), key=lambda item: (item[1], item[0])),
        command=command,
        versions=versions(),
    )
    write_output(path, page)


def page_environment(*folders: Path) -> Environment:
    """Templates of these folders, and the style sheet and template of this one."""
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.globals["colours"] = len(COLOURS)
    return environment


def _breakdowns(
    result: EvalResult,
) -> list[tuple[Metric, str, list[Row], list[tuple[Group, list[float | None]]]]]:
    """A table per metric and grouping: settings as columns, groups as rows."""
    tables = []
    # The first headline metric of each group of metrics is enough here.
    first: dict[str, tuple[str, Metric]] = {}
    for key, metric in result.headline.items():
        first.setdefault(metric.group, (key, metric))
    for key, metric in first.values():
        for name, title in BREAKDOWNS.items():
            rows = [row for row in result.rows if row.breakdowns.get(name)]
            by_label = [{g.label: g for g in row.breakdowns[name]} for row in rows]
            labels = {label: group for groups in by_label for label, group in groups.items()}
            cells = []
            for label, group in labels.items():
                found = [groups.get(label) for groups in by_label]
                cells.append((group, [one.metrics.get(key) if one else None for one in found]))
            if cells:
                tables.append((metric, title, rows, cells))
    return tables


def versions() -> str:
    """Of what a page was made with."""
    found = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)
