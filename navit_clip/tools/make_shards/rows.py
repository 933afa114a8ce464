"""The common form of every source that shards are made of: a list of images with captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One sample to be made.

    Attributes:
        name: Path of the image below the source's folder; empty if the source names none.
        captions: As the source has them, perhaps none or empty ones.
        label: Class index, None for captioned data.
    """

    name: str
    captions: tuple[str, ...]
    label: int | None = None


@dataclass(frozen=True)
class RowSource:
    """What shards are made of, in the source's order.

    Attributes:
        images: The folder that the rows' names are relative to.
        rows: One per sample.
        classnames: Class names by label, none for captioned data.
        notes: What the user should know about how the source was read.
    """

    images: Path
    rows: Sequence[Row]
    classnames: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    def digest(self) -> str:
        """SHA-256 of all rows: the same however the file that named them was written."""
        found = hashlib.sha256()
        for row in self.rows:
            found.update(json.dumps(astuple(row)).encode() + b"\n")
        return found.hexdigest()
