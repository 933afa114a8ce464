"""What a run shows besides numbers: histograms, pictures, and examples with pictures.

A task makes them of a batch (`Task.examples`, `Task.drawing`), evaluations of what they found;
`navit_clip.training.loggers` passes them on.
"""

from __future__ import annotations

import io
from base64 import b64encode
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeAlias

import numpy as np
from PIL import Image

from navit_clip.evaluation.report.samples import Query, ReportSamples

_MOST_EXAMPLES = 24


@dataclass(frozen=True)
class Histogram:
    """Values of which the distribution is shown.

    Attributes:
        values: [N], at least one, finite.
    """

    values: np.ndarray


@dataclass(frozen=True)
class Drawing:
    """One picture.

    Attributes:
        picture: WebP.
    """

    picture: bytes


@dataclass(frozen=True)
class Example:
    """One image and what is to be read beside it.

    Attributes:
        picture: WebP, None where there is none.
        texts: By label.
    """

    picture: bytes | None
    texts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Examples:
    """Several, all with the same labels.

    Attributes:
        rows: At least one.
    """

    rows: tuple[Example, ...]


Media: TypeAlias = Histogram | Drawing | Examples


def webp(picture: Image.Image, most_side: int | None = None) -> bytes:
    """Encodes a picture, made smaller if a side has more than so many pixels."""
    if most_side and max(picture.size) > most_side:
        picture = picture.copy()
        picture.thumbnail((most_side, most_side))
    file = io.BytesIO()
    picture.save(file, format="WEBP", quality=80)
    return file.getvalue()


def data_uri(picture: bytes | None) -> str:
    """A WebP as an address in a page, empty without one."""
    return "" if picture is None else "data:image/webp;base64," + b64encode(picture).decode()


def nearest_captions(samples: ReportSamples) -> Examples | None:
    """Images of an evaluation with the captions or classes nearest to them, mistakes first."""
    queries = dict.fromkeys(chain(samples.images, samples.mistakes, samples.classified))
    chosen = sorted(queries, key=lambda query: query.hit)[:_MOST_EXAMPLES]
    return Examples(tuple(map(_example, chosen))) if chosen else None


def _example(query: Query) -> Example:
    right = next((match.text for match in query.matches if match.is_right), "")
    nearest = "; ".join(f"{match.score:.3f} {match.text}" for match in query.matches[:3])
    picture = query.picture.thumbnail if query.picture else None
    return Example(picture, {"right": query.text or right, "nearest": nearest})
