"""Embeds a dataset at several settings, for several models, in one pass over the data.

The dataset is cut into blocks of neighbouring images (`navit_clip.evaluation.datasets.BLOCK`),
which ranks and their worker processes share. A worker decodes each image once and sizes it for
every setting; the images of a block are embedded together wherever that is, so that embeddings are
equal to the last bit on any number of ranks.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from navit_clip.data.decode import EncodedImage, SkipSampleError
from navit_clip.data.workers import prepare_worker, telling_of_killed_workers
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.evaluation.cache import Cache, ImageBlock, bytes_digest
from navit_clip.evaluation.datasets import EvalDataset, Item, Key, block_of
from navit_clip.evaluation.models import Model, Sizer
from navit_clip.evaluation.settings import EvalSetting

SHOWN_SKIPS = 5  # kept word for word; the others are only counted


@dataclass(frozen=True)
class Embedded:
    """A dataset's embeddings by one model, all ranks together, in the dataset's order.

    Attributes:
        names: Each image's file or sample.
        labels: Each image's class index, or -1.
        captions: Each image's captions, if any.
        sizes: Each image's native height and width, upright.
        embeddings: By setting, float32 [E, D] unit vectors.
        lengths: By setting, tokens of each image.
        padding: By setting, share of padding among the tokens computed.
        skipped: Unusable images and captions by reason.
        skips: The first few of these in words.
    """

    names: list[str]
    labels: list[int]
    captions: list[tuple[str, ...]]
    sizes: list[tuple[int, int]]
    embeddings: dict[EvalSetting, Tensor]
    lengths: dict[EvalSetting, list[int]]
    padding: dict[EvalSetting, float]
    skipped: Counter[str]
    skips: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Look:
    """One model's setting, as far as worker processes need to know it."""

    sizer: Sizer
    setting: EvalSetting
    fingerprint: str


@dataclass(frozen=True)
class _Row:
    """What is known of an image beside its embeddings."""

    key: Key
    name: str
    label: int
    captions: tuple[str, ...]
    size: tuple[int, int]


@dataclass(frozen=True)
class _Sized:
    """One image of a block, at the looks that are to be embedded."""

    place: int
    row: _Row
    sized: dict[int, Any]


@dataclass(frozen=True)
class _Skipped:
    """One image of a block that cannot be used."""

    place: int
    key: Key
    name: str
    reason: str
    detail: str


@dataclass(frozen=True)
class _Close:
    """Follows the images of a block; names of all looks in the cache, and what it had of them."""

    keys: dict[int, str]
    hits: dict[int, ImageBlock]


@dataclass(frozen=True)
class _Failure:
    message: str


_Message = tuple[Key, _Sized | _Skipped | _Close] | _Failure


class _SizedItems(IterableDataset[_Message]):
    """One rank's blocks of a dataset, decoded and sized; split further among workers."""

    def __init__(
        self, dataset: EvalDataset, looks: Sequence[_Look], ranks: Ranks, cache: Cache | None
    ) -> None:
        self.dataset, self.looks, self.cache = dataset, looks, cache
        self.rank, self.world_size = ranks.rank, ranks.world_size

    def __iter__(self) -> Iterator[_Message]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        part, parts = self.rank * workers + worker, self.world_size * workers
        try:
            items = self.dataset.read(part, parts)
            for number, block in groupby(items, key=lambda item: block_of(item.key)):
                for message in self._block(block):
                    yield number, message
        except UserError as error:
            yield _Failure(str(error))

    def _block(self, items: Iterable[Item]) -> Iterator[_Sized | _Skipped | _Close]:
        keys: dict[int, str] = {}
        hits: dict[int, ImageBlock] = {}
        if self.cache is not None:
            items = list(items)
            marks = [_mark(item) for item in items]
            for number, look in enumerate(self.looks):
                keys[number] = self.cache.image_key(look.fingerprint, look.setting, marks)
                found = self.cache.read(keys[number], ImageBlock)
                if found is not None:
                    hits[number] = found
        for place, item in enumerate(items):
            try:
                yield self._size(place, item, hits)
            except SkipSampleError as error:
                yield _Skipped(place, item.key, item.name, error.reason, error.detail)
        yield _Close(keys, hits)

    def _size(self, place: int, item: Item, hits: dict[int, ImageBlock]) -> _Sized:
        """Decodes only for looks that the cache did not have.

        Raises:
            SkipSampleError: If the image cannot be used.
        """
        if isinstance(item.data, SkipSampleError):
            raise item.data
        for hit in hits.values():
            if place in hit.skipped:
                raise SkipSampleError(*hit.skipped[place])
        if len(hits) == len(self.looks):
            hit = hits[0]
            size, sized = hit.sizes[hit.rows.index(place)], {}
        else:
            image = EncodedImage(item.data)
            size = image.height, image.width
            sized = {
                number: look.sizer(image, look.setting)
                for number, look in enumerate(self.looks)
                if number not in hits
            }
        return _Sized(place, _Row(item.key, item.name, item.label, item.captions, size), sized)


