"""JSON of captions: its forms, and entries that one cannot use."""

from __future__ import annotations

import pytest
from source_cases import image, read, write

from navit_clip.data.annotations.caption_files import read_caption_file
from navit_clip.errors import UserError
from navit_clip.evaluation.captioned import open_captioned

IMAGES = [{"id": i, "file_name": f"{i}.png"} for i in range(4)]
NOTES = [{"id": i, "image_id": i, "caption": f"caption {i}"} for i in range(4)]
ALL = [(f"{i}.png", (f"caption {i}",)) for i in range(4)]


@pytest.mark.parametrize(
    "content",
    [
        {"images": IMAGES, "annotations": NOTES},
        {"images": IMAGES, "annotations": [{**n, "image_id": str(n["image_id"])} for n in NOTES]},
        {"images": [{**i, "id": str(i["id"])} for i in IMAGES], "annotations": NOTES},
        {"images": [{**i, "id": float(i["id"])} for i in IMAGES], "annotations": NOTES},
        {"images": [{"filename": n, "sentences": [{"raw": t} for t in texts]} for n, texts in ALL]},
        [{"image": name, "caption": list(texts)} for name, texts in ALL],
        [{"image": name, "caption": texts[0], "image_id": "x"} for name, texts in ALL],
        [{"file_name": f"./{name}", "captions": list(texts)} for name, texts in ALL],
    ],
)
def test_every_form_says_the_same(content, tmp_path):
    rows = read_caption_file(tmp_path / write(tmp_path / "c.json", content))
    assert [(row.name, row.captions) for row in rows] == ALL


@pytest.mark.parametrize(
    "content",
    [
        {
            "images": [*IMAGES, {"id": 9, "file_name": None}, {"id": 8}],
            "annotations": [
                *NOTES[:3], {**NOTES[3], "caption": None}, {"image_id": 3, "caption": ["x"]}
            ],
        },
        [
            *({"image": name, "caption": text} for name, text in ALL[:3]),
            {"image": "3.png", "caption": [None, {}]},
            {"image": "", "caption": "x"},
            {"image": None, "caption": "y"},
        ],
    ],
)  # fmt: skip
def test_what_an_entry_lacks_is_counted(content, tmp_path):
    for i in range(4):
        image(tmp_path / f"{i}.png")
    file = write(tmp_path / "c.json", content)
    dataset = open_captioned(None, str(tmp_path), file, [], None)
    items = read(dataset)
    assert [item.captions for item in items[:3]] == [texts for _, texts in ALL[:3]]
    assert [item.data.reason for item in items[3:]] == ["no_caption", "no_path", "no_path"]
    assert dataset.skipped == {"empty_caption": 1, "bad_caption": 1}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"images": [*IMAGES, {"id": 0, "file_name": "x.png"}], "annotations": NOTES},
         r"image 0 is both 0\.png and x\.png"),
        ({"images": IMAGES, "annotations": [{"image_id": 7, "caption": "x"}]}, "not listed"),
        ({"images": IMAGES, "annotations": [{"image_id": None, "caption": "x"}]}, "no image id"),
        ([{"caption": "x"}], "no form that is known"),
        ([{"image": "a.png"}], "no form that is known"),
        ([["a.png", "x"]], "no form that is known"),
        (7, "no form that is known"),
    ],
)  # fmt: skip
def test_what_is_uncertain_is_refused(content, problem, tmp_path):
    with pytest.raises(UserError, match=problem):
        read_caption_file(tmp_path / write(tmp_path / "c.json", content))
