"""``python -m studies run NAME --out DIR --data DIR``, and ``report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from navit_clip import before_torch  # noqa: F401
from navit_clip.commands import Parser, number
from navit_clip.distributed import join_ranks
from navit_clip.errors import one_line_errors
from studies.report import write_report
from studies.runs import run_study
from studies.study import read_study

_DOCS = Path(__file__).parent.parent / "docs" / "studies"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs or reports a study; arguments are those of the process by default."""
    with one_line_errors("python -m studies"):
        args = _parse(argv)
        out = args.out / Path(args.name).stem
        places = {"out": str(args.out / "data"), "data": str(args.data)}
        study = read_study(args.name, places)
        if args.command == "run":
            with join_ranks(args.device) as ranks:
                run_study(study, out, ranks, args.workers)
        else:
            print(write_report(study, Path(args.name).stem, out, args.docs))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m studies", description="Compares variants at equal compute.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "train and evaluate what is missing; given several times, they share the work"),
        ("report", "write the page from the results"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("name", help="of a study, or the path of its YAML")
        command.add_argument(
            "--out", type=Path, default=Path("runs/studies"), help="a folder for each study in it"
        )
        command.add_argument(
            "--data", type=Path, default=Path("../shared/data"), help="what $data stands for"
        )
        if name == "run":
            command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
            command.add_argument(
                "--workers", type=number(0), default=1, help="decoding processes of evaluations"
            )
        else:
            command.add_argument("--docs", type=Path, default=_DOCS, help="folder of the page")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
