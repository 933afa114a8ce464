"""``navit-clip doctor``: what this machine has for a run, and what is missing, in one screen."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from navit_clip import __version__, before_torch  # noqa: F401
from navit_clip.commands import Parser, run_command

_WIDTH, _INDENT = 80, 15
_SHARED, _DISK = 1 << 30, 5 << 30  # bytes below which a run is likely to fail
_PACKAGES = ("open_clip_torch", "timm", "jsonargparse", "simplejpeg", "safetensors", "wandb")
_OPTIONAL = {"pyarrow": "Parquet tables", "tokenizers": "SigLIP's tokenizers", "peft": "LoRA"}
_HOSTS = ("https://huggingface.co", "https://api.wandb.ai")
_TIMEOUT_S = 5.0


class Check(NamedTuple):
    """What was found.

    Attributes:
        topic: Of one or two words.
        found: A line.
        fix: What to do if something is wrong, else empty.
    """

    topic: str
    found: str
    fix: str = ""


def main(argv: Sequence[str] | None = None, prog: str = "python -m navit_clip.tools.doctor") -> int:
    """Prints all checks, see `run_command`; the exit status is 1 if something is to be fixed."""
    parser = Parser(prog=prog, description="Checks what this machine has for a run.")
    parser.add_argument(
        "--run-dir", type=Path, default=Path(), help="where runs will go (this folder)"
    )
    parser.add_argument(
        "--network", action="store_true", help=f"also whether {' and '.join(_HOSTS)} answer"
    )
    return run_command(parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    checks = [*_machine(), *_torch(), *_shared_memory(), *_disk(args.run_dir), *_packages()]
    checks += _network() if args.network else [Check("network", "not tried; --network asks")]
    print("\n".join(line for check in checks for line in _lines(check)))
    problems = sum(bool(check.fix) for check in checks)
    print(f"\n{problems} to fix, marked !" if problems else "\nnothing to fix")
    return int(problems > 0)


def _lines(check: Check) -> Iterator[str]:
    for title, text in ((check.topic, check.found), ("  !", check.fix)):
        yield from textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=f"{title:{_INDENT}}",
            subsequent_indent=" " * _INDENT,
        )


def _machine() -> Iterator[Check]:
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield Check("navit-clip", f"{__version__}, Python {platform.python_version()}, {system}")
    # Those of this process: of a container or a batch job it is a part of the machine.
    ours = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        memory = min(memory, int(text))
    yield Check("machine", f"{len(ours)} of {os.cpu_count()} cores, {_gb(memory)} of memory")


def _torch() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:  # a broken installation fails in any way
        yield Check("torch", f"cannot be imported: {error}", "see pytorch.org for your platform")
        return
    yield Check("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        found = "none: float32 on the CPU"
        if not (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
            yield Check("GPU", found)
        elif torch.version.cuda is None:
            fix = "there is a driver of NVIDIA's, and this torch is built for CPUs: pytorch.org"
            yield Check("GPU", found, fix)
        else:
            fix = (
                f"torch sees none: its CUDA {torch.version.cuda} may be newer than the driver "
                "(nvidia-smi says what that supports), or CUDA_VISIBLE_DEVICES hides them"
            )
            yield Check("GPU", found, fix)
        return
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        old = "no bfloat16 before 8.0: it trains in float32, slowly" if gpu.major < 8 else ""
        about = f"{gpu.name}, {_gb(gpu.total_memory)}, compute {gpu.major}.{gpu.minor}"
        yield Check(f"GPU {i}", about, old)
    try:
        import triton

        yield Check("kernels", f"Triton {triton.__version__}")
    except ImportError:
        fix = "pip install triton: attention and loss are slower without our kernels"
        yield Check("kernels", "no Triton", fix)


def _shared_memory() -> Iterator[Check]:
    if (path := Path("/dev/shm")).is_dir():
        free = shutil.disk_usage(path).free
        fix = "batches pass through it: in Docker --shm-size 8g" if free < _SHARED else ""
        yield Check("shared memory", f"{_gb(free)} free in {path}", fix)


def _disk(folder: Path) -> Iterator[Check]:
    place = folder.absolute()
    while not place.exists():  # a run makes its folders
        place = place.parent
    free, fix = shutil.disk_usage(place).free, ""
    if not os.access(place, os.W_OK):
        fix = "nothing can be written there: choose another run_dir"
    elif free < _DISK:
        fix = "a checkpoint has 12 bytes for each parameter: make room or lower checkpoint.keep"
    yield Check("disk", f"{_gb(free)} free in {place}", fix)


def _packages() -> Iterator[Check]:
    yield Check("packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    missing = [f"{name} ({what})" for name, what in _OPTIONAL.items() if not find_spec(name)]
    if missing:
        yield Check("", f"not installed: {', '.join(missing)}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _network() -> Iterator[Check]:
    import urllib3

    for host in _HOSTS:
        try:
            status = urllib3.request("HEAD", host, timeout=_TIMEOUT_S, retries=False).status
            yield Check("network", f"{host} answers ({status})")
        except urllib3.exceptions.HTTPError as error:
            yield Check("network", f"{host}: {error}", "check proxy and firewall, or work offline")


def _gb(count: int) -> str:
    return f"{count / 2**30:.1f} GB"


if __name__ == "__main__":
    sys.exit(main())
