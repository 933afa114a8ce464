"""Timing several ways of doing the same thing in one run, alternating, median of several."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

Precision = Literal["fp32", "bf16"]


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


def flop_counter() -> FlopCounterMode:
    """Counts matrix products and attention, those of the loss, which add in place, included."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})


def _addmm_flops(total: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
    return 2 * a[0] * a[1] * b[1]


def versions(device: str) -> dict[str, Any]:
    """What a figure depends on besides the code: machine and libraries."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        **{name: metadata.version(name) for name in ("torch", "open_clip_torch", "timm")},
    }


def device_and_precision(asked: Precision | None) -> tuple[str, Precision]:
    """CUDA where there is one, and bfloat16 there if nothing else was asked for."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, asked or ("bf16" if device == "cuda" else "fp32")


def precision_argument(parser: argparse.ArgumentParser) -> None:
    """``--precision``, for `device_and_precision`."""
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on CUDA")


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
