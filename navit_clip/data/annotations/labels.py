"""What the labels of a data set mean: class maps and label files.

A class map takes the data's own names for its classes, mostly folders, to indices of the classes
that a model chooses among. It is what makes 100 folders of ImageNet count right against ImageNet's
1,000 class names. `labelled` opens the data with it; `zeroshot` judges.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        if found is None and is_index(name) and not self._has_numbers:
            index = int(name)
            found = (index,) if not self.indices or index <= self._last else None
        return found

    @property
    def is_built_in(self) -> bool:
        """Whether it is known by name and comes from no file."""
        return self.name in _BUILT_IN

    @cached_property
    def _has_numbers(self) -> bool:
        return any(is_index(name) for name in self.indices)

    @cached_property
    def _last(self) -> int:
        return max((index for found in self.indices.values() for index in found), default=-1)


def unnamed_label(label: int, names: int) -> UserError:
    """The error for a class index past the class names."""
    return UserError(
        f"label {label} has no name: there are {names} class names; check --classnames and "
        "--class-map"
    )


def is_index(text: str) -> bool:
    """Whether a label is written as a class index."""
    return text.isascii() and text.isdigit()


@dataclass(frozen=True)
class Labeller:
    """One class index per image, though several may be right.

    Attributes:
        class_map: What the data's names mean; None takes them for indices.
        labels: Label by all right classes: one of them, different for each such set.
    """

    class_map: ClassMap | None = None
    labels: Mapping[tuple[int, ...], int] = field(default_factory=dict)

    @classmethod
    def of(cls, class_map: ClassMap, answers: Iterable[tuple[int, ...]]) -> Labeller:
        """Labels for sets of right classes.

        Args:
            class_map: Where they come from.
            answers: Each the right classes of some images.

        Raises:
            UserError: If every class of a set already stands for another set.
        """
        labels: dict[tuple[int, ...], int] = {}
        taken = set()
        for found in sorted(set(answers) - {()}, key=lambda answer: (len(answer), answer)):
            label = next((index for index in found if index not in taken), None)
            if label is None:
                raise UserError(
                    f"class map {class_map.name}: classes {', '.join(map(str, found))} are right "
                    "together for one class of the data and each for another one: leave one out"
                )
            taken.add(label)
            labels[found] = label
        return cls(class_map, labels)

    def __call__(self, written: str) -> int | None:
        """The label of a name or number, None if the class is left out.

        Raises:
            ValueError: If it is unknown.
        """
        if self.class_map is None:
            return int(written)
        found = self.class_map.find(written)
        if found is None:
            raise ValueError(f"{written!r} is not in class map {self.class_map.name}")
        # A number beside a map's names is a set of its own that no name has.
        return self.labels.get(found, found[0]) if found else None

    @property
    def right(self) -> dict[int, tuple[int, ...]]:
        """All right classes by label, of labels that have several."""
        return {label: found for found, label in self.labels.items() if len(found) > 1}


def load_class_map(name: str) -> ClassMap:
    """A class map by name or from a file.

    Args:
        name: ``imagenet`` (synset names such as n01440764, and numbers as ImageNet-V2's folders
            have, to the 1,000 classes), ``index`` (a folder's name is the index), or a file in one
            of these forms, told apart by content:

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
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith(("{", "[")):
            raise UserError(f"cannot read class map {name}: not JSON ({error})") from error
        indices = _from_lines(name, text)
    else:
        indices = _from_json(name, content)
    if not indices:
        raise UserError(f"class map {name} is empty")
    return ClassMap(name, indices)


def _by_place(name: str, folders: Sequence[str]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {folder: (i,) for i, folder in enumerate(folders)}
    if len(found) < len(folders):
        twice = next(f for i, f in enumerate(folders) if found[f] != (i,))
        raise UserError(f"class map {name} lists {twice!r} twice: give every class one place")
    return found


def _from_json(name: str, content: Any) -> dict[str, tuple[int, ...]]:
    if isinstance(content, list) and all(isinstance(folder, str) for folder in content):
        return _by_place(name, content)
    found: dict[str, tuple[int, ...]] = {}
    for key, value in content.items() if isinstance(content, dict) else [(None, content)]:
        values = value if isinstance(value, list) else [value]
        if key is not None and key.isdigit() and values and isinstance(values[0], str):
            found[values[0]] = (int(key),)
        elif key is not None and all(type(v) is int and v >= 0 for v in values):
            found[key] = tuple(sorted(set(values)))
        else:
            what = "it" if key is None else f"{key!r}"
            raise UserError(
                f"class map {name}: {what} is neither a class index nor a list of them: expected "
                '{"folder": 3, "other": [5, 7]}'
            )
    return found


def _from_lines(name: str, text: str) -> dict[str, tuple[int, ...]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if all(_SYNSET.match(line) for line in lines):
        synsets = [line.split()[0] for line in lines]
        if not all(_FOLDER_AND_INDICES.fullmatch(line) for line in lines):
            return _by_place(name, synsets)
    found: dict[str, tuple[int, ...]] = {}
    for number, line in enumerate(lines, 1):
        match = _FOLDER_AND_INDICES.fullmatch(line)
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
    text = read_text(path, "labels")
    found: dict[str, str] = {}
    for number, name, label in _label_rows(path, text):
        boxes = _BOXES.fullmatch(label)
        label = boxes[1] if boxes else label
        if found.setdefault(name, label) != label:
            raise UserError(
                f"labels {path}: line {number} labels {name} {label!r}, after {found[name]!r}: "
                "keep one of the two"
            )
    if not found:
        raise UserError(f"labels {path} is empty")
    return found


def _label_rows(path: str, text: str) -> Iterator[tuple[int, str, str]]:
    delimiter = {".csv": ",", ".tsv": "\t"}.get(Path(path).suffix.lower())
    if delimiter is not None:
        rows = list(enumerate(csv.reader(text.splitlines(), delimiter=delimiter), 1))
    else:
        rows = [(n, _split_line(line.strip())) for n, line in enumerate(text.splitlines(), 1)]
    for number, row in rows:
        if not any(row):
            continue
        if len(row) < 2 or not row[0].strip() or not row[1].strip():
            raise UserError(
                f"labels {path}: line {number} is {' '.join(row)[:60]!r}, expected an image and "
                "its label"
            )
        yield number, row[0].strip(), row[1].strip()


def _split_line(line: str) -> list[str]:
    match = _IMAGE_AND_LABEL.fullmatch(line)
    return list(match.groups()) if match else re.split(r"[\s,]+", line, maxsplit=1)


def read_text(path: str, what: str, names: str = "") -> str:
    """A text file's content.

    Args:
        path: The file, in UTF-8.
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
