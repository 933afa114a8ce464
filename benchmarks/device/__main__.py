"""What one GPU says of this project: ``python -m benchmarks.device --out DIR --deadline 420``.

Correctness, kernels, steps, loss, peer and trainer, in minutes. Every check has a process of its
own (a fault of CUDA, a hang or too little memory ends that check alone), a limit of its own and the
deadline of all. Its line is printed and DIR/device.json written at once, so that what is done
counts whatever comes after; checks stand in the order of what they decide. `benchmarks.tables`
makes a section of RESULTS.md from the file.

``--tiny --device cpu`` takes the code of every check through sizes of no meaning; each ends "ok" or
"needs CUDA".
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.device.checks import CHECKS
from benchmarks.device.run import run_checks


def main() -> None:
    """The command line."""
    names = [check.name for check in CHECKS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of what is written")
    parser.add_argument("--deadline", type=float, default=420, help="seconds for all checks")
    listed = f"default: all of {', '.join(names)}"
    for flag, text in (("--only", listed), ("--skip", "not these")):
        parser.add_argument(flag, nargs="+", choices=names, default=[], metavar="CHECK", help=text)
    parser.add_argument("--shards", nargs="+", default=[], help="photos with captions")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--commit", default="", help="of the tree, where there is no git")
    run_checks(parser.parse_args())


if __name__ == "__main__":
    main()
