"""What the harnesses found, as one table for the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from navit_clip.errors import UserError


def zeroshot_table(result: dict[str, Any]) -> str:
    """Accuracy against tokens and cost."""
    rows = [["max tokens", "mean tokens", "GFLOPs/image", "top-1", "top-5"]]
    for entry in result["budgets"]:
        mark = " *" if entry["max_tokens"] == result["max_tokens"] else ""
        rows.append(
            [
                f"{entry['max_tokens']}{mark}",
                f"{entry['mean_tokens']:.1f}",
                f"{entry['flops_per_image'] / 1e9:.3f}",
                f"{entry['top1']:.1%}",
                f"{entry['top5']:.1%}",
            ]
        )
    title = f"Zero-shot: {result['images']:,} images, {result['classes']} classes"
    return _table(title, rows, result)


def retrieval_table(result: dict[str, Any]) -> str:
    """Recall against tokens."""
    ks = list(result["image_to_text"])
    rows = [["max tokens", "mean tokens", *(f"I→T {k}" for k in ks), *(f"T→I {k}" for k in ks)]]
    for entry in result["budgets"]:
        mark = " *" if entry["max_tokens"] == result["max_tokens"] else ""
        recalls = [entry[way][k] for way in ("image_to_text", "text_to_image") for k in ks]
        rows.append(
            [
                f"{entry['max_tokens']}{mark}",
                f"{entry['mean_tokens']:.1f}",
                *(f"{value:.1%}" for value in recalls),
            ]
        )
    title = f"Retrieval: {result['images']:,} images, {result['captions']:,} captions"
    return _table(title, rows, result)


def _table(title: str, rows: list[list[str]], result: dict[str, Any]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    rule = "  ".join("─" * w for w in widths)
    skipped = ", ".join(f"{reason} {n}" for reason, n in result["skipped"].items())
    foot = ["* the model's own budget"] + ([f"skipped: {skipped}"] if skipped else [])
    return "\n".join([title, lines[0], rule, *lines[1:], *foot])


def summarise(directory: Path) -> str:
    """All results in a directory of evaluations, and the pictures there.

    Raises:
        UserError: If there is none.
    """
    parts = []
    for name, table in (("zeroshot", zeroshot_table), ("retrieval", retrieval_table)):
        path = directory / f"{name}.json"
        if path.is_file():
            try:
                parts.append(table(json.loads(path.read_text())))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is damaged: {error}; evaluate again") from error
    if not parts:
        raise UserError(f"no zeroshot.json or retrieval.json in {directory}: evaluate first")
    parts += [f"Picture: {path}" for path in sorted(directory.glob("*.png"))]
    return "\n\n".join(parts)
