"""Statistics of shards, read sample by sample as training would."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.pairs import PairBuilder
from navit_clip.data.captions import find_captions
from navit_clip.data.decode import EncodedImage, find_image
from navit_clip.data.mixture import Mixture
from navit_clip.data.shards import RawSample, ShardError, read_shard
from navit_clip.data.workers import run_unordered
from navit_clip.errors import SkipSampleError

NAMED_SKIPS = 8  # per shard; the rest is only counted

_WHOLE_CAPTION = 1 << 20  # tokens; no caption is cut at it


@dataclass(frozen=True)
class _ShardTask:
    """One shard to be read.

    Attributes:
        shard: Its number.
        path: Its path or address.
        name: Its short name, prefix of the ids of its samples.
        captions: Caption weights of its dataset.
        build: Makes pairs.
        limit: Most samples to read, None for all.
    """

    shard: int
    path: str
    name: str
    captions: Mapping[str, float]
    build: PairBuilder
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
            ``side``, ``aspect``, ``image_bytes``, ``captions``, ``tokens``, ``kept_tokens``) or of
            all their captions (``characters``, ``words``, ``text_tokens``).
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
    skip_log: list[str] = field(default_factory=list)


def collect_statistics(
    mixture: Mixture, build: PairBuilder, *, max_samples: int | None = None, workers: int = 1
) -> Statistics:
    """Reads shards with a progress bar.

    Args:
        mixture: The shards.
        build: Makes pairs; a sample is usable if this takes it.
        max_samples: Read no more than so many, the same number from the front of every shard.
        workers: Number of processes; the statistics do not depend on it.
    """
    shards = mixture.shards
    limits: list[int | None] = [None] * len(shards)
    if max_samples is not None:
        each, rest = divmod(max_samples, len(shards))
        limits = [each + (number < rest) for number in range(len(shards))]
    tasks = [
        _ShardTask(
            number,
            path,
            mixture.names[number],
            mixture.dataset_of(number).captions or build.captions,
            build,
            limits[number],
        )
        for number, path in enumerate(shards)
        if limits[number] != 0
    ]
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
    statistics = Statistics(shards=1)
    values: defaultdict[str, list[float]] = defaultdict(list)
    try:
        for sample in read_shard(task.path, name=task.name):
            statistics.samples += 1
            statistics.bytes += sum(map(len, sample.members.values()))
            try:
                _add(task, sample, statistics, values)
            except SkipSampleError as error:
                _skip(statistics, error.reason, f"{sample.id}: {error}")
            if statistics.samples == task.limit:
                break
    except ShardError as error:
        _skip(statistics, "bad_shard", str(error))
    statistics.columns = {name: np.array(column) for name, column in values.items()}
    return task.shard, statistics


def _add(
    task: _ShardTask,
    sample: RawSample,
    statistics: Statistics,
    values: defaultdict[str, list[float]],
) -> None:
    """Adds one sample, unless training would skip it."""
    pair = task.build(sample, Origin(0, task.shard, sample.index, 0), task.captions)
    data = find_image(sample.members)
    image = EncodedImage(data)
    texts = [text for name in task.captions for text in find_captions(sample.members, name)]
    statistics.usable += 1
    statistics.formats[next(e for e, content in sample.members.items() if content is data)] += 1
    rows, columns = pair.image.grid
    measured = {
        "width": image.width,
        "height": image.height,
        "side": (image.width * image.height) ** 0.5,
        "aspect": image.width / image.height,
        "image_bytes": len(data),
        "captions": len(texts),
        "tokens": rows * columns,
        "kept_tokens": len(pair.image.patches),
    }
    for name, value in measured.items():
        values[name].append(value)
    encode = task.build.tokenizer.encode
    values["characters"] += map(len, texts)
    values["words"] += (len(text.split()) for text in texts)
    values["text_tokens"] += (len(encode(text, _WHOLE_CAPTION)) for text in texts)


def _skip(statistics: Statistics, reason: str, line: str) -> None:
    statistics.skipped[reason] += 1
    if len(statistics.skip_log) < NAMED_SKIPS:
        statistics.skip_log.append(line)


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
        skip_log=[line for part in parts for line in part.skip_log],
    )
