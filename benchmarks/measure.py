"""What all benchmarks share: timing in turn, counting operations, and the files of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from navit_clip.errors import UserError
from navit_clip.files import reading

Precision = Literal["fp32", "bf16"]
RESULTS = Path(__file__).with_name("out")


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
    """Prints the result with what it depends on, and writes it where asked."""
    text = json.dumps({**result, "made": _made()}, indent=2)
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")


def read_results(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What `report` wrote, by benchmark.

    Args:
        folder: With a file ``NAME.json`` for each.
        names: Those wanted; what is not there is left out.

    Raises:
        UserError: If a file is damaged, or none is there.
    """
    found = {}
    for name in names:
        path = folder / f"{name}.json"
        if path.exists():
            with reading(path, ValueError):
                found[name] = json.loads(path.read_text())
    if not found:
        raise UserError(f"no results in {folder}: make bench, or give --results")
    return found


def _made() -> dict[str, Any]:
    """What a figure depends on: command, commit, machine and libraries."""
    return {
        "command": _command(sys.argv),
        "commit": _commit(),
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _command(argv: Sequence[str]) -> str:
    """As typed, without where the result goes and whose interpreter runs the peer."""
    words, left = [], list(argv[1:])
    while left:
        word = left.pop(0)
        if word.partition("=")[0] in ("--output", "--peer-python"):
            if "=" not in word and left:
                left.pop(0)
        else:
            words.append(word)
    return shlex.join(["python", "-m", f"benchmarks.{Path(argv[0]).stem}", *words])


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _machine() -> str:
    found = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    names = [found[1] if found else platform.processor() or platform.machine()]
    names.append(f"{os.cpu_count()} cores")
    if memory := re.search(r"MemTotal:\s*(\d+) kB", _read("/proc/meminfo")):
        names.append(f"{int(memory[1]) / 2**20:.0f} GiB")
    if torch.cuda.is_available():
        names.append(torch.cuda.get_device_name())
    return ", ".join(names)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # not Linux
        return ""


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "open_clip_torch", "timm", "vit-pytorch", "simplejpeg", "pillow"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
