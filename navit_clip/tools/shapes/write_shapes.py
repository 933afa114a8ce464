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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from navit_clip.data.shards import add_member
from navit_clip.data.workers import run_unordered
from navit_clip.errors import UserError
from navit_clip.tools.shapes.render import encode, render
from navit_clip.tools.shapes.scene import (
    CLASSES,
    EASY,
    HARD,
    Attributes,
    Description,
    Scene,
    Style,
    describe_classes,
    lay_out,
    sample_description,
)
from navit_clip.tools.shapes.wording import (
    FULL_CAPTIONS,
    TEMPLATES,
    full_caption,
    training_captions,
)

# Raised when the same arguments give other files, so that an old output is not taken for a new one.
VERSION = 7
DONE_FILE, PARTIAL_FILE = "shapes.json", "shapes.partial.json"
SPLITS = ("train", "zeroshot", "retrieval")

RETRIEVAL_CHUNK = 100

# Of a task: how many pictures it wrote, and those of COCO's file with their captions.
_Written = tuple[int, list[dict[str, Any]]]


class Sample(NamedTuple):
    """One encoded picture: its size in pixels, captions, file bytes and extension."""

    width: int
    height: int
    captions: list[str]
    data: bytes
    extension: str


def train_sample(seed: int, index: int, style: Style = EASY) -> Sample:
    """Training picture `index`, with several captions, the first of them full."""
    rng = _generator(seed, "train", index)
    description = sample_description(rng)
    while description.is_reserved():
        description = sample_description(rng)
    scene = lay_out(description, rng, style)
    return _finish(scene, training_captions(scene, rng), rng)


def zeroshot_sample(seed: int, class_index: int, number: int, style: Style = EASY) -> Sample:
    """Picture `number` of `CLASSES[class_index]`, with one full caption."""
    rng = _generator(seed, "zeroshot", class_index, number)
    scene = lay_out(describe_classes(rng, [class_index]), rng, style)
    return _finish(scene, [full_caption(scene, rng)], rng)


def retrieval_descriptions(seed: int) -> Iterator[Description]:
    """Endless scenes for retrieval, none of which fits the caption of another."""
    # Backgrounds with objects in a fixed order: those drawn, and all that their pictures show.
    taken: set[tuple[str, tuple[Attributes, ...]]] = set()
    covered: set[tuple[str, tuple[Attributes, ...]]] = set()
    for index in itertools.count():
        rng = _generator(seed, "retrieval", 0, index)
        while True:
            description = sample_description(rng)
            if len(description.objects) > 1:
                while not description.is_reserved():
                    description = sample_description(rng)
            objects = tuple(sorted(description.objects))
            parts = {
                (description.background, part)
                for count in range(1, len(objects) + 1)
                for part in itertools.combinations(objects, count)
            }
            drawn = description.background, objects
            if drawn not in covered and not parts & taken:
                break
        taken.add(drawn)
        covered |= parts
        yield description


def retrieval_sample(
    seed: int, index: int, description: Description, style: Style = EASY
) -> Sample:
    """Retrieval picture `index`, of the `index`-th of `retrieval_descriptions`."""
    rng = _generator(seed, "retrieval", 1, index)
    scene = lay_out(description, rng, style)
    return _finish(scene, [full_caption(scene, rng)], rng)


