"""What benchmarks need beside this project, checked before anything is measured.

Each benchmark checks its own needs first; ``python -m benchmarks.needs``, the first step of
``make bench``, those of all of them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.command import command
from benchmarks.pairs import read_samples
from navit_clip.errors import UserError

NEWEST_WEBDATASET = (0, 2, 86)  # that open_clip allows
_INSTALL = 'python -m venv peer && peer/bin/pip install "open_clip_torch[training]"'
_VERSIONS = (
    "import json, open_clip_train.main; from importlib.metadata import version; "
    "print(json.dumps({n: version(n) for n in "
    "('open_clip_torch', 'webdataset', 'torch', 'pillow')}))"
)


def need_projects(names: Iterable[str]) -> None:
    """Raises a `UserError` if towers of these `benchmarks.peers.PROJECTS` cannot be built."""
    if "vit_pytorch" in names and find_spec("vit_pytorch") is None:
        raise UserError("vit-pytorch is not installed: pip install -e '.[bench]'")


def need_proc() -> None:
    """Raises a `UserError` where the memory of processes cannot be measured."""
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("the memory of processes is measured on Linux only, from /proc")


def need_peer(python: str) -> dict[str, str]:
    """The versions of open_clip's trainer and loader, and of their libraries, by this interpreter.

    Raises:
        UserError: If it does not have them, or a webdataset that they cannot use.
    """
    try:
        done = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, check=True)
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        raise UserError(
            f"--peer-python {python} does not run open_clip's trainer "
            f"({reason.strip().splitlines()[-1]}): {_INSTALL}, then --peer-python peer/bin/python"
        ) from error
    if tuple(int(n) for n in re.findall(r"\d+", found["webdataset"])[:3]) > NEWEST_WEBDATASET:
        raise UserError(
            f"open_clip's trainer cannot use webdataset {found['webdataset']}: in the environment "
            f"of {python}, pip install webdataset==0.2.86"
        )
    return found


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Checks all of them."""
    need_proc()
    need_projects(["vit_pytorch"])
    return {"open_clip": need_peer(args.peer_python), "photos": len(read_samples(args.shards))}


main = command(__doc__, check, "shards", "peer-python")

if __name__ == "__main__":
    main()
