"""The same data as files, JSON, tables or shards: the same queries, counts and metrics."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from eval_cases import run
from shard_factory import CAPTIONS, SIZES, encode, photo
from source_cases import write

from navit_clip.tools.make_shards.__main__ import main

# A repeated caption, an empty one, one that is half a character, an image without any.
TEXTS = {
    f"{i}.png": [CAPTIONS[i], CAPTIONS[(i + 1) % 5], *[CAPTIONS[i]] * (i % 2)] for i in range(5)
} | {"5.png": ["  ", "x"], "6.png": ["\ud800", CAPTIONS[6]], "7.png": [""]}


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("same")
    (root / "images").mkdir()
    for i, name in enumerate(TEXTS):
        data = encode(photo(i, *SIZES[i % len(SIZES)]), "TIFF" if i == 3 else "PNG")
        (root / "images" / name).write_bytes(data)
    pairs = [(name, text) for name, texts in TEXTS.items() for text in texts]
    write(root / "list.json", [{"image": n, "caption": texts} for n, texts in TEXTS.items()])
    coco = {
        "images": [{"id": name, "file_name": name} for name in TEXTS],
        "annotations": [{"image_id": name, "caption": text} for name, text in pairs],
    }
    write(root / "coco.json", coco)
    with (root / "t.csv").open("w", newline="") as file:
        readable = [(name, text) for name, text in pairs if text != "\ud800"]
        csv.writer(file).writerows([("path", "caption"), *readable])
    for source in ("list.json", "coco.json", "t.csv"):
        kind = "--table" if source == "t.csv" else "--coco"
        main([*map(str, (kind, root / source, "--images", root / "images", "--workers", 1,
                         "--output", root / f"shards-{source}"))])  # fmt: skip
    return root


def test_retrieval(captioned, model_dir, tmp_path):
    images = ("--images", captioned / "images", "--captions")
    sources = {
        **{name: (*images, captioned / name) for name in ("list.json", "coco.json", "t.csv")},
        **{f"shards of {name}": ("--data", captioned / f"shards-{name}")
           for name in ("list.json", "coco.json", "t.csv")},
        "two fields": ("--data", captioned / "shards-coco.json", "--fields", "txt",
                       "json.captions"),
    }  # fmt: skip
    found = {}
    for name, flags in sources.items():
        output = tmp_path / "r.json"
        assert run("retrieval", "--model", model_dir, *flags, "--native", "--output", output,
                   "--device", "cpu", "--workers", 0) == 0  # fmt: skip
        result = json.loads(output.read_text())
        assert (result["images"], result["captions"]) == (7, 14)
        skipped = result["skipped"]
        if "shards" not in name and name != "two fields":
            assert skipped.pop("no_caption") == 1
            assert skipped.pop("empty_caption") == 2
            assert skipped.pop("bad_caption", 0) == (name != "t.csv")
        assert not skipped
        found[name] = {key: result[key] for key in ("image_to_text", "text_to_image", "views")}
    for name, metrics in found.items():
        assert metrics == found["coco.json"], name


def test_captions_that_make_shards_leaves_out_are_counted(captioned):
    lines = (captioned / "shards-coco.json/manifest.jsonl").read_text().splitlines()
    record = json.loads(lines[1])
    assert record["skipped"] == {"no_caption": 1}
    assert record["captions_skipped"] == {"bad_caption": 1, "empty_caption": 1}


def test_zero_shot(model_dir, tmp_path):
    labels = []
    for i in range(9):
        folder = ("red_dog", "lake", "boat")[i % 3]
        for path in (tmp_path / "classes" / folder / f"{i}.png", tmp_path / "flat" / f"{i}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(photo(i, *SIZES[i % len(SIZES)])))
        labels.append((folder, f"{i}.png"))
    labels.sort()  # in the folders' order, as embeddings depend on neighbours in the last digits
    names = sorted({folder for folder, _ in labels})
    lines = [f"{image},{folder}" for folder, image in labels]
    numbers = [f"{image} {names.index(folder)}.0" for folder, image in labels]
    main([*map(str, ("--classes", tmp_path / "classes", "--output", tmp_path / "shards",
                     "--workers", 1))])  # fmt: skip
    flat = ("--data", tmp_path / "flat", "--labels")
    sources = {
        "folders": ("--data", tmp_path / "classes"),
        "names": (*flat, write(tmp_path / "l.csv", "\n".join(lines))),
        "numbers": (*flat, write(tmp_path / "l.txt", "\n".join(numbers)), "--classnames",
                    tmp_path / "shards/classnames.txt"),
        "shards": ("--data", tmp_path / "shards"),
    }  # fmt: skip
    found = {}
    for name, flags in sources.items():
        output = tmp_path / "r.json"
        assert run("zeroshot", "--model", model_dir, *flags, "--templates", "plain", "--strict",
                   "--output", output, "--device", "cpu", "--workers", 0) == 0  # fmt: skip
        result = json.loads(output.read_text())
        result.pop("data")
        assert (result["images"], result["classes"], result["skipped"]) == (9, 3, {})
        found[name] = result
    for name, result in found.items():
        assert result == found["folders"], name
