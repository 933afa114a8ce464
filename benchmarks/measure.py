"""Timing several ways of doing the same thing in one run, alternating, median of several."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def alternate(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way.

    One round without measuring warms up; then each round runs every way once, so that a machine
    that slows down slows all of them.

    Args:
        ways: What to run, by name.
        rounds: Measured rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if round_:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def output_argument(description: str | None) -> argparse.ArgumentParser:
    """A parser with ``--output``, which every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def report(result: dict[str, Any], output: Path | None) -> None:
    """Prints the result and writes it where asked."""
    text = json.dumps(result, indent=2)
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
