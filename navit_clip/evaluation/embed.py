"""Embeds a dataset at several settings, for several models, in one pass over the data.

The dataset is cut into blocks of neighbouring images (`navit_clip.evaluation.datasets.BLOCK`),
which ranks and their worker processes share. A worker decodes each image once and sizes it for
every setting; the images of a block are embedded together wherever that is, so that embeddings are
equal to the last bit on any number of ranks.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from navit_clip.data.decode import EncodedImage
from navit_clip.data.workers import batches_of, explain_killed_workers, prepare_worker
from navit_clip.distributed import Ranks
from navit_clip.errors import SkipSampleError, UserError
from navit_clip.evaluation.cache import Cache, ImageBlock, bytes_digest
from navit_clip.evaluation.datasets import EvalDataset, Item, block_of
from navit_clip.evaluation.models import Model, Sizer
from navit_clip.evaluation.settings import EvalSetting

SHOWN_SKIPS = 5  # described one by one; the others are only counted


@dataclass(frozen=True)
class Embedded:
    """A dataset's embeddings by one model, all ranks together, in the dataset's order.

    Attributes:
        names: Each image's file or sample.
        classes: Indices of the classes that are right for each image, if any.
        captions: Each image's captions, if any.
        sizes: Each image's native height and width, upright.
        embeddings: By setting, float32 [E, D] unit vectors.
        lengths: By setting, tokens of each image.
        padding: By setting, fraction of padding among the tokens computed.
        skipped: Unusable images and captions by reason.
        skips: The first few of these, described.
    """

    names: list[str]
    classes: list[tuple[int, ...]]
    captions: list[tuple[str, ...]]
    sizes: list[tuple[int, int]]
    embeddings: dict[EvalSetting, Tensor]
    lengths: dict[EvalSetting, list[int]]
    padding: dict[EvalSetting, float]
    skipped: Counter[str]
    skips: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Image:
    """A usable image, without its data.

    Attributes:
        place: In its block.
        item: As the dataset has it.
        size: Native height and width.
    """

    place: int
    item: Item
    size: tuple[int, int]


@dataclass(frozen=True)
class _Block:
    """Neighbouring images, decoded once and sized for all pairs of model and setting.

    Attributes:
        images: The usable ones.
        skipped: The others by place; their data is the reason.
        sized: By pair, the usable images as its model takes them; None where `cached` has them.
        cached: By pair, the block as the cache has it, or None.
        keys: By pair, its name in the cache; empty without one.
    """

    images: list[_Image]
    skipped: dict[int, Item]
    sized: list[list[Any] | None]
    cached: list[ImageBlock | None]
    keys: list[str]


class _Blocks(IterableDataset["_Block | UserError"]):
    """One rank's blocks of a dataset, split further among workers.

    Args:
        dataset: Images with labels or captions.
        pairs: How each pair of model and setting sizes images: sizer, setting, fingerprint.
        ranks: This process among all of them.
        cache: Where embeddings are kept.
    """

    def __init__(
        self,
        dataset: EvalDataset,
        pairs: Sequence[tuple[Sizer, EvalSetting, str]],
        ranks: Ranks,
        cache: Cache | None,
    ) -> None:
        self.dataset, self.pairs, self.cache = dataset, pairs, cache
        self.rank, self.world_size = ranks.rank, ranks.world_size

    def __iter__(self) -> Iterator[_Block | UserError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        part, parts = self.rank * workers + worker, self.world_size * workers
        try:
            items = self.dataset.read(part, parts)
            for _, block in groupby(items, key=lambda item: block_of(item.key)):
                yield self._read(list(block))
        except UserError as error:
            yield error  # torch would put a traceback into the message of one that is raised

    def _read(self, items: Sequence[Item]) -> _Block:
        keys: list[str] = []
        cached: list[ImageBlock | None] = [None] * len(self.pairs)
        if self.cache is not None:
            hashes = [_content_hash(item) for item in items]
            keys = [self.cache.image_key(mark, setting, hashes) for _, setting, mark in self.pairs]
            cached = [self.cache.read(key, ImageBlock) for key in keys]
        block = _Block([], {}, [None if found else [] for found in cached], cached, keys)
        for place, item in enumerate(items):
            try:
                self._add(block, place, item)
            except SkipSampleError as error:
                block.skipped[place] = replace(item, data=error)
        return block

    def _add(self, block: _Block, place: int, item: Item) -> None:
        """Adds an image; decodes it only if the cache lacks the block for a pair.

        Raises:
            SkipSampleError: If the image cannot be used.
        """
        if isinstance(item.data, SkipSampleError):
            raise item.data
        found = [known for known in block.cached if known is not None]
        for known in found:
            if place in known.skipped:
                raise SkipSampleError(*known.skipped[place])
        if len(found) == len(self.pairs):
            size = found[0].sizes[found[0].rows.index(place)]
        else:
            image = EncodedImage(item.data)
            size = image.height, image.width
            new = [
                (sized, sizer(image, setting))
                for sized, (sizer, setting, _) in zip(block.sized, self.pairs, strict=True)
                if sized is not None
            ]
            # After all of them: decoding may fail at the first pixel that is asked for.
            for sized, one in new:
                sized.append(one)
        block.images.append(_Image(place, replace(item, data=b""), size))


def _content_hash(item: Item) -> bytes:
    return b"" if isinstance(item.data, SkipSampleError) else bytes_digest(item.data)


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
        models: Models with the settings that each is evaluated at.
        dataset: Images with labels or captions.
        ranks: This process among all of them; each takes a part, all get everything.
        workers: Decoding processes per rank; 0 decodes in this one.
        cache: Where embeddings are kept from one evaluation to the next.

    Returns:
        For each model, its embeddings.

    Raises:
        UserError: If the dataset cannot be read, no image in it can, or the cache cannot be
            written; the same on all ranks.
    """
    pairs = [(model, setting) for model, settings in models for setting in settings]
    prints = [model.fingerprint if cache is not None else "" for model, _ in pairs]
    sizers = [
        (model.sizer, setting, mark) for (model, setting), mark in zip(pairs, prints, strict=True)
    ]
    loader: DataLoader[_Block | UserError] = DataLoader(
        _Blocks(dataset, sizers, ranks, cache),
        batch_size=None,
        num_workers=workers,
        # A worker decodes its next block while the last one is embedded, and holds no more.
        prefetch_factor=1 if workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=_prepare,
    )
    images: list[_Image] = []
    skipped: list[Item] = []
    embedded: list[list[ImageBlock]] = [[] for _ in pairs]
    failure: str | None = None
    total = None if dataset.count is None else -(-dataset.count // ranks.world_size)
    try:
        with (
            progress_bar("images", total, ranks) as progress,
            explain_killed_workers("give fewer --workers"),
        ):
            for block in batches_of(loader):
                if isinstance(block, UserError):
                    raise block
                for i, (model, _) in enumerate(pairs):
                    embedded[i].append(_embed(model, block, i, cache))
                images += block.images
                skipped += block.skipped.values()
                progress.update(len(block.images) + len(block.skipped))
    except UserError as error:
        failure = str(error)
    # The other ranks would wait without end for one that failed alone.
    if failures := ranks.gather([failure] if failure else []):
        raise UserError(failures[0])
    return _together(models, images, skipped, embedded, dataset.skipped, ranks)


def _embed(model: Model, block: _Block, pair: int, cache: Cache | None) -> ImageBlock:
    """Embeds the images of a block, unless the cache has them.

    Raises:
        UserError: If the cache cannot be written.
    """
    places = [image.place for image in block.images]
    cached, sized = block.cached[pair], block.sized[pair]
    if cached is not None:
        return cached.only(places)
    assert sized is not None
    before = model.padding_tokens
    embedded = ImageBlock(
        model.embed_images(sized),
        places,
        [model.length(one) for one in sized],
        [image.size for image in block.images],
        model.padding_tokens - before,
        {place: _reason(item) for place, item in block.skipped.items()},
    )
    if cache is not None:
        cache.write(block.keys[pair], embedded)
    return embedded


def _prepare(worker: int) -> None:
    """Else a worker whose parent is killed may wait without end for its images to be taken."""
    prepare_worker()


def _as_it_is(block: Any) -> Any:
    """Keeps the loader from turning tuples into lists and arrays into tensors."""
    return block


def progress_bar(what: str, total: int | None, ranks: Ranks) -> tqdm[Any]:
    """A bar over the part of rank 0, on a terminal only; gone when it is done.

    Args:
        what: It counts, in the plural.
        total: How many there are, if known.
        ranks: This process among all of them.
    """
    visible = ranks.is_first and sys.stderr.isatty()
    # A training run evaluates hundreds of times: only results should stay on the terminal.
    return tqdm(total=total, desc=what, unit=f" {what}", disable=not visible, leave=False)


def describe_skips(counts: Counter[str], skips: Sequence[str]) -> str:
    """What was skipped: ``3 skipped (no_caption 1, …), the first …``.

    Args:
        counts: By reason.
        skips: Single ones, if known.
    """
    reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(counts.items()))
    first = f", the first {skips[0]}" if skips else ""
    return f"{sum(counts.values())} skipped ({reasons}){first}"


