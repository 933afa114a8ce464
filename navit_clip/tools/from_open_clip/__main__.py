"""``navit-clip from-open-clip 'torchrun … -m open_clip_train.main --train-data … …'``.

The flags are parsed by open_clip's own parser, that of the version installed, which learns the
flags of its main branch from our table.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import yaml
from open_clip_train import params

from navit_clip.commands import Parser, run_command
from navit_clip.errors import UserError
from navit_clip.tools.from_open_clip.convert import CONVERT, OPEN_CLIP, READ
from navit_clip.tools.from_open_clip.flags import FLAGS
from navit_clip.tools.from_open_clip.translation import Translation

_DESCRIPTION = """Prints a training command of open_clip as the YAML of a run, with the commands
that use it and what could not be translated as comments. docs/from_open_clip.md lists all flags."""
_FILE = "run.yaml"
# What starts the trainer: python -m open_clip_train.main, training.main of older versions, a path.
_PROGRAM = re.compile(r"(^|\s)(-m\s+(open_clip_train|training)\.main|\S+/main\.py)(?=\s|$)")
_WIDTH = 100


class _Theirs(argparse.ArgumentParser):
    """open_clip's parser, which also knows the flags of its main branch."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        for name, flag in FLAGS.items():
            if flag.only == "main" and name not in self._option_string_actions:
                if flag.values == 0:
                    self.add_argument(name, action="store_true")
                elif flag.values == "k=v":
                    self.add_argument(name, nargs="*", action=params.ParseKwargs, default={})
                else:
                    self.add_argument(name, nargs=flag.values, type=yaml.safe_load)
        found = super().parse_args(args, namespace)
        actions = {name: self._option_string_actions.get(name) for name in FLAGS}
        found.flags = {
            name: (action.dest, getattr(found, action.dest) != action.default)
            for name, action in actions.items()
            if action is not None
        }
        return found

    def error(self, message: str) -> NoReturn:
        if unknown := re.search(r"unrecognized arguments: (.*)", message):
            word = unknown[1].split(" ")[0] or "empty flag"
            close = get_close_matches(word, self._option_string_actions, 1)
            message = f"open_clip has no {word}{f'; did you mean {close[0]}?' if close else ''}"
        raise UserError(message)


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m navit_clip.tools.from_open_clip"
) -> int:
    """Prints the translation, see `run_command`."""
    parser = Parser(prog=prog, description=_DESCRIPTION)
    parser.add_argument("command", metavar="'COMMAND'", help="all of it, in quotes")
    return run_command(parser, lambda args: print(translate(args.command)) or 0, argv)


def translate(command: str) -> str:
    """The YAML of a run that does what a command of open_clip does, with comments before it.

    Raises:
        UserError: If it is none of open_clip's trainer, or a flag or value is wrong.
    """
    try:
        return _translate(*_split(command))
    # Of open_clip's own actions too, which check nothing.
    except (ValueError, TypeError, OverflowError, SyntaxError, yaml.YAMLError) as error:
        raise UserError(f"a value of the command cannot be read: {error}") from error


def _translate(launcher: str, flags: Sequence[str]) -> str:
    # In its module alone; it fills in defaults that depend on the model.
    with mock.patch.object(params, "argparse", SimpleNamespace(ArgumentParser=_Theirs)):
        args = params.parse_args(flags)
    if args.dataset_type not in ("webdataset", "csv", "auto"):
        raise UserError(
            f"--dataset-type {args.dataset_type}: give shards or a table; navit-clip data shapes "
            "writes pictures and captions to try things with"
        )
    t = Translation(args, _ranks(launcher))
    if not args.train_data:
        commands = _evaluations(t) or ["(none: neither training data nor images to evaluate)"]
        return "\n".join(_comments(commands, [*t.lost, *_without_counterpart(args)]))
    t.set("run_dir", "")
    t.set("task.kind", "contrastive")
    for name, (dest, _) in args.flags.items():
        value = getattr(args, dest)
        if name in CONVERT and value is not None:
            CONVERT[name](t, value)
    if t.unpaced:
        t.lose(
            ", ".join(t.unpaced),
            "set them in steps; open_clip counts epochs, and without --train-num-samples and the "
            "number of ranks it is unknown how many steps one has",
        )
    commands = [f"{_launched(launcher)} --config {_FILE}"]
    body = yaml.safe_dump(t.config, sort_keys=False, width=_WIDTH, default_flow_style=None)
    return "\n".join([*_comments(commands, [*t.lost, *_without_counterpart(args)]), body])


