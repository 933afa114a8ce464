"""Labels of samples: indices and names, one or several, and what is none."""

import json
import pickle

import pytest

from navit_clip.data.labels import LabelReader
from navit_clip.errors import SkipSampleError

NAMES = ("dog", "cat", "0", "old bird", "twin", "twin")


def members(written, field):
    if field == "cls":
        return {} if written is None else {"cls": written}
    return {"json": json.dumps({} if written is None else {"label": written}).encode()}


@pytest.mark.parametrize(
    ("field", "written", "expected"),
    [
        ("cls", b"1", [1]),
        ("cls", b" 3.0\n", [3]),  # as pandas writes it
        ("cls", b"old bird", [3]),
        ("cls", b"0", [0]),  # a number is an index, whatever the names
        ("cls", b"cat\n0\ncat", [0, 1]),
        ("json.label", 1, [1]),
        ("json.label", 5.0, [5]),
        ("json.label", "0", [2]),  # a text is a name first
        ("json.label", "4", [4]),
        ("json.label", ["cat", "dog", 3], [0, 1, 3]),
        ("json.label", [], []),
    ],
)
def test_labels_that_are_read(field, written, expected):
    read = pickle.loads(pickle.dumps(LabelReader(field, NAMES, single=False)))
    assert read(members(written, field)).tolist() == expected


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(
    ("field", "written", "reason"),
    [
        ("cls", None, "no_label"),
        ("cls", b"", "no_label"),
        ("cls", b"6", "bad_label"),  # past the list
        ("cls", b"-1", "bad_label"),
        ("cls", b"twin", "bad_label"),  # of two classes
        ("cls", b"\xff", "bad_label"),
        ("json.label", None, "no_label"),
        ("json.label", 6, "bad_label"),
        ("json.label", -1, "bad_label"),
        ("json.label", 0.5, "bad_label"),
        ("json.label", float("nan"), "bad_label"),
        ("json.label", True, "bad_label"),
        ("json.label", "wolf", "bad_label"),
        ("json.label", [1, None], "bad_label"),
        ("json.label", {"a": 1}, "bad_label"),
    ],
)
def test_labels_that_are_none(field, written, reason, single):
    with pytest.raises(SkipSampleError) as error:
        LabelReader(field, NAMES, single)(members(written, field))
    assert error.value.reason == reason


@pytest.mark.parametrize(("written", "reason"), [([0, 1], "two_labels"), ([], "no_label")])
def test_where_one_is_meant(written, reason):
    with pytest.raises(SkipSampleError) as error:
        LabelReader("json.label", NAMES, single=True)(members(written, "json.label"))
    assert error.value.reason == reason


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_damaged_json_is_a_bad_label(content):
    with pytest.raises(SkipSampleError) as error:
        LabelReader("json.label", NAMES, single=False)({"json": content})
    assert error.value.reason == "bad_label"
