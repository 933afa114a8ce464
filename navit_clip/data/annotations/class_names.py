"""Which name belongs to which class, where a place in a list decides it.

A file of names says nothing but an order, and folders have several: by bytes, by their numbers, as
a file manager shows them. Names and classes are paired only where all of these agree.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from navit_clip.errors import UserError
from navit_clip.files import reading

CLASSNAMES = "classnames.txt"  # written by make_shards beside shards of class folders

_INDEX = re.compile(r"[0-9]{1,9}(?:\.0*)?")
_NUMBERED = re.compile(r"([0-9]{1,9})[\s.:,;)]+\S.*")


def index_of(text: str) -> int | None:
    """The class index that a label is, ``3`` or as pandas writes it ``3.0``; None if it is none."""
    return int(text.partition(".")[0]) if _INDEX.fullmatch(text) else None


def spaced(name: str) -> str:
    """A class's name as people write it: many folders have underscores for its spaces."""
    return name.replace("_", " ")


def unique_names(names: Sequence[str]) -> list[str]:
    """Names with their index where there are several alike: ImageNet has two missiles."""
    count = Counter(names)
    return [n if count[n] == 1 else f"{n} ({i})" for i, n in enumerate(names)]


def read_text(path: str, what: str, names: str = "") -> str:
    """The content of a text file in UTF-8.

    Args:
        path: The file.
        what: It is, for messages.
        names: What could have been given instead of a file, for messages.

    Raises:
        UserError: If it cannot be read or is empty.
    """
    hint = f"; expected {names} or a text file in UTF-8" if names else ""
    # ValueError: not UTF-8, or a path with a zero byte.
    with reading(f"{what} {path}", ValueError, hint=hint):
        text = Path(path).read_text(encoding="utf-8-sig")
    if not text.strip():
        raise UserError(f"{what} {path} is empty")
    return text


def read_places(path: str, what: str, names: str = "") -> list[str]:
    """The lines of a file in which line i stands for class i, stripped.

    Raises:
        UserError: If it cannot be read, is empty, or has a blank line before its last one: either
            a class without a name, or no class at all.
    """
    # Not `splitlines`: to a class name, U+2028 or a form feed is one more character.
    lines = [line.strip() for line in read_text(path, what, names).rstrip().split("\n")]
    if "" in lines:
        raise UserError(
            f"{what} {path}: line {lines.index('') + 1} is blank, and every line is the name of "
            "the class at its place: fill it in or delete it"
        )
    return lines


def names_beside(shard: str) -> list[str] | None:
    """Class names that lie beside a shard, by index; None if there are none.

    Raises:
        UserError: If the file cannot be read, or has a blank line.
    """
    file = Path(shard).with_name(CLASSNAMES)
    return read_places(str(file), "class names") if file.is_file() else None


def read_class_names(path: str, folders: Sequence[str] | None, names: str = "") -> list[str]:
    """Class names, by index, from a file with one per line.

    Args:
        path: The file.
        folders: The data's own names of its classes in index order, None if labels are indices.
        names: What could have been given instead, for messages.

    Raises:
        UserError: If the file cannot be read, or its lines cannot be proved to be the classes'.
    """
    found = read_places(path, "class names", names)
    matches = [_NUMBERED.fullmatch(line) for line in found]
    numbers = [int(match[1]) for match in matches if match]
    for first in (0, 1):
        expected = list(range(first, first + len(found)))
        is_certain = numbers == expected and (folders is not None or not first)
        if len(found) > 2 and sorted(numbers) == expected and not is_certain:
            raise UserError(
                f"class names {path}: its lines are numbered, and not 0, 1, 2, … as the classes "
                "are: give the names alone, one per line in the order of the classes"
            )
    if folders is not None:
        _check_places(found, folders, path)
    return found


def _check_places(names: Sequence[str], folders: Sequence[str], path: str) -> None:
    """A `UserError` unless name i is the one of class i."""
    if len(names) != len(folders):
        raise UserError(
            f"{len(names)} class names for {len(folders)} class folders or labels: {path} has "
            f"{len(names)} names; give one for each, in their sorted order, or --class-map"
        )
    own = [_letters(folder) for folder in folders]
    found = [_letters(name) for name in names]
    if found == own:
        return
    for place, (name, folder) in enumerate(zip(found, own, strict=True)):
        if name != folder and name in own:
            raise UserError(
                f"class names {path}: line {place + 1} is {names[place]!r}, the place of "
                f"{folders[place]!r}: order the names as their classes, which are sorted by bytes"
            )
    orders: tuple[Callable[[str], str], ...] = (str.casefold, _letters, _natural)
    for key in orders:
        if (other := sorted(folders, key=key)) != list(folders):
            place = next(i for i, folder in enumerate(folders) if folder != other[i])
            what = "numbers" if all(map(str.isdecimal, folders)) else "names"
            raise UserError(
                f"class folders or labels are {what} that sort as {', '.join(folders[:3])}, …: "
                f"whether line {place + 1} of {path} means {folders[place]!r} or {other[place]!r} "
                'is uncertain: define the classes with --class-map index, or a JSON {"folder": 3}'
            )


def _letters(text: str) -> str:
    """As a file manager compares names: without case, spaces and signs."""
    return "".join(filter(str.isalnum, text.casefold()))


def _natural(text: str) -> str:
    """For an order in which 2 comes before 10."""
    return re.sub("[0-9]+", lambda number: number[0].zfill(32), text)
