"""Choosing one caption of a sample.

A sample may carry several: text members (``txt``, ``title.txt``) and JSON fields
(``json.captions``, a string or a list), each field with a weight, as WebLI has alternative text,
title and OCR. ``all`` is every caption of the image, counted once: `make_shards` and img2dataset
repeat in ``txt`` what the JSON holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from navit_clip.data.decode import describe_members
from navit_clip.data.seeding import draw_weighted
from navit_clip.errors import SkipSampleError

ALL = "all"
_ALL_FIELDS = ("json.captions", "json.caption", "txt")


def find_captions(members: Mapping[str, bytes], field: str) -> list[str]:
    """All non-empty captions in one field.

    Args:
        members: Content by extension.
        field: Extension of a text member, such as ``txt`` or ``title.txt``; ``json.FIELD`` for
            a field of the JSON member; or ``all`` for ``json.captions`` and what ``json.caption``
            and ``txt`` have besides.

    Raises:
        SkipSampleError: If the bytes are not UTF-8, or not JSON, or escape half a character.
    """
    if field == ALL:
        every: list[str] = []
        for part in _ALL_FIELDS:
            texts = find_captions(members, part)
            # Compared with other fields only: a caption that two people wrote stays twice.
            every += [text for text in texts if text not in every]
        return every
    is_json = field.startswith("json.")
    extension = "json" if is_json else field
    if extension not in members:
        return []
    try:
        text = members[extension].decode("utf-8")
        found = json.loads(text).get(field.removeprefix("json."), []) if is_json else text
        candidates = found if isinstance(found, list) else [found]
        captions = [c.strip() for c in candidates if isinstance(c, str) and c.strip()]
        # JSON may escape a lone surrogate, on which every tokenizer fails.
        "".join(captions).encode("utf-8")
    # ValueError: not UTF-8, not JSON, or a number of thousands of digits.
    except (ValueError, AttributeError, RecursionError) as error:
        raise SkipSampleError("bad_caption", f"{field}: {error}") from error
    return captions


def choose_caption(
    members: Mapping[str, bytes], weights: Mapping[str, float], rng: np.random.Generator
) -> str:
    """Draws one of the fields that have captions, by weight, then one of its captions uniformly.

    Raises:
        SkipSampleError: If no field has a caption, or one cannot be read.
    """
    found = {field: find_captions(members, field) for field in weights}
    present = [field for field, captions in found.items() if captions]
    if not present:
        raise SkipSampleError(
            "no_caption",
            f"none of {', '.join(weights)} has a caption; {describe_members(members)}",
        )
    field = present[0]
    if len(present) > 1:
        field = present[draw_weighted([weights[field] for field in present], rng)]
    captions = found[field]
    return captions[rng.integers(len(captions))] if len(captions) > 1 else captions[0]
