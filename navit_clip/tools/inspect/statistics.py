"""Statistics of shards, read sample by sample as training would."""

from __future__ import annotations

import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from navit_clip.data.builders.base import Origin, SampleBuilder
from navit_clip.data.builders.pairs import PairBuilder
from navit_clip.data.captions import find_captions
from navit_clip.data.decode import EncodedImage, find_image
from navit_clip.data.mixture import Mixture
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.shards import ShardError, read_shard
from navit_clip.data.skip_log import SkipLog
from navit_clip.data.workers import run_unordered
from navit_clip.errors import SkipSampleError
from navit_clip.packed.batch import Inputs

_WHOLE_CAPTION = 1 << 20  # tokens; no caption is cut at it


@dataclass(frozen=True)
class _ShardTask:
    """A shard with its number and its short name; None as `limit` reads all of its samples."""

    shard: int
    path: str
    name: str
    captions: Mapping[str, float] | None
    build: SampleBuilder[Any, Inputs]
    max_pixels: int
    limit: int | None


@dataclass
class Statistics:
    """What shards hold.

    Attributes:
        shards: Shards read.
        samples: Samples read.
        usable: Those that training would take.
        bytes: Size of all their files.
        formats: Usable samples by the image's extension.
        columns: Values by name, float64 or int64 [n], of usable samples (``width``, ``height``,
            ``side``, ``aspect``, ``image_kb``, ``tokens``, ``kept_tokens``, ``captions``) or of all
            their captions (``characters``, ``words``, ``text_tokens``, and ``unknown``, how many of
            the tokens are none that the tokenizer knows).
        skipped: Samples that training would skip, and shards that end early, by reason.
        skip_log: A line for each of the first few of them.
    """

    shards: int = 0
    samples: int = 0
    usable: int = 0
    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    skip_log: tuple[str, ...] = ()


def collect_statistics(
    mixture: Mixture,
    build: SampleBuilder[Any, Inputs],
    max_pixels: int,
    *,
    max_samples: int | None = None,
    workers: int = 1,
) -> Statistics:
    """Reads shards with a progress bar.

    Args:
        mixture: The shards.
        build: Makes samples; one is usable if this takes it.
        max_pixels: Of an image, above which it is not decoded.
        max_samples: Read no more than so many, the same number from the front of every shard.
        workers: Number of processes; the statistics do not depend on it.
    """
    shards = mixture.shards
    each, rest = divmod(max_samples or 0, len(shards))
    tasks = []
    for number, path in enumerate(shards):
        captions = mixture.dataset_of(number).captions
        if isinstance(build, PairBuilder):
            captions = captions or build.captions
        limit = None if max_samples is None else each + (number < rest)
        name = mixture.names[number]
        if limit != 0:
            tasks.append(_ShardTask(number, path, name, captions, build, max_pixels, limit))
    found: dict[int, Statistics] = {}
    with tqdm(total=len(tasks), desc="reading", unit="shard") as bar:
        for number, statistics in run_unordered(_shard_statistics, tasks, workers):
            found[number] = statistics
            samples = sum(done.samples for done in found.values())
            bar.set_postfix_str(f"{samples:,} samples", refresh=False)
            bar.update()
    return _merge([found[number] for number in sorted(found)])


def _shard_statistics(task: _ShardTask) -> tuple[int, Statistics]:
    """Reads one shard; returns its number and what is in it."""
    found, skips = Statistics(shards=1), SkipLog(sys.maxsize)
    columns: defaultdict[str, list[float]] = defaultdict(list)
    try:
        for sample in itertools.islice(read_shard(task.path, name=task.name), task.limit):
            found.samples += 1
            found.bytes += sum(map(len, sample.members.values()))
            try:
                extension, values = _measure(task, sample)
            except SkipSampleError as error:
                skips.skip_sample(sample.id, error)
                continue
            found.usable += 1
            found.formats[extension] += 1
            for name, column in values.items():
                columns[name] += column
    except ShardError as error:
        skips.skip_shard(error)
    found.columns = {name: np.array(column) for name, column in columns.items()}
    found.skipped, found.skip_log = skips.take()
    return task.shard, found


def _measure(task: _ShardTask, sample: RawSample) -> tuple[str, dict[str, list[float]]]:
    """The image's extension, and the values that a sample adds to each column.

    Raises:
        SkipSampleError: If training would skip it.
    """
    sample.check()
    built = task.build(sample, Origin(0, task.shard, sample.index, 0), task.captions)
    data = find_image(sample.members)
    image = EncodedImage(data, task.max_pixels)
    extension = next(e for e, content in sample.members.items() if content is data)
    columns: dict[str, list[float]] = {
        "width": [image.width],
        "height": [image.height],
        "side": [(image.width * image.height) ** 0.5],
        "aspect": [image.width / image.height],
        "image_kb": [len(data) / 1000],
        "tokens": [built.full_lengths[0]],
        "kept_tokens": [built.lengths[0]],
    }
    if isinstance(task.build, PairBuilder):
        names = task.captions or {}
        texts = [text for name in names for text in find_captions(sample.members, name)]
        tokenizer = task.build.tokenizer
        ids = [tokenizer.encode(text, _WHOLE_CAPTION) for text in texts]
        columns |= {
            "captions": [len(texts)],
            "characters": [len(text) for text in texts],
            "words": [len(text.split()) for text in texts],
            "text_tokens": [len(row) for row in ids],
        }
        if tokenizer.unknown_id is not None:
            columns["unknown"] = [row.count(tokenizer.unknown_id) for row in ids]
    return extension, columns


def _merge(parts: Sequence[Statistics]) -> Statistics:
    names = dict.fromkeys(name for part in parts for name in part.columns)
    return Statistics(
        shards=len(parts),
        samples=sum(part.samples for part in parts),
        usable=sum(part.usable for part in parts),
        bytes=sum(part.bytes for part in parts),
        formats=sum((part.formats for part in parts), Counter()),
        columns={
            name: np.concatenate([part.columns[name] for part in parts if name in part.columns])
            for name in names
        },
        skipped=sum((part.skipped for part in parts), Counter()),
        skip_log=tuple(line for part in parts for line in part.skip_log),
    )
