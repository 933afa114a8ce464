"""Statistics and packing efficiency of shards, as a JSON object and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from navit_clip.packed.batch import BatchCounts
from navit_clip.tools.inspect.packing_efficiency import PackingEfficiency
from navit_clip.tools.inspect.statistics import Statistics

_QUANTILES = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
# Columns of the table and their headings.
_HEADER = {"min": "min", "p5": "5%", "median": "median", "mean": "mean", "p95": "95%", "max": "max"}

# Parts of the table: columns of the statistics, labels, decimals.
_SECTIONS = {
    "images": (
        ("width", "width, px", 0),
        ("height", "height, px", 0),
        ("side", "side √(w·h), px", 0),
        ("aspect", "aspect ratio w/h", 2),
        ("image_kb", "file, kB", 1),
    ),
    "captions": (
        ("captions", "captions per image", 0),
        ("characters", "characters", 0),
        ("words", "words", 0),
        ("text_tokens", "tokens", 0),
    ),
    "as configured": (("tokens", "image tokens", 0), ("kept_tokens", "after token drop", 0)),
}


def summarise(values: np.ndarray) -> dict[str, float]:
    """Minimum, quantiles, mean and maximum of values, at least one."""
    found = {name: float(np.quantile(values, quantile)) for name, quantile in _QUANTILES.items()}
    return {**found, "mean": float(values.mean())}


def to_json(
    statistics: Statistics, packing: PackingEfficiency | None, context_length: int | None
) -> dict[str, Any]:
    """All of it as plain JSON values.

    Args:
        statistics: Of the samples.
        packing: How full batches are, None if no configuration was given.
        context_length: Most text tokens, at which captions are cut; None if no tokenizer was given
            and tokens mean nothing.
    """
    left_out = {"unknown"} if context_length else {"unknown", "text_tokens"}
    left_out |= set() if packing else {"tokens", "kept_tokens"}
    found: dict[str, Any] = {
        "shards": statistics.shards,
        "samples": statistics.samples,
        "usable": statistics.usable,
        "bytes": statistics.bytes,
        "formats": dict(statistics.formats.most_common()),
        "skipped": dict(statistics.skipped.most_common()),
        "skip_log": statistics.skip_log,
        "distributions": {
            name: summarise(column)
            for name, column in statistics.columns.items()
            if len(column) and name not in left_out
        },
    }
    if context_length and "text_tokens" in found["distributions"]:
        cut = statistics.columns["text_tokens"] > context_length
        found["captions_cut"] = float(cut.mean())
        found["context_length"] = context_length
        unknown = statistics.columns.get("unknown", np.zeros(0))
        # Of a tokenizer that knows every text there is nothing to count.
        if len(unknown):
            found["unknown"] = float(unknown.sum() / statistics.columns["text_tokens"].sum())
            found["captions_with_unknown"] = float((unknown > 0).mean())
    if packing:
        found["packing"] = packing_to_json(packing.batches)
    return found


def packing_to_json(batches: Sequence[BatchCounts]) -> dict[str, Any]:
    """How full batches are: means, and their number of examples, how it varies too."""
    examples = np.array([counts.examples for counts in batches])
    spread = {"min": int(examples.min()), "max": int(examples.max())}
    found: dict[str, Any] = {
        "batches": len(batches),
        "examples": {"mean": float(examples.mean()), **spread},
        "examples_cv": float(examples.std() / examples.mean()),
    }
    before = [counts.streams["image"].tokens_before_drop for counts in batches]
    found["image_tokens_before_drop"] = float(np.mean(before))
    for name, counts in batches[0].streams.items():
        budget = counts.budget
        tokens = float(np.mean([counts.streams[name].tokens for counts in batches]))
        found[f"{name}_budget"] = budget
        found[f"{name}_tokens"] = tokens
        found[f"{name}_padding"] = 1 - tokens / budget
    return found


def to_text(found: dict[str, Any]) -> str:
    """The same as lines of aligned columns, see `to_json`."""
    lines = _counts(found)
    distributions = found["distributions"]
    for title, rows in _SECTIONS.items():
        present = [row for row in rows if row[0] in distributions]
        if present:
            lines += ["", _line(title.upper(), *_HEADER.values())]
        for name, label, digits in present:
            # A mean of whole numbers is not one.
            decimals = {"mean": max(1, digits)}
            cells = (f"{distributions[name][c]:,.{decimals.get(c, digits)}f}" for c in _HEADER)
            lines.append(_line(label, *cells))
        if title == "captions" and "captions_cut" in found:
            cut = f"cut at {found['context_length']} tokens"
            lines.append(_line(cut, f"{found['captions_cut']:.1%}"))
        if title == "captions" and "unknown" in found:
            note = f"in {found['captions_with_unknown']:.1%} of captions"
            if found["unknown"]:
                note += ", alike to the model: train_tokenizer --byte-fallback"
            lines.append(_line("unknown tokens", f"{found['unknown']:.2%}", note=note))
    if "packing" in found:
        lines += ["", *_packing_lines(found["packing"])]
    return "\n".join(lines)


def _counts(found: dict[str, Any]) -> list[str]:
    usable, skipped = found["usable"], found["skipped"]
    note = f"{usable / max(1, found['samples']):.1%}"
    if found["formats"]:
        counts = ", ".join(f"{name} {count:,}" for name, count in found["formats"].items())
        note += f"  ({counts})"
    lines = [
        "SAMPLES",
        _line("shards", f"{found['shards']:,}", note=f"{found['bytes'] / 1e6:,.1f} MB in files"),
        _line("samples", f"{found['samples']:,}"),
        _line("usable", f"{usable:,}", note=note),
        _line("skipped", f"{sum(skipped.values()):,}"),
        *(_line(f"  {reason}", f"{count:,}") for reason, count in skipped.items()),
        *(f"    {line}" for line in found["skip_log"][:5]),
    ]
    more = sum(skipped.values()) - len(found["skip_log"][:5])
    return [*lines, f"    … {more:,} more"] if more else lines


def _packing_lines(packing: dict[str, Any]) -> list[str]:
    examples, cv = packing["examples"], packing["examples_cv"]
    spread = f"{examples['min']:,} to {examples['max']:,}, coefficient of variation {cv:.3f}"
    before = packing["image_tokens_before_drop"]
    lines = [
        f"PACKING, MEAN OF {packing['batches']} BATCHES",
        _line("examples per batch", f"{examples['mean']:,.1f}", note=spread),
        _line("image tokens before drop", f"{before:,.0f}"),
    ]
    streams = [key.removesuffix("_budget") for key in packing if key.endswith("_budget")]
    for name in streams:
        tokens = packing[f"{name}_tokens"]
        note = f"of {packing[f'{name}_budget']:,}, {packing[f'{name}_padding']:.2%} padding"
        if name == "image":
            note += f", {1 - tokens / before:.1%} dropped"
        lines.append(_line(f"{name} tokens", f"{tokens:,.0f}", note=note))
    return lines


def _line(label: str, *cells: str, note: str = "") -> str:
    return (f"{label:<26}" + "".join(f"{cell:>10}" for cell in cells) + f"  {note}").rstrip()
