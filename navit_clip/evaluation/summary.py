"""What the harnesses found, as tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from navit_clip.errors import UserError
from navit_clip.evaluation.results import DIRECTIONS, Result, Row, format_figure, read_result

_COLUMNS = 100  # of a terminal; the model's name gives way, but not below
_NAME = 12
_IN_TRAINING = "-step-"  # the trainer's own, of which metrics.jsonl is the summary


def zeroshot_table(result: dict[str, Any]) -> str:
    """Accuracy against tokens and cost, one row per setting, baselines below.

    Raises:
        UserError: If the result is damaged.
    """
    return _table(read_result(result))


def retrieval_table(result: dict[str, Any]) -> str:
    """Recall against tokens and cost, one row per setting, baselines below.

    Raises:
        UserError: If the result is damaged.
    """
    return _table(read_result(result))


def _table(result: Result, file: str = "") -> str:
    names = list(dict.fromkeys(name for row in result.rows for name in row.figures))
    short = [name.split(" ", 1)[1] if name.split(" ")[0] in DIRECTIONS else name for name in names]
    short = [name.replace("median", "med") for name in short]
    rows = [["setting", "tokens", "GFLOPs", *short], *(_cells(row, names) for row in result.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("─" * width for width in widths))
    above = _over(names, widths)
    if result.has_baselines:
        most = max(_NAME, _COLUMNS - 2 - len(lines[0]))
        models = [_shorten(row.model, most) for row in result.rows]
        width = max(len(model) for model in [*models, "model"])
        first = ["model", "─" * width, *models]
        lines = [f"{c.ljust(width)}  {line}" for c, line in zip(first, lines, strict=True)]
        above = [" " * (width + 2) + line for line in above]
    foot = ["* the model's own setting"]
    if result.skipped:
        foot.append("skipped: " + ", ".join(f"{why} {n}" for why, n in result.skipped.items()))
    return "\n".join([result.title + (f" ({file})" if file else ""), *above, *lines, *foot])


def _over(names: Sequence[str], widths: Sequence[int]) -> list[str]:
    """A line above the headings of retrieval that says the direction."""
    if not any(name.split(" ")[0] in DIRECTIONS for name in names):
        return []
    line, at = "", sum(widths[:3]) + 3 * 2
    for name, width in zip(names, widths[3:], strict=True):
        way = DIRECTIONS.get(name.split(" ")[0], "")
        if way and way not in line:
            line = line.ljust(at) + way
        at += width + 2
    return [line]


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    gflops = "–" if row.gflops is None else f"{row.gflops:.3g}"
    figures = [format_figure(name, row.figures.get(name)) for name in names]
    return [f"{row.label} *" if row.own else row.label, f"{row.tokens:.1f}", gflops, *figures]


def _shorten(name: str, most: int) -> str:
    """Keeps the end, which tells paths apart."""
    return name if len(name) <= most else "…" + name[1 - most :]


def summarise(directory: Path) -> str:
    """All results in a directory of evaluations, and the reports and pictures there.

    Raises:
        UserError: If there is none, or one is damaged.
    """
    parts = []
    for pattern in ("zeroshot*.json", "retrieval*.json"):
        for path in sorted(directory.glob(pattern)):
            if _IN_TRAINING in path.name:
                continue
            try:
                result = read_result(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                raise UserError(f"{path} is damaged: {error}; evaluate again") from error
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
            parts.append(_table(result, path.name))
    if not parts:
        raise UserError(f"no zeroshot.json or retrieval.json in {directory}: evaluate first")
    files = [f"Report: {path}" for path in sorted(directory.glob("*.html"))]
    files += [f"Picture: {path}" for path in sorted(directory.glob("*.png"))]
    return "\n\n".join([*parts, *(["\n".join(files)] if files else [])])
