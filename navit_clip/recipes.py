"""The recipes, configurations of whole runs, by their names.

They are the folder ``configs/`` of a checkout; a wheel has them beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from navit_clip.errors import UserError

_HERE = Path(__file__).parent
_SHIPPED, _CHECKOUT = _HERE / "recipes", _HERE.parent / "configs"


def recipe_names() -> list[str]:
    """Names of all recipes, such as ``navit_b16_webli`` and ``finetune_small/native``."""
    folder = _folder()
    found = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return sorted(name.as_posix() for name in found)


def find_recipe(name: str) -> Path:
    """The file that ``--config`` means.

    Args:
        name: A path, which wins, or a recipe's name, with or without ``.yaml``.

    Raises:
        UserError: If there is neither.
    """
    given = Path(name)
    if given.exists() and not given.is_dir():
        return given
    if name.removesuffix(".yaml") in recipe_names():
        return _folder() / f"{name.removesuffix('.yaml')}.yaml"
    raise UserError(
        f"--config {name}: neither a file nor one of the recipes {', '.join(recipe_names())}; "
        "paths of your own are accepted too"
    )


def with_recipe_paths(argv: Sequence[str]) -> list[str]:
    """Arguments with the path of each recipe that ``--config`` names.

    Raises:
        UserError: If ``--config`` names neither a file nor a recipe.
    """
    words = list(argv)
    for i, word in enumerate(words):
        if word.startswith("--config="):
            words[i] = f"--config={find_recipe(word.removeprefix('--config='))}"
        elif i and words[i - 1] == "--config":
            words[i] = str(find_recipe(word))
    return words


def _folder() -> Path:
    return _SHIPPED if _SHIPPED.is_dir() else _CHECKOUT
