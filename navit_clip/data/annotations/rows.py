"""The common form of annotated images, whatever file names them: one row per image."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One image.

    Attributes:
        name: Path of the image below the folder of images; empty if the file names none.
        captions: As the file has them, perhaps none or empty ones; None for what is no text.
        label: Class index, None for captioned data.
        split: The split that Karpathy's file puts it in; other files have none.
        sidecars: Extensions of the files beside the image that hold what is known of it, such as
            ``txt``, perhaps none; None if it stands here.
    """

    name: str
    captions: tuple[str | None, ...]
    label: int | None = None
    split: str | None = None
    sidecars: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ImageList:
    """Images of one file or folder, in its order.

    Attributes:
        folder: The folder that the rows' names are relative to.
        rows: One per image.
        classnames: Class names by label, none for captioned data.
        notes: What the user should know about how the file was read.
        skipped: What lies there and is none of the images, by reason.
        skips: The first few of these, described.
    """

    folder: Path
    rows: Sequence[Row]
    classnames: Sequence[str] = ()
    notes: Sequence[str] = ()
    skipped: Mapping[str, int] = field(default_factory=Counter)
    skips: Sequence[str] = ()

    def digest(self) -> str:
        """SHA-256 of all rows: the same however the file that named them was written."""
        found = hashlib.sha256()
        for row in self.rows:
            beside = [row.sidecars] if row.sidecars is not None else []
            line = json.dumps([row.name, row.captions, row.label, *beside])
            found.update(line.encode() + b"\n")
        return found.hexdigest()


def merge_rows(rows: Iterable[Row]) -> list[Row]:
    """Captioned rows, those of the same image, split and label made one with all their captions.

    An image that stood there once per caption would be its own negative. Rows that name no image
    come last, one by one, to be counted as skipped.
    """
    found: dict[tuple[str, str | None, int | None], list[str | None]] = {}
    nameless = []
    for row in rows:
        if row.name:
            found.setdefault((row.name, row.split, row.label), []).extend(row.captions)
        else:
            nameless.append(row)
    merged = [
        Row(name, tuple(texts), label, split) for (name, split, label), texts in found.items()
    ]
    return merged + nameless


def to_text(value: Any) -> str | None:
    """A name or caption as a file has it: a missing one is empty, None is returned for no text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    is_text = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    return str(value) if is_text else None


def usable_captions(captions: Iterable[str | None]) -> tuple[tuple[str, ...], Counter[str]]:
    """Captions that can be read, stripped, a repeated one as often as it stands there.

    Returns:
        Them, and how many others there were: ``empty_caption``, or ``bad_caption`` for what is no
        text or not UTF-8.
    """
    usable, skipped = [], Counter[str]()
    for caption in captions:
        try:
            # JSON may escape a lone surrogate, on which every tokenizer fails.
            text = None if caption is None else caption.strip().encode().decode()
        except UnicodeEncodeError:
            text = None
        if text:
            usable.append(text)
        else:
            skipped["bad_caption" if text is None else "empty_caption"] += 1
    return tuple(usable), skipped
