"""Draws what the benchmarks found: ``python -m benchmarks.plot``, the last step of ``make bench``.

Reads the JSON files of `benchmarks.step`, `benchmarks.towers` and `benchmarks.sweep` that are
there. First row: pairs per second of each way as bars, one panel a part (step, towers), with how
many times as fast this project is. Second row: milliseconds per GFLOP along the sweep's curves,
where level is linear.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from benchmarks.contest import Entry
from benchmarks.measure import RESULTS, read_results
from benchmarks.peers import WAYS
from navit_clip.errors import UserError, one_line_errors
from navit_clip.evaluation.report.curve import save_figure

PICTURE = Path(__file__).parents[1] / "docs" / "benchmarks.png"
OURS = "navit_clip"
DRAWN = ("step", "towers", "sweep")
BARS = (
    ("step", "one step", [*(Entry(way) for way in WAYS), Entry(OURS, drop=0.5)]),
    ("towers", "image tower alone", [Entry(way, "image") for way in WAYS]),
    ("towers", "text tower alone", [Entry(way, "text") for way in WAYS]),
)
CURVES = {
    "image_side": "side of square images, px",
    "stream": "image tokens in the stream",
    "pairs": "pairs, at equal tokens",
    "caption": "tokens of a caption",
}
_OURS_COLOUR, _PEER_COLOUR, _INK, _GRID = "#2563eb", "#9ca3af", "#1f2328", "#e3e6ea"


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws the panels for which there are results.

    Args:
        results: From `read_results`, by name.
        path: PNG file to write; it appears whole, folders are made.

    Raises:
        UserError: If a result lacks what its benchmark writes, or the file cannot be written.
    """
    bars = [panel for panel in BARS if panel[0] in results]
    count = bool(bars) + ("sweep" in results)
    figure = Figure(figsize=(11, 3.2 * count), dpi=150, layout="constrained")
    rows = figure.subfigures(count, 1, squeeze=False)[:, 0]
    try:
        if bars:
            panels = rows[0].subplots(1, len(bars), squeeze=False)[0]
            for axes, (name, title, entries) in zip(panels, bars, strict=True):
                _draw_bars(axes, results[name], title, entries)
        if "sweep" in results:
            panels = rows[-1].subplots(1, len(CURVES))
            for axes, (name, label) in zip(panels, CURVES.items(), strict=True):
                _draw_curve(axes, results["sweep"][name], label, first=axes is panels[0])
        titles = [_title(name, result) for name, result in results.items()]
        figure.suptitle("\n".join(titles), size=8, color=_INK)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"a result lacks {error}: run its benchmark again") from error
    save_figure(figure, path)


def _title(name: str, result: dict[str, Any]) -> str:
    made = result["made"]
    return (
        f"{name}: {result['size']} {result['precision']}, {made['machine']}, "
        f"torch {made['versions']['torch']}"
    )


def _draw_bars(axes: Axes, result: dict[str, Any], title: str, entries: list[Entry]) -> None:
    entries = [entry for entry in entries if entry.name in result]
    rates = [result[entry.name]["pairs_per_s"] for entry in entries]
    colours = [_OURS_COLOUR if entry.way == OURS else _PEER_COLOUR for entry in entries]
    places = range(len(entries))
    axes.barh(places, rates, color=colours, height=0.7)
    drops = [f",\n{entry.drop:.0%} dropped" if entry.drop else "" for entry in entries]
    axes.set_yticks(places, [e.way + drop for e, drop in zip(entries, drops, strict=True)], size=8)
    axes.invert_yaxis()
    for place, entry, rate in zip(places, entries, rates, strict=True):
        text = f" {rate:,.1f}"
        if entry.way != OURS:
            # Of one contest, which a quotient of two rates may not be.
            ratio = result.get(f"ratio_step_{entry.name}", result[f"ratio_{entry.name}"])
            text += f"  (ours {ratio:.2f}×)"
        inside = rate > 0.6 * max(rates)
        axes.text(rate, place, text + "  " * inside, va="center", size=7.5,
                  ha="right" if inside else "left", color="white" if inside else _INK)  # fmt: skip
    axes.set_title(f"{title}: pairs per second", size=9, color=_INK)
    _tidy(axes, "x")


def _draw_curve(axes: Axes, curve: dict[str, Any], label: str, *, first: bool) -> None:
    xs = [point["x"] for point in curve["points"]]
    axes.plot(xs, [p["ms_per_gflop"] for p in curve["points"]], "o-", color=_OURS_COLOUR, ms=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:,}" for x in xs])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1.1 * max(p["ms_per_gflop"] for p in curve["points"]))
    axes.set_xlabel(label, size=8.5, color=_INK)
    if first:
        axes.set_ylabel("ms per GFLOP", size=8.5, color=_INK)
    axes.set_title(f"max/min {curve['max_over_min']:.2f}", size=9, color=_INK)
    _tidy(axes, "y")


def _tidy(axes: Axes, grid: Literal["x", "y"]) -> None:
    axes.grid(axis=grid, color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=_INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--output", type=Path, default=PICTURE, help="PNG file to write")
    args = parser.parse_args()
    with one_line_errors("benchmarks.plot"):
        draw(read_results(args.results, DRAWN), args.output)


if __name__ == "__main__":
    main()
