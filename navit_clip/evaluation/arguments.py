"""The flags of the command line, and what they ask for: an evaluator and models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from navit_clip.architectures import OPEN_CLIP
from navit_clip.commands import Parser, number
from navit_clip.configs import descriptions
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.evaluation.baselines import OpenClipModel
from navit_clip.evaluation.evaluator import EvalSpec, Evaluator
from navit_clip.evaluation.models import Model, packed_model
from navit_clip.evaluation.registry import EVALUATORS
from navit_clip.load import load_model
from navit_clip.precision import choose_precision


def parse_arguments(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """Parses the name of an evaluator, or ``summary``, and its flags.

    Raises:
        SystemExit: After ``--help``.
        UserError: For invalid arguments.
    """
    parser = Parser(prog=prog, description="Classification, retrieval and probes of models.")
    commands = parser.add_subparsers(dest="command", required=True)
    common = _common()
    for kind, evaluator in EVALUATORS.items():
        usage = f"{prog} {kind} (--model MODEL | --run RUN) OPTION …"
        about = evaluator.description
        command = commands.add_parser(kind, parents=[common], usage=usage, help=about)
        _add_spec(command, evaluator.Spec)
        if evaluator.gallery:
            command.add_argument("--gallery", type=Path, help=f"PNG to write: {evaluator.gallery}")
    summary = commands.add_parser("summary", help="tables of the results in a directory")
    summary.add_argument("directory", type=Path)
    return parser.parse_args(argv)


def model_flags() -> Parser:
    """Flags that name a model and how it runs, for `load_models`."""
    flags = Parser(add_help=False)
    group = flags.add_argument_group("models")
    model = group.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="exported model, RUN_DIR/model, or open_clip:NAME")
    model.add_argument("--run", type=Path, help="a training run: the newest of its checkpoints")
    group.add_argument("--step", type=number(0), help="with --run: the checkpoint of this step")
    group.add_argument("--weights", type=Path, help="checkpoint for --model open_clip:NAME")
    group.add_argument(
        "--patch-size",
        type=number(1),
        help="side of patches in pixels, to which this model's kernel is resized (FlexiViT)",
    )
    flags.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    flags.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of forward passes; auto is bf16 on CUDA and fp32 on a CPU, as in training",
    )
    flags.add_argument("--workers", type=number(0), default=1, help="decoding processes per rank")
    flags.set_defaults(baseline=[], baseline_weights=[], random_weights=None, square=())
    return flags


def _common() -> Parser:
    common = Parser(add_help=False, parents=[model_flags()])
    models = common.add_argument_group("baselines")
    models.add_argument(
        "--baseline",
        action="append",
        default=[],
        help="evaluated beside it: open_clip:NAME or an exported model; repeatable",
    )
    models.add_argument(
        "--baseline-weights",
        action="append",
        type=Path,
        default=[],
        help="checkpoint for each --baseline open_clip:NAME, in their order",
    )
    models.add_argument(
        "--random-weights",
        type=number(0),
        metavar="SEED",
        help="open_clip models without a checkpoint get random weights, for measuring",
    )
    output = "JSON file to write; the result also becomes a line of the model's card"
    common.add_argument("--output", type=Path, help=output)
    common.add_argument("--report", type=Path, help="HTML file to write: metrics and pictures")
    common.add_argument("--curve", type=Path, help="PNG to write: accuracy against tokens")
    common.add_argument("--cache", type=Path, help="directory that keeps embeddings for next time")
    common.add_argument(
        "--strict", action="store_true", help="fail if any image or caption cannot be used"
    )
    return common


def _add_spec(parser: argparse.ArgumentParser, spec: type[EvalSpec]) -> None:
    """A flag for each field of a specification, whose docstring is the help."""
    hints = get_type_hints(spec)
    described = descriptions(spec)
    for field in fields(spec):
        text = described[field.name].rstrip(".")
        options: dict[str, Any] = {"dest": field.name, "help": text[:1].lower() + text[1:]}
        if hints[field.name] is bool:
            options["action"] = "store_true"
        elif hints[field.name] == tuple[int, ...]:
            options |= {"type": _numbers, "default": field.default}
        elif hints[field.name] is int:
            options |= {"type": number(1), "default": field.default}
        elif hints[field.name] is float:
            options |= {"type": float, "default": field.default}
        elif hints[field.name] == tuple[str, ...]:
            options |= {"action": "extend", "nargs": "+"}
        required = field.default is MISSING
        flag = field.metadata.get("flag", f"--{field.name.replace('_', '-')}")
        parser.add_argument(flag, required=required, **options)


def _numbers(text: str) -> tuple[int, ...]:
    values = tuple(int(word) if word.isdecimal() else 0 for word in text.split(","))
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers such as 64,128,256, got {text!r}")
    return values


def read_evaluator(args: argparse.Namespace) -> Evaluator[Any]:
    """The evaluator of the command with its data and settings.

    Raises:
        UserError: If flags contradict each other.
    """
    evaluator = EVALUATORS[args.command]
    given = {field.name: getattr(args, field.name) for field in fields(evaluator.Spec)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None
    }
    try:
        return evaluator(evaluator.Spec(**values))
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from error


def load_models(args: argparse.Namespace, ranks: Ranks) -> tuple[Model, list[Model]]:
    """The model, and what it is compared with.

    Raises:
        UserError: If one cannot be loaded, or checkpoints and models do not pair up.
    """
    if args.step is not None and args.run is None:
        raise UserError("--step belongs to --run: name the run")
    open_clips = sum(name.startswith(OPEN_CLIP) for name in args.baseline)
    if args.weights is not None and not (args.model or "").startswith(OPEN_CLIP):
        raise UserError("--weights belongs to --model open_clip:NAME")
    if len(args.baseline_weights) > open_clips:
        raise UserError(
            f"{len(args.baseline_weights)} --baseline-weights for {open_clips} --baseline "
            "open_clip:NAME: give one for each, in the same order"
        )
    precision = choose_precision(args.precision, ranks.device)
    if args.run is not None:
        # Here, since it loads torch.distributed's checkpoints, which takes a second.
        from navit_clip.checkpoints.load_run import load_run

        loaded, step = load_run(args.run, args.step, ranks.device)
        model: Model = packed_model(loaded, f"{args.run} step {step}", precision)
    else:
        model = _load(args.model, args.weights, args, ranks)
    if args.patch_size is not None:
        model.set_patch_size(args.patch_size)
    weights = iter(args.baseline_weights)
    baselines = [
        _load(name, next(weights, None) if name.startswith(OPEN_CLIP) else None, args, ranks)
        for name in args.baseline
    ]
    return model, baselines


def _load(name: str, weights: Path | None, args: argparse.Namespace, ranks: Ranks) -> Model:
    precision = choose_precision(args.precision, ranks.device)
    if not name.startswith(OPEN_CLIP):
        return packed_model(load_model(Path(name), ranks.device), name, precision)
    seed = args.random_weights if weights is None else None
    architecture = name.removeprefix(OPEN_CLIP)
    return OpenClipModel(architecture, weights, seed, ranks.device, args.square, precision)
