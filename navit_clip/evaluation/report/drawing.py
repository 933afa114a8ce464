"""How charts look: colours, figures, and SVG that follows the page into its dark scheme."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from navit_clip.files import write_output

# Of models or runs, before they repeat; as in the style sheet of the page.
COLOURS = ("#2563eb", "#c2570c", "#0f8a6a", "#9333a8", "#6b7280")
_MARKERS = ("o", "s", "^", "D", "v")
INK, SOFT, GRID, PAPER = "#1f2328", "#5b6470", "#dfe3e8", "#ffffff"
# In the page the colours are those of the reader's light or dark scheme.
_VARIABLES = {colour: f"var(--s{i})" for i, colour in enumerate(COLOURS)} | {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    GRID: "var(--rule)",
    PAPER: "var(--paper)",
}
TOOLTIP = "tooltip: "  # begins the identifier of what the page shows a text for
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "svg.hashsalt": "navit-clip",  # the same chart is the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": SOFT,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "text.color": INK,
    "font.size": 8.0,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.0,
}


def new_figure(width: float, height: float, dpi: int = 72) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a picture as PNG, atomically; folders are made.

    Raises:
        UserError: If it cannot be written.
    """
    file = io.BytesIO()
    figure.savefig(file, format="png")
    write_output(path, file.getvalue())


def look_of(series: int) -> dict[str, Any]:
    """Colour and marker of a model or run."""
    colour, marker = COLOURS[series % len(COLOURS)], _MARKERS[series % len(_MARKERS)]
    return {"color": colour, "marker": marker, "clip_on": False}


def to_svg(figure: Figure, title: str) -> Markup:
    """The figure as an element of the page: its colours and font, and no identifiers but links'."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1>", svg, count=1)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(rf'<g id="{TOOLTIP}([^"]*)">', r"<g><title>\1</title>", svg)
    # Identifiers of groups would be ambiguous in a page of several charts.
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    # In the font of the page; which of the two forms it is depends on matplotlib's version.
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    label = f'<svg role="img" aria-label="{escape(title)}" '
    return Markup(svg.strip().replace("<svg ", label, 1))