def _mark(item: Item) -> bytes:
    """What identifies an image in the cache."""
    return b"" if isinstance(item.data, SkipSampleError) else bytes_digest(item.data)


class _Embedder:
    """Embeds one rank's blocks as their last images arrive."""

    def __init__(self, looks: Sequence[tuple[Model, EvalSetting]], cache: Cache | None) -> None:
        self.looks, self.cache = looks, cache
        self.rows: list[_Row] = []
        self.skipped: list[_Skipped] = []
        self.done: list[list[ImageBlock]] = [[] for _ in looks]
        self._waiting: defaultdict[Key, list[_Sized | _Skipped]] = defaultdict(list)

    def take(self, number: Key, message: _Sized | _Skipped | _Close) -> None:
        """The next image of a block, or its end.

        Raises:
            UserError: If the cache cannot be written.
        """
        if not isinstance(message, _Close):
            self._waiting[number].append(message)
            return
        block = self._waiting.pop(number, [])
        images = [one for one in block if isinstance(one, _Sized)]
        skipped = [one for one in block if isinstance(one, _Skipped)]
        self.rows += [image.row for image in images]
        self.skipped += skipped
        for i in range(len(self.looks)):
            if i in message.hits:
                done = message.hits[i].only([image.place for image in images])
            else:
                done = self._embed(i, images, skipped)
                if self.cache is not None:
                    self.cache.write(message.keys[i], done)
            self.done[i].append(done)

    def _embed(
        self, look: int, images: Sequence[_Sized], skipped: Sequence[_Skipped]
    ) -> ImageBlock:
        model = self.looks[look][0]
        sized = [image.sized[look] for image in images]
        before = model.padding_tokens
        return ImageBlock(
            model.embed_images(sized),
            [image.place for image in images],
            [model.length(one) for one in sized],
            [image.row.size for image in images],
            model.padding_tokens - before,
            {one.place: (one.reason, one.detail) for one in skipped},
        )


