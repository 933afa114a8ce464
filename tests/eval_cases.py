"""Small evaluation data and models for the tests of the evaluators."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import ExifTags, Image
from shard_factory import CAPTIONS, HTML, SIZES, encode, make_shards, photo, sample, write_shard

from navit_clip.distributed import Ranks
from navit_clip.evaluation import datasets
from navit_clip.evaluation import embed as embedding
from navit_clip.evaluation.__main__ import main
from navit_clip.evaluation.captioned import open_captioned
from navit_clip.evaluation.datasets import EvalDataset
from navit_clip.evaluation.embed import Embedded, embed_dataset
from navit_clip.evaluation.labelled import open_labelled
from navit_clip.evaluation.models import Model
from navit_clip.evaluation.settings import EvalSetting

CLASSES = {"red_dog": 4, "lake": 3, "bicycle": 0, "boat": 4}  # folder and number of images
# Of the tiny model of `conftest`: its own first; 32 pixels are 4 of its patches.
OWN, SMALL, NATIVE, SQUARE = (
    EvalSetting("capped", 12),
    EvalSetting("capped", 6),
    EvalSetting("native"),
    EvalSetting("square", 32),
)
SETTINGS = [SMALL, OWN, NATIVE, SQUARE]
ALONE = Ranks(0, 1, torch.device("cpu"))


def write_classes(root: Path) -> Path:
    """Class folders with one broken image."""
    number = 0
    for name, count in CLASSES.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            number += 1
            image = photo(number, *SIZES[number % len(SIZES)])
            (root / name / f"{i}.png").write_bytes(encode(image))
    (root / "lake" / "broken.jpg").write_bytes(HTML)
    return root


def write_coco(root: Path) -> Path:
    """Nine images with one to three captions each, in COCO's format; one of them is missing."""
    (root / "images").mkdir(parents=True)
    content: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
    for i in range(9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6 if i == 2 else 1
        data = encode(photo(i, *SIZES[i % len(SIZES)]), exif=exif)
        (root / "images" / f"{i}.png").write_bytes(data)
        content["images"].append({"id": i, "file_name": f"{i}.png"})
        for j in range(i % 3 + 1):
            caption = f"{CAPTIONS[i % len(CAPTIONS)]} {CAPTIONS[j]}"
            content["annotations"].append({"image_id": i, "caption": caption})
    (root / "images" / "4.png").unlink()
    (root / "captions.json").write_text(json.dumps(content))
    return root


def write_all(root: Path) -> Path:
    """Every kind of dataset, healthy and damaged; see `open_dataset`."""
    write_classes(root / "classes")
    write_coco(root / "coco")
    make_shards(root / "shards", [3, 4])
    # A sample in the middle that cannot be read, and more parts than samples in the second shard.
    write_shard(
        root / "mixed" / "0.tar",
        {"0": sample(0), "1": {**sample(1), "png": HTML}, "2": sample(2), "3": sample(3)},
    )
    write_shard(root / "mixed" / "1.tar", {"0": sample(4)})
    write_shard(root / "single" / "0.tar", {"0": sample(5)})
    write_shard(root / "bad" / "0.tar", {"0": {**sample(0), "png": HTML}})
    cut = make_shards(root / "cut", [4])[0]
    cut.write_bytes(cut.read_bytes()[:-11_000])
    (root / "templates.txt").write_text("a {}\nthe photo of one {} at night\n")
    return root


def open_dataset(root: Path, name: str) -> EvalDataset:
    """The dataset of `write_all` with this name."""
    if name == "classes":
        return open_labelled(str(root / name)).dataset
    if name == "coco":
        images, captions = root / "coco/images", root / "coco/captions.json"
        return open_captioned(None, str(images), str(captions), [], None)
    return open_captioned(str(root / name), None, None, ["txt"], None)


def embed(model: Model, dataset: EvalDataset, ranks: Ranks = ALONE, workers: int = 0) -> Embedded:
    """One model's embeddings at `SETTINGS`."""
    (embedded,) = embed_dataset([(model, SETTINGS)], dataset, ranks, workers=workers)
    return embedded


def small_blocks(images: int = 3, prompts: int = 2) -> None:
    """Sets how many images and texts are embedded together, so that a few make several blocks."""
    datasets.BLOCK, embedding.TEXT_BLOCK = images, prompts


def run(*words: object) -> int:
    """``navit-clip eval`` in this process; returns its exit code."""
    try:
        main([str(word) for word in words], "eval")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