def _reason(item: Item) -> tuple[str, str]:
    assert isinstance(item.data, SkipSampleError)
    return item.data.reason, item.data.detail


def _together(
    models: Sequence[tuple[Model, Sequence[EvalSetting]]],
    images: list[_Image],
    skipped: list[Item],
    embedded: Sequence[list[ImageBlock]],
    dropped: Mapping[str, int],
    ranks: Ranks,
) -> list[Embedded]:
    """What all ranks embedded, in the dataset's order; `dropped` the dataset skipped itself."""
    images = ranks.gather(images)
    skipped = sorted(ranks.gather(skipped), key=attrgetter("key"))
    found = [(item.name, *_reason(item)) for item in skipped]
    skips = [f"{reason}: {name}: {detail}" for name, reason, detail in found[:SHOWN_SKIPS]]
    counts = Counter(reason for _, reason, _ in found) + Counter(dropped)
    if not images:
        why = describe_skips(counts, skips) if counts else "there is none"
        raise UserError(f"no image could be read: {why}")
    order = sorted(range(len(images)), key=lambda i: images[i].item.key)
    items, sizes = [images[i].item for i in order], [images[i].size for i in order]
    of_pair = iter(embedded)
    together = []
    for model, settings in models:
        embeddings: dict[EvalSetting, Tensor] = {}
        lengths: dict[EvalSetting, list[int]] = {}
        padding: dict[EvalSetting, float] = {}
        for setting in settings:
            blocks = next(of_pair)
            # One tensor per rank: each row on its own would be sent with the memory of all.
            parts = [*(block.embeddings for block in blocks), torch.zeros(0, model.embed_dim)]
            embeddings[setting] = torch.cat(ranks.gather([torch.cat(parts)]))[order]
            every = ranks.gather([length for block in blocks for length in block.lengths])
            lengths[setting] = [every[i] for i in order]
            (wasted,) = ranks.sum([sum(block.padding for block in blocks)])
            padding[setting] = wasted / (wasted + sum(every))
        together.append(
            Embedded(
                names=[item.name for item in items],
                classes=[item.classes for item in items],
                captions=[item.captions for item in items],
                sizes=sizes,
                embeddings=embeddings,
                lengths=lengths,
                padding=padding,
                skipped=counts,
                skips=skips,
            )
        )
    return together
