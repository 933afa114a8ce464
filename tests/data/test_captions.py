"""Captions of a sample: found in its members, refused when unreadable, drawn by weight."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from shard_factory import as_json

from navit_clip.data.captions import choose_caption, find_captions
from navit_clip.errors import SkipSampleError
from navit_clip.tasks.contrastive import ContrastiveConfig


def test_captions_of_a_member_and_of_json_fields():
    members = {
        "txt": b"  one caption\n",
        "text": "Grüße aus Köln".encode(),
        "json": as_json(captions=[" a ", "", "  ", "b", 3, None], title="t", width=640, url=None),
    }
    assert find_captions(members, "txt") == ["one caption"]
    assert find_captions(members, "text") == ["Grüße aus Köln"]
    assert find_captions(members, "json.captions") == ["a", "b"]
    assert find_captions(members, "json.title") == ["t"]
    for absent in ("json.width", "json.url", "json.none", "cls", "cls.field"):
        assert find_captions(members, absent) == []


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        # As make_shards writes them: the first one twice, but one caption.
        ({"txt": b"a", "json": as_json(captions=["a", "b"], title="t")}, ["a", "b"]),
        ({"txt": b"a", "json": as_json(caption="a", url="u", key="k")}, ["a"]),  # img2dataset
        ({"txt": b"x", "json": as_json(captions=["a", " b "])}, ["a", "b", "x"]),
        ({"txt": b"x"}, ["x"]),
        ({"json": as_json(captions=["a", "b", "a"])}, ["a", "b", "a"]),
        ({"title.txt": b"x"}, []),
    ],
)
def test_all_captions_of_an_image_are_each_counted_once(members, expected):
    assert find_captions(members, "all") == expected


def test_by_default_every_caption_of_a_sample_is_drawn_alike():
    members = {"txt": b"0", "json": as_json(captions=list("01234"))}
    found = frequencies(members, ContrastiveConfig().captions)
    assert_frequencies(found, dict.fromkeys("01234", 1 / 5))


@pytest.mark.parametrize(
    ("field", "members"),
    [
        ("txt", {"txt": b"\xff\xfe caption"}),
        ("json.a", {"json": b"\xff{}"}),
        ("json.a", {"json": b"{"}),
        ("json.a", {"json": b""}),
        ("json.a", {"json": b"[1, 2]"}),
        ("json.a", {"json": b'"text"'}),
        ("json.a", {"json": b'{"a": ' + b"1" * 5000 + b"}"}),
        ("json.a", {"json": b"[" * 100_000}),
        ("json.a", {"json": b'{"a": "half a \\ud83d character"}'}),
    ],
)
def test_unreadable_captions_are_refused_with_their_field(field, members):
    with pytest.raises(SkipSampleError) as caught:
        find_captions(members, field)
    assert caught.value.reason == "bad_caption"
    assert field in str(caught.value)


@pytest.mark.parametrize("members", [{}, {"txt": b""}, {"txt": b" \n"}, {"json": b'{"txt": "x"}'}])
def test_a_sample_without_a_caption(members):
    with pytest.raises(SkipSampleError) as caught:
        choose_caption(members, {"txt": 1.0, "json.alt": 1.0}, np.random.default_rng(0))
    assert caught.value.reason == "no_caption"
    assert "txt, json.alt" in str(caught.value)


def frequencies(members, weights, draws=8000):
    rng = np.random.default_rng(0)
    counts = Counter(choose_caption(members, weights, rng) for _ in range(draws))
    return {caption: n / draws for caption, n in counts.items()}


def assert_frequencies(found, expected, draws=8000):
    assert set(found) == set(expected)
    for caption, p in expected.items():
        assert abs(found[caption] - p) < 4 * math.sqrt(p * (1 - p) / draws)


MEMBERS = {"txt": b"alt", "json": as_json(ocr=["x", "y"], title="title")}


def test_fields_are_drawn_by_weight_and_captions_evenly_within():
    found = frequencies(MEMBERS, {"txt": 3.0, "json.ocr": 2.0, "json.title": 1.0})
    assert_frequencies(found, {"alt": 3 / 6, "x": 1 / 6, "y": 1 / 6, "title": 1 / 6})


def test_absent_fields_leave_their_weight_to_the_others():
    found = frequencies(MEMBERS, {"txt": 3.0, "json.none": 100.0, "json.title": 1.0})
    assert_frequencies(found, {"alt": 3 / 4, "title": 1 / 4})


def test_the_same_generator_draws_the_same_captions():
    weights = {"txt": 1.0, "json.ocr": 1.0}
    draws = [
        [choose_caption(MEMBERS, weights, rng) for _ in range(30)]
        for rng in (np.random.default_rng(3), np.random.default_rng(3))
    ]
    assert draws[0] == draws[1]
