"""What the labels of a data set mean: class maps and label files.

A class map takes the data's own names for its classes, mostly folders, to indices of the classes
that a model chooses among. It is what makes 100 folders of ImageNet count right against ImageNet's
1,000 class names.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from navit_clip.data.decode import IMAGE_EXTENSIONS
from navit_clip.errors import UserError
from navit_clip.files import reading

_BUILT_IN = ("imagenet", "index")
_SYNSET = re.compile(r"n\d{8}")
_FOLDER_AND_INDICES = re.compile(r"(.+?)[\s,]+(\d+(?:[\s,;]+\d+)*)")
_IMAGE_AND_LABEL = re.compile(rf"(.+\.(?:{'|'.join(IMAGE_EXTENSIONS)}))[\s,]+(\S.*)", re.IGNORECASE)
# A synset with the corners of boxes, as in the label file of ImageNet's localisation challenge.
_BOXES = re.compile(r"(n\d{8})(?: -?\d+)+")


@dataclass(frozen=True)
class ClassMap:
    """Class indices by the data's own names of its classes.

    A name that the map lacks and that is a number means the class of that index, unless the map
    has numbers among its names: then another number is a mistake.

    Attributes:
        name: File or built-in name, for messages.
        indices: Class indices that are right for each name, several where a broad class of the
            data covers several; none leaves the class out.
    """

    name: str
    indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def find(self, name: str) -> tuple[int, ...] | None:
        """Class indices that are right for a name, None if the map does not know it."""
        found = self.indices.get(name)
        if found is None and is_index(name) and int(name) <= self._last:
            found = (int(name),)
        return found

    @property
    def is_built_in(self) -> bool:
        """Whether it is known by name and comes from no file."""
        return self.name in _BUILT_IN

    @cached_property
    def _last(self) -> float:
        """The last number that means the class of that index."""
        if any(map(is_index, self.indices)):
            return -1
        indices = [index for found in self.indices.values() for index in found]
        return max(indices, default=-1) if self.indices else math.inf


def is_index(text: str) -> bool:
    """Whether a label is written as a class index."""
    return text.isascii() and text.isdigit()


def load_class_map(name: str) -> ClassMap:
    """A class map by name or from a file.

    Args:
        name: ``imagenet`` (synset names such as n01440764, and numbers as ImageNet-V2's folders
            have, to the 1,000 classes), ``index`` (a folder's name is the index), or a file in one
            of these forms, recognised by content:

            - JSON ``{"folder": 3, "other": [5, 7], "left out": []}``;
            - JSON ``{"0": ["n01440764", "tench"], …}``, the usual ``imagenet_class_index.json``;
            - JSON ``["n01440764", …]``: the folder of class 0, 1, …;
            - text lines ``folder 3`` or ``folder,5;7``;
            - text lines that begin with a synset, as ``LOC_synset_mapping.txt``: line i is class i.

    Raises:
        UserError: If the file cannot be read or has none of these forms.
    """
    if name == "imagenet":
        from timm.data import ImageNetInfo

        synsets = ImageNetInfo("imagenet-1k").label_names()
        return ClassMap(name, _by_place(name, synsets))
    if name == "index":
        return ClassMap(name)
    text = read_text(name, "class map", ", ".join(_BUILT_IN))
    if text.lstrip().startswith(("{", "[")):
        with reading(f"class map {name}", ValueError, RecursionError, hint="; it is not JSON"):
            indices = _from_json(name, json.loads(text))
    else:
        indices = _from_lines(name, [line.strip() for line in text.splitlines() if line.strip()])
    if not indices:
        raise UserError(f"class map {name} is empty")
    return ClassMap(name, indices)


def _by_place(name: str, folders: Sequence[str]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for index, folder in enumerate(folders):
        if found.setdefault(folder, (index,)) != (index,):
            raise UserError(f"class map {name} lists {folder!r} twice: give every class one place")
    return found


def _from_json(name: str, content: Any) -> dict[str, tuple[int, ...]]:
    if isinstance(content, list) and all(isinstance(folder, str) for folder in content):
        return _by_place(name, content)
    problem = 'is neither a class index nor a list of them: expected {"folder": 3, "other": [5, 7]}'
    if not isinstance(content, dict):
        raise UserError(f"class map {name}: it {problem}")
    found: dict[str, tuple[int, ...]] = {}
    for key, value in content.items():
        values = value if isinstance(value, list) else [value]
        if key.isdigit() and values and isinstance(values[0], str):
            found[values[0]] = (int(key),)
        elif all(type(v) is int and v >= 0 for v in values):
            found[key] = tuple(sorted(set(values)))
        else:
            raise UserError(f"class map {name}: {key!r} {problem}")
    return found


def _from_lines(name: str, lines: Sequence[str]) -> dict[str, tuple[int, ...]]:
    matches = [_FOLDER_AND_INDICES.fullmatch(line) for line in lines]
    if not all(matches) and all(map(_SYNSET.match, lines)):
        return _by_place(name, [line.split()[0] for line in lines])
    found: dict[str, tuple[int, ...]] = {}
    for number, (line, match) in enumerate(zip(lines, matches, strict=True), 1):
        if match is None:
            raise UserError(
                f"class map {name}: line {number} is {line[:60]!r}, expected a folder and its "
                "class index or indices"
            )
        found[match[1]] = tuple(sorted({int(word) for word in re.findall(r"\d+", match[2])}))
    return found


def read_label_file(path: str) -> dict[str, str]:
    """Images and their labels, as written.

    Args:
        path: Lines ``name.jpg label``, or a ``.csv`` or ``.tsv`` whose first two columns are these,
            with or without a line of columns' names. The label is a class index or a name.

    Returns:
        Label by image name, in the file's order.

    Raises:
        UserError: If it cannot be read, is empty, or gives an image two labels.
    """
    lines = read_text(path, "labels").splitlines()
    delimiter = {".csv": ",", ".tsv": "\t"}.get(Path(path).suffix.lower())
    rows = csv.reader(lines, delimiter=delimiter) if delimiter else map(_split_line, lines)
    found: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        name, label = (word.strip() for word in [*row, "", ""][:2])
        if not any(row):
            continue
        if not name or not label:
            raise UserError(
                f"labels {path}: line {number} is {' '.join(row)[:60]!r}, expected an image and "
                "its label"
            )
        if boxes := _BOXES.fullmatch(label):
            label = boxes[1]
        if found.setdefault(name, label) != label:
            raise UserError(
                f"labels {path}: line {number} labels {name} {label!r}, after {found[name]!r}: "
                "keep one of the two"
            )
    if not found:
        raise UserError(f"labels {path} is empty")
    return found


def _split_line(line: str) -> list[str]:
    match = _IMAGE_AND_LABEL.fullmatch(line.strip())
    return list(match.groups()) if match else re.split(r"[\s,]+", line.strip(), maxsplit=1)


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
    with reading(f"{what} {path}", UnicodeDecodeError, hint=hint):
        text = Path(path).read_text(encoding="utf-8-sig")
    if not text.strip():
        raise UserError(f"{what} {path} is empty")
    return text