def embed_dataset(
    models: Sequence[tuple[Model, Sequence[EvalSetting]]],
    dataset: EvalDataset,
    ranks: Ranks,
    *,
    workers: int,
    cache: Cache | None = None,
) -> list[Embedded]:
    """Embeds every image of a dataset by every model at its settings; every rank calls it.

    Args:
        models: Models with the settings that each is shown.
        dataset: Images with labels or captions.
        ranks: This process among all of them; each takes a share, all get everything.
        workers: Decoding processes per rank; 0 decodes in this one.
        cache: Where embeddings are kept from one evaluation to the next.

    Returns:
        For each model, its embeddings.

    Raises:
        UserError: If the dataset cannot be read, no image in it can, or the cache cannot be
            written; the same on all ranks.
    """
    looks = [(model, setting) for model, settings in models for setting in settings]
    prints = [model.fingerprint if cache is not None else "" for model, _ in looks]
    sizers = [
        _Look(model.sizer, setting, mark)
        for (model, setting), mark in zip(looks, prints, strict=True)
    ]
    loader: DataLoader[_Message] = DataLoader(
        _SizedItems(dataset, sizers, ranks, cache),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_prepare,
    )
    embedder = _Embedder(looks, cache)
    failure: str | None = None
    total = None if dataset.count is None else -(-dataset.count // ranks.world_size)
    try:
        with (
            progress_bar("images", total, ranks) as progress,
            telling_of_killed_workers("give fewer --workers"),
        ):
            for message in loader:
                if isinstance(message, _Failure):
                    raise UserError(message.message)
                embedder.take(*message)
                progress.update(not isinstance(message[1], _Close))
    except UserError as error:
        failure = str(error)
    # All ranks learn of a failure on one, or the others would wait for it for ever.
    failures = ranks.gather([failure] if failure else [])
    if failures:
        raise UserError(failures[0])
    return _together(models, embedder, dataset.skipped, ranks)


def _prepare(worker: int) -> None:
    """Else a worker whose parent is killed may wait for ever for somebody to take its images."""
    prepare_worker()


def _as_it_is(message: Any) -> Any:
    """Keeps the loader from turning tuples into lists and arrays into tensors."""
    return message


def progress_bar(what: str, total: int | None, ranks: Ranks) -> tqdm[Any]:
    """A bar over the first rank's share, if somebody watches; gone when it is done.

    Args:
        what: It counts, in the plural.
        total: How many there are, if known.
        ranks: This process among all of them.
    """
    shown = ranks.is_first and sys.stderr.isatty()
    # A training run evaluates hundreds of times: what stays on the terminal must be the result.
    return tqdm(total=total, desc=what, unit=f" {what}", disable=not shown, leave=False)


def describe_skips(counts: Counter[str], skips: Sequence[str]) -> str:
    """What was skipped, in words: ``3 skipped (no_caption 1, …), the first …``.

    Args:
        counts: By reason.
        skips: Single ones, if known.
    """
    reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(counts.items()))
    first = f", the first {skips[0]}" if skips else ""
    return f"{sum(counts.values())} skipped ({reasons}){first}"


def _first(skipped: Sequence[_Skipped]) -> list[str]:
    return [f"{s.reason}: {s.name}: {s.detail}" for s in skipped[:SHOWN_SKIPS]]


def _together(
    models: Sequence[tuple[Model, Sequence[EvalSetting]]],
    embedder: _Embedder,
    dropped: Counter[str],
    ranks: Ranks,
) -> list[Embedded]:
    """What all ranks embedded, in the dataset's order; `dropped` the dataset skipped itself."""
    rows = ranks.gather(embedder.rows)
    skipped = sorted(ranks.gather(embedder.skipped), key=lambda one: one.key)
    counts = Counter(one.reason for one in skipped) + dropped
    if not rows:
        why = describe_skips(counts, _first(skipped)) if counts else "there is none"
        raise UserError(f"no image could be read: {why}")
    order = sorted(range(len(rows)), key=lambda i: rows[i].key)
    rows = [rows[i] for i in order]
    done = iter(embedder.done)
    together = []
    for model, settings in models:
        embeddings: dict[EvalSetting, Tensor] = {}
        lengths: dict[EvalSetting, list[int]] = {}
        padding: dict[EvalSetting, float] = {}
        for setting in settings:
            blocks = next(done)
            own = [block.embeddings for block in blocks]
            # One tensor per rank: each row on its own would be sent with the memory of all.
            local = torch.cat([*own, torch.zeros(0, model.embed_dim)])
            embeddings[setting] = torch.cat(ranks.gather([local]))[order]
            every = ranks.gather([length for block in blocks for length in block.lengths])
            lengths[setting] = [every[i] for i in order]
            (wasted,) = ranks.sum([sum(block.padding for block in blocks)])
            padding[setting] = wasted / (wasted + sum(every))
        together.append(
            Embedded(
                names=[row.name for row in rows],
                labels=[row.label for row in rows],
                captions=[row.captions for row in rows],
                sizes=[row.size for row in rows],
                embeddings=embeddings,
                lengths=lengths,
                padding=padding,
                skipped=counts,
                skips=_first(skipped),
            )
        )
    return together