def _evaluations(t: Translation) -> list[str]:
    """Commands for what open_clip does where there is nothing to train on."""
    args = t.args
    chosen = ["--model", f"{OPEN_CLIP}{args.model}"]
    if t.starts_from:
        chosen += ["--weights", t.starts_from]
    found: list[str] = []
    for data, class_map in ((args.imagenet_val, "imagenet"), (args.imagenet_v2, "index")):
        if data is not None:
            words = ["--data", data, "--class-map", class_map, "--classnames", "imagenet"]
            found.append(f"navit-clip eval zeroshot {shlex.join([*chosen, *words])}")
    if args.val_data is not None:
        words = ["--data", args.val_data]
        if t.is_table(args.val_data):
            words = ["--images", ".", "--captions", args.val_data]
            words += ["--image-column", args.csv_img_key, "--caption-column", args.csv_caption_key]
        found.append(f"navit-clip eval retrieval {shlex.join([*chosen, *words])}")
    if found and t.starts_from and not Path(t.starts_from).suffix:
        t.lose("--pretrained", f"{t.starts_from} is not downloaded: name the file")
    return found


def _split(command: str) -> tuple[str, list[str]]:
    """What starts the trainer, and the trainer's flags."""
    text = re.sub(r"\s*\\?\s*\n\s*|\s*\\$", " ", command).strip()
    found = _PROGRAM.search(text)
    if found is None:
        raise UserError(
            f"no command of open_clip's trainer: {text[:60]!r}; expected such as "
            "'torchrun --nproc_per_node 8 -m open_clip_train.main --train-data … '"
        )
    try:
        return text[: found.start()].strip(), shlex.split(text[found.end() :])
    except ValueError as error:
        raise UserError(f"the command's quotes do not match: {error}") from error


def _ranks(launcher: str) -> int | None:
    """Processes that a launcher starts, None where it does not say."""
    if "torchrun" not in launcher and "distributed" not in launcher:
        return 1 if re.fullmatch(r"(\w+=\S* )*\S*python[\d.]*( -u)?", launcher) else None
    found = {
        name: re.search(rf"--{name}[= ](\d+)(?=\s|$)", launcher.replace("-per-", "_per_"))
        for name in ("nproc_per_node", "nnodes")
    }
    per_node, nodes = found["nproc_per_node"], found["nnodes"]
    if per_node is None or (nodes is None and "--nnodes" in launcher):
        return None
    return int(per_node[1]) * (int(nodes[1]) if nodes else 1)


def _launched(launcher: str) -> str:
    """What starts our trainer."""
    if re.fullmatch(r"\S*python[\d.]*", launcher):
        return "navit-clip train"
    return f"{launcher} -m navit_clip.training"


def _without_counterpart(args: argparse.Namespace) -> Iterator[str]:
    for name, (_, given) in args.flags.items():
        if given and FLAGS[name].ours == "" and name not in READ:
            yield f"{name}: {FLAGS[name].note}"


def _comments(commands: Sequence[str], lost: Sequence[str]) -> Iterator[str]:
    yield f"# Commands; {_FILE} is this text:"
    yield from (f"#   {line}" for line in commands)
    yield "# Not translated:"
    for line in dict.fromkeys(lost or ["nothing"]):
        yield from textwrap.wrap(
            line,
            _WIDTH,
            initial_indent="#   ",
            subsequent_indent="#     ",
            break_long_words=False,
            break_on_hyphens=False,
        )


if __name__ == "__main__":
    sys.exit(main())
