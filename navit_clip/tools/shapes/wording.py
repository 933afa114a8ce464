"""Puts a scene into short lower-case English: the second step of the `shapes` data set.

A full caption names every attribute of every object and the background, so it tells a scene from
all others with different attributes; a short caption leaves something out, as people do. Both
vary wording and order, and every relation they state is true of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from navit_clip.tools.shapes.scene import Attributes, PlacedObject, Scene, relation

Choice = TypeVar("Choice")

FULL_CAPTIONS = 3
TEMPLATES = ("a {}", "a picture of a {}")  # for zero-shot classification, as in `naming_caption`

SIZE_WORDS = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}
TEXTURE_NOUNS = {"striped": "with stripes", "dotted": "with dots", "checkered": "with checks"}
RELATION_PHRASES = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below", "under"),
}


def training_captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """`FULL_CAPTIONS` different full captions, one of colours and shapes alone, one other short."""
    # A dict as an ordered set.
    captions: dict[str, None] = {}
    while len(captions) < FULL_CAPTIONS:
        captions[full_caption(scene, rng)] = None
    captions[naming_caption(scene, rng)] = None
    while len(captions) < FULL_CAPTIONS + 2:
        captions[partial_caption(scene, rng)] = None
    return list(captions)


def full_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that names all attributes of all objects, and the background."""
    objects = _shuffled(scene.objects, rng)
    content = _content(objects, _full_phrases(objects, rng), rng)
    background = scene.background
    return _pick(
        (
            f"{content} on a {background} background",
            f"{content} on a {background} background",
            f"on a {background} background there is {content}",
            f"a {background} background with {content}",
            f"a picture of {content} on a {background} background",
        ),
        rng,
    )


def naming_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of colours and shapes alone.

    Among full captions, size, texture and background nearly always tell two pictures apart, and a
    model hardly has to look at shapes; here there is nothing else to go by.
    """
    objects = _shuffled(scene.objects, rng)
    content = _content(objects, [_phrase(o.attributes, ("colour",), rng) for o in objects], rng)
    return _pick((content, f"a picture of {content}"), rng)


def partial_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption that leaves out some attributes, objects or the background."""
    objects = _shuffled(scene.objects, rng)
    background = f"on a {scene.background} background"
    kind = rng.integers(3)
    if kind == 0:
        return f"a picture of {_content(objects, _full_phrases(objects, rng), rng)}"
    if kind == 1:
        named = _pick((("size", "colour"), ("colour",)), rng)
        phrases = [_phrase(o.attributes, named, rng) for o in objects]
        return f"{_content(objects, phrases, rng)} {background}"
    named = _pick((("colour",), ("texture", "colour")), rng)
    return f"{_phrase(objects[0].attributes, named, rng)} {background}"


def _full_phrases(objects: Sequence[PlacedObject], rng: np.random.Generator) -> list[str]:
    phrases = []
    for placed in objects:
        noun = TEXTURE_NOUNS.get(placed.attributes.texture)
        # Not with three objects: the caption would get longer than 30 words.
        if noun is not None and len(objects) < 3 and rng.random() < 0.25:
            phrases.append(f"{_phrase(placed.attributes, ('size', 'colour'), rng)} {noun}")
        else:
            phrases.append(_phrase(placed.attributes, ("size", "texture", "colour"), rng))
    return phrases


def _phrase(attributes: Attributes, named: Sequence[str], rng: np.random.Generator) -> str:
    """A noun phrase with its article and the attributes in `named`, such as "an orange ring"."""
    words = [getattr(attributes, name) for name in named] + [attributes.shape]
    if named[0] == "size":
        words[0] = _pick(SIZE_WORDS[attributes.size], rng)
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _content(
    objects: Sequence[PlacedObject], phrases: Sequence[str], rng: np.random.Generator
) -> str:
    """Joins the objects' phrases as a list, or by where they are if that is clear."""
    if len(objects) == 1:
        return phrases[0]
    first = relation(objects[0], objects[1])
    if first is None or rng.random() < 0.3:
        return f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    text = f"{phrases[0]} {_pick(RELATION_PHRASES[first], rng)} {phrases[1]}"
    if len(objects) == 2:
        return text
    second = relation(objects[0], objects[2])
    if second is None or second == first:
        return f"{text}, and {phrases[2]}"
    # The last phrase is the shortest: three objects and two long ones make more than 30 words.
    return f"{text} and {RELATION_PHRASES[second][-1]} {phrases[2]}"


def _shuffled(objects: Sequence[PlacedObject], rng: np.random.Generator) -> list[PlacedObject]:
    return [objects[i] for i in rng.permutation(len(objects))]


def _pick(options: Sequence[Choice], rng: np.random.Generator) -> Choice:
    return options[int(rng.integers(len(options)))]
