"""``navit-clip eval EVALUATOR | summary``, alone or under torchrun."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from tqdm import tqdm

from navit_clip import before_torch  # noqa: F401
from navit_clip.distributed import Ranks, failing_at_once, join_ranks
from navit_clip.errors import UserError, one_line_errors, printable
from navit_clip.evaluation.arguments import load_models, parse_arguments, read_evaluator
from navit_clip.evaluation.cache import Cache
from navit_clip.evaluation.results import EvalResult
from navit_clip.evaluation.summary import summarise, table
from navit_clip.export.card import add_evaluation
from navit_clip.files import write_output, writing
from navit_clip.precision import slow_precision


def main(argv: Sequence[str] | None = None, prog: str = "python -m navit_clip.evaluation") -> None:
    """Evaluates, or prints tables of results; see `parse_arguments`."""
    words = list(sys.argv[1:] if argv is None else argv)
    with one_line_errors(prog):
        args = parse_arguments(words, prog)
        if args.command == "summary":
            print(summarise(args.directory))
            return
        with join_ranks(args.device) as ranks, failing_at_once(ranks, prog):
            _run(args, f"{prog} {shlex.join(words)}", ranks)


def _run(args: argparse.Namespace, command: str, ranks: Ranks) -> None:
    evaluator = read_evaluator(args)
    _check_outputs(args)
    cache = Cache(args.cache, _log) if args.cache is not None else None
    model, baselines = load_models(args, ranks)
    slow = slow_precision(model.precision, ranks.device)
    if slow is not None and ranks.is_first:
        _log(slow)
    result = evaluator.run(
        model, ranks, args.workers, baselines=baselines, cache=cache, strict=args.strict
    )
    if result is None:
        return
    for line in result.skip_examples:
        print(f"skipped {printable(line)}")
    if args.output is not None:
        write_output(args.output, json.dumps(result.to_json(), indent=2) + "\n")
        if model.name == args.model:  # as it is: neither a run's step nor other patches
            _add_to_card(Path(args.model), result)
    print(table(result))
    # Imported here: matplotlib takes a second to load, and most evaluations draw nothing.
    if args.report is not None:
        from navit_clip.evaluation.report.html import write_report

        write_report(args.report, result, evaluator.samples(), command=command)
        print(f"Report: {args.report}")
    if args.curve is not None:
        from navit_clip.evaluation.report.charts import draw_curve

        draw_curve(args.curve, result)
        print(f"Picture: {args.curve}")
    if (gallery := getattr(args, "gallery", None)) is not None:
        evaluator.draw_gallery(gallery)
        print(f"Picture: {gallery}")


def _add_to_card(directory: Path, result: EvalResult) -> None:
    """Lists the result in the card of the evaluated model, if that can be written."""
    own, metrics = result.own, result.measured
    counts = ", ".join(f"{count:,} {what}" for what, count in result.counts.items())
    most = own.setting.max_tokens
    counts += f", {f'at most {most} patches' if most else own.setting.label}, {result.precision}"
    results = [
        f"{metric.name} {metric.format(own.metrics.get(k))}" for k, metric in metrics.items()
    ]
    try:
        add_evaluation(directory, result.title, result.data, counts, ", ".join(results))
    except UserError as error:  # a model may be read only
        _log(f"{error}; the result is in --output alone")


def _log(line: str) -> None:
    """A line on standard error, above a progress bar if there is one."""
    tqdm.write(f"eval: {printable(line)}", file=sys.stderr)


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuses what cannot be written, before hours of work and not after them."""
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
