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
    statistics: Statistics,
    context_length: int,
    packing: PackingEfficiency | None,
    tokenised: bool,
) -> dict[str, Any]:
    """All of it as plain JSON values.

    Args:
        statistics: Of the samples.
        context_length: Most text tokens, at which captions are cut.
        packing: How full batches are, None if no configuration was given.
        tokenised: Whether a tokenizer was given, so that tokens mean something.
    """
    columns = dict(statistics.columns)
    if "image_bytes" in columns:
        columns["image_kb"] = columns.pop("image_bytes") / 1000
    left_out = set() if tokenised else {"text_tokens"}
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
            for name, column in columns.items()
            if len(column) and name not in left_out
        },
    }
    if tokenised and len(columns.get("text_tokens", ())):
        found["captions_cut"] = float((columns["text_tokens"] > context_length).mean())
        found["context_length"] = context_length
    if packing:
        found["packing"] = packing_to_json(packing.batches)
    return found


def packing_to_json(batches: Sequence[BatchCounts]) -> dict[str, Any]:
    """How full batches are: means, and their number of pairs with its coefficient of variation."""
    pairs = np.array([counts.examples for counts in batches])
    found: dict[str, Any] = {
        "batches": len(batches),
        "pairs": {"min": int(pairs.min()), "mean": float(pairs.mean()), "max": int(pairs.max())},
        "pairs_cv": float(pairs.std() / pairs.mean()),
    }
    before = [counts.streams["image"].tokens_before_drop for counts in batches]
    found["image_tokens_before_drop"] = float(np.mean(before))
    for name in ("image", "text"):
        budget = batches[0].streams[name].budget
        tokens = float(np.mean([counts.streams[name].tokens for counts in batches]))
        found[f"{name}_budget"] = budget
        found[f"{name}_tokens"] = tokens
        found[f"{name}_padding"] = 1 - tokens / budget
    return found


def to_text(found: dict[str, Any]) -> str:
    """The same as lines of aligned columns, see `to_json`."""
    lines = [_heading("samples"), *_counts(found)]
    distributions = found["distributions"]
    for title, rows in _SECTIONS.items():
        present = [row for row in rows if row[0] in distributions]
        if present:
            lines += ["", _heading(title, list(_HEADER.values()))]
            lines += [_row(label, distributions[name], digits) for name, label, digits in present]
        if title == "captions" and "captions_cut" in found:
            cut = f"cut at {found['context_length']} tokens"
            lines.append(_line(cut, f"{found['captions_cut']:.1%}"))
    if "packing" in found:
        lines += ["", *_packing_lines(found["packing"])]
    return "\n".join(lines)


def _counts(found: dict[str, Any]) -> list[str]:
    samples, usable = found["samples"], found["usable"]
    lines = [
        _line("shards", f"{found['shards']:,}", f"{found['bytes'] / 1e6:,.1f} MB in files"),
        _line("samples", f"{samples:,}"),
        _line("usable", f"{usable:,}", f"{usable / max(1, samples):.1%}"),
    ]
    formats = ", ".join(f"{name} {count:,}" for name, count in found["formats"].items())
    if formats:
        lines[-1] += f"  ({formats})"
    skipped = found["skipped"]
    lines.append(_line("skipped", f"{sum(skipped.values()):,}"))
    lines += [_line(f"  {reason}", f"{count:,}") for reason, count in skipped.items()]
    shown = found["skip_log"][:5]
    lines += [f"    {line}" for line in shown]
    more = sum(skipped.values()) - len(shown)
    return [*lines, f"    … {more:,} more"] if more else lines


def _packing_lines(packing: dict[str, Any]) -> list[str]:
    pairs = packing["pairs"]
    before, after = packing["image_tokens_before_drop"], packing["image_tokens"]
    return [
        _heading(f"packing, mean of {packing['batches']} batches"),
        _line(
            "pairs per batch",
            f"{pairs['mean']:,.1f}",
            f"{pairs['min']:,} to {pairs['max']:,}, coefficient of variation "
            f"{packing['pairs_cv']:.3f}",
        ),
        _line("image tokens before drop", f"{before:,.0f}"),
        _line(
            "image tokens",
            f"{after:,.0f}",
            f"of {packing['image_budget']:,}, {packing['image_padding']:.2%} padding, "
            f"{1 - after / before:.1%} dropped",
        ),
        _line(
            "text tokens",
            f"{packing['text_tokens']:,.0f}",
            f"of {packing['text_budget']:,}, {packing['text_padding']:.2%} padding",
        ),
    ]


def _heading(title: str, columns: Sequence[str] = ()) -> str:
    return (f"{title.upper():<26}" + "".join(f"{column:>10}" for column in columns)).rstrip()


def _line(label: str, value: str, note: str = "") -> str:
    return f"{label:<26}{value:>10}  {note}".rstrip()


def _row(label: str, values: dict[str, float], digits: int) -> str:
    line = f"{label:<26}"
    for name in _HEADER:
        # A mean of whole numbers is not one.
        decimals = 1 if name == "mean" and digits == 0 else digits
        line += f"{values[name]:>10,.{decimals}f}"
    return line
