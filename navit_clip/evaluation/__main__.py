"""``navit-clip eval zeroshot | retrieval | summary``, alone or under torchrun."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from tqdm import tqdm

from navit_clip.distributed import Ranks, join_ranks
from navit_clip.errors import UserError, one_line_errors
from navit_clip.evaluation.arguments import load_models, parse_arguments, read_spec
from navit_clip.evaluation.cache import Cache
from navit_clip.evaluation.evaluator import Outcome, judge
from navit_clip.evaluation.summary import retrieval_table, summarise, zeroshot_table
from navit_clip.files import write_output, writing


def main(argv: Sequence[str] | None = None, prog: str = "python -m navit_clip.evaluation") -> None:
    """Evaluates.

    Args:
        argv: Arguments without the program's name; those of the process by default.
        prog: What the user typed before them, for messages.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with one_line_errors(prog):
        args = parse_arguments(words, prog)
        if args.command == "summary":
            print(summarise(args.directory))
            return
        with join_ranks(args.device) as ranks:
            _run(args, f"{prog} {shlex.join(words)}", ranks)


def _run(args: argparse.Namespace, command: str, ranks: Ranks) -> None:
    spec = read_spec(args)
    _prepare(args)
    cache = Cache(args.cache, _say) if args.cache is not None else None
    model, baselines = load_models(args, ranks)
    outcome = judge(
        model,
        spec,
        ranks,
        args.workers,
        baselines=baselines,
        cache=cache,
        strict=args.strict,
    )
    if outcome is None:
        return
    for line in outcome.data.skips:
        print(f"skipped {line}")
    write_output(args.output, json.dumps(outcome.result, indent=2) + "\n")
    table = zeroshot_table if args.command == "zeroshot" else retrieval_table
    print(table(outcome.result))
    _draw(args, command, outcome)


def _draw(args: argparse.Namespace, command: str, outcome: Outcome) -> None:
    # Imported here: drawing takes a second to load, and most evaluations draw nothing.
    data, own_ED = outcome.data, outcome.data.embeddings[outcome.model.own_setting]
    if args.report is not None:
        from navit_clip.evaluation import report

        if outcome.names is not None:
            assert outcome.classes_CD is not None
            shown = report.show_zeroshot(
                outcome.result,
                data,
                own_ED,
                outcome.classes_CD,
                outcome.names,
                outcome.model.scale,
                outcome.dataset,
                right=outcome.right,
                only=outcome.only,
            )
        else:
            assert outcome.texts_TD is not None
            assert outcome.owner_T is not None
            shown = report.show_retrieval(
                data, own_ED, outcome.texts_TD, outcome.owner_T, outcome.dataset
            )
        report.write_report(args.report, outcome.result, shown, command=command)
        print(f"Report: {args.report}")
    if args.curve is not None:
        from navit_clip.evaluation import report

        report.draw_curve(args.curve, outcome.result)
        print(f"Picture: {args.curve}")
    if args.command == "retrieval" and args.gallery is not None:
        from navit_clip.evaluation.gallery import draw_gallery

        assert outcome.texts_TD is not None
        assert outcome.owner_T is not None
        draw_gallery(data, own_ED, outcome.texts_TD, outcome.owner_T, outcome.dataset, args.gallery)
        print(f"Picture: {args.gallery}")


def _say(line: str) -> None:
    """A line on standard error that leaves a progress bar whole."""
    tqdm.write(f"eval: {line}", file=sys.stderr)


def _prepare(args: argparse.Namespace) -> None:
    """Refuses what cannot be written before the hours of work and not after them."""
    taken: dict[Path, str] = {}
    for name in ("output", "report", "curve", "gallery"):
        path = getattr(args, name, None)
        if path is None:
            continue
        if (other := taken.setdefault(path.resolve(), name)) != name:
            raise UserError(f"--{other} and --{name} are both {path}: give each its own file")
        if path.is_dir():
            raise UserError(f"cannot write {path}: {path} is a folder, name a file in it")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=path.parent):
                pass


if __name__ == "__main__":
    main()
