"""The page: one file, nothing fetched, no scripts; everything in it that came from data escaped."""

from __future__ import annotations

import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from navit_clip.evaluation.report.samples import Shown
from navit_clip.evaluation.report.svg import SERIES, curve_svgs, marker_svg, reliability_svg
from navit_clip.evaluation.results import (
    DIRECTIONS,
    MAIN,
    Group,
    Result,
    Row,
    format_figure,
    read_result,
)
from navit_clip.files import write_output

_PACKAGES = ("navit-clip", "torch", "open_clip_torch", "pillow")
_GROUPS = (
    ("aspect ratio (long side : short side)", "aspect"),
    ("size (side in pixels of a square of the same area)", "size"),
)


def write_report(
    path: Path, result: dict[str, Any], shown: Shown | None = None, *, command: str = ""
) -> None:
    """Writes one HTML file that shows a result to people.

    Args:
        path: File to write; it appears whole, folders are made.
        result: What a harness wrote.
        shown: Sample images and captions; None leaves these parts out.
        command: The command line that made the result, for the foot.

    Raises:
        UserError: If the result is damaged or the file cannot be written.
    """
    read, shown = read_result(result), shown or Shown()
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = list(dict.fromkeys(name for row in read.rows for name in row.figures))
    ways = Counter(
        way for name in figures for short, way in DIRECTIONS.items() if name.startswith(short)
    )
    environment.filters["figure"] = lambda value, name="": format_figure(name, value)
    environment.filters["short"] = _shorten
    environment.filters["span"] = _span
    page = environment.get_template("page.html").render(
        result=read,
        shown=shown,
        main=MAIN[read.kind],
        headline=_headline(read),
        names={row.series: row.model for row in read.rows},
        figures=figures,
        ways=list(ways.items()),
        curves=curve_svgs(read),
        reliability=reliability_svg(shown.calibration) if shown.calibration else None,
        groups=_group_tables(read),
        worst=sorted(read.own.per_class.items(), key=lambda item: (item[1], item[0])),
        marker=marker_svg,
        colours=SERIES,
        command=command,
        versions=_versions(),
    )
    write_output(path, page)


def _headline(result: Result) -> list[tuple[str, str]]:
    """Names and values of the figures at the top."""
    own = result.own.figures
    return [(name, format_figure(name, value)) for name, value in own.items()]


def _group_tables(
    result: Result,
) -> list[tuple[str, str, list[Row], list[tuple[Group, list[float | None]]]]]:
    """A table per grouping and figure: settings as columns, groups as rows."""
    tables = []
    # One figure of classification is enough here; retrieval has two ways.
    for figure in MAIN[result.kind][: 1 if result.kind == "zeroshot" else 2]:
        for title, attribute in _GROUPS:
            rows = [row for row in result.rows if getattr(row, attribute)]
            labels: dict[str, Group] = {}
            for row in rows:
                labels |= {group.label: group for group in getattr(row, attribute)}
            cells = []
            for label, group in labels.items():
                values = []
                for row in rows:
                    found = [g for g in getattr(row, attribute) if g.label == label]
                    values.append(found[0].figures.get(figure) if found else None)
                cells.append((group, values))
            if cells:
                tables.append((figure, title, rows, cells))
    return tables


def _versions() -> str:
    versions = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(versions)


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _span(label: str) -> str:
    """A group's label as typography has it: ``1.1–1.4``, ``≥640``."""
    return label.replace(">=", "≥").replace("-", "–")
