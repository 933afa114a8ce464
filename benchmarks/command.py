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
from navit_clip.commands import number
from navit_clip.errors import UserError, one_line_errors
from navit_clip.files import reading, write_output

RESULTS = Path(__file__).with_name("out")
# Of the flags, those on which the results depend and that each file of results holds.
_FACTS = ("size", "precision", "pairs", "steps", "rounds")
# And not: where the result goes, its commit, and where the peers are.
_LOCAL = "output|out|runs|commit|peer-python|open-clip-main"
_LIBRARIES = ("torch", "open_clip_torch", "timm", "vit-pytorch", "simplejpeg", "pillow")


def default_device() -> str:
    """CUDA where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def command(
    description: str | None,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    *flags: str,
    **options: dict[str, Any],
) -> Callable[[], None]:
    """A benchmark's command line, which prints the result and writes it to ``--output``.

    Args:
        description: The benchmark's page.
        measure: From the flags' values to the result.
        flags: ``rounds``, ``size``, ``pairs``, ``precision``, ``shards`` or ``peer-python``.
        options: Other flags as `argparse` takes them, or what differs for one of those.
    """

    def main() -> None:
        shared = _shared_flags()
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        for flag in dict.fromkeys(("output", *flags, *options)):
            parser.add_argument(f"--{flag}", **{**shared.get(flag, {}), **options.get(flag, {})})
        args = parser.parse_args()
        with one_line_errors(f"benchmarks.{Path(sys.argv[0]).stem}"):
            found = measure(args)
            facts = {name: getattr(args, name) for name in _FACTS if hasattr(args, name)}
            text = json.dumps({**found, **facts, "made": describe_run()}, indent=2)
            print(text)
            if args.output is not None:
                write_output(args.output, text + "\n")

    return main


def _shared_flags() -> dict[str, dict[str, Any]]:
    return {
        "output": {"type": Path, "help": "JSON file to write"},
        "rounds": {"type": number(1), "default": 3, "help": "measured rounds"},
        "size": {"choices": tuple(WIDTHS), "default": "S/16", "help": "of the towers"},
        "pairs": {"type": number(1), "default": 64, "help": "pairs a step"},
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


def read_results(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The results of these benchmarks, by name, of which there is a file ``NAME.json``.

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


def describe_run(name: str | None = None) -> dict[str, Any]:
    """What a result depends on: command, commit, machine and libraries.

    Args:
        name: Of the benchmark; None takes that of the running module.
    """
    name = name or Path(sys.argv[0]).stem
    typed = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    return {
        "command": re.sub(rf" --({_LOCAL})[= ]('[^']*'|\S+)", "", typed),
        "commit": commit_of(Path(__file__).parent),
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def commit_of(folder: Path) -> str:
    """The commit of the checkout that this folder is in, where there is one and git."""
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    with suppress(OSError):  # no git
        done = subprocess.run([*git, "--exclude=*"], capture_output=True, text=True, check=False)
        return done.stdout.strip() or "unknown"
    return "unknown"


def _machine() -> str:
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # not Linux
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [name, f"{os.cpu_count()} cores", f"{memory:.0f} GiB"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)
