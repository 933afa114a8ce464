"""What ``navit-clip train --help`` and ``--help-all`` print: fields, from their docstrings.

When a field has changed, ``python -m navit_clip.training.reference > docs/configuration.md``.
"""

from __future__ import annotations

import inspect
import math
import re
import textwrap
from collections.abc import Iterator, Sequence, Set
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from navit_clip.configs import configs_in, descriptions
from navit_clip.recipes import with_recipe_paths
from navit_clip.tasks.base import TaskConfig
from navit_clip.tasks.registry import OWN_KINDS, task_config
from navit_clip.training.config import DEFAULT_TASK, TrainConfig, parse_config, task_kind

_WIDTH = 100
_SHORT = """\
usage: {prog} --config RECIPE_OR_FILE [--FIELD VALUE …]

Trains a packed NaViT model, or continues the run in run_dir.

  {prog} --config demo
  {prog} --config small_photos --data.train 'shards/{{0..9}}.tar' --run_dir runs/mine
  {prog} --config my.yaml --optim.lr 3e-4 --task.model.image.encoder.depth 6
  torchrun --nproc-per-node 8 -m navit_clip.training --config navit_b16_webli \\
    --data.train SHARDS --tokenizer.path tokenizer.model

--config takes a recipe's name or a YAML file. Every field is a flag too, and overrides the file's:
"""
_MORE = """
--help-all      all fields with what they are and their defaults, as YAML
--print_config  the fields of this command, resolved, as YAML; trains nothing
--print_config=comments  the same, with what each field is
"""
_PLAIN, _COMMENTED = "--print_config", "--print_config=comments"
_USED = (
    "run_dir", "steps", "samples", "epochs", "data.train", "data.workers", "data.budget",
    "tokenizer.path", "init.model",
    "optim.lr", "optim.schedule", "accumulate", "parallel.kind", "checkpoint.every_steps",
    "log.every_steps", "eval.evaluators", "seed", "precision", "device",
)  # fmt: skip
_PAGE = """\
# Configuration

All fields of a run with their defaults, as `navit-clip train --help-all` prints them, for
`task.kind: {kind}`. A file holds those that differ; each is a flag too, such as `--optim.lr 1e-3`.
`navit-clip train --print_config` prints those of a command. This page is written by
`python -m navit_clip.training.reference`.

```yaml
{fields}
```
"""
_TASK = """
## task.kind: {kind}

{text}

```yaml
{fields}
```
"""


def help_text(argv: Sequence[str], prog: str) -> str | None:
    """What the words of a command ask for.

    Raises:
        UserError: If there is no such task or recipe, or what is to be printed is no configuration.
    """
    if {"-h", "--help"} & set(argv):
        return _short_help(prog)
    if {"--help-all", "--help_all"} & set(argv):
        return reference(task_config(task_kind(with_recipe_paths(argv))))
    if _PLAIN in argv:  # the parser's own would leave out what a model's name gives
        return parse_config([word for word in argv if word != _PLAIN], prog)[1].rstrip()
    if _COMMENTED in argv:
        config, _ = parse_config([word for word in argv if word != _COMMENTED], prog)
        return "\n".join(_lines(TrainConfig, type(config.task), "", values=config))
    return None


def _short_help(prog: str) -> str:
    """Examples and the fields that most runs set."""
    lines = []
    for name in _USED:
        config: Any = TrainConfig
        *groups, last = name.split(".")
        for group in groups:
            config = next(configs_in(get_type_hints(config)[group]))
        hint = get_type_hints(config)[last]
        text = re.split(r"[.;:] ", descriptions(config)[last])[0].rstrip(".")
        if get_origin(hint) is Literal:
            text = _type(hint)
        lines += textwrap.wrap(
            text, _WIDTH, initial_indent=f"  --{name:24}", subsequent_indent=" " * 28
        )
    return "\n".join([_SHORT.format(prog=prog), *lines, _MORE])


