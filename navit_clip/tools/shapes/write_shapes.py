"""Makes the splits of the `shapes` data set and their files: the last step of its flow.

Every picture is a function of (seed, split, index) alone, so neither the number of processes nor
the number of pictures asked for changes one. (File bytes also depend on the Pillow release.)

What is held out:

* Zero-shot: one-object scenes, the same number of each colour and shape.
* Retrieval: one full caption per picture, which fits no other picture of the set: no scene's
  objects are a subset of another's on the same background. Combinations of two or three objects
  come from a reserved part of all combinations that training never shows, on any background.
* One-object scenes recur in all splits in words, never as the same picture: each split has random
  streams of its own.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from navit_clip.data.shards import add_member
from navit_clip.data.workers import run_unordered
from navit_clip.errors import UserError
from navit_clip.tools.shapes.render import encode, render
from navit_clip.tools.shapes.scene import (
    CLASSES,
    Attributes,
    Description,
    Scene,
    lay_out,
    sample_class_description,
    sample_description,
)
from navit_clip.tools.shapes.wording import (
    FULL_CAPTIONS,
    full_caption,
    prompt_templates,
    training_captions,
)

# Raised when the same arguments give other files, so that an old output is not taken for a new one.
VERSION = 7
DONE_FILE, PARTIAL_FILE = "shapes.json", "shapes.partial.json"
SPLITS = ("train", "zeroshot", "retrieval")

RETRIEVAL_CHUNK = 100


@dataclass(frozen=True)
class ShapesConfig:
    """Which pictures to make.

    Attributes:
        seed: Non-negative seed of everything.
        train: Number of training pictures.
        shard_size: Pictures per training shard.
        zeroshot_per_class: Pictures of each of the 48 zero-shot classes.
        retrieval: Number of retrieval pictures, with one caption each.

    Raises:
        ValueError: A field is out of range; the message names it.
    """

    seed: int = 0
    train: int = 24_000
    shard_size: int = 1000
    zeroshot_per_class: int = 20
    retrieval: int = 1000

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 1 if name == "shard_size" else 0
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Sample:
    """One encoded picture: its size in pixels, captions, file bytes and extension."""

    width: int
    height: int
    captions: list[str]
    data: bytes
    extension: str


def train_sample(seed: int, index: int) -> Sample:
    """Training picture `index`, with several captions, the first of them full."""
    rng = _generator(seed, "train", index)
    description = sample_description(rng)
    while description.is_reserved():
        description = sample_description(rng)
    scene = lay_out(description, rng)
    return _finish(scene, training_captions(scene, rng), rng)


def zeroshot_sample(seed: int, class_index: int, number: int) -> Sample:
    """Picture `number` of `CLASSES[class_index]`, with one full caption."""
    rng = _generator(seed, "zeroshot", class_index, number)
    scene = lay_out(sample_class_description(rng, class_index), rng)
    return _finish(scene, [full_caption(scene, rng)], rng)


def retrieval_descriptions(seed: int) -> Iterator[Description]:
    """Endless scenes for retrieval, none of which fits the caption of another."""
    taken: set[tuple[str, tuple[Attributes, ...]]] = set()
    covered: set[tuple[str, tuple[Attributes, ...]]] = set()
    for index in itertools.count():
        rng = _generator(seed, "retrieval", 0, index)
        while True:
            description = sample_description(rng)
            if len(description.objects) > 1:
                while len(description.objects) == 1 or not description.is_reserved():
                    description = sample_description(rng)
            background, objects = description.canonical()
            parts = {
                (background, part)
                for count in range(1, len(objects) + 1)
                for part in itertools.combinations(objects, count)
            }
            if (background, objects) not in covered and not parts & taken:
                break
        taken.add((background, objects))
        covered |= parts
        yield description


def retrieval_sample(seed: int, index: int, description: Description) -> Sample:
    """Retrieval picture `index`, of the `index`-th of `retrieval_descriptions`."""
    rng = _generator(seed, "retrieval", 1, index)
    scene = lay_out(description, rng)
    return _finish(scene, [full_caption(scene, rng)], rng)


def write_shapes(config: ShapesConfig, output: Path, workers: int) -> bool:
    """Writes all splits below `output`, or nothing if they are there already.

    Args:
        config: What to write.
        output: A folder that is new, empty, or from an earlier run of this function; what an
            interrupted run left there is replaced.
        workers: Number of processes, at least 1; it does not change what is written.

    Returns:
        False if `output` was complete with the same arguments, True if it was written now.

    Raises:
        UserError: `output` is a file, holds something else or was made with other arguments.
        OSError: `output` cannot be written.
    """
    record = {"version": VERSION, **asdict(config)}
    if _is_complete(output, record):
        return False
    output.mkdir(parents=True, exist_ok=True)
    (output / PARTIAL_FILE).write_text(json.dumps(record, indent=2) + "\n")
    for split in SPLITS:
        shutil.rmtree(output / split, ignore_errors=True)
        (output / split).mkdir()
    images = output / "retrieval" / "images"
    images.mkdir()

    seed, per_class = config.seed, config.zeroshot_per_class
    tasks: list[_Task] = [
        partial(_write_shard, seed, first, last, output / "train" / f"{shard:05d}.tar")
        for shard, (first, last) in enumerate(_ranges(config.train, config.shard_size))
    ]
    tasks += [
        partial(_write_class, seed, index, per_class, output / "zeroshot")
        for index in range(len(CLASSES))
    ]
    descriptions = list(itertools.islice(retrieval_descriptions(seed), config.retrieval))
    tasks += [
        partial(_write_retrieval, seed, first, descriptions[first:last], images)
        for first, last in _ranges(config.retrieval, RETRIEVAL_CHUNK)
    ]
    total = config.train + per_class * len(CLASSES) + config.retrieval
    listed: list[_Listed] = []
    with tqdm(total=total, unit="image", desc="shapes") as bar:
        for pictures, some in run_unordered(_run, tasks, workers):
            listed += some
            bar.update(pictures)
    listed.sort(key=lambda entry: entry.id)
    coco = {
        "images": [
            {"id": e.id, "file_name": e.name, "width": e.width, "height": e.height} for e in listed
        ],
        "annotations": [{"id": e.id, "image_id": e.id, "caption": e.caption} for e in listed],
    }
    (output / "retrieval" / "captions.json").write_text(json.dumps(coco) + "\n")
    (output / "templates.txt").write_text("\n".join(prompt_templates()) + "\n")
    (output / PARTIAL_FILE).replace(output / DONE_FILE)
    return True


class _Listed(NamedTuple):
    """A picture with its entries in COCO's file."""

    id: int
    name: str
    width: int
    height: int
    caption: str


