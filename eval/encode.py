"""Embeds a source at several token budgets in one pass, shared over ranks and workers."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from eval.sources import Item, Key, Source
from navit_clip.data.decode import EncodedImage, SkipSampleError
from navit_clip.embedding import embed_images, size_image
from navit_clip.errors import UserError
from navit_clip.image_tower import ImageTowerConfig
from navit_clip.interop.pretrained import Pretrained
from navit_clip.packing import ImagePatches
from navit_clip.ranks import Ranks

_GROUP = 128  # images sized at all budgets that wait for a forward pass


@dataclass(frozen=True)
class Sized:
    """One image at every budget.

    Attributes:
        key: Place in the source.
        name: File or sample.
        label: Class index, or -1.
        captions: Its captions, if any.
        images: The image at each budget, in the order of the budgets.
    """

    key: Key
    name: str
    label: int
    captions: tuple[str, ...]
    images: list[ImagePatches]


@dataclass(frozen=True)
class Embedded:
    """A source's embeddings, all ranks together, in the source's order.

    Attributes:
        names: Each image's file or sample.
        labels: Each image's class index, or -1.
        captions: Each image's captions, if any.
        embeddings: By budget, float32 [E, D] unit vectors.
        lengths: By budget, tokens of each image.
        skipped: Unusable images by reason.
    """

    names: list[str]
    labels: list[int]
    captions: list[tuple[str, ...]]
    embeddings: dict[int, Tensor]
    lengths: dict[int, list[int]]
    skipped: Counter[str]


@dataclass(frozen=True)
class _Failure:
    message: str


class _SizedItems(IterableDataset[Sized | SkipSampleError | _Failure]):
    """One rank's share of a source, decoded and sized; split further among workers."""

    def __init__(
        self,
        source: Source,
        config: ImageTowerConfig,
        budgets: Sequence[int],
        square: bool,
        ranks: Ranks,
    ) -> None:
        self.source, self.config, self.budgets, self.square = source, config, budgets, square
        self.rank, self.world_size = ranks.rank, ranks.world_size

    def __iter__(self) -> Iterator[Sized | SkipSampleError | _Failure]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        part, parts = self.rank * workers + worker, self.world_size * workers
        try:
            for item in self.source.read(part, parts):
                yield self._size(item)
        except UserError as error:
            yield _Failure(str(error))

    def _size(self, item: Item) -> Sized | SkipSampleError:
        try:
            if isinstance(item.data, SkipSampleError):
                raise item.data
            image = EncodedImage(item.data)
            images = [
                size_image(image, self.config, budget, square=self.square)
                for budget in self.budgets
            ]
        except SkipSampleError as error:
            return SkipSampleError(error.reason, f"{item.name}: {error.detail}")
        return Sized(item.key, item.name, item.label, item.captions, images)


def embed_source(
    pretrained: Pretrained, source: Source, budgets: Sequence[int], ranks: Ranks, *, workers: int
) -> Embedded:
    """Embeds every image of a source at every budget; every rank calls it.

    Args:
        pretrained: The model.
        source: Images with labels or captions.
        budgets: Most tokens per image, several.
        ranks: This process among all of them; each takes a share, all get everything.
        workers: Decoding processes per rank; 0 decodes in this one.

    Raises:
        UserError: If the source cannot be read, or no image in it can.
    """
    config = pretrained.model.config.image
    items = _SizedItems(source, config, budgets, pretrained.preprocess.square, ranks)
    loader: DataLoader[Sized | SkipSampleError | _Failure] = DataLoader(
        items, batch_size=None, num_workers=workers
    )
    skipped: list[SkipSampleError] = []
    rows: list[tuple[Key, str, int, tuple[str, ...], list[int]]] = []
    parts: list[Tensor] = []
    failure: str | None = None
    waiting: list[Sized] = []

    def flush() -> None:
        if not waiting:
            return
        per_budget = [
            embed_images(pretrained, [sized.images[i] for sized in waiting])
            for i in range(len(budgets))
        ]
        parts.append(torch.stack(per_budget, dim=1))
        for sized in waiting:
            lengths = [len(image.patches) for image in sized.images]
            rows.append((sized.key, sized.name, sized.label, sized.captions, lengths))
        waiting.clear()

    progress = tqdm(
        loader, desc="images", unit=" images", disable=not ranks.is_first or not sys.stderr.isatty()
    )
    for sized in progress:
        if isinstance(sized, _Failure):
            failure = sized.message
            break
        if isinstance(sized, SkipSampleError):
            skipped.append(sized)
            continue
        waiting.append(sized)
        if len(waiting) == _GROUP:
            flush()
    flush()
    # All ranks learn of a failure on one, or the others would wait for it for ever.
    failures = ranks.gather([failure] if failure else [])
    if failures:
        raise UserError(failures[0])
    # Not reported sample by sample from workers: that would tear the bar.
    local = torch.cat(parts or [torch.zeros(0, len(budgets), pretrained.model.config.embed_dim)])
    # One tensor per rank: each row on its own would be sent with the memory of all.
    gathered = list(zip(ranks.gather(rows), torch.cat(ranks.gather([local])), strict=True))
    reasons = ranks.gather([(error.reason, str(error)) for error in skipped])
    if ranks.is_first:
        for _, line in reasons[:5]:
            print(f"skipped {line}", flush=True)
    counts = Counter(reason for reason, _ in reasons)
    if not gathered:
        raise UserError(f"no image could be read; skipped: {dict(counts) or 'none found'}")
    gathered.sort(key=lambda row: row[0][0])
    embeddings_EBD = torch.stack([embedding for _, embedding in gathered])
    kept = [row for row, _ in gathered]
    return Embedded(
        names=[row[1] for row in kept],
        labels=[row[2] for row in kept],
        captions=[row[3] for row in kept],
        embeddings={b: embeddings_EBD[:, i] for i, b in enumerate(budgets)},
        lengths={b: [row[4][i] for row in kept] for i, b in enumerate(budgets)},
        skipped=counts,
    )