def page() -> str:
    """docs/configuration.md: all fields for one task, then those of the other tasks alone."""
    first = task_config(DEFAULT_TASK)
    parts = [_PAGE.format(kind=DEFAULT_TASK, fields=reference(first))]
    known = {type(value) for value in _configs(first())}
    for kind in OWN_KINDS:
        if kind != DEFAULT_TASK:
            task = task_config(kind)
            lines = "\n".join(["task:", *_lines(task, task, "  ", known)])
            text = inspect.cleandoc(task.__doc__ or "").split("\n\n")[0]
            parts.append(_TASK.format(kind=kind, text=text, fields=lines))
    return "".join(parts)


def reference(task: type[TaskConfig]) -> str:
    """All fields with descriptions, types and defaults as YAML; those without one are comments."""
    return "\n".join(_lines(TrainConfig, task, ""))


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and all within it."""
    yield config
    for field in fields(config):
        if is_dataclass(value := getattr(config, field.name)):
            yield from _configs(value)


@cache
def _groups(task: type[TaskConfig]) -> frozenset[type]:
    """Classes of the groups of fields that cannot be null, at any depth."""

    def below(config: Any) -> Iterator[type]:
        for hint in _hints(config, task).values():
            if is_dataclass(hint):
                yield hint  # type: ignore[misc]
                yield from below(hint)

    return frozenset(below(TrainConfig))


def _differing(value: Any) -> dict[str, Any]:
    """Values of a configuration that are not the defaults of its class."""
    return {
        field.name: _differing(own) if is_dataclass(own) else own
        for field in fields(value)
        if (own := getattr(value, field.name)) != _default(field)
    }


def _lines(
    config: type,
    task: type[TaskConfig],
    pad: str,
    known: Set[type] = frozenset(),
    values: Any = None,
) -> Iterator[str]:
    """Lines of a configuration; of those within it that are `known` only what differs.

    They hold the fields of `values`, by default the defaults.
    """
    described, hints = descriptions(config), _hints(config, task)
    for field in fields(config):
        hint, comment = hints[field.name], f"{pad}# "
        yield from textwrap.wrap(
            described[field.name], _WIDTH, initial_indent=comment, subsequent_indent=comment
        )
        default = _default(field) if values is None else getattr(values, field.name)
        group = hint if is_dataclass(hint) else type(default)  # of a group that may be null
        if group in known:
            yield f"{pad}{field.name}: {_yaml(_differing(default))}  # other fields as above"
            continue
        if is_dataclass(group):
            yield f"{pad}{field.name}:"
            below = None if values is None else default
            yield from _lines(group, task, f"{pad}  ", known, below)  # type: ignore[arg-type]
            continue
        if default is MISSING:
            yield f"{comment}{field.name}: {_type(hint)}, required"
        else:
            yield f"{pad}{field.name}: {_yaml(default)}  # {_type(hint)}"
        for inner in configs_in(hint):  # of a group that is null, as comments
            below = f"{pad}#   "
            if inner in _groups(task):  # described elsewhere
                items = [f"{each.name}: {_yaml(_default(each))}" for each in fields(inner)]
                yield f"{below}{{{', '.join(items)}}}"
                continue
            if get_origin(hint) is dict:
                yield f"{below}NAME:"
                below += "  "
            yield from _lines(inner, task, below, known)


def _hints(config: type, task: type[TaskConfig]) -> dict[str, Any]:
    return {n: task if hint is TaskConfig else hint for n, hint in get_type_hints(config).items()}


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=math.inf)
    return text.split("\n")[0]


def _plain(value: Any) -> Any:
    """What YAML can hold of a value: groups as mappings, tuples as lists."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _type(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if is_dataclass(hint):
        return "these fields"
    if hint is type(None):
        return "null"
    names = [_type(part) for part in get_args(hint) if part is not Ellipsis]
    if get_origin(hint) in (list, tuple, dict):
        return f"{get_origin(hint).__name__}[{', '.join(names)}]"
    return " | ".join(names) or getattr(hint, "__name__", str(hint))


if __name__ == "__main__":
    print(page(), end="")
