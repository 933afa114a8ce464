"""Results as tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from navit_clip.errors import UserError
from navit_clip.evaluation.registry import EVALUATORS, read_result
from navit_clip.evaluation.results import EvalResult, Metric, Row, percent, shorten
from navit_clip.files import reading

_COLUMNS = 100  # of a terminal; the model's name gives way, but not below
_NAME = 12
_STEP = "step"  # a key in results of a training run, of which metrics.jsonl is the summary


def table(result: EvalResult, file: str = "") -> str:
    """Metrics against tokens and cost, one row per setting, baselines below; `file` is named."""
    metrics = result.measured
    names = ["setting", "tokens", "GFLOPs", *(metric.label for metric in metrics.values())]
    rows = [names, *(_cells(row, metrics) for row in result.rows), *_notes(result)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("─" * width for width in widths))
    above = _group_headings(metrics, widths)
    if result.has_baselines:
        most = max(_NAME, _COLUMNS - 2 - len(lines[0]))
        models = [shorten(row.model, most) for row in result.rows]
        width = max(len(model) for model in [*models, "model"])
        first = ["model", "─" * width, *models]
        named = zip_longest(first, lines, fillvalue="")
        lines = [f"{c.ljust(width)}  {line}" for c, line in named]
        above = [" " * (width + 2) + line for line in above]
    foot = ["* the model's own setting; 95%: the widest interval of the column"]
    if result.skipped:
        foot.append("skipped: " + ", ".join(f"{why} {n}" for why, n in result.skipped.items()))
    return "\n".join([result.heading + (f" ({file})" if file else ""), *above, *lines, *foot])


def _group_headings(metrics: Mapping[str, Metric], widths: Sequence[int]) -> list[str]:
    """A line above the headings of the columns that names groups of metrics, if there are any."""
    line, at = "", sum(widths[:3]) + 3 * 2
    for metric, width in zip(metrics.values(), widths[3:], strict=True):
        if metric.group not in line:
            line = line.ljust(at) + metric.group
        at += width + 2
    return [line] if line else []


def _cells(row: Row, metrics: Mapping[str, Metric]) -> list[str]:
    gflops = "–" if row.gflops is None else f"{row.gflops:.3g}"
    values = [metric.format(row.metrics.get(key)) for key, metric in metrics.items()]
    label = f"{row.setting.label} *" if row.is_own else row.setting.label
    return [label, f"{row.mean_tokens:.1f}", gflops, *values]


def _notes(result: EvalResult) -> list[list[str]]:
    """Rows for what guessing gives, and how far metrics are to be trusted."""
    chance = [percent(result.chance(key)) for key in result.measured]
    margins = [result.margin(key) for key in result.measured]
    trusted = ["–" if margin is None else f"±{percent(margin)}" for margin in margins]
    return [["chance", "", "", *chance], ["95%", "", "", *trusted]]


def summarise(directory: Path) -> str:
    """All results in a directory of evaluations, whatever their names, and what else is there.

    Raises:
        UserError: If there is none.
    """
    found: list[tuple[int, str]] = []
    left_out, in_training = [], 0
    order = list(EVALUATORS)
    for path in sorted(directory.glob("*.json")):
        try:
            with reading(path.name, ValueError, UserError):
                content = json.loads(path.read_text(encoding="utf-8"))
                result = read_result(content)
        except UserError as error:
            left_out.append(f"Not a result: {error}")
            continue
        if _STEP in content:
            in_training += 1
        else:
            found.append((order.index(result.kind), table(result, path.name)))
    if in_training:
        left_out.append(f"Made during training, see metrics.jsonl: {in_training}")
    if not found:
        reasons = f" ({'; '.join(left_out)})" if left_out else ""
        raise UserError(f"no result of an evaluation in {directory}{reasons}: evaluate first")
    parts = [text for _, text in sorted(found, key=lambda pair: pair[0])]
    files = [f"Report: {path}" for path in sorted(directory.glob("*.html"))]
    files += [f"Picture: {path}" for path in sorted(directory.glob("*.png"))]
    files += left_out
    return "\n\n".join([*parts, *(["\n".join(files)] if files else [])])
