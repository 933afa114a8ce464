"""Writes RESULTS.md: ``python -m benchmarks.tables``, after the measurements of ``make bench``.

One section for each benchmark: its tables as results.md.jinja describes them, its command, and
what made them. Sections of benchmarks whose JSON file is there are rewritten, others stay as they
are, so that one benchmark can be run alone.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError

from benchmarks.command import RESULTS, read_results
from navit_clip.errors import UserError, one_line_errors
from navit_clip.files import atomic_write

PAGE = Path(__file__).with_name("RESULTS.md")
TEMPLATE = Path(__file__).with_name("results.md.jinja")
TITLES = {
    "step": "One training step",
    "towers": "Towers alone",
    "end_to_end": "From shards to weights",
    "sweep": "Cost as sizes grow",
    "attention": "Attention",
    "windows": "Windows of a hierarchical tower",
    "masked_image": "Masked image pretraining",
    "patch_sizes": "Patches of several sizes",
    "loss": "Loss",
    "exchange": "Loss between ranks",
    "evaluation": "Evaluation",
    "serving": "Serving",
    "loader": "Loader",
    "loader_memory": "Memory of the loader",
    "packing": "Packing",
    "device": "One GPU",
}


def section(name: str, result: dict[str, Any]) -> str:
    """One section, its heading included.

    Raises:
        UserError: If the result lacks what its benchmark writes.
    """
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"number": format, "compact": compact}
    template = environment.from_string(TEMPLATE.read_text())
    try:
        body, made = getattr(template.module, name)(result), result["made"]
        versions = ", ".join(f"{lib} {version}" for lib, version in made["versions"].items())
        source = (
            f"`{made['command']}` at {made['commit']}; {made['machine']}, threads: "
            f"{made['threads']}; {versions}."
        )
    except (KeyError, TypeError, ValueError, TemplateError) as error:
        raise UserError(f"{name}'s result lacks {error}: run the benchmark again") from error
    return f"## {TITLES[name]}\n\n{body.strip()}\n\n{source}\n"


def compact(value: Any) -> str:
    """A value, or many, with three digits of each fraction."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {compact(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(compact, value))
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def rewrite(page: str, results: dict[str, dict[str, Any]]) -> str:
    """The page with the sections of these results in place of those that it has."""
    head, *old = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    texts = {text.partition("\n")[0].removeprefix("## "): text for text in old}
    texts |= {TITLES[name]: section(name, result) for name, result in results.items()}
    order = [title for title in TITLES.values() if title in texts]
    order += [title for title in texts if title not in order]
    return "\n".join(text.strip("\n") + "\n" for text in (head, *(texts[t] for t in order)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--output", type=Path, default=PAGE, help="Markdown page to rewrite")
    args = parser.parse_args()
    with one_line_errors("benchmarks.tables"):
        results = read_results(args.results, tuple(TITLES))
        page = args.output.read_text() if args.output.is_file() else "# Results\n"
        atomic_write(args.output, rewrite(page, results))


if __name__ == "__main__":
    main()