def write_shapes(
    output: Path,
    *,
    seed: int,
    train: int,
    shard_size: int,
    zeroshot_per_class: int,
    retrieval: int,
    workers: int,
    hard: bool = False,
) -> bool:
    """Writes all splits below `output`, or nothing if they are there already.

    Args:
        output: A folder that is new, empty, or from an earlier run of this function; what an
            interrupted run left there is replaced.
        seed: Non-negative seed of everything.
        train: Number of training pictures.
        shard_size: Pictures per training shard.
        zeroshot_per_class: Pictures of each of the 48 zero-shot classes.
        retrieval: Number of retrieval pictures, with one caption each.
        workers: Number of processes, at least 1; it does not change what is written.
        hard: Small marks, fine textures and long strips, see `scene.HARD`.

    Returns:
        False if `output` was complete with the same arguments, True if it was written now.

    Raises:
        UserError: `output` holds something else or was made with other arguments.
        OSError: `output` cannot be written.
    """
    arguments = {
        "version": VERSION,
        "seed": seed,
        "train": train,
        "shard_size": shard_size,
        "zeroshot_per_class": zeroshot_per_class,
        "retrieval": retrieval,
        **({"hard": True} if hard else {}),
    }
    style = HARD if hard else EASY
    record = json.dumps(arguments, indent=2) + "\n"
    if _is_complete(output, record):
        return False
    output.mkdir(parents=True, exist_ok=True)
    (output / PARTIAL_FILE).write_text(record)
    for split in SPLITS:
        shutil.rmtree(output / split, ignore_errors=True)
        (output / split).mkdir()
    images = output / "retrieval" / "images"
    images.mkdir()

    tasks: list[Callable[[], _Written]] = [
        partial(_write_shard, style, seed, first, last, output / "train" / f"{shard:05d}.tar")
        for shard, (first, last) in enumerate(_ranges(train, shard_size))
    ]
    tasks += [
        partial(_write_class, style, seed, index, zeroshot_per_class, output / "zeroshot")
        for index in range(len(CLASSES))
    ]
    descriptions = list(itertools.islice(retrieval_descriptions(seed), retrieval))
    tasks += [
        partial(_write_retrieval, style, seed, first, descriptions[first:last], images)
        for first, last in _ranges(retrieval, RETRIEVAL_CHUNK)
    ]
    total = train + zeroshot_per_class * len(CLASSES) + retrieval
    listed: list[dict[str, Any]] = []
    with tqdm(total=total, unit="image", desc="shapes") as bar:
        for pictures, some in run_unordered(_run, tasks, workers):
            listed += some
            bar.update(pictures)
    listed.sort(key=lambda image: image["id"])
    annotations = [
        {"id": image["id"], "image_id": image["id"], "caption": image.pop("caption")}
        for image in listed
    ]
    coco = {"images": listed, "annotations": annotations}
    (output / "retrieval" / "captions.json").write_text(json.dumps(coco) + "\n")
    (output / "templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    (output / PARTIAL_FILE).replace(output / DONE_FILE)
    return True


def _run(task: Callable[[], _Written]) -> _Written:
    return task()


def _is_complete(output: Path, record: str) -> bool:
    done = output / DONE_FILE
    if done.exists():
        if done.read_bytes() != record.encode():
            raise UserError(
                f"--output {output} was made with other arguments, see {done}: "
                "name another folder or delete this one"
            )
        return True
    if output.is_dir() and any(output.iterdir()) and not (output / PARTIAL_FILE).exists():
        raise UserError(f"--output {output} holds other files; name a new or empty folder")
    return False


def _write_shard(style: Style, seed: int, first: int, last: int, path: Path) -> _Written:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(first, last):
            sample = train_sample(seed, index, style)
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


def _write_class(style: Style, seed: int, class_index: int, count: int, folder: Path) -> _Written:
    class_folder = folder / "_".join(CLASSES[class_index])
    class_folder.mkdir()
    for number in range(count):
        sample = zeroshot_sample(seed, class_index, number, style)
        (class_folder / f"{number:05d}.{sample.extension}").write_bytes(sample.data)
    return count, []


def _write_retrieval(
    style: Style, seed: int, first: int, descriptions: list[Description], folder: Path
) -> _Written:
    listed = []
    for index, description in enumerate(descriptions, start=first):
        sample = retrieval_sample(seed, index, description, style)
        name = f"{index:05d}.{sample.extension}"
        (folder / name).write_bytes(sample.data)
        size = {"width": sample.width, "height": sample.height}
        listed.append({"id": index, "file_name": name, **size, "caption": sample.captions[0]})
    return len(listed), listed


def _finish(scene: Scene, captions: list[str], rng: np.random.Generator) -> Sample:
    data, extension = encode(render(scene, rng), rng)
    return Sample(scene.width, scene.height, captions, data, extension)


def _generator(seed: int, split: str, *index: int) -> np.random.Generator:
    key = (SPLITS.index(split), *index)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def _ranges(total: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, total)) for first in range(0, total, size)]
