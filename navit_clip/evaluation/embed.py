"""Embeds a dataset at several settings, for several models, in one pass over the data; and texts.

The dataset is cut into blocks of neighbouring images (`navit_clip.evaluation.datasets.BLOCK`),
which ranks and their worker processes share. A worker decodes each image once and sizes it for
every setting; the images of a block are embedded together wherever that is, so that embeddings are
equal to the last bit on any number of ranks.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from navit_clip.data.decode import EncodedImage
from navit_clip.data.image_header import MAX_PIXELS
from navit_clip.data.workers import batches_of, explain_killed_workers, prepare_worker
from navit_clip.distributed import Ranks
from navit_clip.errors import SkipSampleError, UserError
from navit_clip.evaluation.cache import Cache, ImageBlock, bytes_digest
from navit_clip.evaluation.datasets import EvalDataset, Item, block_of
from navit_clip.evaluation.models import Model, Sizer
from navit_clip.evaluation.settings import EvalSetting

SHOWN_SKIPS = 5  # described one by one; the others are only counted
_OF_THE_FILE = ("unreadable_image", "too_large")
TEXT_BLOCK = 256  # texts that are embedded together, wherever that is


@dataclass(frozen=True)
class Embedded:
    """A dataset's embeddings by one model, all ranks together, in the dataset's order.

    Attributes:
        names: Each image's file or sample.
        classes: Indices of the classes that are right for each image, if any.
        captions: Each image's captions, if any.
        sizes: Each image's native height and width, upright.
        embeddings: By setting, float32 [E, D] unit vectors; [0, D] on all ranks but the first.
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

    @property
    def texts(self) -> list[str]:
        """All captions, image by image."""
        return [caption for captions in self.captions for caption in captions]

    @property
    def image_of_texts(self) -> Tensor:
        """Index of each caption's image, int64 [T]."""
        return torch.tensor([i for i, captions in enumerate(self.captions) for _ in captions])


@dataclass(frozen=True)
class Block:
    """Neighbouring images, decoded once and sized for all pairs of model and setting.

    Attributes:
        items: All of them, without their data.
        skipped: Reason and detail of the unusable ones, by place.
        sizes: Native height and width of the usable ones that were decoded.
        sized: For each of these, by pair, what its model takes; None where the cache has the block.
        cached: By pair, the block as the cache has it, or None.
        keys: By pair, its name in the cache; empty without one, or if an image was left out for the
            sake of one setting, which the embeddings at another must not remember.
    """

    items: list[Item]
    skipped: dict[int, tuple[str, str]]
    sizes: list[tuple[int, int]]
    sized: list[list[Any]]
    cached: list[ImageBlock | None]
    keys: list[str]


# Of a block: its items, the unusable ones, and by pair what is known of the others.
_Done = tuple[list[Item], dict[int, tuple[str, str]], list[ImageBlock]]


@dataclass(eq=False)
class _Blocks(IterableDataset["Block | UserError"]):
    """One rank's blocks of a dataset, split further among workers.

    `pairs` are each pair of model and setting: how it sizes images, setting, fingerprint.
    """

    dataset: EvalDataset
    pairs: Sequence[tuple[Sizer, EvalSetting, str]]
    ranks: Ranks
    cache: Cache | None
    max_pixels: int

    def __iter__(self) -> Iterator[Block | UserError]:
        worker, workers = 0, 1
        if info := get_worker_info():
            worker, workers = info.id, info.num_workers
            # Else one whose parent is killed may wait without end for its images to be taken.
            prepare_worker()
        part, parts = self.ranks.rank * workers + worker, self.ranks.world_size * workers
        try:
            items = self.dataset.read(part, parts)
            for _, block in groupby(items, key=lambda item: block_of(item.key)):
                yield self._read(list(block))
        except UserError as error:
            yield error  # torch would put a traceback into the message of one that is raised

    def _read(self, items: Sequence[Item]) -> Block:
        keys: list[str] = []
        cached: list[ImageBlock | None] = [None] * len(self.pairs)
        if self.cache is not None:
            hashes = [
                b"" if isinstance(item.data, SkipSampleError) else bytes_digest(item.data)
                for item in items
            ]
            keys = [self.cache.image_key(mark, setting, hashes) for _, setting, mark in self.pairs]
            cached = [self.cache.read(key, ImageBlock.from_file) for key in keys]
        unusable = {place: why for one in cached if one for place, why in one.skipped.items()}
        block = Block([replace(item, data=b"") for item in items], {}, [], [], cached, keys)
        of_setting = False
        for place, item in enumerate(items):
            try:
                if isinstance(item.data, SkipSampleError):
                    raise item.data
                if place in unusable:
                    raise SkipSampleError(*unusable[place])
                if None in cached:
                    image = EncodedImage(item.data, self.max_pixels)
                    # All of them before one is kept: decoding may fail at the first pixel.
                    block.sized.append(
                        [
                            sizer(image, setting) if known is None else None
                            for known, (sizer, setting, _) in zip(cached, self.pairs, strict=True)
                        ]
                    )
                    block.sizes.append((image.height, image.width))
            except SkipSampleError as error:
                block.skipped[place] = error.reason, error.detail
                if error is not item.data and error.reason not in _OF_THE_FILE:
                    of_setting = True
        if of_setting and len(self.pairs) > 1:
            block.keys.clear()
        return block


