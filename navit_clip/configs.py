"""Config dataclasses: their choices checked, and trees of them built from plain values.

The command line and `config.json` name choices as text, and so may a caller in Python; without a
check a pooling or position misspelt would silently become another. Made with a field that is empty
or out of range, every config raises a `ValueError` that names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser

# What JSON may hold for a field of each type; any other leaves the class to check.
_PLAIN: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
# jsonargparse's words for Python's types, groups that may be null, and plain values for groups.
_PARSER_NOISE = (
    (r"<class '([\w.]+)'>", r"\1"),
    (r"a typing\.Literal", "one of "),
    (r"Problem with given class_path '[\w.]+':\s*", ""),
    (r"Does not validate .*?Errors:\s+- (.*?)\s+- Expected a NoneType.*Given v", r"\1. Given v"),
    (r"Not a valid subclass of (\w+)\. (Got value: [^\n]*)\n.*", r"Expected fields of \1. \2"),
)

Config = TypeVar("Config")

# Annotations are text, which takes long to evaluate.
_hints: Callable[[type], dict[str, Any]] = cache(get_type_hints)


def check_choices(config: object) -> None:
    """Checks every field whose type is a `Literal`; for the `__post_init__` of a config dataclass.

    Raises:
        ValueError: If a field holds none of its choices; the message names both.
    """
    for name, hint in _hints(type(config)).items():
        choices = get_args(hint)
        if get_origin(hint) is Literal and getattr(config, name) not in choices:
            raise ValueError(
                f"{name} must be one of {', '.join(map(str, choices))}, "
                f"got {getattr(config, name)!r}"
            )


def check_finite(value: Any, name: str = "") -> None:
    """Checks that no number in a tree of configs, mappings and lists is NaN or infinite.

    Comparisons with NaN are false, so that limits like ``value <= 0`` let it pass. `name` begins
    the paths.

    Raises:
        ValueError: Naming the first such number by its full path.
    """
    for path, leaf in leaves(value, name):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ValueError(f"{path} must be a finite number, got {leaf}")


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Full path and value of each leaf in a tree of configs, mappings and lists.

    Args:
        value: The tree.
        name: Its own name, before those of its fields.
    """
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, item in value.items():
        yield from leaves(item, f"{name}.{key}" if name else str(key))


def config_from_dict(kind: type[Config], values: Any, name: str = "") -> Config:
    """Builds a tree of config dataclasses from plain values, as `asdict` and JSON leave them.

    A config names its own field first in what it refuses; the path before it is added here.

    Args:
        kind: The class at the root.
        values: Of its fields, by name.
        name: Path of the root, such as ``task.model``.

    Raises:
        TypeError: If a key is unknown or missing, or a plain value stands where keys belong.
        ValueError: If a field refuses its value. Both name the field by its full path.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{name or kind.__name__} needs keys and values, got {values!r}")
    hints, prefix = _hints(kind), f"{name}." if name else ""
    if unknown := values.keys() - hints.keys():
        raise TypeError(f"unknown key {prefix}{sorted(unknown)[0]}")
    built = {key: _built(hints[key], value, prefix + key) for key, value in values.items()}
    try:
        return kind(**built)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error
    except TypeError as error:
        raise TypeError(f"{name or kind.__name__}: {error}") from error


def _built(hint: Any, value: Any, name: str) -> Any:
    """The value of a field of this type."""
    inner = next(configs_in(hint), None)
    if inner is not None and value is not None and not isinstance(value, inner):
        if get_origin(hint) is not dict:
            return config_from_dict(inner, value, name)
        if isinstance(value, dict):
            return {
                key: config_from_dict(inner, item, f"{name}.{key}") for key, item in value.items()
            }
    if hint in _PLAIN and not isinstance(value, _PLAIN[hint]):
        raise TypeError(f"{name} must be {hint.__name__}, got {value!r}")
    check_finite(value, name)
    return tuple(value) if get_origin(hint) is tuple and isinstance(value, list) else value


def configs_in(hint: Any) -> Iterator[type]:
    """Config dataclasses in the type of a field, such as that of ``dict[str, DatasetConfig]``."""
    if is_dataclass(hint):
        yield hint  # type: ignore[misc]
    for part in get_args(hint):
        yield from configs_in(part)


def parser_message(error: Exception, name: str = "") -> str:
    """What jsonargparse refuses, with the full path of the field and without classes of Python.

    Args:
        error: As it was raised.
        name: Path of what was parsed, such as ``eval.evaluators.coco``.
    """
    message = str(error)
    for pattern, plain in _PARSER_NOISE:
        message = re.sub(pattern, plain, message, flags=re.DOTALL)
    path = re.match(r'((Parser key )?"[\w.]+":\s+)+', message)
    keys = re.findall(r'"([\w.]+)"', path[0]) if path else []
    where = ".".join([name, *keys] if name else keys)
    return f"{where}: {message[path.end() if path else 0 :]}" if where else message


def descriptions(config: type) -> dict[str, str]:
    """What the docstrings of a config dataclass and its bases say of each field."""
    return {
        param.arg_name: " ".join((param.description or "").replace("`", "").split())
        for kind in reversed(config.__mro__)
        for param in docstring_parser.parse(kind.__doc__ or "").params
    }
