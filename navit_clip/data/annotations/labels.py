"""What the labels of a data set mean: class maps and label files.

A class map takes the data's own names for its classes, mostly folders, to indices of the classes
that a model chooses among. It is what makes 100 folders of ImageNet count right against ImageNet's
1,000 class names.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from navit_clip.data.annotations.class_names import index_of, read_places, read_text
from navit_clip.data.annotations.tables import read_lines
from navit_clip.data.decode import IMAGE_EXTENSIONS
from navit_clip.errors import UserError
from navit_clip.files import reading

_BUILT_IN = ("imagenet", "index")
_SYNSET = re.compile(r"n\d{8}")
# Several indices have a mark of their own between them: a folder may end in a number.
_FOLDER_AND_INDICES = re.compile(
    r"([^\t]*[^\s,])\t\s*(\d+(?:[\s,;]+\d+)*)|(.*?[^\s,])[\s,]+(\d+(?:\s*;\s*\d+)*)", re.ASCII
)
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
        found, index = self.indices.get(name), index_of(name)
        if found is None and index is not None:
            found = self.indices.get(str(index)) or ((index,) if index <= self._last else None)
        return found

    @property
    def is_built_in(self) -> bool:
        """Whether it is known by name and comes from no file."""
        return self.name in _BUILT_IN

    @cached_property
    def _last(self) -> float:
        """The last number that means the class of that index."""
        if any(index_of(name) is not None for name in self.indices):
            return -1
        indices = [index for found in self.indices.values() for index in found]
        return max(indices, default=-1) if self.indices else math.inf


def load_class_map(name: str) -> ClassMap:
    """A class map by name or from a file.

    Args:
        name: ``imagenet`` (synset names such as n01440764, and numbers as ImageNet-V2's folders
            have, to the 1,000 classes), ``index`` (a folder's name is the index), or a file in one
            of these forms, recognised by content:

            - JSON ``{"folder": 3, "other": [5, 7], "left out": []}``;
            - JSON ``{"0": ["n01440764", "tench"], …}``, the usual ``imagenet_class_index.json``;
            - JSON ``["n01440764", …]``: the folder of class 0, 1, …;
            - text lines ``folder 3`` or ``folder,5;7``, or a ``.csv`` or ``.tsv`` of these;
            - text lines that begin with a synset, as ``LOC_synset_mapping.txt``: line i is class i.

    Raises:
        UserError: If the file cannot be read, has none of these forms, or says two things of a
            folder.
    """
    if name == "imagenet":
        from timm.data import ImageNetInfo

        synsets = ImageNetInfo("imagenet-1k").label_names()
        return ClassMap(name, _by_place(name, synsets))
    if name == "index":
        return ClassMap(name)
    text = read_text(name, "class map", ", ".join(_BUILT_IN))
    if Path(name).suffix.lower() in (".csv", ".tsv"):
        indices = _from_table(name)
    elif text.lstrip().startswith(("{", "[")):
        with reading(f"class map {name}", ValueError, hint="; it is not JSON"):
            content = json.loads(text, object_pairs_hook=_Pairs)
        indices = _from_json(name, content)
    else:
        indices = _from_lines(name, text)
    if not indices:
        raise UserError(f"class map {name} is empty")
    return ClassMap(name, indices)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with all its keys: a dict would keep the last of two that are the same."""


def _collect(name: str, pairs: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for folder, indices in pairs:
        if found.setdefault(folder, indices) != indices:
            raise UserError(f"class map {name} lists {folder!r} twice: give every class one place")
    return found


def _by_place(name: str, folders: Sequence[str]) -> dict[str, tuple[int, ...]]:
    if "" in folders:
        raise UserError(
            f"class map {name}: place {folders.index('')} is empty, and every place is a class"
        )
    return _collect(name, ((folder, (index,)) for index, folder in enumerate(folders)))


def _from_json(name: str, content: Any) -> dict[str, tuple[int, ...]]:
    problem = 'is neither a class index nor a list of them: expected {"folder": 3, "other": [5, 7]}'
    if not isinstance(content, _Pairs):
        if isinstance(content, list) and all(isinstance(folder, str) for folder in content):
            return _by_place(name, content)
        raise UserError(f"class map {name}: it {problem}")
    found: list[tuple[str, tuple[int, ...]]] = []
    for key, value in content:
        values = value if type(value) is list else [value]
        index = index_of(key)
        if index is not None and values and isinstance(values[0], str):
            found.append((values[0], (index,)))
        elif all(type(v) is int and v >= 0 for v in values):
            found.append((key, tuple(sorted(set(values)))))
        else:
            raise UserError(f"class map {name}: {key!r} {problem}")
    return _collect(name, found)


def _from_table(name: str) -> dict[str, tuple[int, ...]]:
    found: list[tuple[str, tuple[int, ...]]] = []
    for number, (folder, *cells) in read_lines(Path(name)):
        words = re.split(r"[\s,;]+", ";".join(cells).strip("; "))
        indices = [index for word in words if (index := index_of(word)) is not None]
        if not indices and not found:
            continue  # the columns' names
        if not folder.strip() or "\n" in folder or len(indices) < len(words):
            raise UserError(_no_line(name, number, ", ".join([folder, *cells])))
        found.append((folder.strip(), tuple(sorted(set(indices)))))
    return _collect(name, found)


def _from_lines(name: str, text: str) -> dict[str, tuple[int, ...]]:
    lines = [line.strip() for line in text.split("\n")]
    matches = {n: _FOLDER_AND_INDICES.fullmatch(line) for n, line in enumerate(lines, 1) if line}
    if not all(matches.values()) and all(_SYNSET.match(lines[n - 1]) for n in matches):
        return _by_place(name, [line.split()[0] for line in read_places(name, "class map")])
    found = []
    for number, match in matches.items():
        if match is None:
            raise UserError(_no_line(name, number, lines[number - 1]))
        words = re.findall(r"[0-9]+", match[2] or match[4])
        if any(index_of(word) is None for word in words):
            raise UserError(_no_line(name, number, lines[number - 1]))
        found.append((match[1] or match[3], tuple(sorted(set(map(int, words))))))
    return _collect(name, found)


def _no_line(name: str, number: int, line: str) -> str:
    return (
        f"class map {name}: line {number} is {line[:60]!r}, expected a folder and its class index "
        "or indices, such as: folder 5;7"
    )


def read_label_file(path: str) -> dict[str, str]:
    """Images and their labels, as written.

    Args:
        path: Lines ``name.jpg label``, or a ``.csv`` or ``.tsv`` whose first two columns are these,
            with or without a line of columns' names. The label is a class index or a name.

    Returns:
        Label by image name, in the file's order; empty for an image that has none.

    Raises:
        UserError: If it cannot be read, is empty, labels nothing, or gives an image two labels.
    """
    text = read_text(path, "labels")
    if Path(path).suffix.lower() in (".csv", ".tsv"):
        rows = read_lines(Path(path))
    else:
        rows = ((n, _split_line(line)) for n, line in enumerate(text.split("\n"), 1))
    found: dict[str, str] = {}
    first = ""
    for number, row in rows:
        name, label = (word.strip() for word in [*row, "", ""][:2])
        if not name and not label:
            continue
        line = f"line {number} is {' '.join(row)[:60]!r}, expected an image and its label"
        first = first or line
        if not name or "\n" in name + label:  # a quote that is not closed in its line
            raise UserError(f"labels {path}: {line}")
        if boxes := _BOXES.fullmatch(label):
            label = boxes[1]
        name = os.path.normpath(name)
        if found.setdefault(name, label) != label:
            raise UserError(
                f"labels {path}: line {number} labels {name} {label!r}, after {found[name]!r}: "
                "keep one of the two"
            )
    if not found:
        raise UserError(f"labels {path} is empty")
    if not any(found.values()):
        raise UserError(f"labels {path}: no line has a label: {first}")
    return found


def _split_line(line: str) -> list[str]:
    match = _IMAGE_AND_LABEL.fullmatch(line.strip())
    return list(match.groups()) if match else re.split(r"[\s,]+", line.strip(), maxsplit=1)
