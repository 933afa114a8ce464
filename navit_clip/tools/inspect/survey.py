"""Reads shards sample by sample as training would, and notes what each sample is like."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.pairs import PairBuilder
from navit_clip.data.captions import find_captions
from navit_clip.data.decode import EncodedImage, SkipSampleError, find_image
from navit_clip.data.mixture import Mixture
from navit_clip.data.shards import RawSample, ShardError, read_shard
from navit_clip.data.workers import run_unordered

NAMED_SKIPS = 8  # per shard; the rest is only counted

_WHOLE_CAPTION = 1 << 20  # tokens; no caption is cut at it


@dataclass(frozen=True)
class SurveyTask:
    """One shard to be read.

    Attributes:
        shard: Its number.
        path: Its path or address.
        name: Its short name, which begins the ids of its samples.
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
class Survey:
    """What samples are like.

    Attributes:
        shards: Shards read.
        samples: Samples read.
        usable: Those that training would take.
        bytes: Size of all their files.
        formats: Usable samples by the image's extension.
        columns: Figures by name, float64 or int64 [n], of usable samples (``width``, ``height``,
            ``side``, ``aspect``, ``image_bytes``, ``captions``, ``tokens``, ``kept_tokens``) or of
            all their captions (``characters``, ``words``, ``text_tokens``).
        skipped: Samples that training would pass over, and shards that end early, by reason.
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


def survey_shards(
    mixture: Mixture, build: PairBuilder, *, max_samples: int | None = None, workers: int = 1
) -> Survey:
    """Reads shards with a progress bar.

    Args:
        mixture: The shards.
        build: Makes pairs; a sample is usable if this takes it.
        max_samples: Read no more than so many, the same number from the front of every shard.
        workers: Number of processes; the figures do not depend on it.
    """
    shards = mixture.shards
    limits: list[int | None] = [None] * len(shards)
    if max_samples is not None:
        share, rest = divmod(max_samples, len(shards))
        limits = [share + (number < rest) for number in range(len(shards))]
    tasks = [
        SurveyTask(
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
    found: dict[int, Survey] = {}
    with tqdm(total=len(tasks), desc="reading", unit="shard") as bar:
        for number, survey in run_unordered(survey_shard, tasks, workers):
            found[number] = survey
            samples = sum(done.samples for done in found.values())
            bar.set_postfix_str(f"{samples:,} samples", refresh=False)
            bar.update()
    return _merge([found[number] for number in sorted(found)])


def survey_shard(task: SurveyTask) -> tuple[int, Survey]:
    """Reads one shard; returns its number and what is in it."""
    survey = Survey(shards=1)
    values: defaultdict[str, list[float]] = defaultdict(list)
    try:
        for sample in read_shard(task.path, name=task.name):
            survey.samples += 1
            survey.bytes += sum(map(len, sample.members.values()))
            try:
                _note(task, sample, survey, values)
            except SkipSampleError as error:
                _skip(survey, error.reason, f"{sample.id}: {error}")
            if survey.samples == task.limit:
                break
    except ShardError as error:
        _skip(survey, "bad_shard", str(error))
    survey.columns = {name: np.array(column) for name, column in values.items()}
    return task.shard, survey


def _note(
    task: SurveyTask, sample: RawSample, survey: Survey, values: defaultdict[str, list[float]]
) -> None:
    """Appends one sample's figures, unless training would pass over it."""
    pair = task.build(sample, Origin(0, task.shard, sample.index, 0), task.captions)
    data = find_image(sample.members)
    image = EncodedImage(data)
    texts = [text for source in task.captions for text in find_captions(sample.members, source)]
    survey.usable += 1
    survey.formats[next(e for e, content in sample.members.items() if content is data)] += 1
    rows, columns = pair.image.grid
    figures = {
        "width": image.width,
        "height": image.height,
        "side": (image.width * image.height) ** 0.5,
        "aspect": image.width / image.height,
        "image_bytes": len(data),
        "captions": len(texts),
        "tokens": rows * columns,
        "kept_tokens": len(pair.image.patches),
    }
    for name, figure in figures.items():
        values[name].append(figure)
    encode = task.build.tokenizer.encode
    values["characters"] += map(len, texts)
    values["words"] += (len(text.split()) for text in texts)
    values["text_tokens"] += (len(encode(text, _WHOLE_CAPTION)) for text in texts)


def _skip(survey: Survey, reason: str, line: str) -> None:
    survey.skipped[reason] += 1
    if len(survey.skip_log) < NAMED_SKIPS:
        survey.skip_log.append(line)


def _merge(surveys: Sequence[Survey]) -> Survey:
    names = dict.fromkeys(name for survey in surveys for name in survey.columns)
    return Survey(
        shards=len(surveys),
        samples=sum(survey.samples for survey in surveys),
        usable=sum(survey.usable for survey in surveys),
        bytes=sum(survey.bytes for survey in surveys),
        formats=sum((survey.formats for survey in surveys), Counter()),
        columns={
            name: np.concatenate([s.columns[name] for s in surveys if name in s.columns])
            for name in names
        },
        skipped=sum((survey.skipped for survey in surveys), Counter()),
        skip_log=[line for survey in surveys for line in survey.skip_log],
    )
