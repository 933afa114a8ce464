"""Config dataclasses: their choices checked, and trees of them built from plain values.

The command line and `config.json` name choices as text, and so may a caller in Python; without a
check a pooling or position misspelt would silently become another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser

# What JSON may hold for a field of each type; any other leaves the class to check.
_PLAIN: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}

Config = TypeVar("Config")


def check_choices(config: object) -> None:
    """Checks every field whose type is a `Literal`; for the `__post_init__` of a config dataclass.

    Raises:
        ValueError: If a field holds none of its choices; the message names both.
    """
    for name, hint in get_type_hints(type(config)).items():
        choices = get_args(hint)
        if get_origin(hint) is Literal and getattr(config, name) not in choices:
            raise ValueError(
                f"{name} must be one of {', '.join(map(str, choices))}, "
                f"got {getattr(config, name)!r}"
            )


def check_finite(value: Any, name: str = "") -> None:
    """Checks that no number in a tree of configs, mappings and lists is NaN or infinite.

    Comparisons with NaN are false, so that limits like ``value <= 0`` let it pass.

    Args:
        value: The tree.
        name: Its own name, before those of its fields.

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


def config_from_dict(kind: type[Config], values: Any) -> Config:
    """Builds a tree of config dataclasses from plain values, as `asdict` and JSON leave them.

    Raises:
        TypeError: If a key is unknown or missing, or a plain value stands where keys belong.
        ValueError: If a field refuses its value.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} needs keys and values, got {values!r}")
    hints = get_type_hints(kind)
    if unknown := values.keys() - hints.keys():
        raise TypeError(f"unknown key {sorted(unknown)[0]!r} for {kind.__name__}")
    built = {}
    for name, value in values.items():
        hint = hints[name]
        if is_dataclass(hint):
            value = config_from_dict(hint, value)  # type: ignore[arg-type]
        elif hint in _PLAIN and not isinstance(value, _PLAIN[hint]):
            raise TypeError(f"{name} of {kind.__name__} must be {hint.__name__}, got {value!r}")
        check_finite(value, f"{name} of {kind.__name__}")
        built[name] = tuple(value) if isinstance(value, list) else value
    return kind(**built)


def descriptions(config: type) -> dict[str, str]:
    """What the docstrings of a config dataclass and its bases say of each field."""
    return {
        param.arg_name: " ".join((param.description or "").replace("`", "").split())
        for kind in reversed(config.__mro__)
        for param in docstring_parser.parse(kind.__doc__ or "").params
    }
