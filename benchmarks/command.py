"""The command line of a benchmark: flags that several share, and the file of its result.

``python -m benchmarks.NAME`` checks what it needs before it starts, so that a run of many minutes
does not end on a missing package or photo.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.sizes import WIDTHS
from navit_clip.errors import UserError, one_line_errors
from navit_clip.files import reading, write_output

RESULTS = Path(__file__).with_name("out")
# Of the flags, those on which the results depend and that each file of results holds.
_FACTS = ("size", "precision", "pairs", "steps", "rounds")


def at_least(least: int) -> Callable[[str], int]:
    """A type of flags: whole numbers from `least` on."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least:,}, got {value:,}")
        return value

    return number


def command_line(
    description: str | None, *flags: str, **defaults: object
) -> argparse.ArgumentParser:
    """A parser with ``--output`` and the named ones of the flags that several benchmarks have.

    Args:
        description: The benchmark's page.
        flags: ``rounds``, ``size``, ``pairs``, ``precision``, ``shards`` or ``peer-python``.
        defaults: Where they differ from those here.
    """
    shared: dict[str, dict[str, Any]] = {
        "output": {"type": Path, "help": "JSON file to write"},
        "rounds": {"type": at_least(1), "default": 3, "help": "measured rounds"},
        "size": {"choices": tuple(WIDTHS), "default": "S/16", "help": "of the towers"},
        "pairs": {"type": at_least(1), "default": 64, "help": "pairs a step"},
        "precision": {
            "choices": ("fp32", "bf16"),
            "default": "bf16" if torch.cuda.is_available() else "fp32",
            "help": "default: bf16 on CUDA",
        },
        "shards": {
            "nargs": "+",
            "default": [],
            "help": "tar files, folders, patterns of photos with captions",
        },
        "peer-python": {
            "default": sys.executable,
            "help": "interpreter that has open_clip's trainer and its loader",
        },
    }
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("output", *flags):
        parser.add_argument(f"--{name}", **shared[name])
    parser.set_defaults(**defaults)
    return parser


def default_device() -> str:
    """CUDA where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def run(
    parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], dict[str, Any]]
) -> None:
    """Measures, prints the result with what it depends on, and writes it where asked.

    Args:
        parser: From `command_line`.
        measure: From the flags' values to the result.
    """
    args = parser.parse_args()
    with one_line_errors(f"benchmarks.{Path(sys.argv[0]).stem}"):
        found = measure(args)
        facts = {name: getattr(args, name) for name in _FACTS if hasattr(args, name)}
        text = json.dumps({**found, **facts, "made": _made()}, indent=2)
        print(text)
        if args.output is not None:
            write_output(args.output, text + "\n")


def read_results(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What `run` wrote, by benchmark.

    Args:
        folder: With a file ``NAME.json`` for each.
        names: Those wanted; what is not there is left out.

    Raises:
        UserError: If a file is damaged, or none is there.
    """
    found = {}
    for path in (folder / f"{name}.json" for name in names):
        if path.exists():
            with reading(path, ValueError):
                found[path.stem] = json.loads(path.read_text())
    if not found:
        raise UserError(f"no results in {folder}: make bench, or give --results")
    return found


def _made() -> dict[str, Any]:
    """What a result depends on: command, commit, machine and libraries."""
    return {
        "command": _command(sys.argv),
        "commit": _commit(),
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _command(argv: Sequence[str]) -> str:
    """As typed, without where the result goes and whose interpreter runs the peer."""
    words = shlex.join(["python", "-m", f"benchmarks.{Path(argv[0]).stem}", *argv[1:]])
    return re.sub(r" --(output|peer-python)[= ]('[^']*'|\S+)", "", words)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError):  # no git
        folder = Path(__file__).parent
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout.strip() or "unknown"
    return "unknown"


def _machine() -> str:
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # not Linux
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    names = [name, f"{os.cpu_count()} cores", f"{memory:.0f} GiB"]
    return ", ".join(
        [*names, *([torch.cuda.get_device_name()] if torch.cuda.is_available() else [])]
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "open_clip_torch", "timm", "vit-pytorch", "simplejpeg", "pillow"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
