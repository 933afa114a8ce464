"""``navit-clip report RUN_DIR [RUN_DIR …]``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from navit_clip.commands import Parser, run_command
from navit_clip.errors import UserError
from navit_clip.training.sections import AXES


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m navit_clip.training.report"
) -> int:
    """Writes a report, see `run_command`."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog=prog,
        description="Writes run directories as one HTML page: curves, speed, batches, evaluations, "
        "and of several what differs between them.",
    )
    parser.add_argument("run_dir", nargs="+", type=Path, help="directory of a training")
    parser.add_argument(
        "--output", type=Path, metavar="HTML",
        help="file to write; report.html in the run directory, of several in this folder",
    )  # fmt: skip
    parser.add_argument(
        "--axis", choices=AXES, help="what curves are drawn over; step, of several samples_seen"
    )
    parser.set_defaults(command=f"{prog} {shlex.join(words)}")
    return run_command(parser, _report, words)


def _report(args: argparse.Namespace) -> int:
    for directory in args.run_dir:
        if not directory.is_dir():  # before a second is spent on loading what draws
            raise UserError(
                f"no run in {directory}: no such folder; name the run_dir of a training"
            )
    from navit_clip.training.report.html import write_run_report
    from navit_clip.training.report.read import read_runs

    runs = read_runs(args.run_dir)
    alone = len(runs) == 1
    output = args.output or (args.run_dir[0] if alone else Path()) / "report.html"
    axis = args.axis
    if axis and not any(axis in run.keys for run in runs):
        raise UserError(f"--axis {axis}: no line of metrics.jsonl has it; leave it out")
    if axis is None:  # runs of earlier versions do not tell the samples
        compared = not alone and all("samples_seen" in run.keys for run in runs)
        axis = "samples_seen" if compared else "step"
    write_run_report(output, runs, axis, args.command)
    print(f"Report: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
