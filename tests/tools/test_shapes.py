"""The generated data set: true captions, recognisable pictures, clean splits."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from navit_clip.tools.shapes import scene as scenes
from navit_clip.tools.shapes.render import render
from navit_clip.tools.shapes.scene import BACKGROUNDS, COLOURS, Attributes, Description, Scene
from navit_clip.tools.shapes.wording import full_caption, training_captions
from navit_clip.tools.shapes.write_shapes import (
    retrieval_descriptions,
    retrieval_sample,
    train_sample,
    zeroshot_sample,
)

SIZE_OF = {"small": "small", "little": "small", "large": "large", "big": "large"}


TEXTURE_OF = {"stripes": "striped", "dots": "dotted", "checks": "checkered"}


OBJECT = re.compile(
    rf"an? (?:({'|'.join(SIZE_OF)}) )?(?:({'|'.join(scenes.TEXTURES)}) )?"
    rf"(?:({'|'.join(scenes.COLOURS)}) )?({'|'.join(scenes.SHAPES)})"
    rf"(?: with ({'|'.join(TEXTURE_OF)}))?"
)


STYLES = pytest.mark.parametrize("style", [scenes.EASY, scenes.HARD], ids=["easy", "hard"])


def sample_scenes(
    count: int, style: scenes.Style = scenes.EASY
) -> list[tuple[Scene, np.random.Generator]]:
    result = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        result.append((scenes.lay_out(scenes.sample_description(rng), rng, style), rng))
    return result


def mentioned(caption: str) -> list[tuple[str | None, str | None, str | None, str]]:
    return [
        (SIZE_OF.get(size), TEXTURE_OF.get(noun, texture or None), colour or None, shape)
        for size, texture, colour, shape, noun in OBJECT.findall(caption)
    ]


@STYLES
def test_objects_lie_inside_and_apart(style):
    for scene, _ in sample_scenes(1000, style):
        for o in scene.objects:
            assert o.side / 2 <= o.x <= scene.width - o.side / 2
            assert o.side / 2 <= o.y <= scene.height - o.side / 2
        for a, b in itertools.combinations(scene.objects, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > (a.side + b.side) / 2


@STYLES
def test_every_scene_of_several_objects_has_a_clear_relation(style):
    for scene, _ in sample_scenes(1000, style):
        pairs = list(itertools.combinations(scene.objects, 2))
        assert not pairs or any(scenes.relation(a, b) for a, b in pairs)


@STYLES
def test_image_sizes(style):
    drawn = [scene for scene, _ in sample_scenes(2000, style)]
    sides = np.array([(scene.width, scene.height) for scene in drawn])
    aspect = sides.max(axis=1) / sides.min(axis=1)
    assert sides.min() >= 48
    assert sides.max() <= style.max_side
    assert 0.9 * style.max_aspect < aspect.max() <= style.max_aspect
    assert 0.4 < (aspect > 1.2).mean() < 0.6
    assert 0.4 < (sides[:, 0] > sides[:, 1]).mean() < 0.6
    counts = Counter(len(scene.objects) for scene in drawn)
    shares = [counts[n] / len(drawn) for n in (1, 2, 3)]
    np.testing.assert_allclose(shares, scenes.OBJECT_COUNT_WEIGHTS, atol=0.04)


@STYLES
def test_small_and_large_do_not_meet(style):
    extents: dict[str, list[float]] = {"small": [], "large": []}
    for scene, _ in sample_scenes(500, style):
        for o in scene.objects:
            extents[o.attributes.size].append(o.side / (scene.width * scene.height) ** 0.5)
    assert min(extents["large"]) > 1.04 * max(extents["small"])


def test_full_captions_name_everything():
    for scene, rng in sample_scenes(500):
        expected = sorted(o.attributes for o in scene.objects)
        for _ in range(5):
            caption = full_caption(scene, rng)
            assert sorted(mentioned(caption)) == expected, caption
            assert f"{scene.background} background" in caption


def test_training_captions_are_several_short_and_different():
    for scene, rng in sample_scenes(500):
        captions = training_captions(scene, rng)
        assert len(set(captions)) == len(captions) == 5
        for caption in captions:
            assert 3 <= len(caption.split()) <= 30, caption
            assert caption == caption.lower()
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption), caption


def test_every_caption_is_true():
    for scene, rng in sample_scenes(500):
        for caption in training_captions(scene, rng):
            for background in scenes.BACKGROUNDS:
                if f"{background} background" in caption:
                    assert background == scene.background
            named = mentioned(caption)
            objects = []
            for words in named:
                fitting = [
                    o
                    for o in scene.objects
                    if all(
                        word in (None, actual)
                        for word, actual in zip(words, o.attributes, strict=True)
                    )
                ]
                assert fitting, caption
                objects.append(fitting)
            # Between the first two objects named stands their relation, if one is stated.
            gaps = OBJECT.split(caption)
            clean = [gaps[i] for i in range(0, len(gaps), OBJECT.groups + 1)]
            for number, text in enumerate(clean[1:-1], start=1):
                holds = {
                    "left of": lambda a, b: b.x - a.x > abs(a.y - b.y),
                    "right of": lambda a, b: a.x - b.x > abs(a.y - b.y),
                    "above": lambda a, b: b.y - a.y > abs(a.x - b.x),
                    "below": lambda a, b: a.y - b.y > abs(a.x - b.x),
                    "under": lambda a, b: a.y - b.y > abs(a.x - b.x),
                }
                for phrase, true in holds.items():
                    if phrase in text:
                        assert any(true(a, b) for a in objects[0] for b in objects[number]), caption


def nearest(pixel: np.ndarray, table: dict[str, tuple[int, int, int]]) -> str:
    return min(table, key=lambda name: np.abs(np.array(table[name]) - pixel).sum())


@pytest.mark.parametrize(("colour", "shape"), scenes.CLASSES)
def test_colours_can_be_read_from_the_picture(colour, shape):
    for background in scenes.BACKGROUNDS:
        rng = np.random.default_rng(0)
        description = Description(background, (Attributes("small", "plain", colour, shape),))
        scene = scenes.lay_out(description, rng)
        pixels = np.asarray(render(scene, rng)).astype(int)
        assert pixels.shape == (scene.height, scene.width, 3)
        placed = scene.objects[0]
        everything = {**BACKGROUNDS, **COLOURS}
        # The middle of a ring is background; its band lies at 0.8 of the radius.
        right = 0.4 * placed.side if shape == "ring" else 0.0
        assert nearest(pixels[int(placed.y), int(placed.x + right)], everything) == colour
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert nearest(np.median(edge, axis=0), everything) == background


def test_object_colours_contrast_with_backgrounds_and_each_other():
    for a, b in itertools.combinations({**BACKGROUNDS, **COLOURS}.values(), 2):
        if not (a in BACKGROUNDS.values() and b in BACKGROUNDS.values()):
            assert np.linalg.norm(np.subtract(a, b)) > 70


def test_textures_change_the_inside_of_an_object():
    for texture in scenes.TEXTURES:
        shares = []
        for seed in range(20):
            rng = np.random.default_rng(seed)
            attributes = Attributes("small", texture, "red", "square")
            scene = scenes.lay_out(Description("white", (attributes,)), rng)
            placed = scene.objects[0]
            reach = placed.side / 3
            box = (placed.x - reach, placed.y - reach, placed.x + reach, placed.y + reach)
            inside = np.asarray(render(scene, rng).crop(tuple(round(v) for v in box)))
            shares.append((inside[..., 0] < 160).mean())
        if texture == "plain":
            assert max(shares) == 0.0
        else:
            assert 0.1 < min(shares) < max(shares) < 0.9


def test_hard_marks_are_smaller_and_single_ones_fit_every_shape_of_image():
    """Else small or large, and the shape of the image, would say something of each other."""
    for number, easy in scenes.EASY.sides.items():
        hard = scenes.HARD.sides[number]
        assert all(hard[size][1] < 0.66 * easy[size][1] for size in scenes.SIZES)
    room = scenes.HARD.max_aspect**-0.5 - 2 * scenes.GAP
    assert scenes.HARD.sides[1]["large"][1] < room


def test_retrieval_captions_fit_one_picture_only():
    descriptions = list(itertools.islice(retrieval_descriptions(seed=0), 400))
    for a, b in itertools.permutations(descriptions, 2):
        if a.background == b.background:
            assert not set(a.objects) <= set(b.objects)
    assert {len(d.objects) for d in descriptions} == {1, 2, 3}


def test_held_out_combinations_are_not_in_training():
    for description in itertools.islice(retrieval_descriptions(seed=0), 200):
        assert description.is_reserved() == (len(description.objects) > 1)
    for index in range(300):
        objects = tuple(
            Attributes(*words) for words in mentioned(train_sample(0, index).captions[0])
        )
        for background in scenes.BACKGROUNDS:
            assert not Description(background, objects).is_reserved()


def test_reserved_does_not_depend_on_order_or_background():
    drawn = (scenes.sample_description(np.random.default_rng(seed)) for seed in itertools.count())
    description = next(d for d in drawn if len(d.objects) == 3)
    variants = {
        Description(background, objects).is_reserved()
        for background in scenes.BACKGROUNDS
        for objects in itertools.permutations(description.objects)
    }
    assert len(variants) == 1


def test_zeroshot_samples_show_their_class():
    for index, (colour, shape) in enumerate(scenes.CLASSES):
        sample = zeroshot_sample(0, index, 3)
        assert [words[2:] for words in mentioned(sample.captions[0])] == [(colour, shape)]


def test_a_sample_is_a_function_of_seed_split_and_index():
    assert train_sample(0, 7) == train_sample(0, 7)
    description = next(retrieval_descriptions(0))
    pictures = [
        train_sample(0, 7),
        train_sample(0, 8),
        train_sample(1, 7),
        zeroshot_sample(0, 0, 7),
        retrieval_sample(0, 7, description),
    ]
    assert len({picture.data for picture in pictures}) == len(pictures)