def embed_dataset(
    models: Sequence[tuple[Model, Sequence[EvalSetting]]],
    dataset: EvalDataset,
    ranks: Ranks,
    *,
    workers: int,
    cache: Cache | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[Embedded]:
    """Embeds every image of a dataset by every model at its settings; every rank calls it.

    Args:
        models: Models with the settings that each is evaluated at.
        dataset: Images with labels or captions.
        ranks: This process among all of them; each takes a part, rank 0 gets everything, the
            others all but the vectors, which would fill their host's memory.
        workers: Decoding processes per rank; 0 decodes in this one.
        cache: Where embeddings are kept from one evaluation to the next.
        max_pixels: Images of more are skipped.

    Returns:
        For each model, its embeddings.

    Raises:
        UserError: If the dataset cannot be read, no image in it can, or the cache cannot be
            written; the same on all ranks.
    """
    pairs = [(model, setting) for model, settings in models for setting in settings]
    with fail_together(ranks):
        blocks = embed_blocks(pairs, dataset, ranks, workers, cache, max_pixels)
        done = [(block.items, block.skipped, embedded) for block, embedded in blocks]
    return _together([settings for _, settings in models], _gathered(done, ranks), dataset)


def embed_blocks(
    pairs: Sequence[tuple[Model, EvalSetting]],
    dataset: EvalDataset,
    ranks: Ranks,
    workers: int,
    cache: Cache | None,
    max_pixels: int,
) -> Iterator[tuple[Block, list[ImageBlock]]]:
    """Embeds this rank's blocks of a dataset; arguments as of `embed_dataset`.

    Yields:
        A block, and by pair of model and setting its embeddings.

    Raises:
        UserError: On this rank alone, see `fail_together`.
    """
    marks = [""] * len(pairs)
    if cache is not None:
        cap = "" if max_pixels == MAX_PIXELS else f" {max_pixels}"  # decides what is skipped
        marks = [model.fingerprint + cap for model, _ in pairs]
    both = zip(pairs, marks, strict=True)
    sizers = [(model.sizer, setting, mark) for (model, setting), mark in both]
    loader: DataLoader[Block | UserError] = DataLoader(
        _Blocks(dataset, sizers, ranks, cache, max_pixels),
        batch_size=None,
        num_workers=workers,
        # A worker decodes its next block while the last one is embedded, and holds no more.
        prefetch_factor=1 if workers else None,
    )
    total = None if dataset.count is None else -(-dataset.count // ranks.world_size)
    with (
        _progress_bar("images", total, ranks) as progress,
        explain_killed_workers("give fewer --workers"),
    ):
        for block in batches_of(loader):
            if isinstance(block, UserError):
                raise block
            yield block, [_embed(model, block, i, cache) for i, (model, _) in enumerate(pairs)]
            progress.update(len(block.items))


def _embed(model: Model, block: Block, pair: int, cache: Cache | None) -> ImageBlock:
    """The embeddings of a block, which the cache keeps; a `UserError` if it cannot be written."""
    places = [place for place in range(len(block.items)) if place not in block.skipped]
    if (cached := block.cached[pair]) is not None:
        return cached.only(places)
    sized, before = [one[pair] for one in block.sized], model.padding_tokens
    embedded = ImageBlock(
        model.embed_images(sized),
        places,
        [model.length(one) for one in sized],
        block.sizes,
        model.padding_tokens - before,
        block.skipped,
    )
    if cache is not None and block.keys:
        cache.write(block.keys[pair], *embedded.to_file())
    return embedded


def _gathered(own: list[_Done], ranks: Ranks) -> list[_Done]:
    """The blocks of all ranks, on all but the first without their vectors."""
    known = [
        # Cloned, since a slice travels with all that it is a part of.
        (items, bad, [replace(one, embeddings=one.embeddings[:0].clone()) for one in embedded])
        for items, bad, embedded in own
    ]
    every = ranks.gather(known)
    vectors = ranks.gather_first([[one.embeddings for one in embedded] for _, _, embedded in own])
    if not ranks.is_first:
        return every
    return [
        (items, bad, [replace(one, embeddings=v_ND) for one, v_ND in zip(known, of, strict=True)])
        for (items, bad, known), of in zip(every, vectors, strict=True)
    ]


def _together(
    every: Sequence[Sequence[EvalSetting]], done: list[_Done], dataset: EvalDataset
) -> list[Embedded]:
    """All blocks in the dataset's order, for each model's settings."""
    done.sort(key=lambda one: one[0][0].key)
    found = [(items[i].name, *why) for items, bad, _ in done for i, why in bad.items()]
    skips = [f"{reason}: {name}: {detail}" for name, reason, detail in found[:SHOWN_SKIPS]]
    skips = [*skips, *dataset.skips][:SHOWN_SKIPS]
    counts = Counter(reason for _, reason, _ in found) + Counter(dataset.skipped)
    items = [item for items, bad, _ in done for i, item in enumerate(items) if i not in bad]
    if not items:
        why = describe_skips(counts, skips) if counts else "there is none"
        raise UserError(f"no image could be read: {why}")
    of_pair = zip(*(embedded for _, _, embedded in done), strict=True)
    together = []
    for settings in every:
        blocks = {setting: next(of_pair) for setting in settings}
        lengths = {s: [n for block in blocks[s] for n in block.lengths] for s in settings}
        padding = {s: sum(block.padding for block in blocks[s]) for s in settings}
        together.append(
            Embedded(
                names=[item.name for item in items],
                classes=[item.classes for item in items],
                captions=[item.captions for item in items],
                sizes=[size for block in blocks[settings[0]] for size in block.sizes],
                embeddings={s: torch.cat([b.embeddings for b in blocks[s]]) for s in settings},
                lengths=lengths,
                padding={s: padding[s] / (padding[s] + sum(lengths[s])) for s in settings},
                skipped=counts,
                skips=skips,
            )
        )
    return together


def embed_texts(model: Model, texts: Sequence[str], ranks: Ranks, cache: Cache | None) -> Tensor:
    """Embeds prompts or captions, the same on all ranks, together and in blocks as images are.

    Returns:
        All of them on every rank, float32 [T, D] unit vectors on the host. Equal texts have equal
        vectors, which else would differ in the last digits with their neighbours in a block.

    Raises:
        UserError: If the cache cannot be written; the same on all ranks.
    """
    embedded: list[tuple[int, Tensor]] = []
    starts = range(0, len(texts), TEXT_BLOCK)[ranks.rank :: ranks.world_size]
    total = sum(len(texts[start : start + TEXT_BLOCK]) for start in starts)
    with fail_together(ranks), _progress_bar("texts", total, ranks) as progress:
        for start in starts:
            block = texts[start : start + TEXT_BLOCK]
            vectors = None
            if cache is not None:
                key = cache.text_key(model.fingerprint, block)
                vectors = cache.read(key, lambda tensors, _: tensors["embeddings"])
            if vectors is None:
                vectors = model.embed_texts(block)
                if cache is not None:
                    cache.write(key, {"embeddings": vectors}, {})
            embedded.append((start, vectors))
            progress.update(len(block))
        if not texts:
            embedded.append((0, model.embed_texts([])))
    parts = [part for _, part in sorted(ranks.gather(embedded), key=lambda pair: pair[0])]
    row = {text: index for index, text in enumerate(texts)}
    return torch.cat(parts)[[row[text] for text in texts]]


@contextmanager
def fail_together(ranks: Ranks) -> Iterator[None]:
    """Raises a `UserError` of one rank on all: the others would wait for that one without end."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = error
    ranks.raise_together(problem)


def _progress_bar(what: str, total: int | None, ranks: Ranks) -> tqdm[Any]:
    """A bar over the part of rank 0, on a terminal only, gone when it is done; `what` is plural."""
    visible = ranks.is_first and sys.stderr.isatty()
    # A training run evaluates hundreds of times: only results should stay on the terminal.
    return tqdm(total=total, desc=what, unit=f" {what}", disable=not visible, leave=False)


def describe_skips(counts: Counter[str], skips: Sequence[str]) -> str:
    """What was skipped, by reason, and the first: ``3 skipped (no_caption 1, …), the first …``."""
    reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(counts.items()))
    first = f", the first {skips[0]}" if skips else ""
    return f"{sum(counts.values())} skipped ({reasons}){first}"
