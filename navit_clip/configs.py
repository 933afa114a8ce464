"""The check that a configuration's choices are among those its types allow.

The command line and `config.json` name choices as text, and so may a caller in Python; without a
check a pooling or position misspelt would silently become another.
"""

from __future__ import annotations

from typing import Literal, get_args, get_origin, get_type_hints


def check_choices(config: object) -> None:
    """Checks every field of a config dataclass whose type is a `Literal`.

    Args:
        config: The dataclass instance; called from its `__post_init__`.

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
