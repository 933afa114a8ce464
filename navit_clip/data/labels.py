"""Labels of a sample: what its ``.cls`` member or a field of its JSON says, as class indices."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from navit_clip.data.annotations.class_names import index_of
from navit_clip.errors import SkipSampleError


def find_labels(members: Mapping[str, bytes], field: str) -> list[int | str]:
    """Labels as they are written: numbers are class indices, texts names.

    Args:
        members: Content by extension.
        field: A text member such as ``cls``, with one label in each line; or ``json.FIELD``, a
            label or a list of them.

    Returns:
        None only for an empty list of the JSON, which says that no class is in the image.

    Raises:
        SkipSampleError: If there is no label (``no_label``), or something else (``bad_label``).
    """
    is_json = field.startswith("json.")
    extension = "json" if is_json else field
    try:
        text = members[extension].decode("utf-8").strip() if extension in members else ""
        found: Any = text.split("\n") if text else None
        if is_json and text:
            found = json.loads(text).get(field.removeprefix("json."))
    # ValueError: not UTF-8, not JSON, or a number of thousands of digits.
    except (ValueError, AttributeError, RecursionError) as error:
        raise SkipSampleError("bad_label", f"{field}: {error}") from error
    if found is None:
        what = field if is_json else f".{field} member with its class"
        raise SkipSampleError("no_label", f"no {what}; members: {', '.join(members)}")
    values = found if isinstance(found, list) else [found]
    return [_label(value, field, is_text=not is_json) for value in values]


def _label(value: Any, field: str, *, is_text: bool) -> int | str:
    if isinstance(value, str):
        value = value.strip()
        index = index_of(value) if is_text else None
        return value if index is None else index
    # pandas writes whole numbers as 3.0 where a column has gaps; Python's True is a number.
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if is_whole and not isinstance(value, bool):
        return int(value)
    raise SkipSampleError("bad_label", f"{field} holds {value!r}, no class index or name"[:120])


@dataclass(frozen=True)
class LabelReader:
    """Class indices of a sample; picklable, since it runs in data workers.

    Attributes:
        field: Where labels are, see `find_labels`.
        names: Of all classes, by index.
        single: Whether an image must have exactly one.
    """

    field: str
    names: tuple[str, ...]
    single: bool

    @cached_property
    def _indices(self) -> dict[str, int]:
        count = Counter(self.names)
        return {name: index for index, name in enumerate(self.names) if count[name] == 1}

    def __call__(self, members: Mapping[str, bytes]) -> np.ndarray:
        """int64 indices, rising, each once.

        Raises:
            SkipSampleError: If there is none where one is meant (``no_label``), one is unknown or
                past the list (``bad_label``), or there are several (``two_labels``).
        """
        found = {self._find(label) for label in find_labels(members, self.field)}
        if self.single and not found:
            raise SkipSampleError("no_label", f"{self.field} is an empty list")
        if self.single and len(found) > 1:
            names = ", ".join(self.names[index] for index in sorted(found))
            raise SkipSampleError(
                "two_labels", f"{self.field} has {names}, and output: softmax takes one"
            )
        return np.array(sorted(found), dtype=np.int64)

    def _find(self, label: int | str) -> int:
        # Names may be numbers: only a text that is none can be an index.
        index = self._indices.get(label) if isinstance(label, str) else label
        if index is None and isinstance(label, str):
            index = index_of(label)
        if index is None or not 0 <= index < len(self.names):
            raise SkipSampleError(
                "bad_label", f"{self.field} is {label!r}, none of the {len(self.names)} classes"
            )
        return index