# Writes some pictures; returns how many, and those that COCO's file lists.
_Task = Callable[[], tuple[int, list[_Listed]]]


def _run(task: _Task) -> tuple[int, list[_Listed]]:
    return task()


def _is_complete(output: Path, record: dict[str, int]) -> bool:
    if not output.exists():
        return False
    if not output.is_dir():
        raise UserError(f"--output {output} is a file; name a folder")
    done = output / DONE_FILE
    if not done.exists():
        if any(output.iterdir()) and not (output / PARTIAL_FILE).exists():
            raise UserError(f"--output {output} holds other files; name a new or empty folder")
        return False
    try:
        found = json.loads(done.read_text())
    except ValueError:
        found = None
    if found != record:
        raise UserError(
            f"--output {output} was made with other arguments, see {done}: "
            "name another folder or delete this one"
        )
    return True


def _write_shard(seed: int, first: int, last: int, path: Path) -> tuple[int, list[_Listed]]:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(first, last):
            sample = train_sample(seed, index)
            fields = {
                "captions": sample.captions[:FULL_CAPTIONS],
                "names": sample.captions[FULL_CAPTIONS],
                "short": sample.captions[FULL_CAPTIONS + 1 :],
                "width": sample.width,
                "height": sample.height,
            }
            add_member(tar, f"{index:09d}.{sample.extension}", sample.data)
            add_member(tar, f"{index:09d}.txt", sample.captions[0].encode())
            add_member(tar, f"{index:09d}.json", json.dumps(fields).encode())
    return last - first, []


def _write_class(
    seed: int, class_index: int, count: int, folder: Path
) -> tuple[int, list[_Listed]]:
    class_folder = folder / "_".join(CLASSES[class_index])
    class_folder.mkdir()
    for number in range(count):
        sample = zeroshot_sample(seed, class_index, number)
        (class_folder / f"{number:05d}.{sample.extension}").write_bytes(sample.data)
    return count, []


def _write_retrieval(
    seed: int, first: int, descriptions: list[Description], folder: Path
) -> tuple[int, list[_Listed]]:
    listed = []
    for index, description in enumerate(descriptions, start=first):
        sample = retrieval_sample(seed, index, description)
        name = f"{index:05d}.{sample.extension}"
        (folder / name).write_bytes(sample.data)
        listed.append(_Listed(index, name, sample.width, sample.height, sample.captions[0]))
    return len(listed), listed


def _finish(scene: Scene, captions: list[str], rng: np.random.Generator) -> Sample:
    data, extension = encode(render(scene, rng), rng)
    return Sample(scene.width, scene.height, captions, data, extension)


def _generator(seed: int, split: str, *index: int) -> np.random.Generator:
    key = (SPLITS.index(split), *index)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def _ranges(total: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, total)) for first in range(0, total, size)]
