"""Whatever bytes are in a table, a JSON or a label file: they are read, or refused in one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz import mutated, mutated_json
from source_cases import image

from navit_clip.data.annotations.caption_files import read_caption_file
from navit_clip.data.annotations.class_names import read_class_names
from navit_clip.data.annotations.labels import load_class_map, read_label_file
from navit_clip.data.annotations.tables import open_table
from navit_clip.errors import UserError
from navit_clip.evaluation.captioned import open_captioned
from navit_clip.evaluation.labelled import open_labelled
from navit_clip.evaluation.summary import summarise
from navit_clip.evaluation.zeroshot import load_classnames, load_templates
from navit_clip.tools.make_shards.__main__ import main

ROUNDS = 1600  # of each kind of file

TABLE = b'path,caption\n0.png,"one, two"\n1.png,three\n0.png,four\n'
LABELS = b"file,label\n0.png,3.0\n1.png,cat\n2.png,10\n"
LINES = b"0.png 3\n1.png red cat\n2.png n01440764 1 2 3 4\n"
MAP = b"chair 5;7\nmug,3\nBoeing 747\t2\n"
SYNSETS = b"n01440764 tench\nn01443537 goldfish\n"
NAMES = b"red dog\nblue bird\nclass 10\n"
JSON_FILES: list[Any] = [
    {
        "images": [{"id": 0, "file_name": "0.png"}, {"id": "1", "file_name": "1.png"}],
        "annotations": [{"image_id": 0, "caption": "a"}, {"image_id": 1, "caption": "b"}],
    },
    {
        "images": [
            {"filename": "0.png", "filepath": "", "split": "test", "sentences": [{"raw": "a"}]}
        ]
    },
    [{"image": "0.png", "caption": ["a", "b"]}, {"image": "1.png", "caption": "c"}],
    {"chair": 3, "mug": [5, 7], "out": []},
    {"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]},
    ["n01440764", "n01443537"],
]
SEEDS = [
    *((TABLE, ".csv"), (TABLE.replace(b",", b"\t"), ".tsv"), (TABLE, ".parquet")),
    *((LABELS, ".csv"), (LABELS.replace(b",", b"\t"), ".tsv"), (LINES, ".txt")),
    *((MAP, ".txt"), (MAP.replace(b" ", b","), ".csv"), (SYNSETS, ".txt"), (NAMES, ".txt")),
    *((json.dumps(content).encode(), ".json") for content in JSON_FILES),
]


def cases(rng: random.Random) -> Iterator[tuple[bytes, str]]:
    yield from ((mutated(seed, rng), suffix) for seed, suffix in SEEDS * (ROUNDS // 16))
    for content in JSON_FILES * (ROUNDS // 16):
        yield json.dumps(mutated_json(content, rng)).encode(), ".json"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    for i in range(3):
        image(root / f"{i}.png")
    for name in ("chair", "mug", "Boeing 747"):
        image(root / "classes" / name / "0.png")
    return root


def read_all(open_data: Callable[[], Any]) -> None:
    dataset = open_data()
    for item in getattr(dataset, "dataset", dataset).read(0, 1):
        item.name.encode()
        "".join(item.captions).encode()


def readers(path: Path, images: Path) -> list[Callable[[], Any]]:
    """Everything that reads a file of that kind."""
    name, classes, folders = str(path), str(images / "classes"), ["Boeing 747", "chair", "mug"]
    found: list[Callable[[], Any]] = [
        lambda: read_all(lambda: open_labelled(str(images), labels=name)),
        lambda: read_all(lambda: open_labelled(classes, class_map=name)),
        lambda: read_all(lambda: open_captioned(None, str(images), name, [], None)),
        lambda: read_label_file(name),
        lambda: load_class_map(name),
        lambda: read_class_names(name, folders),
        lambda: load_classnames(name, None),
        lambda: load_templates(name),
    ]
    if path.suffix == ".json":
        return [*found, lambda: read_caption_file(path), lambda: summarise(path.parent)]
    return [*found, lambda: open_table(path, images, "path", ["caption"])]


@pytest.mark.timeout(180)
def test_any_bytes_are_read_or_refused_in_one_line(images, tmp_path):
    refused = read = 0
    for content, suffix in cases(random.Random(0)):
        path = tmp_path / f"f{suffix}"
        path.write_bytes(content)
        for reader in readers(path, images):
            try:
                reader()
                read += 1
            except UserError:
                refused += 1
    assert min(read, refused) > ROUNDS


@pytest.mark.timeout(180)
def test_make_shards_of_any_bytes(images, tmp_path, capsys):
    rng = random.Random(1)
    codes = set()
    for number, (content, suffix) in enumerate(cases(rng)):
        if number % 23 or len(content) > 10_000:
            continue
        path = tmp_path / f"f{suffix}"
        path.write_bytes(content)
        source = "--coco" if suffix == ".json" else "--table"
        words = [source, path, "--images", images, "--output", tmp_path / str(number)]
        try:
            codes.add(main([*map(str, [*words, "--workers", 1])], "make_shards"))
        except SystemExit as stop:
            codes.add(stop.code)
            last = capsys.readouterr().err.splitlines()[-1]
            assert last.startswith("make_shards: error: ")
    assert codes == {0, 2}
