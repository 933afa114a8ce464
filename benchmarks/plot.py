"""Draws what the benchmarks found: ``python -m benchmarks.plot``, the last step of ``make bench``.

Reads the JSON files of `benchmarks.step`, `benchmarks.towers` and `benchmarks.sweep` that are
there. First row: pairs per second of each project as bars, one panel for the step and each tower,
with how many times as fast this project is. Second row: milliseconds per GFLOP along the sweep's
curves, where level is linear.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.command import RESULTS, read_results
from navit_clip.errors import UserError, one_line_errors
from navit_clip.evaluation.report.drawing import save_figure

PICTURE = Path(__file__).parents[1] / "docs" / "benchmarks.png"
DRAWN = ("step", "towers", "sweep")
_OURS, _PEERS = "navit_clip", ("open_clip", "timm_naflex", "vit_pytorch")
# Benchmark, title, and what follows a project's name in the result.
_BARS = (
    ("step", "one step", ""),
    ("towers", "image tower alone", "_image"),
    ("towers", "text tower alone", "_text"),
)
_CURVES = {
    "image_side": "side of square images, px",
    "stream": "image tokens in the stream",
    "pairs": "pairs, at equal tokens",
    "caption": "tokens of a caption",
}
_OURS_COLOUR, _PEER_COLOUR = "#2563eb", "#9ca3af"


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws the panels for which there are results as a PNG file, whose folder is made.

    Raises:
        UserError: If a result lacks what its benchmark writes, or the file cannot be written.
    """
    bars = [panel for panel in _BARS if panel[0] in results]
    count = bool(bars) + ("sweep" in results)
    with style.context(("seaborn-v0_8-whitegrid", "seaborn-v0_8-paper")):
        figure = Figure(figsize=(11, 3.2 * count), dpi=150, layout="constrained")
        rows = figure.subfigures(count, 1, squeeze=False)[:, 0]
        try:
            if bars:
                panels = rows[0].subplots(1, len(bars), squeeze=False)[0]
                for axes, (name, title, part) in zip(panels, bars, strict=True):
                    _draw_bars(axes, results[name], title, part)
            if "sweep" in results:
                panels = rows[-1].subplots(1, len(_CURVES))
                panels[0].set_ylabel("ms per GFLOP")
                for axes, (name, label) in zip(panels, _CURVES.items(), strict=True):
                    _draw_curve(axes, results["sweep"][name], label)
            titles = [
                f"{name}: {result['size']} {result['precision']}, {result['made']['machine']}, "
                f"torch {result['made']['versions']['torch']}"
                for name, result in results.items()
            ]
            figure.suptitle("\n".join(titles), size=8)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"a result lacks {error}: run its benchmark again") from error
        save_figure(figure, path)


def _draw_bars(axes: Axes, result: dict[str, Any], title: str, part: str) -> None:
    names = {f"{project}{part}": project for project in (_OURS, *_PEERS)}
    names[f"{_OURS}{part}_drop50"] = f"{_OURS},\n50% dropped"
    names = {key: name for key, name in names.items() if key in result}
    rates = [result[key]["pairs_per_s"] for key in names]
    colours = [_PEER_COLOUR if name in _PEERS else _OURS_COLOUR for name in names.values()]
    labels = [f"{rate:,.1f}" for rate in rates]
    for place, (key, name) in enumerate(names.items()):
        if name in _PEERS:
            # That of the rounds, which a quotient of two rates may not be.
            ratio = result.get(f"ratio_step_{key}", result[f"ratio_{key}"])
            labels[place] += f"  (ours {ratio:.2f}×)"
    bars = axes.barh(list(names.values()), rates, color=colours, height=0.7)
    axes.bar_label(bars, labels, padding=4, size=7.5)
    axes.margins(x=0.6)  # room for the labels
    axes.invert_yaxis()
    axes.set_title(f"{title}: pairs per second")
    axes.grid(visible=False, axis="y")


def _draw_curve(axes: Axes, curve: dict[str, Any], label: str) -> None:
    xs, costs = zip(*((p["x"], p["ms_per_gflop"]) for p in curve["points"]), strict=True)
    axes.plot(xs, costs, "o-", color=_OURS_COLOUR, ms=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:,}" for x in xs])
    axes.minorticks_off()
    axes.set_ylim(0, 1.1 * max(costs))
    axes.set_xlabel(label)
    axes.set_title(f"max/min {curve['max_over_min']:.2f}")
    axes.grid(visible=False, axis="x")


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
