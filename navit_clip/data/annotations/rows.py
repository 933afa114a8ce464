"""The common form of annotated images, whatever file names them: one row per image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One image.

    Attributes:
        name: Path of the image below the folder of images; empty if the file names none.
        captions: As the file has them, perhaps none or empty ones.
        label: Class index, None for captioned data.
        split: The split that Karpathy's file puts it in; other files have none.
    """

    name: str
    captions: tuple[str, ...]
    label: int | None = None
    split: str | None = None


@dataclass(frozen=True)
class ImageList:
    """Images of one file or folder, in its order.

    Attributes:
        folder: The folder that the rows' names are relative to.
        rows: One per image.
        classnames: Class names by label, none for captioned data.
        notes: What the user should know about how the file was read.
    """

    folder: Path
    rows: Sequence[Row]
    classnames: Sequence[str] = ()
    notes: Sequence[str] = ()

    def digest(self) -> str:
        """SHA-256 of all rows: the same however the file that named them was written."""
        found = hashlib.sha256()
        for row in self.rows:
            found.update(json.dumps([row.name, row.captions, row.label]).encode() + b"\n")
        return found.hexdigest()


def merge_rows(rows: Iterable[Row]) -> list[Row]:
    """Captioned rows, those of the same image and split made one with all their captions.

    An image that stood there once per caption would be its own negative.
    """
    found: dict[tuple[str, str | None], list[str]] = {}
    for row in rows:
        found.setdefault((row.name, row.split), []).extend(row.captions)
    return [Row(name, tuple(captions), split=split) for (name, split), captions in found.items()]
